"""Task vectors, and their weighted sums."""

from collections.abc import Sequence
from typing import Any

import jax

from compo_jax import tree
from compo_jax.compose.modules import Scalar, Weights, aligned, weigh

Tree = Any


def task_vector(params: Tree, base: Tree) -> Tree:
    """`params - base`, a delta shaped as `base`; None leaves of `params` stay None, no change.

    ValueError where the two don't fit (with all paths), or a leaf is no floating-point array.
    """
    tree.require_like(params, base, "the trained parameters")
    tree.require_float(params, "the trained parameters")
    return jax.tree.map(lambda b, p: None if p is None else p - b, base, tree.spread(params, base))


def compose(base: Tree, deltas: Sequence[Tree], weights: Weights | None = None) -> Tree:
    """`base + Σ w_t delta_t`: the weighted average of the models where the weights, default 1/T, sum to one.

    Args:
      deltas: T >= 1 trees shaped as `base`, None where nothing changes (`adapter.delta`, `task_vector`).
      weights: (tasks,), of any sign.

    Leaves that no delta changes are the base's own arrays. ValueError where a delta doesn't fit the base (with all
    paths), moves an integer leaf, or has no weight; so do all rules that take a base and deltas.
    """
    deltas = aligned(base, deltas)
    return tree.add(base, tree.weighted_sum(deltas, weigh(weights, len(deltas))))


def task_arithmetic(base: Tree, deltas: Sequence[Tree], weights: Weights | None = None, *, scale: Scalar = 0.3) -> Tree:
    """`base + scale Σ w_t delta_t`, weights default 1 (Ilharco et al., 2023, arXiv 2212.04089)."""
    deltas = aligned(base, deltas)
    return tree.add(base, tree.weighted_sum(deltas, [scale * w for w in weigh(weights, len(deltas), 1.0)]))
