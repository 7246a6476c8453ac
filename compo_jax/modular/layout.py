"""Where a modular network's variables have their axes of tasks, layers and templates, and how these are cut."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from compo_jax import tree
from compo_jax.modular.net import ModularNet
from compo_jax.tree import Tree

Axis = Literal["task", "layer", "template"]


def axes(net: ModularNet, name: str) -> tuple[str, ...]:
    """What the leading axes of the leaf at path `name` of the network's variables are."""
    norm = {"task": ("task", "layer"), "layer": ("layer",), "template": ("template",)}[net.bn]
    statistics = ("layer",) if net.bn == "layer" else ("task", "layer")
    rules = (
        ("^params/templates/", ("template",)),
        ("^params/route$", ("task", "layer", "template")),
        ("^params/norm/stem/", norm[:1] if net.bn == "task" else ()),
        ("^params/norm/blocks/", norm),
        ("^batch_stats/tasks/stem/", statistics[:-1]),
        ("^batch_stats/tasks/layers/", statistics),
    )
    return tree.first_match(name, rules, ())


def take(net: ModularNet, variables: Tree, axis: Axis, indices: Sequence[int] | Int[np.ndarray, " n"]) -> Tree:
    """The variables with entries `indices` of that axis, wherever it occurs; ValueError for one that isn't there."""
    size = {"task": len(net.classes), "layer": net.layers, "template": net.templates}[axis]
    chosen = np.asarray(indices)
    if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"{axis}s are chosen by their numbers, not by {chosen.dtype}: np.flatnonzero has a mask's")
    if chosen.ndim != 1 or not chosen.size or chosen.min() < 0 or chosen.max() >= size:
        raise ValueError(f"{axis}s {chosen.tolist()} were asked of a network that has {size}: 0 to {size - 1}")

    def cut(name, leaf):
        found = axes(net, name)
        return (
            jnp.asarray(np.take(np.asarray(leaf), chosen, found.index(axis))) if axis in found else leaf
        )  # compiles nothing

    return tree.map_with_name(cut, variables)


def join(net: ModularNet, axis: Axis, first: Tree, second: Tree) -> Tree:
    """Two networks' variables end to end along that axis; where it doesn't occur, the first's."""

    def both(name, a, b):
        found = axes(net, name)
        return jnp.asarray(np.concatenate([a, b], found.index(axis))) if axis in found else a

    return tree.map_with_name(both, first, second)


def own(net: ModularNet, variables: Tree) -> tuple[Tree, Tree]:
    """(routes, heads and BN of single tasks, what all tasks share), each with None holes for the other."""
    mine = r"^params/head_\d+/"
    return tree.partition(
        variables, lambda name: "task" in axes(net, name) or bool(tree.first_match(name, [(mine, 1)]))
    )
