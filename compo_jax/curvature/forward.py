"""Directional derivatives, also of functions that JAX has no forward mode for: those with a `jax.custom_vjp`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxpr_as_fun

from compo_jax.tree import Tree


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


def derivative(function: Callable[[Tree], Tree], at: Tree, tangent: Tree) -> Tree:
    """`J tangent` alone: by forward mode nothing is stored for further products, which `linearise` does."""
    try:
        traced, shape = jax.make_jaxpr(lambda x, v: jax.jvp(function, (x,), (v,))[1], return_shape=True)(at, tangent)
        possible = "custom_lin" not in _primitives(traced.jaxpr)
    except TypeError:  # what is wrong with the function itself is raised again below
        possible = False
    if not possible:
        return linearise(function, at).push(tangent)
    return jax.tree.unflatten(jax.tree.structure(shape), jaxpr_as_fun(traced)(*jax.tree.leaves((at, tangent))))


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
    names = {equation.primitive.name for equation in jaxpr.eqns}
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            names |= _primitives(inner) if isinstance(inner, Jaxpr) else set()
    return names
