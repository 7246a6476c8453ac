"""Gaussian mixtures of a class's features: they stand for its images in every later task."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key


class Mixtures(NamedTuple):
    """A diagonal Gaussian mixture for each class; a class that hasn't come yet has weights zero."""

    weights: Float[Array, "classes components"]
    means: Float[Array, "classes components features"]
    variances: Float[Array, "classes components features"]


def empty_mixtures(classes: int, components: int, features: int) -> Mixtures:
    """Room for the mixtures of `classes` classes, none of them fitted."""
    shape = (classes, components, features)
    return Mixtures(jnp.zeros(shape[:2]), jnp.zeros(shape), jnp.ones(shape))


def fit_mixtures(
    mixtures: Mixtures, features: Float[np.ndarray, "images features"], labels: Int[np.ndarray, " images"], *, seed: int
) -> Mixtures:
    """`mixtures` with those of the classes in `labels` (global numbers) fitted to their features.

    A class with fewer images than components gets one component an image. The variances are at least 1e-3 of the
    features' mean variance, so that a component of one image still has a width.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    weights, means, variances = (np.array(x) for x in mixtures)
    if len(labels) and not 0 <= np.min(labels) <= np.max(labels) < len(weights):
        raise ValueError(
            f"labels from {np.min(labels)} to {np.max(labels)} were given, and there are mixtures of {len(weights)} "
            "classes, from 0 on"
        )
    floor = max(1e-3 * float(features.var(axis=0).mean()), 1e-8)
    for label in np.unique(labels):
        rows = features[labels == label].astype(np.float64)
        count = min(weights.shape[1], len(rows))
        model = GaussianMixture(count, covariance_type="diag", reg_covar=floor, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a rough mixture of few images serves as well
            model.fit(rows if len(rows) > 1 else np.repeat(rows, 2, axis=0))  # scikit-learn wants two samples
        weights[label] = 0
        weights[label, :count] = model.weights_
        means[label, :count] = model.means_
        variances[label, :count] = model.covariances_
    return Mixtures(*(jnp.asarray(x) for x in (weights, means, variances)))


def sample(key: Key[Array, ""], mixtures: Mixtures, labels: Int[Array, " n"]) -> Float[Array, "n features"]:
    """One feature vector drawn from the mixture of each label's class."""
    key_component, key_noise = jax.random.split(key)
    component = jax.random.categorical(key_component, jnp.log(mixtures.weights[labels]))
    means = mixtures.means[labels, component]
    noise = jax.random.normal(key_noise, means.shape, means.dtype)
    return means + jnp.sqrt(mixtures.variances[labels, component]) * noise
