"""Vision Transformer (Dosovitskiy et al., 2021, arXiv 2010.11929) in Flax Linen, laid out as timm's `vit_*` models:
pre-norm blocks, one joint qkv weight, exact GELU, a CLS token, learned position embeddings."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax.models.layers import Dense, LayerNorm
from compo_jax.models.sizes import channels_last, whole_numbers
from compo_jax.models.transformer import NORMAL, blocks


class ViT(nn.Module):
    """Vision Transformer; images NHWC in, logits out.

    The parameters of all blocks are stacked on axis 0, unrolled or not, so that a checkpoint fits both. A variable
    collection `adapter` is carried through the scan for `compo_jax.adapters`.

    Attributes:
      image_size, patch: side of the square image and of a patch, in pixels.
      width, depth, heads, mlp_ratio: as in the paper.
      classes: size of the head; 0 for none, and then a call returns the CLS feature.
      dtype: compute dtype; None follows the arrays (a float64 tree is computed in float64).
      unroll: True writes the blocks out instead of scanning over them (slower to compile; XLA's cost analysis counts
        the body of a scan once, so count FLOPs with this on).
      kernel: attention implementation, `xla` or `cudnn` (a GPU and a 16-bit dtype; no second derivatives).
    """

    image_size: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    classes: int = 0
    dtype: Any = None
    unroll: bool = False
    kernel: str = "xla"

    def __post_init__(self):
        sizes = ("image_size", "patch", "width", "depth", "heads")
        whole_numbers(**{name: getattr(self, name) for name in sizes})
        whole_numbers(0, classes=self.classes)
        if not (0 < self.mlp_ratio < math.inf and round(self.width * self.mlp_ratio)):
            raise ValueError(f"mlp_ratio={self.mlp_ratio!r} leaves no hidden layer: it is a positive number")
        if self.image_size % self.patch or self.width % self.heads:
            raise ValueError(
                f"a ViT needs an image size ({self.image_size}) that the patch ({self.patch}) divides and a width "
                f"({self.width}) that the number of heads ({self.heads}) divides"
            )
        super().__post_init__()

    def setup(self):
        tokens = (self.image_size // self.patch) ** 2 + 1
        self.patches = nn.Conv(
            self.width, (self.patch, self.patch), strides=self.patch, padding="VALID", dtype=self.dtype, name="patch"
        )
        self.cls = self.param("cls", NORMAL, (1, 1, self.width))
        self.position = self.param("position", NORMAL, (1, tokens, self.width))
        stack = blocks(self.depth, self.unroll)
        self.blocks = stack(self.heads, round(self.width * self.mlp_ratio), self.dtype, self.kernel, name="blocks")
        self.norm = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")
        if self.classes:
            self.head = Dense(self.classes, dtype=self.dtype, kernel_init=NORMAL, name="head")

    def features(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch features"]:
        """The CLS token after the last norm."""
        if images.ndim != 4:
            raise ValueError(
                f"the model takes images (batch, height, width, channels) and got {images.shape}: one image is a batch "
                "of one, images[None]"
            )
        if images.shape[1:3] != (self.image_size, self.image_size):
            channels_last(images.shape)
            raise ValueError(
                f"the model takes {self.image_size}x{self.image_size} images and got "
                f"{images.shape[1]}x{images.shape[2]}: resize the images, or load the checkpoint with image_size="
                f"{images.shape[1]}, which resizes its position embeddings"
            )
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, self.width)
        cls = jnp.broadcast_to(self.cls.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([cls, x], axis=1) + self.position.astype(x.dtype)
        x, _ = self.blocks(x, None)
        return self.norm(x[:, 0])

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        x = self.features(images)
        return self.head(x) if self.classes else x
