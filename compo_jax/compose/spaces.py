"""Other coordinates to merge in: the deltas are written in bases that all tasks share, any rule merges them there, and
what it makes is written back.

Matrices are as in `matrices`; other leaves go through as they are. Both spaces lose nothing, so that rules that are
linear, such as the average, make the same in them as without; but for deltas in 16 bits that are weaker than the
rounding errors of another module's, which `knots_space` takes for such errors. What `Space.deltas` hold can be given to
a rule of your own; the rules "knots" and "core_space" do it for those of `RULES`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED, in_containers, require_matrix
from compo_jax.adapters.low_rank import FACTORS
from compo_jax.compose.entries import Deferred, whole
from compo_jax.compose.leaves import Stacked, layers
from compo_jax.compose.matrices import Eps, Rounded, product, require_paths, rounded, svd
from compo_jax.compose.modules import require_finite, with_holes
from compo_jax.tree import Tree


@runtime_checkable
class Back(Protocol):
    """The way out of a space."""

    def __call__(self, delta: Tree) -> Tree:
        """What a tree shaped as `Space.base` is in the parameters' coordinates, None where no module changes a leaf."""
        ...


class Space(NamedTuple):
    """Modules in coordinates that they share.

    Attributes:
      base: zeros, in float32 at least, where a module changes a leaf, and elsewhere the base's leaf.
      deltas: one a module, shaped as `base`, None where nothing changes; a stack of layers has them on axis 0, too.
      back: `(merged delta) -> delta`.
      eps: by path, the errors that the modules have from rounding; LoRA's factors are taken as exact.
    """

    base: Tree
    deltas: list[Tree]
    back: Back
    eps: dict[str, Rounded]


class _Shared(NamedTuple):
    """A leaf in the space, layers on axis 0: the modules' coordinates, and the bases that lead back."""

    rows: list[Array]  # of the modules that have the leaf
    left: Array | None = None  # (layers, in, k)
    right: Array | None = None  # (layers, k, out)


def _matrices(x: Any, of_layers: bool) -> Array:
    """A leaf as (layers, in, out), in float32 at least; one layer where its axis 0 counts none."""
    x = jnp.asarray(whole(x), tree.wide_type(x))
    return x.reshape(x.shape[0] if of_layers else 1, -1, x.shape[-1])


def _decomposed(joint: Array, errors: Rounded) -> tuple[Array, Array]:
    """(left, `S right`) singular vectors of each of the matrices (layers, n, m), one after another."""
    return _each_decomposed(joint, errors.floor, errors.eps)


@functools.partial(jax.jit, static_argnums=2)  # see `by_matrix`
def _each_decomposed(joint, floor, eps):
    def one(x):
        parts = svd(x, Rounded(eps, floor))
        return parts.left, parts.values[:, None] * parts.right

    return jax.lax.map(one, joint)


def _space(
    base: Tree, holed: list[Tree], eps: Eps, stacked: Stacked, share: Callable[[list, bool, Rounded], _Shared] | None
) -> Space:
    """The space of modules with None where they change nothing.

    Args:
      share: `(the leaves of the modules that have one, whether their axis 0 counts layers, the size of their errors)
        ->` what they share; of matrices alone, or of none.
    """
    require_paths(eps, base)
    rows = [jax.tree.structure(base).flatten_up_to(delta) for delta in holed]
    rows = dict(zip(tree.names(base), map(list, zip(*rows, strict=True)), strict=True))
    firsts = {name: next((x for x in row if x is not None), None) for name, row in rows.items()}
    of_layers = layers(base, tree.place(firsts, base), stacked)
    shapes = {name: np.shape(leaf) for name, leaf in tree.by_name(base).items()}
    spaces: dict[str, _Shared] = {}
    errors = {
        name: _rounded([x for x in rows[name] if x is not None], name, eps, b)
        for name, b in tree.by_name(base).items()
        if firsts[name] is not None
    }
    for name, first in firsts.items():
        stack = name in of_layers
        if any(isinstance(x, _Product) for x in rows[name]):
            require_matrix(name, first, "Core Space", stacked)
        if share is None or first is None or not np.size(first) or len(shapes[name]) - stack < 2:
            continue
        made = share([x for x in rows[name] if x is not None], stack, errors[name])
        spaces[name] = made if stack else jax.tree.map(lambda x: x[0], made)
        coordinates = iter(spaces[name].rows)
        rows[name] = [None if x is None else next(coordinates) for x in rows[name]]
        firsts[name] = spaces[name].rows[0]

    def zeros(name, b):  # of the base's holes, too
        x = firsts.get(name)
        return b if x is None else jnp.zeros(np.shape(x), tree.wide_type(x))

    def leaf(name, x):
        if firsts.get(name) is None:
            return None
        if name not in spaces:
            return x
        _, left, right = spaces[name]
        factors = [factor for factor in (left, x, right) if factor is not None]
        return product(*factors).reshape(shapes[name])

    deltas = [tree.place({name: row[t] for name, row in rows.items()}, base) for t in range(len(holed))]
    return Space(tree.map_with_name(zeros, base), deltas, lambda delta: tree.map_with_name(leaf, delta), errors)


def _rounded(leaves: Sequence, name: str, eps: Eps, b: Any) -> Rounded:
    """What the leaves were rounded to. Factors are what they are, however weak one module is beside another: deltas
    alone have errors of rounding."""
    deltas = [x for x in leaves if not isinstance(x, _Product)]
    if deltas:
        return rounded(deltas, name, eps, b)
    return Rounded(max(float(jnp.finfo(tree.wide_type(x)).eps) for x in leaves))


