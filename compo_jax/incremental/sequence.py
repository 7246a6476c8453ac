"""A stream of tasks, learned by several methods side by side: after each task, what they know."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.progress import Progress

from compo_jax import adapters, tree
from compo_jax.data import JoinedSplit, Split
from compo_jax.incremental.classifier import task_columns
from compo_jax.incremental.evaluate import Classifier, accuracies, evaluator
from compo_jax.incremental.extraction import Extract, features
from compo_jax.incremental.frozen import frozen_features
from compo_jax.incremental.learner import Learned, TrainTask, task_trainer
from compo_jax.incremental.modes import Lesson, Memory, Method, Mode, Snapshot, each_task
from compo_jax.incremental.outcomes import Outcome, Results, Skill, outcome
from compo_jax.incremental.parallel import parallel_trainer
from compo_jax.incremental.reference import Reference, reference_stage
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.unlearning import skills
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints, Log, jit_runner

_FROZEN = Method("frozen features", frozen_features)


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


class After(NamedTuple):
    """What is known after a task.

    Attributes:
      task: its number.
      restored: whether an earlier call, which was killed, had learned it.
      outcomes: of each method, by its name, in the methods' order.
      frozen: that of the base's features under the reference head.
      reference: of the base.
      learned: what each method learned from this task; nothing where it is restored.
      learners, snapshots: each method at work, and what it classifies with.
      began: the run's start by `time.perf_counter()`, put back by what earlier starts of it took.
    """

    setup: Setup
    task: int
    restored: bool
    outcomes: dict[str, Outcome]
    frozen: Outcome
    reference: Reference
    learned: dict[str, Learned]
    learners: dict[str, Learner]
    snapshots: dict[str, Snapshot]
    began: float

    def classifier(self, name: str) -> Classifier:
        """That of a method, made when it is asked for."""
        return self.learners[name].mode.classify(self.snapshots[name])


class _Course(NamedTuple):
    """What stays the same from task to task."""

    setup: Setup
    base: str  # its fingerprint
    learners: dict[str, Learner]
    extract: Extract
    base_features: Any
    folder: Path
    log: Log | None
    progress: Progress | None
    extra: Mapping[str, Any]
    began: float

    def snapshot(self, name: str, task: int, state: State) -> Snapshot | None:
        """None where the method can't be tested yet."""
        mode = self.learners[name].mode
        composition = mode.compose(_modules(self.setup), task)
        if composition is None:
            return None
        return Snapshot(
            self.setup, task, state.reference, self.learners[name].pool, composition, state.memories[name],
            mode.extract or self.extract, self.base_features,
        )  # fmt: skip

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

    def after(self, task: int, state: State, learned: dict[str, Learned], restored: bool = False) -> After:
        outcomes = {
            name: outcome(rows, task, None if learner.train is None else float(seconds))
            for (name, learner), rows, seconds in zip(
                self.learners.items(), state.rows.copy(), state.seconds, strict=True
            )
        }
        snapshots = {name: self.snapshot(name, task, state) for name in self.learners}
        frozen = outcomes.pop(_FROZEN.name)
        return After(
            self.setup, task, restored, outcomes, frozen, state.reference, learned, self.learners, snapshots, self.began
        )  # fmt: skip


def learn_stream(
    setup: Setup,
    methods: Sequence[Method],
    folder: Path,
    *,
    runner=jit_runner,
    parallel: bool = False,
    log: Log | None = None,
    progress: Progress | None = None,
    extra: Mapping[str, Any] | None = None,
    began: float | None = None,
) -> Iterator[After]:
    """Learns the tasks one after another by every method, and tests all after each.

    A call that was killed goes on where it was, with what is in the folder: it yields what was known after the last
    task that was finished, and then learns the next.

    Args:
      methods: the main one first.
      folder: of `pool` (the main method's), of `pools/NAME`, and of `checkpoints`, which can go after the last task.
      runner: `jit_runner` or `pmap_runner`.
      parallel: train the tasks of a method in one loop where they need nothing of each other, before all others.
      log, progress: see `train.fit`.
      extra: kept with every module.
      began: the run's start by `time.perf_counter()`; default: now.

    ValueError where two methods have one name, and as of `train.fit`.
    """
    names, stream = [method.name for method in methods] + [_FROZEN.name], setup.stream
    if len(set(names)) < len(names):
        raise ValueError(f"two methods have one name: {', '.join(names)}")
    extract = features(setup.model, stream, setup.settings.features_batch)
    learners = {m.name: _learner(setup, m, pool_folder(folder, names, m.name), runner) for m in [*methods, _FROZEN]}
    base_features = _remembered(partial(extract, setup.base))
    fingerprint = tree.fingerprint(setup.base)
    began = time.perf_counter() if began is None else began
    course = _Course(setup, fingerprint, learners, extract, base_features, folder, log, progress, extra or {}, began)
    kinds = ["diagonal", *sorted({method.curvature for method in methods} - {"diagonal"})]
    begun, refer = reference_stage(setup, [pattern for pattern, _ in adapters.VIT_TARGETS], kinds, extract)
    state, first = _state(course, begun), 0
    checkpoints = Checkpoints(folder / "checkpoints" / "learned")
    if checkpoints.latest is not None:
        first, state = checkpoints.latest, State(**checkpoints.load(state._asdict()))
        state = state._replace(rows=np.array(state.rows), seconds=np.array(state.seconds))
        _set(log, state)
        course = course._replace(began=began - float(state.elapsed))
        yield course.after(first - 1, state, {}, restored=True)

    references, at_once = None, {}
    if parallel and first < len(stream.tasks):
        references = list(itertools.accumulate(range(len(stream.tasks)), refer, initial=begun))[1:]
        at_once, spent = course.train_at_once(references)
        for name, seconds in spent.items():
            state.seconds[names.index(name)] += seconds
        if first:  # what was written since
            _set(log, state)
    for t in range(first, len(stream.tasks)):
        state = state._replace(reference=references[t] if references else refer(state.reference, t))
        learned = course.advance(t, state, at_once)
        state = state._replace(
            position=np.array(0 if log is None else log.position, np.int64),
            elapsed=np.array(time.perf_counter() - course.began),
        )
        checkpoints.save(t + 1, state._asdict())
        yield course.after(t, state, learned)


