"""Where a modular network's variables have their axes of tasks, layers and templates, and how these are cut."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from compo_jax import tree
from compo_jax.modular.net import ModularNet, Network
from compo_jax.tree import Tree

Axis = Literal["task", "layer", "template"]


class Parts(NamedTuple):
    """Routes, heads and BN of single tasks; what all tasks share."""

    of_tasks: Tree
    shared: Tree


def axes(net: ModularNet, name: str) -> tuple[str, ...]:
    """What the leading axes of the leaf at path `name` of the network's variables are."""
    norm = {"task": ("task", "layer"), "layer": ("layer",), "template": ("template",)}[net.bn]
    group = () if net.groups == 1 else ("group",)
    statistics = ("layer",) if net.bn == "layer" else ("task", "layer")
    rules = (
        ("^params/templates/", ("template",)),
        ("^params/route$", ("task", "layer", *group, "template")),
        ("^params/gain$", ("task", "layer")),
        ("^params/norm/stem/", norm[:1] if net.bn == "task" else ()),
        ("^params/norm/blocks/", norm),
        ("^batch_stats/tasks/stem/", statistics[:-1]),
        ("^batch_stats/tasks/layers/", statistics),
    )
    return tree.first_match(name, rules, ())


def take(network: Network, axis: Axis, indices: Sequence[int] | Int[np.ndarray, " n"]) -> Tree:
    """The variables with entries `indices` of that axis, wherever it occurs; ValueError for one that isn't there."""
    net, variables = network
    size = {"task": len(net.classes), "layer": net.layers, "template": net.templates}[axis]
    chosen = np.asarray(indices)
    if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"{axis}s are chosen by their numbers, not by {chosen.dtype}: np.flatnonzero has a mask's")
    if chosen.ndim != 1 or not chosen.size or chosen.min() < 0 or chosen.max() >= size:
        raise ValueError(f"{axis}s {chosen.tolist()} were asked of a network that has {size}: 0 to {size - 1}")

    def cut(name, leaf):
        leading = axes(net, name)
        if axis not in leading:
            return leaf
        return jnp.asarray(np.take(np.asarray(leaf), chosen, leading.index(axis)))  # compiles nothing

    return tree.map_with_name(cut, variables)


def join(net: ModularNet, axis: Axis, first: Tree, second: Tree) -> Tree:
    """Two networks' variables end to end along that axis; where it doesn't occur, the first's."""

    def both(name, a, b):
        leading = axes(net, name)
        return jnp.asarray(np.concatenate([a, b], leading.index(axis))) if axis in leading else a

    return tree.map_with_name(both, first, second)


def parted(network: Network) -> Parts:
    """The variables in two, each with None holes for the other."""
    net, variables = network
    head = r"^params/head_\d+/"
    return Parts(
        *tree.partition(variables, lambda name: "task" in axes(net, name) or bool(tree.first_match(name, [(head, 1)])))
    )
