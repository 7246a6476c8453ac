"""A ViT to build on: the small one that ships with the package, or a checkpoint's."""

import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp

from compo_jax.models.descriptions import Pixels
from compo_jax.models.loading import load, load_all
from compo_jax.models.vit import ViT
from compo_jax.tree import Tree

Stream = TypeVar("Stream")
_FILE = Path(__file__).with_name("embedded.safetensors")


class Backbone(NamedTuple):
    """A network without head, to build on.

    Attributes:
      description: in words.
      pixels: mean and std of each channel that it was trained with; None where the checkpoint doesn't say, and then a
        stream's (0.5 each) are as good a guess as any.
    """

    model: ViT
    params: Tree
    description: str
    pixels: Pixels | None = None

    def normalised(self, stream: Stream) -> Stream:
        """The `data.TaskStream`, its images normalised as those that the network was trained on."""
        return stream if self.pixels is None else stream._replace(**self.pixels._asdict())


def embedded() -> tuple[ViT, Any, dict[str, Any]]:
    """(model, params, how it was made): 32x32 images with values in [-1, 1], a head over 338 characters.

    Pre-trained on Latin letters by experiments/pretrain.py.
    """
    return *load(_FILE), json.loads(_FILE.with_suffix(".json").read_text())


def backbone(
    path: str | Path | None = None,
    heads: int | None = None,
    image_size: int | None = None,
    dtype: str = "float32",
    activation: str | None = None,
) -> Backbone:
    """The checkpoint at `path` (see `load`), or the embedded ViT; calls of the model give features.

    Args:
      heads, image_size, activation: see `load`; default: what the checkpoint says.
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
        pixels = None
    else:
        model, params, pixels = load_all(path, heads=heads, image_size=image_size, activation=activation)
        described = str(path) if str(path).startswith("hf:") else Path(path).absolute().name
    model = model.copy(classes=0, dtype=None if compute == jnp.float32 else compute)
    params = {name: leaf for name, leaf in params.items() if name != "head"}
    return Backbone(model, params, described, pixels)
