"""Tables of position embeddings for images of another size than a checkpoint was trained at."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def resized(
    position: Float[Array, "1 tokens width"], grid: int, class_row: bool = True, antialias: bool = True
) -> Float[Array, "1 resized width"]:
    """The table for `grid` x `grid` patches; the class token's row, the first if there is one, is kept.

    antialias: as timm resizes, and Hugging Face's DINOv2 with registers: bicubic (Keys, 1981, a = -1/2), averaged over
      more rows where the grid shrinks. False, as Hugging Face's other models do: bicubic with a = -3/4 and always four
      rows. Either equals PyTorch's to the rounding of its numbers. They differ: of DINOv2's table of 37 x 37, shrunk to
      8 x 8, by 0.003 (root mean square) where the numbers are 0.010.
    """
    kept, patches = position[:, :class_row], position[:, class_row:]
    old, width = math.isqrt(patches.shape[1]), patches.shape[2]
    square = patches.reshape(1, old, old, width)
    if antialias:
        square = jax.image.resize(square, (1, grid, grid, width), "cubic")
    else:
        matrix = jnp.asarray(_four_rows(old, grid), square.dtype)
        square = jnp.einsum("ab,cd,xbdw->xacw", matrix, matrix, square, precision="highest")
    return jnp.concatenate([kept, square.reshape(1, grid * grid, width)], axis=1)


def _four_rows(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix of PyTorch's bicubic interpolation along one axis; rows beyond the border are the border's."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centres).astype(int)
    matrix = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        distance = np.abs(centres - first - offset)
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        rows = np.clip(first + offset, 0, old - 1)
        np.add.at(matrix, (np.arange(new), rows), np.where(distance <= 1, near, far))
    return matrix
