"""SimpleCIL: the class prototype of the smallest angle; and APER, the same after first-session adaptation."""

import numpy as np
from jaxtyping import Float, Int

from compo_jax.incremental.baselines.first_session import adapted_first
from compo_jax.incremental.baselines.ncm import mean_features
from compo_jax.incremental.classifier import Head
from compo_jax.incremental.evaluate import linear
from compo_jax.incremental.modes import Method, Mode, Snapshot, nothing, training_features
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


def unit_rows(x: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n features"]:
    """Each row divided by its L2 norm; a row of zeros stays."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(x.dtype).tiny)


def class_prototypes(features: Float[np.ndarray, "images features"], labels: Int[np.ndarray, " images"]) -> Head:
    """The head that gives features of length 1 their cosines with each class's prototype, the mean of its features as
    they are (Zhou et al., 2023, arXiv 2303.07338). ValueError as of `nearest_class_mean`."""
    kernel = unit_rows(mean_features(features, labels)).T
    return {"kernel": kernel, "bias": np.zeros(kernel.shape[1])}


def cosine_prototypes(setup: Setup, method: Method) -> Mode:
    """Nothing is trained (SimpleCIL); with an adapter a module is, on the first task, and its features stand beside the
    base's in one vector (APER, called ADAM in the first version of the paper)."""

    def classify(snapshot: Snapshot):
        head = class_prototypes(*training_features(snapshot))
        return linear(lambda split: unit_rows(snapshot.base_features(split)), head)

    frozen = Mode(lesson=lambda stream, task: None, compose=nothing, classify=classify)
    return adapted_first(setup, method, frozen, beside_base=True)


register(
    "simplecil", cosine_prototypes,
    "class prototypes and cosines; with modules APER, adapted to the first task (Zhou et al., 2023, arXiv 2303.07338)",
)  # fmt: skip
