"""The loss of any one model, forecast from two derivatives of the loss along the way to it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.curvature.batches import mean, require_scalar
from compo_jax.curvature.forward import derivative
from compo_jax.curvature.taylor import batches_of
from compo_jax.mesh import replicated
from compo_jax.tree import Tree


class Forecast(NamedTuple):
    """The loss of a model, forecast and true.

    Attributes:
      forecast: the second-order Taylor expansion around the anchor.
      loss: the true one, of the same batches.
    """

    forecast: Float[Array, ""]
    loss: Float[Array, ""]


def forecast(
    loss: Callable[..., jax.Array],
    anchor: Tree,
    params: Tree,
    *args: Any,
    batches: Iterable[tuple] | None = None,
    mesh: Mesh | None = None,
) -> Forecast:
    """The loss at `params` to second order around `anchor`: `l + g·d + ½ dᵀHd` with d = params - anchor.

    For one model, wherever it comes from: a merge rule, a training. Only the loss along the line is derived, twice
    forward, at the cost of about four passes and without a gradient in memory. Of all weightings of T modules at once:
    `landscape`. For many models compile it once, `jax.jit(partial(forecast, loss))`.

    Args:
      loss: `(params, *batch) -> scalar`, the mean over the batch.
      params: shaped as `anchor`, None where it is the anchor's.
      args: the one batch, or with `batches` nothing.
      batches: tuples of what follows the parameters; scanned over, the sizes may differ.
      mesh: as for `hessian`.

    ValueError where `params` doesn't fit the anchor (with the path), for a loss of more than one number.
    """
    tree.require_like(params, anchor, "params")
    tree.require_float(anchor, "anchor")
    data = batches_of(args, batches, mesh)
    anchor, params = jax.tree.map(jnp.asarray, (anchor, tree.combine(tree.spread(params, anchor), anchor)))
    if mesh is not None:
        anchor, params = jax.device_put((anchor, params), replicated(mesh))
    one = jnp.ones((), tree.wide_type(*jax.tree.leaves(anchor)))
    zero = jnp.zeros_like(one)

    def measure(*batch):
        def along(s):
            moved = jax.tree.map(lambda a, p: (a + s * (p - a.astype(s.dtype))).astype(a.dtype), anchor, params)
            return require_scalar(loss(moved, *batch)).astype(s.dtype)

        slope = derivative(along, zero, one)
        bend = derivative(lambda s: derivative(along, s, one), zero, one)
        return Forecast(along(zero) + slope + bend / 2, along(one))

    return mean(measure, data)
