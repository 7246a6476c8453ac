"""Entries that compete: PCB by their size and by the others' agreement, SCE by their spread over the tasks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.entries import computed, entrywise, sum_sign, unit_of, whole
from compo_jax.compose.leaves import Stacked, assembled, by_layer, layers, stack
from compo_jax.compose.modules import with_zeros
from compo_jax.compose.numbers import Scalar, count_of, require_number
from compo_jax.compose.selection import kth_largest
from compo_jax.compose.sparse import require_density
from compo_jax.tree import Tree


def _clamped(low: Any, high: Any, x: Array) -> Array:
    return jnp.clip(jnp.abs(x), low, high)


def _fraction(x: Array, low: Any, high: Any) -> Array:
    """From 0 at `low` to 1 at `high`."""
    return (x - low) / jnp.where(high > low, high - low, 1)


def _score(tasks: int, low: Any, high: Any, x: Array, summed: Array) -> Array:
    intra = jnp.exp(tasks * (_fraction(_clamped(low, high, x), low, high) ** 2 - 1))  # the constant cancels
    return intra * jnp.tanh(x * summed)


def _positive_score(numbers: Array, x: Array, *rows: Array) -> Array:
    return jnp.maximum(_score(len(rows), numbers[0], numbers[1], x, sum(rows)), 0)


def _negative_score(numbers: Array, x: Array, *rows: Array) -> Array:
    return jnp.maximum(-_score(len(rows), numbers[0], numbers[1], x, sum(rows)), 0)


def _kth_score(rows: list[list], task: int, bounds: list, k: int, size: int) -> Any:
    """The k-th largest of the task's scores, which may be negative."""
    made = lambda function: [computed(function, [row[task], *row], bounds) for row in rows]
    value = kth_largest(made(_positive_score), k)
    return value - kth_largest(made(_negative_score), size - k + 1)  # one of the two is zero


def _competed(numbers: Array, b: Array, *rows: Array) -> Array:
    """Of T leaves; numbers are four a task (bounds of the magnitude, least and largest score) and the scale."""
    bounds, scale, summed = numbers[:-1].reshape(4, -1).T, numbers[-1], sum(rows)
    shares, values = [], []
    for (low, high, least, most), x in zip(bounds, rows, strict=True):
        score = _score(len(rows), low, high, x, summed)
        # where the scores that count are all one, these count alike; they are made anew, and may differ in a last bit
        top = score >= least - 8 * jnp.finfo(score.dtype).eps * jnp.abs(least)
        shares.append(jnp.where(most > least, _fraction(jnp.maximum(score, least), least, most), top))
        values.append(jnp.sign(x) * _clamped(low, high, x))
    share = sum(shares)
    merged = sum(s * v for s, v in zip(shares, values, strict=True)) / jnp.where(share > 0, share, 1)
    return b + scale * merged


def pcb(
    base: Tree,
    deltas: Sequence[Tree],
    *,
    density: float = 0.1,
    clip: float = 1e-4,
    scale: Scalar = 1.0,
    check_finite: bool = True,
) -> Tree:
    """PCB-Merging (Du et al., 2024, arXiv 2410.02396): parameters compete within their task, and with other tasks'.

    An entry's score is `exp(T n²) tanh(x Σ_s x_s)`, n its magnitude in its task from 0 to 1 (competition within) and
    the sum over the tasks (between them). The fraction `density` of a task's scores that are highest counts, linearly
    from 0 at the lowest of these to 1 at the task's highest; with these shares the entries are averaged. This is the
    authors' code; the paper writes both scores as softmaxes.

    Args:
      clip: the fraction of entries at each end of a task's magnitudes that are taken for outliers, and moved to the
        next ones; rounded down at the lower end and up at the upper one, as in the authors' code.
      scale: λ, of the merged task vector; the authors' 1 to 2, chosen by the validation accuracy.

    Magnitudes and scores are compared over all leaves. Where a task's scores that count are all equal, so are shares.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    require_density(density)
    require_number("clip", clip, "the fraction of outliers at each end, from 0 to below a half", lambda x: 0 <= x < 0.5)
    require_number("scale", scale, "a finite number")
    rows = [list(row) for row in zip(*map(jax.tree.leaves, deltas), strict=True)]
    size = sum(np.size(row[0]) for row in rows)
    if not size:
        return base
    outliers, kept = count_of(clip, size), max(1, size - count_of(1 - density, size))
    largest = min(count_of(clip, size, up=True), size - 1 - outliers)
    numbers = []
    for task in range(len(deltas)):
        leaves = [row[task] for row in rows]
        bounds = [kth_largest(leaves, size - outliers), kth_largest(leaves, largest + 1)]
        if not check_finite:  # an infinity is no outlier to hide
            top = kth_largest(leaves, 1)
            bounds[1] = jnp.where(jnp.isfinite(top), bounds[1], top)
        numbers.append([*bounds, *(_kth_score(rows, task, bounds, k, size) for k in (kept, 1))])
    columns = [x for column in zip(*numbers, strict=True) for x in column]

    def leaf(_, b, row, __):
        return entrywise(_competed, [b, *row], [*columns, scale])

    return assembled(base, deltas, leaf, check_finite=check_finite)


def sce(
    base: Tree,
    deltas: Sequence[Tree],
    *,
    density: float = 1.0,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """SCE (Wan et al., 2024, FuseChat, arXiv 2408.07990): select, calculate, erase; in each layer's matrix by itself.

    The fraction `density` of the entries that vary most over the tasks is selected; a task's coefficient is its share
    of the squares of what was selected; entries whose sign isn't the majority's, that of the sum, are erased, and the
    rest is averaged with the coefficients.

    Args:
      density: of the entries that vary at all, 1 for all of them (mergekit's default); entries as large as the last one
        selected are selected, too. One task doesn't vary, and is kept whole.
      stacked: patterns of the paths of leaves whose axis 0 counts layers; default: the scanned blocks of our ViT.

    A sum of zero counts as positive, as in mergekit.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    require_density(density)
    of_layers = layers(base, deltas[0], stacked)

    def layer(x: Float[Array, "tasks ..."]) -> Array:
        if x.shape[0] > 1:
            spread = jnp.var((x - x[0]) / unit_of(x), axis=0)  # zero where all agree, and no rounding error
            count = jnp.maximum(jnp.floor(density * jnp.count_nonzero(spread) + 1e-6).astype(int), 1)
            least = jnp.sort(spread.ravel())[spread.size - count]
            x = x if density == 1 else x * (spread >= least)  # and nothing that isn't finite is hidden
        energy = jnp.sum((x / unit_of(x)) ** 2, axis=range(1, x.ndim), keepdims=True)
        majority = jnp.where(sum_sign(list(x)) >= 0, 1, -1)
        share = jnp.where(jnp.sign(x) == majority, energy, 0)
        whole_share = jnp.sum(share, axis=0)
        return jnp.sum(share * x, axis=0) / jnp.where(whole_share > 0, whole_share, 1)

    def leaf(name, b, rows, _):
        return tree.add(whole(b), by_layer(layer, stack(rows), name in of_layers))

    return assembled(base, deltas, leaf, check_finite=check_finite)
