"""Directional derivatives, also of functions that JAX has no forward mode for: those with a `jax.custom_vjp`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr

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
        if "custom_lin" not in _primitives(jax.make_jaxpr(push)(jax.tree.map(jnp.zeros_like, at)).jaxpr):
            return Linear(value, push, lambda u: jax.linear_transpose(push, at)(u)[0])
    except TypeError:  # what is wrong with the function itself is raised again below
        pass
    value, pull = jax.vjp(function, at)
    _, transpose = jax.vjp(lambda u: pull(u)[0], jax.tree.map(jnp.zeros_like, value))
    return Linear(value, lambda v: transpose(v)[0], lambda u: pull(u)[0])


def _primitives(jaxpr: Jaxpr) -> set[str]:
    """The names of all primitives, in inner jaxprs, too. The tangent of a `jax.custom_vjp` is one that only reverse
    mode knows, and JAX says so when it is run or compiled, too late to be caught."""
    found = {equation.primitive.name for equation in jaxpr.eqns}
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            found |= _primitives(inner) if isinstance(inner, Jaxpr) else set()
    return found
