"""What the rules take: deltas that fit their base, with the same holes, and one weight for each."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from compo_jax import tree

Tree = Any
Scalar = float | int | Array
Weights = Num[Array, " tasks"] | Num[np.ndarray, " tasks"] | Sequence


def aligned(base: Tree, deltas: Sequence[Tree], least: int = 1) -> list[Tree]:
    """The deltas, shaped as `base`, with None where none of them changes a leaf and zeros where some do.

    ValueError for fewer than `least` deltas, one that doesn't fit the base (with all paths), or one that moves a leaf
    that is no floating-point array.
    """
    deltas = list(deltas)
    if len(deltas) < least:
        raise ValueError(f"{len(deltas)} modules were given, and this rule composes {least} or more")
    for t, delta in enumerate(deltas):
        tree.require_like(delta, base, f"delta {t}")
        tree.require_float(delta, f"delta {t}")
    holed = [tree.spread(delta, base) for delta in deltas]
    moved = jax.tree.map(lambda b, *d: None if all(x is None for x in d) else b, base, *holed)
    tree.require_float(moved, "what the deltas are added to")

    def filled(*leaves):
        like = next((x for x in leaves if x is not None), None)
        return [jnp.zeros_like(like) if x is None and like is not None else x for x in leaves]

    lists = jax.tree.map(lambda _, *d: filled(*d), base, *holed)
    return [jax.tree.map(lambda _, row, t=t: row[t], base, lists) for t in range(len(deltas))]


def same(trees: Sequence[Tree], least: int = 1) -> list[Tree]:
    """The trees; ValueError where they are fewer than `least` or differ in structure, holes included, or in shapes."""
    trees = list(trees)
    if len(trees) < least:
        raise ValueError(f"{len(trees)} models were given, and this rule takes {least} or more")
    for t, other in enumerate(trees):
        tree.require_float(other, f"tree {t}")
        tree.require_like(other, trees[0], f"tree {t}")
        if jax.tree.structure(other) != jax.tree.structure(trees[0]):
            raise ValueError(f"tree {t} has another structure than tree 0: their None holes or containers differ")
    return trees


def weigh(weights: Weights | None, tasks: int, default: Scalar | None = None, *, sign: bool = True) -> list:
    """One weight a module; without any, `default` for each, 1/T where that is None.

    ValueError for another number of weights, one that isn't finite, and, with `sign=False`, for a negative one or a sum
    of zero: such rules minimise weighted losses.
    """
    if weights is None:
        return [1 / tasks if default is None else default] * tasks
    if len(weights) != tasks:
        raise ValueError(f"{len(weights)} weights were given for {tasks} modules: one for each")
    if tree.concrete(weights):
        values = np.asarray(weights, np.float64)
        if not np.all(np.isfinite(values)):
            raise ValueError(f"the weights {values} aren't all finite")
        if not sign and (np.any(values < 0) or values.sum() <= 0):
            raise ValueError(
                f"the weights {values} can't be negative, nor all zero, in this rule: to subtract a module, negate "
                "its delta"
            )
    return list(weights)


def mean_delta(deltas: Sequence[Tree], weights: Sequence) -> Tree:
    """`Σ w_t delta_t / Σ w_t`."""
    total = sum(weights)
    return tree.weighted_sum(deltas, [w / total for w in weights])


def leafwise(function: Callable[[str, Array], Array], trees: Sequence[Tree]) -> Tree:
    """`function(path, leaves (tasks, ...))` for each leaf of trees with the same holes."""
    return tree.map_with_name(lambda name, *x: None if x[0] is None else function(name, jnp.stack(x)), *trees)


def by_layer(
    function: Callable[[Array], Array], name: str, leaves: Num[Array, "tasks ..."], stacked: str | Sequence[str] | None
) -> Array:
    """`function(leaves (tasks, ...))` of a leaf, or of each of its layers where axis 0 of the leaf counts layers.

    `stacked`: patterns of the paths of such leaves; None: the leaves of three axes, (layers, in, out).
    """
    patterns = [stacked] if isinstance(stacked, str) else stacked
    of_layers = leaves.ndim == 4 if patterns is None else tree.first_match(name, [(p, True) for p in patterns], False)
    return jax.lax.map(function, jnp.moveaxis(leaves, 1, 0)) if of_layers else function(leaves)
