"""The k-th largest magnitude of many entries, exactly, and without sorting them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compo_jax import tree
from compo_jax.compose.entries import flat, on_host, pieces

_RUN, _RUNS = 128, 2048  # entries side by side, and how many times, that are looked at first


def kth_largest(leaves: Sequence[Any], k: int) -> np.generic | Array:
    """The k-th largest of `|x|` over all entries of the leaves, 1 <= k <= their number; NaN counts as infinite."""
    wide = tree.wide_type(*leaves)
    if not on_host(*leaves):
        return _by_bits([jnp.asarray(x, wide) for x in leaves], k)
    low, high = _guess(leaves, k, wide)
    while True:
        value, low, high = _between(leaves, k, low, high, wide)
        if value is not None:
            return value


def _sizes(x: np.ndarray) -> np.ndarray:
    """Magnitudes, infinite for NaN."""
    x = np.abs(x)
    return np.where(np.isnan(x), np.inf, x).astype(x.dtype, copy=False)


def _guess(leaves: Sequence[Any], k: int, dtype: np.dtype) -> tuple[np.generic, np.generic]:
    """Two numbers that the k-th largest magnitude is most likely between: of a sample from all leaves."""
    count = sum(np.size(x) for x in leaves)
    step, sample = max(_RUN, count // _RUNS), []
    for leaf in leaves:
        row = flat(leaf)
        sample += [row[start : start + _RUN] for start in range(0, np.size(leaf), step)]
    seen = np.sort(_sizes(np.concatenate(sample).astype(dtype)))
    place, margin = round(seen.size * (1 - k / count)), round(8 * seen.size**0.5)
    return seen[max(0, place - margin)], seen[min(seen.size - 1, place + margin)]


def _between(leaves: Sequence[Any], k: int, low: Any, high: Any, dtype: np.dtype) -> tuple[Any, Any, Any]:
    """(the k-th largest magnitude where it is from `low` to `high`, else None; two numbers that it is between)."""
    above = at_high = at_low = 0
    inside = [np.empty(0, dtype)]
    for leaf in leaves:
        for _, x in pieces(flat(leaf), np.size(leaf)):
            x = np.abs(x.astype(dtype, copy=False))
            over = x > high
            near = _sizes(x[np.flatnonzero(~(over | (x < low)))])  # few, and those that are NaN
            above += np.count_nonzero(over) + np.count_nonzero(near > high)
            at_high += np.count_nonzero(near == high)
            at_low += np.count_nonzero((near == low) & (low < high))
            inside.append(near[(near > low) & (near < high)])
    within = np.concatenate(inside)
    if k <= above:
        return None, high, dtype.type(np.inf)
    if k <= above + at_high:
        return high, low, high
    if (left := k - above - at_high) <= within.size:
        place = within.size - left
        return np.partition(within, place)[place], low, high
    if left <= within.size + at_low:
        return low, low, high
    return None, dtype.type(0), low


@jax.jit
def _by_bits(leaves: list[Array], k: int | Array) -> Array:
    """Bit by bit from the highest on: floating-point numbers that aren't negative are ordered as their bits are."""
    whole = jnp.uint64 if leaves[0].dtype.itemsize == 8 else jnp.uint32
    bits = [jax.lax.bitcast_convert_type(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)), whole) for x in leaves]
    highest = 8 * leaves[0].dtype.itemsize - 2

    def step(i, so_far):
        tried = so_far | jax.lax.shift_left(jnp.ones((), whole), (highest - i).astype(whole))
        return jnp.where(sum(jnp.sum(x >= tried) for x in bits) >= k, tried, so_far)

    so_far = jax.lax.fori_loop(0, highest + 1, step, jnp.zeros((), whole))
    return jax.lax.bitcast_convert_type(so_far, leaves[0].dtype)
