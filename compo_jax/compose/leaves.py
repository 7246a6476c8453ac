"""From the modules' leaves to the merged model: leaf by leaf, layer by layer, and rounded once."""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED, is_stacked, patterns
from compo_jax.compose.entries import Deferred, entrywise, filled, sums_are_finite, total, whole
from compo_jax.compose.numbers import Scalar
from compo_jax.tree import Tree

Stacked = str | Sequence[str]


def mean_delta(deltas: Sequence[Tree], weights: Sequence) -> Tree:
    """`Σ w_t delta_t / Σ w_t`, unrounded."""
    total = sum(weights)
    return tree.weighted_sum(deltas, [w / total for w in weights], wide=True)


def stack(leaves: Sequence) -> Array:
    """(tasks, ...), in float32 at least; of leaves that are read, one at a time is in memory beside the result."""
    wide = tree.wide_type(*leaves)
    if all(isinstance(x, Deferred) for x in leaves):
        return filled((len(leaves), *np.shape(leaves[0])), wide, leaves)
    return jnp.stack([jnp.asarray(whole(x), wide) for x in leaves])


def assembled(
    base: Tree, deltas: Sequence[Tree], leaf: Callable[..., Array], *, check_finite: bool, beside: Sequence[Tree] = ()
) -> Tree:
    """The merged model, one leaf after another: a rule's last step.

    Args:
      leaf: `(path, base's leaf, the deltas' leaves, those of the trees beside) -> merged leaf`, in the base's type;
        None in the lists where a tree has none.
      beside: what else is read leaf by leaf, such as curvature.

    Where no delta has a leaf, it is the base's. A leaf of the base that is `Deferred` stays so, and is made when it
    is read. Errors as `require_sound`.
    """
    count = len(deltas)

    def one(name, b, *rows):
        if all(x is None for x in rows[:count]) or not np.size(b):
            return b
        if isinstance(b, Deferred):
            return Deferred(b.shape, b.dtype, lambda: made(name, b, *rows))
        return leaf(name, b, rows[:count], rows[count:])

    def made(name, b, *rows):
        merged = leaf(name, b, rows[:count], rows[count:])
        if check_finite:
            require_sound({name: merged}, {name: b})
        return np.asarray(merged).reshape(-1)

    params = tree.map_with_name(one, base, *deltas, *beside)
    if check_finite:
        require_sound(params, base, deltas)
    return params


def add_row(weights: Array, b: Array, *rows: Array) -> Array:
    """`b + Σ w_t row_t`, for `entrywise`."""
    return b + total(weights, *rows)


def add_weighted(base: Tree, deltas: Sequence[Tree], weights: Sequence, *, check_finite: bool) -> Tree:
    """`base + Σ w_t delta_t`, rounded once."""

    def leaf(_, b, row, __):
        shares, present = zip(*[(w, x) for w, x in zip(weights, row, strict=True) if x is not None], strict=True)
        return entrywise(add_row, [b, *present], shares)

    return assembled(base, deltas, leaf, check_finite=check_finite)


def layers(base: Tree, delta: Tree, stacked: Stacked) -> set[str]:
    """The paths of the leaves of `delta` whose axis 0 counts layers, by the patterns `stacked`.

    ValueError for a pattern that can't be read or, unless it is a default, matches no leaf of `base`, for a scalar
    among the leaves, and where one stack's have different numbers of layers: then their axis 0 counts something else.
    """
    shapes = {name: np.shape(leaf) for name, leaf in tree.by_name(delta).items()}
    depths: dict[str, dict[str, int]] = {}
    for pattern in patterns(stacked):
        there = {name: name[: match.end()] for name in shapes if (match := re.search(pattern, name))}
        if not there and pattern not in STACKED and not any(re.search(pattern, name) for name in tree.names(base)):
            raise ValueError(f"stacked={pattern!r} matches no parameter; these are {', '.join(tree.names(base))}")
        for name, stack in there.items():
            if not shapes[name]:
                raise ValueError(f"{name} is a scalar and has no axis of layers: narrow the patterns {stacked!r}")
            depths.setdefault(stack, {})[name] = shapes[name][0]
    for stack, counts in depths.items():
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {depth}" for name, depth in counts.items())
            raise ValueError(
                f"the leaves under {stack} would be stacks of different numbers of layers ({listed}): say which leaves "
                "have layers on axis 0 by stacked=, patterns of their paths, () for none"
            )
    return {name for name in shapes if is_stacked(name, stacked)}


def by_layer(function: Callable[[Array], Array], leaves: Num[Array, "tasks ..."], of_layers: bool) -> Array:
    """`function(leaves (tasks, ...))` of a leaf, or of each of its layers, one after another."""
    return jax.lax.map(function, jnp.moveaxis(leaves, 1, 0)) if of_layers else function(leaves)


def add_delta(base: Tree, delta: Tree, scale: Scalar = 1.0, *, check_finite: bool = True) -> Tree:
    """`base + scale * delta` in the base's types, rounded once: a rule's last step. Errors as `require_sound`."""
    params = tree.add(base, delta, scale)
    if check_finite:
        require_sound(params, base)
    return params


def require_sound(params: Tree, base: Tree, deltas: Sequence[Tree] = ()) -> None:
    """ValueError where NaN or an infinity is in what was merged, naming the delta or the base that it came from.

    An infinity that was in the base already is none of the merge's: biases of masked classes are -inf. One
    pass over the leaves that aren't the base's; nothing is looked at while a function is traced.
    """
    pairs = list(zip(*map(jax.tree.leaves, (params, base)), strict=True))
    merged = [p for p, b in pairs if p is not b and not isinstance(p, Deferred)]
    if not tree.concrete(merged) or sums_are_finite(merged):
        return
    for t, delta in enumerate(deltas):
        tree.require_finite(delta, f"delta {t}")
    pairs = [(p, whole(b)) for p, b in pairs]
    kept = {name: jnp.isfinite(p) | (p == b) for name, (p, b) in zip(tree.names(params), pairs, strict=True)}
    bad = {n: leaves for n, leaves in zip(kept, pairs, strict=True) if leaves[0] is not leaves[1] and not kept[n].all()}
    tree.require_finite({name: jnp.where(kept[name], 0, b) for name, (_, b) in bad.items()}, "the base")
    if bad:
        tree.require_held(*({name: pair[i] for name, pair in bad.items()} for i in (0, 1)))
