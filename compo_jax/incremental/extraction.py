"""CLS features of a split's images, by the model or by its tangent at the base."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import adapters, tree
from compo_jax.data import JoinedSplit, Split, TaskStream, eval_batches
from compo_jax.tree import Tree

Images = Float[Array, "images size size 3"]


@runtime_checkable
class Extract(Protocol):
    """The features of all images of a split, in order, by a model with these parameters.

    ValueError where a feature isn't finite: no accuracy could be told from it.
    """

    def __call__(self, params: Tree, split: Split) -> Float[np.ndarray, "images features"]: ...


SplitFeatures = Callable[[Split], Float[np.ndarray, "images features"]]


def features(model, stream: TaskStream, batch: int, around: Tree | None = None) -> Extract:
    """The model's features, made `batch` images at a time; compiled once.

    Args:
      around: parameters that the model is linearised at; None: the model itself.
    """
    linear = None if around is None else tangent_features(model)

    @jax.jit
    def forward(params, around, images):
        images = stream.prepare(images)
        if linear is None:
            return model.apply({"params": params}, images, method="features")
        return linear(around, tree.add(params, around, -1.0), images)

    def run(params, split):
        parts = eval_batches(split, batch)
        z = np.concatenate([np.asarray(forward(params, around, p["image"]), np.float32)[:real] for p, real in parts])
        if bad := np.flatnonzero(~np.all(np.isfinite(z), axis=1)).tolist():
            raise ValueError(
                f"the features of {len(bad)} of {len(z)} images are NaN or infinite, image {bad[0]} the first: the "
                "parameters may hold such numbers (a training that diverged), or overflow in a 16-bit compute dtype"
            )
        return z

    return run


def made_once(extract: SplitFeatures) -> SplitFeatures:
    """The same function, which makes the features of each split, and of each part of a joined one, once."""
    made: dict[int, tuple[Split, np.ndarray]] = {}

    def run(split):
        if isinstance(split, JoinedSplit):
            return np.concatenate([run(part) for part in split.splits])
        if id(split) not in made:
            made[id(split)] = split, extract(split)  # the split is kept, so that no other gets its number
        return made[id(split)][1]

    return run


def tangent_features(model) -> Callable[[Tree, Tree, Images], Float[Array, "images features"]]:
    """`(base, delta, images) -> f(base) + Jf(base) delta`, linear in the task vector; None in it is no change."""
    model = model.copy(kernel="xla")  # cuDNN's attention has no forward derivative
    return adapters.linearised(lambda params, images: model.apply({"params": params}, images, method="features"))


def feature_width(model, base: Tree, stream: TaskStream) -> int:
    """Length of a feature vector."""
    images = jnp.zeros((1, stream.size, stream.size, 3))
    return jax.eval_shape(lambda: model.apply({"params": base}, images, method="features")).shape[-1]
