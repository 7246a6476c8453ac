"""Exact products of the Hessian and the generalised Gauss-Newton matrix with vectors, of a batch or a data set."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jaxtyping import Array

from compo_jax import tree
from compo_jax.curvature.batches import (
    Batches,
    count,
    mean,
    require_deterministic,
    require_examples,
    require_scalar,
    stack,
)
from compo_jax.curvature.forward import derivative, linearise
from compo_jax.curvature.output_loss import (
    OutputLoss,
    predictions,
    require_output_loss,
    require_outputs,
    require_targets,
    weights_of,
)
from compo_jax.curvature.protocol import Curvature
from compo_jax.curvature.sums import Sum, pooled, sum_leaves
from compo_jax.mesh import replicated
from compo_jax.tree import Tree


def _moved(params: Tree, vector: Tree, stacked: bool) -> tuple[Tree, Tree]:
    """(the leaves of `params` that `vector` moves, the vector, or the vectors `stacked`, in their dtypes)."""
    tree.require_float(params, "params")
    if stacked:
        counts = {np.shape(x)[:1] for x in jax.tree.leaves(vector)}
        if len(counts) != 1 or counts & {(), (0,)}:
            raise ValueError(
                "stacked vectors share the length of axis 0, one or more, on which they are stacked; their leaves' "
                f"shapes are {[np.shape(x) for x in jax.tree.leaves(vector)]}"
            )
        tree.require_like(jax.tree.map(lambda x: x[0], vector), params, "each of the vectors")
    else:
        tree.require_like(vector, params, "the vector")
    moved = jax.tree.map(lambda v, p: None if v is None else p, vector, params, is_leaf=lambda x: x is None)
    return moved, jax.tree.map(lambda p, v: jnp.asarray(v, jnp.result_type(p)), moved, vector)


def hvp(loss: Callable[..., jax.Array], params: Tree, vector: Tree, *args: Any, stacked: bool = False) -> Tree:
    """`H v`, with H the Hessian of `loss(params, *args)` in `params`: exact, forward over reverse (Pearlmutter, 1994).

    Args:
      loss: a scalar, twice differentiable, by custom derivatives (`jax.custom_vjp`), too.
      vector: shaped as `params`; None leaves count as zero and cost nothing.
      stacked: `vector` is several vectors, stacked on axis 0. The gradient is linearised once, and they are multiplied
        one after another: two gradients' FLOPs each, where alone it is 8/3, with the intermediate values of one.
        `jax.vmap` over `vector` multiplies them side by side, with the intermediate values of all: for networks so
        small that they don't fill a GPU.

    Returns a tree shaped as `vector`'s, without None. ValueError, with the paths, where `vector` doesn't fit `params`
    or a leaf of `params` is no floating-point array.
    """
    moved, tangent = _moved(params, vector, stacked)
    require_examples(args)

    def gradient(moved):
        return jax.grad(lambda p: require_scalar(loss(p, *args)))(tree.combine(moved, params))

    if stacked:
        return jax.lax.map(linearise(gradient, moved).push, tangent)
    return derivative(gradient, moved, tangent)


def ggnvp(
    apply: Callable[[Tree, Any], Tree],
    params: Tree,
    vector: Tree,
    inputs: Any,
    *targets: Any,
    output_loss: OutputLoss | Callable[..., jax.Array] | None = None,
    ignore: int | None = None,
    stacked: bool = False,
) -> Tree:
    """`G v`, with G = `Jᵀ H J` the generalised Gauss-Newton matrix (Schraudolph, 2002): J of `apply`, H of the loss.

    Args:
      apply: `(params, inputs) -> outputs`.
      vector: shaped as `params`; None leaves count as zero.
      output_loss: `(outputs, *targets) -> scalar`, the mean over the batch, or `softmax_loss(weights, smoothing)`,
        `bernoulli_loss()`, `squared_loss()` or another `OutputLoss`, of which a target is needed only where it weighs
        classes, and then G is the Fisher of the mean loss. Default: softmax, of logits `(batch, *tokens, classes)`; an
        image's loss is the sum over its tokens, and the mean is over images. A class that is not there yet may have the
        logit -inf.
      ignore: a label that stands for none, such as -100: such tokens take no part, nor do images that have no others,
        and the mean is over the rest. The target is then needed.
      stacked: `vector` is several vectors, stacked on axis 0, multiplied one after another (see `hvp`).

    Returns a tree as `hvp` does; the forward pass is made once, also for several vectors. Errors as `hvp`, and, where
    the loss is a softmax, for logits of one class or without an axis of classes.
    """
    _, tangent = _moved(params, vector, stacked)
    require_examples((inputs, targets))
    named = not callable(output_loss)
    loss = require_output_loss(output_loss) if named else None
    if named:
        _needed(loss, jax.eval_shape(apply, params, inputs), targets, ignore)
    elif ignore is not None:
        raise ValueError(
            f"ignore={ignore} is for softmax_loss(): a function of yours leaves out by itself what it will"
        )
    else:
        tree.require_float(jax.eval_shape(apply, params, inputs), "what the model returns for a loss of yours")
    outputs, push, pull = linearise(lambda p: apply(p, inputs), params)
    everywhere = jax.tree.map(jnp.zeros_like, params)

    def product(tangent):
        change = push(tree.combine(tangent, everywhere))
        if named:
            return pull(_hessian_product(loss, outputs, change, targets, ignore))
        gradient = jax.grad(lambda z: require_scalar(output_loss(z, *targets)))
        return pull(derivative(gradient, outputs, change))

    return jax.lax.map(product, tangent) if stacked else product(tangent)


def _needed(loss: OutputLoss, outputs: Any, targets: tuple, ignore: int | None) -> tuple[Array | None, Array | None]:
    """(the targets as the loss takes them, None where its Hessian needs none; which predictions take part, None for
    all)."""
    require_outputs(loss, outputs)
    if loss.weight is None and ignore is None:
        return None, None
    if not targets:
        why = "the loss weighs examples by their classes" if ignore is None else f"ignore={ignore} is one of the labels"
        raise ValueError(f"{why}: give labels after the inputs")
    labels, part = require_targets(loss, targets[0], outputs.shape, ignore)
    return labels, None if ignore is None else part


def _images(part: Array) -> Array:
    """How many images (axis 0) take part."""
    return jnp.sum(part.any(axis=1))


def _hessian_product(loss: OutputLoss, outputs: Array, change: Array, targets: tuple, ignore: int | None) -> Array:
    """The Hessian in the outputs, of the sum over an image's predictions and the mean over images, times a change."""
    z = predictions(outputs)
    targets, part = _needed(loss, outputs, targets, ignore)
    weights, images = weights_of(loss, z, targets), z.shape[0]
    if part is not None:
        weights, images = weights * part[..., None], jnp.maximum(_images(part), 1)
    curved = weights * loss.product(z, change.astype(z.dtype).reshape(z.shape)) / images
    return curved.astype(outputs.dtype).reshape(outputs.shape)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "data"], meta_fields=["product", "examples"]
)
@dataclass(frozen=True, eq=False)
class Operator:
    """The exact curvature of a mean loss over a data set, as a product with vectors; see `Curvature`.

    Batches are scanned over: beside the data and the product, only one batch's intermediate values are held. The
    operator is a pytree, so it passes into a jitted function as an argument; jit it, `jax.jit(hessian(...))`, before
    calling it often.

    Attributes:
      product: `(params, vector, *batch, stacked=...) -> tree`, of the mean loss over a batch.
      params, data: where it is taken, and of what.
      examples: `batch ->` how many of its examples take part; None for all.
    """

    product: Callable[..., Tree]
    params: Tree
    data: Batches
    examples: Callable[..., Array] | None = None

    @property
    def count(self) -> Any:
        return count(self.data, self.examples)

    def matvec(self, vector: Tree, stacked: bool = False) -> Tree:
        """`G v`, or of several vectors `stacked` on axis 0: each batch is linearised once for all (see `hvp`)."""
        return mean(lambda *batch: self.product(self.params, vector, *batch, stacked=stacked), self.data, self.examples)

    __call__ = matvec

    def quadratic(self, vector: Tree, other: Tree | None = None) -> Array:
        return tree.dot(vector, self.matvec(vector if other is None else other))

    def diagonal(self) -> Tree:
        """Exact, at the cost of one product for each parameter. Of large models take `fisher_diagonal`, which is that
        of `ggn`, or the estimate `curvature.diagonal`."""
        zeros, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, self.params))

        def entry(i):
            return ravel_pytree(self.matvec(unravel(zeros.at[i].set(1))))[0][i]

        return unravel(jax.lax.map(entry, jnp.arange(zeros.size)))

    def trace(self) -> Array:
        """As `diagonal`; of large models take the estimate `curvature.trace`."""
        return sum_leaves(self.diagonal())

    def scale(self, factor: float | Array) -> Sum:
        return Sum((self,), (factor,), self.count)

    def __add__(self, other: Curvature) -> Sum:
        return pooled(self, other)


