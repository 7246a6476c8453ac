"""Pytree algebra that `jax.tree` and `optax.tree` lack: None holes, path patterns, weighted sums, fingerprints.

A tree with None holes has the structure of a full tree, with None where a leaf is absent: frozen and trainable
parameters are two such trees, and so is a weight delta, where None means "no change".
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def _is_none(leaf) -> bool:
    return leaf is None


def path_name(path) -> str:
    """A key path as text: `("blocks", "attention", "qkv", "kernel")` is `blocks/attention/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Tree) -> list[str]:
    """The path of every leaf, in `jax.tree.leaves` order."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def by_name(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths; ValueError where two have one path, as keys with slashes can make it."""
    paths, leaves = names(tree), jax.tree.leaves(tree)
    found = dict(zip(paths, leaves, strict=True))
    if len(found) < len(leaves):
        raise _one_path(next(path for path in paths if paths.count(path) > 1))
    return found


def _one_path(path: str) -> ValueError:
    return ValueError(f"two leaves have the path {path}: rename a key that has a slash in it")


def place(values: Mapping[str, Any], like: Tree) -> Tree:
    """The values at their paths in a tree shaped as `like`, None where there is none: the inverse of `by_name`."""
    return map_with_name(lambda name, _: values.get(name), like)


def is_plain(tree: Tree) -> bool:
    """Whether dictionaries and lists alone hold the leaves, by names without a slash, as files can keep them."""
    if type(tree) is dict:
        return all(isinstance(key, str) and "/" not in key and is_plain(value) for key, value in tree.items())
    if type(tree) is list:
        return all(map(is_plain, tree))
    return tree is None or jax.tree_util.all_leaves([tree])


def nested(tree: Tree) -> dict[str, Any]:
    """The leaves and None holes in plain dictionaries, one for each part of their paths, also within a key with a
    slash: for files, which know no other containers. Inverse: `regrown`."""
    root: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none):
        *stem, last = path_name(path).split("/")
        branch = root
        for key in stem:
            branch = branch.setdefault(key, {}) if isinstance(branch, dict) else None
        if not isinstance(branch, dict) or last in branch:
            raise _one_path(path_name(path))
        branch[last] = leaf
    return root


def regrown(values: Mapping[str, Any], like: Tree) -> Tree:
    """What `values`, nested dictionaries and lists, hold at the paths of the leaves of `like`, in its containers; None
    elsewhere.

    ValueError, with the paths, where something in `values` is at none of them.
    """

    def at(path, _):
        value = values
        for key in path_name(path).split("/"):
            if isinstance(value, list):
                value = value[int(key)] if key.isdigit() and int(key) < len(value) else None
            else:
                value = value.get(key) if isinstance(value, Mapping) else None
        return value

    tree = jax.tree_util.tree_map_with_path(at, like)
    if lost := sorted(set(names(values)) - set(names(tree))):
        raise ValueError(f"there is no {', '.join(lost)} among {', '.join(names(like)) or 'nothing'}")
    return tree


def map_with_name(function: Callable, tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` whose function gets the leaf's path first; None is a leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest, is_leaf=_is_none
    )


def first_match(name: str, rules: Iterable[tuple[str, Any]], default: Any = None) -> Any:
    """The value of the first rule `(regular expression, value)` whose expression is found in `name`."""
    return next((value for pattern, value in rules if re.search(pattern, name)), default)


