"""Modules as folders of Hugging Face's PEFT (Mangrulkar et al., 2022, github.com/huggingface/peft): LoRA and (IA)³.

A folder holds `adapter_config.json`, which says what is adapted and how, and `adapter_model.safetensors`. PEFT knows
linear layers one by one, with weights (out, in); ours may be stacked over depth, (layers, in, out).
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.adapters import low_rank, peft_config, rescaling
from compo_jax.adapters.adapter import Adapter
from compo_jax.adapters.entries import entries
from compo_jax.adapters.low_rank import lora
from compo_jax.adapters.rescaling import ia3
from compo_jax.files import local_path, replaced, safetensors_file
from compo_jax.tree import Tree

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

#: Kernels of a ViT and the modules of timm's `vit_*` that hold them; `{block}` stands for axis 0 of the kernel.
TIMM_MODULES = {
    "blocks/attention/qkv/kernel": "blocks.{block}.attn.qkv",
    "blocks/attention/proj/kernel": "blocks.{block}.attn.proj",
    "blocks/mlp/fc1/kernel": "blocks.{block}.mlp.fc1",
    "blocks/mlp/fc2/kernel": "blocks.{block}.mlp.fc2",
    "head/kernel": "head",
}


class _Layer(NamedTuple):
    """One linear layer: its kernel's path in ours, its place in the stack, and its sizes."""

    path: str
    block: int | None
    fan_in: int
    fan_out: int


def _layers(base: Tree, modules: Mapping[str, str]) -> dict[str, _Layer]:
    """The linear layers of `base` that have a name in `modules`, by that name, blocks in order."""
    by_torch_name = {}
    for path, kernel in tree.by_name(base).items():
        if path not in modules:
            continue
        stacked = "{block}" in modules[path]
        if np.ndim(kernel) != 2 + stacked:
            shape = "(layers, in, out)" if stacked else "(in, out)"
            raise ValueError(f"{path} is {np.shape(kernel)} and not {shape}, as {modules[path]!r} in modules= says")
        for block in range(kernel.shape[0]) if stacked else [None]:
            by_torch_name[modules[path].format(block=block)] = _Layer(path, block, *kernel.shape[-2:])
    return by_torch_name


def _keys(layer: str) -> dict[str, str]:
    """PEFT's names of a layer's arrays."""
    names = {"a": "lora_A.weight", "b": "lora_B.weight", "l": "ia3_l"}
    return {factor: f"base_model.model.{layer}.{name}" for factor, name in names.items()}


def save_peft(
    folder: str | os.PathLike,
    adapter: Adapter,
    module: Tree,
    base: Tree,
    *,
    modules: Mapping[str, str] = TIMM_MODULES,
    base_model: str | None = None,
    check_finite: bool = True,
) -> None:
    """Writes a LoRA or (IA)³ module so that PEFT loads it onto the same model; the whole folder is there or none.

    LoRA's scale is 1 (`lora_alpha` = `r` everywhere), and the higher rank of a joint qkv goes to the rank pattern.

    Args:
      modules: for each adapted kernel's path the name of PyTorch's module, `{block}` standing for axis 0.
      base_model: name or path of the model, for PEFT's automatic classes.

    Raises:
      FileExistsError: there is something at `folder`.
      ValueError: the adapter is neither; a kernel has no name in `modules`; the module doesn't fit the base; (IA)³
        leaves out biases, which PEFT scales with the rest; or the module holds NaN or infinities, unless `check_finite`
        is False.
      OSError: the folder can't be written, the disk is full say.
    """
    if adapter.name not in ("lora", "ia3"):
        raise ValueError(
            f"only lora and ia3 can be written for PEFT, and not {adapter.name!r}: approximate a full delta with "
            "adapters.recompress"
        )
    factors_of = entries(module, base, (low_rank.FACTORS if adapter.name == "lora" else rescaling.FACTORS,))
    if check_finite:
        tree.require_finite(module, "the module")
    if unknown := sorted(factors_of.keys() - modules.keys()):
        raise ValueError(f"PyTorch's names of {', '.join(unknown)} are not known: give them in modules=")
    factors_of = jax.tree.map(np.asarray, factors_of)
    layers = {name: layer for name, layer in _layers(base, modules).items() if layer.path in factors_of}
    config = {
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(layers),
        "task_type": None,
    }
    if adapter.name == "lora":
        ranks = {name: factors_of[layer.path]["a"].shape[-1] for name, layer in layers.items()}
        common = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {name: rank for name, rank in ranks.items() if rank != common}
        config |= {"peft_type": "LORA", "r": common, "lora_alpha": common, "bias": "none", "use_rslora": False}
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern, "lora_dropout": 0.0, "init_lora_weights": True}
    else:
        leaves, delta = tree.by_name(base), jax.eval_shape(adapter.delta, module, base)
        scaled = tree.names(jax.eval_shape(ia3((), bias=True).delta, module, base))
        if left := [name for name in scaled if name not in tree.names(delta) and np.any(leaves[name])]:
            raise ValueError(
                f"PEFT's (IA)³ scales a layer's whole output, and this module leaves out {', '.join(left)}: train it "
                "with adapters.ia3(bias=True)"
            )
        config |= {"peft_type": "IA3", "feedforward_modules": [], "init_ia3_weights": True}

    arrays = {}
    for name, layer in layers.items():
        for factor, leaf in factors_of[layer.path].items():
            x = leaf if layer.block is None else leaf[layer.block]
            arrays[_keys(name)[factor]] = np.ascontiguousarray(x[:, None] if factor == "l" else x.T)
    _write(local_path(folder), config, arrays)


