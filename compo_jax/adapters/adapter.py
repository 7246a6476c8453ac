"""What an adapter is: a way to say a change of some weights with few numbers."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from compo_jax import tree

Tree = Any
Targets = str | Sequence[str | Sequence]  # patterns, or (pattern, multiple of the rank) pairs

#: The weights that the paper adapts: every dense kernel of a ViT's blocks, three times the rank for the joint qkv.
VIT_TARGETS = ((r"qkv/kernel$", 3), (r"(proj|fc1|fc2)/kernel$", 1))

#: Paths of leaves whose axis 0 counts layers: those of our ViT's scanned blocks, and no list's (blocks/0/...).
STACKED = (r"(^|/)blocks/(?!\d)",)


def is_stacked(name: str, stacked: str | Sequence[str] = STACKED) -> bool:
    """Whether axis 0 of the leaf at the path `name` counts layers, by patterns that are searched for in it."""
    patterns = [stacked] if isinstance(stacked, str) else stacked
    return any(re.search(pattern, name) for pattern in patterns)


class Adapter(NamedTuple):
    """Two pure functions, and what it takes to make them again.

    Attributes:
      init: `(key, base) -> module`, the trainable tree: shaped as `base`, with None where nothing is adapted and the
        adapter's own numbers in place of an adapted leaf.
      delta: `(module, base) -> tree` shaped as `base`, None where nothing changes; the adapted model is `base + delta`.
      dense: `(x, y, entry, bias) -> y`, the output of a dense layer with input `x`, frozen output `y` and frozen
        `bias` (None where it has none; `y` includes it), adapted by the module's `entry` for its kernel, without ever
        forming the delta; None where there is no such short cut.
      name, settings: `adapters.build(name, settings)` returns this adapter.
    """

    init: Callable[[jax.Array, Tree], Tree]
    delta: Callable[[Tree, Tree], Tree]
    dense: Callable[[jax.Array, jax.Array, Tree, jax.Array | None], jax.Array] | None = None
    name: str = ""
    settings: dict[str, Any] = {}


def rules(targets: Targets) -> tuple[tuple[str, int], ...]:
    """Targets as `(pattern, multiple of the rank)` pairs; a plain pattern has the multiple 1."""
    listed = [targets] if isinstance(targets, str) else targets
    pairs = tuple((t, 1) if isinstance(t, str) else (t[0], int(t[1])) for t in listed)
    for pattern, _ in pairs:
        re.compile(pattern)
    return pairs


def select(base: Tree, targets: Targets) -> Tree:
    """The adapted leaves of `base`, with None holes; ValueError where a pattern matches no leaf."""
    found = tree.names(base)
    for pattern, _ in rules(targets):
        if not any(re.search(pattern, name) for name in found):
            raise ValueError(
                f"the adapter's pattern {pattern!r} matches no parameter; the parameters are: {', '.join(found)}"
            )
    return tree.partition(base, [pattern for pattern, _ in rules(targets)])[0]


def require_kernel(name: str, leaf: Any, what: str) -> None:
    """ValueError where the leaf `name` can't be adapted by `what`, which takes matrices, alone or stacked."""
    if leaf.ndim not in (2, 3):
        raise ValueError(
            f"{what} adapts kernels (in, out), or (layers, in, out) stacked over depth; {name} is {leaf.shape}: "
            "narrow the targets"
        )


def entries(module: Tree, base: Tree) -> dict[str, Tree]:
    """What the module holds for each adapted leaf of `base`, by path; ValueError where it isn't shaped as `base`."""
    try:
        found = jax.tree.structure(base).flatten_up_to(module)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the module's tree isn't the base's ({error}): it was made for other parameters, or it isn't the module "
            "that `init` returned"
        ) from error
    return {name: entry for name, entry in zip(tree.names(base), found, strict=True) if jax.tree.leaves(entry)}
