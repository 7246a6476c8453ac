"""Matrices whose outputs come first, (out, in, ...) as PyTorch and Equinox have them, for rules that tell inputs from
outputs: turned to (in, ..., out), and back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from compo_jax import tree
from compo_jax.adapters.adapter import is_stacked, patterns
from compo_jax.adapters.low_rank import FACTORS
from compo_jax.compose.entries import Deferred
from compo_jax.compose.leaves import Stacked
from compo_jax.tree import Tree

#: Weights as PyTorch's models name them, but for tables, a row a token or a position, whose columns are the outputs.
#: What has more than two axes is no table.
PYTORCH = (
    r"^(?!.*(?<!patch_)(?<!class_)embed(?!_out|dings_project)[^.]*\.weight$"
    r"|.*\b(wte|wpe|shared|relative_attention_bias)\.weight$).*weight$"
)


class Turned(NamedTuple):
    """Leaves whose outputs come first.

    Attributes:
      axes: their paths, and the axis of each that counts outputs: 0, or 1 in a stack of layers.
    """

    axes: dict[str, int]

    def inputs_first(self, params: Tree) -> Tree:
        """These leaves, LoRA's two factors as well, with the outputs on the last axis."""

        def one(path, x):
            axis = self.axes.get(tree.path_name(path))
            if axis is None or x is None:
                return x
            if FACTORS.holds(x):
                return {"a": np.swapaxes(x["b"], -1, -2), "b": np.swapaxes(x["a"], -1, -2)}
            return _moved(x, axis, -1)

        at_leaf = lambda path, _: tree.path_name(path) in self.axes
        return jax.tree_util.tree_map_with_path(one, params, is_leaf=at_leaf, is_leaf_takes_path=True)

    def outputs_first(self, params: Tree) -> Tree:
        """The inverse, of arrays."""
        return tree.map_with_name(lambda n, x: _moved(x, -1, self.axes[n]) if n in self.axes else x, params)


def _moved(leaf: Any, axis: int, to: int) -> Any:
    if not isinstance(leaf, Deferred):
        return np.moveaxis(leaf, axis, to)  # of JAX's arrays too
    shape = np.moveaxis(np.broadcast_to(0, leaf.shape), axis, to).shape
    return Deferred(shape, leaf.dtype, lambda: np.moveaxis(np.asarray(leaf), axis, to).reshape(-1))


def turned(base: Tree, outputs_first: str | Sequence[str], stacked: Stacked) -> Turned:
    """The leaves of `base` with two axes and more, beside that of layers, whose paths match the patterns.

    ValueError for a pattern that can't be read or, unless it is PyTorch's, is for no such leaf.
    """
    of_layers = {name: int(is_stacked(name, stacked)) for name in tree.names(base)}
    dimensions = {name: np.ndim(leaf) - of_layers[name] for name, leaf in tree.by_name(base).items()}
    matrices = [name for name, count in dimensions.items() if count > 1]
    chosen: set[str] = set()
    for pattern in patterns(outputs_first):
        found = {name for name in matrices if is_stacked(name, pattern)}
        if pattern == PYTORCH:
            found |= {name for name in matrices if dimensions[name] > 2 and name.endswith("weight")}
        elif not found:
            raise ValueError(f"outputs_first={pattern!r} matches no matrix; these are {', '.join(matrices) or 'none'}")
        chosen |= found
    return Turned({name: of_layers[name] for name in matrices if name in chosen})
