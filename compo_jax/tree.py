"""Pytree algebra that `jax.tree` and `optax.tree` lack: None holes, path patterns, weighted sums, fingerprints.

A tree with None holes has the structure of a full tree, with None where a leaf is absent: frozen and trainable
parameters are two such trees, and so is a weight delta, where None means "no change".
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
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


def add(base: Tree, delta: Tree, scale: float | jax.Array = 1.0) -> Tree:
    """`base + scale * delta`, where a None leaf of `delta` leaves the base's leaf as it is (the same array)."""
    return jax.tree.map(
        lambda d, b: b if d is None else b + jnp.asarray(scale, d.dtype) * d, delta, base, is_leaf=_is_none
    )


def weighted_sum(trees: Iterable[Tree], weights: Iterable[float | jax.Array]) -> Tree:
    """`sum_t weights[t] * trees[t]`, one tree in memory beside the sum; None counts as zero."""
    total = None
    for tree, weight in zip(trees, weights, strict=True):
        scaled = jax.tree.map(lambda x, w=weight: x * jnp.asarray(w, x.dtype), tree)
        total = (
            scaled
            if total is None
            else jax.tree.map(
                lambda a, b: b if a is None else a if b is None else a + b, total, scaled, is_leaf=_is_none
            )
        )
    if total is None:
        raise ValueError("a weighted sum needs at least one tree")
    return total


def dot(a: Tree, b: Tree) -> jax.Array:
    """Inner product of two trees over the leaves that both have, at highest precision."""
    products = jax.tree.map(
        lambda x, y: None if x is None or y is None else jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST),
        a,
        b,
        is_leaf=_is_none,
    )
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


def size(tree: Tree) -> int:
    """Number of scalars in the tree."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(tree))


def fingerprint(tree: Tree) -> str:
    """SHA-256 (hexadecimal) of the tree's paths, shapes, dtypes and bytes, wherever the tree lives."""
    digest = hashlib.sha256()
    for path, leaf in sorted((path_name(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)):
        array = np.asarray(leaf)
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


def require_like(tree: Tree, like: Tree, what: str) -> None:
    """ValueError that lists every path where `tree` is not shaped as `like`; None in `tree` fits anything."""
    have = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none)}
    want = {path_name(p): np.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(like)}
    holes = [path for path, leaf in have.items() if leaf is None]
    found = {path: np.shape(leaf) for path, leaf in have.items() if leaf is not None}
    covered = {p for p in want for hole in holes if p == hole or p.startswith(f"{hole}/") or not hole}
    problems = [f"{p} is missing" for p in want if p not in found and p not in covered]
    problems += [f"{p} is unknown" for p in found if p not in want]
    problems += [f"{p} is {found[p]} and should be {want[p]}" for p in want if p in found and found[p] != want[p]]
    if problems:
        raise ValueError(f"{what} doesn't fit the parameters: {'; '.join(problems)}")
    try:
        jax.tree.map(lambda *_: None, tree, like, is_leaf=_is_none)
    except ValueError as error:
        raise ValueError(f"{what} has other containers than the parameters, a tuple for a list say: {error}") from error
