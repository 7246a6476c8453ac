"""The nearest class mean of the base's features, which training never touches."""

import numpy as np
from jaxtyping import Float, Int

from compo_jax.incremental.classifier import Head
from compo_jax.incremental.evaluate import linear
from compo_jax.incremental.modes import Method, Mode, Snapshot, nothing, training_features
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


def class_counts(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images of each class, 0 … the largest label; ValueError where a class has none, or a feature isn't finite."""
    whole = np.issubdtype(np.asarray(labels).dtype, np.integer)
    if len(features) != len(labels) or not len(labels) or not whole or np.min(labels) < 0:
        raise ValueError(
            f"{len(features)} features and {len(labels)} labels from {min(labels, default=None)} on were given: each "
            "image has a feature vector and a label, and labels are whole numbers and count from 0"
        )
    counts = np.bincount(labels)
    if empty := np.flatnonzero(counts == 0).tolist():
        raise ValueError(
            f"the classes {', '.join(map(str, empty))} of {len(counts)} have no image: give labels without gaps, or "
            "leave these classes out"
        )
    if bad := np.flatnonzero(~np.all(np.isfinite(features), axis=1)).tolist():
        raise ValueError(f"the features of {len(bad)} images hold NaN or infinite numbers, image {bad[0]} the first")
    return counts


def mean_features(
    features: Float[np.ndarray, "images features"], labels: Int[np.ndarray, " images"]
) -> Float[np.ndarray, "classes features"]:
    """The mean of each class, in float64. ValueError as of `class_counts`."""
    counts = class_counts(features, labels)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, labels, features)
    return sums / counts[:, None]


def nearest_class_mean(features: Float[np.ndarray, "images features"], labels: Int[np.ndarray, " images"]) -> Head:
    """The linear head whose largest logit is the class of the nearest mean: kernel `μ_k`, bias `-‖μ_k‖²/2`.

    Classes are 0 … the largest label. ValueError where one of them has no image, or a feature isn't finite.
    """
    means = mean_features(features, labels)
    return {"kernel": means.T.astype(np.float32), "bias": (-0.5 * np.sum(means**2, axis=1)).astype(np.float32)}


def class_means(setup: Setup, method: Method) -> Mode:
    """Nothing is trained: a new class adds its mean."""

    def classify(snapshot: Snapshot):
        return linear(snapshot.base_features, nearest_class_mean(*training_features(snapshot)))

    return Mode(lesson=lambda stream, task: None, compose=nothing, classify=classify)


register("ncm", class_means, "nearest class mean of the base's features")
