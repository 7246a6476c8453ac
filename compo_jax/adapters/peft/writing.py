"""Modules out, as folders that PEFT loads."""

import os
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from compo_jax import tree
from compo_jax.adapters import low_rank, rescaling
from compo_jax.adapters.adapter import Adapter
from compo_jax.adapters.entries import ARRAY, entries
from compo_jax.adapters.peft import files, settings
from compo_jax.adapters.peft.arrays import key
from compo_jax.adapters.peft.layouts import TIMM_MODULES, Modules, Place, places
from compo_jax.adapters.rescaling import ia3
from compo_jax.files import local_path
from compo_jax.tree import Tree


def save_peft(
    folder: str | os.PathLike,
    adapter: Adapter,
    module: Tree,
    base: Tree,
    *,
    modules: Modules = TIMM_MODULES,
    base_model: str | None = None,
    check_finite: bool = True,
) -> None:
    """Writes a LoRA or (IA)³ module so that PEFT loads it onto the same model; the whole folder is there or none.

    LoRA's scale is 1 (`lora_alpha` = `r` everywhere), and the higher rank of a joint qkv goes to the rank pattern.
    Where the model has query, key and value instead, each gets the first factor of the joint weight and its columns of
    the second one, but for ranks that do nothing there; one that isn't changed at all is left out. Full deltas beside
    LoRA's factors are written as modules that were trained as a whole (a head), and as trained biases.

    Args:
      modules: for each adapted kernel's path the name of PyTorch's module, or the names of several whose outputs side
        by side are the kernel's, `{block}` standing for axis 0. Default: timm's; `HF_MODULES` has those of Hugging
        Face's classifiers, by the type of the model.
      base_model: name or path of the model, for PEFT's automatic classes.

    Raises:
      FileExistsError: there is something at `folder`.
      ValueError: the adapter is neither; a leaf has no name in `modules`; the module doesn't fit the base, or has no
        factors that change a layer; (IA)³ leaves out biases, which PEFT scales with the rest; or the module holds NaN
        or infinities, unless `check_finite` is False.
      OSError: the folder can't be written, the disk is full say.
    """
    if adapter.name not in ("lora", "ia3"):
        raise ValueError(
            f"only lora and ia3 can be written for PEFT, and not {adapter.name!r}: approximate a full delta with "
            "adapters.recompress"
        )
    held = entries(module, base, low_rank.KINDS if adapter.name == "lora" else (rescaling.FACTORS,))
    if check_finite:
        tree.require_finite(module, "the module")
    factors_of = {path: jax.tree.map(np.asarray, entry) for path, entry in held.items() if not ARRAY.holds(entry)}
    if unknown := sorted(factors_of.keys() - modules.keys()):
        raise ValueError(f"PyTorch's names of {', '.join(unknown)} are not known: give them in modules=")
    places_of = places(base, modules)
    layers = {name: place for name, place in places_of.items() if place.path in factors_of}
    if adapter.name == "lora":
        factors = _low_rank(layers, factors_of)
        kind = _ranks({name: pair["a"].shape[0] for name, pair in factors.items()})
    else:
        _require_scaled_biases(adapter, module, base)
        factors = {name: {"l": place.part(factors_of[place.path]["l"])[:, None]} for name, place in layers.items()}
        kind = {"peft_type": "IA3", "feedforward_modules": [], "init_ia3_weights": True}
    arrays = {key(name, factor): array for name, entry in factors.items() for factor, array in entry.items()}
    config = kind | {
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(factors),
        "task_type": None,
    }
    if whole := {path: entry for path, entry in held.items() if ARRAY.holds(entry)}:
        changed = jax.tree.map(np.asarray, tree.by_name(tree.add(base, tree.place(whole, base))))
        trained, weights = _trained(whole, changed, places_of, factors)
        config, arrays = config | trained, arrays | weights
    files.write(local_path(folder), config, arrays)


def _trained(
    deltas: Collection[str], leaves: Mapping[str, Any], places_of: Mapping[str, Place], adapted: Collection[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and arrays of the full `deltas` beside the factors, from the changed model's leaves: modules that are
    saved as a whole and, where other biases change, all biases."""
    if lost := sorted(set(deltas) - {path for place in places_of.values() for path in (place.path, place.bias)}):
        raise ValueError(f"PyTorch's names of {', '.join(lost)} are not known: give them in modules=")
    whole = {name: place for name, place in places_of.items() if place.path in deltas}
    endings = {"modules_to_save": list(whole)}  # PEFT takes all whose names end so
    whole |= {name: place for name, place in places_of.items() if settings.saved(endings, name)}
    weights = {key(name, "weight"): place.torchs(place.part(leaves[place.path])) for name, place in whole.items()}
    beside = {place.bias for name, place in places_of.items() if name not in whole} & set(deltas)
    biases = {
        key(name, "base_layer.bias" if name in adapted else "bias"): place.part(leaves[place.bias])
        for name, place in (places_of if beside else whole).items()
        if place.bias
    }
    return {"modules_to_save": list(whole) or None, "bias": "all" if beside else "none"}, weights | biases


def _low_rank(
    layers: Mapping[str, Place], factors_of: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """PEFT's two factors of each layer that changes."""
    factors = {}
    for name, place in layers.items():
        a, b = factors_of[place.path]["a"][place.at], factors_of[place.path]["b"][place.at]
        right = b[:, place.columns]
        used = np.any(right, axis=1) if right.shape != b.shape else np.ones(len(b), bool)
        if used.any():
            factors[name] = {"a": a[:, used].T, "b": right[used].T}
    if not factors:
        raise ValueError("the module has no LoRA factors that change a layer, and PEFT takes no empty adapter")
    return factors


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Settings that say these ranks of layers, and a scale of 1."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }


def _require_scaled_biases(adapter: Adapter, module: Tree, base: Tree) -> None:
    leaves, delta = tree.by_name(base), jax.eval_shape(adapter.delta, module, base)
    scaled = tree.names(jax.eval_shape(ia3((), bias=True).delta, module, base))
    if left := [name for name in scaled if name not in tree.names(delta) and np.any(leaves[name])]:
        raise ValueError(
            f"PEFT's (IA)³ scales a layer's whole output, and this module leaves out {', '.join(left)}: train it with "
            "adapters.ia3(bias=True)"
        )
