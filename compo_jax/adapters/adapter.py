"""What an adapter is: a way to say a change of some weights with few numbers."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.tree import Tree

Targets = str | Sequence[str | Sequence]  # patterns, or (pattern, multiple of the rank) pairs

#: The weights that the paper adapts: every dense kernel of a ViT's blocks, three times the rank for the joint qkv.
VIT_TARGETS = ((r"qkv/kernel$", 3), (r"(proj|fc1|fc2)/kernel$", 1))

#: Paths of leaves whose axis 0 counts layers: those of our ViT's scanned blocks. Blocks with numbers in their paths
#: (`blocks/0/...`) are written out one by one.
STACKED = (r"(^|/)blocks/(?!\d+/)",)


class Adapter(NamedTuple):
    """Two pure functions, and what it takes to make them again.

    Attributes:
      init: `(key, base) -> module`, the trainable tree: shaped as `base`, with None where nothing is adapted and the
        adapter's own numbers in place of an adapted leaf; an array of the leaf's shape is a full delta of it.
      delta: `(module, base) -> tree` shaped as `base`, None where nothing changes; the adapted model is `base + delta`.
      dense: `(x, y, entry, bias) -> y`, the output of a dense layer with input `x`, frozen output `y` and frozen
        `bias` (None where it has none; `y` includes it), adapted by the module's `entry` for its kernel, without ever
        forming the delta; None where there is no such short cut.
      name, settings: `adapters.build(name, settings)` returns this adapter.
      mixed: whether `delta` takes full deltas, arrays of the leaves' shapes, among its own entries.
    """

    init: Callable[[jax.Array, Tree], Tree]
    delta: Callable[[Tree, Tree], Tree]
    dense: Callable[[jax.Array, jax.Array, Tree, jax.Array | None], jax.Array] | None = None
    name: str = ""
    settings: dict[str, Any] = {}
    mixed: bool = False


def patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    """One or several regular expressions as a tuple; ValueError for one that is none."""
    listed = (given,) if isinstance(given, str) else tuple(given)
    for pattern in listed:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error}): paths are searched with them") from error
    return listed


def is_stacked(name: str, stacked: str | Sequence[str] = STACKED) -> bool:
    """Whether axis 0 of the leaf at the path `name` counts layers, by patterns that are searched for in it."""
    return any(re.search(pattern, name) for pattern in patterns(stacked))


def whole_number(what: str, value: Any) -> int:
    """`value` as an int; ValueError, with `what` it is, where it is no whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{what} is a whole number and at least 1, not {value!r}")
    return int(value)


def rules(targets: Targets) -> tuple[tuple[str, int], ...]:
    """Targets as `(pattern, multiple of the rank)` pairs; a plain pattern has the multiple 1."""
    listed = [targets] if isinstance(targets, str) else targets
    pairs = [(target, 1) if isinstance(target, str) else tuple(target) for target in listed]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"a target is a pattern or (pattern, multiple of the rank), not {wrong[0]!r}")
    patterns(pattern for pattern, _ in pairs)
    return tuple((pattern, whole_number(f"the multiple of the rank for {pattern!r}", m)) for pattern, m in pairs)


def select(base: Tree, targets: Targets) -> Tree:
    """The adapted leaves of `base`, with None holes; ValueError where a pattern matches no leaf, or one that isn't of
    floating-point numbers."""
    found = tree.names(base)
    for pattern, _ in rules(targets):
        if not any(re.search(pattern, name) for name in found):
            raise ValueError(
                f"the adapter's pattern {pattern!r} matches no parameter; the parameters are: {', '.join(found)}"
            )
    chosen = tree.partition(base, [pattern for pattern, _ in rules(targets)])[0]
    for name, leaf in zip(tree.names(chosen), jax.tree.leaves(chosen), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{name} is of type {jnp.result_type(leaf)}: only floating-point leaves can be adapted; narrow the "
                "targets"
            )
    return chosen


