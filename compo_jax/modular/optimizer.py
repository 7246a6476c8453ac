"""AdamW with its own rate for the routes."""

import jax
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
    """AdamW, warm-up and cosine, the gradient clipped; routes learn `route_rate` times faster, and not at all once fixed.

    Neither routes nor BN decay.
    """
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(round(settings.warmup * settings.steps), 1), settings.steps
    )
    faster = optax.scale_by_schedule(lambda count: jnp.where(count < settings.freeze, settings.route_rate, 0.0))
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.scale_by_adam(),
        optax.masked(optax.add_decayed_weights(settings.weight_decay), _only(UNDECAYED, False)),
        optax.masked(faster, _only(ROUTES)),
        optax.scale_by_learning_rate(rate),
    )


def parameters(params, *, route: bool = True) -> int:
    """How many scalars a network has; without `route` those of a plain one, whose blocks stand in a fixed order."""
    return sum(
        x.size for name, x in zip(tree.names(params), jax.tree.leaves(params), strict=True) if route or name != "route"
    )
