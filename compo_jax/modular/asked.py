"""What a modular network was asked to be trained with, kept beside its checkpoints, which go on with nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compo_jax.data import Split
from compo_jax.files import local_path
from compo_jax.modular.settings import Settings
from compo_jax.train import asked


def require_same(folder: Path, net: Any, settings: Settings, splits: Sequence[Split], seed: int, **more: Any) -> None:
    """ValueError, with all differences, where the folder has checkpoints of another training. Where training starts is
    not compared."""
    said = asked.fields("net", net) | {f"settings.{name}": value for name, value in settings._asdict().items()}
    images = [[asked.label_digest(split), asked.image_digest(split)] for split in splits]
    asked.require_same(local_path(folder), said | {"seed": seed, "images": images} | more)
