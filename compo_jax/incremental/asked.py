"""What a stream was asked to be learned with, kept beside its checkpoints, which go on with nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compo_jax.incremental.modes import Method
from compo_jax.incremental.settings import Setup
from compo_jax.train import asked


def require_same(folder: Path, setup: Setup, fingerprint: str, methods: Sequence[Method]) -> None:
    """Keeps what is asked for in the folder; ValueError, with all differences, where it has checkpoints of something
    else. `fingerprint` is the base's."""
    said = _described(setup, fingerprint, methods)
    asked.require_same(folder / "checkpoints", said, folder, since="images of ")


def _described(setup: Setup, fingerprint: str, methods: Sequence[Method]) -> dict[str, Any]:
    """Everything that results depend on, by its name; of the images some stand for all."""
    stream = setup.stream
    said = {
        **asked.fields("model", setup.model),
        "base": fingerprint,
        "seed": setup.seed,
        **{f"settings.{name}": value for name, value in setup.settings._asdict().items()},
        "stream": stream.name,
        **{f"stream.{name}": getattr(stream, name) for name in ("size", "mean", "std", "augment")},
        "methods": [method.name for method in methods],
    }
    for t, task in enumerate(stream.tasks):
        said[f"task {t}"] = [task.name, len(task.classes), *map(asked.label_digest, (task.train, task.test))]
        said[f"images of task {t}"] = [*map(asked.image_digest, (task.train, task.test))]
    for method in methods:
        form = {} if method.adapter is None else {"adapter": [method.adapter.name, dict(method.adapter.settings)]}
        said |= {f"{method.name}.{option}": value for option, value in (method._asdict() | form).items()}
    return said
