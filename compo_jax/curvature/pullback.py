"""Each image's own gradient: the columns of the logits' curvature, pulled back to the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from compo_jax import tree
from compo_jax.curvature import softmax
from compo_jax.curvature.batches import examples
from compo_jax.curvature.layers import Dense, tap, zeros

Tree = Any

_HELD = 2**26  # numbers that a chunk may hold at once where the caller says nothing


class Pulled(NamedTuple):
    """One column of every image of a chunk, pulled back.

    Attributes:
      inputs: of each dense layer, (images, *stack, tokens, in).
      outputs: the gradients of its outputs, (images, *stack, tokens, out).
      rest: gradients of the leaves that are not the weight of one dense layer, (images, ...), None at those that are.
      real: (images,), False where an image fills up the last chunk.
    """

    inputs: dict[str, Array]
    outputs: dict[str, Array]
    rest: Tree
    real: Bool[Array, " images"]


class Reduction(NamedTuple):
    """A sum over images and columns.

    Attributes:
      start: a tree of arrays.
      column: `(sums, Pulled) -> sums`.
      chunk: `(sums, inputs, real) -> sums`, once for each chunk.
      finish: `sums -> result`.
    """

    start: Tree
    column: Callable[[Tree, Pulled], Tree]
    chunk: Callable[[Tree, dict[str, Array], Array], Tree] = lambda sums, inputs, real: sums
    finish: Callable[[Tree], Any] = lambda sums: sums


def pull_back(
    apply: Callable[[Tree, Any], Float[Array, "batch classes"]],
    params: Tree,
    inputs: Any,
    reduction: Callable[[dict[str, Dense]], Reduction],
    *,
    method: str,
    tolerance: float,
    labels: Int[Array, " batch"] | None,
    key: Key[Array, ""] | None,
    chunk: int | None,
) -> tuple[Tree, Float[Array, ""]]:
    """(result, smallest fraction captured) of the reduction made for the dense layers that are found.

    The other arguments, and the errors: see `curvature.fisher_diagonal`.
    """
    tree.require_float(params, "params")
    batch = examples(inputs)
    if method not in softmax.METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(softmax.METHODS)}")
    if batch == 0:
        raise ValueError("the curvature of no images was asked for: inputs are empty")
    if method == "monte_carlo" and key is None:
        raise ValueError("method='monte_carlo' draws labels and needs a key: key=jax.random.key(0)")
    if method == "empirical" and labels is None:
        raise ValueError("method='empirical' needs the true labels; the Fisher itself (method='exact') needs none")
    if labels is not None and np.shape(labels) != (batch,):
        raise ValueError(f"{batch} images have labels of shape {np.shape(labels)}; they must be ({batch},)")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance, the fraction of the trace that may be left out, is {tolerance}: 0 <= it < 1")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk holds at least one image, not {chunk}")

    def logits_of(params, image):
        return apply(params, jax.tree.map(lambda x: x[None], image))[0]

    taps = tap(logits_of, params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs))
    rest = tree.map_with_name(lambda name, leaf: None if name in taps.layers else leaf, params)
    held = tree.size(rest) + sum(
        int(np.prod(layer.stack)) * layer.tokens * sum(layer.sizes) for layer in taps.layers.values()
    )
    if chunk is None:
        chunk = max(1, _HELD // max(1, held))
        if method == "low_rank":  # several chunks, so that images that need few columns don't wait for those of many
            chunk = min(chunk, max(8, batch // 8))
    chunk = min(batch, chunk)
    chunks = -(-batch // chunk)

    def padded(x):  # the last chunk is filled up with image 0, which `real` leaves out of the sums
        filled = jnp.concatenate([x, jnp.broadcast_to(x[:1], (chunks * chunk - batch, *x.shape[1:]))])
        return filled.reshape(chunks, chunk, *x.shape[1:])

    if method == "low_rank":  # images that need equally many columns go together
        needed = jax.lax.map(lambda image: softmax.rank(logits_of(params, image), tolerance), inputs, batch_size=chunk)
        order = jnp.argsort(needed)
        inputs = jax.tree.map(lambda x: x[order], inputs)

    def linearise(images):
        # What differs between images is what is differentiated: a copy of the probes and of the small leaves for each
        # image. The weights of dense layers stay one, so that all images go through one matrix product.
        def copies(leaf):
            return jnp.broadcast_to(leaf, (chunk, *leaf.shape))

        def forward(probes, rest):
            return jax.vmap(lambda p, r, image: taps.forward(p, tree.combine(r, params), image))(probes, rest, images)

        return jax.vjp(forward, *jax.tree.map(copies, (zeros(taps.probes), rest)), has_aux=True)

    start, column, each_chunk, finish = reduction(taps.layers)

    def one_chunk(carry, xs):
        sums, captured = carry
        images, real, labels, keys = xs
        logits, pull, x = linearise(images)  # once; then pulled back column by column
        factor = softmax.columns(logits, real, method, tolerance, labels, keys)

        def add(k, sums):
            outputs, others = pull(factor.column(k))
            return column(sums, Pulled(x, outputs, others, real))

        sums = jax.lax.fori_loop(0, factor.count, add, each_chunk(sums, x, real))
        worst = jnp.min(jnp.where(real, factor.captured, jnp.inf)).astype(captured.dtype)
        return (sums, jnp.minimum(captured, worst)), None

    xs = (
        jax.tree.map(padded, inputs),
        (jnp.arange(chunks * chunk) < batch).reshape(chunks, chunk),
        padded(jnp.asarray(labels)) if method == "empirical" else None,
        padded(jax.random.split(key, batch)) if method == "monte_carlo" else None,
    )
    dtype = jax.eval_shape(apply, params, inputs).dtype
    first = jnp.array(jnp.inf, jnp.promote_types(dtype, jnp.float32))
    (sums, captured), _ = jax.lax.scan(one_chunk, (start, first), xs)
    return finish(sums), captured
