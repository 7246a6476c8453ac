"""What the rules take: deltas that fit their base, with the same holes, one weight for each, and numbers in range."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED, is_stacked

Tree = Any
Scalar = float | int | Array
Weights = Num[Array, " tasks"] | Num[np.ndarray, " tasks"] | Sequence
Stacked = str | Sequence[str]


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
                "more are merged; others stay as they are where every module has None there"
            )


def _listed(trees: Sequence[Tree], least: int, what: str) -> list[Tree]:
    if isinstance(trees, Mapping):
        raise ValueError(f"one tree was given for a list of {what}: put it in a list, [tree]")
    trees = list(trees)
    if len(trees) < least:
        raise ValueError(f"{len(trees)} {what} were given, and this rule composes {least} or more")
    return trees


def fitted(base: Tree, deltas: Sequence[Tree], least: int = 1, *, check_finite: bool = False) -> list[Tree]:
    """The deltas, each with None at every leaf of `base` that it doesn't change.

    ValueError for fewer than `least` deltas, one that doesn't fit the base (with all paths) or changes nothing, one
    that moves a leaf that is no floating-point array, and, with `check_finite`, one with NaN or an infinity. A
    UserWarning where a delta looks like the parameters themselves.
    """
    deltas = _listed(deltas, least, "modules")
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
            tree.require_finite(delta, f"delta {t}")
    for t, delta in enumerate(holed):
        _warn_of_parameters(base, delta, t)
    return holed


def aligned(base: Tree, deltas: Sequence[Tree], least: int = 1, *, check_finite: bool = False) -> list[Tree]:
    """The deltas, shaped as `base`, with None where none of them changes a leaf and zeros where some do.

    Errors and warnings as `fitted`.
    """
    holed = fitted(base, deltas, least, check_finite=check_finite)

    def filled(*leaves):
        like = next((x for x in leaves if x is not None), None)
        return [jnp.zeros_like(like) if x is None and like is not None else x for x in leaves]

    lists = jax.tree.map(lambda _, *d: filled(*d), base, *holed)
    return [jax.tree.map(lambda _, row, t=t: row[t], base, lists) for t in range(len(holed))]


def _corner(x: Any) -> np.ndarray:
    return np.asarray(x[(slice(0, 16),) * np.ndim(x)] if np.ndim(x) else x, np.float64).ravel()


def _warn_of_parameters(base: Tree, delta: Tree, t: int) -> None:
    """A UserWarning where a corner of the delta's largest leaf has the base's direction and is about as long.

    A delta, however large, points elsewhere than the base; a corner is enough to tell, and costs nothing.
    """
    there = jax.tree.map(lambda b, d: None if d is None else b, base, delta)
    b, d = max(zip(*map(jax.tree.leaves, (there, delta)), strict=True), key=lambda pair: np.size(pair[1]))
    if not tree.concrete(b, d) or not all(getattr(x, "is_fully_addressable", True) for x in (b, d)):
        return
    with jax.ensure_compile_time_eval():
        b, d = _corner(b), _corner(d)
    if b.size < 2 or not np.all(np.isfinite([b, d])) or not (np.any(b) and np.any(d)):
        return
    share, cosine = b @ d / (b @ b), b @ d / np.linalg.norm(b) / np.linalg.norm(d)
    if cosine > 0.9 and 0.5 <= share <= 2:
        warnings.warn(
            f"delta {t} is as large as the base and points where the base does, as if it were a model's parameters: "
            "rules take differences from the base (compo_jax.compose.task_vector(params, base))",
            UserWarning,
            stacklevel=4,
        )


def same(trees: Sequence[Tree], *, check_finite: bool = False) -> list[Tree]:
    """The trees; ValueError where there are none, or they differ in structure, holes included, or in shapes.

    With `check_finite` also where one has NaN or an infinity.
    """
    trees = _listed(trees, 1, "models")
    for t, other in enumerate(trees):
        if not jax.tree.leaves(other):
            raise ValueError(f"tree {t} has no leaves: there is nothing to merge")
        require_floating(other, f"tree {t}")
        tree.require_like(other, trees[0], f"tree {t}")
        if jax.tree.structure(other) != jax.tree.structure(trees[0]):
            raise ValueError(f"tree {t} has another structure than tree 0: their None holes or containers differ")
    if check_finite:
        for t, other in enumerate(trees):
            tree.require_finite(other, f"tree {t}")
    return trees


def require_number(name: str, value: Any, meaning: str, allowed: Callable[[float], bool] = np.isfinite) -> None:
    """ValueError where `value`, called `name`, is no single number or, unless it is traced, not an allowed one."""
    good = np.ndim(value) == 0
    if good and tree.concrete(value):
        try:
            good = bool(np.isfinite(float(value)) and allowed(float(value)))
        except (TypeError, ValueError):
            good = False
    if not good:
        raise ValueError(f"{name} is {meaning}, not {value}")


def require_not_negative(**numbers: Any) -> None:
    for name, value in numbers.items():
        require_number(name, value, "a finite number that isn't negative", lambda x: x >= 0)


def require_iterations(tolerance: Scalar | None, max_iterations: int) -> None:
    """ValueError where an iteration can't be stopped by these."""
    if tolerance is not None:
        require_not_negative(tolerance=tolerance)
    require_number("max_iterations", max_iterations, "a whole number from 0 on", lambda x: x >= 0 and x == int(x))


