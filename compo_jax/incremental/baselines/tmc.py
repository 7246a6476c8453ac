"""Tangent model composition: modules of the model that is linearised at the base."""

from compo_jax.incremental.extraction import features, tangent_features
from compo_jax.incremental.ita import task_arithmetic
from compo_jax.incremental.modes import Method, Mode
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


def tangent_composition(setup: Setup, method: Method) -> Mode:
    """Each module is trained alone; features are `f(base) + Jf(base) Δ`, in training and in tests.

    The loss stays the cross-entropy, where that of Liu and Soatto (2023) is a square.
    """
    model, base, stream, settings, _ = setup
    tangent = tangent_features(model)
    return task_arithmetic(setup, method)._replace(
        features=lambda held, module, images: tangent(held["base"], method.adapter.delta(module, held["base"]), images),
        extract=features(model, stream, settings.features_batch, around=base),
    )


register(
    "tmc", tangent_composition, "tangent model composition (Liu and Soatto, 2023, arXiv 2307.08114)",
    learning_rate=2e-5, pull=(0.1, 0.05),
)  # fmt: skip
