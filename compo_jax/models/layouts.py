"""What a ViT's parameters are called in the checkpoints of timm, Hugging Face, Google (AugReg) and OpenAI.

A table for each says what corresponds to what and is read in both directions; the shapes come from `ViT` itself.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Transform(NamedTuple):
    """From the arrays of a checkpoint to one of ours, and back, without arithmetic: so it holds for Fishers too."""

    ours: Callable[[Sequence[np.ndarray]], np.ndarray]
    theirs: Callable[[np.ndarray], Sequence[np.ndarray]]


def _single(ours: Callable, theirs: Callable) -> Transform:
    return Transform(lambda arrays: ours(arrays[0]), lambda x: [theirs(x)])


def _joint(each: Transform, thirds: Sequence[int] = (1, 2)) -> Transform:
    """Of q, k and v in several arrays, which ours has side by side; `thirds` says where one ends."""
    return Transform(
        lambda arrays: np.concatenate([each.ours([array]) for array in arrays], axis=-1),
        lambda x: [each.theirs(part)[0] for part in np.split(x, [x.shape[-1] // 3 * n for n in thirds], axis=-1)],
    )


SAME = _single(lambda x: x, lambda x: x)
LINEAR = _single(lambda x: x.transpose(1, 0), lambda x: x.transpose(1, 0))  # (out, in) and (in, out)
CONVOLUTION = _single(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW and HWIO
TABLE = _single(lambda x: x[None], lambda x: x[0])  # (rows, width) and (1, rows, width)
VECTOR = _single(lambda x: x[None, None], lambda x: x[0, 0])  # (width,) and (1, 1, width)


class Row(NamedTuple):
    """One parameter: its path in ours, its names in theirs; `{block}` in a name stands for our axis 0."""

    path: str
    names: tuple[str, ...]
    transform: Transform = SAME


class Layout(NamedTuple):
    """The names of one family of checkpoints.

    Attributes:
      roots: what may stand before all names but the `rootless`.
      skipped: (condition, names) patterns: names without their root that are left out where any name fits the
        condition.
      fields: of `ViT`, which all checkpoints of this family have and no shape tells.
      antialias: how tables of positions are resized, see `positions.resized`.
    """

    name: str
    rows: tuple[Row, ...]
    roots: tuple[str, ...] = ("",)
    rootless: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    fields: Mapping[str, Any] = {}
    antialias: bool = True

    def rows_by_name(self) -> dict[str, Row]:
        return {name: row for row in self.rows for name in row.names}

    def root(self, names: Iterable[str]) -> str:
        """What stands before the names of a checkpoint."""
        starts = self.rows_by_name()
        counts = {
            root: sum(n.startswith(root) and template(n.removeprefix(root)) in starts for n in names)
            for root in self.roots
        }
        return max(counts, key=counts.__getitem__)

    def kept(self, names: Iterable[str]) -> dict[str, str]:
        """The names that are read: without their root, and as they are."""
        root = self.root(names)
        bare = {name.removeprefix(root): name for name in names}
        left_out = [pattern for condition, pattern in self.skipped if any(re.match(condition, name) for name in bare)]
        return {name: full for name, full in bare.items() if not any(re.fullmatch(p, name) for p in left_out)}


def template(name: str) -> str:
    """`name` with `{block}` for the number of its block: the first number that is a part of it."""
    return re.sub(r"(?<=[._])\d+(?=[./])", "{block}", name, count=1)


def fitting(layout: Layout, names: Iterable[str]) -> int:
    """How many of the names are of the layout."""
    rows = layout.rows_by_name()
    return sum(template(name) in rows for name in layout.kept(names))


def likely(layouts: Iterable[Layout], names: Iterable[str]) -> Layout:
    """The layout that most of the names are of, the first where none is."""
    return max(layouts, key=lambda layout: fitting(layout, names))


def foreign(names: Iterable[str], what: str) -> ValueError:
    """Of a checkpoint none of whose arrays is of any layout; `what` says whose arrays they should be."""
    names = list(names)
    listed = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return ValueError(
        f"none of the {len(names)} arrays ({listed}) is called as {what}: this is another model, or all names have a "
        "common prefix, which has to be stripped"
    )


def linear(path: str, name: str) -> tuple[Row, Row]:
    """Kernel and bias of PyTorch's linear layer `name`."""
    return Row(f"{path}/kernel", (f"{name}.weight",), LINEAR), Row(f"{path}/bias", (f"{name}.bias",))


