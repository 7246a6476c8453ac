"""How far from the base towards the average: the answer of the angles between the task vectors."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.entries import entrywise, on_host, products, unit_of
from compo_jax.compose.leaves import Stacked, add_row, assembled, layers, stack
from compo_jax.compose.modules import with_zeros
from compo_jax.tree import Tree


def model_stock(base: Tree, deltas: Sequence[Tree], *, stacked: Stacked = STACKED, check_finite: bool = True) -> Tree:
    """Model Stock (Jang et al., 2024, arXiv 2403.19522): `base + r mean(delta)`, with an r for each layer.

    `r = T c / (1 + (T - 1) c)`, c the mean cosine between two task vectors of the layer: the point nearest to the
    centre that fine-tuned models scatter around. A mean cosine below zero counts as zero, which is the base, and
    so does the cosine with a task vector that is zero.

    Args:
      deltas: T >= 2.
      stacked: patterns of the paths of leaves whose axis 0 counts layers; default: the scanned blocks of our ViT. `()`
        where there are none.
    """
    deltas = with_zeros(base, deltas, least=2, check_finite=check_finite)
    tasks = len(deltas)

    def share(products):  # (..., tasks, tasks)
        squares = jnp.diagonal(products, axis1=-2, axis2=-1)
        lengths = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        cosines = products / lengths[..., :, None] / lengths[..., None, :]
        # the pairs', without those of each with itself
        pairs = jnp.sum(cosines, axis=(-2, -1)) - jnp.sum(squares > 0, axis=-1)
        cosine = jnp.clip(pairs / (tasks * (tasks - 1)), 0, 1)
        return cosine / (1 + (tasks - 1) * cosine)  # a task's: r / T

    def layer(b, *rows):
        inner = products(rows)
        part = share(jnp.asarray(inner / (np.max(np.diagonal(inner)) or 1), tree.wide_type(*rows)))
        return entrywise(add_row, [b, *rows], [part] * tasks)

    def leaf(name, b, rows, _):
        if on_host(b, *rows):
            if name not in of_layers:
                return layer(b, *rows)
            return jnp.stack([layer(*x) for x in zip(*map(np.asarray, (b, *rows)), strict=True)])
        x = stack(rows)
        unit = unit_of(x)
        x = (x / unit).reshape(tasks, x.shape[1] if name in of_layers else 1, -1)
        shares = share(jnp.einsum("sln,tln->lst", x, x, precision="highest"))
        return tree.add(b, (shares[:, None] * jnp.sum(x, axis=0)).reshape(np.shape(b)), unit)

    of_layers = layers(base, deltas[0], stacked)
    return assembled(base, deltas, leaf, check_finite=check_finite)
