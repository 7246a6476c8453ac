"""The losses that curvature is taken of: what an estimator has to know of each, beside the model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree

Prediction = Float[Array, "*predictions outputs"]


class Pivoted(NamedTuple):
    """The pivoted Cholesky factor of the Hessian in one prediction.

    Attributes:
      column: `k -> (outputs,)`.
      left: (outputs + 1,), what is left of the trace after none, one, two, ... columns.
    """

    column: Callable[[Any], Array]
    left: Float[Array, " columns"]


class OutputLoss(NamedTuple):
    """The loss of one prediction z (outputs,), which is the last axis of what a model puts out.

    It is minus the logarithm of a likelihood whose natural parameter is z. So its Hessian H in z is the Fisher
    information, positive, and the target enters it at most as a factor. An image's loss is the sum over its
    predictions (tokens, say), and the mean loss is that over images.

    Attributes:
      value: `(z, target) -> loss`; plain JAX, for `hvp`, `hessian` and `landscape`, too.
      product: `(z, v) -> H v`, over leading axes as well.
      column: `(z, k) -> (outputs,)`, one of as many columns as there are outputs, of a V with `V Vᵀ = H`.
      pivoted: `z ->` the pivoted Cholesky factor of H.
      draw: `(key, z) -> like z`, the score `- d value / d z` at a target drawn from the model; its covariance is H.
      classes: a target is the index of one output (softmax), and not a number for each output.
      bounds: of a target that is a number.
      weight: `(z, target) ->` what H is multiplied by; None where that is 1, and H needs no target.
      outputs: how many there must be, or None.
    """

    value: Callable[[Array, Array], Array]
    product: Callable[[Array, Array], Array]
    column: Callable[[Array, Any], Array]
    pivoted: Callable[[Array], Pivoted]
    draw: Callable[[Array, Array], Array]
    classes: bool
    bounds: tuple[float, float] = (-np.inf, np.inf)
    weight: Callable[[Array, Array], Array] | None = None
    outputs: int | None = None


# --------------------------------------------------------------------------- softmax


def cholesky(p: Float[Array, " classes"]) -> Pivoted:
    """Pivoted Cholesky of `diag(p) - p pᵀ` in closed form.

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

    # the trace is 1 - Σ p², without the digits that this difference loses where one p is nearly 1
    trace = jnp.sum(q[1:] * (1 - q[1:])) + q[0] * after[0]
    return Pivoted(column, jnp.append(trace, jnp.maximum(left, 0)))


