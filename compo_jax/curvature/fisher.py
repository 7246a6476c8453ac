"""The diagonal of the Fisher information matrix of a softmax classifier, at the given parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from compo_jax import tree

Tree = Any


class FisherDiagonal(NamedTuple):
    """A sum over images, and their number, kept apart so that means stay right when unequal sums are added.

    Attributes:
      total: shaped as the parameters, `sum_n sum_c p_c(x_n) (d log p_c(x_n) / d params)^2`.
      count: number of images.
      captured: fraction of the trace of `diag(p) - p pᵀ` that was pulled back, smallest over the images: the
        certificate of `low_rank`; 1 for `exact`, and nan for the estimates by labels, which have none.
    """

    total: Tree
    count: Array
    captured: Array

    @property
    def mean(self) -> Tree:
        """`total / count`: the diagonal of the Fisher of the mean loss."""
        return jax.tree.map(lambda x: x / self.count.astype(x.dtype), self.total)


def _one_column(p: Float[Array, " classes"], label: Int[Array, ""]) -> Float[Array, " classes"]:
    """The gradient of `log p_label` with respect to the logits."""
    return jax.nn.one_hot(label, p.shape[0], dtype=p.dtype) - p


def _cholesky(p: Float[Array, " classes"]) -> tuple[Callable, Float[Array, " classes"]]:
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


def fisher_diagonal(
    apply: Callable[[Tree, Any], Float[Array, "batch classes"]],
    params: Tree,
    inputs: Any,
    *,
    method: str = "exact",
    tolerance: float = 1e-3,
    labels: Int[Array, " batch"] | None = None,
    key: Key[Array, ""] | None = None,
    chunk: int | None = None,
) -> FisherDiagonal:
    """Diagonal of the Fisher of `softmax(apply(params, inputs))`, from the square of each image's own gradient.

    Pulling the columns of any V with `V Vᵀ = diag(p) - p pᵀ` back to the parameters, squaring and summing gives the
    diagonal (Porrello et al., 2025).

    Args:
      apply: logits; a class that is not there yet may have the logit -inf. Images are seen one at a time (under vmap).
      params: the leaves to differentiate; close over the frozen ones.
      inputs: array or tree of arrays with the batch on axis 0.
      method: `exact`, one column a class; `low_rank`, for each chunk as many columns of the pivoted Cholesky factor as
        leave at most `tolerance` of the trace for every image in it (a lower bound of the exact diagonal, leaf by
        leaf); `monte_carlo`, one label drawn from p by `key`, unbiased; `empirical`, the given true `labels`, which
        is not the Fisher but what many call by its name.
      chunk: images whose gradients are held at once; default: as many as fit in about 2^26 numbers.

    Returns sums, see `FisherDiagonal`. Differentiates nothing itself and is not jitted. ValueError on an unknown
    method, a missing key or missing labels, or an empty batch.
    """
    batch = jax.tree.leaves(inputs)[0].shape[0]
    if method not in ("exact", "low_rank", "monte_carlo", "empirical"):
        raise ValueError(f"unknown method {method!r}; known are exact, low_rank, monte_carlo, empirical")
    if batch == 0:
        raise ValueError("the Fisher of no images was asked for: inputs are empty")
    if method == "monte_carlo" and key is None:
        raise ValueError("method='monte_carlo' draws labels and needs a key: key=jax.random.key(0)")
    if method == "empirical" and labels is None:
        raise ValueError("method='empirical' needs the true labels; the Fisher itself (method='exact') needs none")
    if labels is not None and labels.shape != (batch,):
        raise ValueError(f"{batch} images have labels of shape {labels.shape}; they must be ({batch},)")
    chunk = min(batch, chunk or max(1, 2**26 // max(1, tree.size(params))))
    chunks = -(-batch // chunk)

    def padded(x):  # the last chunk is filled up with image 0, which `real` leaves out of the sums
        return jnp.concatenate([x, jnp.broadcast_to(x[:1], (chunks * chunk - batch, *x.shape[1:]))]).reshape(
            chunks, chunk, *x.shape[1:]
        )

    if method == "empirical":
        labels = padded(labels)
    keys = None if key is None else padded(jax.random.split(key, batch))
    real = (jnp.arange(chunks * chunk) < batch).reshape(chunks, chunk)

    def linearise(image):  # the pullback is a pytree of residuals, so vmap can return it
        return jax.vjp(lambda p: apply(p, jax.tree.map(lambda x: x[None], image))[0], params)

    def squares(gradients, mask):  # the sum over the chunk's images
        def one(g):
            return jnp.einsum("n...,n->...", jnp.square(g), mask.astype(g.dtype))

        return jax.tree.map(one, gradients)

    def one_chunk(carry, xs):
        total, captured = carry
        images, mask, labels, keys = xs
        logits, pull = jax.vmap(linearise)(images)  # once; then pulled back column by column
        probabilities = jax.nn.softmax(logits)

        def add(total, columns):
            return jax.tree.map(jnp.add, total, squares(jax.vmap(lambda f, column: f(column)[0])(pull, columns), mask))

        if method == "exact":

            def body(c, total):
                column = jnp.sqrt(probabilities[:, c, None]) * jax.vmap(_one_column, (0, None))(probabilities, c)
                return add(total, column)

            total = jax.lax.fori_loop(0, probabilities.shape[1], body, total)
            certificate = jnp.ones(chunk, probabilities.dtype)
        elif method == "low_rank":
            left = jax.vmap(lambda p: _cholesky(p)[1])(probabilities)
            trace = 1 - jnp.sum(probabilities**2, axis=1)
            enough = left <= tolerance * trace[:, None]
            needed = jnp.max(jnp.where(mask, jnp.argmax(enough, axis=1) + 1, 0))
            total = jax.lax.fori_loop(
                0, needed, lambda k, total: add(total, jax.vmap(lambda p: _cholesky(p)[0](k))(probabilities)), total
            )
            certificate = jnp.where(trace > 0, 1 - left[:, needed - 1] / jnp.where(trace > 0, trace, 1), 1)
        else:
            if method == "monte_carlo":
                labels = jax.vmap(lambda k, p: jax.random.categorical(k, jnp.log(p)))(keys, probabilities)
            total = add(total, jax.vmap(_one_column)(probabilities, labels))
            certificate = jnp.full(chunk, jnp.nan, probabilities.dtype)
        worst = jnp.min(jnp.where(mask, certificate, jnp.inf))
        return (total, jnp.minimum(captured, worst)), None

    first = jax.eval_shape(apply, params, inputs).dtype
    start = (jax.tree.map(jnp.zeros_like, params), jnp.array(jnp.inf, first))
    xs = (jax.tree.map(padded, inputs), real, labels if method == "empirical" else None, keys)
    (total, captured), _ = jax.lax.scan(one_chunk, start, xs)
    return FisherDiagonal(total, jnp.array(batch), captured)
