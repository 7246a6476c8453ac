"""The names that PyTorch's Vision Transformers give their layers: timm's, and those of Hugging Face's transformers."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from compo_jax import tree
from compo_jax.tree import Tree

#: The name of one module, or of several whose outputs side by side are those of one of ours: query, key and value.
Names = str | tuple[str, ...]
#: For each weight's path in ours (a `kernel`, or a norm's `scale`) the names of PyTorch's modules, `{block}` standing
#: for axis 0.
Modules = Mapping[str, Names]

#: PEFT's wrapper in front of every name in its files.
PREFIX = "base_model.model."

HEAD = "head/kernel"
#: Paths of what a model may have behind its blocks to pool the tokens; a classifier of the mean does without.
POOLING = ("attention_pool/", "pooler/")

#: Weights of a ViT and the modules of timm's `vit_*` that hold them.
TIMM_MODULES: Modules = {
    "blocks/attention/qkv/kernel": "blocks.{block}.attn.qkv",
    "blocks/attention/proj/kernel": "blocks.{block}.attn.proj",
    "blocks/mlp/fc1/kernel": "blocks.{block}.mlp.fc1",
    "blocks/mlp/fc2/kernel": "blocks.{block}.mlp.fc2",
    "blocks/norm1/scale": "blocks.{block}.norm1",
    "blocks/norm2/scale": "blocks.{block}.norm2",
    "norm/scale": "norm",
    "norm_pre/scale": "norm_pre",
    "pool_norm/scale": "fc_norm",
    "attention_pool/attention/proj/kernel": "attn_pool.proj",
    "attention_pool/mlp/fc1/kernel": "attn_pool.mlp.fc1",
    "attention_pool/mlp/fc2/kernel": "attn_pool.mlp.fc2",
    "attention_pool/norm/scale": "attn_pool.norm",
    "patch/kernel": "patch_embed.proj",
    HEAD: "head",
}


def _changed(modules: Modules, change: Callable[[str], str]) -> Modules:
    """The same weights under changed names."""
    return {
        path: change(names) if isinstance(names, str) else tuple(map(change, names)) for path, names in modules.items()
    }


def _classifier(blocks: str, within: str, norm: str, patch: str) -> dict[str, Names]:
    """The modules of a classifier of transformers; `within` a block are query, key, value, what projects their result,
    the MLP's two layers and the two norms."""
    q, k, v, proj, fc1, fc2, norm1, norm2 = (f"{blocks}.{{block}}.{name}" for name in within.split())
    return {
        "blocks/attention/qkv/kernel": (q, k, v),
        "blocks/attention/proj/kernel": proj,
        "blocks/mlp/fc1/kernel": fc1,
        "blocks/mlp/fc2/kernel": fc2,
        "blocks/norm1/scale": norm1,
        "blocks/norm2/scale": norm2,
        "norm/scale": norm,
        "patch/kernel": patch,
        HEAD: "classifier",
    }


def _named(root: str, blocks: str, within: str) -> Modules:
    """The modules of a classifier around the model `root`; `blocks` and `within` as for `_classifier`."""
    patch = f"{root}.embeddings.patch_embeddings.projection"
    modules = _classifier(f"{root}.{blocks}", within, f"{root}.layernorm", patch)
    return modules | {"pooler/kernel": f"{root}.pooler.dense"}


_PROJECTIONS = "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2"
_V4 = "attention.attention.query attention.attention.key attention.attention.value attention.output.dense"
_VIT_NORMS = "layernorm_before layernorm_after"
_CLIP = _classifier(
    "vision_model.encoder.layers",
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj mlp.fc1 mlp.fc2 layer_norm1 layer_norm2",
    "vision_model.post_layernorm",
    "vision_model.embeddings.patch_embedding",
)
_CLIP |= {  # a base has what is of its kind: CLIP's, or the pooling of SigLIP
    "norm_pre/scale": "vision_model.pre_layrnorm",
    "projection/kernel": "visual_projection",
    "attention_pool/attention/proj/kernel": "vision_model.head.attention.out_proj",
    "attention_pool/mlp/fc1/kernel": "vision_model.head.mlp.fc1",
    "attention_pool/mlp/fc2/kernel": "vision_model.head.mlp.fc2",
    "attention_pool/norm/scale": "vision_model.head.layernorm",
}

#: Weights of a ViT and the modules of the classifiers of Hugging Face's transformers that hold them, by the type of the
#: model; with `-v4` as transformers up to version 4 names them. `timm` is a model of timm's inside transformers.
HF_MODULES: dict[str, Modules] = {
    "clip": _CLIP,
    "siglip": _CLIP,
    "timm": _changed(TIMM_MODULES, lambda name: f"timm_model.{name}"),
}
for _root in ("vit", "deit"):
    HF_MODULES[_root] = _named(_root, "layers", f"{_PROJECTIONS} {_VIT_NORMS}")
    HF_MODULES[f"{_root}-v4"] = _named(_root, "encoder.layer", f"{_V4} intermediate.dense output.dense {_VIT_NORMS}")
