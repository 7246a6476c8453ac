"""How well a stream is classified: a head put together from the tasks' heads, and the accuracy on each task."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int

from compo_jax.data import JoinedSplit, Split, TaskStream
from compo_jax.incremental.classifier import Head
from compo_jax.incremental.extraction import Extract
from compo_jax.tree import Tree


class Accuracies(NamedTuple):
    """Test accuracy on each task, in [0, 1].

    Attributes:
      incremental: the prediction is among the classes of all tasks so far (class-incremental).
      within: the prediction is among the task's own classes (task-incremental).
    """

    incremental: Float[np.ndarray, " tasks"]
    within: Float[np.ndarray, " tasks"]


@runtime_checkable
class Classifier(Protocol):
    """The logits of a split's images over all classes so far, in the stream's order."""

    def __call__(self, split: Split) -> Float[np.ndarray, "images classes"]: ...


@runtime_checkable
class Evaluator(Protocol):
    """The accuracy of parameters under a head on the test images of the stream's first `tasks` tasks."""

    def __call__(self, params: Tree, head: Head, tasks: int) -> Accuracies: ...


def stream_head(trained: Sequence[Head], started: Sequence[Head], reference: Head) -> Head:
    """The head over the tasks' classes: what training changed in each, added to the newest aligned reference.

    A task's head starts at the reference as it was aligned at that time, without the classes that came later. Its
    change is a task vector like the weights' own, and is composed like one: `h_ref(now) + (h_s - h_ref(s))`. (Ours; the
    paper concatenates the `h_s`, which leaves the heads of different times uncalibrated to one another.)
    """
    changes = [jax.tree.map(np.subtract, h, h0) for h, h0 in zip(trained, started, strict=True)]
    change = jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *changes)
    return jax.tree.map(lambda c, r: np.asarray(r)[..., : c.shape[-1]] + c, change, reference)


def linear(features: Callable[[Split], Float[np.ndarray, "images features"]], head: Head) -> Classifier:
    """A split's features under a linear head."""
    return lambda split: features(split) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])


def accuracies(classify: Classifier, stream: TaskStream, tasks: int) -> Accuracies:
    """On the test images of the stream's first `tasks` tasks."""
    incremental, within = [], []
    tests = JoinedSplit([task.test for task in stream.tasks[:tasks]], stream.offsets[:tasks])
    parts = np.split(classify(tests), tests.starts[1:-1])  # at once: one last batch is filled up, not many
    for task, first, logits in zip(stream.tasks, stream.offsets, parts, strict=False):
        among_all, among_its = predictions(logits, first, len(task.classes))
        incremental.append(np.mean(among_all == task.test.labels + first))
        within.append(np.mean(among_its == task.test.labels))
    return Accuracies(np.array(incremental), np.array(within))


def evaluator(extract: Extract, stream: TaskStream) -> Evaluator:
    """An evaluator on the features of `extract`: see `features`."""
    return lambda params, head, tasks: accuracies(linear(partial(extract, params), head), stream, tasks)


def predictions(
    logits: Float[np.ndarray, "images classes"], first: int, count: int
) -> tuple[Int[np.ndarray, " images"], Int[np.ndarray, " images"]]:
    """The class of each image among all, and among the `count` from `first` on, counted from there."""
    return logits.argmax(axis=1), logits[:, first : first + count].argmax(axis=1)
