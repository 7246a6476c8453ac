"""Random augmentation of whole batches in JAX: pure, keyed, jit-able, blind to the range of the pixel values.

Each takes (key, images) first; give the rest by `functools.partial` and put several together with `chain`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Images = Float[Array, "batch height width channels"]


def chain(*augmentations):
    """One augmentation that applies the given ones in order, each with a key of its own."""

    def augment(key: Key[Array, ""], images: Images) -> Float[Array, "batch h w channels"]:
        for augmentation, part in zip(augmentations, jax.random.split(key, len(augmentations)), strict=True):
            images = augmentation(part, images)
        return images

    return augment


def random_flip(key: Key[Array, ""], images: Images) -> Images:
    """Mirrors each image left to right with probability 1/2."""
    flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def random_resized_crop(
    key: Key[Array, ""],
    images: Images,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Float[Array, "batch size size channels"]:
    """A random part of each image, resized to `size` with an antialiased bicubic filter (Szegedy et al., 2015).

    `scale` bounds the part's share of the area, `ratio` its width over its height (drawn uniformly in the logarithm).
    A side longer than the image is cut to it, where torchvision would draw again: fixed cost, nearly the same law.
    """
    batch, height, width, channels = images.shape
    key_area, key_ratio, key_corner = jax.random.split(key, 3)
    area = jax.random.uniform(key_area, (batch,), images.dtype, *scale) * height * width
    aspect = jnp.exp(jax.random.uniform(key_ratio, (batch,), images.dtype, *map(math.log, ratio)))
    whole = jnp.array([[height, width]], images.dtype)
    sides = jnp.minimum(jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=-1)), whole)
    corner = jax.random.uniform(key_corner, (batch, 2), images.dtype) * (whole - sides)

    def crop(image, sides, corner):
        zoom = size / sides
        return jax.image.scale_and_translate(
            image, (size, size, channels), (0, 1), zoom, -corner * zoom, method="cubic", antialias=True
        )

    return jax.vmap(crop)(images, sides, corner)


def random_affine(
    key: Key[Array, ""],
    images: Images,
    rotation: float = 0.15,
    scale: tuple[float, float] = (0.9, 1.1),
    shift: float = 0.06,
    shear: float = 0.1,
) -> Images:
    """A random affine map of each image about its centre, bilinear, the border pixels going on outwards.

    `rotation` is in radians, `shift` a fraction of the side and `shear` a slant, all either way; `scale` bounds the
    magnification, drawn for each axis. For handwriting, where a mirror image is another character.
    """
    batch, height, width, _ = images.shape
    dtype = images.dtype
    keys = jax.random.split(key, 4)
    angle = jax.random.uniform(keys[0], (batch,), dtype, -rotation, rotation)
    zoom = jax.random.uniform(keys[1], (batch, 2), dtype, *scale)
    offset = jax.random.uniform(keys[2], (batch, 2), dtype, -shift, shift) * jnp.array([[height, width]], dtype)
    slant = jax.random.uniform(keys[3], (batch,), dtype, -shear, shear)

    def warp(image, angle, zoom, offset, slant):
        y, x = jnp.meshgrid(
            jnp.arange(height, dtype=dtype) - (height - 1) / 2 - offset[0],
            jnp.arange(width, dtype=dtype) - (width - 1) / 2 - offset[1],
            indexing="ij",
        )
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        rows = (cos * y - sin * x) / zoom[0]
        columns = (cos * x + sin * y) / zoom[1] + slant * rows
        places = [rows + (height - 1) / 2, columns + (width - 1) / 2]
        sample = jax.vmap(
            lambda channel: jax.scipy.ndimage.map_coordinates(channel, places, order=1, mode="nearest"), 2, 2
        )
        return sample(image)

    return jax.vmap(warp)(images, angle, zoom, offset, slant)
