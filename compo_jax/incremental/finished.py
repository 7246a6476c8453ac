"""A run of the main job, opened again: the model, the stream of tasks and the pools that it left."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compo_jax import data, models, tree
from compo_jax.data import TaskStream
from compo_jax.files import local_path
from compo_jax.incremental.classifier import Head
from compo_jax.incremental.course import pool_folder
from compo_jax.incremental.extraction import feature_width
from compo_jax.incremental.ways import WAYS
from compo_jax.pool import ModulePool
from compo_jax.train import read_json
from compo_jax.tree import Tree

# Scripts whose runs are no streams, and a setting that only theirs have.
_OTHERS = {
    "vision8.py": "curvature_images", "modular_multitask.py": "harden_steps", "modular_transfer.py": "budgets",
    "modular_adaptation.py": "adapt_steps", "modular_reuse.py": "times",
}  # fmt: skip


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


def _object(path: Path) -> dict[str, Any]:
    """The JSON object that a run wrote to this file."""
    value = read_json(path, "bring it back from a copy, or remove the run's folder and make it again")
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__} and must hold an object: it is not what a run wrote")
    return value


def _refuse_others(folder: Path) -> None:
    """ValueError for a folder that its settings tell to be another script's, finished or not."""
    if not (folder / "config.json").exists():
        if (folder / "metrics.json").exists() and not (folder / "reference.npz").exists():
            raise ValueError(
                f"{folder} is no run of experiments/incremental.py: it has neither config.json nor reference.npz"
            )
        return
    config = _object(folder / "config.json")
    made_by = next((script for script, setting in _OTHERS.items() if setting in config), None)
    if made_by or ("epochs" not in config and not (folder / "reference.npz").exists()):
        of = f" but of {made_by}" if made_by else ""
        raise ValueError(f"{folder} is no run of experiments/incremental.py{of}, as the settings in config.json tell")


def open_finished(folder: str | Path, data_dir: str | Path | None = None) -> FinishedRun:
    """Opens the folder of a finished run of experiments/incremental.py.

    Args:
      data_dir: where the data set is now; default: where it was.

    ValueError where there is no finished run, FileNotFoundError where its data or its backbone are gone.
    """
    folder = local_path(folder)
    _refuse_others(folder)
    if not (folder / "metrics.json").exists():
        raise ValueError(f"{folder} holds no finished run: make one with experiments/incremental.py")
    _object(folder / "metrics.json")
    if not (folder / "reference.npz").exists():
        raise ValueError(f"{folder} was made by another version: it lacks the reference head, reference.npz")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} lacks config.json, the settings of its run: bring it back from a copy")
    config = _object(folder / "config.json")
    options = ("tasks", "seed", "by", "train_split", "test_split", "classes", "images")
    if missing := {*options, "data", "data_dir", "backbone", "heads", "image_size", "dtype", "methods"} - set(config):
        raise ValueError(f"{folder} was made by another version, its settings lack {', '.join(sorted(missing))}")
    rendered = config["data"] == "glyphs"
    if rendered and data_dir is not None:
        raise ValueError(
            f"{folder} is of glyphs, which are rendered: data_dir (--data-dir) plays no part, leave it out"
        )
    backbone = models.backbone(
        *(config[key] for key in ("backbone", "heads", "image_size", "dtype")), activation=config.get("activation")
    )
    model, base = backbone.model, backbone.params
    later = {  # which runs of an earlier day lack
        key: config[key] for key in ("class_order", "test_fraction", "crop", "augment") if key in config
    }
    stream = data.open_stream(
        config["data"],
        model.image_size,
        data_dir=config["data_dir"] if data_dir is None else data_dir,
        **{key: config[key] for key in options},
        **later,
    )
    stream = backbone.normalised(stream)
    pools = {
        name: ModulePool(pool_folder(folder, config["methods"], name))
        for name in config["methods"]
        if (way := WAYS.get(name.partition("-")[0])) and way.averages
    }
    head = _head(folder / "reference.npz", feature_width(model, base, stream), stream)
    return FinishedRun(folder, config, model, base, backbone.description, stream, pools, head)


def _head(path: Path, width: int, stream: TaskStream) -> Head:
    """The head in the file; ValueError where it is damaged or has other classes than the stream."""
    try:
        with np.load(path) as kept:
            head = dict(kept)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}, the run's reference head, is damaged ({error}): bring it back from a copy"
        ) from error
    shapes = {name: x.shape for name, x in head.items()}
    classes = len(stream.classes)
    if shapes != {"kernel": (width, classes), "bias": (classes,)}:
        raise ValueError(
            f"{path} holds {shapes} and the run's backbone has {width} features, its data {classes} classes: the file "
            "or the data are of another run"
        )
    return head


def open_several(folders: Sequence[str | Path], data_dir: str | Path | None = None) -> list[FinishedRun]:
    """`open_finished` of each; ValueError where a run is named twice, or they are of different data or backbones."""
    if len({local_path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError(f"a run is named twice: {', '.join(map(str, folders))}")
    runs = [open_finished(folder, data_dir) for folder in folders]
    if len(sets := {run.stream.name for run in runs}) > 1:
        raise ValueError(
            f"the runs are of different data ({', '.join(sorted(sets))}): give runs that differ in their seed"
        )
    if len({tree.fingerprint(run.base) for run in runs}) > 1:
        raise ValueError("the runs are of different backbones: give runs that differ in their seed")
    return runs


def common_methods(runs: Sequence[FinishedRun], chosen: Sequence[str] | None = None) -> list[str]:
    """The methods whose pools all runs have, or the chosen ones; ValueError where there is none, or one lacks."""
    common = [name for name in runs[0].pools if all(name in run.pools for run in runs)]
    if not common:
        listed = ", ".join(f"{run.folder.name} ({', '.join(run.config['methods'])})" for run in runs)
        raise ValueError(f"no method that composes modules is common to all runs: {listed}")
    if lacking := [name for name in chosen or [] if name not in common]:
        raise ValueError(f"not every run has a pool of {', '.join(lacking)}; those that all have: {', '.join(common)}")
    return list(chosen or common)
