"""Entries of the task vectors that are dropped: by size, and TIES that goes by what is left, or by chance."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

from compo_jax import tree
from compo_jax.compose.entries import PIECE, Deferred, entrywise, flat, on_host, sum_sign, total
from compo_jax.compose.leaves import assembled, require_sound
from compo_jax.compose.modules import require_same, with_zeros
from compo_jax.compose.numbers import Scalar, Weights, require_number, weigh, wide_number
from compo_jax.compose.selection import kth_largest
from compo_jax.tree import Tree


def require_density(density: float) -> None:
    """ValueError for what is no fraction of entries, or isn't known yet."""
    meaning = "the fraction of entries that is kept, above 0 and at most 1"
    if not tree.concrete(density):
        raise ValueError(f"density is {meaning}, and has to be known when the rule is traced: leave it out of jit")
    require_number("density", density, meaning, lambda x: 0 < x <= 1)


def trim(delta: Tree, density: float, *, check_finite: bool = True) -> Tree:
    """The fraction `density` of the delta's entries that are largest in magnitude, over all its leaves; others zero.

    Entries as large as the last one kept are kept, too. ValueError where the delta holds NaN or an infinity, which
    `check_finite=False` counts among the largest.
    """
    require_density(density)
    (delta,) = require_same([delta], check_finite=check_finite)
    least = _least(delta, density)
    return jax.tree.map(lambda x: entrywise(_trimmed, [x], [least]), delta)


def _least(delta: Tree, density: float) -> Any:
    """The magnitude of the smallest entry that `trim` keeps."""
    leaves = jax.tree.leaves(delta)
    size = sum(np.size(x) for x in leaves)
    kept = max(1, round(float(density) * size))
    return kth_largest(leaves, kept) if kept < size else 0.0


def ties(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    density: float = 0.2,
    scale: Scalar = 1.0,
    check_finite: bool = True,
) -> Tree:
    """TIES (Yadav et al., 2023, arXiv 2306.01708): trim, elect a sign for each entry, average what agrees with it.

    Args:
      weights: (tasks,), default equal; of the election `sign(Σ w_t x_t)` and of the average. Not negative.
      density: fraction of each task vector that is kept (`trim`).
      scale: λ, of the merged task vector.

    An entry that sums to zero, up to rounding, has no sign and doesn't change.
    """
    require_density(density)
    require_number("scale", scale, "a finite number")
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    weights = weigh(weights, len(deltas), sign=False)
    least = [_least(delta, density) for delta in deltas]

    def leaf(_, b, rows, __):
        return entrywise(_elected, [b, *rows], [*weights, *least, scale])

    return assembled(base, deltas, leaf, check_finite=check_finite)


def _cut(least: Array, x: Array) -> Array:
    return jnp.where(jnp.abs(x) < least, 0, x)


def _trimmed(numbers: Array, x: Array) -> Array:
    return _cut(numbers[0], x)


def _elected(numbers: Array, b: Array, *rows: Array) -> Array:
    """TIES of T leaves; numbers are their weights, the least magnitudes that are kept, and the scale."""
    tasks, scale = len(rows), numbers[-1]
    weights, least = numbers[:tasks], numbers[tasks:-1]
    rows = [_cut(m, x) for m, x in zip(least, rows, strict=True)]
    elected = sum_sign([w * x for w, x in zip(weights, rows, strict=True)])
    agreeing = [jnp.where(x * elected > 0, w, 0) for w, x in zip(weights, rows, strict=True)]
    weight = sum(agreeing)
    return b + scale * (total(agreeing, *rows) / jnp.where(weight > 0, weight, 1))


def _lost(key: Key[Array, ""], rate: Scalar, size: int) -> Bool[Array, " size"]:
    """Which entries are dropped; of a large leaf each piece by itself, as they are quick to draw in the cache."""
    if size <= PIECE:
        return jax.random.bernoulli(key, rate, (size,))
    draw = lambda number: jax.random.bernoulli(jax.random.fold_in(key, number), rate, (PIECE,))
    return jax.vmap(draw)(jnp.arange(-(-size // PIECE))).ravel()[:size]


@jax.jit
def _drop_small(key: Key[Array, ""], rate: Scalar, x: Array) -> Array:
    return jnp.where(_lost(key, rate, x.size), 0, x)


@jax.jit
def _drop_piece(key: Key[Array, ""], number: int | Array, rate: Scalar, x: Array) -> Array:
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, number), rate, x.shape), 0, x)


class _Dropped(NamedTuple):
    """The entries of a leaf of which some are dropped, see `Deferred`."""

    row: Any
    size: int
    key: Key[Array, ""]
    rate: float
    dtype: np.dtype

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, _ = place.indices(self.size)
        if self.size <= PIECE:
            return np.asarray(_drop_small(self.key, self.rate, self._scaled(0, self.size)))[place]
        first = start // PIECE
        numbered = [self._piece(number) for number in range(first, -(-stop // PIECE))]
        cut = slice(start - first * PIECE, stop - first * PIECE)
        return numbered[0][cut] if len(numbered) == 1 else np.concatenate(numbered)[cut]

    def _piece(self, number: int) -> np.ndarray:
        x = self._scaled(number * PIECE, min((number + 1) * PIECE, self.size))
        return np.asarray(_drop_piece(self.key, number, self.rate, np.pad(x, (0, PIECE - x.size))))[: x.size]

    def _scaled(self, start: int, stop: int) -> np.ndarray:
        with np.errstate(all="ignore"):
            return self.row[start:stop].astype(self.dtype, copy=False) / self.dtype.type(1 - self.rate)


def dropped(key: Key[Array, ""], delta: Tree, rate: Scalar, *, deferred: bool = False) -> Tree:
    """`drop`, unrounded; `deferred`: drawn when it is read, where that can be."""
    meaning = "the probability that an entry is dropped, from 0 to below 1"
    require_number("rate", rate, meaning, lambda x: 0 <= x < 1)
    rate = wide_number(rate)
    keys = iter(jax.random.split(key, len(jax.tree.leaves(delta))))

    def one(x):
        leaf_key, wide, shape = next(keys), tree.wide_type(x), np.shape(x)
        if on_host(x, leaf_key, rate):
            later = Deferred(shape, wide, lambda: _Dropped(flat(x), np.size(x), leaf_key, rate, wide))
            return later if deferred else jnp.asarray(np.asarray(later))
        x = jnp.asarray(x, wide)
        return jnp.where(_lost(leaf_key, rate, x.size).reshape(shape), 0, x / jnp.asarray(1 - rate, wide))

    return jax.tree.map(one, delta)


def drop(key: Key[Array, ""], delta: Tree, rate: Scalar, *, check_finite: bool = True) -> Tree:
    """Each entry zero with the probability `rate`, the others divided by `1 - rate`: `delta` in expectation.

    ValueError where the delta holds NaN or an infinity, or what is divided is too large for its type (`check_finite`).
    """
    (delta,) = require_same([delta], check_finite=check_finite)
    rest = jax.tree.map(lambda y, x: y.astype(jnp.result_type(x)), dropped(key, delta, rate), delta)
    if check_finite:
        require_sound(rest, delta)
    return rest


def drop_each(key: Key[Array, ""], deltas: list[Tree], rate: Scalar, *, deferred: bool) -> list[Tree]:
    """`dropped` of each delta by draws of its own."""
    keys = jax.random.split(key, len(deltas))
    return [dropped(k, delta, rate, deferred=deferred) for k, delta in zip(keys, deltas, strict=True)]
