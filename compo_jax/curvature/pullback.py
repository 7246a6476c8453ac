"""Each image's own gradient: the columns of the output loss's Hessian, pulled back to the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from compo_jax import tree
from compo_jax.curvature.batches import examples, require_count, require_independent, require_key
from compo_jax.curvature.columns import METHODS, columns, ranks
from compo_jax.curvature.layers import Dense, tap, zeros
from compo_jax.curvature.output_loss import (
    predictions,
    require_output_loss,
    require_outputs,
    require_targets,
)
from compo_jax.tree import Tree

# Numbers that a chunk may hold at once where the caller says nothing; on a CPU near to its cache's size.
_HELD, _HELD_ON_CPU = 2**26, 2**23


class Pulled(NamedTuple):
    """One column of every image of a chunk, pulled back.

    Attributes:
      inputs: of each dense layer, (images, *stack, tokens, in).
      outputs: the gradients of its outputs, (images, *stack, tokens, out).
      rest: gradients of the leaves that are not the weight of one dense layer, (images, ...), None at those that are.
      real: (images,), False where an image fills up the last chunk, or takes no part.
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
      finish: `(sums, images that took part) -> result`.
    """

    start: Tree
    column: Callable[[Tree, Pulled], Tree]
    chunk: Callable[[Tree, dict[str, Array], Array], Tree] = lambda sums, inputs, real: sums
    finish: Callable[[Tree, Array], Any] = lambda sums, count: sums


class Estimator(NamedTuple):
    """How the Hessian of the output loss is taken apart into columns, and over which images; see `fisher_diagonal`."""

    method: str
    tolerance: float
    labels: Any
    key: Any
    chunk: int | None
    output_loss: Any
    ignore: int | None


class Examples(NamedTuple):
    """The images as a scan over chunks takes them, each leaf (chunks, images, ...).

    Attributes:
      images: tree of inputs.
      real: False where an image fills up the last chunk.
      part: (..., tokens), the predictions that take part.
      targets: None where no label is needed.
      keys: one an image, None where nothing is drawn.
    """

    images: Tree
    real: Bool[Array, "chunks images"]
    part: Bool[Array, "chunks images tokens"]
    targets: Array | None
    keys: Any


class Pooled(NamedTuple):
    """What became of a reduction: its result, the images that took part, the smallest fraction captured of them."""

    result: Any
    count: Int[Array, ""]
    captured: Float[Array, ""]


def pull_back(
    apply: Callable[[Tree, Any], Float[Array, "batch ..."]],
    params: Tree,
    inputs: Any,
    reduction: Callable[[dict[str, Dense]], Reduction],
    estimator: Estimator,
) -> Pooled:
    """The reduction that is made for the dense layers in `apply`, over all columns of all images.

    The other arguments, and the errors: see `curvature.fisher_diagonal`.
    """
    method, tolerance = estimator.method, estimator.tolerance
    inputs = jax.tree.map(jnp.asarray, inputs)
    loss, outputs, targets, part = _checked(apply, params, inputs, estimator)

    def outputs_of(params, image):
        return apply(params, jax.tree.map(lambda x: x[None], image))[0]

    taps = tap(outputs_of, params, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs))
    rest = tree.map_with_name(lambda name, leaf: None if name in taps.layers else leaf, params)
    chunk = _chunk_size(estimator, part.shape[0], taps.layers, rest)

    if method == "low_rank":  # images that need equally many columns go together

        def columns_of(image):
            image, part = image
            return jnp.sum(ranks(loss, predictions(outputs_of(params, image)[None]), part[None], tolerance)[0])

        order = jnp.argsort(jax.lax.map(columns_of, (inputs, part), batch_size=chunk))
        inputs, targets, part = jax.tree.map(lambda x: x[order], (inputs, targets, part))

    def linearise(images):
        # What differs between images is what is differentiated: a copy of the probes and of the small leaves for each
        # image. The weights of dense layers stay one, so that all images go through one matrix product.
        def copies(leaf):
            return jnp.broadcast_to(leaf, (chunk, *leaf.shape))

        def forward(probes, rest):
            return jax.vmap(lambda p, r, image: taps.forward(p, tree.combine(r, params), image))(probes, rest, images)

        return jax.vjp(forward, *jax.tree.map(copies, (zeros(taps.probes), rest)), has_aux=True)

    start, column, each_chunk, finish = reduction(taps.layers)

    def one_chunk(carry, examples: Examples):
        sums, captured = carry
        real = examples.real & examples.part.any(axis=1)
        outputs, pull, x = linearise(examples.images)  # once; then pulled back column by column
        factor = columns(loss, outputs, real, examples.part, method, tolerance, examples.targets, examples.keys)

        def add(k, sums):
            gradients, others = pull(factor.column(k))
            return column(sums, Pulled(x, gradients, others, real))

        sums = jax.lax.fori_loop(0, factor.count, add, each_chunk(sums, x, real))
        worst = jnp.min(jnp.where(real, factor.captured, jnp.inf)).astype(captured.dtype)
        return (sums, jnp.minimum(captured, worst)), None

    keys = jax.random.split(estimator.key, part.shape[0]) if method == "monte_carlo" else None
    first = jnp.array(jnp.inf, tree.wide_type(outputs.dtype))
    (sums, captured), _ = jax.lax.scan(one_chunk, (start, first), _chunks(inputs, part, targets, keys, chunk))
    count = jnp.sum(part.any(axis=1))
    return Pooled(finish(sums, count), count, captured)


def _checked(apply: Callable, params: Tree, inputs: Any, estimator: Estimator) -> tuple:
    """(the loss, the outputs' shape and type, targets or None, which predictions take part (images, tokens))."""
    method, tolerance, labels, key, chunk, output_loss, ignore = estimator
    tree.require_float(params, "params")
    loss = require_output_loss(output_loss)
    batch = examples(inputs)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    if batch == 0:
        raise ValueError("the curvature of no images was asked for: inputs are empty")
    if method == "monte_carlo":
        require_key(key, "method='monte_carlo' draws labels and needs a key")
    if labels is None and method == "empirical":
        raise ValueError("method='empirical' needs the true labels; the Fisher itself (method='exact') needs none")
    if labels is None and loss.weight is not None:
        raise ValueError("the loss weighs examples by their classes: give labels, whatever the method")
    if labels is None and ignore is not None:
        raise ValueError(f"ignore={ignore} says which labels are skipped, and no labels are given")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance, the fraction of the trace that may be left out, is {tolerance}: 0 <= it < 1")
    if chunk is not None:
        require_count(chunk, f"a chunk holds at least one image, not {chunk}")
    outputs = jax.eval_shape(apply, params, inputs)
    require_outputs(loss, outputs, batch)
    targets, part = None, jnp.ones((batch, int(np.prod(outputs.shape[1:-1]))), bool)
    if labels is not None:
        targets, part = require_targets(loss, labels, outputs.shape, ignore)
    require_independent(apply, params, inputs)
    return loss, outputs, targets, part


def _chunk_size(estimator: Estimator, batch: int, layers: dict[str, Dense], rest: Tree) -> int:
    """Images of a chunk, so that all are as equal as can be: what fills the last one up is computed, too."""
    chunk = estimator.chunk
    if chunk is None:
        held = tree.size(rest) + sum(int(np.prod(d.stack)) * d.tokens * sum(d.sizes) for d in layers.values())
        most = _HELD_ON_CPU if jax.default_backend() == "cpu" else _HELD
        chunk = max(1, most // max(1, held))
        if estimator.method == "low_rank":  # several, so that images that need few columns don't wait for others
            chunk = min(chunk, max(8, batch // 8))
    return -(-batch // -(-batch // chunk))


def _chunks(inputs: Tree, part: Array, targets: Array | None, keys: Any, chunk: int) -> Examples:
    """The images in chunks, of which the last is filled up with image 0."""
    batch = part.shape[0]
    chunks = -(-batch // chunk)

    def padded(x):
        filled = jnp.concatenate([x, jnp.broadcast_to(x[:1], (chunks * chunk - batch, *x.shape[1:]))])
        return filled.reshape(chunks, chunk, *x.shape[1:])

    real = (jnp.arange(chunks * chunk) < batch).reshape(chunks, chunk)
    return Examples(*jax.tree.map(padded, (inputs,)), real, *jax.tree.map(padded, (part, targets, keys)))
