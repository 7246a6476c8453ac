"""What the experiments on modular networks reached: a type each, for JSON (`train.write_result`) and for its report.

Accuracies are fractions and times seconds; nan is not known. A value with the axes `*seeds` is of one seed, or of
several behind each other as `stacked` puts them.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Float, Int

from compo_jax.modular.analysis import Removal
from compo_jax.modular.comparison import Paired, mean_known, paired, rank_correlation
from compo_jax.modular.evaluate import Gap
from compo_jax.modular.forecast import Rerouting
from compo_jax.modular.random_routes import BesideRandom
from compo_jax.modular.settings import Settings

Result = TypeVar("Result", bound=tuple)


def stacked(of_seeds: Sequence[Result]) -> Result:
    """The values of several seeds behind each other along a new first axis."""
    return jax.tree.map(lambda *values: np.stack(values), *of_seeds)


class NetShape(NamedTuple):
    """The settings that the networks of a run share; `size` is the side of the images, in pixels."""

    layers: int
    templates: int
    width: int
    patch: int
    block: str
    bn: str
    route: str
    start: str
    groups: int
    size: int


class Job(NamedTuple):
    """What all results say of their run.

    Attributes:
      data: name of the data.
      seconds: wall time of all parts.
      training: of the networks; where a new task is learned or adapted to, of those that it starts from.
      train_images, test_images: of each task or domain.
      validation: the part of the training images that is tested on in place of the test images; 0 for none.
    """

    name: str
    data: str
    seeds: tuple[int, ...]
    seconds: float
    net: NetShape
    training: Settings
    train_images: dict[str, int]
    test_images: dict[str, int]
    validation: float = 0.0


# -- several tasks at once ---------------------------------------------------------------------------------------------
class Curves(NamedTuple):
    """What was logged while routes were learned: the loss (nats), H(a) / log M and 1 - H(ā) / log M, where a are a
    layer's weights, or the shares of its coefficients (`routes.shares`)."""

    step: Int[np.ndarray, "*seeds records"]
    cross_entropy: Float[np.ndarray, "*seeds records"]
    entropy: Float[np.ndarray, "*seeds records"]
    unused: Float[np.ndarray, "*seeds records"]


class LearnedOrder(NamedTuple):
    """A learned route.

    Attributes:
      hard: the template of the largest weight at each layer (of groups of channels: at each layer's groups in turn).
      weights: coefficients, or the soft weights at their end.
      gap: None where no order was made hard.
      curves: how it came about.
    """

    hard: Int[np.ndarray, "*seeds tasks layers"]
    weights: Float[np.ndarray, "*seeds tasks layers templates"]
    gap: Gap | None
    curves: Curves


class MultitaskMethod(NamedTuple):
    """What a way to learn several tasks reached, and its costs: scalars of all tasks, multiply-adds of an image."""

    accuracy: Float[np.ndarray, "*seeds tasks"]
    parameters: Int[np.ndarray, "*seeds"]
    macs: Int[np.ndarray, "*seeds"]
    seconds: Float[np.ndarray, "*seeds"]
    order: LearnedOrder | None = None  # where it is learned


class OrderAnalysis(NamedTuple):
    """What the routes of one method say, first seed; the last three are None with one template, the last with groups of
    channels. `route`: the kind of them, see `ModularNet`."""

    method: str
    route: str
    random: BesideRandom
    removal: Removal | None
    removal_images: int | None  # of each task
    rerouting: Rerouting | None

    @property
    def linear(self) -> bool:
        """Whether routes are coefficients (see `analysis`)."""
        return self.route == "linear"


class MultitaskResults(NamedTuple):
    """Of `experiments/modular_multitask.py`; `analysis` is None where no order is learned.

    Attributes:
      route_rates: of each kind of order that is learned, in multiples of the learning rate.
    """

    job: Job
    tasks: tuple[str, ...]
    classes: Int[np.ndarray, " tasks"]
    route_rates: dict[str, float]
    methods: dict[str, MultitaskMethod]
    analysis: OrderAnalysis | None


# -- a new task --------------------------------------------------------------------------------------------------------
class Sources(NamedTuple):
    """The tasks, or domains, that templates were trained on: their accuracies on their own test images."""

    accuracy: Float[np.ndarray, " sources"]


class NewTasks(NamedTuple):
    """Of one seed and budget: the accuracy of each method on each new task, and the source that its route is from."""

    accuracy: dict[str, Float[np.ndarray, " tasks"]]
    chosen: tuple[str, ...]


class TransferMethod(NamedTuple):
    """Scalars that learn; scalars that a new task adds to the pool; whether it is there only to be held against."""

    trained: int
    stored: int
    control: bool


class TransferResults(NamedTuple):
    """Of `experiments/modular_transfer.py`.

    Attributes:
      new_training: of a new task.
      budgets: labelled images of each class of a new task; None is all.
      tasks, sources: the names of the new tasks, and of those that made the templates; of each seed.
      source_parts, parts: of each seed; of each budget and seed.
    """

    job: Job
    new_training: Settings
    budgets: tuple[int | None, ...]
    tasks: tuple[tuple[str, ...], ...]
    sources: tuple[tuple[str, ...], ...]
    methods: dict[str, TransferMethod]
    source_parts: tuple[Sources, ...]
    parts: tuple[tuple[NewTasks, ...], ...]

    def accuracy(self, name: str) -> Float[np.ndarray, "budgets seeds tasks"]:
        """Of a method."""
        return np.array([[part.accuracy[name] for part in of_seeds] for of_seeds in self.parts])

    def against(self, name: str, reference: str) -> list[Paired]:
        """The differences of two methods on the same seed and new task, for each budget."""
        both = zip(self.accuracy(name), self.accuracy(reference), strict=True)
        return [paired(values.ravel(), others.ravel()) for values, others in both]


