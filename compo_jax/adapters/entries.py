"""What a module holds for each adapted leaf, by kind: an adapter's `scale` and `sum` are made of it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.adapters.adapter import Scale, Sum, in_containers
from compo_jax.tree import Tree


class Entry(NamedTuple):
    """A kind of entry.

    Attributes:
      name: for messages, with what such an entry looks like.
      holds: `entry ->` whether it is of this kind.
      fits: `(entry, shape) ->` whether it is for a leaf of this shape.
      term: `(entry, weight) -> term`, what adds up by `+` in a sum of modules: a wide array, or a list of parts.
      total: `(sum of terms, dtype) -> entry`, rounded once.
    """

    name: str
    holds: Callable[[Tree], bool]
    fits: Callable[[Tree, tuple[int, ...]], bool]
    term: Callable[[Tree, Any], Any]
    total: Callable[[Any, np.dtype], Tree]


def times(weight: Any, x: Any) -> jax.Array:
    """The product in float32 at least."""
    return jnp.asarray(weight, tree.wide_type(x)) * x.astype(tree.wide_type(x))


#: A full delta of a leaf.
ARRAY = Entry(
    "arrays",
    holds=lambda entry: not isinstance(entry, dict),
    fits=lambda entry, shape: np.shape(entry) == shape,
    term=lambda entry, weight: times(weight, entry),
    total=lambda terms, dtype: terms.astype(dtype),
)


def entries(module: Tree, base: Tree, kinds: Sequence[Entry]) -> dict[str, Tree]:
    """What the module holds for each adapted leaf of `base`, by path; ValueError where it isn't shaped as `base`, or
    holds an entry of none of these kinds."""
    try:
        held = jax.tree.structure(base).flatten_up_to(in_containers(module, base))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the module's tree isn't the base's ({str(error).splitlines()[0][:200]}): it was made for other "
            "parameters, or it isn't the module that `init` returned. Containers count too: flax.core.unfreeze makes "
            "dictionaries of a FrozenDict"
        ) from error
    pairs = {
        name: (entry, np.shape(leaf))
        for (name, leaf), entry in zip(tree.by_name(base).items(), held, strict=True)
        if jax.tree.leaves(entry)
    }
    if foreign := [name for name, (entry, _) in pairs.items() if not any(kind.holds(entry) for kind in kinds)]:
        raise ValueError(
            f"the module's entries for {', '.join(foreign)} aren't those of {' or '.join(kind.name for kind in kinds)}"
            ": take the adapter that made them"
        )
    if wrong := [
        f"{name} is {shape} and its entry {jax.tree.map(np.shape, entry)}"
        for name, (entry, shape) in pairs.items()
        if not kind_of(entry, kinds).fits(entry, shape)
    ]:
        raise ValueError(f"the module doesn't fit the base: {'; '.join(wrong)}: it was made for other parameters")
    return {name: entry for name, (entry, _) in pairs.items()}


def kind_of(entry: Tree, kinds: Sequence[Entry]) -> Entry:
    """The kind that an entry is of."""
    return next(kind for kind in kinds if kind.holds(entry))


def scale_of(kinds: Sequence[Entry]) -> Scale:
    """`Adapter.scale` of modules with such entries."""

    def scale(module: Tree, base: Tree, factor: int | float | jax.Array) -> Tree:
        _require_weight(factor)

        def scaled(entry):
            entry, kind = jax.tree.map(jnp.asarray, entry), kind_of(entry, kinds)
            return kind.total(kind.term(entry, factor), jnp.result_type(*jax.tree.leaves(entry)))

        held = entries(module, base, kinds)
        made = {name: scaled(entry) for name, entry in held.items()}
        tree.require_held(made, held)
        return tree.place(made, base)

    return scale


class _Running(NamedTuple):
    """The sum of some modules' entries for one leaf."""

    kind: Entry
    terms: Any
    dtype: np.dtype


def sum_of(kinds: Sequence[Entry]) -> Sum:
    """`Adapter.sum` of modules with such entries."""

    def added(name: str, before: _Running | None, entry: Tree, weight: Any) -> _Running:
        kind = kind_of(entry, kinds)
        term, dtype = kind.term(entry, weight), jnp.result_type(*jax.tree.leaves(entry))
        if before is None:
            return _Running(kind, term, dtype)
        if before.kind is not kind:
            raise ValueError(
                f"{name} is adapted by modules of the kinds {' and '.join(sorted((before.kind.name, kind.name)))}, "
                "whose sum is none of these: add their deltas with compo_jax.tree.weighted_sum"
            )
        return _Running(kind, before.terms + term, jnp.promote_types(before.dtype, dtype))

    def sum_(
        modules: Iterable[Tree],
        base: Tree,
        weights: Iterable[int | float | jax.Array],
        *,
        check_finite: bool = True,
    ) -> Tree:
        weights = list(weights)
        for weight in weights:
            _require_weight(weight)
        sums: dict[str, _Running] = {}
        count = 0
        for module in modules:
            if count == len(weights):
                raise ValueError(f"a sum needs one weight for each module, and {count} are fewer than the modules")
            if check_finite:
                tree.require_finite(module, f"module {count}")
            for name, entry in entries(module, base, kinds).items():
                sums[name] = added(name, sums.get(name), jax.tree.map(jnp.asarray, entry), weights[count])
            count += 1
        if count < len(weights):
            raise ValueError(f"a sum needs one weight for each module: {len(weights)} were given for {count}")
        if not sums:
            raise ValueError("a sum needs at least one module with an entry")
        made = {name: kind.total(terms, dtype) for name, (kind, terms, dtype) in sums.items()}
        if check_finite:
            tree.require_held(made)
        return tree.place(made, base)

    return sum_


def _require_weight(factor: Any) -> None:
    """ValueError for what is no finite number."""
    if not tree.concrete(factor):
        return
    value = np.asarray(factor)
    if value.ndim or value.dtype == object or not np.isfinite(value):
        raise ValueError(f"a module's weight is one finite number, not {factor!r}")
