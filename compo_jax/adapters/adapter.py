"""What an adapter is: a way to say a change of some weights with few numbers."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.tree import Tree

Targets = str | Sequence[str | Sequence]  # patterns, or (pattern, multiple of the rank) pairs

#: The weights that the paper adapts: every dense kernel of a ViT's blocks, three times the rank for the joint qkv.
VIT_TARGETS = ((r"qkv/kernel$", 3), (r"(proj|fc1|fc2)/kernel$", 1))

#: Paths of leaves whose axis 0 counts layers: those of our ViT's scanned blocks. Blocks with numbers in their paths
#: (`blocks/0/...`, `blocks/Block_0/...`, `blocks/layers/0/...` of a Sequential) are written out one by one.
STACKED = (r"(^|/)blocks/(?!(layers/)?([^/]*([Bb]lock|[Ll]ayer)_)?\d+/)",)


@runtime_checkable
class Init(Protocol):
    """Where training begins."""

    def __call__(self, key: jax.Array, base: Tree) -> Tree:
        """The module: shaped as `base`, with None where nothing is adapted and the adapter's numbers in place of an
        adapted leaf; an array of the leaf's shape is a full delta of it."""
        ...


@runtime_checkable
class Delta(Protocol):
    """What a module changes."""

    def __call__(self, module: Tree, base: Tree) -> Tree:
        """A tree shaped as `base`, None where nothing changes; the adapted model is `base + delta`."""
        ...


@runtime_checkable
class Dense(Protocol):
    """The short cut through a dense layer."""

    def __call__(self, x: jax.Array, y: jax.Array, entry: Tree, bias: jax.Array | None) -> jax.Array:
        """The adapted output of a layer with input `x`, frozen output `y` and frozen `bias` (None where it has none;
        `y` includes it), by the module's `entry` for its kernel, without ever forming the delta."""
        ...


@runtime_checkable
class Scale(Protocol):
    """Multiples of modules."""

    def __call__(self, module: Tree, base: Tree, factor: int | float | jax.Array) -> Tree:
        """The module whose delta is `factor` times that of `module`: -1 negates it. `base` gives the structure alone.

        ValueError where the module isn't shaped as the base, or the factor is no finite number."""
        ...


@runtime_checkable
class Sum(Protocol):
    """Sums of modules."""

    def __call__(
        self,
        modules: Iterable[Tree],
        base: Tree,
        weights: Iterable[int | float | jax.Array],
        *,
        check_finite: bool = True,
    ) -> Tree:
        """The module whose delta is `Σ_t weights[t] delta_t`, exactly; `modules` are read one after another. A leaf
        that some don't adapt counts as zero there.

        ValueError for no modules, other numbers of weights than modules, weights that are no finite numbers, modules of
        another adapter, and one that holds NaN or infinities, unless `check_finite` is False."""
        ...


class Adapter(NamedTuple):
    """A way to say a change of some weights with few numbers: pure functions, and what it takes to make them again.

    For an adapter of your own give at least `init` and `delta`, and what else is wanted of it; with a `name`, and
    `adapters.register`, pools store its modules.

    Attributes:
      init: `(key, base) -> module`.
      delta: `(module, base) -> delta`.
      dense: `(x, y, entry, bias) -> y`, for the fast path of Linen models; None where there is no such short cut.
      scale: `(module, base, factor) -> module`.
      sum: `(modules, base, weights) -> module`.
      name, settings: `adapters.build(name, settings)` returns this adapter.
      mixed: whether a module may hold full deltas, arrays of the leaves' shapes, among the adapter's own entries.
    """

    init: Init
    delta: Delta
    dense: Dense | None = None
    scale: Scale | None = None
    sum: Sum | None = None
    name: str = ""
    settings: dict[str, Any] = {}
    mixed: bool = False


def patterns(expressions: str | Iterable[str]) -> tuple[str, ...]:
    """One or several regular expressions as a tuple; ValueError for one that is none."""
    listed = (expressions,) if isinstance(expressions, str) else tuple(expressions)
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
    names = tree.names(base)
    for pattern, _ in rules(targets):
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"the adapter's pattern {pattern!r} matches no parameter; the parameters are: {', '.join(names)}"
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


def in_containers(module: Tree, base: Tree) -> Tree:
    """A module as pools keep it, in plain dictionaries, in the containers of `base`; another one as it is.

    ValueError where it holds something that isn't at the path of a leaf of the base.
    """
    kept = type(module) is dict and tree.is_plain(module)
    foreign = kept and not tree.is_plain(base) and not hasattr(base, "unfreeze")
    return tree.regrown(module, base) if foreign else alike(module, base)
