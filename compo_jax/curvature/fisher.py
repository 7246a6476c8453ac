"""The diagonal of the Fisher information matrix of a model, at the given parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.curvature.pullback import Pulled, Reduction, pull_back
from compo_jax.tree import Tree


class FisherDiagonal(NamedTuple):
    """A sum over images, and their number, kept apart so that means stay right when unequal sums are added.

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


def squares(
    x: Float[Array, "images *stack tokens in"],
    d: Float[Array, "images *stack tokens out"],
    start: Float[Array, "*stack in out"],
) -> Float[Array, "*stack in out"]:
    """`start + sum_n (x_nᵀ d_n)²`, the squares of every image's gradient of a dense layer's weight, summed."""
    stack, (size_in, size_out) = start.shape[:-2], start.shape[-2:]
    x = x.reshape(x.shape[0], -1, x.shape[-2], size_in)
    d = d.reshape(d.shape[0], -1, d.shape[-2], size_out)
    total = start.reshape(-1, size_in, size_out)
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
    diagonal (Porrello et al., 2025). The weights of dense layers are found in `apply` (`layers.tap`), and of theirs the
    gradient of one image and layer is the most that is held at once (on a GPU: of one layer and a chunk).

    Args:
      apply: logits (batch, classes), or (batch, *tokens, classes): an image's loss is then the sum over its tokens, and
        the mean is over images. A class that is not there yet may have the logit -inf. Images are seen one at a time
        (under vmap), and must not depend on each other.
      params: the leaves to differentiate; close over the frozen ones.
      inputs: array or tree of arrays with the batch on axis 0.
      method: `exact`, one column a class and token; `low_rank`, for each image as many columns of the pivoted Cholesky
        factor as leave at most `tolerance` of the trace (a lower bound of the exact diagonal, entry by entry; images
        that need equally many are taken together); `monte_carlo`, one label a token drawn from p by `key`, unbiased;
        `empirical`, the given true `labels`, which is not the Fisher but what many call by its name.
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
                own = jnp.square(rest.astype(sum.dtype))
                return sum + jnp.einsum("n...,n->...", own, pulled.real.astype(sum.dtype))

            return tree.map_with_name(add, total, pulled.rest)

        return Reduction(
            tree.map_with_name(lambda name, sum: layers[name].matrix(sum) if name in layers else sum, zeros),
            column,
            finish=lambda total, _: tree.map_with_name(
                lambda name, sum: layers[name].leaf(sum) if name in layers else sum, total
            ),
        )

    pooled = pull_back(
        apply,
        params,
        inputs,
        squared,
        method=method,
        tolerance=tolerance,
        labels=labels,
        key=key,
        chunk=chunk,
        output_loss=output_loss,
        ignore=ignore,
    )
    return FisherDiagonal(pooled.result, pooled.count, pooled.captured)
