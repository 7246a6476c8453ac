"""What a run reached, as types that are written to JSON and read back: `train.write_result`, `train.read_result`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from compo_jax.incremental.metrics import average_accuracy, final_accuracy, final_forgetting, last_accuracy


class Outcome(NamedTuple):
    """What one method reached, in [0, 1]; nan in the matrix, and None, for what is not known.

    Attributes:
      final_accuracy: mean over the tasks so far after the last of them, the prediction among all classes.
      final_forgetting: see `metrics.final_forgetting`; None for a method that learns all tasks at the end.
      task_incremental_accuracy: as `final_accuracy`, the prediction among the task's own classes.
      accuracy_matrix: `[t, s]`, after task t on task s.
      seconds: of training; None where nothing is trained.
      last_accuracy: after the last task so far over all test images, A_last; see `metrics`.
      average_accuracy: the mean of that over the tasks' steps, Ā; None where something was tested at the end alone.
    """

    final_accuracy: float | None
    final_forgetting: float | None
    task_incremental_accuracy: float | None
    accuracy_matrix: Float[np.ndarray, "tasks tasks"]
    seconds: float | None
    last_accuracy: float | None = None
    average_accuracy: float | None = None


class Skill(NamedTuple):
    """A task, the accuracy on it and the mean of those on the others, with some of the modules."""

    task: str
    target: float
    control: float | None


class Results(NamedTuple):
    """What a run of the main job reached.

    Attributes:
      name: of the run.
      data, backbone: what was learned and from where, in words.
      seed: of the run.
      settings: how it was trained: each option's name and its value in words.
      tasks, classes, tested: their names in order, how many classes each has, and how many test images.
      methods: the outcome of each, the main one first.
      frozen: of the base's features under the aligned reference head, as that was after each task.
      specialise, unlearn: for each task, the main method's pool with its module alone, and with all but it; empty where
        modules can't be left out.
      images_per_second: of the main method's training; None where it was not measured.
      seconds: that the run took, those before an interruption too.
      published: the final accuracy of methods in a publication, by their names, where the run is of its benchmark.
    """

    name: str
    data: str
    backbone: str
    seed: int
    settings: dict[str, str]
    tasks: list[str]
    classes: list[int]
    tested: list[int]
    methods: dict[str, Outcome]
    frozen: Outcome
    specialise: list[Skill]
    unlearn: list[Skill]
    images_per_second: float | None
    seconds: float
    published: dict[str, float] = {}

    @property
    def method(self) -> str:
        """The main one."""
        return next(iter(self.methods))


def outcome(
    rows: Float[np.ndarray, "tasks tasks 2"], task: int, seconds: float | None, tested: Sequence[int]
) -> Outcome:
    """Of the accuracies `[t, s]` among all classes and within the task, up to this task; nan where there is none.

    Args:
      tested: test images of each task.
    """
    so_far, within = rows[: task + 1, : task + 1, 0], rows[task, : task + 1, 1]
    if np.isnan(so_far[-1]).any():
        return Outcome(None, None, None, rows[..., 0], seconds)
    forgetting = None if task and np.isnan(so_far[:-1]).all() else final_forgetting(so_far)
    average = None if np.isnan(np.diagonal(so_far)).any() else average_accuracy(so_far, tested[: task + 1])
    final, last = final_accuracy(so_far), last_accuracy(so_far, tested[: task + 1])
    return Outcome(final, forgetting, float(within.mean()), rows[..., 0], seconds, last, average)