def softmax_loss(weights: Sequence[float] | Array | np.ndarray | None = None, smoothing: float = 0.0) -> OutputLoss:
    """The cross-entropy of softmax and a label, the default everywhere; a class not there yet may have the logit -inf.

    With H = `diag(p) - p pᵀ`. Smoothing alone leaves H as it is (only `empirical` sees it); with weights an example's
    H is `(1 - smoothing) weights[label] + smoothing mean(weights)` times this, and labels are needed.

    Args:
      weights: (classes,), of the examples of each class, finite and not negative, which isn't looked at where they
        are traced. Means are over the images: they aren't divided by the sum of the labels' weights, as PyTorch does.
      smoothing: the fraction of a label that is spread evenly over the classes that are there, 0 <= it < 1.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(
            f"smoothing, the fraction of a label that is spread over the classes, is {smoothing}: 0 <= it < 1"
        )
    if weights is not None:
        visible = tree.concrete(weights)
        weights = np.asarray(weights) if visible else jnp.asarray(weights)
        if weights.ndim != 1 or (visible and not np.all(np.isfinite(weights) & (weights >= 0))):
            raise ValueError(f"class weights are one number for each class, finite and not negative, not {weights}")

    def target_of(z, label):  # the gradient is this, less its sum times p
        classes, there = jnp.arange(z.shape[-1]), z != -jnp.inf
        each = jnp.ones_like(z) if weights is None else jnp.asarray(weights, z.dtype)
        sound = jnp.where((label >= 0) & (label < z.shape[-1]), each, jnp.nan)  # where a trace hides it from the check
        return jnp.where(classes == label, (1 - smoothing) * sound, 0 * sound) + smoothing * each * there / there.sum()

    def value(z, label):
        target = target_of(z, label)
        return -jnp.sum(jnp.where(target == 0, 0, target * jax.nn.log_softmax(z)))

    def product(z, change):
        p = jax.nn.softmax(z)
        change = jnp.where(p > 0, change, 0)  # a change of -inf is nan, and weighs nothing
        return p * change - p * jnp.sum(p * change, axis=-1, keepdims=True)

    def score(p, label):
        return jax.nn.one_hot(label, p.shape[-1], dtype=p.dtype) - p

    def column(z, k):
        p = jax.nn.softmax(z)
        return jnp.sqrt(p[k]) * score(p, k)

    return OutputLoss(
        value,
        product,
        column,
        pivoted=lambda z: cholesky(jax.nn.softmax(z)),
        draw=lambda key, z: score(jax.nn.softmax(z), jax.random.categorical(key, z)),
        classes=True,
        weight=None if weights is None else lambda z, label: jnp.sum(target_of(z, label)),
        outputs=None if weights is None else len(weights),
    )


# --------------------------------------------------------------------------- one number for each output


def _each_output(
    value: Callable, curvature: Callable[[Prediction], Prediction], draw: Callable, bounds: tuple = (-np.inf, np.inf)
) -> OutputLoss:
    """A loss whose outputs have nothing to do with each other: H is diagonal, `curvature(z)`."""

    def one(h, k):
        return jnp.where(jnp.arange(h.shape[-1]) == k, jnp.sqrt(h), 0)

    def pivoted(z):
        h = curvature(z)
        order = jnp.argsort(-h)
        left = jnp.cumsum(h[order][::-1])[::-1]
        return Pivoted(lambda k: one(h, order[k]), jnp.append(left, 0.0))

    def product(z, change):
        h = curvature(z)
        return h * jnp.where(h > 0, change, 0)

    return OutputLoss(value, product, lambda z, k: one(curvature(z), k), pivoted, draw, classes=False, bounds=bounds)


def bernoulli_loss() -> OutputLoss:
    """The cross-entropy of a sigmoid for each output and a target of 0 to 1: of two classes by one logit, or of labels
    that don't exclude each other. With p = sigmoid(z), H is `p (1 - p)`."""

    def draw(key, z):
        p = jax.nn.sigmoid(z)
        return jax.random.bernoulli(key, p).astype(z.dtype) - p

    return _each_output(
        lambda z, y: jnp.sum(jax.nn.softplus(z) - jnp.where(y == 0, 0, y * z)),
        lambda z: jax.nn.sigmoid(z) * jax.nn.sigmoid(-z),
        draw,
        (0.0, 1.0),
    )


def squared_loss() -> OutputLoss:
    """`½ ‖z - y‖²`, of a normal distribution of unit variance; H is the identity."""
    return _each_output(
        lambda z, y: 0.5 * jnp.sum(jnp.square(z - y)),
        jnp.ones_like,
        lambda key, z: jax.random.normal(key, z.shape, z.dtype),
    )


# --------------------------------------------------------------------------- what a model puts out, and its targets


def require_output_loss(output_loss: Any) -> OutputLoss:
    """The default for None; TypeError where it is a mere function, of which no estimator knows the columns."""
    if output_loss is None:
        return softmax_loss()
    if not isinstance(output_loss, OutputLoss):
        raise TypeError(
            f"output_loss is {output_loss!r}: a Fisher needs the columns of the loss's Hessian, so that it must be "
            "softmax_loss(), bernoulli_loss(), squared_loss() or another OutputLoss; ggn and ggnvp take any function"
        )
    return output_loss


def require_outputs(loss: OutputLoss, outputs: Any, images: int | None = None) -> None:
    """ValueError where `outputs` (an array or its shape and dtype) can't be what `loss` is of, for so many images."""
    if not hasattr(outputs, "shape"):
        raise ValueError(f"apply returns {type(outputs)}: the predictions must be one array, (batch, outputs)")
    shape = tuple(outputs.shape)
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"apply returns {outputs.dtype}: predictions must be floating-point numbers, as logits are")
    if not shape or (images is not None and shape[0] != images):
        raise ValueError(
            f"apply returns an array of shape {shape} for {images} images: axis 0 must be that of the images"
        )
    if 0 in shape:
        raise ValueError(f"apply returns an array of shape {shape}: there are no predictions in it")
    if loss.classes and len(shape) == 1:
        raise ValueError(
            f"apply returns logits of shape {shape}, without an axis of classes; softmax needs (batch, classes). "
            "Of one logit for each image give output_loss=bernoulli_loss(), of one number squared_loss()"
        )
    if loss.classes and shape[-1] == 1:
        raise ValueError(
            f"apply returns logits of shape {shape}: the softmax of one logit is 1 whatever it is, and has no "
            "curvature. Of two classes by one logit give output_loss=bernoulli_loss()"
        )
    if loss.outputs is not None and shape[-1] != loss.outputs:
        raise ValueError(f"{loss.outputs} class weights were given, and the logits are of {shape[-1]} classes: {shape}")


