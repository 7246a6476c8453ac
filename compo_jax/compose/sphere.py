"""Means along great circles. A tree is one vector; its direction is averaged on the sphere, and its norm linearly.

All means lie in the span of the vectors, so that everything is computed from their Gram matrix (tasks, tasks), and one
weighted sum makes the result.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.compose.entries import entrywise, on_host, products, total
from compo_jax.compose.modules import require_same
from compo_jax.compose.numbers import Scalar, Weights, require_iterations, require_number, weigh, wide_number
from compo_jax.tree import Tree


def gram(trees: Sequence[Tree]) -> Float[Array, "tasks tasks"]:
    """All inner products."""
    rows = list(zip(*map(jax.tree.leaves, trees), strict=True))
    if all(on_host(*row) for row in rows):
        return jnp.asarray(sum(products(row) for row in rows), tree.wide_type(*jax.tree.leaves(trees)))
    return jnp.stack([jnp.stack([tree.dot(a, b) for b in trees]) for a in trees])


def _sum(trees: Sequence[Tree], weights: Sequence, wide: bool) -> Tree:
    def one(*row):
        kind = tree.wide_type(*row) if wide else jnp.result_type(*row)
        return entrywise(total, row, weights, kind)

    return jax.tree.map(one, *trees)


def _cosines(trees: Sequence[Tree], check_finite: bool) -> tuple[Float[Array, "tasks tasks"], Float[Array, " tasks"]]:
    """(cosines of the angles between the trees, their norms)."""
    products = gram(trees)
    norms = jnp.sqrt(jnp.diagonal(products))
    if tree.concrete(norms) and (np.any(norms == 0) or (check_finite and not np.all(np.isfinite(norms)))):
        raise ValueError(f"only trees that are neither zero nor infinite have a direction; their norms are {norms}")
    return jnp.clip(products / jnp.outer(norms, norms), -1, 1), norms


def cosines(trees: Sequence[Tree], *, check_finite: bool = True) -> Float[Array, "tasks tasks"]:
    """The cosines of the angles between the trees, as whole vectors; of deltas, how alike modules are. None is a hole.

    ValueError where structures differ, and where a tree is zero or not finite.
    """
    return _cosines(require_same(trees, check_finite=check_finite), check_finite)[0]


def slerp(a: Tree, b: Tree, t: Scalar, *, wide: bool = False, check_finite: bool = True) -> Tree:
    """From `a` (t = 0) to `b` (t = 1) at constant angular speed (Shoemake, 1985).

    The direction is `(sin((1-t)ω) a/|a| + sin(tω) b/|b|) / sin ω`, ω the angle between the trees as whole vectors; the
    norm is `(1-t)|a| + t|b|`. For weights, give the weights or, as usual, the deltas of two modules.

    Args:
      wide: the mean is returned as it was computed, in float32 at least, not rounded to the trees' types: for a mean
        that is added to something.

    ValueError where the structures differ, a tree is zero or not finite, or the two are opposite: then no great circle
    is shortest.
    """
    trees = require_same([a, b], check_finite=check_finite)
    return _sum(trees, slerp_weights(trees, t, check_finite), wide)


def slerp_weights(trees: Sequence[Tree], t: Scalar, check_finite: bool) -> list[Array]:
    """The two trees' weights in their SLERP."""
    require_number("t", t, "a finite number, 0 at the one tree and 1 at the other")
    cosines, norms = _cosines(trees, check_finite)
    cosine, t = cosines[0, 1], wide_number(t)
    if tree.concrete(cosine) and 1 + cosine < 10 * jnp.finfo(cosine.dtype).eps:
        raise ValueError("the two trees point in opposite directions: no great circle between them is the shortest")
    return list(
        _slerp_weights(jnp.stack([jnp.asarray(1 - t, norms.dtype), jnp.asarray(t, norms.dtype)]), cosine, norms)
    )


@jax.jit
def _slerp_weights(shares: Array, cosine: Array, norms: Array) -> Array:
    straight = 1 - cosine < 10 * jnp.finfo(cosine.dtype).eps
    angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
    turned = jnp.where(straight, shares, jnp.sin(shares * angle) / jnp.sin(angle))
    return turned * (shares @ norms) / norms


class _Walk(NamedTuple):
    """Towards a Karcher mean: the mean's weights so far, the angle of the last step in radians, the steps."""

    mean: Array
    size: Array
    count: Array | int


def karcher_mean(
    trees: Sequence[Tree],
    weights: Weights | None = None,
    *,
    tolerance: Scalar | None = None,
    max_iterations: int = 100,
    wide: bool = False,
    check_finite: bool = True,
) -> Tree:
    """The Karcher mean of the directions, with the weighted mean of the norms (Grove and Karcher, 1973).

    It minimises the weighted squared angles to the trees' directions; of two, it is their SLERP.

    Args:
      weights: (tasks,), default 1/T; only their ratios count. Not negative.
      tolerance: angle in radians that the last step may have; default 10 times the rounding error.
      wide: see `slerp`.

    ValueError as `slerp`, and where the directions cancel; a UserWarning where the iterations end far from the mean.
    """
    trees = require_same(trees, check_finite=check_finite)
    shares = karcher_weights(trees, weights, check_finite, tolerance=tolerance, max_iterations=max_iterations)
    return _sum(trees, shares, wide)


def karcher_weights(
    trees: Sequence[Tree],
    weights: Weights | None,
    check_finite: bool,
    *,
    tolerance: Scalar | None = None,
    max_iterations: int = 100,
) -> list[Array]:
    """The trees' weights in their Karcher mean."""
    require_iterations(tolerance, max_iterations)
    weights = weigh(weights, len(trees), sign=False)
    cosines, norms = _cosines(trees, check_finite)
    weights = jnp.stack([jnp.asarray(w, norms.dtype) for w in weights])
    weights = weights / weights.sum()
    eps = jnp.finfo(norms.dtype).eps
    tolerance = 10 * eps if tolerance is None else tolerance

    def length(c):
        return jnp.sqrt(jnp.maximum(jnp.einsum("s,st,t", c, cosines, c, precision="highest"), 0))

    def step(walk):
        mean = walk.mean
        cosine = jnp.clip(jnp.matmul(cosines, mean, precision="highest"), -1, 1)
        near = 1 - cosine < eps
        angle = jnp.arccos(jnp.where(near, 0.0, cosine))
        pull = weights * jnp.where(near, 1.0, angle / jnp.sin(angle))
        move = pull - jnp.dot(pull, cosine) * mean
        size = length(move)
        mean = jnp.cos(size) * mean + jnp.sinc(size / jnp.pi) * move
        return _Walk(mean / length(mean), size, walk.count + 1)

    start = length(weights)
    if tree.concrete(start) and start < 10 * eps:
        raise ValueError("the directions of the trees cancel: points spread all around the sphere have no one mean")
    mean, size, _ = jax.lax.while_loop(
        lambda walk: (walk.size > tolerance) & (walk.count < max_iterations),
        step,
        _Walk(weights / start, jnp.full((), jnp.inf, norms.dtype), 0),
    )
    if tree.concrete(size) and size > jnp.maximum(tolerance, eps**0.5):
        warnings.warn(
            f"the Karcher mean was still moving by {float(size):.1e} radians after {max_iterations} iterations: allow "
            "more, or take fewer trees that point apart",
            UserWarning,
            stacklevel=3,
        )
    return list(mean * jnp.dot(weights, norms) / norms)
