"""Corruptions of byte images, by the names and in the severities 1 to 5 of Hendrycks and Dietterich (2019).

arXiv 1903.12261; brightness and JPEG are as strong as in ImageNet-C, contrast as in CIFAR-10-C, noise between. Lengths
are parts of the image's side, so that 16 pixels are blurred as 64 are. Beside those of the paper stand `invert` and
`hue`, shifts that a person hardly minds. `saturate` and `hue` leave grey images as they are.
"""

import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage

_CHUNK = 512  # images in floating point at a time

# An effect takes float32 images from 0 to 1, a level, and a generator for each image, made when asked for, from which
# alone comes what is random. Its result is clipped to that range.
Effect = Callable[[np.ndarray, float, Iterator[np.random.Generator]], np.ndarray]


def _gaussian_noise(images, level, generators):
    return images + level * np.stack([each.standard_normal(images.shape[1:], np.float32) for each in generators])


def _shot_noise(images, level, generators):
    """`level`: photons of a white pixel."""
    return np.stack([each.poisson(level * image) for image, each in zip(images, generators, strict=True)]) / level


def _impulse_noise(images, level, generators):
    """`level`: part of the values that become 0 or 1."""
    chance = np.stack([each.random(images.shape[1:], np.float32) for each in generators])
    return np.where(chance < level / 2, 0, np.where(chance >= 1 - level / 2, 1, images))


def _gaussian_blur(images, level, generators):
    return ndimage.gaussian_filter(images, level * images.shape[1], mode="nearest", axes=(1, 2))


def _motion_blur(images, level, generators):
    """Along a line of `level` sides, in another direction for each image."""
    angle, length = np.pi * np.array([each.random() for each in generators]), level * images.shape[1]
    reach = int(np.ceil(length / 2))
    along = length * np.linspace(-0.5, 0.5, 2 * reach + 3)
    places = np.stack([np.sin(angle), np.cos(angle)])[..., None, None] * along[:, None]
    rows, columns = np.maximum(0, 1 - np.abs(places - np.arange(-reach, reach + 1)))  # shares of the pixels about it
    kernels = (rows.swapaxes(1, 2) @ columns / len(along)).astype(np.float32)
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    blurred, (height, width) = np.zeros_like(images), images.shape[1:3]
    for row, column in np.ndindex(kernels.shape[1:]):
        weight = kernels[:, row, column, None, None, None]
        blurred += weight * padded[:, row : row + height, column : column + width]
    return blurred


def _smooth(fields, sigma):
    """White noise (..., height, width) as waves of `sigma` pixels, of variance 1 as before."""
    return 2 * np.sqrt(np.pi) * sigma * ndimage.gaussian_filter(fields, sigma, mode="wrap", axes=(-2, -1))


def _elastic(images, level, generators):
    """Smooth displacements whose standard deviation is `level` sides."""
    size, moved = images.shape[1:3], np.empty_like(images)
    fields = np.stack([each.standard_normal((2, *size), np.float32) for each in generators])
    places = np.indices(size) + level * size[0] * _smooth(fields, size[0] / 8)
    for image, place, target in zip(images, places, moved, strict=True):
        for channel in range(3):
            ndimage.map_coordinates(image[..., channel], place, target[..., channel], order=1, mode="nearest")
    return moved


def _contrast(images, level, generators):
    mean = images.mean((1, 2), np.float64, keepdims=True).astype(np.float32)
    return mean + level * (images - mean)


def _fog(images, level, generators):
    """A fractal haze, `level` where it is thickest; the brightest value stays where it is thickest there."""
    scales = (1 / 4, 1 / 8, 1 / 16)
    fields = np.stack([each.standard_normal((len(scales), *images.shape[1:3]), np.float32) for each in generators])
    haze = np.sum([scale * _smooth(fields[:, i], scale * images.shape[1]) for i, scale in enumerate(scales)], axis=0)
    haze -= haze.min((1, 2), keepdims=True)
    haze /= np.maximum(haze.max((1, 2), keepdims=True), 1e-6)
    brightest = images.max((1, 2, 3), keepdims=True)
    return (images + level * haze[..., None]) * brightest / (brightest + level)


