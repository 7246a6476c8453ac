"""Directional derivatives, also of functions that JAX has no forward mode for: those with a `jax.custom_vjp`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any


class Linear(NamedTuple):
    """A function at a point, linearised once.

    Attributes:
      value: the function's.
      push: `v -> J v`.
      pull: `u -> Jᵀ u`.
    """

    value: Tree
    push: Callable[[Tree], Tree]
    pull: Callable[[Tree], Tree]


def linearise(function: Callable[[Tree], Tree], at: Tree) -> Linear:
    """J by forward mode or, where a custom derivative rules that out, as the transpose of Jᵀ, which is as exact."""
    try:
        value, push = jax.linearize(function, at)
        jax.eval_shape(push, jax.tree.map(jnp.zeros_like, at))  # a custom derivative raises only here
        return Linear(value, push, lambda u: jax.linear_transpose(push, at)(u)[0])
    except TypeError:  # what is wrong with the function itself is raised again below
        pass
    value, pull = jax.vjp(function, at)
    _, transpose = jax.vjp(lambda u: pull(u)[0], jax.tree.map(jnp.zeros_like, value))
    return Linear(value, lambda v: transpose(v)[0], lambda u: pull(u)[0])


def derivative_of_gradient(gradient: Callable[[Tree], Tree], at: Tree, vector: Tree) -> Tree:
    """`H v` of a gradient: forward over reverse or, where that can't be, reverse over reverse, for H is symmetric."""
    try:
        return jax.jvp(gradient, (at,), (vector,))[1]
    except TypeError:
        pass
    return jax.vjp(gradient, at)[1](vector)[0]
