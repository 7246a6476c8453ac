"""AdamW with the decoupled step of the regulariser, and the learning-rate schedule of the reference."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


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


def add_decoupled(clip: float) -> optax.GradientTransformationExtraArgs:
    """Adds `-rate · regulariser` to the updates, every tensor of the `regulariser` clipped to the L2 norm `clip`.

    `rate` and `regulariser` (the gradient of the penalty) are extra arguments. As with decoupled weight decay
    (Loshchilov and Hutter, 2019) neither the moments nor the base learning rate enter.
    """

    def update(updates, state, params=None, *, rate, regulariser, **_):
        del params

        def one(u, g):
            norm = jnp.sqrt(jnp.sum(g**2))
            return u - jnp.asarray(rate, u.dtype) * g * jnp.minimum(1, clip / jnp.maximum(norm, 1e-12))

        return jax.tree.map(one, updates, regulariser), state

    return optax.GradientTransformationExtraArgs(lambda params: _Empty(), update)


def decoupled_adamw(learning_rate: float, clip: float = 100.0) -> optax.GradientTransformationExtraArgs:
    """AdamW without weight decay whose update wants `rate` and `regulariser`: see `add_decoupled`."""
    return optax.chain(optax.scale_by_adam(), optax.scale(-learning_rate), scale_by_rate(), add_decoupled(clip))


def coupled_adamw(learning_rate: float, clip: float = 100.0) -> optax.GradientTransformationExtraArgs:
    """The same for a loss that holds its penalty already: the gradient of the sum is clipped; wants `rate`."""
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.scale_by_adam(), optax.scale(-learning_rate), scale_by_rate()
    )
