"""The kinds of curvature that can be kept in files: what of each is arrays, and what is plain."""

from typing import Any, NamedTuple

import numpy as np

from compo_jax.curvature.fisher import FisherDiagonal
from compo_jax.curvature.kfac import Kronecker
from compo_jax.curvature.layers import Dense
from compo_jax.curvature.protocol import Curvature
from compo_jax.tree import Tree

#: By name, as in files and on command lines.
KINDS = {"diagonal": FisherDiagonal, "kronecker": Kronecker}


class Packed(NamedTuple):
    """A curvature, taken apart.

    Attributes:
      kind: a name in `KINDS`.
      plain: numbers, texts, lists and dictionaries of these, for JSON.
      arrays: dictionaries and lists of arrays.
    """

    kind: str
    plain: dict[str, Any]
    arrays: Tree


def pack(curvature: Curvature) -> Packed:
    """TypeError for a kind that isn't kept; ValueError for Kronecker factors that don't fit their layout."""
    if isinstance(curvature, FisherDiagonal):
        return Packed("diagonal", {"count": _number(curvature.count)}, curvature._asdict())
    if not isinstance(curvature, Kronecker):
        raise TypeError(
            f"a {type(curvature).__name__} is no curvature that is kept: give what `curvature.fisher_diagonal` or "
            "`curvature.kronecker` returns (whose `.eigen()` is made of it when it is needed)"
        )
    names = [name for name, _ in curvature.layout]
    if not set(names) == set(curvature.inputs) == set(curvature.outputs):
        raise ValueError(f"the Kronecker factors are of other layers than their layout, which is {', '.join(names)}")
    layout = {name: dense._asdict() for name, dense in curvature.layout}
    # in the layout's order: the names of layers are paths, and no keys
    factors = {side: [getattr(curvature, side)[name] for name in names] for side in ("inputs", "outputs")}
    plain = {"count": _number(curvature.count), "tokens": curvature.tokens, "layout": layout}
    return Packed("kronecker", plain, {**factors, "count": curvature.count})


def _number(count: Any) -> int | float:
    return np.asarray(count).item()


def unpack(packed: Packed) -> FisherDiagonal | Kronecker:
    """The inverse of `pack`."""
    kind, plain, arrays = packed
    if kind == "diagonal":
        return FisherDiagonal(**arrays)
    layout = tuple(
        (name, Dense(**{key: tuple(x) if isinstance(x, list) else x for key, x in dense.items()}))
        for name, dense in plain["layout"].items()
    )
    factors = {
        side: {name: x for (name, _), x in zip(layout, arrays[side], strict=True)} for side in ("inputs", "outputs")
    }
    return Kronecker(**factors, count=arrays["count"], layout=layout, tokens=plain["tokens"])
