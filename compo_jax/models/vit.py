"""Vision Transformer (Dosovitskiy et al., 2021, arXiv 2010.11929) in Flax Linen, laid out as timm's `vit_*` models,
with the parts that DeiT III, DINOv2, CLIP and SigLIP add, each off by default."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax.models.layers import Dense, LayerNorm, unit
from compo_jax.models.sizes import channels_last, whole_numbers
from compo_jax.models.transformer import NORMAL, AttentionPool, activation, blocks

POOLS = ("class", "mean", "mean_then_norm", "class_and_mean", "attention")


class ViT(nn.Module):
    """Vision Transformer; images NHWC in, logits out.

    The parameters of all blocks are stacked on axis 0, unrolled or not, so that a checkpoint fits both. A variable
    collection `adapter` is carried through the scan for `compo_jax.adapters`. What checkpoints beyond the plain ViT
    need is set by `load` and the `from_...` functions.

    Attributes:
      image_size, patch: side of the square image and of a patch, in pixels.
      width, depth, heads, mlp_ratio: as in the paper.
      classes: size of the head; 0 for none, and then a call returns the features.
      dtype: compute dtype; None follows the arrays (a float64 tree is computed in float64).
      unroll: True writes the blocks out instead of scanning over them (slower to compile; XLA's cost analysis counts
        the body of a scan once, so count FLOPs with this on).
      kernel: attention implementation, `xla` or `cudnn` (a GPU and a 16-bit dtype; no second derivatives).
      activation, layer_scale: of the blocks, see `transformer.Block`.
      epsilon: added to the variance in every norm.
      class_token: False where there is none (SigLIP).
      class_position: False where the class token has no row in the table of positions (DeiT III).
      registers: number of register tokens (Darcet et al., 2024, arXiv 2309.16588), behind the class token; they have
        no positions.
      pre_norm: a norm before the first block, and no bias of the patches then (CLIP).
      pool: what the features are: `class`, the class token after the last norm; `mean` of the patches after it;
        `mean_then_norm`, their mean and then the norm (timm's fc_norm); `class_and_mean`, side by side (DINOv2's
        classifier); `attention`, see `AttentionPool` (SigLIP).
      projection: width to which the features are projected, without bias (CLIP's space of images and texts); 0: none.
      unit: True for features at length 1, which zero-shot heads take.
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
    activation: str = "gelu"
    layer_scale: bool = False
    epsilon: float = 1e-6
    class_token: bool = True
    class_position: bool = True
    registers: int = 0
    pre_norm: bool = False
    pool: str = "class"
    projection: int = 0
    unit: bool = False

    def __post_init__(self):
        sizes = ("image_size", "patch", "width", "depth", "heads")
        whole_numbers(**{name: getattr(self, name) for name in sizes})
        whole_numbers(0, classes=self.classes, registers=self.registers, projection=self.projection)
        if not (0 < self.mlp_ratio < math.inf and round(self.width * self.mlp_ratio)):
            raise ValueError(f"mlp_ratio={self.mlp_ratio!r} leaves no hidden layer: it is a positive number")
        if self.image_size % self.patch or self.width % self.heads:
            raise ValueError(
                f"a ViT needs an image size ({self.image_size}) that the patch ({self.patch}) divides and a width "
                f"({self.width}) that the number of heads ({self.heads}) divides"
            )
        activation(self.activation)
        if self.pool not in POOLS:
            raise ValueError(f"no features are called pool={self.pool!r}; there are {', '.join(POOLS)}")
        if "class" in self.pool and not self.class_token:
            raise ValueError(f"pool={self.pool!r} needs a class token: take pool='mean', or class_token=True")
        super().__post_init__()

    def setup(self):
        rows = (self.image_size // self.patch) ** 2 + (self.class_token and self.class_position)
        self.patches = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding="VALID",
            use_bias=not self.pre_norm,
            dtype=self.dtype,
            name="patch",
        )
        if self.class_token:
            self.cls = self.param("cls", NORMAL, (1, 1, self.width))
        self.position = self.param("position", NORMAL, (1, rows, self.width))
        if self.registers:
            self.register_tokens = self.param("registers", NORMAL, (1, self.registers, self.width))
        if self.pre_norm:
            self.norm_pre = LayerNorm(self.epsilon, self.dtype, name="norm_pre")
        mlp_width = round(self.width * self.mlp_ratio)
        self.blocks = blocks(self.depth, self.unroll)(
            self.heads,
            mlp_width,
            self.dtype,
            self.kernel,
            self.activation,
            self.layer_scale,
            epsilon=self.epsilon,
            name="blocks",
        )
        self.norm = LayerNorm(self.epsilon, self.dtype, name="pool_norm" if self.pool == "mean_then_norm" else "norm")
        if self.pool == "attention":
            self.attention_pool = AttentionPool(
                self.heads, mlp_width, self.dtype, self.activation, self.epsilon, name="attention_pool"
            )
        if self.projection:
            self.project = Dense(
                self.projection, use_bias=False, dtype=self.dtype, kernel_init=NORMAL, name="projection"
            )
        if self.classes:
            self.head = Dense(self.classes, dtype=self.dtype, kernel_init=NORMAL, name="head")

    def features(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch features"]:
        """What `pool` takes of the tokens behind the last block; projected, at length 1, where the model says so."""
        self._check(images.shape)
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, self.width)
        position = self.position
        if self.class_token:
            x = jnp.concatenate([_repeated(self.cls, x), x], axis=1)
            position = position if self.class_position else jnp.pad(position, ((0, 0), (1, 0), (0, 0)))
        x = x + position.astype(x.dtype)
        if self.registers:
            parts = [x[:, : self.class_token], _repeated(self.register_tokens, x), x[:, self.class_token :]]
            x = jnp.concatenate(parts, axis=1)
        x, _ = self.blocks(self.norm_pre(x) if self.pre_norm else x, None)
        x = self._pooled(x)
        x = self.project(x) if self.projection else x
        return unit(x) if self.unit else x

    def _pooled(self, x):
        first = self.class_token + self.registers
        if self.pool == "class":
            return self.norm(x[:, 0])
        if self.pool == "mean":
            return self.norm(x[:, first:]).mean(axis=1)
        if self.pool == "mean_then_norm":
            return self.norm(x[:, first:].mean(axis=1))
        x = self.norm(x)
        if self.pool == "attention":
            return self.attention_pool(x[:, first:])
        return jnp.concatenate([x[:, 0], x[:, first:].mean(axis=1)], axis=-1)

    def _check(self, shape):
        if len(shape) != 4:
            raise ValueError(
                f"the model takes images (batch, height, width, channels) and got {shape}: one image is a batch of "
                "one, images[None]"
            )
        if shape[1:3] != (self.image_size, self.image_size):
            channels_last(shape)
            raise ValueError(
                f"the model takes {self.image_size}x{self.image_size} images and got {shape[1]}x{shape[2]}: resize the "
                f"images, or load the checkpoint with image_size={shape[1]}, which resizes its position embeddings"
            )

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        x = self.features(images)
        return self.head(x) if self.classes else x


def _repeated(tokens, x):
    """Learned tokens (1, n, width) for each image of the batch `x`."""
    return jnp.broadcast_to(tokens.astype(x.dtype), (x.shape[0], *tokens.shape[1:]))
