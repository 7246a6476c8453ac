"""Training of a modular network, or of the parts of it that are asked for."""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import jax

from compo_jax import tree
from compo_jax.data import Split
from compo_jax.data.stream import Augmentation
from compo_jax.files import local_path
from compo_jax.modular import routes
from compo_jax.modular.asked import require_same
from compo_jax.modular.batches import balanced_batches
from compo_jax.modular.evaluate import Gap, discretisation_gap, require_tasks, statistics
from compo_jax.modular.losses import Prepare, objective
from compo_jax.modular.net import ModularNet
from compo_jax.modular.settings import Settings, learned_temperature
from compo_jax.modular.updates import optimizer
from compo_jax.train import Checkpoints, fit, init_state, jit_runner
from compo_jax.tree import Tree


class Trained(NamedTuple):
    """A trained network.

    Attributes:
      variables: at the end, with batch statistics for the network's route.
      before: when routes were learned, its statistics those that training began with: of hard ones at the end of the
        second phase, of others at the end.
    """

    variables: Tree
    before: Tree


FIXED_ORDER = "^(?!route$)"  # the paths of all parameters but the route


@runtime_checkable
class Train(Protocol):
    """Trains from these variables on each task's split.

    A killed training goes on from the checkpoints in `folder`; `fit_options` are those of `train.fit`. ValueError where
    these are of other settings, images, or another seed.
    """

    def __call__(
        self, variables: Tree, splits: Sequence[Split], seed: int, folder: Path | None = None, **fit_options
    ) -> Trained: ...


@runtime_checkable
class MeasureGap(Protocol):
    """The discretisation gap on the test splits, statistics taken over images of the training splits.

    `trained` is of a hard network; or of a linear or soft one that was trained on in the nearest one-hot order (see
    `edit.harden`), `before` what it was.
    """

    def __call__(self, trained: Trained, splits: Sequence[Split], seed: int, test_splits: Sequence[Split]) -> Gap: ...


class Learner(NamedTuple):
    """What `learner` makes."""

    train: Train
    gap: MeasureGap


def learner(
    net: ModularNet,
    prepare: Prepare,
    settings: Settings,
    augment: Augmentation | None = None,
    *,
    trained: str | Sequence[str] = "",
    runner=jit_runner,
) -> Learner:
    """How this network is trained.

    Args:
      prepare: bytes (rows, size, size, 3) to the network's input, `TaskStream.prepare` say.
      trained: path patterns of the parameters that are trained; default all. The others stay as they are to the bit:
        `FIXED_ORDER` trains all but the route.
      runner: `jit_runner` or `pmap_runner`, under which each device normalises its part by that part's statistics.
    """
    patterns = [trained] if isinstance(trained, str) else trained
    fixed = not tree.first_match("route", [(pattern, True) for pattern in patterns], False)
    if fixed:
        settings = settings._replace(phases=(0.0, 0.0))
    freeze = settings.freeze if net.route == "hard" else settings.steps
    transform = optimizer(settings, freeze)
    run = runner(objective(net, prepare, settings, augment), transform)
    estimate = statistics(net, prepare)

    def some(splits, seed):
        return itertools.islice(balanced_batches(splits, settings.batch, seed)(0), settings.estimate)

    def train(variables, splits, seed, folder: Path | None = None, **fit_options) -> Trained:
        require_tasks(net, splits, labels=True)
        routes.KINDS[net.route](variables["params"]["route"])  # raises where it holds NaN, say
        params, frozen = tree.partition(variables["params"], trained)
        if folder is not None:
            require_same(folder, net, settings, splits, seed, trained=list(patterns))
        key = jax.random.fold_in(jax.random.key(seed), 1)
        context = {"frozen": frozen, "statistics": variables["batch_stats"], "key": key}
        state = init_state(params, transform)
        before = variables
        # In two goes with a folder each, so that the state between them is there again when a run is resumed.
        for name, steps in {"routing": freeze, "fixed": settings.steps}.items():
            kept = None if folder is None else Checkpoints(local_path(folder) / name)
            batches = balanced_batches(splits, settings.batch, seed)
            state = fit(run, state, context, batches, steps, checkpoints=kept, **fit_options)
            whole = {**variables, "params": tree.combine(state.params, frozen)}
            before = whole if name == "routing" else before
        return Trained(whole if settings.statistics == "stored" else estimate(whole, some(splits, seed)), before)

    as_learned = routes.KINDS[net.route]
    if net.route == "hard":  # of what came to a fixed order by `harden`, a soft network, whose temperature is 1
        temperature = 1.0 if fixed else learned_temperature(settings)
        as_learned = partial(routes.soft, temperature=temperature)

    def gap(trained, splits, seed, test_splits) -> Gap:
        return discretisation_gap(
            net,
            prepare,
            trained.before,
            trained.variables,
            lambda: some(splits, seed),
            test_splits,
            route=as_learned,
        )

    return Learner(train, gap)
