"""The penalties of incremental task arithmetic and of incremental ensemble learning, as scalars."""

from typing import Any

import jax
import jax.numpy as jnp

from compo_jax import tree

Tree = Any


def _quadratic(fisher: Tree, a: Tree, b: Tree) -> jax.Array:
    def one(f, x, y):
        return None if x is None or y is None or f is None else f * x * y

    products = jax.tree.map(one, fisher, a, b, is_leaf=lambda x: x is None)
    return sum((jnp.sum(x) for x in jax.tree.leaves(products)), start=jnp.zeros(()))


def ita_penalty(delta: Tree, fisher_mean: Tree, alpha: float | jax.Array) -> jax.Array:
    """`½ α Σ F̂ ⊙ Δ²`, whose gradient in Δ is `α F̂ ⊙ Δ` (Porrello et al., 2025, incremental task arithmetic).

    Args:
      delta: the task vector of the module being trained; None leaves count as zero.
      fisher_mean: F̂, used as given: the mean Fisher diagonal of the other tasks, plus ε.
    """
    return 0.5 * alpha * _quadratic(fisher_mean, delta, delta)


def iel_penalty(delta: Tree, past: Tree | None, fisher_mean: Tree, beta: float | jax.Array, tasks: int) -> jax.Array:
    """`β T Ω(Δ)` up to a constant: `β [½ (1 - 1/T) Σ F̂ ⊙ Δ² - (1/T) Σ F̂ ⊙ Δ ⊙ past]` (incremental ensemble learning).

    Its gradient in Δ is `β [(1 - 1/T) F̂ ⊙ Δ - (1/T) F̂ ⊙ past]`; with one task there is nothing to be near to and it is
    `(β/2) F̂ ⊙ Δ`.

    Args:
      past: sum of the earlier modules' task vectors; None at the first task.
      tasks: T, the current task counted.
    """
    if tasks > 1 and past is None:
        raise ValueError(f"with {tasks} tasks the sum of the earlier modules' task vectors is needed: past=...")
    if tasks == 1:
        return 0.25 * beta * _quadratic(fisher_mean, delta, delta)
    own = 0.5 * (1 - 1 / tasks) * _quadratic(fisher_mean, delta, delta)
    return beta * (own - _quadratic(fisher_mean, delta, jax.lax.stop_gradient(past)) / tasks)


def head_penalty(head: Tree, reference: Tree, fisher: Tree, fisher_weight, identity_weight) -> jax.Array:
    """`λ_F Σ F̂ ⊙ (h - h_ref)² + λ_I ‖h - h_ref‖²`, the pull of a task's head to its aligned reference."""
    difference = jax.tree.map(jnp.subtract, head, reference)
    return fisher_weight * _quadratic(fisher, difference, difference) + identity_weight * tree.dot(
        difference, difference
    )