for _root in ("dinov2", "dinov2_with_registers"):
    HF_MODULES[_root] = _named(_root, "encoder.layer", f"{_PROJECTIONS} norm1 norm2")
    HF_MODULES[f"{_root}-v4"] = _named(_root, "encoder.layer", f"{_V4} mlp.fc1 mlp.fc2 norm1 norm2")


def recognised(keys: Iterable[str]) -> Modules:
    """The modules whose names most of a PEFT file's keys have: timm's, or Hugging Face's, with or without the name of
    the model before the blocks (a ViTModel's own names have none)."""
    keys = [re.sub(r"\.\d+\.", ".{block}.", key.removeprefix(PREFIX), count=1) for key in keys]

    def keys_of(modules: Modules) -> int:
        starts = tuple(f"{name}." for names in modules.values() for name in listed(names))
        return sum(key.startswith(starts) for key in keys)

    bare = [_changed(modules, lambda name: name.partition(".")[2] or name) for modules in HF_MODULES.values()]
    return max([TIMM_MODULES, *HF_MODULES.values(), *bare], key=keys_of)


def listed(names: Names) -> tuple[str, ...]:
    """One name or several as a tuple."""
    return (names,) if isinstance(names, str) else names


def head_of(modules: Modules) -> str | None:
    """The name of the classifier; None where there is none."""
    return next(iter(listed(modules[HEAD])), None) if HEAD in modules else None


class Place(NamedTuple):
    """Where the weight and the bias of one PyTorch module lie in ours.

    Attributes:
      path: of the weight's leaf.
      bias: path of the bias's leaf; None where the base has none.
      block: the module's number on axis 0 of these leaves; None where they aren't stacked.
      columns: the module's outputs on the last axis.
      shape: of the weight in ours: (in, out) of a linear layer, (out,) of a norm, (height, width, in, out) of a
        convolution.
    """

    path: str
    bias: str | None
    block: int | None
    columns: slice
    shape: tuple[int, ...]

    @property
    def linear(self) -> bool:
        return len(self.shape) == 2

    @property
    def at(self) -> tuple[int, ...]:
        """Index of the module on the axes that count layers."""
        return () if self.block is None else (self.block,)

    def part(self, leaf: np.ndarray) -> np.ndarray:
        """The module's part of one of its leaves, a view."""
        return leaf[(*self.at, ..., self.columns)]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of the weight in PyTorch."""
        return tuple(self.shape[axis] for axis in _TO_TORCH[len(self.shape)])

    def ours(self, weight: np.ndarray) -> np.ndarray:
        """A weight of PyTorch's in our layout."""
        return weight.transpose(np.argsort(_TO_TORCH[len(self.shape)]))

    def torchs(self, weight: np.ndarray) -> np.ndarray:
        """A weight of ours in PyTorch's layout."""
        return weight.transpose(_TO_TORCH[len(self.shape)])


_TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}  # our axes in PyTorch's order, by their number


def places(base: Tree, modules: Modules) -> dict[str, Place]:
    """Where the PyTorch modules of these names lie in `base`, blocks in order, but for those whose weight it lacks.

    ValueError where a leaf hasn't as many axes as its name says, or can't be parted among the names.
    """
    shapes = {path: np.shape(leaf) for path, leaf in tree.by_name(base).items()}
    by_torch_name = {}
    for path, names in modules.items():
        if path not in shapes:
            continue
        shape, names = shapes[path], listed(names)
        stacked = "{block}" in names[0]
        inner = shape[1:] if stacked else shape
        allowed = (1,) if path.endswith("scale") else (2,) if stacked else (2, 4)
        if len(shape) - stacked not in allowed:
            layout = "(layers, in, out)" if stacked else "(in, out)"
            raise ValueError(f"{path} is {shape} and not {layout}, as {modules[path]!r} in modules= says")
        width, rest = divmod(inner[-1], len(names))
        if rest:
            raise ValueError(f"the {inner[-1]} outputs of {path} can't be parted among {', '.join(names)} in modules=")
        bias = f"{path.rpartition('/')[0]}/bias".removeprefix("/")
        if shapes.get(bias) != (*shape[:stacked], shape[-1]):
            bias = None
        for block in range(shape[0]) if stacked else [None]:
            for number, name in enumerate(names):
                columns = slice(number * width, (number + 1) * width)
                place = Place(path, bias, block, columns, (*inner[:-1], width))
                by_torch_name[name.format(block=block)] = place
    return by_torch_name
