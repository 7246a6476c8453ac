"""Low-rank approximations of modules, and modules moved into the weights and out again."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.adapters.adapter import (
    STACKED,
    VIT_TARGETS,
    Targets,
    alike,
    is_matrix,
    rules,
    whole_number,
)
from compo_jax.adapters.entries import ARRAY, entries
from compo_jax.adapters.low_rank import FACTORS, KINDS
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


def _singular(entry: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The thin singular value decomposition of one matrix, or of a product of factors, which is never formed."""
    if ARRAY.holds(entry):
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
        axis of heads): `keep` leaves them in the module as they are, which `lora`'s delta takes, and `save_peft` where
        PyTorch's names are known; `drop` leaves them out.
      stacked: patterns of the paths whose axis 0 counts layers, as of `lora`.

    Raises ValueError for a module of another adapter (of an (IA)³ module take the delta), one that changes no matrices,
    a rank below 1, and NaN or infinities, unless `check_finite` is False.
    """
    whole_number("the rank of a LoRA module", rank)
    if others not in ("keep", "drop"):
        raise ValueError(f"others={others!r} is not among keep, drop")
    if check_finite:
        tree.require_finite(module, "the module")
    nearest, lost, total = {}, {}, {}
    for name, entry in entries(module, base, KINDS).items():
        entry = jax.tree.map(jnp.asarray, entry)
        dtype = jnp.result_type(*jax.tree.leaves(entry))
        # LAPACK has no 16-bit types
        wide = jax.tree.map(lambda x: x.astype(tree.wide_type(x)), entry)
        if ARRAY.holds(entry) and not is_matrix(name, entry, stacked):
            total[name] = jnp.sum(wide**2)
            lost[name] = jnp.zeros_like(total[name]) if others == "keep" else total[name]
            nearest[name] = entry if others == "keep" else None
            continue
        left, s, right = _singular_each(wide)
        width = rank * tree.first_match(name, rules(targets), default=1)
        root = jnp.sqrt(s[..., :width])
        factors = {"a": left[..., :width] * root[..., None, :], "b": root[..., :, None] * right[..., :width, :]}
        nearest[name] = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), factors)
        lost[name], total[name] = jnp.sum(s[..., width:] ** 2), jnp.sum(s**2)

    if nearest and not any(map(FACTORS.holds, nearest.values())):
        raise ValueError(
            f"the module changes no matrices but {', '.join(nearest)} alone, and no LoRA comes of these: keep it as "
            "the full delta that it is (adapters.full)"
        )

    def ratio(lost, total):
        return jnp.sqrt(lost / jnp.where(total > 0, total, 1))

    errors = {name: ratio(lost[name], total[name]) for name in nearest}
    return Recompressed(
        tree.place(nearest, base), tree.place(errors, base), ratio(sum(lost.values()), sum(total.values()))
    )


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
    moved = tree.add(base, delta, by)
    if check_finite:
        tree.require_held(moved, base)
    return moved
