"""Several methods at work on one stream: how each learns a task, keeps it and is tested on it."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.progress import Progress

from compo_jax.incremental.classifier import task_columns
from compo_jax.incremental.evaluate import accuracies
from compo_jax.incremental.extraction import Extract, SplitFeatures
from compo_jax.incremental.learner import Learned, TrainTask, task_trainer
from compo_jax.incremental.modes import Lesson, Memory, Method, Mode, Snapshot, each_task
from compo_jax.incremental.parallel import parallel_trainer
from compo_jax.incremental.reference import Reference
from compo_jax.incremental.settings import Setup
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints, Log


class Learner(NamedTuple):
    """A method at work: its mode, its pool, and what trains a task; None where it trains nothing."""

    method: Method
    mode: Mode
    pool: ModulePool
    train: TrainTask | None


class State(NamedTuple):
    """What is kept between two tasks; the frozen features are the last method.

    Attributes:
      rows: `[method, t, s]`, accuracy after task t on task s, among all classes and within the task; nan where unknown.
      seconds: of each method's training.
      position: of the log.
      elapsed: seconds since the run began, without what a start that was killed did after it last kept something.
    """

    reference: Reference
    memories: dict[str, Memory]
    rows: Float[np.ndarray, "methods tasks tasks 2"]
    seconds: Float[np.ndarray, " methods"]
    position: np.ndarray
    elapsed: np.ndarray


class Course(NamedTuple):
    """What stays the same from task to task."""

    setup: Setup
    base: str  # its fingerprint
    learners: dict[str, Learner]
    extract: Extract
    base_features: SplitFeatures
    folder: Path
    log: Log | None
    progress: Progress | None
    extra: Mapping[str, Any]
    began: float

    def snapshot(self, name: str, task: int, state: State) -> Snapshot | None:
        """None where the method can't be tested yet."""
        mode = self.learners[name].mode
        composition = mode.compose(module_names(self.setup), task)
        if composition is None:
            return None
        return Snapshot(
            self.setup, task, state.reference, self.learners[name].pool, composition, state.memories[name],
            mode.extract or self.extract, self.base_features,
        )  # fmt: skip

    def start(self, reference: Reference) -> State:
        """The state before the first task."""
        methods, tasks = len(self.learners), len(self.setup.stream.tasks)
        memories = {name: learner.mode.memory for name, learner in self.learners.items()}
        rows = np.full((methods, tasks, tasks, 2), np.nan)
        return State(reference, memories, rows, np.zeros(methods), np.zeros((), np.int64), np.zeros(()))

    def fit_options(self, name: str, task: str, number: int | str) -> dict[str, Any]:
        return {
            "log": self.log,
            "progress": self.progress,
            "record": {"run": name, "task": task},
            "checkpoints": Checkpoints(self.folder / "checkpoints" / f"{name}-{number}"),
        }

    def train_at_once(self, references: Sequence[Reference]) -> tuple[dict[str, list[Learned]], dict[str, float]]:
        """(what each method whose tasks need nothing of each other learned of them, seconds)."""
        learned, seconds, stream = {}, {}, self.setup.stream
        for name, learner in self.learners.items():
            if learner.train is None or not learner.mode.at_once:
                continue
            train, clock = parallel_trainer(self.setup, learner.method), time.perf_counter()
            options = self.fit_options(name, "all", "all")
            learned[name] = train(stream.tasks, stream.offsets, references, **options)
            seconds[name] = time.perf_counter() - clock
        return learned, seconds

    def train(self, name: str, lesson: Lesson, task: int, state: State) -> Learned:
        options = self.fit_options(name, lesson.task.name, task)
        return self.learners[name].train(lesson.task, lesson.first, state.reference, state.memories[name], **options)

    def store(self, name: str, lesson: Lesson, learned: Learned, task: int, reference: Reference) -> None:
        """Puts what was learned into the method's pool, with the base's curvature on the task."""
        learner, classes = self.learners[name], len(lesson.task.classes)
        curvature = reference.newest if lesson.task is self.setup.stream.tasks[task] else {}
        learner.pool.add(
            lesson.module, learned.module, base=self.base, adapter=learner.method.adapter,
            task=lesson.task.name, classes=lesson.task.classes, seed=self.setup.seed, extra=dict(self.extra),
            overwrite=True, head=learned.head, start=task_columns(reference.head, lesson.first, classes, classes),
            curvature=curvature.get("diagonal"),
        )  # fmt: skip
        for kind in curvature.keys() - {"diagonal"}:
            learner.pool.attach(lesson.module, curvature=curvature[kind])

    def advance(self, task: int, state: State, at_once: Mapping[str, Sequence[Learned]]) -> dict[str, Learned]:
        """Each method learns what it learns when this task has come, and is tested; the state gets what that gives."""
        learned = {}
        for i, (name, learner) in enumerate(self.learners.items()):
            lesson = None if learner.train is None else learner.mode.lesson(self.setup.stream, task)
            if lesson is not None:
                clock = time.perf_counter()
                learned[name] = at_once[name][task] if name in at_once else self.train(name, lesson, task, state)
                state.seconds[i] += time.perf_counter() - clock
                state.memories[name] = learned[name].memory
                self.store(name, lesson, learned[name], task, state.reference)
            if (snapshot := self.snapshot(name, task, state)) is not None:
                reached = accuracies(learner.mode.classify(snapshot), self.setup.stream, task + 1)
                state.rows[i, task, : task + 1] = np.stack(reached, axis=-1)
        return learned


def pool_folder(folder: Path, methods: Sequence[str], name: str) -> Path:
    """Where the run in `folder`, of these methods, keeps the modules of the method `name`."""
    return folder / ("pool" if name == methods[0] else f"pools/{name}")


def module_names(setup: Setup) -> list[str]:
    """Under which each task's module is in the pools, in the tasks' order."""
    return [each_task(setup.stream, t).module for t in range(len(setup.stream.tasks))]


def at_work(setup: Setup, method: Method, pool: Path, runner) -> Learner:
    """The method with its pool in this folder, ready to learn."""
    if (mode := method.mode(setup, method)).begin is None:
        return Learner(method, mode, ModulePool(pool), None)
    mode, train = task_trainer(setup, method, runner=runner)
    return Learner(method, mode, ModulePool(pool), train)
