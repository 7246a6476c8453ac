"""Weighted sums of curvature of whatever kinds, never formed."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compo_jax import tree
from compo_jax.curvature.protocol import Curvature
from compo_jax.tree import Tree


@functools.partial(jax.tree_util.register_dataclass, data_fields=["terms", "factors", "count"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Sum:
    """`Σ_t factors_t terms_t`; see `Curvature`.

    Attributes:
      terms: curvature of the same parameters.
      factors: one number a term.
      count: examples of all terms.
    """

    terms: tuple
    factors: tuple
    count: Any

    def matvec(self, vector: Tree) -> Tree:
        if None not in jax.tree.leaves(vector, is_leaf=lambda x: x is None):
            return tree.weighted_sum((term.matvec(vector) for term in self.terms), self.factors)
        images = [term.matvec(vector) for term in self.terms]  # a hole stays one in some, and in others doesn't
        fullest = max(images, key=lambda image: len(jax.tree.leaves(image)))
        return tree.weighted_sum([tree.place(tree.by_name(image), fullest) for image in images], self.factors)

    __call__ = matvec

    def quadratic(self, vector: Tree, other: Tree | None = None) -> Array:
        return sum(f * term.quadratic(vector, other) for f, term in zip(self.factors, self.terms, strict=True))

    def diagonal(self) -> Tree:
        parts = [term.diagonal() for term in self.terms]
        if any(jax.tree.structure(part) != jax.tree.structure(parts[0]) for part in parts):
            parts = [tree.by_name(part) for part in parts]
        return tree.weighted_sum(parts, self.factors)

    def trace(self) -> Array:
        return sum(factor * term.trace() for factor, term in zip(self.factors, self.terms, strict=True))

    def scale(self, factor: float | Array) -> "Sum":
        return Sum((self,), (factor,), self.count)

    def __add__(self, other: Curvature) -> "Sum":
        return pooled(self, other)


def pooled(a: Curvature, b: Curvature) -> Sum:
    """The mean over the examples of both."""
    count = a.count + b.count
    return Sum((a, b), (a.count / count, b.count / count), count)


def require_damping(damping: float | Array) -> None:
    """ValueError where a damping that can be looked at isn't positive."""
    if not isinstance(damping, jax.core.Tracer) and not np.asarray(damping) > 0:  # jnp's would be traced in a loop
        raise ValueError(f"damping must be positive, not {damping}: curvature of few examples is singular")


def sum_leaves(leaves: Tree) -> Array:
    """The sum of all entries, in float32 at least."""
    return sum((jnp.sum(x, dtype=tree.wide_type(x)) for x in jax.tree.leaves(leaves)), start=jnp.zeros(()))