def wide_number(x: Scalar) -> float | Array:
    """A number of Python, or, where it is traced, one in float32 at least: no rule computes with a narrow one."""
    return float(x) if tree.concrete(x) else jnp.asarray(x, tree.wide_type(x))


def weigh(weights: Weights | None, tasks: int, default: Scalar | None = None, *, sign: bool = True) -> list:
    """One weight a module; without any, `default` for each, 1/T where that is None. Python's numbers, unless traced.

    ValueError for another number of weights, one that isn't finite, and, with `sign=False`, for a negative one or a sum
    of zero: such rules minimise weighted losses.
    """
    if weights is None:
        return [1 / tasks if default is None else default] * tasks
    if not np.iterable(weights):
        raise ValueError(f"weights are one number a module, a list of {tasks}, not {weights}")
    if len(weights) != tasks:
        raise ValueError(f"{len(weights)} weights were given for {tasks} modules: one for each")
    if not tree.concrete(weights):
        return [wide_number(w) for w in weights]
    try:
        values = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        values = np.empty((tasks, 0))
    if values.ndim != 1:
        raise ValueError(f"weights are one number a module, a list of {tasks}, not {weights}")
    if not np.all(np.isfinite(values)):
        raise ValueError(f"the weights {values} aren't all finite")
    if not sign and (np.any(values < 0) or values.sum() <= 0):
        raise ValueError(
            f"the weights {values} can't be negative, nor all zero, in this rule: to subtract a module, negate its "
            "delta"
        )
    return values.tolist()


def along(weights: Sequence, leaves: Num[Array, "tasks ..."]) -> Num[Array, "tasks ..."]:
    """The weights in the leaves' type, shaped to multiply them."""
    column = jnp.stack([jnp.asarray(w, leaves.dtype) for w in weights])
    return column.reshape(-1, *[1] * (leaves.ndim - 1))


def mean_delta(deltas: Sequence[Tree], weights: Sequence) -> Tree:
    """`Σ w_t delta_t / Σ w_t`, unrounded."""
    total = sum(weights)
    return tree.weighted_sum(deltas, [w / total for w in weights], wide=True)


def leafwise(function: Callable[[str, Array], Array], trees: Sequence[Tree]) -> Tree:
    """`function(path, leaves (tasks, ...))` for each leaf of trees with the same holes; the leaves in float32 at least.

    A leaf without entries is left as it is.
    """

    def one(name, *leaves):
        if leaves[0] is None:
            return None
        wide = tree.wide_type(*leaves)
        stack = jnp.stack([jnp.asarray(x, wide) for x in leaves])
        return function(name, stack) if stack.size else stack[0]

    return tree.map_with_name(one, *trees)


