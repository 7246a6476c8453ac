"""Rules that keep, or strengthen, a part of each layer's directions.

What a matrix is, and what becomes of other leaves: see `matrices`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.entries import sum_sign
from compo_jax.compose.leaves import Stacked, by_layer, layers
from compo_jax.compose.matrices import (
    Components,
    Eps,
    Rounded,
    by_matrix,
    joined,
    leading_of_each,
    orthonormal,
    product,
    require_paths,
    rounded,
    svd,
)
from compo_jax.compose.modules import require_same
from compo_jax.compose.numbers import Scalar, Weights, count_of, require_number, require_part
from compo_jax.compose.sparse import require_density
from compo_jax.tree import Tree


def cart(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    rank: Scalar = 0.08,
    scale: Scalar = 1.0,
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """CART (Choi et al., 2024, arXiv 2412.12153): the mean, and what is leading in each task's difference from it.

    `mean + scale Σ_t SVD_k(Δ_t - mean)` in each layer. The differences add up to zero, so that with all components
    this is the average, whatever the scale.

    Args:
      weights: (tasks,), multiply the deltas; default 1.
      rank: k as a part of min(in, out), rounded up; the paper's best is 0.08.
      scale: λ, of the sum around the mean alone.
      eps, stacked: see `tsv`.
    """
    require_part("rank", rank, "the part of the components that is kept, above 0 and at most 1", zero=False)
    require_number("scale", scale, "a finite number")

    def merged(x, errors):
        mean = jnp.mean(x, axis=0)
        count = count_of(rank, min(mean.shape), up=True)
        parts = jax.lax.map(lambda one: svd(one - mean, errors, jnp.linalg.norm(one)).leading(count), x)
        left, right = joined(parts)
        return mean + jnp.asarray(scale, x.dtype) * product(left * parts.values.ravel(), right)

    return by_matrix(merged, base, deltas, weights, eps=eps, stacked=stacked, check_finite=check_finite)


def _smoothed(parts: Components, smoothing: str | None, ratio: Scalar) -> Components:
    """The components of one task, the sum of its singular values spread anew over those that are real."""
    if smoothing is None:
        return parts
    values, count = parts.values, jnp.sum(parts.real)
    shares = parts.real
    if smoothing == "linear":
        last = values[jnp.maximum(count.astype(int) - 1, 0)]
        steepness = jnp.minimum(ratio, values[0] / jnp.where(last > 0, last, 1))
        place = jnp.arange(len(values)) / jnp.maximum(count - 1, 1)
        shares = parts.real * (steepness + (1 - steepness) * place)
    total = jnp.sum(shares)
    return parts._replace(values=jnp.sum(values) * shares / jnp.where(total > 0, total, 1))


def _elected(cores: Float[Array, "tasks n m"], density: Scalar) -> Float[Array, "n m"]:
    """Of each task the largest entries, and of these the mean of those that have the sign of the sum."""
    size = cores[0].size
    kept = max(1, count_of(density, size))
    least = jax.lax.map(lambda x: jax.lax.top_k(jnp.abs(x).ravel(), kept)[0][-1], cores)
    cores = jnp.where(jnp.abs(cores) < least[:, None, None], 0, cores)
    agreeing = cores * sum_sign(list(cores)) > 0
    total = jnp.sum(jnp.where(agreeing | jnp.isnan(cores), cores, 0), axis=0)
    return total / jnp.maximum(jnp.sum(agreeing, axis=0), 1)


def dc_merge(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    smoothing: str | None = "mean",
    ratio: Scalar = 5.0,
    density: Scalar | None = 1e-3,
    mask: bool = True,
    scale: Scalar = 1.0,
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """DC-Merge (2026, arXiv 2603.06242): the tasks' matrices in joint bases, their singular values made more equal.

    Of each layer's task matrix the leading min(in, out) / T components are kept, and the sum of their singular values
    is spread evenly (smoothing). The joined left vectors, made orthonormal, are a basis U of all tasks' inputs, and the
    right ones a basis V of their outputs. `M_t = Uᵀ Δ̃_t V` are merged as TIES merges, each matrix by itself, what is
    outside of the diagonal blocks, one a task, is dropped (mask), and `U M Vᵀ` is the result.

    Args:
      weights: (tasks,), multiply the deltas; default 1.
      smoothing: `mean`, or `linear`, which falls from `min(ratio, σ_1 / σ_k)` to 1; None leaves them. The authors' code
        takes `mean` for LoRA (of which it keeps all 16 components), and None for full deltas.
      density: the part of each M_t that is kept before signs are elected, the authors' 1e-3, one entry at least; None
        for the mean of all M_t. The zeros of M_t are counted too, and of modules of a low rank it has (T rank)² other
        entries at most: take a larger part for these. Of one module, smoothed by `mean`, all entries are equal, and
        rounding decides which are kept.
      mask: False keeps what is outside of the blocks.
      scale: of the merged task vector; the authors search for it on validation data.
      eps, stacked: see `tsv`.

    Without smoothing, density and mask it is the average, if no module has more components than are kept.
    """
    if smoothing not in ("mean", "linear", None):
        raise ValueError(f"smoothing={smoothing!r} is not among mean, linear, None")
    require_number("ratio", ratio, "of the largest singular value to the smallest, 1 or more", lambda x: x >= 1)
    if density is not None:
        require_density(density)

    def merged(x, errors):
        tasks = len(x)
        kept = max(1, min(x.shape[1:]) // tasks)
        parts = leading_of_each(x, errors, kept)
        left, right = map(orthonormal, joined(parts))
        smooth = jax.vmap(lambda one: _smoothed(one, smoothing, ratio))(parts)
        cores = product(product(left.T, smooth.left) * smooth.values[:, None], product(smooth.right, right.T))
        core = jnp.mean(cores, axis=0) if density is None else _elected(cores, density)
        if mask:
            core = core * jnp.kron(jnp.eye(tasks, dtype=x.dtype), jnp.ones((kept, kept), x.dtype))
        return product(left, core, right)

    return by_matrix(merged, base, deltas, weights, scale=scale, eps=eps, stacked=stacked, check_finite=check_finite)


def boost(
    delta: Tree,
    beta: Scalar = 0.01,
    *,
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """Subspace Boosting (2025, arXiv 2506.16506) of a merged task vector: `σ_i ← max(σ_i, σ_k)` in each layer.

    The weaker directions, which merging has cancelled, become as strong as the k-th.

    Args:
      delta: of any rule, `task_vector(merge(...), base)`; or take the rule "subspace_boosting".
      beta: k is the first component where the sum of the singular values (as in the authors' code, not of their
        squares) reaches this part of the whole: 0 makes all equal to the largest, 1 changes nothing.
      eps, stacked: see `tsv`.

    Directions below the rounding error, and leaves that are vectors, stay as they are.
    """
    require_part("beta", beta, "the part of the singular values' sum that stays as it is, from 0 to 1")
    (delta,) = require_same([delta], check_finite=check_finite)
    require_paths(eps, delta)
    of_layers = layers(delta, delta, stacked)

    @functools.partial(jax.jit, static_argnums=(2, 3))  # see `by_matrix`
    def boosted(x, floor, eps, of_layers):
        def layer(x):
            if x[0].ndim < 2:
                return x[0]
            parts = svd(x[0].reshape(-1, x.shape[-1]), Rounded(eps, floor))
            share = jnp.cumsum(parts.values) / jnp.maximum(jnp.sum(parts.values), jnp.finfo(x.dtype).tiny)
            # the last sum may fall short of 1 by rounding
            first = jnp.minimum(jnp.sum(share < beta), jnp.sum(parts.real) - 1).astype(int)
            values = parts.real * jnp.maximum(parts.values, parts.values[first])
            return parts._replace(values=values).matrix().reshape(x.shape[1:])

        return by_layer(layer, x, of_layers)

    def one(name, x):
        if x is None or not jnp.size(x):
            return x
        x = jnp.asarray(x)
        wide, errors = x[None].astype(tree.wide_type(x)), rounded([x], name, eps)
        return boosted(wide, errors.floor, errors.eps, name in of_layers).astype(x.dtype)

    return tree.map_with_name(one, delta)
