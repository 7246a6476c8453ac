"""The joint minimum of the tasks' quadratics, from products of their curvature with vectors alone."""

import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from compo_jax import tree
from compo_jax.compose.leaves import add_delta
from compo_jax.compose.modules import require_matvecs, require_same, with_zeros
from compo_jax.compose.numbers import Scalar, Weights, anchored, require_iterations, require_not_negative, weigh
from compo_jax.compose.preconditioners import Matvec, inverse
from compo_jax.compose.sphere import gram
from compo_jax.curvature import Curvature
from compo_jax.lapack import eigh
from compo_jax.tree import Tree


class Solution(NamedTuple):
    """Of `A x = b`.

    Attributes:
      x: the iterate of the smallest residual.
      residual: `|b - A x| / |b|`, from a product made for it; 0 where b is.
      iterations: made, which is one product less than were taken.
      converged: whether the residual is within the tolerance.
      curvature: the smallest and the largest `pᵀ A p / pᵀ p` met; one that is zero to rounding, or less, stopped the
        iterations.
    """

    x: Tree
    residual: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    curvature: Float[Array, "2"]


class _Descent(NamedTuple):
    """Conjugate gradients on their way.

    Attributes:
      x, residual, direction: as in the recurrence.
      product: of the residual with the preconditioned one.
      count: iterations made.
      best, least: the iterate of the smallest residual, and its norm.
      lowest, highest: the curvature met, per unit of length.
      sound: False where the last direction had no curvature.
    """

    x: Tree
    residual: Tree
    direction: Tree
    product: Array
    count: Array | int
    best: Tree
    least: Array
    lowest: Array
    highest: Array
    sound: Array


class Solved(NamedTuple):
    """A composition by a solve.

    Attributes:
      params: the composed parameters.
      residual, iterations, converged: see `Solution`; a direct solve makes no iterations.
      weights: (tasks,), in module coordinates the composition: `params` is `compose(base, deltas, weights)`.
    """

    params: Tree
    residual: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    weights: Float[Array, " tasks"] | None = None


def conjugate_gradients(
    matvec: Matvec,
    b: Tree,
    *,
    preconditioner: Matvec | None = None,
    tolerance: Scalar | None = None,
    max_iterations: int = 200,
    check_finite: bool = True,
) -> Solution:
    """Solves `A x = b` from x = 0, A symmetric and positive (Hestenes and Stiefel, 1952). May be jitted.

    Where A is singular and b in its range, x is the solution of the smallest norm (in the preconditioner's norm).
    `jax.scipy.sparse.linalg.cg` tells neither the residual nor the iterations, and forgets the best iterate.

    Args:
      matvec: `A`, tree to tree; gets vectors in float32 at least.
      preconditioner: near `A⁻¹`, symmetric and positive.
      tolerance: of the residual; default `eps^0.75`, 6e-6 in float32 and 2e-12 in float64.

    ValueError where b isn't finite (`check_finite`), or the product isn't shaped as b.
    """
    require_iterations(tolerance, max_iterations)
    (narrow,) = require_same([b], check_finite=check_finite)
    b = jax.tree.map(lambda x: jnp.asarray(x, tree.wide_type(x)), narrow)
    matvec = functools.partial(_product, matvec, like=b)
    precondition = functools.partial(_product, preconditioner or (lambda v: v), like=b, what="the preconditioner")
    size = jnp.sqrt(tree.dot(b, b))
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(b))
    tolerance = eps**0.75 if tolerance is None else tolerance
    target = size * tolerance / 2  # the recurrence's residual drifts from the true one, which is judged

    def step(state):
        x, r, p, rz, count, best, least, lowest, highest, _ = state
        image = matvec(p)
        curved, length = tree.dot(p, image), tree.dot(p, p)
        lowest, highest = jnp.minimum(lowest, curved / length), jnp.maximum(highest, curved / length)
        sound = (curved > eps * highest * length) & (rz > 0)  # which nan is not
        alpha = jnp.where(sound, rz / jnp.where(sound, curved, 1), 0)
        x, r = tree.add(x, p, alpha), tree.add(r, image, -alpha)
        z = precondition(r)
        following = tree.dot(r, z)
        p = tree.add(z, p, following / jnp.where(rz > 0, rz, 1))
        norm = jnp.sqrt(tree.dot(r, r))
        better = norm < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), x, best)
        least = jnp.where(better, norm, least)
        return _Descent(x, r, p, following, count + 1, best, least, lowest, highest, sound)

    def more(state):
        return (state.least > target) & (state.count < max_iterations) & state.sound

    zero, z = jax.tree.map(jnp.zeros_like, b), precondition(b)
    start = _Descent(zero, b, z, tree.dot(b, z), 0, zero, size, size + jnp.inf, size - jnp.inf, jnp.array(True))
    end = jax.lax.while_loop(more, step, start)
    rest = tree.add(b, matvec(end.best), -1.0)
    residual = jnp.sqrt(tree.dot(rest, rest)) / jnp.where(size > 0, size, 1)
    rounded = jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), end.best, narrow)
    extremes = jnp.stack([end.lowest, end.highest])
    return Solution(rounded, residual, jnp.asarray(end.count), residual <= tolerance, extremes)


