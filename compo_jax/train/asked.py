"""What a training was asked for, kept beside its checkpoints, which go on with nothing else."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compo_jax import mesh
from compo_jax.data import Split
from compo_jax.files import writable_path
from compo_jax.train.run import differences, read_json, write_json

_FILE = "asked.json"
_IMAGES = 4  # of a split, by which it is known
_HOW = ("kernel", "unroll", "parent", "name", "eval_batch", "features_batch")  # which change no result


def require_same(folder: Path, asked: Mapping[str, Any], where: Path | None = None, since: str | None = None) -> None:
    """Keeps what is asked for in the folder of checkpoints; ValueError, with all differences, where these are of
    something else.

    Args:
      asked: everything that results depend on, by its name.
      where: what the error calls the folder; default `folder`.
      since: what begins so was not kept in the beginning, and is compared only where it was.
    """
    path, where = folder / _FILE, where or folder
    asked = {name: _text(value) for name, value in asked.items() if name.rpartition(".")[2] not in _HOW}
    if mesh.agreed(path.exists() and any(entry.name != _FILE for entry in path.parent.iterdir())):
        kept = read_json(path, f"remove {path.parent} to start over")
        asked = {name: x for name, x in asked.items() if name in kept or not (since and name.startswith(since))}
        if told := differences(kept, asked, str):
            raise ValueError(
                f"{where} has what was learned with other settings ({told}): learn in another folder, or remove it "
                "to start over"
            )
        return
    writable_path(where)
    if mesh.is_writer():
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asked)


def fields(prefix: str, model: Any) -> dict[str, Any]:
    """The fields of a Flax module, named `prefix.field`."""
    return {f"{prefix}.{name}": getattr(model, name) for name in getattr(model, "__dataclass_fields__", ())}


def label_digest(split: Split) -> str:
    """A digest of all labels."""
    return hashlib.sha256(np.asarray(split.labels, np.int64).tobytes()).hexdigest()[:12]


def image_digest(split: Split) -> str:
    """A digest of some images, from the first to the last."""
    some = np.unique(np.linspace(0, len(split) - 1, min(_IMAGES, len(split))).astype(int))
    return hashlib.sha256(np.ascontiguousarray(split.images(some)).tobytes()).hexdigest()[:12]


def _text(value: Any) -> str:
    """Without the addresses of functions, which are others in each process."""
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", str(value))
