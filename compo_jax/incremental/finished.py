"""A run of the main job, opened again: the model, the stream of tasks and the pools that it left."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compo_jax import data, models
from compo_jax.data import TaskStream
from compo_jax.files import local_path
from compo_jax.incremental.classifier import Head
from compo_jax.pool import ModulePool

Tree = Any
_COMPOSED = ("ita", "tak", "pull", "none", "iel", "iel_pull", "iel_none")  # ways that average modules in weight space


class FinishedRun(NamedTuple):
    """What a run's folder and its settings give back.

    Attributes:
      folder, config: where it is, and the settings that it was made with.
      model, base: the backbone without its head, and its parameters.
      backbone: what it is, in words.
      stream: the tasks, with the very images.
      pools: of each method that composes a module a task (`ita-lora`, `iel-full`, ...), by its name.
      head: the reference head over all classes, aligned after the last task.
    """

    folder: Path
    config: dict[str, Any]
    model: models.ViT
    base: Tree
    backbone: str
    stream: TaskStream
    pools: dict[str, ModulePool]
    head: Head


def open_finished(folder: str | Path, data_dir: str | Path | None = None) -> FinishedRun:
    """Opens the folder of a finished run of experiments/incremental.py.

    Args:
      data_dir: where the data set is now; default: where it was.

    ValueError where there is no finished run, FileNotFoundError where its data or its backbone are gone.
    """
    folder = local_path(folder)
    if not (folder / "metrics.json").exists():
        raise ValueError(f"{folder} holds no finished run: make one with experiments/incremental.py")
    if not (folder / "reference.npz").exists():
        raise ValueError(f"{folder} was made by another version: it lacks the reference head, reference.npz")
    config = json.loads((folder / "config.json").read_text())
    options = ("tasks", "seed", "by", "train_split", "test_split", "classes", "images")
    if missing := {*options, "data", "data_dir", "backbone", "heads", "image_size", "dtype", "methods"} - set(config):
        raise ValueError(f"{folder} was made by another version, its settings lack {', '.join(sorted(missing))}")
    model, base, described = models.backbone(config["backbone"], config["heads"], config["image_size"], config["dtype"])
    stream = data.open_stream(
        config["data"],
        model.image_size,
        data_dir=config["data_dir"] if data_dir is None else data_dir,
        **{key: config[key] for key in options},
    )
    pools = {
        name: ModulePool(folder / ("pool" if i == 0 else f"pools/{name}"))
        for i, name in enumerate(config["methods"])
        if name.partition("-")[0] in _COMPOSED
    }
    with np.load(folder / "reference.npz") as kept:
        head = dict(kept)
    return FinishedRun(folder, config, model, base, described, stream, pools, head)


def common_methods(runs: Sequence[FinishedRun], chosen: Sequence[str] | None = None) -> list[str]:
    """The methods whose pools all runs have, or the chosen ones; ValueError where there is none, or one lacks."""
    common = [name for name in runs[0].pools if all(name in run.pools for run in runs)]
    if not common:
        told = ", ".join(f"{run.folder.name} ({', '.join(run.config['methods'])})" for run in runs)
        raise ValueError(f"no method that composes modules is common to all runs: {told}")
    if lacking := [name for name in chosen or [] if name not in common]:
        raise ValueError(f"not every run has a pool of {', '.join(lacking)}; those that all have: {', '.join(common)}")
    return list(chosen or common)
