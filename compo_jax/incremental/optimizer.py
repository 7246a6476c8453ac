"""AdamW with a step of its own down the penalty, and the learning-rate schedule of the reference."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from compo_jax.incremental.descent import limit_update


class _Empty(NamedTuple):
    pass


def rates(epochs: int) -> jax.Array:
    """Learning rate of each epoch as a part of the first: `cos(99 π e / (200 (K - 1)))`, e = 0 … K-1."""
    return jnp.cos(99 * jnp.pi * jnp.arange(epochs) / (200 * max(epochs - 1, 1)))


def scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by the extra argument `rate`."""

    def update(updates, state, params=None, *, rate, **_):
        del params
        return jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: _Empty(), update)


def add_penalty_step() -> optax.GradientTransformationExtraArgs:
    """Adds the extra argument `penalty_step`, an update of its own, to the updates: see `descent.penalty_step`.

    As with decoupled weight decay (Loshchilov and Hutter, 2019) neither the moments nor the base learning rate enter.
    """

    def update(updates, state, params=None, *, penalty_step, **_):
        del params
        return jax.tree.map(jnp.add, updates, penalty_step), state

    return optax.GradientTransformationExtraArgs(lambda params: _Empty(), update)


def decoupled_adamw(learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """AdamW without weight decay whose update wants `rate`, and `penalty_step` for a step outside it."""
    return optax.chain(optax.scale_by_adam(), optax.scale(-learning_rate), scale_by_rate(), add_penalty_step())


def coupled_adamw(learning_rate: float, clip: float = 100.0) -> optax.GradientTransformationExtraArgs:
    """The same for a loss that holds its penalty already: the gradient of the sum is clipped; wants `rate`.

    With `penalty`, the function of the parameters that the loss holds, the update is shortened: `descent.limit_update`.
    """
    adam = optax.chain(
        optax.clip_by_global_norm(clip), optax.scale_by_adam(), optax.scale(-learning_rate), scale_by_rate()
    )

    def update(gradient, state, params=None, *, penalty=None, **extra):
        updates, state = adam.update(gradient, state, params, **extra)
        return updates if penalty is None else limit_update(penalty, params, updates, gradient), state

    return optax.GradientTransformationExtraArgs(adam.init, update)
