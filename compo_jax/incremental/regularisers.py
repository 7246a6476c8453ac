"""The penalties of incremental task arithmetic and of incremental ensemble learning, as scalars."""

import math

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.curvature import Kronecker
from compo_jax.tree import Tree

Curvature = Tree | Kronecker  #: a diagonal shaped as the parameters, with holes, or Kronecker factors


def _quadratic(curvature: Curvature, a: Tree, b: Tree) -> jax.Array:
    """`aᵀ G b`."""
    if isinstance(curvature, Kronecker):
        return tree.dot(a, curvature.matvec(b))

    def one(f, x, y):
        if x is None or y is None or f is None:
            return None
        wide = tree.wide_type(f, x, y)
        return jnp.sum(jnp.asarray(f, wide) * jnp.asarray(x, wide) * jnp.asarray(y, wide))

    products = jax.tree.map(one, curvature, a, b, is_leaf=lambda x: x is None)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


def mean_entry(curvature: Curvature) -> jax.Array:
    """The mean of the curvature's diagonal; 1 where all of it is zero, so that it can be divided by."""
    if isinstance(curvature, Kronecker):
        total, count = curvature.trace(), sum(math.prod((*layer.stack, *layer.shape)) for _, layer in curvature.layout)
    else:
        total, count = sum((jnp.sum(x) for x in jax.tree.leaves(curvature)), start=jnp.zeros(())), tree.size(curvature)
    return jnp.where(total > 0, total / count, 1.0)


def ita_penalty(delta: Tree, fisher_mean: Curvature, alpha: float | jax.Array) -> jax.Array:
    """`½ α Σ F̂ ⊙ Δ²`, whose gradient in Δ is `α F̂ ⊙ Δ` (Porrello et al., 2025, incremental task arithmetic).

    Args:
      delta: the task vector of the module being trained; None leaves count as zero.
      fisher_mean: F̂, used as given: the mean Fisher diagonal of the other tasks, plus ε; or their merged Kronecker
        factors, and then this is `½ α tr(B Δᵀ A Δ)` (TAK, 2026, arXiv 2602.17385).
    """
    return 0.5 * alpha * _quadratic(fisher_mean, delta, delta)


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
    if past is None:
        if isinstance(tasks, jax.core.Tracer) or tasks > 1:
            raise ValueError(f"with {tasks} tasks the sum of the earlier modules' task vectors is needed: past=...")
        return 0.25 * beta * _quadratic(fisher_mean, delta, delta)
    own = 0.5 * jnp.where(jnp.equal(tasks, 1), 0.5, 1 - 1 / tasks) * _quadratic(fisher_mean, delta, delta)
    apart = jnp.where(jnp.equal(tasks, 1), 0, 1 / tasks)
    return beta * (own - apart * _quadratic(fisher_mean, delta, jax.lax.stop_gradient(past)))


def head_penalty(head: Tree, reference: Tree, fisher: Tree, fisher_weight, identity_weight) -> jax.Array:
    """`λ_F Σ F̂ ⊙ (h - h_ref)² + λ_I ‖h - h_ref‖²`, the pull of a task's head to its aligned reference."""
    difference = jax.tree.map(jnp.subtract, head, reference)
    return fisher_weight * _quadratic(fisher, difference, difference) + identity_weight * tree.dot(
        difference, difference
    )
