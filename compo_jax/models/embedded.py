"""The small ViT that ships with the package, pre-trained on Latin letters by experiments/pretrain.py."""

import json
from pathlib import Path
from typing import Any

from compo_jax.models.pretrained import load
from compo_jax.models.vit import ViT

_FILE = Path(__file__).with_name("embedded.safetensors")


def embedded() -> tuple[ViT, Any, dict[str, Any]]:
    """(model, params, how it was made): 32x32 images with values in [-1, 1], a head over 338 characters."""
    return *load(_FILE), json.loads(_FILE.with_suffix(".json").read_text())
