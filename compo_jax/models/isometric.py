"""Isometric residual networks (Sandler et al., 2019, arXiv 1909.03205): one width and one resolution from the stem to
the head, so that every block has the same shapes and can stand at any depth."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax.models.sizes import whole_numbers, whole_patches

Features = Float[Array, "batch height width channels"]
HE = nn.initializers.he_normal()


class Convolution(NamedTuple):
    """The shape of one convolution without bias: `size` x `size`, stride 1, `groups` of channels."""

    size: int
    inputs: int
    outputs: int
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of its kernel (HWIO)."""
        return (self.size, self.size, self.inputs // self.groups, self.outputs)


def convolutions(block: str, width: int) -> tuple[Convolution, ...]:
    """The convolutions of a block: `basic` (He et al., 2016), `bottleneck` (the same; inner width a quarter) or
    `inverted` (Sandler et al., 2018; inner width fourfold, depthwise in the middle)."""
    narrow, wide = max(width // 4, 1), 4 * width
    kinds = {
        "basic": (Convolution(3, width, width),) * 2,
        "bottleneck": (Convolution(1, width, narrow), Convolution(3, narrow, narrow), Convolution(1, narrow, width)),
        "inverted": (Convolution(1, width, wide), Convolution(3, wide, wide, wide), Convolution(1, wide, width)),
    }
    if block not in kinds:
        raise ValueError(f"no block is called {block!r}; there are {', '.join(kinds)}")
    return kinds[block]


def residual(block: str, x: Features, branch: Callable[[Features], Features]) -> Features:
    """`x + branch(x)`, with the ReLU that all blocks but `inverted` end in."""
    x = x + branch(x)
    return x if block == "inverted" else nn.relu(x)


def branch(x: Features, count: int, convolve: Callable[[int, Features], Features]) -> Features:
    """The inside of a block: `convolve(i, x)`, the i-th of `count` convolutions with its BN, and ReLU between them."""
    for i in range(count):
        x = convolve(i, x if i == 0 else nn.relu(x))
    return x


def convolve(
    x: Features, kernel: Float[Array, "size size inputs outputs"], groups: int = 1
) -> Float[Array, "batch height width outputs"]:
    """A convolution of stride 1 that keeps the resolution, by products of shifted images.

    Under vmap over kernels `lax.conv` is a grouped convolution, which XLA runs ten times slower on a CPU than these
    products. The shifted copies are made again for the gradient, not kept.
    """
    if groups not in (1, x.shape[-1]):
        raise ValueError(f"{groups} groups of {x.shape[-1]} channels: a convolution here is dense or depthwise")
    size, height, width = kernel.shape[0], *x.shape[1:3]

    @jax.checkpoint
    def shifted_products(x, kernel):
        before = (size - 1) // 2
        padded = jnp.pad(x, ((0, 0), (before, size - 1 - before), (before, size - 1 - before), (0, 0)))
        if groups > 1:
            shifted = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
            return sum(part * tap for part, tap in zip(shifted, kernel.reshape(size * size, -1), strict=True))
        # First along rows, then along columns: what gave `x` is fused into fewer copies, and the gradient adds fewer.
        rows = jnp.concatenate([padded[:, :, j : j + width] for j in range(size)], axis=-1)
        patches = jnp.concatenate([rows[:, i : i + height] for i in range(size)], axis=-1)
        product = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
        return product.reshape(*x.shape[:-1], -1)

    return shifted_products(x, kernel)


def patchify(
    images: Features, kernel: Float[Array, "patch patch channels outputs"]
) -> Float[Array, "batch rows columns outputs"]:
    """The stem's convolution, of stride `patch`, as one product over patches; ValueError where they leave a rest."""
    batch, height, width, channels = images.shape
    patch = kernel.shape[0]
    whole_patches(images.shape, patch)
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels).swapaxes(2, 3)
    return x.reshape(batch, height // patch, width // patch, -1) @ kernel.reshape(-1, kernel.shape[-1])


class Block(nn.Module):
    """One residual block with its own kernels and BN."""

    kind: str
    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Features, train: bool = False) -> Features:
        shapes = convolutions(self.kind, self.width)

        def convolve(i, x):
            size, _, outputs, groups = shapes[i]
            x = nn.Conv(
                outputs,
                (size, size),
                use_bias=False,
                feature_group_count=groups,
                dtype=self.dtype,
                kernel_init=HE,
                name=f"conv{i + 1}",
            )(x)
            return nn.BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"norm{i + 1}")(x)

        return residual(self.kind, x, lambda x: branch(x, len(shapes), convolve))


class IsometricNet(nn.Module):
    """A plain isometric ResNet, every block written out with its own weights; images NHWC in, logits out.

    Attributes:
      classes: size of the head; 0 for none, and then a call returns the pooled features.
      layers: number of blocks.
      width: channels, from the stem on.
      patch: side of the stem's patches, in pixels.
      block: see `convolutions`.
      dtype: compute dtype; None follows the arrays.
    """

    classes: int
    layers: int = 8
    width: int = 64
    patch: int = 4
    block: str = "basic"
    dtype: Any = None

    def __post_init__(self):
        whole_numbers(layers=self.layers, width=self.width, patch=self.patch)
        whole_numbers(0, classes=self.classes)
        convolutions(self.block, self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Features, train: bool = False) -> Float[Array, "batch classes"]:
        whole_patches(images.shape, self.patch)
        kernel = (self.patch, self.patch)
        x = nn.Conv(self.width, kernel, kernel, "VALID", use_bias=False, dtype=self.dtype, kernel_init=HE, name="stem")(
            images
        )
        x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype, name="stem_norm")(x))
        for layer in range(self.layers):
            x = Block(self.block, self.width, self.dtype, name=f"block{layer}")(x, train)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x) if self.classes else x
