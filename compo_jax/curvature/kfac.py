"""Kronecker factors of the Fisher, which is the Gauss-Newton matrix of the output loss, of dense layers (K-FAC)."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.curvature.fisher import squares
from compo_jax.curvature.layers import Dense
from compo_jax.curvature.protocol import Curvature
from compo_jax.curvature.pullback import Estimator, Pulled, Reduction, pull_back
from compo_jax.curvature.sums import Sum, pooled, require_damping, sum_leaves
from compo_jax.lapack import eigh
from compo_jax.tree import Tree

Layout = tuple[tuple[str, Dense], ...]
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _eigh(x: Float[Array, "*stack n n"]) -> tuple[Float[Array, "*stack n"], Float[Array, "*stack n n"]]:
    """Eigenvalues and eigenvectors, one matrix after another (see `lapack`), in float32 at least: LAPACK has no 16
    bits. NaN where an entry isn't finite."""
    x = x.astype(tree.wide_type(x))
    values, vectors = jax.lax.map(eigh, x.reshape(-1, *x.shape[-2:]))
    return values.reshape(x.shape[:-1]), vectors.reshape(x.shape)


def _upper_gram(x: Float[Array, "*stack rows n"]) -> Float[Array, "*stack n n"]:
    """`xᵀ x`, of which the lower left quarter is zeros: a symmetric matrix needs no more."""
    half = x.shape[-1] // 2
    above = _product("...si,...sj->...ij", x[..., :half], x)
    below = _product("...si,...sj->...ij", x[..., half:], x[..., half:])
    return jnp.concatenate([above, jnp.pad(below, [*[(0, 0)] * (x.ndim - 1), (half, 0)])], axis=-2)


def _mirrored(upper: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
    """The symmetric matrix with this upper triangle."""
    return jnp.triu(upper) + jnp.swapaxes(jnp.triu(upper, 1), -1, -2)


class _Blocks:
    """A symmetric matrix with one block for each dense layer; see `Curvature`."""

    layout: Layout

    def block(self, name: str, v: Float[Array, "*stack in out"]) -> Float[Array, "*stack in out"]:
        raise NotImplementedError

    def _map(self, function: Callable, vector: Tree) -> Tree:
        layers = dict(self.layout)
        missing = sorted(set(tree.names(vector)) - set(layers))
        if missing:
            raise ValueError(f"there are no Kronecker factors for {', '.join(missing)}, only for {', '.join(layers)}")

        def one(name, leaf):
            if leaf is None:
                return None
            layer = layers[name]
            if leaf.shape != (*layer.stack, *layer.shape):
                raise ValueError(
                    f"{name} is {leaf.shape} in the vector and {(*layer.stack, *layer.shape)} in the layer"
                )
            return layer.leaf(function(name, layer.matrix(jnp.asarray(leaf))))

        return tree.map_with_name(one, vector)

    def matvec(self, vector: Tree) -> Tree:
        """The product with a tree shaped as the parameters, None where it is zero."""
        return self._map(self.block, vector)

    __call__ = matvec

    def quadratic(self, vector: Tree, other: Tree | None = None) -> Array:
        """`vᵀ G v`, of a task vector say: `tr(B Δ A Δᵀ)`, the penalty of TAK (2026, arXiv 2602.17385)."""
        return tree.dot(vector, self.matvec(vector if other is None else other))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["basis", "values", "count"], meta_fields=["layout"])
