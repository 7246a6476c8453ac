"""AdamW with a rate of their own for the routes."""

import jax.numpy as jnp
import optax

from compo_jax import tree
from compo_jax.modular.settings import Settings

ROUTES = r"(^|/)(route|mixture)$"
UNDECAYED = rf"{ROUTES}|(^|/)(norm/|gain$)"


def _only(pattern: str, matching: bool = True):
    def mask(params):
        return tree.map_with_name(
            lambda name, x: None if x is None else (tree.first_match(name, [(pattern, True)], False) is matching),
            params,
        )

    return mask


def optimizer(settings: Settings, freeze: int | None = None) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine and a clipped gradient; neither routes nor gains nor BN decay.

    Routes learn `route_rate` times faster, and not at all from step `freeze` on (`settings.freeze` of hard routes).
    """
    rise = min(max(round(settings.warmup * settings.steps), 1), settings.steps - 1)  # the cosine needs a step
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, rise, settings.steps)
    last = settings.steps if freeze is None else freeze
    faster = optax.scale_by_schedule(lambda count: jnp.where(count < last, settings.route_rate, 0.0))
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.scale_by_adam(),
        optax.masked(optax.add_decayed_weights(settings.weight_decay), _only(UNDECAYED, False)),
        optax.masked(faster, _only(ROUTES)),
        optax.scale_by_learning_rate(rate),
    )
