"""The joint minimum of the tasks' quadratics in a basis of their task vectors, from products with the basis alone."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.groups import Grouping, combined, grouped, inner_products
from compo_jax.compose.leaves import Stacked
from compo_jax.compose.modules import require_matvecs, with_holes
from compo_jax.compose.numbers import Scalar, Weights, require_not_negative, require_number, weigh
from compo_jax.compose.solve import Matvec, symmetric_solve
from compo_jax.lapack import eigh
from compo_jax.tree import Tree

# compiled once: their operations are many, and small
_combined, _products = jax.jit(combined), jax.jit(inner_products)


class Projected(NamedTuple):
    """A composition in a basis of task vectors.

    Attributes:
      params: the composed parameters.
      weights: (tasks, groups), `params` is `base + Σ w_{t,g} delta_t`.
      groups: the names of the groups.
    """

    params: Tree
    weights: Float[Array, "tasks groups"]
    groups: tuple[str, ...]


class _Basis(NamedTuple):
    """Orthonormal directions, as (tasks, groups) weights of the deltas.

    Attributes:
      columns: (tasks * groups, directions); zero for those that are below the rounding error.
      products: (tasks * groups, tasks), of each task's part in each group with each task vector.
    """

    columns: Float[Array, "parts directions"]
    products: Float[Array, "parts tasks"]


def _basis(products: Float[Array, "tasks groups tasks"], rank: int) -> _Basis:
    """In each group the leading left singular vectors of the task vectors, side by side as columns."""
    tasks, count, _ = products.shape
    values, vectors = jax.lax.map(eigh, jnp.moveaxis(products, 1, 0))
    values, vectors = values[:, ::-1][:, :rank], vectors[:, :, ::-1][:, :, :rank]
    real = values > values[:, :1] * tasks * jnp.finfo(values.dtype).eps
    blocks = jnp.where(real[:, None], vectors / jnp.sqrt(jnp.where(real, values, 1))[:, None], 0)
    columns = jnp.einsum("gtk,gh->tghk", blocks, jnp.eye(count, dtype=blocks.dtype))
    return _Basis(columns.reshape(tasks * count, -1), products.reshape(-1, tasks))


def epimer(
    base: Tree,
    deltas: Sequence[Tree],
    matvecs: Sequence[Matvec],
    weights: Weights | None = None,
    *,
    damping: Scalar = 0.0,
    rank: int | None = None,
    groups: Grouping = "layers",
    scale: Scalar = 1.0,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Projected:
    """EpiMer (Lu et al., 2026, arXiv 2605.26693): `α (Σ w_t H̃_t + λ I)⁻¹ Σ w_t H̃_t z_t`, in a basis of task vectors.

    `H̃_t = Uᵀ H_t U` comes from products with the basis U, and `z_t = Uᵀ delta_t`. The minimum over the basis of
    `Σ w_t ‖x - delta_t‖²_{H_t}`, as `solve_merge` finds it over all parameters, or over the T modules. The authors
    have published no code; the basis here is of the task vectors as vectors, in each group by itself, so that its span
    is that of tasks * groups weights, and a direction costs a product with each task's curvature: `T² * groups` of them
    at full rank.

    Args:
      matvecs: one `v -> H_t v` a task, see `solve_merge`. The paper's is the expected Hessian, for which with a softmax
        the Gauss-Newton product stands (`curvature.ggn`): it is positive, so that there is a minimum.
      weights: (tasks,), of the tasks' mean losses, default 1/T. Not negative.
      damping: λ, pulls to the base.
      rank: directions of each group, the leading singular vectors of its task vectors; default all, T.
      groups: see `groups.grouped`; `tasks` for whole task vectors.
      scale: α.

    ValueError where the system is singular: the curvature doesn't see a direction of the basis.
    """
    deltas = with_holes(base, deltas, check_finite=check_finite)
    tasks = len(deltas)
    require_matvecs(matvecs, tasks)
    require_not_negative(damping=damping)
    require_number("scale", scale, "a finite number")
    rank = tasks if rank is None else rank
    require_number("rank", rank, "a whole number of directions, from 1 on", lambda x: x >= 1 and x == int(x))
    weights, parts = weigh(weights, tasks, sign=False), grouped(base, deltas, groups, stacked)
    shape = (tasks, len(parts.names))
    zeros = jnp.zeros(len(parts.names), tree.wide_type(*jax.tree.leaves(deltas)))
    inner = functools.partial(_products, parts.places, zeros, deltas)
    columns, products = _basis(jnp.stack([inner(d) for d in deltas], axis=-1), min(int(rank), tasks))

    def projected(matvec):
        def image(column):
            seen = matvec(_combined(parts.places, deltas, column.reshape(shape)))
            tree.require_like(seen, base, "the curvature product")
            return inner(seen).ravel()

        seen = jnp.matmul(columns.T, jax.lax.map(image, columns.T).T, precision="highest")
        return (seen + seen.T) / 2

    total, right = 0, 0
    for t, (matvec, weight) in enumerate(zip(matvecs, weights, strict=True)):
        curvature = projected(matvec)
        if check_finite:
            tree.require_finite({"the basis": curvature}, f"the curvature product of module {t}")
        at = jnp.matmul(columns.T, products[:, t], precision="highest")
        total, right = total + weight * curvature, right + weight * jnp.matmul(curvature, at, precision="highest")
    absent = jnp.all(columns == 0, axis=0)
    system = total + jnp.diag(damping + absent.astype(total.dtype))
    step, singular = symmetric_solve(system, right)
    if tree.concrete(singular) and singular:
        raise ValueError(
            "the curvature is singular in the basis of the task vectors: it doesn't see some direction that modules "
            "went, or isn't positive. Give a damping above 0, a lower rank, or Gauss-Newton products"
        )
    chosen = scale * jnp.matmul(columns, step, precision="highest").reshape(shape)
    return Projected(parts.compose(base, deltas, chosen, check_finite=check_finite), chosen, parts.names)
