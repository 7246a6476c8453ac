"""The penalties of incremental task arithmetic and of incremental ensemble learning, as scalars."""

import jax
import jax.numpy as jnp

from compo_jax import curvature as curvatures
from compo_jax import tree
from compo_jax.curvature import as_curvature
from compo_jax.tree import Tree

Curvature = curvatures.Curvature | Tree  #: of any kind, or a diagonal shaped as the parameters, with holes


def mean_entry(curvature: Curvature) -> jax.Array:
    """The mean of the curvature's diagonal; 1 where all of it is zero, so that it can be divided by."""
    curvature = as_curvature(curvature)
    total, count = curvature.trace(), tree.size(jax.eval_shape(lambda c: c.diagonal(), curvature))
    return jnp.where(total > 0, total / count, 1.0)


def ita_penalty(delta: Tree, fisher_mean: Curvature, alpha: float | jax.Array) -> jax.Array:
    """`½ α Σ F̂ ⊙ Δ²`, whose gradient in Δ is `α F̂ ⊙ Δ` (Porrello et al., 2025, incremental task arithmetic).

    Args:
      delta: the task vector of the module being trained; None leaves count as zero.
      fisher_mean: F̂, used as given: the mean Fisher diagonal of the other tasks, plus ε; or their merged Kronecker
        factors, and then this is `½ α tr(B Δᵀ A Δ)` (TAK, 2026, arXiv 2602.17385).
    """
    return 0.5 * alpha * as_curvature(fisher_mean).quadratic(delta)


def iel_penalty(
    delta: Tree, past: Tree | None, fisher_mean: Curvature, beta: float | jax.Array, tasks: int | jax.Array
) -> jax.Array:
    """`β T Ω(Δ)` up to a constant: `β [½ (1 - 1/T) Σ F̂ ⊙ Δ² - (1/T) Σ F̂ ⊙ Δ ⊙ past]` (incremental ensemble learning).

    Its gradient in Δ is `β [(1 - 1/T) F̂ ⊙ Δ - (1/T) F̂ ⊙ past]`; with one task there is nothing to be near to and it is
    `(β/2) F̂ ⊙ Δ`.

    Args:
      past: sum of the earlier modules' task vectors; None at the first task.
      fisher_mean: as in `ita_penalty`, of all tasks up to this one.
      tasks: T, the current task counted; a traced one needs `past`.
    """
    curvature = as_curvature(fisher_mean)
    if past is None:
        if isinstance(tasks, jax.core.Tracer) or tasks > 1:
            raise ValueError(f"with {tasks} tasks the sum of the earlier modules' task vectors is needed: past=...")
        return 0.25 * beta * curvature.quadratic(delta)
    alone = 0.5 * jnp.where(jnp.equal(tasks, 1), 0.5, 1 - 1 / tasks) * curvature.quadratic(delta)
    apart = jnp.where(jnp.equal(tasks, 1), 0, 1 / tasks)
    return beta * (alone - apart * curvature.quadratic(delta, jax.lax.stop_gradient(past)))


def head_penalty(head: Tree, reference: Tree, fisher: Tree, fisher_weight, identity_weight) -> jax.Array:
    """`λ_F Σ F̂ ⊙ (h - h_ref)² + λ_I ‖h - h_ref‖²`, the pull of a task's head to its aligned reference."""
    difference = jax.tree.map(jnp.subtract, head, reference)
    return fisher_weight * as_curvature(fisher).quadratic(difference) + identity_weight * tree.dot(
        difference, difference
    )
