"""The two files of a PEFT folder, in and out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compo_jax.adapters.peft import settings
from compo_jax.files import replaced, safetensors_file

CONFIG, WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The settings and the arrays of a folder, these under the names of the model's own parameters: PEFT's wrappers
    around layers are left out of the names, and so are its copies of the base's arrays."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"there is no {CONFIG} in {folder}: a PEFT folder has one; check the path")
    config = settings.read(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise ValueError(
            f"{folder / _PICKLE} is a PyTorch pickle, which isn't read as it can run code: load the folder with PEFT "
            "and save it again with safe_serialization=True, or in PyTorch alone safetensors.torch.save_file("
            f'torch.load("{_PICKLE}", weights_only=True), "{WEIGHTS}")'
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no {WEIGHTS} in {folder}: download the whole folder")
    with safetensors_file(path) as file:
        names = [name for name in file.offset_keys() if ".original_module." not in name]
        return config, {_unwrapped(name): file.get_tensor(name) for name in names}


def _unwrapped(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def write(folder: Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes both files, or neither; FileExistsError where there is something at `folder`."""
    import safetensors.numpy

    if folder.exists():
        raise FileExistsError(f"there is something at {folder}: remove it, or choose another folder")
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        with replaced(folder) as aside:
            aside.mkdir(parents=True)
            safetensors.numpy.save_file(arrays, aside / WEIGHTS, {"format": "pt"})
            (aside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    except safetensors.SafetensorError as error:
        raise OSError(f"{folder} is not written ({error}): look at the space left on its disk") from error
