"""RanPAC: ridge regression on the base's features, widened by a random projection."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from compo_jax.incremental.baselines.ncm import class_counts
from compo_jax.incremental.classifier import Head
from compo_jax.incremental.evaluate import linear
from compo_jax.incremental.modes import Method, Mode, Snapshot, nothing, training_features
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


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
    class_counts(features, labels)
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


def projected_regression(setup: Setup, method: Method) -> Mode:
    """Nothing is trained; the projection is drawn by the seed, once."""

    def classify(snapshot: Snapshot):
        projection, head = random_projection(jax.random.key(setup.seed), *training_features(snapshot))
        return linear(lambda split: np.maximum(snapshot.base_features(split) @ projection, 0), head)

    return Mode(lesson=lambda stream, task: None, compose=nothing, classify=classify)


register(
    "ranpac", projected_regression,
    "RanPAC without its first-session adaptation (McDonnell et al., 2023, arXiv 2307.02251)",
)  # fmt: skip
