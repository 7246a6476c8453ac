"""Rules on the singular vectors of each layer's task matrices: made orthogonal, or of one length.

What a matrix is, and what becomes of other leaves: see `matrices`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.leaves import Stacked
from compo_jax.compose.matrices import (
    Components,
    Eps,
    by_matrix,
    joined,
    leading_of_each,
    orthonormal,
    product,
    svd,
    svd_of_sum,
)
from compo_jax.compose.numbers import Scalar, Weights, count_of, require_part
from compo_jax.tree import Tree


def tsv(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    scale: Scalar = 1.0,
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """TSV-M (Gargiulo et al., 2025, arXiv 2412.00081): the tasks' leading singular vectors, made orthogonal, summed.

    Of each layer's task matrix the leading `min(in, out) / T` components are kept; the left vectors of all tasks are
    replaced by the nearest orthonormal ones (Procrustes), and so are the right ones. One task alone is left as it is.

    Args:
      weights: (tasks,), multiply the deltas; default 1.
      scale: of the merged task vector.
      eps: of the type that the modules were rounded to, one number or by path, where the deltas' own is wider; default
        their own types'.
      stacked: patterns of the paths of leaves whose axis 0 counts layers; default: the scanned blocks of our ViT. `()`
        where there are none.
    """

    def merged(x, errors):
        parts = leading_of_each(x, errors, max(1, min(x.shape[1:]) // len(x)))
        left, right = joined(parts)
        return product(orthonormal(left) * parts.values.ravel(), orthonormal(right))

    return by_matrix(merged, base, deltas, weights, scale=scale, eps=eps, stacked=stacked, check_finite=check_finite)


def _even(parts: Components) -> Components:
    """The components with all singular values at their mean."""
    count = jnp.maximum(jnp.sum(parts.real), 1)
    return parts._replace(values=parts.real * jnp.sum(parts.values) / count)


def iso(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    scale: Scalar = 1.0,
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """Iso-C (Marczak et al., 2025, arXiv 2502.04959): the summed task matrix with all singular values at their mean.

    `scale σ̄ U Vᵀ` of each layer's `Σ w_t delta_t`; the arguments are those of `tsv`.
    """

    def merged(x, errors):
        return _even(svd_of_sum(x, errors)).matrix()

    return by_matrix(merged, base, deltas, weights, scale=scale, eps=eps, stacked=stacked, check_finite=check_finite)


def iso_cts(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    common: Scalar = 0.8,
    scale: Scalar = 1.0,
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """Iso-CTS (Marczak et al., 2025, arXiv 2502.04959, algorithm 2): Iso-C with room for what single tasks alone have.

    Of the r = min(in, out) components of a layer's sum the top k are kept, `U_k S_k V_kᵀ`; of each task's remainder
    `Δ_t - Δ_t V_k V_kᵀ` (in the outputs, as in the authors' code, whose matrices are (out, in)) the top (r - k) / T;
    the joined left vectors are made orthonormal, and the right ones, and all singular values are their mean.

    Args:
      common: k / r. As in the authors' code (0.8) k is moved until T divides r - k; where there are more tasks than
        r - k, it is r, which is Iso-C.

    The other arguments are those of `tsv`.
    """
    require_part("common", common, "the part of the directions that the tasks share, from 0 to 1")

    def merged(x, errors):
        tasks, rank = len(x), min(x.shape[1:])
        alone = min(round((rank - count_of(common, rank)) / tasks), rank // tasks)
        top = svd_of_sum(x, errors).leading(rank - alone * tasks)

        def remainder(one):
            rest = one - product(one, top.right.T, top.right)
            return svd(rest, errors, jnp.linalg.norm(one)).leading(alone)

        parts = jax.lax.map(remainder, x)
        left, right = joined(parts)
        return _even(
            Components(
                orthonormal(jnp.concatenate([top.left, left], axis=1)),
                jnp.concatenate([top.values, parts.values.ravel()]),
                orthonormal(jnp.concatenate([top.right, right])),
                jnp.concatenate([top.real, parts.real.ravel()]),
            )
        ).matrix()

    return by_matrix(merged, base, deltas, weights, scale=scale, eps=eps, stacked=stacked, check_finite=check_finite)
