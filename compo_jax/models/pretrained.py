"""Checkpoints in timm's layout (Wightman, 2019, github.com/huggingface/pytorch-image-models) of `ViT`, in and out.

One table says what corresponds to what and is read in both directions; the shapes come from `ViT` itself.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.files import JOIN, local_path, replaced, safetensors_file
from compo_jax.models.sizes import whole_numbers
from compo_jax.models.vit import ViT
from compo_jax.tree import Tree

Shapes = Mapping[str, tuple[int, ...]]


class Transform(NamedTuple):
    """Two inverse permutations of an array's axes: from a checkpoint's layout to ours, and back."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


IDENTITY = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.transpose(1, 0), lambda x: x.transpose(1, 0))  # (out, in) and (in, out)
CONVOLUTION = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW and HWIO


class Row(NamedTuple):
    """One parameter: its path in ours, its name in theirs; `{block}` in the name stands for our axis 0."""

    path: str
    name: str
    transform: Transform


TIMM = (
    Row("cls", "cls_token", IDENTITY),
    Row("position", "pos_embed", IDENTITY),
    Row("patch/kernel", "patch_embed.proj.weight", CONVOLUTION),
    Row("patch/bias", "patch_embed.proj.bias", IDENTITY),
    Row("blocks/norm1/scale", "blocks.{block}.norm1.weight", IDENTITY),
    Row("blocks/norm1/bias", "blocks.{block}.norm1.bias", IDENTITY),
    Row("blocks/attention/qkv/kernel", "blocks.{block}.attn.qkv.weight", LINEAR),
    Row("blocks/attention/qkv/bias", "blocks.{block}.attn.qkv.bias", IDENTITY),
    Row("blocks/attention/proj/kernel", "blocks.{block}.attn.proj.weight", LINEAR),
    Row("blocks/attention/proj/bias", "blocks.{block}.attn.proj.bias", IDENTITY),
    Row("blocks/norm2/scale", "blocks.{block}.norm2.weight", IDENTITY),
    Row("blocks/norm2/bias", "blocks.{block}.norm2.bias", IDENTITY),
    Row("blocks/mlp/fc1/kernel", "blocks.{block}.mlp.fc1.weight", LINEAR),
    Row("blocks/mlp/fc1/bias", "blocks.{block}.mlp.fc1.bias", IDENTITY),
    Row("blocks/mlp/fc2/kernel", "blocks.{block}.mlp.fc2.weight", LINEAR),
    Row("blocks/mlp/fc2/bias", "blocks.{block}.mlp.fc2.bias", IDENTITY),
    Row("norm/scale", "norm.weight", IDENTITY),
    Row("norm/bias", "norm.bias", IDENTITY),
    Row("head/kernel", "head.weight", LINEAR),
    Row("head/bias", "head.bias", IDENTITY),
)

_VARIANTS = (
    (r"dist_token|head_dist", "a distilled DeiT, which has a second class token"),
    (r"\b[qk]_norm\.", "a variant that normalises queries and keys"),
    (r"\bls[12]\.gamma|\bgamma_[12]$", "a variant with layer scale (DeiT III, DINOv2)"),
    (r"^fc_norm\.", "a variant that averages the tokens and normalises the average"),
    (r"reg_token|register_token", "a variant with register tokens"),
    (r"^pre_logits\.", "a variant with a representation layer before the head"),
    (r"^norm_pre\.", "a variant that normalises the embeddings before the first block (CLIP)"),
    (r"^attn_pool\.", "a variant with attention pooling (SigLIP)"),
)

# Heads by (width, depth) and the patches it is published with: timm's vit_*, AugReg's, DeiT's, MAE's and DINO's.
_HEADS = {
    (64, 6): (2, (16,)),
    (192, 12): (3, (16,)),
    (384, 12): (6, (8, 14, 16, 32)),
    (768, 12): (12, (8, 14, 16, 32)),
    (832, 21): (13, (16,)),
    (896, 12): (14, (16, 32)),
    (896, 18): (14, (16,)),
    (1024, 24): (16, (14, 16, 32)),
    (1152, 27): (16, (14, 16)),
    (1280, 32): (16, (14, 16)),
    (1408, 40): (16, (14, 16)),
    (1536, 40): (24, (14,)),
    (1664, 48): (16, (14,)),
}