def _product(matvec: Matvec, vector: Tree, like: Tree, what: str = "the curvature product") -> Tree:
    """`matvec(vector)` at the vector's leaves, in its types. ValueError where it isn't shaped as `like`."""
    image = matvec(vector)
    tree.require_like(image, like, what)

    def there(_, v, g):
        return None if v is None else jnp.zeros_like(v) if g is None else jnp.asarray(g, v.dtype)

    return jax.tree.map(there, like, vector, tree.spread(image, like))


def solve_merge(
    base: Tree,
    deltas: Sequence[Tree],
    matvecs: Sequence[Matvec],
    weights: Weights | None = None,
    damping: Scalar = 0.0,
    *,
    coordinates: str = "full",
    anchor: Weights | str | None = None,
    preconditioner: Matvec | Sequence[Curvature | Tree] | None = None,
    tolerance: Scalar | None = None,
    max_iterations: int = 200,
    check_finite: bool = True,
) -> Solved:
    """`base + x`, with `(Σ w_t G_t + λ I) x = Σ w_t G_t delta_t`: the full Gauss-Newton merge, with no matrix formed.

    It minimises `Σ w_t ‖x - delta_t‖²_{G_t} + λ ‖x‖²`: the joint optimum where each task's loss is a quadratic around
    its own model. Fisher-weighted, RegMean and Kronecker-weighted merging replace G_t by a diagonal, `A ⊗ I`, `A ⊗ B`
    (Tam et al., 2024, arXiv 2312.04339).

    Args:
      matvecs: one `v -> G_t v` a task, tree to tree shaped as `base`, symmetric and positive: `curvature.ggn(apply,
        params_t, batches_t)`, or any other. Leaves that no delta changes stay.
      weights: (tasks,), of the tasks' mean losses, default 1/T. Not negative.
      damping: λ. A Gauss-Newton matrix of few examples is singular; without damping the solution is the one
        nearest to the anchor.
      coordinates: `full`, preconditioned conjugate gradients in the space of the parameters, T products an iteration;
        `modules`, x a combination `Σ c_t delta_t`, T² products and a T x T system: the best composition for the
        quadratics, of any LoRA rank that the modules have.
      anchor: the composition that damping pulls to, and where conjugate gradients begin, so that iterations that run
        out, as in MaTS (Tam et al.), stay near it: (tasks,) weights, or `average` for 1/T each; default the base. What
        few examples don't see is left as it is there, and the average is mostly the better place.
      preconditioner: in full coordinates; one set of Kronecker factors a task, one Fisher diagonal a task, or a
        function near the inverse, such as `inverse_of_rows`. With one, nearest is meant in its norm.
      tolerance: of the residual, see `conjugate_gradients`.

    A UserWarning names the residual that was left where conjugate gradients didn't converge, and the best iterate is
    returned. ValueError where the system is singular along its way (for dependent modules, say), or not positive, or
    where a module or a product isn't finite (`check_finite`). Under jit, where values can't be seen, look at
    `converged`.
    """
    if coordinates not in ("full", "modules"):
        raise ValueError(f"unknown coordinates {coordinates!r}; known are full, modules")
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    tasks = len(deltas)
    require_matvecs(matvecs, tasks)
    require_not_negative(damping=damping)
    require_iterations(tolerance, max_iterations)
    weights = weigh(weights, tasks, sign=False)
    anchor = anchored(anchor, tasks)
    types = jax.tree.map(lambda *d: tree.wide_type(*d), *deltas)
    wide = [jax.tree.map(jnp.asarray, delta, types) for delta in deltas]
    problem = _Quadratics(base, wide, list(matvecs), weights, damping, anchor)
    if coordinates == "modules":
        merged, residual, weights = _in_modules(problem)
        if check_finite and tree.concrete(residual) and not np.isfinite(residual):
            problem.require_finite_products()
        params = add_delta(base, merged, check_finite=check_finite)
        return Solved(params, residual, jnp.array(0), residual <= jnp.finfo(residual.dtype).eps ** 0.5, weights)
    merged, solution = _in_parameters(problem, preconditioner, tolerance, max_iterations, check_finite)
    params = add_delta(base, merged, check_finite=check_finite)
    return Solved(params, solution.residual, solution.iterations, solution.converged)


