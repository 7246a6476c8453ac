"""What the rules take: deltas that fit their base, with the same holes; or trees of one structure."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.adapters.adapter import alike
from compo_jax.compose.entries import Deferred, sums_are_finite
from compo_jax.tree import Tree


def require_floating(trees: Tree, what: str) -> None:
    """ValueError where a leaf of the tree, called `what` in the message, can't be moved by a fraction."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            dtype = type(leaf).__name__
        if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
            raise ValueError(
                f"{what} has a leaf {tree.path_name(path)} of type {dtype}: only floating-point leaves of 16 bits or "
                "more are merged; others stay as they are where every module has None there. Of a model's object take "
                "its parameters alone, by eqx.filter(model, eqx.is_inexact_array) or nnx.state(model, nnx.Param)"
            )


def require_finite(trees: Tree, what: str) -> None:
    """`tree.require_finite`, but quick where all is well; what is `Deferred` is looked at when it is read."""
    leaves = [x for x in jax.tree.leaves(trees) if not isinstance(x, Deferred)]
    if tree.concrete(leaves) and not sums_are_finite(leaves):
        tree.require_finite(trees, what)


def listed(trees: Sequence[Tree], least: int, what: str) -> list[Tree]:
    """A list of the trees; ValueError for a single one, and for fewer than `least`."""
    if isinstance(trees, Mapping):
        raise ValueError(f"one tree was given for a list of {what}: put it in a list, [tree]")
    trees = list(trees)
    if len(trees) < least:
        raise ValueError(f"{len(trees)} {what} were given, and this rule composes {least} or more")
    return trees


def with_holes(base: Tree, deltas: Sequence[Tree], least: int = 1, *, check_finite: bool = False) -> list[Tree]:
    """The deltas in the base's container (dict or FrozenDict), with None at every leaf that they don't change.

    ValueError for fewer than `least` deltas, one that doesn't fit the base (with all paths) or changes nothing, one
    that moves a leaf that is no floating-point array, and, with `check_finite`, one with NaN or an infinity. A
    UserWarning where a delta looks like the parameters themselves.
    """
    deltas = [alike(delta, base) for delta in listed(deltas, least, "modules")]
    for t, delta in enumerate(deltas):
        tree.require_like(delta, base, f"delta {t}")
        if not jax.tree.leaves(delta):
            raise ValueError(f"delta {t} changes nothing: it has no leaves but None. Leave the module out")
        require_floating(delta, f"delta {t}")
    holed = [tree.spread(delta, base) for delta in deltas]
    moved = jax.tree.map(lambda b, *d: None if all(x is None for x in d) else b, base, *holed)
    require_floating(moved, "what the deltas are added to")
    if check_finite:
        for t, delta in enumerate(deltas):
            require_finite(delta, f"delta {t}")
    for t, delta in enumerate(holed):
        _warn_of_parameters(base, delta, t)
    return holed


def with_zeros(base: Tree, deltas: Sequence[Tree], least: int = 1, *, check_finite: bool = False) -> list[Tree]:
    """The deltas, shaped as `base`, with None where none of them changes a leaf and zeros where some do.

    Errors and warnings as `with_holes`.
    """
    holed = with_holes(base, deltas, least, check_finite=check_finite)

    def filled(*leaves):
        like = next((x for x in leaves if x is not None), None)
        return [jnp.zeros_like(like) if x is None and like is not None else x for x in leaves]

    lists = jax.tree.map(lambda _, *d: filled(*d), base, *holed)
    return [jax.tree.map(lambda _, row, t=t: row[t], base, lists) for t in range(len(holed))]


_TELLING = 32  # entries: of fewer, some task vector points where the base does by chance


def _corner(x: Any) -> np.ndarray:
    return np.asarray(x[(slice(0, 16),) * np.ndim(x)] if np.ndim(x) else x, np.float64).ravel()


def _warn_of_parameters(base: Tree, delta: Tree, t: int) -> None:
    """A UserWarning where a corner of the delta's largest leaf has the base's direction and is about as long.

    A delta, however large, points elsewhere than the base; a corner is enough to tell, and costs nothing.
    """
    there = jax.tree.map(lambda b, d: None if d is None else b, base, delta)
    b, d = max(zip(*map(jax.tree.leaves, (there, delta)), strict=True), key=lambda pair: np.size(pair[1]))
    if (
        isinstance(b, Deferred)
        or isinstance(d, Deferred)
        or not tree.concrete(b, d)
        or not all(getattr(x, "is_fully_addressable", True) for x in (b, d))
    ):
        return
    with jax.ensure_compile_time_eval():
        b, d = _corner(b), _corner(d)
    if b.size < _TELLING or not np.all(np.isfinite([b, d])) or not (np.any(b) and np.any(d)):
        return
    share, cosine = b @ d / (b @ b), b @ d / np.linalg.norm(b) / np.linalg.norm(d)
    if cosine > 0.9 and 0.5 <= share <= 2:
        warnings.warn(
            f"delta {t} is as large as the base and points where the base does, as if it were a model's parameters: "
            "rules take differences from the base (compo_jax.compose.task_vector(params, base))",
            UserWarning,
            stacklevel=4,
        )


def require_matvecs(matvecs: Sequence, tasks: int) -> None:
    """ValueError for another number of curvature products than modules."""
    if len(matvecs) != tasks:
        raise ValueError(
            f"{len(matvecs)} curvature products were given for {tasks} modules: one for each "
            "(compo_jax.curvature.ggn at the module's own parameters and data)"
        )


def require_same(trees: Sequence[Tree], *, check_finite: bool = False) -> list[Tree]:
    """The trees, in the first one's container; ValueError where there are none, or they differ in structure, holes
    included, or in shapes.

    With `check_finite` also where one has NaN or an infinity.
    """
    trees = listed(trees, 1, "models")
    trees = [alike(other, trees[0]) for other in trees]
    for t, other in enumerate(trees):
        if not jax.tree.leaves(other):
            raise ValueError(f"tree {t} has no leaves: there is nothing to merge")
        require_floating(other, f"tree {t}")
        tree.require_like(other, trees[0], f"tree {t}")
        if jax.tree.structure(other) != jax.tree.structure(trees[0]):
            raise ValueError(f"tree {t} has another structure than tree 0: their None holes or containers differ")
    if check_finite:
        for t, other in enumerate(trees):
            require_finite(other, f"tree {t}")
    return trees
