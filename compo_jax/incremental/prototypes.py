"""Classifiers on frozen features that training never touches: baselines for anything that trains modules."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from compo_jax.incremental.classifier import Head


def _counts(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images of each class, 0 … the largest label; ValueError where a class has none, or a feature isn't finite."""
    if len(features) != len(labels) or not len(labels) or np.min(labels) < 0:
        raise ValueError(
            f"{len(features)} features and {len(labels)} labels from {min(labels, default=None)} on were given: each "
            "image has a feature vector and a label, and labels count from 0"
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


def nearest_class_mean(features: Float[np.ndarray, "images features"], labels: Int[np.ndarray, " images"]) -> Head:
    """The linear head whose largest logit is the class of the nearest mean: kernel `μ_k`, bias `-‖μ_k‖²/2`.

    Classes are 0 … the largest label. ValueError where one of them has no image, or a feature isn't finite.
    """
    counts = _counts(features, labels)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, labels, features)
    means = sums / counts[:, None]
    return {"kernel": means.T.astype(np.float32), "bias": (-0.5 * np.sum(means**2, axis=1)).astype(np.float32)}


def random_projection(
    key: Key[Array, ""],
    features: Float[np.ndarray, "images features"],
    labels: Int[np.ndarray, " images"],
    *,
    width: int = 1000,
    ridges: tuple[float, ...] = tuple(10.0**k for k in range(-8, 9)),
) -> tuple[Float[np.ndarray, "features width"], Head]:
    """(projection, head) of RanPAC (McDonnell et al., 2023, arXiv 2307.02251), without its first-session adaptation.

    The head is the ridge regression of one-hot labels on `relu(features @ projection)`. Its sums over images grow task
    by task in the paper; all images at once, as here, give the same head. The ridge is the one of `ridges` with the
    least squared error on a fifth of the images after fitting to the others, and then all are fitted. ValueError as of
    `nearest_class_mean`.
    """
    _counts(features, labels)
    projection = np.asarray(jax.random.normal(key, (features.shape[1], width)), np.float64)
    h = np.maximum(features @ projection, 0)
    y = np.eye(labels.max() + 1)[labels]

    def fit(rows):
        values, vectors = np.linalg.eigh(h[rows].T @ h[rows])
        rotated = vectors.T @ (h[rows].T @ y[rows])
        return lambda ridge: vectors @ (rotated / (np.maximum(values, 0) + ridge)[:, None])

    held = np.random.default_rng(0).permutation(len(h)) % 5 == 4  # images may come in the order of their classes
    tried = fit(~held)
    errors = [np.sum((h[held] @ tried(ridge) - y[held]) ** 2) for ridge in ridges]
    kernel = fit(slice(None))(ridges[int(np.argmin(errors))])
    return projection, {"kernel": kernel, "bias": np.zeros(kernel.shape[1])}
