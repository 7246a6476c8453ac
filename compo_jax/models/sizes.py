"""What a network's sizes and its images have to be, told where a network is made or called."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def whole_numbers(low: int = 1, **sizes: Any) -> None:
    """ValueError that names the sizes which are no whole numbers from `low` on."""
    wrong = [
        f"{name}={value!r}"
        for name, value in sizes.items()
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low
    ]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: a whole number, {low} or more, is needed")


def channels_last(shape: Sequence[int]) -> None:
    """ValueError for images whose channels come before their rows, as PyTorch has them."""
    *_, first, _, last = shape
    if first <= 4 < last:
        axes = (*range(len(shape) - 3), len(shape) - 2, len(shape) - 1, len(shape) - 3)
        raise ValueError(
            f"images of shape {tuple(shape)} have their channels first, and NHWC is needed, (batch, height, width, "
            f"channels): transpose them, jnp.transpose(images, {axes})"
        )


def whole_patches(shape: Sequence[int], patch: int) -> None:
    """ValueError for images (..., height, width, channels) that can't be cut into patches."""
    channels_last(shape)
    height, width = shape[-3:-1]
    if height % patch or width % patch or not height or not width:
        raise ValueError(
            f"images of {height}x{width} pixels can't be cut into patches of {patch}: resize them, or choose a patch "
            "that divides both sides"
        )
