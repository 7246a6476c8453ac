"""What every kind of curvature can be asked: one face for diagonals, Kronecker factors and products over data."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array

from compo_jax.tree import Tree

if TYPE_CHECKING:
    import lineax


@runtime_checkable
class Curvature(Protocol):
    """A symmetric matrix G over the parameters, the mean of a matrix for each of `count` examples; never formed.

    Which to take, the cheapest first:
      `fisher_diagonal`: one number a parameter, positive. Penalties and weighted averages; says nothing of how
        parameters act together.
      `kronecker`: two small factors a dense layer, positive. Sees how the weights of a layer act together, and can be
        solved with; an approximation wherever there are several examples.
      `eigenvalue_corrected`: the same basis with exact second moments in it; the better one for products and solves,
        for one more pass over the data.
      `ggn`: the exact Gauss-Newton matrix, positive; each product is a pass over the data. For solves of any size.
      `hessian`: the exact Hessian, with its negative directions. For forecasts and spectra; solves may fail.

    Vectors are trees shaped as the parameters, or with None where they are zero. A curvature is its own product:
    `curvature(vector)` is `curvature.matvec(vector)`, so that it passes for a function of vectors everywhere.
    """

    @property
    def count(self) -> Any:
        """The number of examples that G is the mean over."""
        ...

    def matvec(self, vector: Tree) -> Tree:
        """`G v`, shaped as the vector. A None hole of the vector counts as zero, and may stay one where G joins no
        layers."""
        ...

    def __call__(self, vector: Tree) -> Tree:
        """`matvec`."""
        ...

    def quadratic(self, vector: Tree, other: Tree | None = None) -> Array:
        """`vᵀ G v`, or `vᵀ G u` with another vector u."""
        ...

    def diagonal(self) -> Tree:
        """The diagonal of G, its leaves at the parameters' paths (`tree.names`): shaped as the parameters, or for
        Kronecker factors, which know no more of them, a dictionary from path to leaf."""
        ...

    def trace(self) -> Array:
        """The sum of the diagonal."""
        ...

    def scale(self, factor: float | Array) -> "Curvature":
        """`factor G`, of as many examples: the curvature of a loss that is weighted."""
        ...

    def __add__(self, other: "Curvature") -> "Curvature":
        """The mean over both curvatures' examples. Kronecker factors are averaged each by itself (`merge_kronecker`);
        all other sums are exact."""
        ...


@runtime_checkable
class Solvable(Curvature, Protocol):
    """Curvature whose inverse is known: diagonals and Kronecker factors. For others: `compose.conjugate_gradients`."""

    def solve(self, vector: Tree, damping: float | Array) -> Tree:
        """`(G + damping I)⁻¹ v`; ValueError for a damping that isn't positive, as G of few examples is singular."""
        ...


def as_lineax(curvature: Curvature, like: Tree, tags: Iterable[object] = ()) -> "lineax.FunctionLinearOperator":
    """The curvature as a `lineax` operator on vectors shaped as `like`, for its solvers; lineax has to be installed.

    Args:
      tags: beside `symmetric_tag`; `[lineax.positive_semidefinite_tag]`, which lineax's conjugate gradients ask for, is
        true of all kinds but `hessian`.
    """
    import lineax

    return lineax.FunctionLinearOperator(
        curvature.matvec, jax.eval_shape(lambda t: t, like), [lineax.symmetric_tag, *tags]
    )
