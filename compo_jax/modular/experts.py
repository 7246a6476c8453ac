"""Training and accuracies of mixtures of experts, on the batches and by the settings of modular networks."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from compo_jax.data import Split
from compo_jax.data.stream import Augmentation
from compo_jax.files import local_path
from compo_jax.modular.asked import require_same
from compo_jax.modular.batches import balanced_batches
from compo_jax.modular.evaluate import (
    Estimate,
    Measure,
    answers,
    pooled_statistics,
    require_tasks,
    right,
    with_squared_means,
)
from compo_jax.modular.expert_net import ExpertNet
from compo_jax.modular.losses import Prepare, by_task, cross_entropy
from compo_jax.modular.settings import Settings
from compo_jax.modular.updates import optimizer
from compo_jax.train import Checkpoints, fit, init_state, jit_runner
from compo_jax.tree import Tree


@runtime_checkable
class TrainExperts(Protocol):
    """Trains from these variables on each task's split; the trained ones, batch statistics taken again.

    A killed training goes on from the checkpoints in `folder`; `fit_options` are those of `train.fit`.
    """

    def __call__(
        self, variables: Tree, splits: Sequence[Split], seed: int, folder: Path | None = None, **fit_options
    ) -> Tree: ...


def objective(net: ExpertNet, prepare: Prepare, augment: Augmentation | None = None) -> Callable:
    """`(params, context, batch, step) -> (J, metrics)` for `train.jit_runner`: J is the mean of the tasks' losses, and
    the gates' penalty. `context` has `statistics` (the collection `batch_stats`) and `key`."""

    def loss(params, context, batch, step):
        images = prepare(batch["image"])
        if augment is not None:
            images = augment(jax.random.fold_in(context["key"], step), images)
        images, labels = (by_task(rows, len(net.classes)) for rows in (images, batch["label"]))
        variables = {"params": params, "batch_stats": context["statistics"]}
        logits, kept = net.apply(variables, images, True, mutable=["batch_stats", "intermediates"])
        value = cross_entropy(logits, labels)
        penalty = sum(jax.tree.leaves(kept.get("intermediates", {})), jnp.zeros_like(value))
        accuracy = jnp.mean(logits.argmax(-1) == labels)
        return value + penalty, {"cross_entropy": value, "accuracy": accuracy, "penalty": penalty}

    return loss


@partial(jax.jit, static_argnums=(0, 1))
def _moments(net, prepare, variables, images):
    images = by_task(prepare(images), len(net.classes))
    return with_squared_means(net.apply(variables, images, True, mutable=["batch_stats"])[1]["batch_stats"], 1)


@partial(jax.jit, static_argnums=(0, 1))
def _logits(net, prepare, variables, images):
    return net.apply(variables, by_task(prepare(images), len(net.classes)))


def statistics(net: ExpertNet, prepare: Prepare) -> Estimate:
    """Takes batch statistics again, as `evaluate.statistics` does."""

    def run(variables, batches):
        moments = partial(_moments, net, prepare, variables)
        return {**variables, "batch_stats": pooled_statistics(moments, len(net.classes), batches)}

    return run


def accuracies(net: ExpertNet, prepare: Prepare) -> Measure:
    """How often the network is right."""

    def run(variables, splits, batch=64):
        require_tasks(net.one_expert(), splits, labels=True)
        return right(answers(partial(_logits, net, prepare, variables), net.classes, splits, batch), splits)

    return run


def learner(
    net: ExpertNet, prepare: Prepare, settings: Settings, augment: Augmentation | None = None, *, runner=jit_runner
) -> TrainExperts:
    """How a mixture of experts is trained: all of it, for all steps, by each batch's statistics. Of the settings those
    of routes, and `statistics`, say nothing here.

    Args:
      prepare: bytes (rows, size, size, 3) to the network's input, `TaskStream.prepare` say.
      runner: `jit_runner` or `pmap_runner`, under which each device normalises its part by that part's statistics.
    """
    transform = optimizer(settings)
    run, estimate = runner(objective(net, prepare, augment), transform), statistics(net, prepare)

    def train(variables, splits, seed, folder: Path | None = None, **fit_options) -> Tree:
        require_tasks(net.one_expert(), splits, labels=True)
        if folder is not None:
            require_same(folder, net, settings, splits, seed)
        context = {"statistics": variables["batch_stats"], "key": jax.random.fold_in(jax.random.key(seed), 1)}
        kept = None if folder is None else Checkpoints(local_path(folder))
        batches, state = balanced_batches(splits, settings.batch, seed), init_state(variables["params"], transform)
        state = fit(run, state, context, batches, settings.steps, checkpoints=kept, **fit_options)
        trained, some = {**variables, "params": state.params}, itertools.islice(batches(0), settings.estimate)
        return estimate(trained, some)

    return train
