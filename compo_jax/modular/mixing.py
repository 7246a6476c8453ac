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


def mix_templates(templates: Tree, route: Float[Array, "*layers templates"] | Int[Array, "*layers"]) -> Tree:
    """`θ = Σ_m a_m T_m` at each layer: leaves (M, ...) become (*layers, ...).

    Args:
      templates: a tree whose leaves have the M templates on axis 0.
      route: weights; or integers, the templates themselves, which are then read and not summed: exact, and the work
        doesn't depend on M.

    ValueError for weights of another number of templates or with NaN, and for a template that isn't there (under
    tracing, where no value can be looked at, NaN).
    """
    total = count(templates)
    if jnp.issubdtype(route.dtype, jnp.integer):
        values = np.asarray(route) if tree.concrete(route) else np.zeros(0, int)
        if values.size and not 0 <= values.min() <= values.max() < total:
            raise ValueError(f"a route through the templates {values.tolist()}, and there are {total}, from 0 on")
        return jax.tree.map(lambda x: jnp.take(x, route, axis=0, mode="fill"), templates)
    if route.shape[-1:] != (total,):
        raise ValueError(
            f"a route of shape {route.shape} was given for {total} templates: its last axis has a weight for each"
        )
    if tree.concrete(route) and not np.isfinite(np.asarray(route)).all():
        raise ValueError(f"a route's weights are finite numbers, and these are {np.asarray(route).tolist()}")
    # At full precision: a device's default would round the weights of a network that isn't mixed at all.
    return jax.tree.map(lambda x: jnp.tensordot(route.astype(x.dtype), x, 1, precision="highest"), templates)
