"""What the rules share that go from matrix to matrix.

A leaf is a matrix (in, out), its last axis against all others, so that a convolution is one, too; axis 0 of a stacked
leaf counts layers, each of which is a matrix. Leaves that are vectors are averaged. Singular values below the rounding
error belong to no direction (a LoRA delta has its rank and no more), and are left out. Where singular values are equal,
as the zeros of a low rank are, singular vectors have no gradient: neither have the rules that go by them.

Weights of PyTorch and Equinox are (out, in), and convolutions of theirs (out, in, height, width): `merge` takes them
with `outputs_first=`, and `merge_files` knows PyTorch's. It matters to `wudi`, `iso_cts` and `knots`, which tell inputs
from outputs (of the others the result is transposed, too), and of convolutions to every rule here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax import lapack, tree
from compo_jax.compose.entries import root_mean_square, unit_of, whole
from compo_jax.compose.leaves import Stacked, assembled, by_layer, layers, stack
from compo_jax.compose.modules import with_zeros
from compo_jax.compose.numbers import Scalar, Weights, along, require_not_negative, require_number, weigh
from compo_jax.tree import Tree

Matrices = Float[Array, "tasks in out"]


class Rounded(NamedTuple):
    """The size of the errors that a matrix's entries have from rounding.

    Attributes:
      eps: of the type that the entries were rounded to, in parts of their own size.
      floor: of an entry whatever its size, as differences of large numbers have it; in the matrix's unit.
    """

    eps: float
    floor: Scalar = 0.0


EXACT = Rounded(0.0)

#: The eps of the type that modules were rounded to, where the deltas' own is wider: one number, or by path.
Eps = Scalar | Mapping[str, Scalar | Rounded] | None


def rounding(deltas: Sequence[Tree], eps: Eps = None) -> dict[str, Rounded]:
    """By path, the eps of what the deltas' leaves were rounded to: the largest of their types', or `eps`."""
    leaves: dict[str, list] = {}
    for delta in deltas:
        for name, x in tree.by_name(delta).items():
            leaves.setdefault(name, []).append(x)
    floats = {name: row for name, row in leaves.items() if jnp.issubdtype(jnp.result_type(*row), jnp.floating)}
    return {name: rounded(row, name, eps) for name, row in floats.items()}


def rounded(leaves: Sequence, name: str, eps: Eps = None, base: Any = None) -> Rounded:
    """What the leaves at this path were rounded to: their types, or what `eps` says where that is coarser. The entries
    of differences from `base`, a leaf, are as uncertain as its own."""
    given = eps.get(name, 0.0) if isinstance(eps, Mapping) else eps or 0.0
    given = given if isinstance(given, Rounded) else Rounded(_number(given))
    most = max(given.eps, *(float(jnp.finfo(jnp.result_type(x)).eps) for x in leaves))
    size = 0.0 if base is None else root_mean_square(base)
    return Rounded(most, jnp.maximum(given.floor, jnp.where(jnp.isfinite(size), most * size, 0.0)))


def require_paths(eps: Eps, like: Tree) -> None:
    """ValueError where `eps` names a path that `like` hasn't; what is behind a None of `like` may be named."""
    if not isinstance(eps, Mapping):
        return
    known = tree.by_name(tree.map_with_name(lambda name, x: x is None, like))
    holes = tuple(f"{name}/" for name, hole in known.items() if hole)
    if wrong := [name for name in eps if name not in known and not name.startswith(holes)]:
        raise ValueError(f"eps names {', '.join(map(str, wrong))}, and the paths are: {', '.join(known)}")


def _number(eps: Any) -> float:
    require_not_negative(eps=eps)
    return float(eps)


class Components(NamedTuple):
    """A singular value decomposition, in which the directions below the rounding error are zero.

    Attributes:
      left, values, right: (in, k), (k,) and (k, out).
      real: (k,), 1 for the values that are above the rounding error, 0 for the others.
    """

    left: Array
    values: Array
    right: Array
    real: Array

    def leading(self, count: int) -> "Components":
        """The first `count` components, of many matrices too."""
        return Components(
            self.left[..., :count], self.values[..., :count], self.right[..., :count, :], self.real[..., :count]
        )

    def matrix(self) -> Array:
        """`U S Vᵀ`."""
        return product(self.left * self.values[..., None, :], self.right)


def product(*factors: Array) -> Array:
    """The matrix product, from the left on, at highest precision."""
    return functools.reduce(functools.partial(jnp.matmul, precision="highest"), factors)


