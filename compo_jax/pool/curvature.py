"""Curvature as a part of a module: where it is kept, and whether it is the module's."""

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.curvature import KINDS, Curvature, Packed, unpack
from compo_jax.pool.manifest import Manifest
from compo_jax.tree import Tree


def part(kind: str) -> str:
    """The part that a kind of curvature is kept in; ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of curvature {kind!r}; known are {', '.join(KINDS)}")
    return f"curvature.{kind}"


def choose(manifest: Manifest, kind: str | None) -> str:
    """The kind to be read: the one that is asked for, or the only one; KeyError where it is not kept, ValueError for
    two."""
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


def measured(part: str, arrays: Tree) -> Tree:
    """What of a part must be finite: of a diagonal not `captured`, which may be unknown."""
    return arrays["total"] if part == "curvature.diagonal" else arrays


def require_own(manifest: Manifest, curvature: Curvature | None) -> None:
    """ValueError where curvature is of other parameters than a module's base has, or the module itself."""
    if curvature is None:
        return
    with jax.enable_x64(True):  # else 64-bit arrays would raise a warning each
        diagonal = jax.eval_shape(lambda c: c.diagonal(), curvature)
    shapes = {path: x.shape for path, x in tree.by_name(diagonal).items()}
    of_module = manifest.parts["module"]["leaves"]
    expected = {path: tuple(shape) for path, (shape, _) in (of_module | manifest.base_leaves).items()}
    odd = [f"{path} {shape}" for path, shape in shapes.items() if path in expected and expected[path] != shape]
    if manifest.base_leaves:
        odd += [f"{path} {shape}" for path, shape in shapes.items() if path not in expected]
    elif not any(path == leaf or leaf.startswith(f"{path}/") for path in shapes for leaf in of_module):
        odd = [f"{path} {shape}" for path, shape in shapes.items()]  # of nothing that the module changes
    if odd:
        raise ValueError(
            f"the curvature for module {manifest.name!r} is of {', '.join(odd[:8])}, which its base hasn't: it was "
            "taken of another model, or at parameters of another shape"
        )


def restored(kind: str, manifest: Manifest, arrays: Tree) -> Curvature:
    """The curvature that `arrays` were stored of."""
    return unpack(Packed(kind, manifest.curvature[kind], jax.tree.map(_array, arrays)))


def _array(x: np.ndarray) -> jax.Array:
    with jax.enable_x64(True):  # else 64-bit arrays would lose bits
        return jnp.asarray(x)
