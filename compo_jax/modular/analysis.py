"""What trained routes say: distances between tasks, loops, usage, and what a module is worth; each beside a null.

A route's weights are (tasks, layers, templates), as `routes.hard(params["route"])` gives them. With `linear` they are
coefficients, whose scale says nothing where BN follows: tasks are then compared by angles, and the null has random
directions.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from compo_jax import tree
from compo_jax.modular import routes

Weights = Float[Array, "tasks layers templates"] | Float[np.ndarray, "tasks layers templates"]


def _weights(weights: Weights, linear: bool = False) -> Float[np.ndarray, "tasks layers templates"]:
    a = np.asarray(weights, np.float64)
    if a.ndim != 3 or not a.size:
        raise ValueError(
            f"routes' weights are (tasks, layers, templates), and these are {a.shape}; of groups of channels take a "
            "layer's together, (tasks, layers, groups · templates), or apart, (tasks, layers · groups, templates)"
        )
    if linear:
        routes.linear(a)
    else:
        routes.require_weights(a)
    return a


def _directions(coefficients: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(coefficients, axis=-1, keepdims=True)
    return np.divide(coefficients, norm, out=np.zeros_like(coefficients), where=norm > 0)


def _draws(draws: int, least: int = 1) -> None:
    if draws < least:
        raise ValueError(f"a null of {draws} draws says nothing: take {least} or more")


def task_distances(weights: Weights, *, linear: bool = False) -> Float[np.ndarray, "tasks tasks"]:
    """The Jensen-Shannon distance between two tasks' weights at a layer (base 2: 0 the same, 1 disjoint), mean over
    layers: a metric. Of coefficients their angle as a part of π: 0 the same direction, 1 opposite ones."""
    from scipy.special import rel_entr

    a = _weights(weights, linear)
    if linear:
        unit = _directions(a)
        cosine = np.einsum("slm,tlm->stl", unit, unit)
        angles = np.arccos(np.clip(cosine, -1, 1)).mean(-1) / np.pi
        return np.where(np.eye(len(a), dtype=bool), 0, angles)
    p, q = a[:, None], a[None]
    mean = (p + q) / 2
    divergence = (rel_entr(p, mean) + rel_entr(q, mean)).sum(-1) / (2 * np.log(2))
    return np.sqrt(np.maximum(divergence, 0)).mean(-1)  # scipy's has the root of a rounding error below zero


def dendrogram(distances: Float[np.ndarray, "tasks tasks"]) -> Float[np.ndarray, "merges 4"]:
    """The linkage of tasks by average distance, for `scipy.cluster.hierarchy.dendrogram`."""
    import scipy.cluster.hierarchy
    import scipy.spatial.distance

    if len(distances) < 2:
        raise ValueError(f"a dendrogram merges two tasks or more, and there is {len(distances)}")
    if np.ndim(distances) != 2 or distances.shape[0] != distances.shape[1] or not np.isfinite(distances).all():
        raise ValueError(
            f"a dendrogram takes finite distances (tasks, tasks), of `task_distances` say, and these are "
            f"{np.shape(distances)}, {int(np.sum(~np.isfinite(distances)))} of them not finite"
        )
    condensed = scipy.spatial.distance.squareform(distances, checks=False)
    return scipy.cluster.hierarchy.linkage(condensed, "average")


def layer_similarity(weights: Weights, *, linear: bool = False) -> Float[np.ndarray, "tasks layers layers"]:
    """|cos| between the weights of a task's layers; a loop shows as a bright block."""
    a = _directions(_weights(weights, linear))
    return np.abs(a @ a.swapaxes(-1, -2))


def usage(weights: Weights, *, linear: bool = False) -> Float[np.ndarray, " templates"]:
    """The mean weight of each template over tasks and layers (of coefficients `routes.shares`); sums to one."""
    a = _weights(weights, linear)
    return np.asarray(routes.shares(a) if linear else a).mean(axis=(0, 1))


def entropies(weights: Weights) -> Float[np.ndarray, "tasks layers"]:
    """H of each route in nats, 0 to log M."""
    _weights(weights)
    return np.asarray(routes.entropy(jnp.asarray(weights)))


def dead(weights: Weights, *, linear: bool = False) -> Int[np.ndarray, " dead"]:
    """The templates that no hard route goes through: whose weight is the largest nowhere."""
    return np.setdiff1d(np.arange(np.shape(weights)[-1]), _weights(weights, linear).argmax(-1))


def rerouted(
    logits: Float[Array, "tasks layers templates"], templates: Int[Array, "tasks layers"], *, linear: bool = False
) -> Float[Array, "tasks layers templates"]:
    """The logits without one template at each place, whose layers take their next best; -1 leaves a place as it is. Of
    coefficients that of the template becomes 0.

    ValueError for a template that isn't there.
    """
    count, values = logits.shape[-1], np.asarray(templates) if tree.concrete(templates) else np.zeros(0, int)
    if values.size and not -1 <= values.min() <= values.max() < count:
        raise ValueError(f"the templates {values.tolist()} were to be left out, and there are {count}, from 0 on")
    out = jax.nn.one_hot(templates, logits.shape[-1], dtype=bool)
    return jnp.where(out, 0.0 if linear else -jnp.inf, logits)


