"""Batch statistics taken again, accuracies, and the discretisation gap."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from compo_jax.data import Split
from compo_jax.data.batches import Batch
from compo_jax.modular import routes
from compo_jax.modular.batches import balanced_eval
from compo_jax.modular.losses import Prepare, by_task
from compo_jax.modular.net import ModularNet, Route
from compo_jax.tree import Tree


def require_tasks(net: ModularNet, splits: Sequence[Split], *, labels: bool = False) -> None:
    """ValueError where there isn't one split for each task of the network, or labels aren't those of its head."""
    if len(splits) != len(net.classes):
        raise ValueError(f"a network of {len(net.classes)} tasks was given images of {len(splits)}")
    for t, (split, count) in enumerate(zip(splits, net.classes, strict=True)) if labels else ():
        values = np.unique(split.labels)
        if values.size and not (np.issubdtype(values.dtype, np.integer) and values[0] >= 0 and values[-1] < count):
            raise ValueError(
                f"task {t} has labels from {values[0]} to {values[-1]} and a head of {count} classes: labels are whole "
                f"numbers from 0 to {count - 1}"
            )


def with_squared_means(batch_stats: Tree, sign: int) -> Tree:
    """Second moments instead of variances with sign 1, and back with -1."""
    flat = flatten_dict(batch_stats)
    second = lambda path, var: jnp.maximum(var + sign * flat[(*path[:-1], "mean")] ** 2, 0)
    return unflatten_dict({path: second(path, x) if path[-1] == "var" else x for path, x in flat.items()})


# The weights are an argument, so that all routes share one compilation.
@partial(jax.jit, static_argnums=(0, 1))
def _moments(net, prepare, variables, weights, images):
    images = by_task(prepare(images), len(net.classes))
    _, moved = net.apply(variables, images, lambda _: weights, True, mutable=["batch_stats"])
    return with_squared_means(moved["batch_stats"], 1)


@partial(jax.jit, static_argnums=(0, 1))
def _logits(net, prepare, variables, weights, images):
    return net.apply(variables, by_task(prepare(images), len(net.classes)), lambda _: weights)


@runtime_checkable
class Estimate(Protocol):
    """The variables with the batch statistics of all these batches together, those of `balanced_batches` say; labels
    aren't read. ValueError for batches of two sizes."""

    def __call__(self, variables: Tree, batches: Iterable[Batch]) -> Tree: ...


@runtime_checkable
class Predict(Protocol):
    """The logits of all images of each task's split, in order."""

    def __call__(
        self, variables: Tree, splits: Sequence[Split], batch: int = 64
    ) -> list[Float[np.ndarray, "images classes"]]: ...


@runtime_checkable
class Measure(Protocol):
    """The accuracy of each task on its split, in [0, 1]."""

    def __call__(self, variables: Tree, splits: Sequence[Split], batch: int = 64) -> Float[np.ndarray, " tasks"]: ...


def statistics(net: ModularNet, prepare: Prepare, route: Route | None = None) -> Estimate:
    """Takes batch statistics again ("precise BN", Wu and Johnson, 2021, arXiv 2105.07576), each layer seeing what the
    layers before it give on a batch. `route` as in `ModularNet`, here and below."""
    route = route or routes.KINDS[net.route]

    def run(variables, batches):
        weights = route(variables["params"]["route"])
        moments = partial(_moments, net, prepare, variables, weights)
        return {**variables, "batch_stats": pooled_statistics(moments, len(net.classes), batches)}

    return run


def pooled_statistics(moments: Callable[[Array], Tree], tasks: int, batches: Iterable[Batch]) -> Tree:
    """The batch statistics of all these batches together, from the first and second moments on one's images."""
    total, count, sizes = None, 0, set()
    for batch in batches:
        if (given := int(np.max(batch["task"])) + 1) != tasks:
            raise ValueError(f"a network of {tasks} tasks was given batches of {given}")
        sizes.add(len(batch["task"]) // tasks)
        if len(sizes) > 1:
            raise ValueError(
                f"batch statistics are of batches of one size, and here are some of {sorted(sizes)} images"
            )
        found = moments(batch["image"])
        total, count = found if total is None else jax.tree.map(jnp.add, total, found), count + 1
    if not count:
        raise ValueError("batch statistics need one batch of images at least, and none was given")
    return with_squared_means(jax.tree.map(lambda x: x / count, total), -1)


def answers(
    logits: Callable[[Array], Array], classes: Sequence[int], splits: Sequence[Split], batch: int
) -> list[Float[np.ndarray, "images classes"]]:
    """The logits of all images of each task's split, in order, from those of a batch's images."""
    parts = [[] for _ in splits]
    for rows, real in balanced_eval(splits, batch):
        for t, of_task in enumerate(np.asarray(logits(rows["image"]))):
            parts[t].append(of_task[: real[t], : classes[t]])
    return [np.concatenate(of_task) for of_task in parts]


def right(logits: Sequence[Float[np.ndarray, "_images _classes"]], splits: Sequence[Split]) -> np.ndarray:
    """The part of each task's images whose largest logit is their label's, in [0, 1]."""
    return np.array([np.mean(each.argmax(1) == split.labels) for each, split in zip(logits, splits, strict=True)])


def predictions(net: ModularNet, prepare: Prepare, route: Route | None = None) -> Predict:
    """What the network answers."""
    route = route or routes.KINDS[net.route]

    def run(variables, splits, batch=64):
        require_tasks(net, splits)
        logits = partial(_logits, net, prepare, variables, route(variables["params"]["route"]))
        return answers(logits, net.classes, splits, batch)

    return run


def accuracies(net: ModularNet, prepare: Prepare, route: Route | None = None) -> Measure:
    """How often the network is right."""
    predict = predictions(net, prepare, route)

    def run(variables, splits, batch=64):
        require_tasks(net, splits, labels=True)
        return right(predict(variables, splits, batch), splits)

    return run


class Gap(NamedTuple):
    """The accuracy of each task at four points: on the route that was learned; on the nearest one-hot one, all else as
    it was; with the statistics taken again; after training on that fixed route."""

    learned: Float[np.ndarray, "*seeds tasks"]
    hard: Float[np.ndarray, "*seeds tasks"]
    reestimated: Float[np.ndarray, "*seeds tasks"]
    finetuned: Float[np.ndarray, "*seeds tasks"]


def discretisation_gap(
    net: ModularNet,
    prepare: Prepare,
    before: Tree,
    after: Tree,
    batches: Callable[[], Iterable[Batch]],
    splits: Sequence[Split],
    *,
    route: Route,
    batch: int = 64,
) -> Gap:
    """What is lost where a route is made hard: each layer takes the template of its largest weight.

    Args:
      before: variables whose route was learned.
      after: variables trained on the fixed route, statistics taken.
      batches: makes the batches that statistics are taken over.
      splits: what accuracy is measured on.
      route: the function that the route was learned with.
    """
    hard = accuracies(net, prepare, routes.hard)
    as_learned = statistics(net, prepare, route)(before, batches())
    return Gap(
        accuracies(net, prepare, route)(as_learned, splits, batch),
        hard(as_learned, splits, batch),
        hard(statistics(net, prepare, routes.hard)(before, batches()), splits, batch),
        hard(after, splits, batch),
    )
