"""Sums, multiples and low-rank approximations of modules, and modules moved into the weights and out again.

A module is told by its entries: `{"a", "b"}` is LoRA's, `{"l"}` is (IA)³'s, an array is a full delta.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.adapters.adapter import (
    STACKED,
    VIT_TARGETS,
    Targets,
    alike,
    entries,
    is_matrix,
    kind,
    rules,
    whole_number,
)
from compo_jax.lapack import svd
from compo_jax.tree import Tree

_HIGHEST = jax.lax.Precision.HIGHEST


class Recompressed(NamedTuple):
    """A module of lower rank, and what it lost.

    Attributes:
      module: LoRA's, the nearest of its rank to the original in the Frobenius norm, leaf by leaf and layer by layer;
        beside its factors the full deltas of leaves that are no matrices, where they are kept.
      errors: shaped as the base, None where nothing is adapted: for each leaf ‖delta - new delta‖ / ‖delta‖ in the
        Frobenius norm, over all layers of a stacked leaf; 0 for a delta of zeros and for one that is kept as it is, 1
        for one that is dropped.
      error: the same ratio over all leaves together.
    """

    module: Tree
    errors: Tree
    error: jax.Array


def _weight(factor: Any) -> Any:
    """A module's weight; ValueError for what is no finite number."""
    if not tree.concrete(factor):
        return factor
    value = np.asarray(factor)
    if value.ndim or value.dtype == object or not np.isfinite(value):
        raise ValueError(f"a module's weight is one finite number, not {factor!r}")
    return factor


def _term(entry: Tree, weight: Any) -> Tree:
    """What adds up in a sum of modules, weighted: a list of LoRA's factors, or a wide array."""
    if kind(entry) == "lora":
        wide = tree.wide_type(entry["b"])
        return [{"a": entry["a"], "b": (jnp.asarray(weight, wide) * entry["b"].astype(wide)).astype(entry["b"].dtype)}]
    value = entry if kind(entry) == "full" else entry["l"]
    wide = tree.wide_type(value)
    return jnp.asarray(weight, wide) * (value.astype(wide) - (0 if kind(entry) == "full" else 1))


def _total(kind: str, terms: Tree, dtype: np.dtype) -> Tree:
    """The entry that a sum of terms makes, rounded once to the entries' own type."""
    if kind == "lora":
        return {k: jnp.concatenate([term[k] for term in terms], axis) for k, axis in (("a", -1), ("b", -2))}
    return terms.astype(dtype) if kind == "full" else {"l": (1 + terms).astype(dtype)}


def _entries(module: Tree, base: Tree) -> dict[str, Tree]:
    return jax.tree.map(jnp.asarray, entries(module, base))


def _shaped(found: dict[str, Tree], base: Tree) -> Tree:
    return tree.map_with_name(lambda name, _: found.get(name), base)


def scale(module: Tree, base: Tree, factor: int | float | jax.Array) -> Tree:
    """The module whose delta is `factor` times that of `module`: -1 negates it. (IA)³'s `l` becomes `1 + s (l - 1)`.

    `base` gives the structure alone. ValueError where the module isn't shaped as it, or the factor is no finite number.
    """
    factor = _weight(factor)

    def scaled(entry):
        return _total(kind(entry), _term(entry, factor), jnp.result_type(*jax.tree.leaves(entry)))

    return _shaped({name: scaled(entry) for name, entry in _entries(module, base).items()}, base)


def weighted_sum(
    modules: Iterable[Tree],
    base: Tree,
    weights: Iterable[int | float | jax.Array],
    *,
    check_finite: bool = True,
) -> Tree:
    """The module whose delta is `Σ_t weights[t] delta_t`, exactly.

    LoRA's factors are concatenated, so the ranks add up (see `recompress`) and may differ from module to module; full
    deltas and (IA)³'s `l - 1` are added, in float32 at least, and rounded once. A leaf that some modules don't adapt
    counts as zero there. Any adapter of the modules' kind gives the sum's delta. `modules` are read one after another.

    Raises ValueError for no modules, for other numbers of weights than modules, for weights that are no finite numbers,
    for modules of several kinds, and for one that holds NaN or infinities, unless `check_finite` is False.
    """
    weights = [_weight(weight) for weight in weights]
    sums: dict[str, tuple[str, Tree, Any]] = {}
    count = 0
    for module in modules:
        if count == len(weights):
            raise ValueError(f"a weighted sum needs one weight for each module, and {count} are fewer than the modules")
        if check_finite:
            tree.require_finite(module, f"module {count}")
        for name, entry in _entries(module, base).items():
            own, dtype = kind(entry), jnp.result_type(*jax.tree.leaves(entry))
            term = _term(entry, weights[count])
            if name in sums:
                known, before, other = sums[name]
                if known != own:
                    raise ValueError(
                        f"{name} is adapted by modules of the kinds {' and '.join(sorted((known, own)))}, whose sum is "
                        "none of these: add their deltas with compo_jax.tree.weighted_sum"
                    )
                term, dtype = before + term, jnp.promote_types(other, dtype)
            sums[name] = own, term, dtype
        count += 1
    if count < len(weights):
        raise ValueError(f"a weighted sum needs one weight for each module: {len(weights)} were given for {count}")
    if not sums:
        raise ValueError("a weighted sum needs at least one module with an entry")
    return _shaped({name: _total(*parts) for name, parts in sums.items()}, base)


