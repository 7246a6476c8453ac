"""What `adapter_config.json` of Hugging Face's PEFT says: which layers are adapted, with which rank and scale."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]

# (types, what it should be) of the settings that are read; those without a default must be there.
_TYPES = {
    "r": (int, "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "rank_pattern": (dict, "an object from names to ranks"),
    "alpha_pattern": (dict, "an object from names to numbers"),
    "use_rslora": (bool, "true or false"),
    "target_modules": ((str, list), "a list of names or a regular expression"),
    "exclude_modules": ((str, list), "a list of names or a regular expression"),
    "layers_to_transform": ((int, list), "a number or a list of numbers"),
    "modules_to_save": (list, "a list of names"),
    "feedforward_modules": ((str, list), "a list of names or a regular expression"),
    "use_dora": (bool, "true or false"),
    "bias": (str, "none, all or lora_only"),
}
_DEFAULTS = {
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "exclude_modules": [],
    "layers_to_transform": None,
    "modules_to_save": [],
    "feedforward_modules": [],
    "use_dora": False,
    "bias": "none",
}
# These change nothing in a trained module of linear layers, whatever their value.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "init_ia3_weights", "layers_pattern", "loftq_config", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Starts that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def read(path: Path) -> dict[str, Any]:
    """The settings in the file `path`, defaults filled in; ValueError for what can't be read or isn't supported.

    A setting that isn't known here, such as a later PEFT may write, is refused unless it is off.
    """
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): it is damaged, or another file") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object: it is another file")
    kind = config.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise ValueError(
            f"{path} is of the type {kind!r}: only LORA and IA3 can be read. For another one merge "
            "with PEFT (merge_and_unload), save that model and subtract the base's weights: a full delta"
        )
    needed = ["target_modules"] + (["r", "lora_alpha"] if kind == "LORA" else [])
    if missing := [key for key in needed if config.get(key) is None]:
        raise ValueError(f"{path} doesn't say {', '.join(missing)}: it is damaged, or was made by hand")
    settings = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
    problems = [
        f"{key} is {settings[key]!r} and should be {what}"
        for key, (types, what) in _TYPES.items()
        if settings.get(key) is not None and not isinstance(settings[key], types)
    ]
    if not problems:
        ranks = [settings.get("r", 1), *settings["rank_pattern"].values()]
        scales = [settings.get("lora_alpha", 1), *settings["alpha_pattern"].values()]
        problems += [f"{rank!r} is no rank" for rank in ranks if type(rank) is not int or rank < 1]
        names = settings["modules_to_save"]
        problems += [f"{x!r} in modules_to_save is no name" for x in names if not (x and isinstance(x, str))]
        problems += [f"{x!r} is no scale" for x in scales if type(x) not in (int, float) or not math.isfinite(x)]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    unsupported = [
        f"{key}={value!r}"
        for key, value in settings.items()
        if value and key not in _TYPES.keys() | _HARMLESS | {"init_lora_weights"}
    ]
    if settings["bias"] not in ("none", "all", "lora_only"):
        unsupported.append(f"bias={settings['bias']!r}")
    if (start := settings.get("init_lora_weights", True)) not in _STARTS:
        unsupported.append(f"init_lora_weights={start!r}, which changes the base as well")
    if unsupported:
        raise ValueError(
            f"{path} uses what isn't supported: {'; '.join(unsupported)}. Supported are LoRA with a rank and a scale "
            "for each layer (rsLoRA's too), DoRA, (IA)³, trained biases and whole modules: train without these, or "
            "merge with PEFT and take the full delta"
        )
    return settings


def _listed(names: str | list[str], layer: str) -> bool:
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def saved(config: Config, module: str) -> bool:
    """Whether PEFT trains and saves the module of this name as a whole, by itself or within a larger one."""
    parts = module.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(name.endswith(ending) for name in around for ending in config["modules_to_save"])


def scales_inputs(config: Config, layer: str) -> bool:
    """Whether (IA)³ scales the inputs of this layer, and not its outputs."""
    return bool(config["feedforward_modules"]) and _listed(config["feedforward_modules"], layer)


def targeted(config: Config, layer: str, block: int | None) -> bool:
    """Whether PEFT adapts the layer of this name, which is in the block of this number."""
    if saved(config, layer):
        return False
    chosen = config["layers_to_transform"]
    within = chosen in (None, []) or block in (chosen if isinstance(chosen, list) else [chosen])
    excluded = config["exclude_modules"] and _listed(config["exclude_modules"], layer)
    return within and not excluded and _listed(config["target_modules"], layer)


def rank_and_scale(config: Config, layer: str) -> tuple[int, float]:
    """LoRA's rank in this layer and the factor of its product: `alpha / r`, or `alpha / √r` with rsLoRA."""

    def value(default: str, patterns: str):
        rules = config[patterns].items()
        return next((x for key, x in rules if re.match(rf"(.*\.)?({key})$", layer)), config[default])

    rank, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    return rank, alpha / (rank**0.5 if config["use_rslora"] else rank)