def pool_folder(folder: Path, methods: Sequence[str], name: str) -> Path:
    """Where the run in `folder`, of these methods, keeps the modules of the method `name`."""
    return folder / ("pool" if name == methods[0] else f"pools/{name}")


def _set(log: Log | None, state: State) -> None:
    """What was written since is written again."""
    if log is not None:
        log.position = int(state.position)


def _modules(setup: Setup) -> list[str]:
    return [each_task(setup.stream, t).module for t in range(len(setup.stream.tasks))]


def _learner(setup: Setup, method: Method, pool: Path, runner) -> Learner:
    if (mode := method.mode(setup, method)).begin is None:
        return Learner(method, mode, ModulePool(pool), None)
    mode, train = task_trainer(setup, method, runner=runner)
    return Learner(method, mode, ModulePool(pool), train)


def _state(course: _Course, begun: Reference) -> State:
    """Before the first task."""
    methods, tasks = len(course.learners), len(course.setup.stream.tasks)
    memories = {name: learner.mode.memory for name, learner in course.learners.items()}
    rows = np.full((methods, tasks, tasks, 2), np.nan)
    return State(begun, memories, rows, np.zeros(methods), np.zeros((), np.int64), np.zeros(()))


def _remembered(extract):
    """The same function of a split, which makes the features of each part of a joined split once."""
    made: dict[int, tuple[Split, np.ndarray]] = {}

    def run(split):
        if isinstance(split, JoinedSplit):
            return np.concatenate([run(part) for part in split.splits])
        if id(split) not in made:
            made[id(split)] = split, extract(split)  # the split is kept, so that no other gets its number
        return made[id(split)][1]

    return run


def summary(after: After, *, name: str, backbone: str, images_per_second: float | None = None) -> Results:
    """The results of a run after its last task, with what the main method's pool knows when modules are left out.

    Args:
      name, backbone, images_per_second: see `Results`.
    """
    setup, main = after.setup, next(iter(after.outcomes))
    stream, snapshot, tasks = setup.stream, after.snapshots[main], [task.name for task in setup.stream.tasks]
    if after.task != len(tasks) - 1:
        raise ValueError(f"{after.task + 1} of {len(tasks)} tasks are learned: take what the last task left")

    def of(weighting: str) -> list[Skill]:
        if len(tasks) < 2 or snapshot.composition.modules != _modules(setup):  # one module knows all tasks
            return []
        test = evaluator(snapshot.extract, stream)
        reached = skills(weighting, snapshot.pool, setup.base, after.reference.head, test)
        return [
            Skill(task, float(row[t]), float(np.delete(row, t).mean()))
            for t, (task, row) in enumerate(zip(tasks, reached, strict=True))
        ]

    return Results(
        name=name,
        data=stream.name,
        backbone=backbone,
        seed=setup.seed,
        settings={"trained for": f"{setup.settings.epochs} epochs in batches of {setup.settings.batch}"},
        tasks=tasks,
        classes=[len(task.classes) for task in stream.tasks],
        tested=[len(task.test) for task in stream.tasks],
        methods=after.outcomes,
        frozen=after.frozen,
        specialise=of("specialise"),
        unlearn=of("unlearn"),
        images_per_second=images_per_second,
        seconds=time.perf_counter() - after.began,
    )
