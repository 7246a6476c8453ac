"""AdamW with its own rate for the routes."""

import jax.numpy as jnp
import optax

from compo_jax import tree
from compo_jax.modular.settings import Settings

ROUTES = r"(^|/)(route|mixture)$"
UNDECAYED = rf"{ROUTES}|(^|/)norm/"


def _only(pattern: str, matching: bool = True):
    def mask(params):
        return tree.map_with_name(
            lambda name, x: None if x is None else (tree.first_match(name, [(pattern, True)], False) is matching),
            params,
        )

    return mask


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine and a clipped gradient; neither routes nor BN decay.

    Routes learn `route_rate` times faster, and not at all once they are fixed.
    """
    rise = min(max(round(settings.warmup * settings.steps), 1), settings.steps - 1)  # the cosine needs a step
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, rise, settings.steps)
    faster = optax.scale_by_schedule(lambda count: jnp.where(count < settings.freeze, settings.route_rate, 0.0))
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.scale_by_adam(),
        optax.masked(optax.add_decayed_weights(settings.weight_decay), _only(UNDECAYED, False)),
        optax.masked(faster, _only(ROUTES)),
        optax.scale_by_learning_rate(rate),
    )
