"""RanPAC: ridge regression on features that a random projection widened; the base's, or those of a first adaptation."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from compo_jax.compose.numbers import require_number
from compo_jax.curvature.batches import require_count
from compo_jax.incremental.baselines.first_session import adapted_first
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
    newest: int | None = None,
) -> tuple[Float[np.ndarray, "features width"], Head]:
    """(projection, head) of RanPAC (McDonnell et al., 2023, arXiv 2307.02251).

    The head is the ridge regression of one-hot labels on `relu(features @ projection)`. Its sums over images grow task
    by task in the paper; all images at once, as here, give the same head. The ridge is the one of `ridges` with the
    least squared error on a fifth of the newest task's images after fitting to all others, older tasks' too, where
    the authors' code fits to the newest task's alone; and then all are fitted.

    Args:
      width: of the projection, 10 000 in the paper: its time grows with the cube of this or of the number of images,
        the smaller of them.
      ridges: to choose from; the largest one, where there are fewer than five images.
      newest: how many images, the last ones, are the newest task's; default, and below five: all.

    ValueError as of `nearest_class_mean`, and for a width, a ridge or a number of images that can't be.
    """
    class_counts(features, labels)
    require_count(width, f"width is the number of the projection's columns, a whole number from 1 on, not {width}")
    if not len(ridges):
        raise ValueError("there are no ridges to choose from")
    for ridge in ridges:
        require_number("a ridge", ridge, "a finite number above zero", lambda x: x > 0)
    if newest is not None and not (isinstance(newest, int | np.integer) and 0 <= newest <= len(labels)):
        raise ValueError(f"newest={newest} of {len(labels)} images: it is how many of them, the last ones, are new")
    projection = np.asarray(jax.random.normal(key, (features.shape[1], width)), np.float64)
    h = np.maximum(features @ projection, 0)
    y = np.eye(labels.max() + 1)[labels]

    def fit(rows):
        x, few = h[rows], len(h[rows]) < width
        values, vectors = np.linalg.eigh(x @ x.T if few else x.T @ x)
        rotated, back = (vectors.T @ y[rows], x.T @ vectors) if few else (vectors.T @ (x.T @ y[rows]), vectors)
        return lambda ridge: back @ (rotated / (np.maximum(values, 0) + ridge)[:, None])

    count = len(h) if newest is None or newest < 5 else newest
    held = np.zeros(len(h), bool)
    held[len(h) - count :] = np.random.default_rng(0).permutation(count) % 5 == 4  # they may come class by class
    tried = fit(~held)
    errors = [np.sum((h[held] @ tried(ridge) - y[held]) ** 2) for ridge in ridges]
    best = ridges[int(np.argmin(errors))] if held.any() else max(ridges)  # of too few images to try them on
    kernel = fit(slice(None))(best)
    return projection, {"kernel": kernel, "bias": np.zeros(kernel.shape[1])}


def projected_regression(setup: Setup, method: Method, *, width: int = 1000) -> Mode:
    """The projection is drawn by the seed, once. Nothing is trained; with an adapter a module is, on the first task, as
    in the paper, and the features are the adapted model's."""

    def classify(snapshot: Snapshot):
        newest, key = len(setup.stream.tasks[snapshot.task].train), jax.random.key(setup.seed)
        projection, head = random_projection(key, *training_features(snapshot), width=width, newest=newest)
        return linear(lambda split: np.maximum(snapshot.base_features(split) @ projection, 0), head)

    return adapted_first(setup, method, Mode(lesson=lambda stream, task: None, compose=nothing, classify=classify))


register(
    "ranpac", projected_regression,
    "RanPAC; with modules after its first-session adaptation (McDonnell et al., 2023, arXiv 2307.02251)",
)  # fmt: skip
