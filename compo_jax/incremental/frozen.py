"""The base's features under the aligned reference head: what every method starts from."""

from compo_jax.incremental.evaluate import linear
from compo_jax.incremental.modes import Method, Mode, nothing
from compo_jax.incremental.settings import Setup


def frozen_features(setup: Setup, method: Method) -> Mode:
    """Nothing is trained but the reference, which is there for all methods."""
    return Mode(
        lesson=lambda stream, task: None,
        compose=nothing,
        classify=lambda snapshot: linear(snapshot.base_features, snapshot.reference.head),
    )
