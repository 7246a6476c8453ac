"""Parameters of `ViT` from the arrays of others' checkpoints, and back: timm, Hugging Face, AugReg, OpenAI's CLIP."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.models.architecture import check, read_architecture, read_heads
from compo_jax.models.descriptions import described
from compo_jax.models.layouts import HF, LAYOUTS, OPENAI_CLIP, TIMM, Layout, augreg, fitting, foreign, likely
from compo_jax.models.positions import resized
from compo_jax.models.sizes import whole_numbers
from compo_jax.models.vit import ViT
from compo_jax.tree import Tree

Arrays = Mapping[str, np.ndarray]


def from_timm(
    arrays: Arrays,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    activation: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    check_finite: bool = True,
) -> tuple[ViT, Tree]:
    """The model and its parameters (`model.apply({"params": params}, images)`) from arrays under timm's names: its
    plain ViTs and those of AugReg, DeiT III, DINOv2 with and without registers, CLIP and SigLIP.

    Width, depth, patch, image size, MLP ratio, classes (0 without a head) and the model's parts are read off names
    and shapes. 16-bit arrays become float32. Copies; the blocks are stacked on axis 0.

    Args:
      heads: attention heads, which no shape tells. Default: what `config` says, or those of the architecture that has
        this width, depth and patch among the published ViTs, ViT-Ti to ViT-G. Any other asks for `heads`, and so does
        a small one with a fixed position embedding, such as MoCo v3's ViT-S of 12 heads.
      image_size: side in pixels; where it isn't the checkpoint's, the position embeddings are resized. Default: the
        checkpoint's, or what is left of it in whole patches (378 of SigLIP's 384 at patches of 14).
      activation: of the MLPs, which no shape tells. Default: what `config` says, or the family's, `gelu` mostly. A
        CLIP under timm's names asks for it: OpenAI's were trained with `quick_gelu`, LAION's with `gelu`.
      config: the checkpoint's config.json.
      dtype: the model's compute dtype.
    Raises:
      ValueError: names or shapes don't fit, all of them listed; heads or activation aren't known, heads don't divide
        the width, or the patch the images; arrays hold NaN or infinities, unless `check_finite` is False.
    """
    options = {"heads": heads, "image_size": image_size, "activation": activation, "config": config}
    return read(arrays, TIMM, **options, dtype=dtype, check_finite=check_finite)


def from_hf(
    arrays: Arrays,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    activation: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    check_finite: bool = True,
) -> tuple[ViT, Tree]:
    """`from_timm` for arrays under Hugging Face's names: ViT, DINOv2, DINOv2 with registers, and the vision towers of
    CLIP and SigLIP, with or without their text towers, which are left out.

    Which one it is says `config`, or else the names. Without `config`, ε and activation are those of the published
    checkpoints: CLIP's are OpenAI's (`quick_gelu`; LAION's need activation="gelu"). ViT's pooler and masks aren't read.
    """
    layout = described(config).layout if config else likely(HF, arrays)
    options = {"heads": heads, "image_size": image_size, "activation": activation, "config": config}
    return read(arrays, layout, **options, dtype=dtype, check_finite=check_finite)


def from_augreg(
    arrays: Arrays, *, image_size: int | None = None, dtype: Any = None, check_finite: bool = True
) -> tuple[ViT, Tree]:
    """`from_timm` for the arrays of Google's .npz of ViT and AugReg, which tell their heads.

    Where the head is of a representation layer (the first ViTs on ImageNet-21k), both are left out.
    """
    return read(arrays, augreg(1), image_size=image_size, dtype=dtype, check_finite=check_finite)


def from_openai_clip(
    arrays: Arrays,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    activation: str = "quick_gelu",
    dtype: Any = None,
    check_finite: bool = True,
) -> tuple[ViT, Tree]:
    """`from_timm` for the vision tower under the names of OpenAI's CLIP and of open_clip (`visual...`).

    activation: "gelu" for what LAION and DataComp trained.
    """
    options = {"heads": heads, "image_size": image_size, "activation": activation}
    return read(arrays, OPENAI_CLIP, **options, dtype=dtype, check_finite=check_finite)


def read(
    arrays: Arrays,
    layout: Layout | None = None,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    activation: str | None = None,
    config: Mapping[str, Any] | None = None,
    stated: Mapping[str, Any] | None = None,
    dtype: Any = None,
    check_finite: bool = True,
) -> tuple[ViT, Tree]:
    """The model and its parameters from arrays of any layout; None takes the one that most names are of.

    stated: fields of `ViT` that the arrays' file says, and that have precedence over `config`.
    """
    description = described(config)
    if arrays and not any(fitting(each, arrays) for each in LAYOUTS):
        raise foreign(arrays, "those of a ViT are by timm, Hugging Face, Google or OpenAI")
    layout = layout or description.layout or likely(LAYOUTS, arrays)
    arrays = {name: arrays[full] for name, full in layout.kept(arrays).items()}
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    if layout.name == "augreg":
        layout = augreg(_augreg_heads(shapes))
        heads = _augreg_heads(shapes)
    fields = {**layout.fields, **description.fields, **(stated or {})}
    if activation is not None:
        fields["activation"] = activation
    model = read_architecture(shapes, layout, fields)
    params_shapes = _shapes(model)
    check(shapes, written_shapes(params_shapes, layout), model, layout)
    _require_floating(arrays)
    if model.pre_norm and "activation" not in fields:
        raise ValueError(
            "a CLIP is trained with QuickGELU (OpenAI's, DFN's, MetaCLIP's) or GELU (LAION's, DataComp's), and no "
            "array tells which: pass activation='quick_gelu' or activation='gelu', or load its folder with config.json"
        )
    params = filled(arrays, params_shapes, layout)
    class_row = model.class_token and model.class_position
    fixed = class_row and not np.any(params["position"][:, 0])
    heads = read_heads(model, fixed, description.heads if heads is None else heads)
    model = model.clone(heads=heads, dtype=dtype)
    if check_finite:
        tree.require_finite(params, "the checkpoint")
    if image_size not in (None, model.image_size):
        whole_numbers(image_size=image_size)
        if image_size < model.patch or image_size % model.patch:
            raise ValueError(f"the patch ({model.patch}) doesn't divide image_size={image_size}: choose a multiple")
        params["position"] = resized(params["position"], image_size // model.patch, class_row, layout.antialias)
        model = model.clone(image_size=image_size)
    return model, params


def _require_floating(arrays: Arrays) -> None:
    kinds = {name: jnp.result_type(x) for name, x in arrays.items()}
    if whole := [f"{name} ({kind})" for name, kind in kinds.items() if not jnp.issubdtype(kind, jnp.floating)]:
        more = f" and {len(whole) - 5} others" * (len(whole) > 5)
        raise ValueError(
            f"{', '.join(whole[:5])}{more} hold no floating-point numbers: a quantised checkpoint, say, whose scales "
            "lie elsewhere; take it in float32, float16 or bfloat16"
        )


@functools.lru_cache(maxsize=8)
def _shapes(model: ViT) -> Tree:
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def _augreg_heads(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return next((shape[1] for name, shape in shapes.items() if name.endswith("query/kernel") and len(shape) == 3), 1)


def filled(arrays: Arrays, shapes: Tree, layout: Layout) -> Tree:
    """The tree of the arrays, which fit."""
    rows = {row.path: row for row in layout.rows}

    def one(path, shape) -> jax.Array:
        _, names, transform = rows[path]
        stacked = "{block}" in names[0]
        parts = [
            transform.ours([np.asarray(arrays[name.format(block=block)]) for name in names])
            for block in (range(shape.shape[0]) if stacked else [None])
        ]
        array = np.stack(parts) if stacked else parts[0]
        return jnp.asarray(array.astype(np.promote_types(array.dtype, np.float32)))

    return tree.map_with_name(one, shapes)


def to_timm(params: Tree) -> dict[str, np.ndarray]:
    """The arrays under timm's names, the exact inverse of `from_timm`; views where that is possible.

    Takes any tree shaped as the parameters (a Fisher, a delta): a leaf that is None or absent is left out.
    Raises ValueError for a leaf that timm's ViT doesn't have.
    """
    return write(params, TIMM)


def to_hf(params: Tree, layout: str, root: str | None = None) -> dict[str, np.ndarray]:
    """As `to_timm`, under Hugging Face's names, the inverse of `from_hf` of what that reads.

    Args:
      layout: `vit`, `dinov2`, `dinov2_with_registers`, `clip` or `siglip`.
      root: what stands before the names, but those of head and projection. Default: as published, `vision_model.` of
        CLIP and SigLIP, the layout's name (`vit.`) of a tree with a head, and else nothing.
    """
    layouts = {each.name: each for each in HF}
    if layout not in layouts:
        raise ValueError(f"no layout is called {layout!r}; there are {', '.join(layouts)}")
    chosen = layouts[layout]
    if root is None:
        root = chosen.roots["head" in params and not chosen.roots[0]]
    return write(params, chosen, root)


def to_augreg(params: Tree, *, heads: int) -> dict[str, np.ndarray]:
    """As `to_timm`, under the names of Google's .npz, whose arrays have an axis of `heads`."""
    return write(params, augreg(heads))


def to_openai_clip(params: Tree) -> dict[str, np.ndarray]:
    """As `to_timm`, under the names of OpenAI's CLIP, the inverse of `from_openai_clip` of what that reads."""
    return write(params, OPENAI_CLIP)


def write(params: Tree, layout: Layout, root: str = "") -> dict[str, np.ndarray]:
    """The arrays of any tree shaped as parameters under the names of `layout`, `root` before those that have one."""
    leaves = tree.by_name(params)
    if unknown := sorted(leaves.keys() - {row.path for row in layout.rows}):
        raise ValueError(
            f"the layout {layout.name!r} has no counterpart of {', '.join(unknown)}: give the tree under 'params', "
            "shaped as a ViT's parameters (an adapter's delta, not its factors), and the layout that has its parts"
        )
    arrays = {}
    for path, names, transform in layout.rows:
        if path not in leaves:
            continue
        leaf = np.asarray(leaves[path])
        for block, part in enumerate(leaf) if "{block}" in names[0] else [(None, leaf)]:
            theirs = transform.theirs(part)
            arrays |= {name.format(block=block): x for name, x in zip(names, theirs, strict=True)}
    return {name if name.startswith(layout.rootless) else root + name: x for name, x in arrays.items()}


def written_shapes(params: Tree, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shapes of `write`'s arrays; `params` may be shapes alone, as `jax.eval_shape` gives them."""
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)  # without memory
    return {name: array.shape for name, array in write(hollow, layout).items()}