def at_zero(base: Tree, deltas: Sequence[Tree], *, eps: Eps = None, check_finite: bool = True) -> Space:
    """The modules as they are, on a base of zeros: what a rule makes there is its task vector, unrounded."""
    return _space(base, with_holes(base, deltas, check_finite=check_finite), eps, (), None)


def knots_space(
    base: Tree,
    deltas: Sequence[Tree],
    *,
    shared: str = "out",
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Space:
    """KnOTS (Stoica et al., 2024, arXiv 2410.19735): blocks of the singular vectors of all tasks' matrices in a row.

    The matrices of a layer are put in one row, whose singular value decomposition has one basis that all tasks share,
    and a block of the other for each task; the blocks, times the singular values (as in the authors' code), are what is
    merged.

    Args:
      shared: `out`, as in the authors' code: the tasks' matrices one above the other, with (k, out) shared and blocks
        (in, k); `in`: side by side, with (in, k) shared and blocks (k, out).
      eps, stacked: see `tsv`.

    Errors as `compose`.
    """
    if shared not in ("out", "in"):
        raise ValueError(f"shared={shared!r} is not among out, in")

    def share(leaves, of_layers, errors):
        x = jnp.stack([_matrices(x, of_layers) for x in leaves], axis=2)  # (layers, in, tasks, out)
        if shared == "out":  # the decomposition of the transposed matrices
            x = jnp.moveaxis(x, 3, 1).swapaxes(2, 3)
        basis, blocks = _decomposed(x.reshape(*x.shape[:2], -1), errors)
        rows = list(jnp.moveaxis(blocks.reshape(*blocks.shape[:2], *x.shape[2:]), 2, 0))
        if shared == "in":
            return _Shared(rows, left=basis)
        return _Shared([row.swapaxes(1, 2) for row in rows], right=basis.swapaxes(1, 2))

    return _space(base, with_holes(base, deltas, check_finite=check_finite), eps, stacked, share)


class _Product(Deferred):
    """A leaf that is LoRA's two factors."""

    def __init__(self, entry: Tree):
        self.a, self.b = entry["a"], entry["b"]
        shape, dtype = (*np.shape(self.a)[:-1], np.shape(self.b)[-1]), jnp.result_type(self.a, self.b)
        super().__init__(shape, dtype, lambda: np.matmul(self.a, self.b).reshape(-1))


def _factored(module: Tree, base: Tree, what: str) -> Tree:
    """The module, each pair of factors as one leaf; ValueError where they don't fit the base's leaf."""
    module, shapes = in_containers(module, base), {n: np.shape(leaf) for n, leaf in tree.by_name(base).items()}

    def one(path, entry):
        name = tree.path_name(path)
        if name not in shapes or not FACTORS.holds(entry):
            return entry
        if not FACTORS.fits(entry, shapes[name]):
            raise ValueError(
                f"{what} doesn't fit the parameters: {name} is {shapes[name]} and its factors {np.shape(entry['a'])} "
                f"and {np.shape(entry['b'])}: they were made for other parameters"
            )
        return _Product(entry) if np.size(entry["a"]) else None  # of rank 0: it changes nothing

    def at_leaf(path, x):
        return x is None or tree.path_name(path) in shapes

    return jax.tree_util.tree_map_with_path(one, module, is_leaf=at_leaf, is_leaf_takes_path=True)


def fitted(base: Tree, modules: Sequence[Tree]) -> list[Tree]:
    """The modules, LoRA's or deltas, with None where they change nothing. Errors as `core_space`, but of the values."""
    if not isinstance(modules, Mapping):  # which is told below
        modules = [_factored(module, base, f"delta {t}") for t, module in enumerate(modules)]
    return with_holes(base, modules)


def core_space(
    base: Tree,
    modules: Sequence[Tree],
    *,
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Space:
    """Core Space (Panariello et al., 2025, arXiv 2509.17786): LoRA modules in the spans of all their factors.

    With `Δ_t = A_t B_t` the left singular vectors of `[A_1 … A_T]` are a basis Q_A of all tasks' inputs, the right
    ones of the B_t one above the other a basis Q_B of their outputs (the authors' code takes these, too), and
    `M_t = Q_Aᵀ A_t B_t Q_Bᵀ` is what is merged: as large as the ranks' sum, whatever the layer. No delta is formed.

    Args:
      modules: LoRA modules (`adapters.lora`), of any ranks. Leaves that are arrays, full deltas, are taken too, and
        cost what they cost in `knots_space`.
      eps, stacked: see `tsv`.

    Errors as `compose`, and ValueError for factors that don't fit.
    """
    holed = fitted(base, modules)
    for t, module in enumerate(holed):
        if check_finite:
            opened = jax.tree.map(lambda x: {"a": x.a, "b": x.b} if isinstance(x, _Product) else x, module)
            require_finite(opened, f"delta {t}")

    def share(leaves, of_layers, errors):
        # a full delta is its factor on both sides
        pairs = [(x.a, x.b) if isinstance(x, _Product) else (x, x) for x in leaves]
        lefts, rights = ([_matrices(x, of_layers) for x in side] for side in zip(*pairs, strict=True))
        left, _ = _decomposed(jnp.concatenate(lefts, axis=2), errors)
        right, _ = _decomposed(jnp.concatenate(rights, axis=1).swapaxes(1, 2), errors)
        cores = []
        for x, a, b in zip(leaves, lefts, rights, strict=True):
            core = product(left.swapaxes(1, 2), a)
            cores.append(product(core, product(b, right) if isinstance(x, _Product) else right))
        return _Shared(cores, left, right.swapaxes(1, 2))

    return _space(base, holed, eps, stacked, share)
