"""Rules that drop entries of the task vectors, by size (TIES) or by chance (DARE)."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from compo_jax import tree
from compo_jax.compose.arithmetic import compose
from compo_jax.compose.leaves import leafwise, moved, require_sound
from compo_jax.compose.modules import aligned, same
from compo_jax.compose.numbers import Scalar, Weights, along, require_number, weigh, wide_number
from compo_jax.tree import Tree


def _require_density(density: float) -> None:
    meaning = "the fraction of entries that is kept, above 0 and at most 1"
    if not tree.concrete(density):
        raise ValueError(f"density is {meaning}, and has to be known when the rule is traced: leave it out of jit")
    require_number("density", density, meaning, lambda x: 0 < x <= 1)


def trim(delta: Tree, density: float, *, check_finite: bool = True) -> Tree:
    """The fraction `density` of the delta's entries that are largest in magnitude, over all its leaves; others zero.

    Entries as large as the last one kept are kept, too. ValueError where the delta holds NaN or an infinity, which
    `check_finite=False` counts among the largest.
    """
    _require_density(density)
    (delta,) = same([delta], check_finite=check_finite)
    sizes = jnp.concatenate([jnp.abs(jnp.asarray(x)).ravel() for x in jax.tree.leaves(delta)])
    if not sizes.size:
        return delta
    sizes = jnp.sort(jnp.where(jnp.isnan(sizes), jnp.inf, sizes))
    least = sizes[sizes.size - max(1, round(float(density) * sizes.size))]
    return jax.tree.map(lambda x: jnp.where(jnp.abs(x) < least, 0, x), delta)


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

    An entry that sums to zero has no sign and doesn't change.
    """
    _require_density(density)
    require_number("scale", scale, "a finite number")
    deltas = aligned(base, deltas, check_finite=check_finite)
    weights = weigh(weights, len(deltas), sign=False)
    deltas = [trim(delta, density, check_finite=False) for delta in deltas]

    def merged(_, x):
        w = along(weights, x)
        elected = jnp.sign(jnp.sum(w * x, axis=0))
        agreeing = jnp.where((jnp.sign(x) == elected) & (x != 0), w, 0)
        total = jnp.sum(agreeing, axis=0)
        return jnp.sum(agreeing * x, axis=0) / jnp.where(total > 0, total, 1)

    return moved(base, leafwise(merged, deltas), scale, check_finite=check_finite)


def _dropped(key: Key[Array, ""], delta: Tree, rate: Scalar) -> Tree:
    """`drop`, unrounded."""
    meaning = "the probability that an entry is dropped, from 0 to below 1"
    require_number("rate", rate, meaning, lambda x: 0 <= x < 1)
    rate = wide_number(rate)
    keys = iter(jax.random.split(key, len(jax.tree.leaves(delta))))

    def one(x):
        x = jnp.asarray(x, tree.wide_type(x))
        return jnp.where(jax.random.bernoulli(next(keys), rate, x.shape), 0, x / jnp.asarray(1 - rate, x.dtype))

    return jax.tree.map(one, delta)


def drop(key: Key[Array, ""], delta: Tree, rate: Scalar, *, check_finite: bool = True) -> Tree:
    """Each entry zero with the probability `rate`, the others divided by `1 - rate`: `delta` in expectation.

    ValueError where the delta holds NaN or an infinity, or what is divided is too large for its type (`check_finite`).
    """
    (delta,) = same([delta], check_finite=check_finite)
    found = jax.tree.map(lambda y, x: y.astype(jnp.result_type(x)), _dropped(key, delta, rate), delta)
    if check_finite:
        require_sound(found, delta)
    return found


def dare(
    key: Key[Array, ""],
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    rate: Scalar = 0.9,
    rule: Callable[..., Any] = compose,
    check_finite: bool = True,
    **options: Any,
) -> Any:
    """DARE (Yu et al., 2024, arXiv 2311.03099): drop entries by chance, rescale the rest, and merge by another rule.

    Args:
      key: each module's draw is independent of the others'.
      rate: probability that an entry is dropped.
      rule: `(base, deltas, weights, **options) -> params`, such as `compose`, `task_arithmetic`, `ties`; it gets the
        rescaled deltas unrounded, in float32 at least.
    """
    deltas = aligned(base, deltas, check_finite=check_finite)
    keys = jax.random.split(key, len(deltas))
    dropped = [_dropped(k, delta, rate) for k, delta in zip(keys, deltas, strict=True)]
    if not check_finite and "check_finite" in inspect.signature(rule).parameters:
        options["check_finite"] = False
    return rule(base, dropped, weights, **options)
