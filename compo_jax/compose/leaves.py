"""From the modules' leaves to the merged model: leaf by leaf, layer by layer, and rounded once."""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED, is_stacked, patterns
from compo_jax.compose.numbers import Scalar
from compo_jax.tree import Tree

Stacked = str | Sequence[str]


def mean_delta(deltas: Sequence[Tree], weights: Sequence) -> Tree:
    """`Σ w_t delta_t / Σ w_t`, unrounded."""
    total = sum(weights)
    return tree.weighted_sum(deltas, [w / total for w in weights], wide=True)


def leafwise(function: Callable[[str, Array], Array], trees: Sequence[Tree]) -> Tree:
    """`function(path, leaves (tasks, ...))` for each leaf of trees with the same holes; the leaves in float32 at least.

    A leaf without entries is left as it is.
    """

    def one(name, *leaves):
        if leaves[0] is None:
            return None
        wide = tree.wide_type(*leaves)
        stack = jnp.stack([jnp.asarray(x, wide) for x in leaves])
        return function(name, stack) if stack.size else stack[0]

    return tree.map_with_name(one, *trees)


def rounded(wide: Tree, trees: Sequence[Tree]) -> Tree:
    """`wide` in the common types of `trees`."""
    return jax.tree.map(lambda x, *like: x.astype(jnp.result_type(*like)), wide, *trees)


def layers(base: Tree, delta: Tree, stacked: Stacked) -> set[str]:
    """The paths of the leaves of `delta` whose axis 0 counts layers, by the patterns `stacked`.

    ValueError for a pattern that can't be read or, unless it is a default, matches no leaf of `base`, for a scalar
    among the leaves, and where one stack's have different numbers of layers: then their axis 0 counts something else.
    """
    shapes = dict(zip(tree.names(delta), map(np.shape, jax.tree.leaves(delta)), strict=True))
    depths: dict[str, dict[str, int]] = {}
    for pattern in patterns(stacked):
        there = {name: name[: match.end()] for name in shapes if (match := re.search(pattern, name))}
        if not there and pattern not in STACKED and not any(re.search(pattern, name) for name in tree.names(base)):
            raise ValueError(f"stacked={pattern!r} matches no parameter; these are {', '.join(tree.names(base))}")
        for name, stack in there.items():
            if not shapes[name]:
                raise ValueError(f"{name} is a scalar and has no axis of layers: narrow the patterns {stacked!r}")
            depths.setdefault(stack, {})[name] = shapes[name][0]
    for stack, found in depths.items():
        if len(set(found.values())) > 1:
            told = ", ".join(f"{name} {depth}" for name, depth in found.items())
            raise ValueError(
                f"the leaves under {stack} would be stacks of different numbers of layers ({told}): say which leaves "
                "have layers on axis 0 by stacked=, patterns of their paths, () for none"
            )
    return {name for name in shapes if is_stacked(name, stacked)}


def by_layer(function: Callable[[Array], Array], leaves: Num[Array, "tasks ..."], of_layers: bool) -> Array:
    """`function(leaves (tasks, ...))` of a leaf, or of each of its layers, one after another."""
    return jax.lax.map(function, jnp.moveaxis(leaves, 1, 0)) if of_layers else function(leaves)


def moved(base: Tree, delta: Tree, scale: Scalar = 1.0, *, check_finite: bool = True) -> Tree:
    """`base + scale * delta` in the base's types, rounded once: a rule's last step. Errors as `require_sound`."""
    params = tree.add(base, delta, scale)
    if check_finite:
        require_sound(params, base)
    return params


def require_sound(params: Tree, base: Tree, deltas: Sequence[Tree] = ()) -> None:
    """ValueError where NaN or an infinity is in what was merged, naming the delta or the base that it came from.

    An infinity that is the base's own and still there is none of the merge's: biases of masked classes are -inf. One
    pass over the leaves that aren't the base's own; nothing is looked at while a function is traced.
    """
    pairs = list(zip(*map(jax.tree.leaves, (params, base)), strict=True))
    merged = [p for p, b in pairs if p is not b]
    if not tree.concrete(merged):
        return
    # A sum is finite only where all its terms are, and takes a quarter of the time that looking at each does.
    sums = jax.device_get([jnp.sum(x, dtype=tree.wide_type(x)) for x in merged])
    if np.all(np.isfinite(sums)):
        return
    for t, delta in enumerate(deltas):
        tree.require_finite(delta, f"delta {t}")
    kept = {name: jnp.isfinite(p) | (p == b) for name, (p, b) in zip(tree.names(params), pairs, strict=True)}
    bad = {n: leaves for n, leaves in zip(kept, pairs, strict=True) if leaves[0] is not leaves[1] and not kept[n].all()}
    tree.require_finite({name: jnp.where(kept[name], 0, b) for name, (_, b) in bad.items()}, "the base")
    if bad:
        raise ValueError(
            f"numbers too large for their type come out in {', '.join(f'{n} ({p.dtype})' for n, (p, _) in bad.items())}"
            ", though all that went in are finite: take smaller weights, a smaller scale or rate, or a wider type"
        )
