"""Which ViT a checkpoint's names and shapes are of, and what is wrong with those that fit none."""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from compo_jax import tree
from compo_jax.models.layouts import Layout, template
from compo_jax.models.sizes import whole_numbers
from compo_jax.models.vit import ViT

Shapes = Mapping[str, tuple[int, ...]]

_VARIANTS = (
    (r"dist_token|head_dist|distillation_token", "a distilled DeiT, which has a second class token"),
    (r"\b[qk]_norm\.", "a variant that normalises queries and keys"),
    (r"\bgamma_[12]$|lambda_[12]$", "a variant with layer scale under other names (BEiT, DeiT III's first files)"),
    (r"^pre_logits\.", "a variant with a representation layer before the head"),
    (r"mlp\.(w12|weights_in|fc1_g)\b", "a variant whose MLP is gated (SwiGLU), as DINOv2's giant is"),
    (r"rel_pos|relative_position|rope", "a variant with relative or rotary positions"),
)

# Heads by (width, depth) and the patches it is published with: in timm, AugReg, DeiT, MAE, DINO, CLIP and SigLIP.
_HEADS = {
    (64, 6): (2, (16,)),
    (192, 12): (3, (16,)),
    (384, 12): (6, (8, 14, 16, 32)),
    (512, 12): (8, (16,)),
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


def read_architecture(shapes: Shapes, layout: Layout, fields: Mapping[str, Any]) -> ViT:
    """The ViT that most of the shapes agree on; what no shape tells is ViT-B/16's. One head: no shape tells it.

    `fields` of ViT are the description's, and have precedence; its pool only where the arrays leave a choice.
    """
    shaped = shapes_by_path(shapes, layout)
    length = functools.partial(usual_length, shaped)

    def has(path: str) -> bool:
        return any(name.startswith(path) for name in shaped)

    width = length(r"(blocks/norm[12]|norm|pool_norm)/(scale|bias)|patch/bias", 1, 0) or 768
    patch = length("patch/kernel", 4, 0) or 16
    rows = length("position", 3, 1) or 197
    square = math.isqrt(rows) ** 2 == rows
    inputs = length("head/kernel", 2, 0)
    read = {
        "class_token": has("cls") or not square,
        "class_position": not square,
        "registers": length("registers", 3, 1),
        "pre_norm": has("norm_pre"),
        "layer_scale": has("blocks/layer_scale"),
        "projection": length("projection/kernel", 2, 1),
        "epsilon": 1e-5 if has("norm_pre") else 1e-6,
        **fields,
    }
    if not read["class_token"]:
        read["class_position"] = True
    pools = {
        "attention": has("attention_pool"),
        "mean_then_norm": has("pool_norm"),
        "mean": not read["class_token"] or fields.get("pool") == "mean",
        "class_and_mean": inputs == 2 * width or fields.get("pool") == "class_and_mean",
    }
    read["pool"] = next((pool for pool, there in pools.items() if there), "class")
    grid = max(1, math.isqrt(max(0, rows - (read["class_token"] and read["class_position"]))))
    hidden = length("blocks/mlp/fc1/bias", 1, 0) or 4 * width
    classes = length("head/kernel", 2, 1) or length("head/bias", 1, 0)
    return ViT(
        grid * patch, patch, width, depth(shapes, layout), heads=1, mlp_ratio=hidden / width, classes=classes, **read
    )


def usual_length(shaped: Mapping[str, list[tuple[int, ...]]], paths: str, rank: int, axis: int) -> int:
    """Along this axis of what `shapes_by_path` has of the paths that fit the pattern, with so many axes: what most of
    them have; 0 where there is none."""
    shapes = (shape for path, each in shaped.items() if re.fullmatch(paths, path) for shape in each)
    lengths = Counter(shape[axis] for shape in shapes if len(shape) == rank)
    return lengths.most_common(1)[0][0] if lengths else 0


def shapes_by_path(shapes: Shapes, layout: Layout) -> dict[str, list[tuple[int, ...]]]:
    """The shapes, as they are in ours, of the parameters of each path that one array holds."""
    rows, by_path = layout.rows_by_name(), defaultdict(list)
    for name, shape in shapes.items():
        row = rows.get(template(name))
        if row is None:
            continue
        hollow = np.broadcast_to(np.float32(0), shape)
        try:
            by_path[row.path].append(row.transform.ours([hollow]).shape)
        except (ValueError, IndexError):  # of another rank, which is told when all shapes are compared
            by_path[row.path].append(shape)
    return by_path


def depth(shapes: Shapes, layout: Layout) -> int:
    """How many blocks the names count; 1 where they count none."""
    rows = layout.rows_by_name()
    numbers = [
        int(re.search(r"(?<=[._])\d+(?=[./])", name)[0])
        for name in shapes
        if "{block}" in template(name) and template(name) in rows
    ]
    return 1 + max(numbers, default=0)


def check(shapes: Shapes, expected: Shapes, model: ViT, layout: Layout) -> None:
    """ValueError with all that doesn't fit: names that are missing or unexpected, and shapes."""
    lines = tree.mismatches(shapes, expected)
    if not lines:
        return
    parts = [name.replace("_", " ") for name in ("layer_scale", "registers", "pre_norm") if getattr(model, name)]
    parts += [f"pool {model.pool!r}"] if model.pool != "class" else []
    summary = (
        f"the arrays don't fit a ViT of width {model.width}, depth {model.depth}, patch {model.patch}, RGB images of "
        f"{model.image_size}x{model.image_size} and {model.classes} classes"
        f"{', with ' * bool(parts)}{', '.join(parts)}, which most of their shapes speak for:"
    )
    variants = [text for pattern, text in _VARIANTS if any(re.search(pattern, name) for name in shapes)]
    lines += [f"this is {text}: ViT has no such part, take another checkpoint" for text in variants]
    unexpected = [name for name in shapes if name not in expected]
    if any(re.search(r"layers\.\d+\.attention\.q_proj\b", name) for name in unexpected):
        lines.append("these are transformers 5's own names: write the checkpoint by its save_pretrained(folder)")
    if layout.name == "clip" and any(name.startswith("classifier.") for name in unexpected):
        lines.append(
            "transformers' classifier of a CLIP reads the mean of its patches' tokens, and ViT doesn't pool so: load "
            "the CLIP that it was made of"
        )
    if any("pos" in name for name in expected) and not any("pos" in name for name in shapes):
        lines.append("it has no table of positions: where they are rotary, as DINOv3's, ViT has no such part")
    biases = {name for name in expected if re.search(r"(query|key|value|qkv|[qkv]_proj|in_proj)[._]bias$", name)}
    if biases and expected.keys() - shapes.keys() == biases:
        lines.append("its queries, keys and values have no biases (qkv_bias false in config.json): put zeros there")
    if not expected.keys() & shapes.keys():
        lines.append(
            f"no name is of the layout {layout.name!r}: strip a common prefix of the names, or convert the checkpoint "
            "with timm"
        )
    raise ValueError("\n".join([summary, *lines]))


def read_heads(model: ViT, fixed: bool, heads: int | None) -> int:
    """The number of heads, which no shape tells; `fixed`: the class token has zeros for its position."""
    if heads is None:
        heads, patches = _HEADS.get((model.width, model.depth), (None, ()))
        if model.patch not in patches:
            raise ValueError(
                f"no known ViT is {model.width} wide and {model.depth} deep with patches of {model.patch}, and the "
                "number of heads isn't in the arrays: pass heads= as the model was trained"
            )
        # MoCo v3's ViT-S and MAE-Lite's ViT-Ti have 12 heads: what tells them is the fixed position embedding.
        if model.width < 768 and fixed:
            raise ValueError(
                f"the class token has no position embedding, as where that is fixed, and then a ViT {model.width} wide "
                f"may have 12 heads instead of {heads} with the same shapes (MoCo v3, MAE-Lite): pass heads= as the "
                "model was trained"
            )
    whole_numbers(heads=heads)
    if model.width % heads:
        raise ValueError(f"{heads} heads don't divide the width {model.width}: pass heads= as the model was trained")
    return heads