def _hsv(images, level, generators, channel: int, change):
    """Hue (0), saturation (1) or value (2) becomes `change(it, level)`."""
    from matplotlib import colors

    hsv = colors.rgb_to_hsv(images)
    hsv[..., channel] = np.clip(change(hsv[..., channel], level), 0, 1)
    return colors.hsv_to_rgb(hsv)


def _with_pillow(images, level, generators, change):
    from PIL import Image

    return np.stack([change(Image.fromarray(each), level, Image) for each in _bytes(images)]) / np.float32(255)


def _pixelated(image, level, pillow):
    few = [max(1, round(level * side)) for side in image.size]  # pixels of a side that are kept
    return image.resize(few, pillow.Resampling.BOX).resize(image.size, pillow.Resampling.NEAREST)


def _stored(image, quality, pillow):
    image.save(file := io.BytesIO(), "jpeg", quality=quality)
    return pillow.open(file)


def _bytes(images):
    return np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)


#: How images are corrupted, and the level of each severity.
CORRUPTIONS: dict[str, tuple[Effect, tuple[float, float, float, float, float]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.07, 0.1, 0.15, 0.22)),
    "shot_noise": (_shot_noise, (250, 120, 60, 25, 12)),
    "impulse_noise": (_impulse_noise, (0.01, 0.03, 0.05, 0.09, 0.15)),
    "gaussian_blur": (_gaussian_blur, (0.02, 0.03, 0.04, 0.05, 0.065)),
    "motion_blur": (_motion_blur, (0.06, 0.1, 0.15, 0.2, 0.25)),
    "elastic": (_elastic, (0.01, 0.02, 0.03, 0.04, 0.05)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (partial(_hsv, channel=2, change=np.add), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "fog": (_fog, (0.3, 0.6, 0.9, 1.3, 2.0)),
    "invert": (lambda images, level, _: (1 - level) * images + level * (1 - images), (0.8, 0.85, 0.9, 0.95, 1.0)),
    "hue": (partial(_hsv, channel=0, change=lambda hue, level: (hue + level) % 1), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "saturate": (partial(_hsv, channel=1, change=np.multiply), (1.5, 2, 3, 5, 10)),
    "pixelate": (partial(_with_pillow, change=_pixelated), (0.85, 0.75, 0.625, 0.5, 0.375)),
    "jpeg": (partial(_with_pillow, change=_stored), (25, 18, 15, 10, 7)),
}


def corrupt(
    images: np.ndarray,
    names: str | Sequence[str],
    severity: int = 3,
    seed: int | Sequence[int] = 0,
    rows: Sequence[int] | np.ndarray | None = None,
) -> UInt8[np.ndarray, "images height width 3"]:
    """Images (uint8, of that shape too) under one corruption, or several that are applied one after another.

    Args:
      names: some of `CORRUPTIONS`, a list of them or `"contrast+gaussian_noise"`.
      rows: numbers of the images, by default their places here. What is random about an image depends on the seed, its
        number and the corruption, not on the images beside it nor on the severity.

    Raises ValueError for a name that isn't there or comes twice, another severity, or other images.
    """
    names = names.split("+") if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in CORRUPTIONS]:
        raise ValueError(f"no corruption is called {', '.join(map(repr, unknown))}; there are {', '.join(CORRUPTIONS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"a corruption is named twice in {'+'.join(names)}: ask for a higher severity instead")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"a severity is a whole number from 1 (slight) to 5, not {severity}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images must be uint8 of shape (images, height, width, 3), and these are {images.dtype} of shape "
            f"{images.shape}: corrupt them before they are scaled, grey ones repeated in three channels"
        )
    rows = np.arange(len(images)) if rows is None else np.asarray(rows)
    if len(rows) != len(images):
        raise ValueError(f"{len(images)} images need as many rows, not {len(rows)}")
    seeds, corrupted = np.atleast_1d(seed).tolist(), images.copy()
    for name in names:
        (effect, levels), code = CORRUPTIONS[name], zlib.crc32(name.encode())
        for start in range(0, len(images), _CHUNK):
            part = slice(start, start + _CHUNK)
            generators = (np.random.default_rng([*seeds, code, row]) for row in rows[part].tolist())
            values = corrupted[part].astype(np.float32) / 255
            corrupted[part] = _bytes(effect(values, levels[severity - 1], generators))
    return corrupted
