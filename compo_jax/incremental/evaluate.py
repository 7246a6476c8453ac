"""What a model knows of a stream: its head put together from the tasks' heads, and its accuracy on each task."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from compo_jax.data import JoinedSplit, Split, TaskStream
from compo_jax.incremental.classifier import Head
from compo_jax.tree import Tree


class Accuracies(NamedTuple):
    """Test accuracy on each task, in [0, 1].

    Attributes:
      incremental: the prediction is among the classes of all tasks given (class-incremental).
      within: the prediction is among the task's own classes (task-incremental).
    """

    incremental: Float[np.ndarray, " tasks"]
    within: Float[np.ndarray, " tasks"]


def stream_head(trained: Sequence[Head], started: Sequence[Head], reference: Head) -> Head:
    """The head over the tasks' classes: what training changed in each, added to the newest aligned reference.

    A task's head starts at the reference as it was aligned at that time, without the classes that came later. Its
    change is a task vector like the weights' own, and is composed like one: `h_ref(now) + (h_s - h_ref(s))`. (Ours; the
    paper concatenates the `h_s`, which leaves the heads of different times uncalibrated to one another.)
    """
    changes = [jax.tree.map(np.subtract, h, h0) for h, h0 in zip(trained, started, strict=True)]
    change = jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *changes)
    return jax.tree.map(lambda c, r: np.asarray(r)[..., : c.shape[-1]] + c, change, reference)


def evaluator(
    extract: Callable[[Tree, Split], np.ndarray], stream: TaskStream
) -> Callable[[Tree, Head, int], Accuracies]:
    """`(params, head, tasks) -> Accuracies` on the first `tasks` tasks' test images; `extract`: see `features`."""

    def run(params, head, tasks):
        incremental, within = [], []
        tests = JoinedSplit([task.test for task in stream.tasks[:tasks]], stream.offsets[:tasks])
        parts = np.split(extract(params, tests), tests.starts[1:-1])  # at once: one last batch is filled up, not many
        for task, first, z in zip(stream.tasks, stream.offsets, parts, strict=False):
            predicted, own = predictions(z, head, first, len(task.classes))
            incremental.append(np.mean(predicted == task.test.labels + first))
            within.append(np.mean(own == task.test.labels))
        return Accuracies(np.array(incremental), np.array(within))

    return run


def predictions(z: Float[np.ndarray, "images features"], head: Head, first: int, count: int):
    """The class of each feature vector among all of the head's, and among the `count` classes from `first` on."""
    logits = z @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    return logits.argmax(axis=1), logits[:, first : first + count].argmax(axis=1)
