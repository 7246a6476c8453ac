"""Averages weighted by a diagonal of each task's curvature."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compo_jax import tree
from compo_jax.compose.entries import entrywise, on_host, total
from compo_jax.compose.leaves import assembled
from compo_jax.compose.modules import require_finite, require_same
from compo_jax.compose.numbers import Scalar, Weights, require_not_negative, weigh
from compo_jax.curvature import Curvature, summed_diagonal
from compo_jax.tree import Tree


def _totals(fishers: Sequence[Curvature | Tree], like: Tree, check_finite: bool) -> tuple[list[Tree], list[Any]]:
    """The diagonals' sums at the leaves of `like`, and the numbers of images; errors as `diagonals`."""
    totals, counts = [], []
    for t, fisher in enumerate(fishers):
        summed, count = summed_diagonal(fisher)
        entries = tree.by_name(summed)
        picked = tree.map_with_name(lambda name, x, e=entries: None if x is None else e.get(name), like)
        tree.require_like(picked, like, f"Fisher {t}")
        covered = tree.names(picked)
        if not covered or (totals and covered != tree.names(totals[0])):
            raise ValueError(
                f"Fisher {t} covers {', '.join(covered) or 'none'} of the merged leaves, and all must cover the same: "
                f"take compo_jax.curvature.fisher_diagonal of the parameters {', '.join(tree.names(like))}"
            )
        if check_finite:
            require_finite(picked, f"Fisher {t}")
        for name, x in zip(covered, jax.tree.leaves(picked), strict=True):
            below = np.min(np.asarray(x), initial=0) < 0 if on_host(x) else jnp.any(x < 0)
            if tree.concrete(below) and below:
                raise ValueError(f"Fisher {t} has an entry in {name} that is negative: no curvature has")
        totals.append(picked)
        counts.append(count)
    return totals, counts


def diagonals(fishers: Sequence[Curvature | Tree], like: Tree, *, check_finite: bool = True) -> list[Tree]:
    """The diagonals of curvature (trees as they are) at the leaves of `like`; None where there is none.

    A Fisher may cover more leaves than `like`, or fewer. ValueError where it covers none, or others than the first
    does, or has another shape, or an entry that is below zero or, with `check_finite`, not finite.
    """

    def mean(x, count):
        return jnp.asarray(x, tree.wide_type(x)) / jnp.asarray(count, tree.wide_type(x))

    pairs = zip(*_totals(fishers, like, check_finite), strict=True)
    return [jax.tree.map(lambda x, n=count: mean(x, n), summed) for summed, count in pairs]


def fisher_merge(
    params: Sequence[Tree],
    fishers: Sequence[Curvature | Tree],
    weights: Weights | None = None,
    *,
    damping: Scalar = 0.0,
    wide: bool = False,
    check_finite: bool = True,
) -> Tree:
    """`Σ w_t F_t θ_t / Σ w_t F_t`, entry by entry (Matena and Raffel, 2022, arXiv 2111.09832).

    The minimum of `Σ w_t ‖θ - θ_t‖²_{F_t}`: the joint optimum where the tasks' losses are quadratics with these
    diagonals.

    Args:
      params: T models, or their deltas: the merged delta comes out.
      fishers: one a task, curvature of any kind, of which the diagonal is taken, or a diagonal, a tree shaped as the
        parameters; may have holes.
      weights: (tasks,), of the tasks' mean losses, default 1/T; `counts / sum(counts)` for the mean over all images.
        Not negative.
      damping: added to every task's diagonal, pulls to the weighted average. Not negative.
      wide: what comes out isn't rounded to the models' types: for a delta that is added to something.

    Entries that no task's Fisher sees are averaged with the weights. ValueError where the trees or the numbers of them
    don't fit, for a negative weight or Fisher, and where a model or a Fisher isn't finite, naming its leaves.
    """
    params = require_same(params, check_finite=check_finite)
    numbers, covered = _prepared(params, fishers, weights, damping, check_finite)

    def one(*rows):
        kind = tree.wide_type(*rows[: len(params)]) if wide else jnp.result_type(*rows[: len(params)])
        return entrywise(_merged, [x for x in rows if x is not None], numbers, kind)

    return jax.tree.map(one, *params, *covered)


def fisher_compose(
    base: Tree,
    deltas: list[Tree],
    fishers: Sequence[Curvature | Tree],
    weights: Weights | None = None,
    *,
    damping: Scalar = 0.0,
    check_finite: bool = True,
) -> Tree:
    """`base + fisher_merge(deltas, fishers, weights)`, rounded once, of deltas as of `with_zeros`."""
    numbers, covered = _prepared(deltas, fishers, weights, damping, check_finite)

    def leaf(_, b, rows, curvature):
        rows = [b, *rows, *(x for x in curvature if x is not None)]
        return entrywise(_moved, rows, numbers)

    return assembled(base, deltas, leaf, check_finite=check_finite, beside=covered)


def _prepared(
    params: list[Tree], fishers: Sequence, weights: Weights | None, damping: Scalar, check_finite: bool
) -> tuple[list, list[Tree]]:
    """(the numbers that `_merged` takes, the Fishers' leaves)."""
    tasks = len(params)
    if len(fishers) != tasks:
        raise ValueError(f"{len(fishers)} Fishers were given for {tasks} models: one for each")
    require_not_negative(damping=damping)
    weights = weigh(weights, tasks, sign=False)
    covered, counts = _totals(fishers, params[0], check_finite)

    return [*weights, *counts, damping], covered


def _merged(numbers: Array, *rows: Array) -> Array:
    """Of T models' leaves and, where there are, T Fishers'; numbers are their weights and counts, and the damping."""
    tasks = len(numbers) // 2
    w, counts, damping, x, f = numbers[:tasks], numbers[tasks:-1], numbers[-1], rows[:tasks], rows[tasks:]
    mean = total(w, *x) / jnp.sum(w)
    if not f:
        return mean
    f = [a / n + damping for a, n in zip(f, counts, strict=True)]
    highest = functools.reduce(jnp.maximum, f)
    # pulls neither too large nor too small, whatever the Fishers' scale
    pull = [weight * a / jnp.where(highest > 0, highest, 1) for weight, a in zip(w, f, strict=True)]
    whole = sum(pull)
    # around the mean, so that where nothing pulls the mean is what is left
    return mean + total(pull, *[a - mean for a in x]) / jnp.where(whole > 0, whole, 1)


def _moved(numbers: Array, b: Array, *rows: Array) -> Array:
    return b + _merged(numbers, *rows)