def predictions(outputs: Float[Array, "batch ..."]) -> Float[Array, "batch tokens outputs"]:
    """Every image's predictions, in float32 at least; outputs of shape (batch,) are one number an image."""
    wide = outputs.astype(tree.wide_type(outputs))
    return wide.reshape(wide.shape[0], -1, wide.shape[-1] if wide.ndim > 1 else 1)


def require_targets(loss: OutputLoss, targets: Any, shape: tuple[int, ...], ignore: int | None = None) -> tuple:
    """(targets (batch, tokens) or (batch, tokens, outputs), which take part (batch, tokens)) for outputs of this shape.

    Those that `ignore` leaves out become 0. ValueError for another shape or type and, where they aren't traced, for the
    first one out of range.
    """
    if ignore is not None and not loss.classes:
        raise ValueError(f"ignore={ignore} is a label of no class, and this loss has numbers for targets, not classes")
    targets = targets if isinstance(targets, jax.Array) else np.asarray(targets)
    expected, what = (shape[:-1], "labels") if loss.classes else (shape, "targets")
    if targets.shape != expected:
        raise ValueError(
            f"{shape[0]} images have {what} of shape {targets.shape}; they must be {expected}, for outputs {shape}"
        )
    if loss.classes and not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"labels are {targets.dtype}: they must be integers, the index of each image's class")
    if not loss.classes and not (jnp.issubdtype(targets.dtype, jnp.floating) or _whole(targets)):
        raise ValueError(f"targets are {targets.dtype}: they must be real numbers")
    part = np.ones(targets.shape, bool) if ignore is None else targets != ignore
    if tree.concrete(targets):
        low, high = (0, shape[-1] - 1) if loss.classes else loss.bounds
        values = np.asarray(targets)
        wrong = np.argwhere(np.asarray(part) & ~(np.isfinite(values) & (values >= low) & (values <= high)))
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            hint = (
                ": classes count from 0, and a label that stands for none is skipped by ignore=" if loss.classes else ""
            )
            raise ValueError(
                f"{what}[{', '.join(map(str, at))}] is {values[at]}, and {len(wrong)} of {values.size} are out of "
                f"range, which is {low} to {high}{hint}"
            )
        if not np.any(part):
            raise ValueError(f"all labels are {ignore}, which ignore= leaves out: no image takes part")
    if loss.classes:
        return jnp.where(part, targets, 0).reshape(shape[0], -1), jnp.asarray(part).reshape(shape[0], -1)
    numbers = jnp.asarray(targets).reshape(shape[0], -1, shape[-1] if len(shape) > 1 else 1)
    return numbers, jnp.ones(numbers.shape[:-1], bool)


def _whole(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.bool)


@functools.partial(jax.vmap, in_axes=(None, 0, 0))  # over images
@functools.partial(jax.vmap, in_axes=(None, 0, 0))  # and over their predictions
def _over_predictions(function, z, target):
    return function(z, target)


def scores(loss: OutputLoss, z: Float[Array, "batch tokens outputs"], targets: Array) -> Array:
    """`- d value / d z` of every prediction, at its target."""
    return -_over_predictions(jax.grad(loss.value), z, targets)


def weights_of(loss: OutputLoss, z: Float[Array, "batch tokens outputs"], targets: Array | None) -> Array:
    """(batch, tokens, 1), what each prediction's H is multiplied by."""
    if loss.weight is None:
        return jnp.ones((*z.shape[:-1], 1), z.dtype)
    return _over_predictions(loss.weight, z, targets)[..., None]