class _Quadratics(NamedTuple):
    """`½ Σ w_t ‖x - delta_t‖²_t + ½ λ ‖x - centre‖²`, to be minimised; the deltas in float32 at least."""

    base: Tree
    deltas: list[Tree]
    matvecs: list[Matvec]
    weights: list
    damping: Scalar
    anchor: list

    def products(self, vectors: Iterable[Tree]) -> Iterator[Tree]:
        """Each task's curvature times a vector of its own, one after another."""
        return (_product(m, v, self.base) for m, v in zip(self.matvecs, vectors, strict=True))

    def curvature(self, vector: Tree) -> Tree:
        """`Σ w_t G_t v`, of products that may be traced or not."""
        return tree.weighted_sum(self.products([vector] * len(self.matvecs)), self.weights)

    def summed(self, vectors: Sequence[Tree]) -> Tree:
        """`Σ w_t G_t v_t`, one task after another in a loop: XLA keeps what one product takes in memory, not what all
        take."""
        products = [functools.partial(_product, *each, self.base) for each in zip(self.matvecs, vectors, strict=True)]
        weights = jnp.stack(self.weights)
        add = lambda t, total: tree.add(total, jax.lax.switch(t, products), weights[t])
        return jax.lax.fori_loop(0, len(products), add, jax.tree.map(jnp.zeros_like, vectors[0]))

    def require_finite_products(self) -> NoReturn:
        """ValueError for what isn't finite in a solve: the module whose product it is, or the whole."""
        for t, image in enumerate(self.products(self.deltas)):
            tree.require_finite(image, f"the curvature product of module {t}")
        raise ValueError("the solve comes to numbers that aren't finite: the curvature, or the damping, is too large")


def _in_parameters(
    problem: _Quadratics, preconditioner: Any, tolerance: Scalar | None, max_iterations: int, check_finite: bool
) -> tuple[Tree, Solution]:
    """(the merged delta, how it was solved for)."""
    damping = problem.damping
    centre = tree.weighted_sum(problem.deltas, problem.anchor)
    apart = [tree.add(delta, centre, -1.0) for delta in problem.deltas]
    b = problem.summed(apart)
    if preconditioner is not None and not callable(preconditioner):
        preconditioner = inverse(preconditioner, problem.weights, damping, b, check_finite=check_finite)
    solution = conjugate_gradients(
        lambda v: tree.add(problem.summed([v] * len(problem.matvecs)), v, damping),
        b,
        preconditioner=preconditioner,
        tolerance=tolerance,
        max_iterations=max_iterations,
        check_finite=False,
    )
    if tree.concrete(solution, damping):
        if np.isfinite(solution.residual):
            _judge(solution, b, apart, damping)
        elif check_finite:
            problem.require_finite_products()
    return tree.add(centre, solution.x), solution


