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
from compo_jax.modular.batches import balanced_batches
from compo_jax.modular.evaluate import Gap, discretisation_gap, require_tasks, statistics
from compo_jax.modular.losses import Prepare, objective
from compo_jax.modular.net import ModularNet
from compo_jax.modular.settings import Settings, phase
from compo_jax.modular.updates import optimizer
from compo_jax.train import Checkpoints, fit, init_state, jit_runner
from compo_jax.tree import Tree


class Trained(NamedTuple):
    """A trained network.

    Attributes:
      variables: at the end, with batch statistics for the route that was trained on: hard, or soft where the settings
        have no third phase.
      before: at the end of the second phase, its statistics those that training began with.
    """

    variables: Tree
    before: Tree


@runtime_checkable
class Train(Protocol):
    """Trains from these variables on each task's split.

    A killed training goes on from the checkpoints in `folder`; `fit_options` are those of `train.fit`.
    """

    def __call__(
        self, variables: Tree, splits: Sequence[Split], seed: int, folder: Path | None = None, **fit_options
    ) -> Trained: ...


@runtime_checkable
class MeasureGap(Protocol):
    """The discretisation gap on the test splits, statistics taken over images of the training splits."""

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
      trained: path patterns of the parameters that are trained; default all. The others stay as they are to the bit.
      runner: `jit_runner` or `pmap_runner`, under which each device normalises its part by that part's statistics.
    """
    transform = optimizer(settings)
    run = runner(objective(net, prepare, settings, augment), transform)
    temperature = float(phase(settings, settings.freeze).temperature)
    last = routes.hard if settings.freeze < settings.steps else partial(routes.soft, temperature=temperature)
    estimate = statistics(net, prepare, last)

    def some(splits, seed):
        return itertools.islice(balanced_batches(splits, settings.batch, seed)(0), settings.estimate)

    def train(variables, splits, seed, folder: Path | None = None, **fit_options) -> Trained:
        require_tasks(net, splits, labels=True)
        params, frozen = tree.partition(variables["params"], trained)
        key = jax.random.fold_in(jax.random.key(seed), 1)
        context = {"frozen": frozen, "statistics": variables["batch_stats"], "key": key}
        state = init_state(params, transform)
        before = variables
        # In two goes with a folder each, so that the state between them is there again when a run is resumed.
        for name, steps in (("routing", settings.freeze), ("fixed", settings.steps)):
            kept = None if folder is None else Checkpoints(local_path(folder) / name)
            batches = balanced_batches(splits, settings.batch, seed)
            state = fit(run, state, context, batches, steps, checkpoints=kept, **fit_options)
            whole = {**variables, "params": tree.combine(state.params, frozen)}
            before = whole if name == "routing" else before
        return Trained(whole if settings.statistics == "stored" else estimate(whole, some(splits, seed)), before)

    def gap(trained, splits, seed, test_splits) -> Gap:
        return discretisation_gap(
            net,
            prepare,
            trained.before,
            trained.variables,
            lambda: some(splits, seed),
            test_splits,
            temperature=temperature,
        )

    return Learner(train, gap)
