"""One pure training step; every runner runs this one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from compo_jax.tree import Tree

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What training changes, and nothing else.

    Attributes:
      step: number of steps taken.
      params: the trainable tree.
      optimizer: optax state, with a count of the updates that were not finite and so not made.
    """

    step: jax.Array
    params: Tree
    optimizer: Any


def _guarded(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.apply_if_finite(optimizer, max_consecutive_errors=2**30)


def init_state(params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, _guarded(optimizer).init(params))


def make_step(
    loss: Callable[[Tree, Tree, Tree, jax.Array], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
    *,
    extras: Callable[[Tree, Tree, jax.Array], tuple[dict[str, Any], Metrics]] | None = None,
    axis: str | None = None,
) -> Callable[[TrainState, Tree, Tree], tuple[TrainState, Metrics]]:
    """`(state, context, batch) -> (state, metrics)`, pure.

    Args:
      loss: `(params, context, batch, step) -> (mean over the batch, metrics)`; only `params` is differentiated.
        `context` is what stays the same through a run: frozen weights, masks, keys.
      optimizer: any optax transformation.
      extras: `(params, context, step) -> (keyword arguments, metrics)`, the arguments (arrays, functions) of the
        optimizer's update, for one that wants more than gradients (`optax.GradientTransformationExtraArgs`).
      axis: name of the mapped axis to average gradients and metrics over (pmap); None under jit.

    An update that is not finite is not made, and counted in the metric `not_finite`: the parameters stay good.
    """
    optimizer = _guarded(optimizer)

    def step(state: TrainState, context: Tree, batch: Tree) -> tuple[TrainState, Metrics]:
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, context, batch, state.step)
        metrics = {"loss": value, **metrics}
        if axis is not None:
            gradients, metrics = jax.lax.pmean((gradients, metrics), axis)
        more, of_extras = ({}, {}) if extras is None else extras(state.params, context, state.step)
        metrics |= of_extras
        arrays = [x for x in jax.tree.leaves(more) if not callable(x)]
        finite = jnp.array([jnp.all(jnp.isfinite(x)) for x in arrays]).all()
        gradients = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), gradients)  # the guard looks at them alone
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params, **more)
        # the guard looks at gradients; an update that overflows isn't made either, and what was infinite may stay so
        moved = optax.apply_updates(state.params, updates)
        sound = jax.tree.map(lambda new, old: jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old)), moved, state.params)
        made = jnp.array(jax.tree.leaves(sound)).all()
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: jnp.where(made, u, 0), updates))
        count = optimizer_state.total_notfinite + ~made
        optimizer_state = optimizer_state._replace(total_notfinite=count)
        metrics["not_finite"] = count
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return step
