"""A stream of tasks by its name."""

from pathlib import Path
from typing import Any

from compo_jax.data import glyphs
from compo_jax.data.sources import tfds_stream
from compo_jax.data.stream import TaskStream, glyph_stream


def open_stream(
    name: str,
    size: int,
    *,
    data_dir: str | Path | None = None,
    tasks: int = 10,
    seed: int = 0,
    classes: int = 16,
    images: int = 100,
    **tfds_options: Any,
) -> TaskStream:
    """The stream called `name`: `glyphs`, scanned characters of one script a task, or a prepared TFDS set.

    Args:
      data_dir: of a TFDS set; ValueError without it.
      classes, images: characters of a script and training images of each (glyphs only).
      tfds_options: see `tfds_stream`.
    """
    if name == "glyphs":
        scripts = list(glyphs.TASKS)[:tasks]
        return glyph_stream(
            scripts, classes=classes, train=images, test=20, size=size, seed=seed, distortion=glyphs.SCAN
        )
    if data_dir is None:
        raise ValueError(f"{name} needs data_dir (--data-dir): the folder where TFDS has prepared the set")
    return tfds_stream(name, data_dir, size=size, tasks=tasks, seed=seed, **tfds_options)
