"""Leaves entry by entry, in pieces that stay in the processor's cache; and leaves that are read when they are needed.

What NumPy can read where it is goes through one compiled function piece by piece: one program for leaves of all
shapes, and no array as large as a leaf but the result. What is traced, on an accelerator or spread over devices goes
through the same function leaf by leaf.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.memory import give_back_memory

#: Entries of a piece: some rows of them fit into a core's second cache.
PIECE = 1 << 16
_ALIGNED = 64  # bytes


class Deferred:
    """A leaf whose entries are read, or computed, when they are asked for.

    Attributes:
      shape, dtype: the leaf's.
      open: makes what gives the entries, flattened, as NumPy arrays: `open()[start:stop]`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, open: Callable[[], Any]):
        self.shape, self.dtype, self.open = tuple(shape), np.dtype(dtype), open

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            return np.array(self.open()[:], dtype or self.dtype, copy=copy).reshape(self.shape)


def on_host(*leaves: Any) -> bool:
    """Whether NumPy can read the leaves where they are: none is traced, on an accelerator or spread over devices."""
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    if not tree.concrete(arrays):
        return False
    devices = {device for x in arrays for device in x.devices()}
    with jax.ensure_compile_time_eval():
        return not devices or (devices == jnp.zeros(()).devices() and devices.pop().platform == "cpu")


def whole(leaf: Any) -> Any:
    """The leaf; one that is `Deferred` is read."""
    return np.asarray(leaf) if isinstance(leaf, Deferred) else leaf


def flat(leaf: Any) -> Any:
    """The entries in one row, to be cut in slices."""
    return leaf.open() if isinstance(leaf, Deferred) else np.asarray(leaf).reshape(-1)


def pieces(row: Any, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """A row of `size` entries, cut: (a piece's place, the piece)."""
    for start in range(0, size, PIECE):
        place = slice(start, min(start + PIECE, size))
        yield place, row[place]


def entrywise(
    function: Callable[..., Array], leaves: Sequence[Any], numbers: Sequence = (), dtype: Any = None
) -> Array:
    """`function(numbers, *leaves)` of leaves of one shape, rounded once.

    Args:
      function: works entry by entry, in float32 at least; a top-level function and no lambda, for it is compiled once.
      numbers: what else it needs that may be traced, scalars; it gets them as one array.
      dtype: of the result; default the first leaf's.
    """
    wide, shape, size = tree.wide_type(*leaves), np.shape(leaves[0]), np.size(leaves[0])
    dtype = jnp.result_type(leaves[0]) if dtype is None else dtype
    if not on_host(*leaves, *numbers):
        rows = [whole(x) for x in leaves]
        run = _compiled if tree.concrete(rows, list(numbers)) else _rounded
        return run(function, wide, dtype, jnp.array([jnp.asarray(n, wide) for n in numbers], wide), *rows)
    numbers = np.array([np.asarray(n) for n in numbers], wide)
    out, rows = _empty(size, dtype), [flat(x) for x in leaves]
    spare = [_empty(PIECE, jnp.result_type(x)) for x in leaves]
    with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):  # constants of a function that is traced
        for place, first in pieces(rows[0], size):
            cut = [_ready(x, s) for x, s in zip([first, *(row[place] for row in rows[1:])], spare, strict=True)]
            out[place] = np.asarray(_compiled(function, wide, dtype, numbers, *cut))[: first.size]
    return jax.device_put(out.reshape(shape))


_SHORT = 128  # entries: what is read in samples isn't worth a whole piece


def computed(function: Callable[..., Array], leaves: Sequence[Any], numbers: Sequence = ()) -> Any:
    """`function(numbers, *leaves)` as of `entrywise`, unrounded: `Deferred` where NumPy can read the leaves."""
    wide, shape, size = tree.wide_type(*leaves), np.shape(leaves[0]), np.size(leaves[0])
    if not on_host(*leaves, *numbers):
        return entrywise(function, leaves, numbers, wide)
    numbers = np.array([np.asarray(n) for n in numbers], wide)
    return Deferred(shape, wide, lambda: _Computed(function, [flat(x) for x in leaves], numbers, size, wide))


class _Computed(NamedTuple):
    """The entries of a leaf that are made of other leaves' when they are read, see `Deferred`."""

    function: Callable[..., Array]
    rows: list[Any]
    numbers: np.ndarray
    size: int
    wide: np.dtype

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, _ = place.indices(self.size)
        made = [self._piece(slice(at, min(at + PIECE, stop))) for at in range(start, stop, PIECE)]
        return made[0] if len(made) == 1 else np.concatenate([np.empty(0, self.wide), *made])

    def _piece(self, place: slice) -> np.ndarray:
        count = place.stop - place.start
        padding = (0, (_SHORT if count <= _SHORT else PIECE) - count)  # two shapes to compile for
        with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
            cut = [np.pad(row[place].astype(self.wide, copy=False), padding) for row in self.rows]
            return np.asarray(_compiled(self.function, self.wide, self.wide, self.numbers, *cut))[:count]


