"""Rules that drop entries of the task vectors, by size (TIES) or by chance (DARE)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from compo_jax import tree
from compo_jax.compose.arithmetic import compose
from compo_jax.compose.modules import Scalar, Weights, aligned, leafwise, weigh

Tree = Any


def trim(delta: Tree, density: float) -> Tree:
    """The fraction `density` of the delta's entries that are largest in magnitude, over all its leaves; others zero.

    Entries as large as the last one kept are kept, too.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is the fraction of entries that is kept, above 0 and at most 1, not {density}")
    sizes = jnp.sort(jnp.concatenate([jnp.abs(x).ravel() for x in jax.tree.leaves(delta)]))
    least = sizes[sizes.size - max(1, round(density * sizes.size))]
    return jax.tree.map(lambda x: jnp.where(jnp.abs(x) >= least, x, 0), delta)


def ties(
    base: Tree, deltas: Sequence[Tree], weights: Weights | None = None, *, density: float = 0.2, scale: Scalar = 1.0
) -> Tree:
    """TIES (Yadav et al., 2023, arXiv 2306.01708): trim, elect a sign for each entry, average what agrees with it.

    Args:
      weights: (tasks,), default equal; of the election `sign(Σ w_t x_t)` and of the average. Not negative.
      density: fraction of each task vector that is kept (`trim`).
      scale: λ, of the merged task vector.

    An entry that sums to zero has no sign and doesn't change.
    """
    deltas = [trim(delta, density) for delta in aligned(base, deltas)]
    weights = weigh(weights, len(deltas), sign=False)

    def merged(_, x):
        w = jnp.stack([jnp.asarray(one, x.dtype) for one in weights]).reshape(-1, *[1] * (x.ndim - 1))
        elected = jnp.sign(jnp.sum(w * x, axis=0))
        agreeing = jnp.where((jnp.sign(x) == elected) & (x != 0), w, 0)
        total = jnp.sum(agreeing, axis=0)
        return jnp.sum(agreeing * x, axis=0) / jnp.where(total > 0, total, 1)

    return tree.add(base, leafwise(merged, deltas), scale)


def drop(key: Key[Array, ""], delta: Tree, rate: Scalar) -> Tree:
    """Each entry zero with the probability `rate`, the others divided by `1 - rate`: `delta` in expectation."""
    if tree.concrete(rate) and not 0 <= rate < 1:
        raise ValueError(f"rate is the probability that an entry is dropped, from 0 to below 1, not {rate}")
    keys = iter(jax.random.split(key, len(jax.tree.leaves(delta))))
    return jax.tree.map(
        lambda x: jnp.where(jax.random.bernoulli(next(keys), rate, x.shape), 0, x / (1 - jnp.asarray(rate, x.dtype))),
        delta,
    )


def dare(
    key: Key[Array, ""],
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    rate: Scalar = 0.9,
    rule: Callable[..., Any] = compose,
    **options: Any,
) -> Any:
    """DARE (Yu et al., 2024, arXiv 2311.03099): drop entries by chance, rescale the rest, and merge by another rule.

    Args:
      key: each module's draw is independent of the others'.
      rate: probability that an entry is dropped.
      rule: `(base, deltas, weights, **options) -> params`, such as `compose`, `task_arithmetic`, `ties`.
    """
    keys = jax.random.split(key, max(1, len(deltas)))
    dropped = [drop(k, delta, rate) for k, delta in zip(keys, aligned(base, deltas), strict=True)]
    return rule(base, dropped, weights, **options)
