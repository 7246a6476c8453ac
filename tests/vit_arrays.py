"""A small ViT's arrays under timm's names, and images for it."""

import numpy as np

SMALL = {"width": 24, "depth": 3, "hidden": 40, "patch": 4, "grid": 3, "classes": 5}  # heads are given apart
HEADS = 3


def names_and_shapes(width, depth, hidden, patch, grid, classes):
    """timm's names with their shapes, (out, in) for a linear layer."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid**2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for block in range(depth):
        for layer, shape in layers.items():
            shapes |= {f"blocks.{block}.{layer}.weight": shape, f"blocks.{block}.{layer}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.weight": (width,), f"blocks.{block}.{norm}.bias": (width,)}
    return shapes | ({"head.weight": (classes, width), "head.bias": (classes,)} if classes else {})


def random_arrays(dtype=np.float32, **changes):
    rng = np.random.default_rng(0)
    shapes = names_and_shapes(**(SMALL | changes))
    return {name: rng.normal(scale=0.3, size=shape).astype(dtype) for name, shape in shapes.items()}


def hollow(shapes):
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def random_images(side=12, dtype=np.float32):
    return np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(dtype)