def _architecture(shapes: Shapes) -> ViT:
    """The ViT that most of the shapes agree on; what no shape tells is ViT-B/16's. One head: no shape tells it."""

    def length(pattern: str, rank: int, axis: int) -> int:
        lengths = Counter(s[axis] for name, s in shapes.items() if len(s) == rank and re.fullmatch(pattern, name))
        return lengths.most_common(1)[0][0] if lengths else 0

    width = length(r"(blocks\.\d+\.norm[12]|norm|patch_embed\.proj)\.(weight|bias)", 1, 0) or 768
    patch = length(r"patch_embed\.proj\.weight", 4, -1) or 16
    grid = max(1, round(math.sqrt(max(0, (length(r"pos_embed", 3, 1) or 197) - 1))))
    hidden = length(r"blocks\.\d+\.mlp\.fc1\.bias", 1, 0) or 4 * width
    classes = length(r"head\.weight", 2, 0) or length(r"head\.bias", 1, 0)
    depth = 1 + max((int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))), default=0)
    return ViT(grid * patch, patch, width, depth, heads=1, mlp_ratio=hidden / width, classes=classes)


def _check(shapes: Shapes, expected: Shapes, model: ViT) -> None:
    lines = tree.mismatches(shapes, expected)
    if not lines:
        return
    summary = (
        f"the arrays don't fit a ViT of width {model.width}, depth {model.depth}, patch {model.patch}, RGB images of "
        f"{model.image_size}x{model.image_size} and {model.classes} classes, which most of their shapes speak for:"
    )
    variants = [text for pattern, text in _VARIANTS if any(re.search(pattern, name) for name in shapes)]
    lines += [f"this is {text}: ViT has no such part, take a checkpoint of the plain ViT" for text in variants]
    if not expected.keys() & shapes.keys():
        lines.append("no name is timm's: strip a common prefix of the names, or convert the checkpoint with timm")
    raise ValueError("\n".join([summary, *lines]))


def _heads(model: ViT, position: np.ndarray, heads: int | None) -> int:
    """The number of heads, which no shape tells."""
    if heads is None:
        heads, patches = _HEADS.get((model.width, model.depth), (None, ()))
        if model.patch not in patches:
            raise ValueError(
                f"no known ViT is {model.width} wide and {model.depth} deep with patches of {model.patch}, and the "
                "number of heads isn't in the arrays: pass heads= as the model was trained"
            )
        # MoCo v3's ViT-S and MAE-Lite's ViT-Ti have 12 heads: what tells them is the fixed position embedding.
        if model.width < 768 and not np.any(np.asarray(position)[:, 0]):
            raise ValueError(
                f"the class token has no position embedding, as where that is fixed, and then a ViT {model.width} wide "
                f"may have 12 heads instead of {heads} with the same shapes (MoCo v3, MAE-Lite): pass heads= as the "
                "model was trained"
            )
    whole_numbers(heads=heads)
    if model.width % heads:
        raise ValueError(f"{heads} heads don't divide the width {model.width}: pass heads= as the model was trained")
    return heads


def _resize(position: Float[Array, "1 tokens width"], grid: int) -> Float[Array, "1 resized width"]:
    """Position embeddings for a grid of `grid` x `grid` patches (bicubic, antialiased); the CLS token's is kept."""
    old = math.isqrt(position.shape[1] - 1)
    width = position.shape[2]
    patches = jax.image.resize(position[:, 1:].reshape(1, old, old, width), (1, grid, grid, width), "cubic")
    return jnp.concatenate([position[:, :1], patches.reshape(1, grid * grid, width)], axis=1)


