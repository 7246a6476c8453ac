"""Groups of leaves, and of layers of stacked leaves, with weights of their own: a number a task and group."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED, patterns
from compo_jax.compose.depth import depths
from compo_jax.compose.entries import whole
from compo_jax.compose.leaves import Stacked, assembled, layers
from compo_jax.tree import Tree

Grouping = str | Sequence[str]


class Groups(NamedTuple):
    """Which group each leaf is in, or each layer of a leaf that is a stack.

    Attributes:
      names: of the groups.
      places: by path, the leaf's group, or the groups of its layers (layers,).
    """

    names: tuple[str, ...]
    places: dict[str, np.ndarray]

    def combine(self, deltas: Sequence[Tree], weights: Float[Array, "tasks groups"]) -> Tree:
        """`Σ_t w_{t,g} delta_t`, in float32 at least."""
        return combined(self.places, deltas, weights)

    def compose(self, base: Tree, deltas: Sequence[Tree], weights: Any, *, check_finite: bool = True) -> Tree:
        """`base + Σ_t w_{t,g} delta_t`, rounded once; the deltas as of `with_holes`, weights (tasks, groups)."""
        weights = jnp.asarray(weights)

        def leaf(name, b, rows, _):
            return tree.add(whole(b), _weighed(self.places[name], weights, rows))

        return assembled(base, deltas, leaf, check_finite=check_finite)


def _weighed(place: Any, weights: Float[Array, "tasks groups"], rows: Sequence) -> Array:
    """`Σ_t w_t row_t` of a leaf, in float32 at least; None rows count as zero."""
    summed = 0
    for factors, row in zip(weights, rows, strict=True):
        if row is not None:
            row = jnp.asarray(whole(row), tree.wide_type(row))
            factor = factors.astype(row.dtype)[place]
            summed += factor.reshape(*factor.shape, *[1] * (row.ndim - factor.ndim)) * row
    return summed


def combined(places: dict[str, Any], deltas: Sequence[Tree], weights: Float[Array, "tasks groups"]) -> Tree:
    """`Σ_t w_{t,g} delta_t`, in float32 at least; `places` are those of `Groups`."""

    def one(name, *rows):
        return None if all(x is None for x in rows) else _weighed(places[name], weights, rows)

    return tree.map_with_name(one, *deltas)


def inner_products(
    places: dict[str, Any], zeros: Float[Array, " groups"], deltas: Sequence[Tree], vector: Tree
) -> Float[Array, "tasks groups"]:
    """Of each task's part in each group with a vector; `zeros`, one a group, are of the result's type."""
    others = tree.by_name(vector)

    def of(delta):
        summed = zeros
        for name, x in tree.by_name(delta).items():
            if name in others:
                place = jnp.asarray(places[name])
                x, y = (jnp.asarray(z, zeros.dtype).reshape(*place.shape, -1) for z in (x, others[name]))
                summed = summed.at[place].add(jnp.einsum("...n,...n->...", x, y, precision="highest"))
        return summed

    return jnp.stack([of(delta) for delta in deltas])


def grouped(base: Tree, deltas: Sequence[Tree], groups: Grouping = "layers", stacked: Stacked = STACKED) -> Groups:
    """Groups of what the deltas change.

    Args:
      groups: `layers`, a group for each layer (of the stacks, or by the first number in a path), and one for each
        branch at the root of the tree with leaves in no layer; `leaves`, one for each leaf, and each layer of a stacked
        one; `tasks`, one for all; or patterns of paths, a group for each, the first match winning, one for the rest.

    ValueError for another word, and for a pattern that is the first match of no leaf.
    """
    present = jax.tree.map(lambda _, *d: next((x for x in d if x is not None), None), base, *deltas)
    shapes = {name: np.shape(x) for name, x in tree.by_name(present).items()}
    labels = _labels(base, present, shapes, groups, stacked)
    names = tuple(dict.fromkeys(label for row in labels.values() for label in np.ravel(row).tolist()))
    number = {label: i for i, label in enumerate(names)}
    return Groups(names, {name: np.vectorize(number.get, otypes=[int])(row) for name, row in labels.items()})


def _labels(base: Tree, present: Tree, shapes: dict, groups: Grouping, stacked: Stacked) -> dict[str, np.ndarray]:
    """By path, the leaf's label or those of its layers."""
    if groups == "tasks":
        return {name: np.array("all") for name in shapes}
    if groups == "leaves":
        of_layers = layers(base, present, stacked)
        numbered = lambda name: np.array([f"{name}[{i}]" for i in range(shapes[name][0])])
        return {name: numbered(name) if name in of_layers else np.array(name) for name in shapes}
    if groups == "layers":
        places = depths(base, present, stacked)
        labels = {}
        for name in shapes:
            if name not in places:
                labels[name] = np.array(re.split(r"[/.]", name)[0])
            elif places[name].count is None:
                labels[name] = np.array(f"{places[name].stack}{places[name].first}")
            else:
                labels[name] = np.array([f"{places[name].stack}{i}" for i in range(places[name].count)])
        return labels
    if isinstance(groups, str) and not any(c in groups for c in "/.*^$[(\\|"):
        raise ValueError(f"groups are 'layers', 'leaves', 'tasks' or a list of patterns of paths, not {groups!r}")
    chosen = patterns(groups)
    labels = {name: np.array(tree.first_match(name, [(p, p) for p in chosen], "the rest")) for name in shapes}
    if unused := [p for p in chosen if p not in {str(label) for label in labels.values()}]:
        raise ValueError(
            f"the groups {', '.join(unused)} are of no leaf that isn't in one before; the modules change "
            f"{', '.join(shapes)}"
        )
    return labels
