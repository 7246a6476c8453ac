"""Factors of `diag(p) - p pᵀ`, the curvature of the cross-entropy in the logits, given column by column."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

METHODS = ("exact", "low_rank", "monte_carlo", "empirical")


class Columns(NamedTuple):
    """Columns of V for each image, with `V Vᵀ = diag(p) - p pᵀ` exactly, nearly, or in expectation.

    Attributes:
      count: number of columns.
      column: `k -> (images, classes)`, the k-th column of every image's V; nan where an image's logits are.
      captured: (images,), the fraction of the trace of `diag(p) - p pᵀ` that they have; nan where they are drawn.
    """

    count: int | Int[Array, ""]
    column: Callable[[Int[Array, ""]], Float[Array, "images classes"]]
    captured: Float[Array, " images"]


def score(p: Float[Array, " classes"], label: Int[Array, ""]) -> Float[Array, " classes"]:
    """The gradient of `log p_label` with respect to the logits."""
    return jax.nn.one_hot(label, p.shape[0], dtype=p.dtype) - p


def cholesky(p: Float[Array, " classes"]) -> tuple[Callable, Float[Array, " classes"]]:
    """Pivoted Cholesky of `diag(p) - p pᵀ` in closed form: (k -> column k, trace left after k+1 columns).

    After the classes S are taken, with the mass r = 1 - sum_S p left, the Schur complement of the others is
    `diag(p) - p pᵀ / r`, whose largest diagonal entry belongs to the largest p: the pivots are the classes in falling
    order of p, and no column needs the ones before it.
    """
    order = jnp.argsort(-p)
    q = p[order]
    # Summed from the small end: 1 - cumsum would lose the digits of a small remainder.
    rest = jnp.cumsum(q[::-1])[::-1]  # mass of this class and those after it
    after = jnp.append(rest[1:], 0.0)
    squares = jnp.append(jnp.cumsum((q * q)[::-1])[::-1][1:], 0.0)
    left = jnp.where(after > 0, after - squares / jnp.where(after > 0, after, 1), 0)

    def column(k):
        pivot, mass, remaining = q[k], rest[k], after[k]
        diagonal = jnp.where(mass > 0, pivot * remaining / jnp.where(mass > 0, mass, 1), 0)
        root = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
        others = jnp.where(jnp.arange(q.shape[0]) > k, -q * pivot / jnp.where(mass > 0, mass, 1) / root, 0)
        sorted_column = jnp.where(diagonal > 0, others.at[k].set(root), 0)
        return jnp.zeros_like(p).at[order].set(sorted_column)

    return column, jnp.maximum(left, 0)


def _probabilities(logits: Float[Array, "*images classes"]) -> Float[Array, "*images classes"]:
    return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def rank(logits: Float[Array, " classes"], tolerance: float) -> Int[Array, ""]:
    """Columns of the pivoted Cholesky factor that leave at most `tolerance` of the trace."""
    p = _probabilities(logits)
    return jnp.argmax(cholesky(p)[1] <= tolerance * (1 - jnp.sum(p**2))) + 1


def columns(
    logits: Float[Array, "images classes"],
    real: Bool[Array, " images"],
    method: str,
    tolerance: float,
    labels: Int[Array, " images"] | None,
    keys: Key[Array, " images"] | None,
) -> Columns:
    """The factor by one of `METHODS`; with `low_rank`, columns beyond those that an image needs are zero."""
    p = _probabilities(logits)
    known = jnp.where(jnp.isnan(p).any(axis=1), jnp.nan, 1)  # 1, or nan where the logits have one
    if method == "exact":

        def column(c):
            return jnp.sqrt(p[:, c, None]) * jax.vmap(score, (0, None))(p, c)

        return Columns(p.shape[1], lambda c: column(c).astype(logits.dtype), known)
    if method == "low_rank":
        needed = jax.vmap(rank, (0, None))(logits, tolerance)
        left = jax.vmap(lambda q, k: cholesky(q)[1][k - 1])(p, needed)
        trace = 1 - jnp.sum(p**2, axis=1)
        captured = jnp.where(trace > 0, 1 - left / jnp.where(trace > 0, trace, 1), 1)

        def column(k):
            return known[:, None] * jnp.where(k < needed[:, None], jax.vmap(lambda q: cholesky(q)[0](k))(p), 0)

        count = jnp.max(jnp.where(real, needed, 0))
        return Columns(count, lambda k: column(k).astype(logits.dtype), known * captured)
    if method == "monte_carlo":
        labels = jax.vmap(jax.random.categorical)(keys, logits)
    return Columns(1, lambda k: jax.vmap(score)(p, labels).astype(logits.dtype), jnp.full(p.shape[0], jnp.nan))
