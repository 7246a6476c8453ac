"""What the description beside a checkpoint (config.json) says that no shape tells."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from compo_jax.models.layouts import HF, HF_CLIP, HF_SIGLIP, TIMM, Layout
from compo_jax.models.transformer import ACTIVATIONS

_ACTIVATIONS = {name: name for name in ACTIVATIONS} | {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quickgelu": "quick_gelu",
}
_MODEL_TYPES = {layout.name: layout for layout in HF} | {
    "clip_vision_model": HF_CLIP,
    "siglip_vision_model": HF_SIGLIP,
}


class Described(NamedTuple):
    """Attributes:
    layout: of the names; None where the description doesn't say.
    fields: of `ViT`.
    heads: None where the description doesn't say.
    """

    layout: Layout | None = None
    fields: Mapping[str, Any] = {}
    heads: int | None = None


def described(config: Mapping[str, Any] | None) -> Described:
    """Of Hugging Face's config.json or timm's; ValueError for a model that is no ViT, and an unknown activation."""
    if not config:
        return Described()
    if "model_type" in config:
        return _hf(config)
    if "architecture" in config:
        return _timm(config)
    raise ValueError(
        "its config.json names neither a model_type (Hugging Face) nor an architecture (timm): give the .safetensors "
        "file itself, and heads="
    )


def _hf(config: Mapping[str, Any]) -> Described:
    if config["model_type"] not in _MODEL_TYPES:
        raise ValueError(f"its model_type is {config['model_type']!r}, which isn't read: {', '.join(_MODEL_TYPES)} are")
    layout = _MODEL_TYPES[config["model_type"]]
    vision = (config.get("vision_config") or config) | (config.get("vision_config_dict") or {})  # as transformers does
    fields = {}
    if "hidden_act" in vision:
        fields["activation"] = activation_of(vision["hidden_act"])
    if "layer_norm_eps" in vision:
        fields["epsilon"] = vision["layer_norm_eps"]
    return Described(layout, fields, vision.get("num_attention_heads"))


# Those that timm lists as trained with QuickGELU, whatever the name of their architecture.
_QUICK = (
    r".*quickgelu|.*_clip_.*\.(openai|dfn(?!2b_s39b)|metaclip(?!2|_altogether))(?!.*_ft_)"
    r"|vit_huge_patch14_clip_224\.metaclip2|vit_base_patch32_clip_224\.laion400m"
)
# SigLIPs that timm builds with the approximation by tanh.
_TANH = r"vit_(so400m_patch16|giantopt_patch16|base_patch32)_siglip_|vit_large_patch16_siglip_(gap_)?512"


def _timm(config: Mapping[str, Any]) -> Described:
    arguments = config.get("model_args") or {}
    tag = (config.get("pretrained_cfg") or {}).get("tag") or ""
    name = f"{config['architecture']}.{tag}"
    usual = "quick_gelu" if re.match(_QUICK, name) else "gelu_tanh" if re.match(_TANH, name) else "gelu"
    fields = {"activation": activation_of(arguments.get("act_layer", usual))}
    if "_rpn_" in name:
        raise ValueError(f"{name} normalises what each part gives and not what it gets, and ViT doesn't: take another")
    if arguments.get("pool_include_prefix"):
        raise ValueError(
            "config.json's pool_include_prefix pools over the class token, too, and ViT doesn't: take another"
        )
    pool = config.get("global_pool") or "token"
    if pool not in ("token", "avg", "map"):
        raise ValueError(f"config.json's global_pool is {pool!r}, and ViT pools by token, avg or map: take another")
    if pool == "avg":
        fields["pool"] = "mean"
    return Described(TIMM, fields, arguments.get("num_heads"))


def activation_of(name: str) -> str:
    """Ours of the name that timm or transformers has for an activation; ValueError for one that `Block` hasn't."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"its activation is {name!r}, which ViT hasn't: {', '.join(ACTIVATIONS)}")
    return _ACTIVATIONS[name]


class Pixels(NamedTuple):
    """Mean and standard deviation of each channel, of values in [0, 1], that a checkpoint was trained with."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CLIP_PIXELS = Pixels((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # of all but a few


def pixels(config: Mapping[str, Any] | None, preprocessor: Mapping[str, Any] | None) -> Pixels | None:
    """From Hugging Face's preprocessor_config.json or timm's config.json; None where neither says them."""
    for source, mean, std in (
        (preprocessor or {}, "image_mean", "image_std"),
        ((config or {}).get("pretrained_cfg") or {}, "mean", "std"),
    ):
        if source.get("do_normalize") is False:
            return Pixels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        if source.get(mean) and source.get(std):
            return Pixels(tuple(source[mean]), tuple(source[std]))
    return None