def _write(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    import safetensors.numpy

    if folder.exists():
        raise FileExistsError(f"there is something at {folder}: remove it, or choose another folder")
    try:
        with replaced(folder) as aside:
            aside.mkdir(parents=True)
            safetensors.numpy.save_file(arrays, aside / _WEIGHTS, {"format": "pt"})
            (aside / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    except safetensors.SafetensorError as error:
        raise OSError(f"{folder} is not written ({error}): look at the space left on its disk") from error


def load_peft(
    folder: str | os.PathLike,
    base: Tree,
    *,
    modules: Mapping[str, str] = TIMM_MODULES,
    check_finite: bool = True,
) -> tuple[Adapter, Tree]:
    """`(adapter, module)` of a PEFT folder with LoRA or (IA)³, for `base`; the inverse of `save_peft`.

    LoRA's scale, `lora_alpha / r` or with `use_rslora` `lora_alpha / √r`, is folded into the second factor. Where the
    layers of a stacked kernel have several ranks, or some aren't adapted, they are filled up with zeros, (IA)³'s with
    ones: that changes nothing. Arrays of a type narrower than the base's take the base's.

    Raises:
      FileNotFoundError: a file isn't there.
      ValueError: a file is damaged, the arrays are a pickle, the kind of adapter or a feature isn't supported, names
        or shapes don't fit the base, all of them listed, or arrays hold NaN or infinities, unless `check_finite` is
        False.
    """
    folder = local_path(folder)
    config, arrays = _read(folder)
    layers = _layers(base, modules)
    try:
        chosen = [name for name, layer in layers.items() if peft_config.targeted(config, name, layer.block)]
        scales = (
            {name: peft_config.rank_and_scale(config, name) for name in chosen} if config["peft_type"] == "LORA" else {}
        )
    except re.error as error:
        raise ValueError(f"{folder / _CONFIG}: {error.pattern!r} is no regular expression ({error})") from error
    expected = {}
    for name in chosen:
        _, _, fan_in, fan_out = layers[name]
        rank, _ = scales.get(name, (0, 0))
        shapes = {"a": (rank, fan_in), "b": (fan_out, rank)} if scales else {"l": (fan_out, 1)}
        expected |= {_keys(name)[factor]: shape for factor, shape in shapes.items()}
    _check(folder, {name: array.shape for name, array in arrays.items()}, expected)
    if check_finite:
        tree.require_finite(arrays, str(folder / _WEIGHTS))

    def entry(name: str, width: int, dtype: Any) -> dict[str, np.ndarray]:
        _, _, fan_in, fan_out = layers[name]
        factors = {factor: arrays[key].astype(dtype) for factor, key in _keys(name).items() if key in arrays}
        if not scales:
            return {"l": factors["l"][:, 0] if factors else np.ones(fan_out, dtype)}
        rank, scale = scales.get(name, (0, 0.0))
        a, b = np.zeros((fan_in, width), dtype), np.zeros((width, fan_out), dtype)
        if factors:
            a[:, :rank], b[:rank] = factors["a"].T, factors["b"].T.astype(tree.wide_type(factors["b"])) * scale
        return {"a": a, "b": b}

    adapted, widths = {}, {}
    leaves = tree.by_name(base)
    for path in dict.fromkeys(layers[name].path for name in chosen):
        blocks = [name for name, layer in layers.items() if layer.path == path]
        widths[path] = max(scales.get(name, (1, 0))[0] for name in blocks)
        types = {arrays[key].dtype for name in blocks for key in _keys(name).values() if key in arrays}
        dtype = jnp.result_type(leaves[path].dtype, *types)
        parts = [entry(name, widths[path], dtype) for name in blocks]
        stacked = layers[blocks[0]].block is not None
        adapted[path] = jax.tree.map(lambda *x: jnp.asarray(np.stack(x) if stacked else x[0]), *parts)  # noqa: B023
    module = tree.place(adapted, base)
    targets = {path: f"^{re.escape(path)}$" for path in adapted}
    stacked = [targets[path] for path in adapted if "{block}" in modules[path]]
    if not scales:
        return ia3(list(targets.values()), bias=True, stacked=stacked), module
    common = math.gcd(*widths.values())
    rules = [(pattern, widths[path] // common) for path, pattern in targets.items()]
    return lora(common, rules, stacked=stacked), module


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"there is no {_CONFIG} in {folder}: a PEFT folder has one; check the path")
    config = peft_config.read(folder / _CONFIG)
    path = folder / _WEIGHTS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise ValueError(
            f"{folder / _PICKLE} is a PyTorch pickle, which isn't read as it can run code: load the folder with PEFT "
            "and save it again with safe_serialization=True"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no {_WEIGHTS} in {folder}: download the whole folder")
    with safetensors_file(path) as file:
        return config, {name: file.get_tensor(name) for name in file.offset_keys()}


def _check(folder: Path, shapes: Mapping[str, tuple], expected: Mapping[str, tuple]) -> None:
    lines = tree.mismatches(shapes, expected)
    if not expected:
        lines.append("no layer of the base is adapted: give modules= the names of its layers in PyTorch")
    if lines:
        lines.insert(0, f"the arrays in {folder} aren't those that its settings ask for on this base:")
        raise ValueError("\n".join(lines))
