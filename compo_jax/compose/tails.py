"""Task vectors thinned out by the magnitude of their entries: both tails cut off, or dropped by chance by their ranks.

Both go before another rule, as DARE does: see `rules.RULES`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.entries import Deferred, on_host, whole
from compo_jax.compose.leaves import Stacked, layers
from compo_jax.compose.numbers import Scalar, count_of, require_number, wide_number
from compo_jax.tree import Tree


def _made(function: Callable[[Array], Array], x: Any, deferred: bool, *numbers: Any) -> Any:
    """`function(x)` of a leaf in float32 at least; made when it is read, where that can be: not where one of the
    `numbers` in it is traced."""
    wide = tree.wide_type(x)
    if deferred and on_host(x, *numbers):
        return Deferred(np.shape(x), wide, lambda: np.asarray(_eager(function, x, wide)).reshape(-1))
    return function(jnp.asarray(whole(x), wide))


def _eager(function, x, wide):
    with jax.ensure_compile_time_eval():
        return function(jnp.asarray(whole(x), wide))


@jax.jit
def _dropped_by_rank(key: Key[Array, ""], rate: Scalar, window: Scalar, x: Array) -> Array:
    row = x if x.ndim else x[None]
    order = jnp.argsort(jnp.argsort(jnp.abs(row), axis=-1), axis=-1).astype(x.dtype)
    count = row.shape[-1]
    rank = order / (count - 1) if count > 1 else jnp.full_like(order, 0.5)  # 0: smallest, 1: largest
    lost = rate + window * (0.5 - rank)
    kept = ~jax.random.bernoulli(key, lost)
    return jnp.where(kept, row / (1 - lost), 0).reshape(x.shape)


def della(
    base: Tree,
    deltas: Sequence[Tree],
    *,
    key: Key[Array, ""],
    rate: Scalar = 0.7,
    window: Scalar = 0.2,
    deferred: bool = False,
) -> list[Tree]:
    """DELLA's MagPrune (Deep et al., 2024, arXiv 2406.11617): entries dropped by chance, the small ones sooner.

    In each row (the last axis) an entry of rank r, from 0 for the smallest magnitude to 1 for the largest, is dropped
    with the probability `p = rate + window (½ - r)`, and otherwise divided by `1 - p`: the delta in expectation. The
    paper then elects signs: the rule `ties` with `density=1.0` behind it. Its code ranks in the rows of PyTorch's
    weights, a row for each output; mergekit's rescales what is left of a tensor to the norm that it had.

    ValueError where a probability isn't from 0 to below 1.
    """
    require_number(
        "rate", rate, "the mean probability that an entry is dropped, from 0 to below 1", lambda x: 0 <= x < 1
    )
    meaning = "how far the smallest entry's probability is above the largest one's, all of them from 0 to below 1"
    small = lambda x: x >= 0 and (not tree.concrete(rate) or (float(rate) >= x / 2 and float(rate) + x / 2 < 1))
    require_number("window", window, meaning, small)
    rate, window = wide_number(rate), wide_number(window)

    def one(key, delta):
        keys = iter(jax.random.split(key, len(jax.tree.leaves(delta))))
        numbers = (key, rate, window)
        drop = lambda x: _made(functools.partial(_dropped_by_rank, next(keys), rate, window), x, deferred, *numbers)
        return jax.tree.map(drop, delta)

    keys = jax.random.split(key, len(deltas))
    return [one(k, delta) for k, delta in zip(keys, deltas, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _without_tails(lowest: int, highest: int, x: Float[Array, "layers entries"]) -> Float[Array, "layers entries"]:
    """Zero where a row's magnitude is below its `lowest`-th or above its `highest`-th, counted from the smallest."""
    sizes = jnp.abs(x)
    ordered = jnp.sort(sizes, axis=-1)
    return jnp.where((sizes >= ordered[:, lowest, None]) & (sizes <= ordered[:, highest, None]), x, 0)


def breadcrumbs(
    base: Tree,
    deltas: Sequence[Tree],
    *,
    kept: float = 0.9,
    largest: float = 0.01,
    stacked: Stacked = STACKED,
    deferred: bool = False,
) -> list[Tree]:
    """Model Breadcrumbs (Davari and Belilovsky, 2024, arXiv 2312.06795): without the outliers, and without the dust.

    Of each layer's entries the fraction `largest` of the greatest magnitudes becomes zero, and as many of the smallest
    that the fraction `kept` is left, unscaled: those at the borders stay. Where both fractions together are more
    than all, fewer outliers go, as in mergekit. The paper sums what is left: the rule `task_arithmetic` behind it.
    """
    require_number("kept", kept, "the fraction of entries that is kept, above 0 and at most 1", lambda x: 0 < x <= 1)
    require_number(
        "largest", largest, "the fraction of entries cut off as outliers, from 0 to below 1", lambda x: 0 <= x < 1
    )
    of_layers = layers(base, deltas[0], stacked)

    def one(name, x):
        if x is None or not np.size(x):
            return x
        count = np.shape(x)[0] if name in of_layers else 1
        size = np.size(x) // count
        left = max(1, count_of(kept, size))
        top = min(count_of(largest, size), size - left)
        cut = lambda x: _without_tails(size - left - top, size - top - 1, x.reshape(count, size)).reshape(x.shape)
        return _made(cut, x, deferred)

    return [tree.map_with_name(one, delta) for delta in deltas]