def hessian(
    loss: Callable[..., jax.Array],
    params: Tree,
    batches: Iterable[tuple],
    *,
    rematerialise: bool = False,
    mesh: Mesh | None = None,
    check: bool = True,
) -> Operator:
    """The Hessian of the mean loss over a data set, as an `Operator`: `hessian(...)(v)` is `H v`.

    The exact second derivative, with its negative directions: for forecasts, sharpness and spectra. For solves and
    penalties take `ggn`, which is positive and the same where the model fits its labels.

    Args:
      loss: `(params, *batch) -> scalar`, the mean over the batch.
      batches: tuples of what follows the parameters, examples on axis 0; the sizes may differ.
      rematerialise: intermediate values are computed again in the backward pass, to hold fewer (`jax.checkpoint`).
      mesh: batches are split over its devices (`compo_jax.mesh.data_mesh`), and the parameters replicated.
      check: refuse, with a ValueError, a loss with two values at one point; costs two passes over the first batch.
    """
    return _operator(loss, hvp, loss, params, batches, rematerialise, mesh, check)


def ggn(
    apply: Callable[[Tree, Any], Tree],
    params: Tree,
    batches: Iterable[tuple],
    *,
    output_loss: OutputLoss | Callable[..., jax.Array] | None = None,
    ignore: int | None = None,
    rematerialise: bool = False,
    mesh: Mesh | None = None,
    check: bool = True,
) -> Operator:
    """The Gauss-Newton matrix of the mean loss over a data set, as an `Operator`; batches are `(inputs, *targets)`.

    Positive, and with a softmax the Fisher. The other arguments: see `ggnvp` and `hessian`.
    """
    options = {"output_loss": output_loss, "ignore": ignore}

    def product(apply, params, vector, inputs, *targets, stacked):
        return ggnvp(apply, params, vector, inputs, *targets, **options, stacked=stacked)

    def examples(inputs, labels, *_):
        return _images((labels != ignore).reshape(labels.shape[0], -1))

    def value(params, inputs, *targets):
        outputs = apply(params, inputs)
        return output_loss(outputs, *targets) if callable(output_loss) else outputs

    operator = _operator(apply, product, value, params, batches, rematerialise, mesh, check)
    return operator if ignore is None else replace(operator, examples=examples)


def _operator(function, product, value, params, batches, rematerialise, mesh, check):
    tree.require_float(params, "params")
    data = stack(batches, mesh)
    if mesh is not None:
        params = jax.device_put(params, replicated(mesh))
    if check:
        require_deterministic(value, params, *data.first)
    function = jax.checkpoint(function) if rematerialise else function
    return Operator(functools.partial(product, function), params, data)
