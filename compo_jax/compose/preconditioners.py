"""What is near the inverse of a sum of the tasks' curvature, and quick: of diagonals, and of Kronecker factors."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.compose.fisher import diagonals
from compo_jax.compose.numbers import Scalar
from compo_jax.curvature import Curvature, Kronecker, merge_kronecker
from compo_jax.tree import Tree

Matvec = Callable[[Tree], Tree]  # such as every `Curvature` is


def inverse(
    curvatures: Sequence[Curvature | Tree], weights: Sequence, damping: Scalar, like: Tree, *, check_finite: bool = True
) -> Matvec:
    """Near `(Σ w_t C_t + damping I)⁻¹`, for vectors shaped as `like`: of Kronecker factors, or of diagonals."""
    if len(curvatures) != len(weights):
        kind = "Kronecker factors" if any(isinstance(c, Kronecker) for c in curvatures) else "Fishers"
        raise ValueError(f"{len(curvatures)} {kind} were given to precondition with, for {len(weights)} modules")
    if all(isinstance(c, Kronecker) for c in curvatures):
        return _of_kronecker(curvatures, weights, damping, like)
    return _of_diagonals(curvatures, weights, damping, like, check_finite)


def _of_diagonals(fishers: Sequence, weights: Sequence, damping: Scalar, like: Tree, check_finite: bool) -> Matvec:
    """`v / (Σ w_t F_t + damping)`."""
    total = tree.weighted_sum(diagonals(fishers, like, check_finite=check_finite), weights, wide=True)
    if missing := sorted(set(tree.names(like)) - set(tree.names(total))):
        raise ValueError(f"the Fishers to precondition with have no entries for {', '.join(missing)}")
    floor = floored(total, damping)
    return lambda v: jax.tree.map(lambda x, d: x / (d + floor).astype(x.dtype), v, total)


def floored(values: Tree, damping: Scalar) -> jax.Array:
    """The damping, and as much as the rounding error of the largest value: the inverse of the rounding of what is zero
    would drown the others."""
    highest = jnp.stack([jnp.max(x, initial=0) for x in jax.tree.leaves(values)]).max()
    return damping + jnp.where(highest > 0, highest * jnp.finfo(highest.dtype).eps, 1)


def _of_kronecker(factors: Sequence[Kronecker], weights: Sequence, damping: Scalar, like: Tree) -> Matvec:
    """In the eigenbasis of the merged factors, with the exact diagonal that `Σ w_t A_t ⊗ B_t` has there: the nearest to
    it of all matrices that are diagonal in that basis. Leaves without factors are divided by the mean of that diagonal.
    """
    eigen = merge_kronecker(factors, weights).eigen()

    def rotated(basis, x):
        return jnp.einsum("...ki,...kl,...li->...i", basis, x, basis, precision="highest")

    values = {}
    for name, (a, b) in eigen.basis.items():
        parts = [
            w * rotated(a, f.inputs[name])[..., :, None] * rotated(b, f.outputs[name])[..., None, :]
            for w, f in zip(weights, factors, strict=True)
        ]
        values[name] = jnp.maximum(sum(parts), 0)
    eigen, floor = dataclasses.replace(eigen, values=values), floored(values, damping)
    mean = sum(jnp.sum(x) for x in values.values()) / sum(x.size for x in values.values())
    if not set(tree.names(like)) & set(values):
        raise ValueError(
            f"the Kronecker factors to precondition with are of {', '.join(values)}, and the modules change none of "
            f"these but {', '.join(tree.names(like))}"
        )

    def solve(v):
        covered, rest = tree.partition(v, lambda name: name in values)
        scaled = jax.tree.map(lambda x: x / (mean + floor).astype(x.dtype), rest)
        solved = jax.tree.map(lambda y, x: y.astype(x.dtype), eigen.solve(covered, floor), covered)
        return tree.combine(solved, scaled)

    return solve