# -- a domain without labels -------------------------------------------------------------------------------------------
class Target(NamedTuple):
    """Of one seed and target.

    Attributes:
      accuracy, objective: of each method; information maximisation on the target's training images, in nats.
      sources: accuracy of each source as it is.
      chosen: the source that the lowest objective says.
      source_routes: the sources' weights or coefficients.
      routes: those that methods adapted.
    """

    accuracy: dict[str, Float[np.ndarray, ""]]
    objective: dict[str, Float[np.ndarray, ""]]
    sources: Float[np.ndarray, " sources"]
    chosen: str
    source_routes: Float[np.ndarray, "sources layers templates"]
    routes: dict[str, Float[np.ndarray, "layers templates"]]


class AdaptationResults(NamedTuple):
    """Of `experiments/modular_adaptation.py`.

    Attributes:
      adapting: settings of an adaptation; its rate of routes is that of a mixture's weights.
      free_rate: that of free coefficients or logits, in multiples of the rate as well.
      targets: the domains that are left out in turn; the others are the sources.
      made: a sentence where the domains are one set, corrupted; else empty.
      baseline: the method that the others are held against.
      methods: what each of them adapts: sources (nothing), order, bn, order+bn; or oracle, chosen by labels.
      source_parts, parts: of each seed and target.
      held_out: domains that are no source of any target.
    """

    job: Job
    adapting: Settings
    free_rate: float
    domains: tuple[str, ...]
    targets: tuple[str, ...]
    classes: tuple[str, ...]
    made: str
    baseline: str
    methods: dict[str, str]
    source_parts: tuple[tuple[Sources, ...], ...]
    parts: tuple[tuple[Target, ...], ...]
    held_out: tuple[str, ...] = ()

    def accuracy(self, name: str) -> Float[np.ndarray, "seeds targets"]:
        """Of a method."""
        return np.array([[part.accuracy[name] for part in of_seed] for of_seed in self.parts])

    def objective(self, name: str) -> Float[np.ndarray, "seeds targets"]:
        """Of a method, in nats."""
        return np.array([[part.objective[name] for part in of_seed] for of_seed in self.parts])

    def sources_of(self, target: str) -> list[str]:
        """The other domains that aren't held out."""
        return [domain for domain in self.domains if domain not in (target, *self.held_out)]

    def source_accuracy(self) -> tuple[Float[np.ndarray, "domains targets"], Float[np.ndarray, " domains"]]:
        """Of each domain as a source of each target, and on its own test images; means over seeds, nan for none."""

        def of_domains(parts, key):
            table = np.full((len(parts), len(self.targets), len(self.domains)), np.nan)
            for seed, t in np.ndindex(table.shape[:2]):
                places = [self.domains.index(source) for source in self.sources_of(self.targets[t])]
                table[seed, t, places] = getattr(parts[seed][t], key)
            return table

        on_targets, at_home = of_domains(self.parts, "sources"), of_domains(self.source_parts, "accuracy")
        return mean_known(on_targets, 0).T, mean_known(at_home, (0, 1))

    def against_baseline(self, name: str) -> Paired:
        """The difference to the baseline on the same seed and target."""
        return paired(self.accuracy(name).ravel(), self.accuracy(self.baseline).ravel())

    def correlation(self, groups: Sequence[str]) -> Float[np.ndarray, "seeds targets"]:
        """The rank correlation of objective and accuracy over the methods of these groups."""
        names = [name for name, group in self.methods.items() if group in groups]
        values = (np.array([of(name) for name in names]) for of in (self.objective, self.accuracy))
        shape = (len(names), len(self.job.seeds), len(self.targets))
        return rank_correlation(*(x.reshape(shape) for x in values))


# -- blocks used again -------------------------------------------------------------------------------------------------
class ReuseMethod(NamedTuple):
    """What an order of blocks reached, and its costs: scalars, multiply-adds of an image."""

    accuracy: Float[np.ndarray, "*seeds"]
    train_accuracy: Float[np.ndarray, "*seeds"]
    parameters: Int[np.ndarray, "*seeds"]
    macs: Int[np.ndarray, "*seeds"]
    seconds: Float[np.ndarray, "*seeds"]
    templates: Int[np.ndarray, "*seeds"]
    route: Int[np.ndarray, "*seeds layers"]  # the template of the largest weight
    gap: Gap | None = None  # of a hard order that was learned


class ReuseResults(NamedTuple):
    """Of `experiments/modular_reuse.py`; `reference` calls each block once."""

    job: Job
    classes: int
    blocks: int
    reference: str
    methods: dict[str, ReuseMethod]

    def against_reference(self, name: str) -> Paired:
        """The difference to the reference, seed by seed."""
        return paired(self.methods[name].accuracy, self.methods[self.reference].accuracy)
