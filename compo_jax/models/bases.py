"""A ViT to build on: the small one that ships with the package, or a checkpoint's."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from compo_jax.models.pretrained import load
from compo_jax.models.vit import ViT

_FILE = Path(__file__).with_name("embedded.safetensors")


def embedded() -> tuple[ViT, Any, dict[str, Any]]:
    """(model, params, how it was made): 32x32 images with values in [-1, 1], a head over 338 characters.

    Pre-trained on Latin letters by experiments/pretrain.py.
    """
    return *load(_FILE), json.loads(_FILE.with_suffix(".json").read_text())


def backbone(
    path: str | Path | None = None, heads: int | None = None, image_size: int | None = None, dtype: str = "float32"
) -> tuple[ViT, Any, str]:
    """(model, params, description) of the timm checkpoint at `path`, or of the embedded ViT; calls give features.

    Args:
      heads, image_size: see `load`; default: what the checkpoint says.
      dtype: compute dtype; `float32` follows the arrays, so that a float64 tree is computed in float64.

    ValueError for what `load` refuses, and a dtype that isn't of floating-point numbers.
    """
    try:
        compute = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype={dtype!r} is no type of numbers: float32, bfloat16 or float16, say") from error
    if not jnp.issubdtype(compute, jnp.floating):
        raise ValueError(f"dtype={dtype!r} holds no fractions: float32, bfloat16 or float16, say")
    if path is None:
        model, params, made = embedded()
        count = sum(made["characters"].values())
        described = f"embedded ViT {model.width}x{model.depth}, pre-trained on {count} Latin characters"
    else:
        model, params = load(path, heads=heads, image_size=image_size)
        described = Path(path).name
    model = model.copy(classes=0, dtype=None if compute == jnp.float32 else compute)
    return model, {name: leaf for name, leaf in params.items() if name != "head"}, described