def from_timm(
    arrays: Mapping[str, np.ndarray],
    *,
    heads: int | None = None,
    image_size: int | None = None,
    dtype: Any = None,
    check_finite: bool = True,
) -> tuple[ViT, Tree]:
    """The model and its parameters (`model.apply({"params": params}, images)`) from arrays under timm's names.

    Width, depth, patch, image size, MLP ratio and classes (0 without a head) are read off the shapes. 16-bit arrays
    become float32. Copies; the blocks are stacked on axis 0.

    Args:
      heads: attention heads, which no shape tells. Default: those of the architecture that has this width, depth and
        patch in timm's, AugReg's, DeiT's, MAE's and DINO's models, ViT-Ti to ViT-G. Any other asks for `heads`, and so
        does a small one with a fixed position embedding, such as MoCo v3's ViT-S of 12 heads.
      image_size: side in pixels; where it isn't the checkpoint's, the position embeddings are resized.
      dtype: the model's compute dtype.
    Raises:
      ValueError: names or shapes don't fit, all of them listed; heads aren't known or don't divide the width, or the
        patch the images; arrays hold NaN or infinities, unless `check_finite` is False.
    """
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    model = _architecture(shapes)
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    layout = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), layout)  # shapes without memory
    _check(shapes, {name: array.shape for name, array in to_timm(hollow).items()}, model)
    model = model.clone(heads=_heads(model, arrays["pos_embed"], heads), dtype=dtype)
    rows = {row.path: row for row in TIMM}

    def read(path, _) -> jax.Array:
        _, name, transform = rows[path]
        numbers = range(model.depth) if "{block}" in name else [None]
        parts = [transform.ours(np.asarray(arrays[name.format(block=block)])) for block in numbers]
        array = np.stack(parts) if "{block}" in name else parts[0]
        return jnp.asarray(array.astype(np.promote_types(array.dtype, np.float32)))

    params = tree.map_with_name(read, layout)
    if check_finite:
        tree.require_finite(params, "the checkpoint")
    if image_size not in (None, model.image_size):
        whole_numbers(image_size=image_size)
        if image_size < model.patch or image_size % model.patch:
            raise ValueError(f"the patch ({model.patch}) doesn't divide image_size={image_size}: choose a multiple")
        params["position"] = _resize(params["position"], image_size // model.patch)
        model = model.clone(image_size=image_size)
    return model, params


def to_timm(params: Tree) -> dict[str, np.ndarray]:
    """The arrays under timm's names, the exact inverse of `from_timm`; views where that is possible.

    Takes any tree shaped as the parameters (a Fisher, a delta): a leaf that is None or absent is left out.
    Raises ValueError for a leaf that ViT doesn't have.
    """
    leaves = tree.by_name(params)
    if unknown := sorted(leaves.keys() - {row.path for row in TIMM}):
        raise ValueError(
            f"timm's ViT has no counterpart of {', '.join(unknown)}: give the tree under 'params', shaped as a ViT's "
            "parameters (an adapter's delta, not its factors)"
        )
    arrays = {}
    for path, name, transform in TIMM:
        if path in leaves:
            leaf = np.asarray(leaves[path])
            parts = enumerate(leaf) if "{block}" in name else [(None, leaf)]
            arrays |= {name.format(block=block): transform.theirs(part) for block, part in parts}
    return arrays


_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


def load(
    path: str | Path,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    dtype: Any = None,
    check_finite: bool = True,
) -> tuple[ViT, Tree]:
    """`from_timm` of a .safetensors file; `heads` in the file's metadata, if there, replaces the default.

    Raises FileNotFoundError, and ValueError where it isn't a safetensors file or doesn't fit.
    """
    path = local_path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the .safetensors file in it")
    with safetensors_file(path) as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.offset_keys()}
    if heads is None and "heads" in metadata:
        if not metadata["heads"].isdecimal():
            raise ValueError(f"{path}: the metadata's heads is {metadata['heads']!r} and not a number: pass heads=")
        heads = int(metadata["heads"])
    try:
        return from_timm(arrays, heads=heads, image_size=image_size, dtype=dtype, check_finite=check_finite)
    except ValueError as error:
        if _SHARD.search(path.name):
            raise ValueError(f"{path} is one of a checkpoint's several files: {JOIN}") from error
        raise ValueError(f"{path}: {error}") from error


def save(path: str | Path, params: Tree, metadata: Mapping[str, Any] | None = None, dtype: Any = np.float16) -> None:
    """Writes `to_timm(params)` as a .safetensors file of `dtype`; either the whole file is there or none.

    `metadata` is stored as text; `{"heads": model.heads}` makes `load` independent of timm's convention. float16 holds
    weights to 3 digits and loses values below 6e-8 (a Fisher's, say). Raises ValueError for values too big for `dtype`,
    and one without fractions; OSError where the file can't be written, the disk is full say.
    """
    path = local_path(path)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={np.dtype(dtype).name} holds no fractions: save with dtype=np.float32")
    arrays = to_timm(params)
    with np.errstate(over="ignore"):
        cast = {name: np.ascontiguousarray(array.astype(dtype)) for name, array in arrays.items()}
    if lost := [name for name in cast if np.isinf(cast[name]).any() and not np.isinf(arrays[name]).any()]:
        raise ValueError(f"{', '.join(lost)}: values beyond the range of {np.dtype(dtype)}; save with dtype=np.float32")
    texts = {str(key): str(value) for key, value in (metadata or {}).items()}
    try:
        with replaced(path) as aside:
            safetensors.numpy.save_file(cast, aside, texts)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} is not written ({error}): look at the space left on its disk") from error
