"""Exact products of the Hessian and the generalised Gauss-Newton matrix with vectors, of a batch or a data set."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import Partial

from compo_jax import tree
from compo_jax.curvature.batches import mean, require_deterministic, require_examples, stack
from compo_jax.mesh import replicated

Tree = Any


def _moved(params: Tree, vector: Tree) -> tuple[Tree, Tree]:
    """(the leaves of `params` that `vector` moves, the vector in their dtypes)."""
    tree.require_float(params, "params")
    tree.require_like(vector, params, "the vector")
    moved = jax.tree.map(lambda v, p: None if v is None else p, vector, params, is_leaf=lambda x: x is None)
    return moved, jax.tree.map(lambda p, v: jnp.asarray(v, jnp.result_type(p)), moved, vector)


def hvp(loss: Callable[..., jax.Array], params: Tree, vector: Tree, *args: Any) -> Tree:
    """`H v`, with H the Hessian of `loss(params, *args)` in `params`: exact, forward over reverse (Pearlmutter, 1994).

    Args:
      loss: a scalar, twice differentiable.
      vector: shaped as `params`; None leaves count as zero and cost nothing.

    Returns a tree shaped as `params`. Several vectors at once: `jax.vmap` over `vector` takes the gradient once.
    ValueError, with the paths, where `vector` doesn't fit `params` or a leaf of `params` is no floating-point array.
    """
    moved, tangent = _moved(params, vector)
    require_examples(args)

    def gradient(moved):
        return jax.grad(lambda p: loss(p, *args))(tree.combine(moved, params))

    return jax.jvp(gradient, (moved,), (tangent,))[1]


def ggnvp(
    apply: Callable[[Tree, Any], Tree],
    params: Tree,
    vector: Tree,
    inputs: Any,
    *targets: Any,
    output_loss: Callable[..., jax.Array] | None = None,
) -> Tree:
    """`G v`, with G = `Jᵀ H J` the generalised Gauss-Newton matrix (Schraudolph, 2002): J of `apply`, H of the loss.

    Args:
      apply: `(params, inputs) -> outputs`.
      vector: shaped as `params`; None leaves count as zero.
      output_loss: `(outputs, *targets) -> scalar`, the mean over the batch. Default: the softmax cross-entropy of
        logits `(..., classes)`, which needs no targets, and then G is the Fisher of the mean loss; a class that is not
        there yet may have the logit -inf.

    Returns a tree shaped as `params`; the forward pass is made once, also for several vectors under `jax.vmap`. Errors
    as `hvp`.
    """
    _, tangent = _moved(params, vector)
    require_examples((inputs, targets))
    outputs, push = jax.linearize(lambda p: apply(p, inputs), params)
    everywhere = jax.tree.map(jnp.zeros_like, params)
    change = push(tree.combine(tangent, everywhere))
    if output_loss is None:
        curved = _cross_entropy_product(outputs, change)
    else:
        gradient = jax.grad(lambda z: output_loss(z, *targets))
        curved = jax.jvp(gradient, (outputs,), (change,))[1]
    return jax.linear_transpose(push, params)(curved)[0]


def _cross_entropy_product(logits: jax.Array, change: jax.Array) -> jax.Array:
    """The Hessian of the mean cross-entropy in the logits, `diag(p) - p pᵀ`, times a change of the logits."""
    p = jax.nn.softmax(logits)
    change = jnp.where(p > 0, change, 0)  # a change of -inf is nan, and weighs nothing
    curved = p * change - p * jnp.sum(p * change, axis=-1, keepdims=True)
    return curved / (logits.size / logits.shape[-1])


def hessian(
    loss: Callable[..., jax.Array],
    params: Tree,
    batches: Iterable[tuple],
    *,
    rematerialise: bool = False,
    mesh: Mesh | None = None,
    check: bool = True,
) -> Callable[[Tree], Tree]:
    """`v -> H v` of the mean loss over a data set.

    Batches are scanned over: beside the data and `H v`, only one batch's intermediate values are held. The operator is
    a pytree, so it passes into a jitted function as an argument; jit it, `jax.jit(hessian(...))`, before calling it
    often. `jax.vmap(operator)` multiplies several vectors at once, and linearises each batch once for all of them.

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
    output_loss: Callable[..., jax.Array] | None = None,
    rematerialise: bool = False,
    mesh: Mesh | None = None,
    check: bool = True,
) -> Callable[[Tree], Tree]:
    """`v -> G v` of the mean loss over a data set; batches are `(inputs, *targets)`. See `ggnvp` and `hessian`."""

    def product(apply, params, vector, inputs, *targets):
        return ggnvp(apply, params, vector, inputs, *targets, output_loss=output_loss)

    def value(params, inputs, *targets):
        outputs = apply(params, inputs)
        return outputs if output_loss is None else output_loss(outputs, *targets)

    return _operator(apply, product, value, params, batches, rematerialise, mesh, check)


def _operator(function, product, value, params, batches, rematerialise, mesh, check):
    tree.require_float(params, "params")
    data = stack(batches, mesh)
    if mesh is not None:
        params = jax.device_put(params, replicated(mesh))
    if check:
        require_deterministic(value, params, *data.first)
    function = jax.checkpoint(function) if rematerialise else function

    def multiply(params, data, vector):
        return mean(lambda *batch: product(function, params, vector, *batch), data)

    return Partial(multiply, params, data)
