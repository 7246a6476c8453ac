"""Task vectors, and their weighted sums."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.adapters.adapter import alike
from compo_jax.compose.entries import sums_are_finite
from compo_jax.compose.leaves import add_weighted
from compo_jax.compose.modules import require_floating, with_holes
from compo_jax.compose.numbers import Scalar, Weights, require_number, weigh, wide_number
from compo_jax.tree import Tree


def task_vector(params: Tree, base: Tree, *, check_finite: bool = True) -> Tree:
    """`params - base`, a delta in the base's container (dict or FrozenDict); None leaves of `params` stay None, no
    change.

    ValueError where the two don't fit (with all paths), a leaf is no floating-point array, or the trained parameters
    hold NaN or an infinity, or are too far from the base for their type (`check_finite`).
    """
    what, params = "the trained parameters", alike(params, base)
    tree.require_like(params, base, what)
    if not jax.tree.leaves(params):
        raise ValueError(f"{what} have no leaves: there is nothing to take a difference of")
    require_floating(params, what)
    params = tree.spread(params, base)
    require_floating(jax.tree.map(lambda b, p: None if p is None else b, base, params), "the base")
    if check_finite:
        tree.require_finite(params, what)

    def one(b, p):
        if p is None:
            return None
        p, b = (x if hasattr(x, "astype") else np.asarray(x) for x in (p, b))
        if p.dtype != b.dtype:
            p, b = (x.astype(jnp.promote_types(p.dtype, b.dtype)) for x in (p, b))
        with np.errstate(over="ignore"):
            return p - b

    delta = jax.tree.map(one, base, params)
    leaves = jax.tree.leaves(delta)
    if check_finite and tree.concrete(leaves) and not sums_are_finite(leaves):
        tree.require_held(delta, base)
    return delta


def compose(base: Tree, deltas: Sequence[Tree], weights: Weights | None = None, *, check_finite: bool = True) -> Tree:
    """`base + Σ w_t delta_t`: the weighted average of the models where the weights, default 1/T, sum to one.

    The sum grows in float32 at least, and is rounded to the base's types once; so it is in all rules.

    Args:
      deltas: T >= 1 trees shaped as `base`, None where nothing changes (`adapter.delta`, `task_vector`).
      weights: (tasks,), of any sign.
      check_finite: ValueError, naming the module and its leaves, where a delta holds NaN or an infinity; False lets
        them through. Nothing can be looked at under jit.

    Leaves that no delta changes are the base's arrays. ValueError where a delta doesn't fit the base (with all
    paths), moves an integer leaf, or has no weight; so do all rules that take a base and deltas. A UserWarning where a
    delta looks like a model's parameters, not like their difference from the base.
    """
    deltas = with_holes(base, deltas)
    return add_weighted(base, deltas, weigh(weights, len(deltas)), check_finite=check_finite)


def task_arithmetic(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    scale: Scalar = 0.3,
    check_finite: bool = True,
) -> Tree:
    """`base + scale Σ w_t delta_t`, weights default 1 (Ilharco et al., 2023, arXiv 2212.04089)."""
    deltas = with_holes(base, deltas)
    require_number("scale", scale, "a finite number")
    scaled = [wide_number(scale) * w for w in weigh(weights, len(deltas), 1.0)]
    return add_weighted(base, deltas, scaled, check_finite=check_finite)
