"""Rules on the singular vectors of each layer's task matrices.

A leaf is a matrix (in, out), its last axis against all others, so that a convolution is one, too; axis 0 of a stacked
leaf counts layers, each of which is a matrix. Leaves that are vectors are averaged. Singular values below the rounding
error belong to no direction (a LoRA delta has its rank and no more), and are left out.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.entries import whole
from compo_jax.compose.leaves import Stacked, assembled, by_layer, layers, stack
from compo_jax.compose.modules import with_zeros
from compo_jax.compose.numbers import Scalar, Weights, along, require_number, weigh
from compo_jax.lapack import svd
from compo_jax.tree import Tree

Matrices = Float[Array, "tasks in out"]


def _svd(x: Float[Array, "in out"], eps: float) -> tuple[Array, Array, Array, Array]:
    """(U, σ, Vᵀ, which singular values are above the rounding error), the directions of the others zero.

    Args:
      eps: of the type that the entries were rounded to. Their errors, as a matrix, have singular values up to about a
        third of `eps |x| / sqrt(min(in, out))`.
    """
    u, s, v = svd(x)
    noise = eps * jnp.linalg.norm(s) / min(x.shape) ** 0.5
    small = s <= jnp.maximum(s[:1] * max(x.shape) * jnp.finfo(x.dtype).eps, noise)
    real = jnp.where(small, 0, 1).astype(x.dtype)  # 1 for nan, which goes through
    return u * real, s * real, v * real[:, None], real


def _by_matrix(
    function: Callable[[Matrices, float], Array],
    base: Tree,
    deltas: list[Tree],
    weights: list,
    scale: Scalar,
    stacked: Stacked,
    check_finite: bool,
) -> Tree:
    of_layers = layers(base, deltas[0], stacked)

    def leaf(name, b, rows, _):
        eps = max(float(jnp.finfo(jnp.result_type(x)).eps) for x in rows)

        def layer(x):
            x = along(weights, x) * x
            if x.ndim < 3:
                return jnp.mean(x, axis=0)
            return function(x.reshape(x.shape[0], -1, x.shape[-1]), eps).reshape(x.shape[1:])

        return tree.add(whole(b), by_layer(layer, stack(rows), name in of_layers), scale)

    return assembled(base, deltas, leaf, check_finite=check_finite)


def tsv(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    scale: Scalar = 1.0,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """TSV-M (Gargiulo et al., 2025, arXiv 2412.00081): the tasks' leading singular vectors, made orthogonal, summed.

    Of each layer's task matrix the leading `min(in, out) / T` components are kept; the left vectors of all tasks are
    replaced by the nearest orthonormal ones (Procrustes), and so are the right ones. One task alone is left as it is.

    Args:
      weights: (tasks,), multiply the deltas; default 1.
      scale: of the merged task vector.
      stacked: patterns of the paths of leaves whose axis 0 counts layers; default: the scanned blocks of our ViT. `()`
        where there are none.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    require_number("scale", scale, "a finite number")

    def orthonormal(x):
        p, _, q = svd(x)
        return jnp.matmul(p, q, precision="highest")

    def merged(x, eps):
        tasks, size_in, size_out = x.shape
        kept = max(1, min(size_in, size_out) // tasks)
        u, s, v, _ = jax.lax.map(lambda one: _svd(one, eps), x)
        left = orthonormal(jnp.moveaxis(u[:, :, :kept], 0, 1).reshape(size_in, -1))
        right = orthonormal(v[:, :kept].reshape(-1, size_out))
        return jnp.matmul(left * s[:, :kept].ravel(), right, precision="highest")

    weights = weigh(weights, len(deltas), 1.0)
    return _by_matrix(merged, base, deltas, weights, scale, stacked, check_finite)


def iso(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    scale: Scalar = 1.0,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """Iso-C (Marczak et al., 2025, arXiv 2502.04959): the summed task matrix with all singular values at their mean.

    `scale σ̄ U Vᵀ` of each layer's `Σ w_t delta_t`; the arguments are those of `tsv`.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    require_number("scale", scale, "a finite number")

    def merged(x, eps):
        u, s, v, real = _svd(jnp.sum(x, axis=0), eps)
        return jnp.sum(s) / jnp.maximum(jnp.sum(real), 1) * jnp.matmul(u, v, precision="highest")

    weights = weigh(weights, len(deltas), 1.0)
    return _by_matrix(merged, base, deltas, weights, scale, stacked, check_finite)