def is_matrix(name: str, leaf: Any, stacked: str | Sequence[str]) -> bool:
    """Whether the leaf is (in, out), or (layers, in, out) where its axis 0 counts layers."""
    return np.ndim(leaf) == 2 + is_stacked(name, stacked)


def require_matrix(name: str, leaf: Any, what: str, stacked: str | Sequence[str]) -> None:
    """ValueError where the leaf `name` can't be adapted by `what`, which takes matrices, alone or stacked."""
    if is_matrix(name, leaf, stacked):
        return
    hint = ""
    if np.ndim(leaf) == 2:
        hint = " with a vector for each layer"
    elif np.ndim(leaf) == 3:
        hint = (
            ": where its axis 0 counts layers, name it in stacked=; a kernel of attention (in, heads, head_dim) is "
            "adapted as a matrix (in, heads * head_dim), so reshape it; or"
        )
    raise ValueError(
        f"{what} adapts kernels (in, out), or (layers, in, out) where stacked= says that axis 0 counts layers; {name} "
        f"is {np.shape(leaf)}{hint or ':'} narrow the targets"
    )


def alike(module: Tree, base: Tree) -> Tree:
    """`module` in the container of `base`, where one of them is a FrozenDict and the other a dict."""
    if isinstance(module, dict) and hasattr(base, "unfreeze"):  # asked so, this needs no Flax
        return type(base)(module)
    unfreeze = getattr(module, "unfreeze", None)
    return unfreeze() if unfreeze and isinstance(base, dict) else module


def kind(entry: Tree) -> str:
    """What a module holds for one leaf: `lora` ({"a", "b"}), `ia3` ({"l"}), `full` (an array), or `unknown`."""
    if not isinstance(entry, dict):
        return "full"
    return {("a", "b"): "lora", ("l",): "ia3"}.get(tuple(sorted(entry)), "unknown")


def _fits(entry: Tree, shape: tuple[int, ...]) -> bool:
    """Whether an entry is of a leaf of this shape."""
    if kind(entry) == "full":
        return np.shape(entry) == shape
    if len(shape) < 2:
        return False
    *stack, fan_in, fan_out = shape
    if kind(entry) == "ia3":
        return np.shape(entry["l"]) == (*stack, fan_out)
    a, b = np.shape(entry["a"]), np.shape(entry["b"])
    return a == (*stack, fan_in, *a[-1:]) and b == (*stack, *a[-1:], fan_out)


def entries(module: Tree, base: Tree, kinds: Sequence[str] = ("full", "ia3", "lora")) -> dict[str, Tree]:
    """What the module holds for each adapted leaf of `base`, by path; ValueError where it isn't shaped as `base`, or
    holds an entry of none of these kinds."""
    try:
        found = jax.tree.structure(base).flatten_up_to(alike(module, base))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the module's tree isn't the base's ({str(error).splitlines()[0][:200]}): it was made for other "
            "parameters, or it isn't the module that `init` returned. Containers count too: flax.core.unfreeze makes "
            "dictionaries of a FrozenDict"
        ) from error
    named = dict(zip(tree.names(base), zip(found, jax.tree.leaves(base), strict=True), strict=True))
    named = {name: pair for name, pair in named.items() if jax.tree.leaves(pair[0])}
    if foreign := [name for name, (entry, _) in named.items() if kind(entry) not in kinds]:
        told = {"full": "arrays", "ia3": "ia3 ({'l'})", "lora": "lora ({'a', 'b'})"}
        raise ValueError(
            f"the module's entries for {', '.join(foreign)} aren't those of {' or '.join(told[k] for k in kinds)}: "
            "take the adapter that made them"
        )
    if wrong := [
        f"{name} is {np.shape(leaf)} and its entry {jax.tree.map(np.shape, entry)}"
        for name, (entry, leaf) in named.items()
        if not _fits(entry, np.shape(leaf))
    ]:
        raise ValueError(f"the module doesn't fit the base: {'; '.join(wrong)}: it was made for other parameters")
    return {name: entry for name, (entry, _) in named.items()}