def norm(path: str, name: str) -> tuple[Row, Row]:
    """Scale and bias of the layer norm `name`."""
    return Row(f"{path}/scale", (f"{name}.weight",)), Row(f"{path}/bias", (f"{name}.bias",))


def qkv(path: str, names: Sequence[str], thirds: Sequence[int] = (1, 2)) -> tuple[Row, Row]:
    """The joint kernel and bias of the linear layers `names`; `thirds` as in `_joint`."""
    return (
        Row(f"{path}/kernel", tuple(f"{name}.weight" for name in names), _joint(LINEAR, thirds)),
        Row(f"{path}/bias", tuple(f"{name}.bias" for name in names), _joint(SAME, thirds)),
    )


def _patch(name: str, bias: bool = True) -> tuple[Row, ...]:
    rows = Row("patch/kernel", (f"{name}.weight",), CONVOLUTION), Row("patch/bias", (f"{name}.bias",))
    return rows if bias else rows[:1]


TIMM = Layout(
    "timm",
    (
        Row("cls", ("cls_token",)),
        Row("registers", ("reg_token",)),
        Row("position", ("pos_embed",)),
        *_patch("patch_embed.proj"),
        *norm("norm_pre", "norm_pre"),
        *norm("blocks/norm1", "blocks.{block}.norm1"),
        *linear("blocks/attention/qkv", "blocks.{block}.attn.qkv"),
        *linear("blocks/attention/proj", "blocks.{block}.attn.proj"),
        Row("blocks/layer_scale1", ("blocks.{block}.ls1.gamma",)),
        *norm("blocks/norm2", "blocks.{block}.norm2"),
        *linear("blocks/mlp/fc1", "blocks.{block}.mlp.fc1"),
        *linear("blocks/mlp/fc2", "blocks.{block}.mlp.fc2"),
        Row("blocks/layer_scale2", ("blocks.{block}.ls2.gamma",)),
        *norm("norm", "norm"),
        *norm("pool_norm", "fc_norm"),
        Row("attention_pool/probe", ("attn_pool.latent",)),
        *qkv("attention_pool/attention/qkv", ("attn_pool.q", "attn_pool.kv"), thirds=(1,)),
        *linear("attention_pool/attention/proj", "attn_pool.proj"),
        *norm("attention_pool/norm", "attn_pool.norm"),
        *linear("attention_pool/mlp/fc1", "attn_pool.mlp.fc1"),
        *linear("attention_pool/mlp/fc2", "attn_pool.mlp.fc2"),
        *linear("head", "head"),
    ),
)


def _hf_embeddings() -> tuple[Row, ...]:
    return (
        Row("cls", ("embeddings.cls_token",)),
        Row("position", ("embeddings.position_embeddings",)),
        *_patch("embeddings.patch_embeddings.projection"),
    )


def _hf_attention() -> tuple[Row, ...]:
    at = "encoder.layer.{block}.attention"
    return (
        *qkv("blocks/attention/qkv", [f"{at}.attention.{part}" for part in ("query", "key", "value")]),
        *linear("blocks/attention/proj", f"{at}.output.dense"),
    )


HF_VIT = Layout(
    "vit",
    (
        *_hf_embeddings(),
        *norm("blocks/norm1", "encoder.layer.{block}.layernorm_before"),
        *_hf_attention(),
        *norm("blocks/norm2", "encoder.layer.{block}.layernorm_after"),
        *linear("blocks/mlp/fc1", "encoder.layer.{block}.intermediate.dense"),
        *linear("blocks/mlp/fc2", "encoder.layer.{block}.output.dense"),
        *norm("norm", "layernorm"),
        *linear("head", "classifier"),
    ),
    roots=("", "vit."),
    rootless=("classifier.",),
    # the pooler is no part of transformers' ViTForImageClassification either
    skipped=(("", r"pooler\..*|embeddings\.mask_token"),),
    fields={"epsilon": 1e-12},
    antialias=False,
)