def above_rounding(values: Float[Array, " k"], shape: tuple[int, int], errors: Rounded, largest: Scalar = 0.0) -> Array:
    """1 for the singular values (falling) of a matrix of this shape that are above the rounding error, 0 for others.

    Args:
      errors: of the entries. As a matrix, they have singular values up to about a third of the size of one times
        `sqrt(max(in, out))`; those of the decomposition itself are up to about a quarter of `eps |x| sqrt(max(in,
        out))` (measured, matrices of 2 to 32,000 rows or columns).
      largest: the norm of the matrices that this one is a remainder, or the sum, of.
    """
    top = jnp.maximum(values[:1], largest)
    size = top * jnp.linalg.norm(values / jnp.where(top > 0, top, 1))  # whose squares neither overflow nor vanish
    noise = errors.eps * jnp.maximum(size, largest) / min(shape) ** 0.5
    floor = jnp.asarray(errors.floor, values.dtype) * max(shape) ** 0.5
    own = 4 * top * max(shape) ** 0.5 * jnp.finfo(values.dtype).eps
    real = values > jnp.maximum(jnp.maximum(own, floor), noise)
    return jnp.where(real | jnp.isnan(values), 1, 0).astype(values.dtype)  # nan goes through


def svd(x: Float[Array, "in out"], errors: Rounded, largest: Scalar = 0.0) -> Components:
    """The singular value decomposition; the arguments are those of `above_rounding`."""
    u, s, v = lapack.svd(x)
    real = above_rounding(s, x.shape, errors, largest)
    return Components(u * real, s * real, v * real[:, None], real)


def svd_of_sum(x: Matrices, errors: Rounded) -> Components:
    """Of the tasks' matrices added up, in which what cancels leaves the errors of each."""
    errors = errors._replace(floor=errors.floor * len(x) ** 0.5)
    return svd(jnp.sum(x, axis=0), errors, jnp.max(jnp.linalg.norm(x, axis=(1, 2))))


def leading_of_each(x: Matrices, errors: Rounded, count: int) -> Components:
    """The first `count` components of each matrix, one after another (see `lapack`): no more is kept in memory."""
    return jax.lax.map(lambda one: svd(one, errors).leading(count), x)


def orthonormal(x: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """The nearest matrix with orthonormal columns (Procrustes), or rows; of columns that depend on each other, the
    nearest partial isometry, which adds no direction to theirs."""
    parts = svd(x, EXACT)
    return product(parts.left, parts.right)


def joined(parts: Components) -> tuple[Float[Array, "in tk"], Float[Array, "tk out"]]:
    """The left vectors of all matrices side by side, and the right ones one above the other."""
    tasks, size_in, count = parts.left.shape
    return jnp.moveaxis(parts.left, 0, 1).reshape(size_in, tasks * count), parts.right.reshape(
        tasks * count, parts.right.shape[2]
    )


def by_matrix(
    function: Callable[[Matrices, Rounded], Array],
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None,
    *,
    scale: Scalar = 1.0,
    eps: Eps = None,
    unit: bool = True,
    stacked: Stacked,
    check_finite: bool,
) -> Tree:
    """`base + scale * function(the tasks' weighted matrices, errors)` in each matrix, and the mean of them elsewhere.

    Args:
      function: of the matrices in a unit in which their largest entry is 1 to 2, and of the size of their errors
        (`Rounded`) in that unit; returns (in, out) in it.
      unit: False for a function that isn't the same in every unit, and gets the matrices as they are.
      weights: (tasks,), multiply the deltas; default 1.
      eps: see `Eps`; default that of the leaves' types.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    require_paths(eps, base)
    require_number("scale", scale, "a finite number")
    weights = None if weights is None else weigh(weights, len(deltas), 1.0)
    of_layers = layers(base, deltas[0], stacked)

    heaviest = 1.0 if weights is None else jnp.max(jnp.abs(jnp.stack([jnp.asarray(w, float) for w in weights])))

    # once for all leaves of a shape: LAPACK's calls in loops take longer to compile than to run
    @functools.partial(jax.jit, static_argnums=(2, 3))
    def merged(x, floor, eps, of_layers):
        def layer(x):
            x = x if weights is None else along(weights, x) * x
            if x.ndim < 3:
                return jnp.mean(x, axis=0)
            size = unit_of(x) if unit else jnp.ones((), x.dtype)
            errors = Rounded(eps, jnp.asarray(floor, x.dtype) / size)
            return size * function((x / size).reshape(x.shape[0], -1, x.shape[-1]), errors).reshape(x.shape[1:])

        return by_layer(layer, x, of_layers)

    def leaf(name, b, rows, _):
        errors = rounded(rows, name, eps, b)
        made = merged(stack(rows), errors.floor * heaviest, errors.eps, name in of_layers)
        return tree.add(whole(b), made, scale)

    return assembled(base, deltas, leaf, check_finite=check_finite)
