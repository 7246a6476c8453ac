"""How far from the base towards the average: the answer of the angles between the task vectors."""

from collections.abc import Sequence

import jax.numpy as jnp

from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.leaves import Stacked, by_layer, layers, leafwise, moved
from compo_jax.compose.modules import aligned
from compo_jax.tree import Tree


def model_stock(base: Tree, deltas: Sequence[Tree], *, stacked: Stacked = STACKED, check_finite: bool = True) -> Tree:
    """Model Stock (Jang et al., 2024, arXiv 2403.19522): `base + r mean(delta)`, with r of each layer's own.

    `r = T c / (1 + (T - 1) c)`, c the mean cosine between two task vectors of the layer: the point nearest to the
    centre that fine-tuned models scatter around. A mean cosine below zero counts as zero, which is the base, and
    so does the cosine with a task vector that is zero.

    Args:
      deltas: T >= 2.
      stacked: patterns of the paths of leaves whose axis 0 counts layers; default: the scanned blocks of our ViT. `()`
        where there are none.
    """
    deltas = aligned(base, deltas, least=2, check_finite=check_finite)
    tasks = len(deltas)

    def merged(x):
        flat = x.reshape(tasks, -1)
        norms = jnp.linalg.norm(flat, axis=1, keepdims=True)
        unit = flat / jnp.where(norms > 0, norms, 1)
        # the pairs' cosines sum to |Σ u|², less each with itself
        pairs = jnp.sum(jnp.square(unit.sum(axis=0))) - jnp.sum(norms > 0)
        cosine = jnp.clip(pairs / (tasks * (tasks - 1)), 0, 1)
        return tasks * cosine / (1 + (tasks - 1) * cosine) * jnp.mean(x, axis=0)

    of_layers = layers(base, deltas[0], stacked)
    mean = leafwise(lambda name, x: by_layer(merged, x, name in of_layers), deltas)
    return moved(base, mean, check_finite=check_finite)
