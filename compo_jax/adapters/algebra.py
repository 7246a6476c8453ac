"""Sums, multiples and low-rank approximations of modules, and modules moved into the weights and out again.

A module is told by its entries: `{"a", "b"}` is LoRA's, `{"l"}` is (IA)³'s, an array is a full delta.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.adapters.adapter import VIT_TARGETS, Targets, entries, rules

Tree = Any
_HIGHEST = jax.lax.Precision.HIGHEST


class Recompressed(NamedTuple):
    """A module of lower rank, and what it lost.

    Attributes:
      module: LoRA's, the nearest of its rank to the original in the Frobenius norm, leaf by leaf and layer by layer.
      errors: shaped as the base, None where nothing is adapted: for each leaf ‖delta - new delta‖ / ‖delta‖ in the
        Frobenius norm, over all layers of a stacked leaf; 0 for a delta of zeros.
      error: the same ratio over all leaves together.
    """

    module: Tree
    errors: Tree
    error: jax.Array


def _kind(entry: Tree) -> str:
    if not isinstance(entry, dict):
        return "full"
    return "ia3" if "l" in entry else "lora"


def _scaled(entry: Tree, factor) -> Tree:
    if _kind(entry) == "full":
        return entry * jnp.asarray(factor, entry.dtype)
    if _kind(entry) == "ia3":
        return {"l": 1 + jnp.asarray(factor, entry["l"].dtype) * (entry["l"] - 1)}
    return {"a": entry["a"], "b": entry["b"] * jnp.asarray(factor, entry["b"].dtype)}


def _entries(module: Tree, base: Tree) -> dict[str, Tree]:
    return jax.tree.map(jnp.asarray, entries(module, base))


def _shaped(found: dict[str, Tree], base: Tree) -> Tree:
    return tree.map_with_name(lambda name, _: found.get(name), base)


def scale(module: Tree, base: Tree, factor: int | float | jax.Array) -> Tree:
    """The module whose delta is `factor` times that of `module`: -1 negates it. (IA)³'s `l` becomes `1 + s (l - 1)`.

    `base` gives the structure alone. ValueError where the module isn't shaped as it.
    """
    return _shaped({name: _scaled(entry, factor) for name, entry in _entries(module, base).items()}, base)


def weighted_sum(modules: Iterable[Tree], base: Tree, weights: Iterable[int | float | jax.Array]) -> Tree:
    """The module whose delta is `Σ_t weights[t] delta_t`, exactly.

    LoRA's factors are concatenated, so the ranks add up (see `recompress`) and may differ from module to module; full
    deltas and (IA)³'s `l - 1` are added. A leaf that some modules don't adapt counts as zero there. Any adapter of the
    modules' kind gives the sum's delta.

    Raises ValueError for no modules, for other numbers of weights than modules, and for modules of several kinds.
    """
    parts: dict[str, list[Tree]] = {}
    for module, weight in zip(modules, weights, strict=True):
        for name, entry in _entries(module, base).items():
            parts.setdefault(name, []).append(_scaled(entry, weight))
    if not parts:
        raise ValueError("a weighted sum needs at least one module with an entry")

    def summed(name: str, terms: list[Tree]) -> Tree:
        kinds = sorted({_kind(term) for term in terms})
        if len(kinds) > 1:
            raise ValueError(
                f"{name} is adapted by modules of the kinds {' and '.join(kinds)}, whose sum is none of these: add "
                "their deltas with compo_jax.tree.weighted_sum"
            )
        if kinds == ["full"]:
            return sum(terms[1:], start=terms[0])
        if kinds == ["ia3"]:
            return {"l": 1 + sum(term["l"] - 1 for term in terms)}
        return {
            factor: jnp.concatenate([term[factor] for term in terms], axis) for factor, axis in (("a", -1), ("b", -2))
        }

    return _shaped({name: summed(name, terms) for name, terms in parts.items()}, base)


def _singular(entry: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The thin singular value decomposition of an entry's delta; a product of factors is never formed."""
    if _kind(entry) == "full":
        u, s, vt = jnp.linalg.svd(entry, full_matrices=False)
        return u, s, vt
    left, a = jnp.linalg.qr(entry["a"])
    right, b = jnp.linalg.qr(jnp.swapaxes(entry["b"], -1, -2))
    u, s, vt = jnp.linalg.svd(jnp.matmul(a, jnp.swapaxes(b, -1, -2), precision=_HIGHEST), full_matrices=False)
    right = jnp.swapaxes(right, -1, -2)
    return jnp.matmul(left, u, precision=_HIGHEST), s, jnp.matmul(vt, right, precision=_HIGHEST)


def recompress(module: Tree, base: Tree, rank: int, targets: Targets = VIT_TARGETS) -> Recompressed:
    """The best approximation of a LoRA module or a full delta by LoRA of a given rank (Eckart and Young, 1936).

    Costs thin QR factorisations of LoRA's factors and a small SVD per layer; a full delta costs its own SVD.

    Args:
      rank: r, as of `lora`; a leaf whose delta has fewer singular values keeps what it has.
      targets: patterns with the multiples of the rank, as of `lora`; a leaf that none matches has the multiple 1.

    Raises ValueError for an (IA)³ module and a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA module is at least 1, not {rank}")
    found, lost, total = {}, {}, {}
    for name, entry in _entries(module, base).items():
        if _kind(entry) == "ia3":
            raise ValueError(f"the entry for {name} is (IA)³'s, which has no rank: take its delta as a full module")
        dtype = jnp.result_type(*jax.tree.leaves(entry))
        # LAPACK has no 16-bit types
        left, s, right = _singular(jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), entry))
        width = rank * tree.first_match(name, rules(targets), default=1)
        root = jnp.sqrt(s[..., :width])
        factors = {"a": left[..., :width] * root[..., None, :], "b": root[..., :, None] * right[..., :width, :]}
        found[name] = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), factors)
        lost[name], total[name] = jnp.sum(s[..., width:] ** 2), jnp.sum(s**2)

    def ratio(lost, total):
        return jnp.sqrt(lost / jnp.where(total > 0, total, 1))

    errors = {name: ratio(lost[name], total[name]) for name in found}
    return Recompressed(_shaped(found, base), _shaped(errors, base), ratio(sum(lost.values()), sum(total.values())))


def fuse(base: Tree, delta: Tree) -> Tree:
    """`base + delta`, one set of weights that costs what the base costs; ValueError where the delta doesn't fit."""
    tree.require_like(delta, base, "the delta")
    return tree.add(base, delta)


def unfuse(fused: Tree, delta: Tree) -> Tree:
    """The base that `fuse(base, delta)` was made of, up to the rounding of one sum; leaves with no delta bit for bit.

    (IA)³'s delta depends on its base: take it before fusing.
    """
    tree.require_like(delta, fused, "the delta")
    return tree.add(fused, delta, -1.0)