@dataclass(frozen=True)
class Eigen(_Blocks):
    """Blocks that are diagonal in a Kronecker product of two bases.

    Attributes:
      basis: for each layer (U (*stack, in, in), V (*stack, out, out)), eigenvectors in columns.
      values: for each layer (*stack, in, out), the eigenvalue of the matrix `U[:, i] V[:, j]ᵀ`.
      count: images.
    """

    basis: dict[str, tuple[Array, Array]]
    values: dict[str, Array]
    layout: Layout
    count: Array

    def _in_basis(self, name, v, values):
        a, b = self.basis[name]
        rotated = _product("...ki,...kl,...lj->...ij", a, v, b)
        return _product("...ik,...kl,...jl->...ij", a, values * rotated, b)

    def block(self, name, v):
        return self._in_basis(name, v, self.values[name])

    def solve(self, vector: Tree, damping: float | Array) -> Tree:
        """`(G + damping I)⁻¹ v`, exact; the damping is positive, for the factors of few images are singular."""
        require_damping(damping)
        return self._map(lambda name, v: self._in_basis(name, v, 1 / (self.values[name] + damping)), vector)

    def diagonal(self) -> dict[str, Array]:
        """The diagonal of G, for each layer shaped as its weight."""
        return {
            name: layer.leaf(
                _product(
                    "...ik,...kl,...jl->...ij", self.basis[name][0] ** 2, self.values[name], self.basis[name][1] ** 2
                )
            )
            for name, layer in self.layout
        }

    def trace(self) -> Array:
        return sum_leaves(self.values)

    def scale(self, factor: float | Array) -> "Eigen":
        return replace(self, values=tree.weighted_sum([self.values], [factor]))

    def __add__(self, other: Curvature) -> Sum:
        return pooled(self, other)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["inputs", "outputs", "count"], meta_fields=["layout", "tokens"]
)
@dataclass(frozen=True)
class Kronecker(_Blocks):
    """G ≈ A ⊗ B in each layer: the weight's change Δ (in, out) goes to `A Δ B`.

    Attributes:
      inputs: for each layer A (*stack, in, in), the mean Gram matrix of its inputs.
      outputs: for each layer B (*stack, out, out), the mean Gram matrix of the gradients of its outputs.
      count: images.
      layout, tokens: the layers, and how their tokens were seen.
    """

    inputs: dict[str, Array]
    outputs: dict[str, Array]
    count: Array
    layout: Layout
    tokens: str = "expand"

    def block(self, name, v):
        return _product("...ik,...kl,...lj->...ij", self.inputs[name], v, self.outputs[name])

    def eigen(self) -> Eigen:
        """The same matrix in its eigenbasis."""
        a, b = ({name: _eigh(x) for name, x in part.items()} for part in (self.inputs, self.outputs))
        # The factors are Gram matrices: below zero there is but rounding.
        values = {n: jnp.maximum(a[n][0], 0)[..., :, None] * jnp.maximum(b[n][0], 0)[..., None, :] for n in a}
        return Eigen({name: (a[name][1], b[name][1]) for name in a}, values, self.layout, self.count)

    def solve(self, vector: Tree, damping: float | Array) -> Tree:
        """`(A ⊗ B + damping I)⁻¹ v`, exact, by the factors' eigenvectors; solve often with `eigen()`, made once."""
        return self.eigen().solve(vector, damping)

    def diagonal(self) -> dict[str, Array]:
        """The diagonal of G, for each layer shaped as its weight."""

        def outer(a, b):
            return jnp.diagonal(a, axis1=-2, axis2=-1)[..., :, None] * jnp.diagonal(b, axis1=-2, axis2=-1)[..., None, :]

        return {name: layer.leaf(outer(self.inputs[name], self.outputs[name])) for name, layer in self.layout}

    def trace(self) -> Array:
        def traces(x):
            return jnp.trace(x, axis1=-2, axis2=-1, dtype=tree.wide_type(x))

        return sum(jnp.sum(traces(a) * traces(self.outputs[name])) for name, a in self.inputs.items())

    def scale(self, factor: float | Array) -> "Kronecker":
        return replace(self, outputs=tree.weighted_sum([self.outputs], [factor]))

    def __add__(self, other: Curvature) -> Curvature:
        """`merge_kronecker`, where the other has factors, too."""
        return merge_kronecker([self, other]) if isinstance(other, Kronecker) else pooled(self, other)


def kronecker(
    apply: Callable[[Tree, Any], Float[Array, "batch *tokens classes"]],
    params: Tree,
    inputs: Any,
    *,
    tokens: str = "expand",
    method: str = "exact",
    tolerance: float = 1e-3,
    labels: Any = None,
    key: Any = None,
    chunk: int | None = None,
    output_loss: Any = None,
    ignore: int | None = None,
) -> Kronecker:
    """Kronecker factors of the Fisher of the mean loss, for every leaf of `params` (Martens and Grosse, 2015).

    Exact for one dense layer and one image of one token; for more, the mean of a product is taken for the product of
    the means.

    Args:
      params: weights of dense layers (or convolutions), each used once; close over everything else, biases too (of
        which TAK makes one more row of the weight).
      tokens: how a weight is seen that multiplies several tokens of an image (Eschenhagen et al., 2023, arXiv
        2311.00636): `expand`, each token is an example of its own; `reduce`, inputs are averaged over the tokens and
        gradients summed, which is exact where the model averages them itself.

    The other arguments, and their errors: see `fisher_diagonal`. Images that `ignore` leaves out take no part in A
    either. ValueError also where a leaf is not the weight of exactly one dense layer.
    """
    if tokens not in ("expand", "reduce"):
        raise ValueError(f"unknown tokens={tokens!r}; known are expand, reduce")

    def grams(layers):
        _require_dense(layers, params)

        def gram(x, real):  # sum over images and tokens
            x = jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x.astype(dtype), 0)
            return _upper_gram(jnp.moveaxis(x, 0, -3).reshape(*x.shape[1:-2], -1, x.shape[-1]))

        def chunk(sums, inputs, real):
            seen = {n: x if tokens == "expand" else jnp.mean(x, axis=-2, keepdims=True) for n, x in inputs.items()}
            return {n: (a + gram(seen[n], real) / seen[n].shape[-2], b) for n, (a, b) in sums.items()}

        def column(sums, pulled: Pulled):
            back = {
                n: d if tokens == "expand" else jnp.sum(d, axis=-2, keepdims=True) for n, d in pulled.outputs.items()
            }
            return {n: (a, b + gram(back[n], pulled.real)) for n, (a, b) in sums.items()}

        def zero(layer):
            return tuple(jnp.zeros((*layer.stack, size, size), dtype) for size in layer.sizes)

        def finish(sums, count):
            a, b = ({name: _mirrored(pair[i]) / count.astype(dtype) for name, pair in sums.items()} for i in (0, 1))
            return Kronecker(a, b, count, tuple(layers.items()), tokens)

        return Reduction({name: zero(layer) for name, layer in layers.items()}, column, chunk, finish)

    tree.require_float(params, "params")
    dtype = tree.wide_type(*jax.tree.leaves(params))
    estimator = Estimator(method, tolerance, labels, key, chunk, output_loss, ignore)
    return pull_back(apply, params, inputs, grams, estimator).result