def _rounded(function: Callable[..., Array], wide: Any, dtype: Any, numbers: Any, *rows: Any) -> Array:
    return function(numbers, *[jnp.asarray(x, wide) for x in rows]).astype(dtype)


_compiled = jax.jit(_rounded, static_argnums=(0, 1, 2))


def _ready(piece: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """The piece as it is, or copied to the front of `spare`: whole, and where JAX reads it without a copy."""
    if piece.size == PIECE and piece.dtype == spare.dtype and piece.ctypes.data % _ALIGNED == 0:
        return piece
    spare[: piece.size] = piece
    return spare


def _empty(size: int, dtype: Any) -> np.ndarray:
    """A row that starts where JAX takes an array over without a copy."""
    length = size * np.dtype(dtype).itemsize
    row = np.empty(length + _ALIGNED, np.uint8)
    start = -row.ctypes.data % _ALIGNED
    return row[start : start + length].view(dtype)


def filled(shape: tuple[int, ...], dtype: Any, leaves: Sequence[Any]) -> Array:
    """An array of this shape whose rows are the leaves, read one after another."""
    give_back_memory()
    rows = _empty(int(np.prod(shape)), dtype).reshape(shape)
    for t, leaf in enumerate(leaves):
        rows[t] = np.asarray(leaf)
    give_back_memory()
    return jax.device_put(rows)


def products(leaves: Sequence[Any]) -> Float[np.ndarray, "tasks tasks"]:
    """The inner products of leaves on the host, summed in float64."""
    rows, size = [flat(x) for x in leaves], np.size(leaves[0])
    block, summed = np.empty((len(rows), PIECE), tree.wide_type(*leaves)), np.zeros((len(rows), len(rows)))
    with np.errstate(all="ignore"):
        for start in range(0, size, PIECE):
            part = block[:, : min(PIECE, size - start)]
            for line, row in zip(part, rows, strict=True):
                line[:] = row[start : start + part.shape[1]]
            sizes = np.maximum(part.max(axis=1), -part.min(axis=1)).astype(float)
            if np.all((sizes > 1e-12) & (sizes < 1e12) | ~((sizes > 0) & (sizes < np.inf))):
                summed += part @ part.T
            else:  # squares would vanish or overflow
                sizes = np.where((sizes > 0) & (sizes < np.inf), sizes, 1)
                part = part / sizes[:, None].astype(part.dtype)
                summed += (part @ part.T).astype(float) * np.outer(sizes, sizes)
    return summed


def root_mean_square(leaf: Any) -> Any:
    """Of all entries; on the host in float64."""
    size = np.size(leaf)
    if not size:
        return 0.0
    if on_host(leaf):
        return float(np.sqrt(products([leaf])[0, 0] / size))
    x = jnp.asarray(leaf, tree.wide_type(leaf))
    return unit_of(x) * jnp.sqrt(jnp.sum((x / unit_of(x)) ** 2) / size)


def total(weights: Any, *rows: Any) -> Any:
    """`Σ w_t row_t`."""
    return sum((w * x for w, x in zip(weights[1:], rows[1:], strict=True)), start=weights[0] * rows[0])


def unit_of(x: Array) -> Array:
    """The power of two, which is exact, below the largest magnitude; 1 of zeros and of what isn't finite."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    sound = jnp.isfinite(largest) & (largest > 0)
    _, exponent = jnp.frexp(jnp.where(sound, jnp.maximum(largest, jnp.finfo(x.dtype).tiny), 1))
    return jnp.ldexp(jnp.ones((), x.dtype), exponent - 1)


def sum_sign(terms: Sequence[Any]) -> Any:
    """The sign of the terms' sum; zero where they cancel up to rounding, whose error has a sign, too."""
    summed, sizes = sum(terms), sum(jnp.abs(x) for x in terms)
    rounding = len(terms) * jnp.finfo(jnp.result_type(summed)).eps * sizes
    return jnp.where((jnp.abs(summed) <= rounding) & jnp.isfinite(sizes), 0, jnp.sign(summed))


def sums_are_finite(leaves: Sequence) -> bool:
    """Whether the sum of each leaf is finite, which is so only where all entries are, and is quicker than to look."""
    if not on_host(*leaves):
        return bool(np.all(np.isfinite(jax.device_get([jnp.sum(x, dtype=tree.wide_type(x)) for x in leaves]))))
    with np.errstate(all="ignore"):
        return all(np.isfinite(np.sum(np.asarray(x), dtype=tree.wide_type(x))) for x in leaves)


def summed_sizes(leaves: Sequence) -> Any:
    """`Σ |x|` over all entries of the leaves; on the host in float64."""
    if not on_host(*leaves):
        return sum(jnp.sum(jnp.abs(jnp.asarray(x, tree.wide_type(x)))) for x in leaves)
    with np.errstate(all="ignore"):
        return sum(
            float(np.sum(np.abs(piece), dtype=np.float64)) for x in leaves for _, piece in pieces(flat(x), np.size(x))
        )