HF_DINOV2 = Layout(
    "dinov2",
    (
        *_hf_embeddings(),
        *norm("blocks/norm1", "encoder.layer.{block}.norm1"),
        *_hf_attention(),
        Row("blocks/layer_scale1", ("encoder.layer.{block}.layer_scale1.lambda1",)),
        *norm("blocks/norm2", "encoder.layer.{block}.norm2"),
        *linear("blocks/mlp/fc1", "encoder.layer.{block}.mlp.fc1"),
        *linear("blocks/mlp/fc2", "encoder.layer.{block}.mlp.fc2"),
        Row("blocks/layer_scale2", ("encoder.layer.{block}.layer_scale2.lambda1",)),
        *norm("norm", "layernorm"),
        *linear("head", "classifier"),
    ),
    roots=("", "dinov2."),
    rootless=("classifier.",),
    skipped=(("", r"embeddings\.mask_token"),),
    fields={"layer_scale": True},
    antialias=False,
)

HF_DINOV2_REGISTERS = HF_DINOV2._replace(
    name="dinov2_with_registers",
    rows=(*HF_DINOV2.rows, Row("registers", ("embeddings.register_tokens",))),
    roots=("", "dinov2_with_registers."),
    antialias=True,
)


def hf_blocks() -> tuple[Row, ...]:
    """The blocks of Hugging Face's CLIP and SigLIP, in both towers."""
    at = "encoder.layers.{block}"
    return (
        *norm("blocks/norm1", f"{at}.layer_norm1"),
        *qkv("blocks/attention/qkv", [f"{at}.self_attn.{part}_proj" for part in "qkv"]),
        *linear("blocks/attention/proj", f"{at}.self_attn.out_proj"),
        *norm("blocks/norm2", f"{at}.layer_norm2"),
        *linear("blocks/mlp/fc1", f"{at}.mlp.fc1"),
        *linear("blocks/mlp/fc2", f"{at}.mlp.fc2"),
    )


def openai_blocks(root: str = "") -> tuple[Row, ...]:
    """The blocks of OpenAI's CLIP: `root` is `visual.` in the vision tower."""
    at = f"{root}transformer.resblocks.{{block}}"
    return (
        *norm("blocks/norm1", f"{at}.ln_1"),
        Row("blocks/attention/qkv/kernel", (f"{at}.attn.in_proj_weight",), LINEAR),
        Row("blocks/attention/qkv/bias", (f"{at}.attn.in_proj_bias",)),
        *linear("blocks/attention/proj", f"{at}.attn.out_proj"),
        *norm("blocks/norm2", f"{at}.ln_2"),
        *linear("blocks/mlp/fc1", f"{at}.mlp.c_fc"),
        *linear("blocks/mlp/fc2", f"{at}.mlp.c_proj"),
    )


def _hf_tower() -> tuple[Row, ...]:
    """What the vision towers of CLIP and SigLIP have in common."""
    return (
        Row("position", ("embeddings.position_embedding.weight",), TABLE),
        *hf_blocks(),
        *norm("norm", "post_layernorm"),
    )


_TEXT = r"text_model\..*|text_projection\..*|logit_(scale|bias)|embeddings\.position_ids"

HF_CLIP = Layout(
    "clip",
    (
        Row("cls", ("embeddings.class_embedding",), VECTOR),
        *_patch("embeddings.patch_embedding", bias=False),
        *norm("norm_pre", "pre_layrnorm"),
        *_hf_tower(),
        Row("projection/kernel", ("visual_projection.weight",), LINEAR),
    ),
    roots=("vision_model.", ""),
    rootless=("visual_projection.",),
    skipped=(("", _TEXT),),
    fields={"pre_norm": True, "activation": "quick_gelu", "epsilon": 1e-5},
    antialias=False,
)