def _judge(solution: Solution, b: Tree, apart: list[Tree], damping: Scalar) -> None:
    blind = damping == 0 and tree.dot(b, b) == 0 and any(tree.dot(d, d) > 0 for d in apart)
    lowest, highest = solution.curvature
    if not solution.converged and lowest < -(jnp.finfo(lowest.dtype).eps ** 0.5) * abs(highest):
        raise ValueError(
            f"the curvature isn't positive: {lowest:.1e} along some direction. Take Gauss-Newton products "
            "(compo_jax.curvature.ggn) instead of the Hessian's, or more damping"
        )
    if blind or (solution.residual >= 1 and solution.iterations > 0 and lowest <= 0):
        raise ValueError(
            "the curvature is singular: it doesn't see the directions that the modules went. Give a damping above 0"
        )
    if not solution.converged:
        warnings.warn(
            f"conjugate gradients stopped after {solution.iterations} iterations with a relative residual of "
            f"{solution.residual:.1e}, and the best iterate is returned: allow more iterations or a higher tolerance, "
            "give Kronecker factors or Fisher diagonals as the preconditioner, or more damping",
            UserWarning,
            stacklevel=4,
        )


def symmetric_solve(matrix: Array, b: Array) -> tuple[Array, Bool[Array, ""]]:
    """(the solution x (n, ...) of `matrix x = b`, whether the matrix (n, n) is singular to rounding, or not positive).

    Then the directions where it is are left out of x. The scales of the rows don't matter.
    """
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), 0))
    scale = jnp.where(scale > 0, scale, 1)
    values, vectors = eigh(matrix / jnp.outer(scale, scale))
    regular = ~(values <= len(scale) * jnp.finfo(values.dtype).eps * values[-1])  # nan goes through
    columns = b.reshape(len(scale), -1) / scale[:, None]
    rotated = (
        jnp.matmul(vectors.T, columns, precision="highest")
        * jnp.where(regular, 1 / jnp.where(regular, values, 1), 0)[:, None]
    )
    x = jnp.matmul(vectors, rotated, precision="highest") / scale[:, None]
    return x.reshape(b.shape), ~jnp.all(regular)


def _in_modules(problem: _Quadratics) -> tuple[Tree, Float[Array, ""], Float[Array, " tasks"]]:
    """(the merged delta, the relative residual, its weights)."""
    deltas, damping = problem.deltas, problem.damping
    columns, pull = [], None
    for image, weight, delta in zip(problem.products(deltas), problem.weights, deltas, strict=True):
        curved = problem.curvature(delta)
        columns.append(jnp.stack([tree.dot(other, curved) for other in deltas]))
        alone = tree.weighted_sum([image], [weight])
        pull = alone if pull is None else tree.add(pull, alone)
    seen = jnp.stack(columns, axis=1)
    at = jnp.stack([jnp.asarray(a, seen.dtype) for a in problem.anchor])
    b = jnp.stack([tree.dot(delta, pull) for delta in deltas]) - jnp.matmul(seen, at, precision="highest")
    matrix = (seen + seen.T) / 2 + damping * gram(deltas)
    step, singular = symmetric_solve(matrix, b)
    size = jnp.linalg.norm(b)
    residual = jnp.linalg.norm(b - jnp.matmul(matrix, step, precision="highest")) / jnp.where(size > 0, size, 1)
    # with damping the composition is one, whatever the weights that make it
    if tree.concrete(residual, damping) and singular and damping == 0:
        raise ValueError(
            "the solve in module coordinates is singular: modules depend on each other, or the curvature doesn't "
            "see where they went. Give a damping above 0, or leave modules out that others are made of"
        )
    return tree.weighted_sum(deltas, list(at + step), wide=True), residual, at + step
