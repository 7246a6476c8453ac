"""Safetensors files to merge."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from cases import normal
from safetensors.numpy import save_file


def base_and_models(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict, list[dict]]:
    """A base and three models around it, as arrays; base.safetensors, a.safetensors, ... are in the folder."""
    base = {name: normal(i, *shape).astype(np.float32) for i, (name, shape) in enumerate(shapes.items())}
    models = [
        {name: x + normal((t, i), *x.shape).astype(np.float32) / 8 for i, (name, x) in enumerate(base.items())}
        for t in range(3)
    ]
    for name, arrays in zip(("base", "a", "b", "c"), [base, *models], strict=True):
        save_file(arrays, folder / f"{name}.safetensors", {"format": "pt"})
    return base, models