HF_SIGLIP = Layout(
    "siglip",
    (
        *_patch("embeddings.patch_embedding"),
        *_hf_tower(),
        Row("attention_pool/probe", ("head.probe",)),
        Row("attention_pool/attention/qkv/kernel", ("head.attention.in_proj_weight",), LINEAR),
        Row("attention_pool/attention/qkv/bias", ("head.attention.in_proj_bias",)),
        *linear("attention_pool/attention/proj", "head.attention.out_proj"),
        *norm("attention_pool/norm", "head.layernorm"),
        *linear("attention_pool/mlp/fc1", "head.mlp.fc1"),
        *linear("attention_pool/mlp/fc2", "head.mlp.fc2"),
        *linear("head", "classifier"),
    ),
    roots=("vision_model.", ""),
    rootless=("classifier.",),
    # transformers' classifier is of the tokens' mean: the attention pool is there and takes no part
    skipped=(("", _TEXT), (r"classifier\.", r"head\..*")),
    fields={"class_token": False, "activation": "gelu_tanh"},
    antialias=False,
)

OPENAI_CLIP = Layout(
    "openai_clip",
    (
        Row("cls", ("visual.class_embedding",), VECTOR),
        Row("position", ("visual.positional_embedding",), TABLE),
        *_patch("visual.conv1", bias=False),
        *norm("norm_pre", "visual.ln_pre"),
        *openai_blocks("visual."),
        *norm("norm", "visual.ln_post"),
        Row("projection/kernel", ("visual.proj",)),
    ),
    skipped=(("", r"(?!visual\.).*"),),  # the text tower
    fields={"pre_norm": True, "activation": "quick_gelu", "epsilon": 1e-5},
)


def augreg(heads: int) -> Layout:
    """Google's .npz of ViT and AugReg, whose arrays have an axis of heads."""

    def split(axis):
        """Our one axis of (heads x size), theirs two."""

        def theirs(x):
            return x.reshape(*x.shape[:axis], heads, x.shape[axis] // heads, *x.shape[axis + 1 :])

        return _single(lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), theirs)

    def layer(path, name, kernel=SAME):
        return Row(f"{path}/kernel", (f"{name}/kernel",), kernel), Row(f"{path}/bias", (f"{name}/bias",))

    def norm(path, name):
        return Row(f"{path}/scale", (f"{name}/scale",)), Row(f"{path}/bias", (f"{name}/bias",))

    at = "Transformer/encoderblock_{block}"
    attention = f"{at}/MultiHeadDotProductAttention_1"
    parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
    return Layout(
        "augreg",
        (
            Row("cls", ("cls",)),
            Row("position", ("Transformer/posembed_input/pos_embedding",)),
            *layer("patch", "embedding"),
            *norm("blocks/norm1", f"{at}/LayerNorm_0"),
            Row("blocks/attention/qkv/kernel", tuple(f"{part}/kernel" for part in parts), _joint(split(1))),
            Row("blocks/attention/qkv/bias", tuple(f"{part}/bias" for part in parts), _joint(split(0))),
            *layer("blocks/attention/proj", f"{attention}/out", split(0)),
            *norm("blocks/norm2", f"{at}/LayerNorm_2"),
            *layer("blocks/mlp/fc1", f"{at}/MlpBlock_3/Dense_0"),
            *layer("blocks/mlp/fc2", f"{at}/MlpBlock_3/Dense_1"),
            *norm("norm", "Transformer/encoder_norm"),
            *layer("head", "head"),
        ),
        roots=("", "opt/target/"),
        # of the first ViT's: the head is of a representation that the class token is turned into
        skipped=((r"pre_logits/", r"(pre_logits|head)/.*"), (r"opt/", r"opt/.*")),
    )


HF = (HF_VIT, HF_DINOV2, HF_DINOV2_REGISTERS, HF_CLIP, HF_SIGLIP)
LAYOUTS = (TIMM, *HF, OPENAI_CLIP, augreg(1))