def _singular(entry: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The thin singular value decomposition of one matrix, or of a product of factors, which is never formed."""
    if kind(entry) == "full":
        return svd(entry)
    left, a = jnp.linalg.qr(entry["a"])
    right, b = jnp.linalg.qr(entry["b"].T)
    u, s, vt = svd(jnp.matmul(a, b.T, precision=_HIGHEST))
    return jnp.matmul(left, u, precision=_HIGHEST), s, jnp.matmul(vt, right.T, precision=_HIGHEST)


@jax.jit  # the loop would else be compiled anew at each call
def _singular_each(entry: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_singular` of each matrix of a stack, one after another: several LAPACK calls at once hang jax 0.10 where there
    are few cores."""
    stack = jax.tree.leaves(entry)[0].shape[:-2]
    flat = jax.tree.map(lambda x: x.reshape(math.prod(stack), *x.shape[-2:]), entry)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), jax.lax.map(_singular, flat))


def recompress(
    module: Tree,
    base: Tree,
    rank: int,
    targets: Targets = VIT_TARGETS,
    *,
    others: Literal["keep", "drop"] = "keep",
    stacked: str | Sequence[str] = STACKED,
    check_finite: bool = True,
) -> Recompressed:
    """The best approximation of a LoRA module or a full delta by LoRA of a given rank (Eckart and Young, 1936).

    Costs thin QR factorisations of LoRA's factors and a small SVD per layer; a full delta costs its own SVD.

    Args:
      rank: r, as of `lora`; a leaf whose delta has fewer singular values keeps what it has.
      targets: patterns with the multiples of the rank, as of `lora`; a leaf that none matches has the multiple 1.
      others: what becomes of full deltas of leaves that are no matrices (biases, scales, convolutions, kernels with an
        axis of heads): `keep` leaves them in the module as they are, which `lora`'s delta takes and `save_peft`
        doesn't; `drop` leaves them out.
      stacked: patterns of the paths whose axis 0 counts layers, as of `lora`.

    Raises ValueError for an (IA)³ module, one that changes no matrices, a rank below 1, and NaN or infinities, unless
    `check_finite` is False.
    """
    whole_number("the rank of a LoRA module", rank)
    if others not in ("keep", "drop"):
        raise ValueError(f"others={others!r} is not among keep, drop")
    if check_finite:
        tree.require_finite(module, "the module")
    found, lost, total = {}, {}, {}
    for name, entry in _entries(module, base).items():
        if kind(entry) == "ia3":
            raise ValueError(f"the entry for {name} is (IA)³'s, which has no rank: take its delta as a full module")
        dtype = jnp.result_type(*jax.tree.leaves(entry))
        # LAPACK has no 16-bit types
        wide = jax.tree.map(lambda x: x.astype(tree.wide_type(x)), entry)
        if kind(entry) == "full" and not is_matrix(name, entry, stacked):
            total[name] = jnp.sum(wide**2)
            lost[name] = jnp.zeros_like(total[name]) if others == "keep" else total[name]
            found[name] = entry if others == "keep" else None
            continue
        left, s, right = _singular_each(wide)
        width = rank * tree.first_match(name, rules(targets), default=1)
        root = jnp.sqrt(s[..., :width])
        factors = {"a": left[..., :width] * root[..., None, :], "b": root[..., :, None] * right[..., :width, :]}
        found[name] = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), factors)
        lost[name], total[name] = jnp.sum(s[..., width:] ** 2), jnp.sum(s**2)

    if found and "lora" not in map(kind, found.values()):
        raise ValueError(
            f"the module changes no matrices but {', '.join(found)} alone, and no LoRA comes of these: keep it as the "
            "full delta that it is (adapters.full)"
        )

    def ratio(lost, total):
        return jnp.sqrt(lost / jnp.where(total > 0, total, 1))

    errors = {name: ratio(lost[name], total[name]) for name in found}
    return Recompressed(_shaped(found, base), _shaped(errors, base), ratio(sum(lost.values()), sum(total.values())))


def fuse(base: Tree, delta: Tree, *, check_finite: bool = True) -> Tree:
    """`base + delta`, one set of weights that costs what the base costs; ValueError where the delta doesn't fit, or
    holds NaN or infinities, unless `check_finite` is False."""
    return _moved(base, delta, 1.0, check_finite)


def unfuse(fused: Tree, delta: Tree, *, check_finite: bool = True) -> Tree:
    """The base that `fuse(base, delta)` was made of, up to the rounding of one sum; leaves with no delta bit for bit.

    (IA)³'s delta depends on its base: take it before fusing.
    """
    return _moved(fused, delta, -1.0, check_finite)


def _moved(base: Tree, delta: Tree, by: float, check_finite: bool) -> Tree:
    delta = alike(delta, base)
    tree.require_like(delta, base, "the delta")
    if check_finite:
        tree.require_finite(delta, "the delta")
    return tree.add(base, delta, by)