def eigenvalue_corrected(
    factors: Kronecker,
    apply: Callable[[Tree, Any], Float[Array, "batch *tokens classes"]],
    params: Tree,
    inputs: Any,
    *,
    method: str = "exact",
    tolerance: float = 1e-3,
    labels: Any = None,
    key: Any = None,
    chunk: int | None = None,
    output_loss: Any = None,
    ignore: int | None = None,
) -> Eigen:
    """The factors' eigenbasis with the images' exact second moments in it (EKFAC; George et al., 2018).

    Of all matrices that are diagonal in that basis it is the nearest to the Fisher's block, and it has its trace.
    Arguments as `kronecker`.
    """
    _require_kronecker([factors])
    params = jax.tree.map(jnp.asarray, params)
    basis, layout = factors.eigen().basis, dict(factors.layout)

    def moments(layers):
        _require_dense(layers, params)
        if set(layers) != set(basis):
            raise ValueError(f"the factors are of {', '.join(basis)}, and params are {', '.join(layers)}")
        for name, layer in layers.items():
            if layer._replace(tokens=0) != layout[name]._replace(tokens=0):
                raise ValueError(f"the factors of {name} are of another layer than params: {layout[name]} and {layer}")

        def column(sums, pulled: Pulled):
            def add(name, sum):
                a, b = basis[name]
                real = pulled.real.reshape(-1, *[1] * (pulled.outputs[name].ndim - 1))
                x = _product("n...si,...ij->n...sj", pulled.inputs[name], a)
                return squares(x, _product("n...si,...ij->n...sj", pulled.outputs[name] * real, b), sum)

            return {name: add(name, sum) for name, sum in sums.items()}

        return Reduction(
            {name: jnp.zeros((*layer.stack, *layer.sizes), basis[name][0].dtype) for name, layer in layers.items()},
            column,
            finish=lambda sums, count: {name: sum / count.astype(sum.dtype) for name, sum in sums.items()},
        )

    estimator = Estimator(method, tolerance, labels, key, chunk, output_loss, ignore)
    pooled_moments = pull_back(apply, params, inputs, moments, estimator)
    return Eigen(basis, pooled_moments.result, factors.layout, pooled_moments.count)


def merge_kronecker(factors: Sequence[Kronecker], weights: Sequence[float] | Array | None = None) -> Kronecker:
    """One pair of factors for several tasks' data: `(Σ_t (n_t / N) A_t) ⊗ (Σ_t w_t B_t)` (TAK, 2026, arXiv 2602.17385).

    Args:
      weights: w, one a task; default n_t / N, for the mean loss over all images. TAK itself sums the tasks: ones.

    Exact where the tasks' inputs have the same Gram matrix. ValueError where they are of different layers.
    """
    factors = list(factors)
    if not factors:
        raise ValueError("no Kronecker factors were given to merge")
    _require_kronecker(factors)
    if any((_same(other), other.tokens) != (_same(factors[0]), factors[0].tokens) for other in factors):
        raise ValueError("Kronecker factors of different layers, or whose tokens were seen differently, don't merge")
    if weights is not None and len(weights) != len(factors):
        raise ValueError(f"{len(factors)} tasks' factors were given {len(weights)} weights")
    signless = weights is None or not tree.concrete(weights) or all(np.isfinite(w) and w >= 0 for w in weights)
    if not signless:
        raise ValueError(f"the tasks' weights must be finite and not negative, as curvature is, not {weights}")
    count = sum(f.count for f in factors)
    if tree.concrete(count) and not count > 0:
        raise ValueError("Kronecker factors of no images don't merge: there is nothing to share between the tasks")
    share = [f.count / count for f in factors]
    inputs = tree.weighted_sum([f.inputs for f in factors], share)
    outputs = tree.weighted_sum([f.outputs for f in factors], share if weights is None else weights)
    return Kronecker(inputs, outputs, count, factors[0].layout, factors[0].tokens)


def _same(factors: Kronecker) -> tuple:
    """The layers, however many tokens an image of these data had: the factors are means over them."""
    return tuple((name, layer._replace(tokens=0)) for name, layer in factors.layout)


def _require_kronecker(factors: Sequence) -> None:
    for t, one in enumerate(factors):
        if not isinstance(one, Kronecker):
            raise TypeError(f"factors {t} are {type(one)}, and Kronecker factors are made by curvature.kronecker")


def _require_dense(layers: dict[str, Dense], params: Tree) -> None:
    others = [name for name in tree.names(params) if name not in layers]
    if others:
        raise ValueError(
            f"Kronecker factors are of the weights of dense layers that are used once, which these are not: "
            f"{', '.join(others)}. Keep only such weights in params (tree.partition) and close over the rest"
        )
