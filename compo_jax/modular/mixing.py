"""Templates mixed by a route."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from compo_jax import tree
from compo_jax.tree import Tree


def count(templates: Tree) -> int:
    """M, the length of axis 0 of every leaf; ValueError where they differ."""
    lengths = {x.shape[0] for x in jax.tree.leaves(templates)}
    if len(lengths) != 1:
        raise ValueError(f"templates are stacked on axis 0 of every leaf, and here it has the lengths {lengths or 0}")
    return lengths.pop()


def mix_templates(
    templates: Tree, route: Float[Array, "*layers templates"] | Int[Array, "*layers"], groups: int = 1
) -> Tree:
    """`θ = Σ_m a_m T_m` at each layer: leaves (M, ...) become (*layers, ...).

    Args:
      templates: a tree whose leaves have the M templates on axis 0.
      route: weights; or integers, the templates themselves, which are then read and not summed: exact, and the work
        doesn't depend on M.
      groups: with more than one, weights are (*layers, groups, templates): of each group of the leaves' last axis, of
        consecutive output channels.

    ValueError for weights of another number of templates or with NaN, and for a template that isn't there (under
    tracing, where no value can be looked at, NaN).
    """
    total, route = count(templates), jnp.asarray(route)
    if jnp.issubdtype(route.dtype, jnp.integer):
        values = np.asarray(route) if tree.concrete(route) else np.zeros(0, int)
        if values.size and not 0 <= values.min() <= values.max() < total:
            raise ValueError(f"a route through the templates {values.tolist()}, and there are {total}, from 0 on")
        there = jnp.where(route < 0, total, route)  # below zero is no place from the end
        return jax.tree.map(lambda x: jnp.take(x, there, axis=0, mode="fill"), templates)
    if route.shape[-1:] != (total,):
        raise ValueError(
            f"a route of shape {route.shape} was given for {total} templates: its last axis has a weight for each"
        )
    if groups > 1 and route.shape[-2:-1] != (groups,):
        raise ValueError(f"a route of shape {route.shape} was given for {groups} groups: (*layers, groups, templates)")
    if tree.concrete(route) and not np.isfinite(np.asarray(route)).all():
        raise ValueError(f"a route's weights are finite numbers, and these are {np.asarray(route).tolist()}")
    # At full precision: a device's default would round the weights of a network that isn't mixed at all.
    if groups == 1:
        return jax.tree.map(lambda x: jnp.tensordot(route.astype(x.dtype), x, 1, precision="highest"), templates)

    def by_group(x):
        parts = x.reshape(total, -1, groups, x.shape[-1] // groups)
        mixed = jnp.einsum("...gm,msgo->...sgo", route.astype(x.dtype), parts, precision="highest")
        return mixed.reshape(*route.shape[:-2], *x.shape[1:])

    return jax.tree.map(by_group, templates)
