"""Heads that CLIP's text tower makes out of the names of a stream's classes."""

import re
from pathlib import Path

import jax
import numpy as np
from job import console

from compo_jax import data, incremental
from compo_jax.models import clip_text, prompts, zero_shot
from compo_jax.models.loading import place
from compo_jax.models.text_tower import require_texts

USUAL = ("a photo of a {}.",)


def templates(task: str) -> tuple[str, ...]:
    """Those of the field for the set that the task's name begins with, whatever its size (`dtd64`); else the usual."""
    start = re.match(r"[a-z]*", task.lower())[0]
    return next((texts for name, texts in prompts.TEMPLATES.items() if re.fullmatch(rf"{start}\d*", name)), USUAL)


def spoken(name: str) -> str:
    """A class as one would write it: `AnnualCrop`, `baseball_diamond` and SUN397's `/b/bow_window/indoor` in words."""
    name = re.sub(r"^/\w/", "", name).replace("/", " ") if name.startswith("/") else name
    return (name if " " in name else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)).replace("_", " ")


def task_ids(task: data.Task, tokenizer: Path, folder: Path | None, context: int) -> np.ndarray:
    """Token ids (classes, templates, tokens) of a task, by the tokenizer, or out of its file in the folder."""
    if folder is None:
        return prompts.token_ids(tokenizer, [spoken(name) for name in task.classes], templates(task.name), context)
    files = [folder / f"{task.name}{end}" for end in (".npz", ".json")]
    ids = prompts.read_token_ids(next((file for file in files if file.exists()), files[0]))
    if len(ids) != len(task.classes):
        raise ValueError(f"{folder} has token ids of {len(ids)} classes for {task.name}, which has {len(task.classes)}")
    return ids


def zero_shot_head(
    checkpoint: Path, stream: data.TaskStream, width: int, activation: str | None = None, folder: Path | None = None
) -> incremental.classifier.Head:
    """The tasks' heads side by side, for features at length 1.

    Args:
      checkpoint: a CLIP with its text tower, and its tokenizer.json in the folder, or beside the file.
      width: of the base's features; ValueError where the tower's have another.
      activation: of the tower's MLPs; default: what the checkpoint says.
      folder: of token ids, see `task_ids`.
    """
    tower, params = clip_text.load(checkpoint, activation=activation)
    if "logit_scale" not in params or (tower.projection or tower.width) != width:
        raise ValueError(
            f"the text tower of {checkpoint} has features of width {tower.projection or tower.width}"
            f"{'' if 'logit_scale' in params else ' and no logit_scale'}, the base's have {width}: texts and images "
            "are compared in the space of one whole CLIP, its projections included"
        )
    beside = place(checkpoint)
    tokenizer = beside if beside.is_dir() else beside.parent
    ids = [task_ids(task, tokenizer, folder, tower.context) for task in stream.tasks]
    embed, heads = jax.jit(lambda params, ids: zero_shot.class_embeddings(tower, params, ids)), []
    for task, texts in zip(stream.tasks, ids, strict=True):
        require_texts(tower, texts)
        heads.append(zero_shot.head(embed(params, texts), params["logit_scale"]))
        first = "" if folder else f", {templates(task.name)[0]!r} the first"
        console.print(f"zero-shot head of {task.name}: {texts.shape[1]} texts a class{first}")
    return jax.tree.map(lambda *parts: np.concatenate(parts, -1).astype(np.float32), *heads)