def partition(tree: Tree, keep: str | Sequence[str] | Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits `tree` into (kept, rest): two trees of its structure, each with None where the other has the leaf.

    `keep` is a regular expression searched for in a leaf's path, several of them, or a predicate on the path.
    Raises ValueError where nothing is kept. Inverse: `combine`.
    """
    patterns = [keep] if isinstance(keep, str) else keep
    keeps = patterns if callable(patterns) else lambda name: any(re.search(p, name) for p in patterns)
    kept = map_with_name(lambda name, leaf: leaf if keeps(name) else None, tree)
    if not jax.tree.leaves(kept):
        raise ValueError(f"no parameter matches {keep!r}; the parameters are: {', '.join(names(tree)) or 'none'}")
    rest = map_with_name(lambda name, leaf: None if keeps(name) else leaf, tree)
    return kept, rest


def combine(*trees: Tree) -> Tree:
    """Fills the None holes of the first tree from the next ones, the first leaf that is not None winning."""
    return jax.tree.map(lambda *leaves: next((x for x in leaves if x is not None), None), *trees, is_leaf=_is_none)


def spread(tree: Tree, like: Tree) -> Tree:
    """`tree` with None at each leaf of `like` where it has one None for a whole branch."""
    return jax.tree.broadcast(tree, like, is_leaf=_is_none)


def hollowed(*trees: Tree) -> list[Tree]:
    """The trees, None at every leaf and for every branch where one of them has None: then they are of one structure."""
    at = jax.tree_util.tree_leaves_with_path
    holes = {path for tree in trees for path, leaf in at(tree, is_leaf=_is_none) if leaf is None}
    if not holes:
        return list(trees)
    keep, here = lambda path, x: None if path in holes else x, lambda path, _: path in holes
    mapped = jax.tree_util.tree_map_with_path
    return [mapped(keep, tree, is_leaf=here, is_leaf_takes_path=True) for tree in trees]


def concrete(*trees: Tree) -> bool:
    """False while a function is traced: then values can't be looked at, and no error can depend on them."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees))


def wide_type(*arrays: Any) -> np.dtype:
    """The type that sums of these arrays grow in: their common one, float32 at least (float64 for float64)."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _is_whole(x: Any) -> bool:
    """Whether a number is known to be whole: by its type or, unless it is traced, by its value."""
    return not _is_float(x) or (concrete(x) and float(x).is_integer())


def add(base: Tree, delta: Tree, scale: float | int | jax.Array = 1.0) -> Tree:
    """`base + scale * delta` in the base's types, rounded once.

    A None leaf of `delta` leaves the base's leaf as it is (the same array). ValueError, naming the leaf, where shapes
    differ, or an integer leaf would have to move by a fraction.
    """

    def one(path, d, b):
        if d is None:
            return b
        if np.shape(d) != np.shape(b):
            raise ValueError(f"{path_name(path)} is {np.shape(b)} and what is added to it {np.shape(d)}")
        b, d = jnp.asarray(b), jnp.asarray(d)
        if _is_float(b):
            wide = wide_type(b, d)
        elif not _is_float(d) and _is_whole(scale):
            wide = jnp.result_type(b, d)
        else:
            raise ValueError(
                f"{path_name(path)} is of type {b.dtype} and can't move by a fraction: only floating-point leaves can"
            )
        return (b.astype(wide) + jnp.asarray(scale, wide) * d.astype(wide)).astype(b.dtype)

    return jax.tree_util.tree_map_with_path(one, delta, base, is_leaf=_is_none)


@dataclass(frozen=True)
class _Sum:  # no pytree: a leaf of the running sum
    value: jax.Array
    dtype: np.dtype  # of the terms


def _accumulate(total: Tree, tree: Tree, weight: float | int | jax.Array) -> Tree:
    whole = jnp.issubdtype(jnp.result_type(weight), jnp.integer)

    def one(held, x):
        if x is None:
            return held
        x = jnp.asarray(x)
        wide = x.dtype if whole and not _is_float(x) else wide_type(x)
        term, dtype = jnp.asarray(weight, wide) * x.astype(wide), x.dtype if _is_float(x) else wide
        if held is None:
            return _Sum(term, dtype)
        wide = jnp.promote_types(held.value.dtype, wide)
        return _Sum(held.value.astype(wide) + term.astype(wide), jnp.promote_types(held.dtype, dtype))

    if total is None:
        return jax.tree.map(lambda x: one(None, x), tree)
    return jax.tree.map(one, total, tree, is_leaf=_is_none)


def weighted_sum(trees: Iterable[Tree], weights: Iterable[float | int | jax.Array], *, wide: bool = False) -> Tree:
    """`sum_t weights[t] * trees[t]`, one tree in memory beside the sum; None counts as zero.

    Sums grow in float32 at least, whatever the trees' types, and are rounded to these once, at the end. Integer leaves
    (counts) stay integers where all weights are, and become floating-point numbers where they aren't.

    Args:
      trees: read one after another; an iterator that makes or loads them holds no more than one.
      wide: the sum is returned as it grew, not rounded: for a sum that something is still added to.
    """
    trees, total = iter(trees), None
    try:
        for weight in weights:  # no name, not even zip's, keeps a tree alive while the next is made
            total = _accumulate(total, next(trees), weight)
    except StopIteration:
        raise ValueError("a weighted sum needs one weight for each tree, and there are more weights") from None
    if next(trees, _Sum) is not _Sum:
        raise ValueError("a weighted sum needs one weight for each tree, and there are more trees")
    if total is None:
        raise ValueError("a weighted sum needs at least one tree")
    return jax.tree.map(lambda sum: sum.value if wide else sum.value.astype(sum.dtype), total)


def dot(a: Tree, b: Tree) -> jax.Array:
    """Inner product of two trees over the leaves that both have, at highest precision, summed in float32 at least."""

    def one(path, x, y):
        if np.shape(x) != np.shape(y):
            raise ValueError(f"{path_name(path)} is {np.shape(x)} in the one tree and {np.shape(y)} in the other")
        wide = wide_type(x, y)
        return jnp.vdot(jnp.asarray(x, wide), jnp.asarray(y, wide), precision=jax.lax.Precision.HIGHEST)

    products = jax.tree_util.tree_map_with_path(one, *hollowed(a, b))
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


def size(tree: Tree) -> int:
    """Number of scalars in the tree."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(tree))


def fingerprint(tree: Tree) -> str:
    """SHA-256 (hexadecimal) of the tree's paths, shapes, dtypes and bytes, wherever the tree lives."""
    digest = hashlib.sha256()
    for path, leaf in sorted((path_name(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)):
        is_key = jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        digest.update(f"{path} {array.shape} {array.dtype.str}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def require_float(tree: Tree, what: str) -> None:
    """ValueError where `tree`, called `what` in the message, has no leaves or one that can't be differentiated."""
    if not jax.tree.leaves(tree):
        raise ValueError(f"{what} has no leaves: nothing is left to differentiate")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{what} has a leaf {path_name(path)} of type {jnp.result_type(leaf)}: only floating-point leaves are "
                "differentiated; close over the others"
            )


def require_finite(tree: Tree, what: str) -> None:
    """ValueError where a leaf of `tree`, called `what` in the message, holds NaN or an infinity; all are named.

    Nothing is looked at while a function is traced (`concrete`).
    """
    leaves = [(path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree) if _is_float(x)]
    if not concrete([x for _, x in leaves]):
        return
    with jax.ensure_compile_time_eval():  # arrays that a traced function closes over are there to be looked at
        # by NumPy what isn't JAX's: with 64 bits switched off jnp makes infinities of large numbers
        finite = [(jnp if isinstance(x, jax.Array) else np).isfinite(x).all() for _, x in leaves]
        sound = jax.device_get(finite)
    if bad := [name for (name, _), good in zip(leaves, sound, strict=True) if not good]:
        raise ValueError(
            f"{what} holds NaN or infinite numbers in {', '.join(bad)}: a training that diverged, say, or a damaged "
            "file. Leave it out, or let it through on purpose with check_finite=False"
        )


def require_held(made: Tree, before: Tree | None = None) -> None:
    """ValueError where numbers in `made`, computed of finite ones, are too large for their type.

    Args:
      before: shaped as `made`; an infinity that was there already, a masked class's -inf say, is none of the sum's.

    Nothing is looked at while a function is traced (`concrete`).
    """
    leaves, old = by_name(made), {} if before is None else by_name(before)
    if not concrete([*leaves.values(), *old.values()]):
        return
    with jax.ensure_compile_time_eval():
        bad = [
            f"{name} ({jnp.result_type(x)})"
            for name, x in leaves.items()
            if _is_float(x) and not (np.isfinite(x) | (~np.isfinite(old[name]) if name in old else False)).all()
        ]
    if bad:
        raise ValueError(
            f"numbers too large for their type come out in {', '.join(bad)}, though all that went in are finite: take "
            "smaller weights, a smaller scale or rate, or a wider type"
        )


def mismatches(shapes: Mapping[str, tuple], expected: Mapping[str, tuple]) -> list[str]:
    """A line each for the names that are missing, unexpected and mis-shaped; [] where all is as expected."""
    lists = {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": [f"{name} {shape}" for name, shape in shapes.items() if name not in expected],
        "mis-shaped": [
            f"{name} {shape} instead of {expected[name]}"
            for name, shape in shapes.items()
            if expected.get(name, shape) != shape
        ],
    }
    return [f"{kind} ({len(entries)}): {', '.join(entries)}" for kind, entries in lists.items() if entries]


def require_like(tree: Tree, like: Tree, what: str) -> None:
    """ValueError that lists every path where `tree` is not shaped as `like`; None in `tree` fits anything."""
    have = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none)}
    want = {path_name(p): np.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(like)}
    holes = [path for path, leaf in have.items() if leaf is None]
    shapes = {path: np.shape(leaf) for path, leaf in have.items() if leaf is not None}
    covered = {p for p in want for hole in holes if p == hole or p.startswith(f"{hole}/") or not hole}
    problems = [f"{p} is missing" for p in want if p not in shapes and p not in covered]
    problems += [f"{p} is unknown" for p in shapes if p not in want]
    problems += [f"{p} is {shapes[p]} and should be {want[p]}" for p in want if p in shapes and shapes[p] != want[p]]
    if problems:
        raise ValueError(f"{what} doesn't fit the parameters: {'; '.join(problems)}")
    try:
        jax.tree.map(lambda *_: None, tree, like, is_leaf=_is_none)
    except ValueError as error:
        raise ValueError(f"{what} has other containers than the parameters, a tuple for a list say: {error}") from error
