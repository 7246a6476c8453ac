"""Columns V with `V Vᵀ = H`, the Hessian of the output loss, for each image: exactly, nearly, or in expectation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from compo_jax.curvature.output_loss import OutputLoss, predictions, scores, weights_of

METHODS = ("exact", "low_rank", "monte_carlo", "empirical")


class Columns(NamedTuple):
    """Columns of V for each image.

    Attributes:
      count: number of columns.
      column: `k -> like the outputs`, the k-th column of every image's V; nan where an image's outputs are.
      captured: (images,), the fraction of the trace of H that they have; nan where they are drawn.
    """

    count: int | Int[Array, ""]
    column: Callable[[Int[Array, ""]], Float[Array, "images ..."]]
    captured: Float[Array, " images"]


def ranks(
    loss: OutputLoss, z: Float[Array, "images tokens outputs"], part: Bool[Array, "images tokens"], tolerance: float
) -> tuple[Int[Array, "images tokens"], Float[Array, "images tokens"], Float[Array, "images tokens"]]:
    """(columns of the pivoted Cholesky factor that leave at most `tolerance` of the trace, what is left, the trace)."""

    def one(z, part):
        left = loss.pivoted(z).left
        needed = jnp.where(part, jnp.argmax(left[1:] <= tolerance * left[0]) + 1, 0)
        return needed, left[needed], left[0]

    return jax.vmap(jax.vmap(one))(z, part)


def columns(
    loss: OutputLoss,
    outputs: Float[Array, "images ..."],
    real: Bool[Array, " images"],
    part: Bool[Array, "images tokens"],
    method: str,
    tolerance: float,
    targets: Array | None,
    keys: Key[Array, " images"] | None,
) -> Columns:
    """The factor by one of `METHODS`, zero for predictions that don't take part.

    A column of `exact` and `low_rank` is of one prediction and zero in the others; with `low_rank`, columns beyond
    those that an image needs are zero.
    """
    z = predictions(outputs)
    _, tokens, size = z.shape
    first = jax.vmap(jax.vmap(lambda z: loss.column(z, 0)))(z)
    finite = jnp.where(jnp.isnan(z + first).any(axis=(1, 2)), jnp.nan, 1).astype(z.dtype)  # 1, or nan as the outputs
    drawn = jnp.full_like(finite, jnp.nan)
    scale = finite[:, None, None] * part[..., None]

    def shaped(v):
        return v.reshape(outputs.shape).astype(outputs.dtype)

    if method == "empirical":
        v = shaped(scale * scores(loss, z, targets))
        return Columns(1, lambda k: v, drawn)
    scale = scale * jnp.sqrt(weights_of(loss, z, targets))
    if method == "monte_carlo":
        v = shaped(scale * jax.vmap(loss.draw)(keys, z))
        return Columns(1, lambda k: v, drawn)
    if method == "exact":
        needed = jnp.full(z.shape[:2], size)
        count, one, captured = tokens * size, loss.column, finite
    else:
        needed, left, trace = ranks(loss, z, part, tolerance)
        count = jnp.max(jnp.where(real, needed.sum(axis=1), 0))
        one = lambda z, k: loss.pivoted(z).column(k)
        weights = weights_of(loss, z, targets)[..., 0] * part
        whole = jnp.sum(weights * trace, axis=1)
        missed = jnp.sum(weights * left, axis=1) / jnp.where(whole > 0, whole, 1)
        captured = finite * jnp.where(whole > 0, 1 - missed, 1)

    def column(k):
        ends = jnp.cumsum(needed, axis=1)
        token = jnp.sum(k >= ends, axis=1)  # whose column the k-th is; beyond the last where there are no more

        def of_image(z, scale, token, before):
            at = jnp.minimum(token, tokens - 1)
            v = jnp.where(token < tokens, scale[at] * one(z[at], k - before[at]), 0)
            return jnp.zeros_like(z).at[at].set(v)

        return shaped(finite[:, None, None] * jax.vmap(of_image)(z, scale, token, ends - needed))

    return Columns(count, column, captured)