class Removal(NamedTuple):
    """What is lost without each module.

    Attributes:
      drop: accuracy with all modules less that without one.
      null: the same when as many places, drawn at random, lose whatever module they have (of linear and soft routes:
        when every place loses a module drawn at random); mean over draws.
      deviation: standard deviation of the null over draws; nan for one draw.
    """

    drop: Float[np.ndarray, "templates tasks"]
    null: Float[np.ndarray, "templates tasks"]
    deviation: Float[np.ndarray, "templates tasks"]


def removal(
    score: Callable[[Array], Float[np.ndarray, " tasks"]],
    logits: Float[Array, "tasks layers templates"],
    key: Key[Array, ""],
    draws: int = 5,
    *,
    route: Literal["linear", "soft", "hard"] = "hard",
) -> Removal:
    """The accuracy drop when one module is removed and its layers take their next best, or mix the others.

    Args:
      score: `logits -> accuracy of each task` on the route of these logits or coefficients, which is of this kind.
      draws: of the null, for each module.
    """
    _draws(draws)
    count = logits.shape[-1]
    if count < 2:
        raise ValueError("one module can't be removed: no other is left to take its layers")
    linear, taken, whole = route == "linear", routes.indices(logits), score(logits)
    drop = np.stack([whole - score(rerouted(logits, jnp.full(taken.shape, m), linear=linear)) for m in range(count)])
    drops = np.zeros((draws, count, len(whole)))
    for draw in range(draws):
        if route != "hard":  # every place has something of every module
            any_template = jax.random.randint(jax.random.fold_in(key, draw), taken.shape, 0, count)
            drops[draw] = whole - score(rerouted(logits, any_template, linear=linear))
            continue
        order = jax.random.permutation(jax.random.fold_in(key, draw), taken.size)
        for m in range(count):
            chosen = jnp.zeros(taken.size, bool).at[order[: int(jnp.sum(taken == m))]].set(True).reshape(taken.shape)
            drops[draw, m] = whole - score(rerouted(logits, jnp.where(chosen, taken, -1)))
    deviation = drops.std(0, ddof=1) if draws > 1 else np.full(drop.shape, np.nan)
    return Removal(drop, drops.mean(0), deviation)


class Null(NamedTuple):
    """Numbers of trained routes and the same of random ones: their values, the null's mean and standard
    deviation (of single draws), and the part of draws at least as large. Each is a tree as the statistic's."""

    value: Any
    mean: Any
    deviation: Any
    above: Any


def against_random(
    statistic: Callable[[Weights], Any],
    weights: Weights,
    key: Key[Array, ""],
    draws: int = 200,
    *,
    linear: bool = False,
    rotated: bool = False,
) -> Null:
    """`statistic(weights)` beside routes of the same size drawn at random, two or more: hard ones drawn uniformly, or
    coefficients of uniform direction and of the norms that these have.

    With `rotated` coefficients are turned instead, those of a layer by one random rotation for all tasks: for numbers
    that tasks share, as tasks that began alike are alike in any null that leaves them so.
    """
    _draws(draws, 2)
    value = jax.tree.map(np.asarray, statistic(weights))
    keys, shape = jax.random.split(key, draws), np.shape(weights)

    def random(key):
        if not linear:
            return routes.random(key, shape[:-1], shape[-1])
        if rotated:
            turns = np.linalg.qr(np.asarray(jax.random.normal(key, (shape[1], shape[-1], shape[-1])), np.float64))[0]
            return np.einsum("tlm,lmn->tln", weights, turns)
        return _directions(np.asarray(jax.random.normal(key, shape), np.float64)) * np.linalg.norm(
            weights, axis=-1, keepdims=True
        )

    drawn = [statistic(random(key)) for key in keys]
    null = jax.tree.map(lambda *numbers: np.stack(numbers), *drawn)
    mean, deviation = (jax.tree.map(f, null) for f in (lambda x: x.mean(0), lambda x: x.std(0, ddof=1)))
    return Null(value, mean, deviation, jax.tree.map(lambda x, at: (x >= at).mean(0), null, value))


def kinship(
    distances: Float[np.ndarray, "tasks tasks"], groups: Sequence[Any], key: Key[Array, ""], draws: int = 2000
) -> Null:
    """How much farther apart tasks of different groups are than tasks of one group (difference of mean distances),
    beside the same with the groups' names dealt out to the tasks at random: a permutation test (Mantel, 1967).

    Positive, and above almost all draws, where related tasks share more of their order; `above` is the p-value, which
    counts the tasks' order itself as a draw. `groups` names that of each task. ValueError where no two tasks share a
    group, or all do, and for distances that aren't finite or square.
    """
    _draws(draws, 2)
    if np.ndim(distances) != 2 or distances.shape[0] != distances.shape[1] or not np.isfinite(distances).all():
        raise ValueError(f"kinship is of finite distances (tasks, tasks), and these are {np.shape(distances)}")
    names = np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(names) != len(distances):
        raise ValueError(f"{len(names)} tasks have a group, and distances are of {len(distances)}")
    pairs = np.triu_indices(len(names), 1)
    if len({bool(same) for same in (names[:, None] == names)[pairs]}) < 2:
        raise ValueError("kinship needs two tasks of one group, and two of different ones")

    def farther(names):
        same = (names[:, None] == names)[pairs]
        return distances[pairs][~same].mean() - distances[pairs][same].mean()

    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    value, drawn = farther(names), np.array([farther(rng.permutation(names)) for _ in range(draws)])
    above = (1 + (drawn >= value - 1e-12).sum()) / (1 + draws)
    return Null(value, drawn.mean(), drawn.std(ddof=1), above)
