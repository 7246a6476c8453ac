"""What a stream was asked to be learned with, kept beside its checkpoints, which go on with nothing else."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compo_jax import mesh
from compo_jax.data import Split
from compo_jax.files import writable_path
from compo_jax.incremental.modes import Method
from compo_jax.incremental.settings import Setup
from compo_jax.train.run import differences, read_json, write_json

_FILE = "asked.json"
_IMAGES = 4  # of a split, by which it is known
_HOW = ("kernel", "unroll", "parent", "name", "eval_batch", "features_batch")  # which change no result


def require_same(folder: Path, setup: Setup, fingerprint: str, methods: Sequence[Method]) -> None:
    """Keeps what is asked for in the folder; ValueError, with all differences, where it has checkpoints of something
    else. `fingerprint` is the base's."""
    path, asked = folder / "checkpoints" / _FILE, _described(setup, fingerprint, methods)
    if mesh.agreed(path.exists() and any(entry.name != _FILE for entry in path.parent.iterdir())):
        kept = read_json(path, f"remove {path.parent} to start over")
        asked = {name: x for name, x in asked.items() if name in kept or not name.startswith("images of ")}
        if told := differences(kept, asked, str):
            raise ValueError(
                f"{folder} has what was learned with other settings ({told}): learn in another folder, or remove it "
                "to start over"
            )
        return
    writable_path(folder)
    if mesh.is_writer():
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asked)


def _described(setup: Setup, fingerprint: str, methods: Sequence[Method]) -> dict[str, str]:
    """Everything that results depend on, as text by its name; of the images some stand for all."""
    model, stream = setup.model, setup.stream
    said = {
        **{f"model.{name}": getattr(model, name) for name in getattr(model, "__dataclass_fields__", ())},
        "base": fingerprint,
        "seed": setup.seed,
        **{f"settings.{name}": value for name, value in setup.settings._asdict().items()},
        "stream": stream.name,
        **{f"stream.{name}": getattr(stream, name) for name in ("size", "mean", "std", "augment")},
        "methods": [method.name for method in methods],
    }
    for t, task in enumerate(stream.tasks):
        said[f"task {t}"] = [task.name, len(task.classes), *(_digest(x.labels) for x in (task.train, task.test))]
        said[f"images of task {t}"] = [*map(_some_images, (task.train, task.test))]
    for method in methods:
        form = {} if method.adapter is None else {"adapter": [method.adapter.name, dict(method.adapter.settings)]}
        said |= {f"{method.name}.{option}": value for option, value in (method._asdict() | form).items()}
    return {name: _text(value) for name, value in said.items() if name.rpartition(".")[2] not in _HOW}


def _some_images(split: Split) -> str:
    """A digest of some images, from the first to the last."""
    some = np.unique(np.linspace(0, len(split) - 1, min(_IMAGES, len(split))).astype(int))
    return hashlib.sha256(np.ascontiguousarray(split.images(some)).tobytes()).hexdigest()[:12]


def _digest(labels: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(labels, np.int64).tobytes()).hexdigest()[:12]


def _text(value: Any) -> str:
    """Without the addresses of functions, which are others in each process."""
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", str(value))
