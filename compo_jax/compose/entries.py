"""Leaves entry by entry, in pieces that stay in the processor's cache; and leaves that are read when they are needed.

What NumPy can read where it is, is worked on by NumPy: nothing is compiled, and no array as large as a leaf is made but
the result. What is traced, on an accelerator or spread over devices goes through the same functions with `jax.numpy`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree

Tree = Any
#: Entries of a piece: some rows of them fit into a core's second cache.
PIECE = 1 << 16


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
        return np.array(self.open()[:], dtype or self.dtype, copy=copy).reshape(self.shape)


def on_host(*leaves: Any) -> bool:
    """Whether NumPy can read the leaves where they are: none is traced, on an accelerator or spread over devices."""
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    if not tree.concrete(arrays):
        return False
    devices = {device for x in arrays for device in x.devices()}
    with jax.ensure_compile_time_eval():
        return not devices or (devices == jnp.zeros(()).devices() and devices.pop().platform == "cpu")


def flat(leaf: Any) -> Any:
    """The entries in one row, to be cut in slices."""
    return leaf.open() if isinstance(leaf, Deferred) else np.asarray(leaf).reshape(-1)


def pieces(leaves: Sequence[Any], dtype: Any):
    """The same entries of all leaves, piece after piece: (their place, one array a leaf in `dtype`)."""
    rows = [flat(x) for x in leaves]
    for start in range(0, np.size(leaves[0]), PIECE):
        place = slice(start, min(start + PIECE, np.size(leaves[0])))
        yield place, [row[place].astype(dtype, copy=False) for row in rows]


def entrywise(function: Callable[..., Any], leaves: Sequence[Any], numbers: Sequence = (), dtype: Any = None) -> Array:
    """`function(xp, numbers, *leaves)` of leaves of one shape, rounded once.

    Args:
      function: works entry by entry, with the functions of `xp`, which is `numpy` or `jax.numpy`, on leaves and numbers
        in float32 at least.
      numbers: what else it needs that may be traced: scalars.
      dtype: of the result; default the first leaf's.
    """
    wide, shape = tree.wide_type(*leaves), np.shape(leaves[0])
    dtype = jnp.result_type(leaves[0]) if dtype is None else dtype
    if not on_host(*leaves, *numbers):
        rows = [jnp.asarray(np.asarray(x) if isinstance(x, Deferred) else x, wide) for x in leaves]
        return function(jnp, [jnp.asarray(n, wide) for n in numbers], *rows).astype(dtype)
    out, numbers = empty(np.size(leaves[0]), dtype), [np.asarray(n).astype(wide)[()] for n in numbers]
    with np.errstate(all="ignore"):
        for place, rows in pieces(leaves, wide):
            out[place] = function(np, numbers, *rows)
    return jax.device_put(out.reshape(shape))


def empty(size: int, dtype: Any) -> np.ndarray:
    """A row that starts where JAX takes an array over without a copy: at a multiple of 64 bytes."""
    row = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -row.ctypes.data % 64
    return row[start : start + size * np.dtype(dtype).itemsize].view(dtype)


def products(leaves: Sequence[Any]) -> Float[np.ndarray, "tasks tasks"]:
    """The inner products of leaves on the host, summed in float64."""
    total, block = np.zeros((len(leaves), len(leaves))), np.empty((len(leaves), PIECE), tree.wide_type(*leaves))
    with np.errstate(all="ignore"):
        for place, rows in pieces(leaves, block.dtype):
            part = block[:, : place.stop - place.start]
            np.stack(rows, out=part)
            total += part @ part.T
    return total


def total(weights: Sequence, *rows: Any) -> Any:
    """`Σ w_t row_t`."""
    summed = weights[0] * rows[0]
    for weight, row in zip(weights[1:], rows[1:], strict=True):
        summed += weight * row
    return summed


def sums_are_finite(leaves: Sequence) -> bool:
    """Whether the sum of each leaf is finite, which is so only where all entries are, and is quicker than to look."""
    if not on_host(*leaves):
        return bool(np.all(np.isfinite(jax.device_get([jnp.sum(x, dtype=tree.wide_type(x)) for x in leaves]))))
    with np.errstate(all="ignore"):
        return all(np.isfinite(np.sum(np.asarray(x), dtype=tree.wide_type(x))) for x in leaves)
