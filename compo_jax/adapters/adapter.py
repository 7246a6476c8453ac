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


class Adapter(NamedTuple):
    """Two pure functions, and what it takes to make them again.

    Attributes:
      init: `(key, base) -> module`, the trainable tree: shaped as `base`, with None where nothing is adapted and the
        adapter's own numbers in place of an adapted leaf.
      delta: `(module, base) -> tree` shaped as `base`, None where nothing changes; the adapted model is `base + delta`.
      dense: `(x, y, entry) -> y`, the output of a dense layer with input `x` and frozen output `y`, adapted by the
        module's `entry` for its kernel, without ever forming the delta; None where there is no such short cut.
      name, settings: `adapters.build(name, settings)` returns this adapter.
    """

    init: Callable[[jax.Array, Tree], Tree]
    delta: Callable[[Tree, Tree], Tree]
    dense: Callable[[jax.Array, jax.Array, Tree], jax.Array] | None = None
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
