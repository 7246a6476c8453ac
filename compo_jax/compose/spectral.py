"""Rules on the singular vectors of each layer's task matrices.

A leaf is a matrix (in, out), its last axis against all others, so that a convolution is one, too; axis 0 of a stacked
leaf counts layers, each of which is a matrix. Leaves that are vectors are averaged. Singular values below the rounding
error belong to no direction (a LoRA delta has its rank and no more), and are left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.compose.modules import Scalar, Weights, aligned, by_layer, leafwise, weigh

Tree = Any
Matrices = Float[Array, "tasks in out"]


def _svd(x: Float[Array, "*tasks in out"]) -> tuple[Array, Array, Array, Array]:
    """(U, σ, Vᵀ, which singular values are above the rounding error), the directions of the others zero."""
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    real = s > s[..., :1] * max(x.shape[-2:]) * jnp.finfo(x.dtype).eps
    return u * real[..., None, :], s * real, v * real[..., :, None], real


def _by_matrix(function: Callable[[Matrices], Array], deltas: list[Tree], weights, stacked) -> Tree:
    def layer(x):
        w = jnp.stack([jnp.asarray(one, x.dtype) for one in weights]).reshape(-1, *[1] * (x.ndim - 1))
        if x.ndim < 3:
            return jnp.mean(w * x, axis=0)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        merged = function((w * wide).reshape(x.shape[0], -1, x.shape[-1]))
        return merged.reshape(x.shape[1:]).astype(x.dtype)

    return leafwise(lambda name, x: by_layer(layer, name, x, stacked), deltas)


def tsv(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    scale: Scalar = 1.0,
    stacked: str | Sequence[str] | None = None,
) -> Tree:
    """TSV-M (Gargiulo et al., 2025, arXiv 2412.00081): the tasks' leading singular vectors, made orthogonal, summed.

    Of each layer's task matrix the leading `min(in, out) / T` components are kept; the left vectors of all tasks are
    replaced by the nearest orthonormal ones (Procrustes), and so are the right ones. One task alone is left as it is.

    Args:
      weights: (tasks,), multiply the deltas; default 1.
      scale: of the merged task vector.
      stacked: patterns of the paths of leaves whose axis 0 counts layers; default: leaves of three axes.
    """
    deltas = aligned(base, deltas)

    def orthonormal(x):
        p, _, q = jnp.linalg.svd(x, full_matrices=False)
        return jnp.matmul(p, q, precision="highest")

    def merged(x):
        tasks, size_in, size_out = x.shape
        kept = max(1, min(size_in, size_out) // tasks)
        u, s, v, _ = _svd(x)
        left = orthonormal(jnp.moveaxis(u[:, :, :kept], 0, 1).reshape(size_in, -1))
        right = orthonormal(v[:, :kept].reshape(-1, size_out))
        return jnp.matmul(left * s[:, :kept].ravel(), right, precision="highest")

    return tree.add(base, _by_matrix(merged, deltas, weigh(weights, len(deltas), 1.0), stacked), scale)


def iso(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    scale: Scalar = 1.0,
    stacked: str | Sequence[str] | None = None,
) -> Tree:
    """Iso-C (Marczak et al., 2025, arXiv 2502.04959): the summed task matrix with all singular values at their mean.

    `scale σ̄ U Vᵀ` of each layer's `Σ w_t delta_t`; the arguments are those of `tsv`.
    """
    deltas = aligned(base, deltas)

    def merged(x):
        u, s, v, real = _svd(jnp.sum(x, axis=0))
        return jnp.sum(s) / jnp.maximum(jnp.sum(real), 1) * jnp.matmul(u, v, precision="highest")

    return tree.add(base, _by_matrix(merged, deltas, weigh(weights, len(deltas), 1.0), stacked), scale)