def rounded(wide: Tree, trees: Sequence[Tree]) -> Tree:
    """`wide` in the common types of `trees`."""
    return jax.tree.map(lambda x, *like: x.astype(jnp.result_type(*like)), wide, *trees)


def layers(like: Tree, stacked: Stacked) -> set[str]:
    """The paths of the leaves of `like` whose axis 0 counts layers, by the patterns `stacked`.

    ValueError for a pattern that can't be read or, unless it is a default, matches nothing, for a scalar among them,
    and where leaves of one stack have different numbers of layers: then their axis 0 counts something else.
    """
    patterns = [stacked] if isinstance(stacked, str) else list(stacked)
    shapes = dict(zip(tree.names(like), map(np.shape, jax.tree.leaves(like)), strict=True))
    depths: dict[str, dict[str, int]] = {}
    for pattern in patterns:
        try:
            there = {name: name[: match.end()] for name in shapes if (match := re.search(pattern, name))}
        except re.error as error:
            raise ValueError(f"stacked={pattern!r} is no regular expression: {error}") from None
        if not there and pattern not in STACKED:
            raise ValueError(f"stacked={pattern!r} matches no leaf that is merged; these are {', '.join(shapes)}")
        for name, stack in there.items():
            if not shapes[name]:
                raise ValueError(f"{name} is a scalar and has no axis of layers: narrow the patterns {stacked!r}")
            depths.setdefault(stack, {})[name] = shapes[name][0]
    for stack, found in depths.items():
        if len(set(found.values())) > 1:
            told = ", ".join(f"{name} {depth}" for name, depth in found.items())
            raise ValueError(
                f"the leaves under {stack} would be stacks of different numbers of layers ({told}): say which leaves "
                "have layers on axis 0 by stacked=, patterns of their paths, () for none"
            )
    return {name for name in shapes if is_stacked(name, stacked)}


def by_layer(function: Callable[[Array], Array], leaves: Num[Array, "tasks ..."], of_layers: bool) -> Array:
    """`function(leaves (tasks, ...))` of a leaf, or of each of its layers, one after another."""
    return jax.lax.map(function, jnp.moveaxis(leaves, 1, 0)) if of_layers else function(leaves)


def moved(
    base: Tree, delta: Tree, scale: Scalar = 1.0, *, deltas: Sequence[Tree] = (), check_finite: bool = True
) -> Tree:
    """`base + scale * delta` in the base's types, rounded once: a rule's last step. Errors as `require_sound`."""
    params = tree.add(base, delta, scale)
    if check_finite:
        require_sound(params, base, deltas)
    return params


def require_sound(params: Tree, base: Tree, deltas: Sequence[Tree] = ()) -> None:
    """ValueError where NaN or an infinity is in what was merged, naming the delta or the base that it came from.

    One pass over the leaves that aren't the base's own; nothing is looked at while a function is traced.
    """
    pairs = zip(*map(jax.tree.leaves, (params, base)), strict=True)
    merged = [p for p, b in pairs if p is not b]
    if not tree.concrete(merged):
        return
    # A sum is finite only where all its terms are, and takes a quarter of the time that looking at each does.
    sums = jax.device_get([jnp.sum(x, dtype=tree.wide_type(x)) for x in merged])
    if np.all(np.isfinite(sums)):
        return
    for t, delta in enumerate(deltas):
        tree.require_finite(delta, f"delta {t}")
    tree.require_finite(jax.tree.map(lambda b, p: None if p is b else b, base, params), "the base")
    triples = zip(tree.names(params), *map(jax.tree.leaves, (params, base)), strict=True)
    bad = [f"{name} ({p.dtype})" for name, p, b in triples if p is not b and not jnp.all(jnp.isfinite(p))]
    if bad:
        raise ValueError(
            f"numbers too large for their type come out in {', '.join(bad)}, though all that went in are finite: take "
            "smaller weights or a smaller scale, or a base of a wider type"
        )
