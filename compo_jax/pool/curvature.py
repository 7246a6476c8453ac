"""Curvature as a part of a module: what of it is arrays, and what stands in the manifest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.curvature import FisherDiagonal, Kronecker
from compo_jax.curvature.layers import Dense
from compo_jax.pool.manifest import Manifest
from compo_jax.tree import Tree

KINDS = ("diagonal", "kronecker")


def part(kind: str) -> str:
    """The part that a kind of curvature is kept in; ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of curvature {kind!r}; known are {', '.join(KINDS)}")
    return f"curvature.{kind}"


def choose(manifest: Manifest, kind: str | None) -> str:
    """The kind to be read: the given one, or the only one; KeyError where it is not kept, ValueError for two."""
    kept = sorted(manifest.curvature)
    if kind is None and len(kept) > 1:
        raise ValueError(
            f"module {manifest.name!r} keeps curvature of the kinds {', '.join(kept)}: choose with `kind=`"
        )
    if kind is not None:
        part(kind)
    if not kept or (kind is not None and kind not in kept):
        raise KeyError(
            f"module {manifest.name!r} keeps no {f'curvature {kind!r}' if kept else 'curvature'}: make it with "
            "`curvature.fisher_diagonal` or `curvature.kronecker` at its base, on its data, and keep it by "
            f"`attach({manifest.name!r}, curvature=...)`"
        )
    return kind or kept[0]


def pack(curvature: FisherDiagonal | Kronecker) -> tuple[str, dict[str, Any], Tree]:
    """(kind, what stands in the manifest, arrays)."""
    if isinstance(curvature, FisherDiagonal):
        return "diagonal", {"count": _count(curvature)}, curvature._asdict()
    if not isinstance(curvature, Kronecker):
        raise TypeError(
            f"a {type(curvature).__name__} is no curvature that a pool keeps: give what `curvature.fisher_diagonal` or "
            "`curvature.kronecker` returns (whose `.eigen()` is made of it when it is needed)"
        )
    names = [name for name, _ in curvature.layout]
    if not set(names) == set(curvature.inputs) == set(curvature.outputs):
        raise ValueError(f"the Kronecker factors are of other layers than their layout, which is {', '.join(names)}")
    entry = {
        "count": _count(curvature),
        "tokens": curvature.tokens,
        "layout": {name: dense._asdict() for name, dense in curvature.layout},
    }
    # in the layout's order: the names of layers are paths, and no keys
    factors = {side: [getattr(curvature, side)[name] for name in names] for side in ("inputs", "outputs")}
    return "kronecker", entry, {**factors, "count": curvature.count}


def measured(part: str, arrays: Tree) -> Tree:
    """What of a part must be finite: of a diagonal not `captured`, which may be unknown."""
    return arrays["total"] if part == "curvature.diagonal" else arrays


def require_own(manifest: Manifest, curvature: FisherDiagonal | Kronecker | None) -> None:
    """ValueError where curvature is of other parameters than a module's base has, or the module itself."""
    if isinstance(curvature, FisherDiagonal):
        found = dict(zip(tree.names(curvature.total), map(np.shape, jax.tree.leaves(curvature.total)), strict=True))
    elif isinstance(curvature, Kronecker):
        found = {name: (*dense.stack, *dense.shape) for name, dense in curvature.layout}
    else:
        return
    of_module = manifest.parts["module"]["leaves"]
    known = {path: tuple(shape) for path, (shape, _) in (of_module | manifest.base_leaves).items()}
    odd = [f"{path} {shape}" for path, shape in found.items() if path in known and known[path] != shape]
    if manifest.base_leaves:
        odd += [f"{path} {shape}" for path, shape in found.items() if path not in known]
    elif not any(path == leaf or leaf.startswith(f"{path}/") for path in found for leaf in of_module):
        odd = [f"{path} {shape}" for path, shape in found.items()]  # of nothing that the module changes
    if odd:
        raise ValueError(
            f"the curvature for module {manifest.name!r} is of {', '.join(odd[:8])}, which its base hasn't: it was "
            "taken of another model, or at parameters of another shape"
        )


def unpack(kind: str, entry: dict[str, Any], arrays: Tree) -> FisherDiagonal | Kronecker:
    """The inverse of `pack`."""
    arrays = jax.tree.map(_array, arrays)
    if kind == "diagonal":
        return FisherDiagonal(**arrays)
    layout = tuple(
        (name, Dense(**{key: tuple(x) if isinstance(x, list) else x for key, x in dense.items()}))
        for name, dense in entry["layout"].items()
    )
    factors = {
        side: {name: x for (name, _), x in zip(layout, arrays[side], strict=True)} for side in ("inputs", "outputs")
    }
    return Kronecker(**factors, count=arrays["count"], layout=layout, tokens=entry["tokens"])


def _count(curvature) -> int:
    return np.asarray(curvature.count).item()


def _array(x: np.ndarray) -> jax.Array:
    with jax.enable_x64(True):  # else 64-bit arrays would lose bits
        return jnp.asarray(x)
