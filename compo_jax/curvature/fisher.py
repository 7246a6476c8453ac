"""The diagonal of the Fisher information matrix of a model, at its parameters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.curvature.protocol import Curvature
from compo_jax.curvature.pullback import Estimator, Pulled, Reduction, pull_back
from compo_jax.curvature.sums import pooled, require_damping, sum_leaves
from compo_jax.tree import Tree


class FisherDiagonal(NamedTuple):
    """Curvature that is a diagonal: a sum over images, and their number, kept apart so that means stay right when
    unequal sums are added. See `Curvature`.

    Attributes:
      total: shaped as the parameters, `sum_n sum_c p_c(x_n) (d log p_c(x_n) / d params)^2`.
      count: number of images that took part.
      captured: fraction of the trace of the output loss's Hessian, `diag(p) - p pᵀ`, that was pulled back, smallest
        over the images: the certificate of `low_rank`; 1 for `exact`, and nan for the estimates by labels, which have
        none.
    """

    total: Tree
    count: Array
    captured: Array

    @property
    def mean(self) -> Tree:
        """`total / count`: the diagonal of the Fisher of the mean loss. ValueError where no image was counted."""
        if tree.concrete(self.count) and not np.asarray(self.count) > 0:
            raise ValueError(f"the mean of a Fisher over {self.count} images was asked for: add some images' first")

        def one(x):
            wide = tree.wide_type(x)
            return (x.astype(wide) / jnp.asarray(self.count, wide)).astype(x.dtype)

        return jax.tree.map(one, self.total)

    def diagonal(self) -> Tree:
        return self.mean

    def matvec(self, vector: Tree) -> Tree:
        """`mean * vector`, zero where there is no diagonal; see `Curvature`."""
        return self._entrywise(lambda f, x: f * x, vector)

    __call__ = matvec

    def quadratic(self, vector: Tree, other: Tree | None = None) -> Array:
        def one(f, x, y):
            wide = tree.wide_type(f, x, y)
            return jnp.sum(jnp.asarray(f, wide) * jnp.asarray(x, wide) * jnp.asarray(y, wide))

        products = jax.tree.map(one, *tree.hollowed(self.mean, vector, vector if other is None else other))
        return sum(jax.tree.leaves(products), start=jnp.zeros(()))

    def trace(self) -> Array:
        return sum_leaves(self.mean)

    def solve(self, vector: Tree, damping: float | Array) -> Tree:
        """`vector / (mean + damping)`; see `Solvable`."""
        require_damping(damping)
        return self._entrywise(lambda f, x: x / (f + damping), vector)

    def _entrywise(self, function: Callable, vector: Tree) -> Tree:
        def one(x, f):
            if x is None:
                return None
            wide = tree.wide_type(x) if f is None else tree.wide_type(x, f)
            return function(jnp.asarray(0 if f is None else f, wide), jnp.asarray(x, wide)).astype(jnp.result_type(x))

        return jax.tree.map(one, vector, self.mean, is_leaf=lambda x: x is None)

    def scale(self, factor: float | Array) -> "FisherDiagonal":
        return self._replace(total=tree.weighted_sum([self.total], [factor]))

    def __add__(self, other: Curvature) -> Curvature:
        if not isinstance(other, FisherDiagonal):
            return pooled(self, other)
        worst = jnp.minimum(self.captured, other.captured)
        worst = jnp.where(self.count == 0, other.captured, jnp.where(other.count == 0, self.captured, worst))
        return FisherDiagonal(jax.tree.map(jnp.add, self.total, other.total), self.count + other.count, worst)


def as_curvature(curvature: Curvature | Tree) -> Curvature:
    """Curvature as it is; a tree shaped as the parameters, with None holes, as the diagonal that it is."""
    return curvature if isinstance(curvature, Curvature) else FisherDiagonal(curvature, 1, jnp.nan)


def summed_diagonal(curvature: Curvature | Tree) -> tuple[Tree, Any]:
    """(the diagonal as a sum, what it is divided by): for rules that divide entry by entry, without a copy of it."""
    if isinstance(curvature, FisherDiagonal):
        _ = curvature._replace(total={}).mean  # which looks at the number of images
        return curvature.total, curvature.count
    return (curvature.diagonal() if isinstance(curvature, Curvature) else curvature), 1.0


def squares(
    x: Float[Array, "images *stack tokens in"],
    d: Float[Array, "images *stack tokens out"],
    start: Float[Array, "*stack in out"],
) -> Float[Array, "*stack in out"]:
    """`start + sum_n (x_nᵀ d_n)²`, the squares of every image's gradient of a dense layer's weight, summed."""
    stack, (size_in, size_out) = start.shape[:-2], start.shape[-2:]
    depth = math.prod(stack)  # and not -1, which says nothing of an empty weight
    x = x.reshape(x.shape[0], depth, x.shape[-2], size_in)
    d = d.reshape(d.shape[0], depth, d.shape[-2], size_out)
    total = start.reshape(depth, size_in, size_out)
    exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": start.dtype}

    def gradient(x, d):
        return jnp.einsum("...lsi,...lso->...lio", x, d, **exact)

    def one_by_one(total, x, d):  # a gradient never leaves the cache: 10 times faster than writing them all
        return jax.lax.scan(lambda sum, xd: (sum + jnp.square(gradient(*xd)), None), total, (x, d))[0]

    def at_once(total, x, d):
        return total + jnp.sum(jnp.square(gradient(x, d)), axis=0)

    if x.shape[2] == 1:
        x, d = x.astype(start.dtype), d.astype(start.dtype)
        total = total + jnp.einsum("nlsi,nlso->lio", jnp.square(x), jnp.square(d), **exact)
    else:
        total = jax.lax.platform_dependent(total, x, d, cpu=one_by_one, default=at_once)
    return total.reshape(*stack, size_in, size_out)


def fisher_diagonal(
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
) -> FisherDiagonal:
    """Diagonal of the Fisher of `softmax(apply(params, inputs))`, from the square of each image's own gradient.

    Pulling the columns of any V with `V Vᵀ = diag(p) - p pᵀ` back to the parameters, squaring and summing gives the
    diagonal (Porrello et al., 2025). `layers.tap` looks for the weights of dense layers in `apply`, and of theirs the
    gradient of one image and layer is the most that is held at once (on a GPU: of one layer and a chunk).

    Args:
      apply: logits (batch, classes), or (batch, *tokens, classes): an image's loss is then the sum over its tokens, and
        the mean is over images. A class that is not there yet may have the logit -inf. Images are seen one at a time
        (under vmap), and must not depend on each other.
      params: the leaves to differentiate; close over the frozen ones.
      inputs: array or tree of arrays with the batch on axis 0.
      method: `exact`, one column a class and token: for up to some tens of classes, and as a reference; `low_rank`, for
        each image as many columns of the pivoted Cholesky factor as leave at most `tolerance` of the trace (a lower
        bound of the exact diagonal, entry by entry; images that need equally many are taken together): for many
        classes, and says by `captured` what it left out; `monte_carlo`, one label a token drawn from p by `key`,
        unbiased: the price of one gradient an image, for many images and penalties, which don't mind the noise;
        `empirical`, the true `labels`, which is not the Fisher but what many call by its name.
      labels: integers (batch, *tokens), for a loss of numbers floats shaped as what `apply` returns; needed by
        `empirical`, and by every method where the loss weighs classes.
      key: one random key, `jax.random.key(0)`.
      chunk: images linearised at once; default: as many as hold about 2^26 numbers between the layers, on a CPU 2^23,
        which its cache is nearer to.
      output_loss: `softmax_loss(weights, smoothing)`, `bernoulli_loss()`, `squared_loss()` or another `OutputLoss`, of
        which this is the Gauss-Newton diagonal; default: softmax.
      ignore: a label that stands for none, such as -100: such tokens take no part, by any method, nor do images that
        have no others, which aren't counted either.

    Returns sums, see `FisherDiagonal`. Differentiates nothing itself and is not jitted. ValueError on an unknown
    method, a missing key or missing labels, an empty batch, a leaf that is no floating-point array, logits of one class
    or without an axis of classes, and, where values aren't traced, on labels out of range (traced ones make the total
    nan) and on images that depend on each other. Logits that are nan make the total nan, by every method.
    """
    params = jax.tree.map(jnp.asarray, params)

    def squared(layers):
        # A sum in a 16-bit dtype stops growing after some hundred terms.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, tree.wide_type(x)), params)

        def column(total, pulled: Pulled):
            def add(name, sum, rest):
                if name in layers:
                    real = pulled.real.reshape(-1, *[1] * (pulled.outputs[name].ndim - 1))
                    return squares(pulled.inputs[name], jnp.where(real, pulled.outputs[name], 0), sum)
                if rest is None:
                    return None
                squared_rest = jnp.square(rest.astype(sum.dtype))
                return sum + jnp.einsum("n...,n->...", squared_rest, pulled.real.astype(sum.dtype))

            return tree.map_with_name(add, total, pulled.rest)

        return Reduction(
            tree.map_with_name(lambda name, sum: layers[name].matrix(sum) if name in layers else sum, zeros),
            column,
            finish=lambda total, _: tree.map_with_name(
                lambda name, sum: layers[name].leaf(sum) if name in layers else sum, total
            ),
        )

    estimator = Estimator(method, tolerance, labels, key, chunk, output_loss, ignore)
    return FisherDiagonal(*pull_back(apply, params, inputs, squared, estimator))
