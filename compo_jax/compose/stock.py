"""How far from the base towards the average: the answer of the angles between the task vectors."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from compo_jax import tree
from compo_jax.compose.modules import aligned, by_layer, leafwise

Tree = Any


def model_stock(base: Tree, deltas: Sequence[Tree], *, stacked: str | Sequence[str] | None = None) -> Tree:
    """Model Stock (Jang et al., 2024, arXiv 2403.19522): `base + r mean(delta)`, with r of each layer's own.

    `r = T c / (1 + (T - 1) c)`, c the mean cosine between two task vectors of the layer: the point nearest to the
    centre that fine-tuned models scatter around. A mean cosine below zero counts as zero, which is the base, and
    so does the cosine with a task vector that is zero.

    Args:
      deltas: T >= 2.
      stacked: patterns of the paths of leaves whose axis 0 counts layers; default: leaves of three axes.
    """
    deltas = aligned(base, deltas, least=2)
    tasks = len(deltas)

    def merged(x):
        flat = x.reshape(tasks, -1)
        norms = jnp.linalg.norm(flat, axis=1, keepdims=True)
        unit = flat / jnp.where(norms > 0, norms, 1)
        # the pairs' cosines sum to |Σ u|², less each with itself
        pairs = jnp.sum(jnp.square(unit.sum(axis=0))) - jnp.sum(norms > 0)
        cosine = jnp.clip(pairs / (tasks * (tasks - 1)), 0, 1)
        return tasks * cosine / (1 + (tasks - 1) * cosine) * jnp.mean(x, axis=0)

    return tree.add(base, leafwise(lambda name, x: by_layer(merged, name, x, stacked), deltas))
