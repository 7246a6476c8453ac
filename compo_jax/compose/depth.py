"""Where a leaf is in the network's depth: the layers of a stack on axis 0, and those that are numbered in paths."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED, patterns
from compo_jax.compose.entries import Deferred, computed, entrywise
from compo_jax.compose.leaves import Stacked, assembled, layers
from compo_jax.compose.numbers import Scalar, require_number, wide_number
from compo_jax.tree import Tree

#: Of a layer: blocks/3/kernel, encoder.layer.3.weight, as Flax has it blocks/Block_3/kernel, and of a ResNet its stage,
#: layer3.0.conv1.weight.
_NUMBER = re.compile(r"(?:^|[/.])(?:[^/.]*(?:[Bb]lock|[Ll]ayer|[Ss]tage)_?)?(\d+)(?=[/.])")


class Depth(NamedTuple):
    """The layers that a leaf has a part in.

    Attributes:
      stack: what the layers share, the beginning of the path.
      first: the leaf's first layer, or its only one.
      count: layers on axis 0; None where the whole leaf is in one layer.
    """

    stack: str
    first: int
    count: int | None


def depths(base: Tree, delta: Tree, stacked: Stacked) -> dict[str, Depth]:
    """By path, of the leaves of `delta` that are in a layer: by the patterns `stacked`, or else by the first number in
    the path. Errors as `leaves.layers`."""
    of_layers, places = layers(base, delta, stacked), {}
    for name, leaf in tree.by_name(delta).items():
        if name in of_layers:
            match = next(m for pattern in patterns(stacked) if (m := re.search(pattern, name)))
            places[name] = Depth(name[: match.end()], 0, np.shape(leaf)[0])
    return places | {name: place for name, place in _numbered(tree.names(delta)).items() if name not in places}


def _numbered(names: Iterable[str]) -> dict[str, Depth]:
    """Of the leaves with a number in their paths."""
    found = {name: match for name in names if (match := _NUMBER.search(name))}
    return {name: Depth(name[: match.start(1)], int(match[1]), None) for name, match in found.items()}


def ends(places: Iterable[Depth]) -> dict[str, tuple[int, int]]:
    """The first and the last layer of each stack."""
    found: dict[str, tuple[int, int]] = {}
    for stack, first, count in places:
        lowest, last = found.get(stack, (first, first))
        found[stack] = (min(lowest, first), max(last, first + (count or 1) - 1))
    return found


def layer_scales(base: Tree, delta: Tree, alpha: Scalar, beta: Scalar, stacked: Stacked = STACKED) -> dict[str, Any]:
    """By path, LiNeS' factor of a leaf, or of each of its layers.

    ValueError where no leaf is in a layer: then there is nothing to scale by depth.
    """
    require_number("alpha", alpha, "the scale of the first layer, a finite number")
    require_number("beta", beta, "what the last layer's scale is above the first one's, a finite number")
    places, alpha, beta = depths(base, delta, stacked), wide_number(alpha), wide_number(beta)
    if not places:
        raise ValueError(
            "no leaf is in a layer: none matches the patterns stacked=, and no path has a layer's number in it, as "
            f"blocks/3/kernel has. The modules change {', '.join(tree.names(delta))}"
        )
    network = ends((*places.values(), *_numbered(tree.names(base)).values()))  # modules may change some layers alone

    def factor(name):
        if name not in places:
            return alpha
        stack, first, count = places[name]
        lowest, last = network[stack]
        depth = first - lowest if count is None else np.arange(count)
        return alpha + beta * (depth / max(last - lowest, 1))

    return {name: factor(name) for name in tree.names(delta)}


class _Repeated(NamedTuple):
    """A number for each layer, for all of the layer's entries, see `Deferred`."""

    values: np.ndarray
    each: int

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, _ = place.indices(self.values.size * self.each)
        return self.values[np.arange(start, stop) // self.each]


def _scaled(numbers: Array, x: Array, *factors: Array) -> Array:
    return x * (factors[0] if factors else numbers[0])


def _moved(numbers: Array, b: Array, merged: Array, *factors: Array) -> Array:
    return b + (merged - b) * (factors[0] if factors else numbers[0])


def _factors(factor: Any, leaf: Any) -> tuple[list, list]:
    """(the factor as leaves, or as numbers) for an entrywise function."""
    if np.ndim(factor) == 0:
        return [], [factor]
    shape, wide = np.shape(leaf), tree.wide_type(leaf)
    each = int(np.prod(shape[1:]))
    if tree.concrete(factor):
        values = np.asarray(factor, wide)
        return [Deferred(shape, wide, lambda: _Repeated(values, each))], []
    return [jnp.broadcast_to(jnp.asarray(factor, wide).reshape(-1, *[1] * (len(shape) - 1)), shape)], []


def scaled_by_layer(deltas: Sequence[Tree], factors: dict[str, Any]) -> list[Tree]:
    """The deltas with each leaf multiplied by its factor, unrounded; made when they are read, where that can be."""

    def one(name, x):
        if x is None or not np.size(x):
            return x
        rows, numbers = _factors(factors[name], x)
        return computed(_scaled, [x, *rows], numbers)

    return [tree.map_with_name(one, delta) for delta in deltas]


def moved_by_layer(base: Tree, merged: Tree, factors: dict[str, Any], *, check_finite: bool) -> Tree:
    """`base + factor (merged - base)`, rounded once; `merged` is None where nothing changes."""

    def leaf(name, b, rows, _):
        more, numbers = _factors(factors[name], b)
        return entrywise(_moved, [b, rows[0], *more], numbers)

    return assembled(base, [merged], leaf, check_finite=check_finite)


def widened(base: Tree) -> Tree:
    """The floating-point leaves in float32 at least."""

    def one(b):
        wide = tree.wide_type(b)
        if not jnp.issubdtype(jnp.result_type(b), jnp.floating) or jnp.result_type(b) == wide:
            return b
        return computed(_scaled, [b], [1.0]) if isinstance(b, Deferred) else jnp.asarray(b, wide)

    return jax.tree.map(one, base)
