"""A stream of tasks, learned by several methods side by side: after each task, what they know."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress

from compo_jax import adapters, tree
from compo_jax.incremental.asked import require_same
from compo_jax.incremental.course import Course, Learner, State, at_work, module_names, pool_folder
from compo_jax.incremental.evaluate import Classifier, evaluator
from compo_jax.incremental.extraction import features, made_once
from compo_jax.incremental.frozen import frozen_features
from compo_jax.incremental.learner import Learned
from compo_jax.incremental.modes import Method, Snapshot
from compo_jax.incremental.outcomes import Outcome, Results, Skill, outcome
from compo_jax.incremental.reference import Reference, reference_stage
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.unlearning import skills
from compo_jax.train import Checkpoints, Log, jit_runner

_FROZEN = Method("frozen features", frozen_features)


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

    ValueError where two methods have one name, where the folder has what was learned with another base, stream, seed,
    settings or method, and as of `train.fit`.
    """
    names, stream = [method.name for method in methods] + [_FROZEN.name], setup.stream
    if len(set(names)) < len(names):
        raise ValueError(f"two methods have one name: {', '.join(names)}")
    extract = features(setup.model, stream, setup.settings.features_batch)
    learners = {m.name: at_work(setup, m, pool_folder(folder, names, m.name), runner) for m in [*methods, _FROZEN]}
    base_features = made_once(partial(extract, setup.base))
    fingerprint = tree.fingerprint(setup.base)
    require_same(folder, setup, fingerprint, methods)
    began = time.perf_counter() if began is None else began
    course = Course(setup, fingerprint, learners, extract, base_features, folder, log, progress, extra or {}, began)
    kinds = ["diagonal", *sorted({method.curvature for method in methods} - {"diagonal"})]
    begun, refer = reference_stage(setup, [pattern for pattern, _ in adapters.VIT_TARGETS], kinds, extract)
    state, first = course.start(begun), 0
    checkpoints = Checkpoints(folder / "checkpoints" / "learned")
    if checkpoints.latest is not None:
        first, state = checkpoints.latest, State(**checkpoints.load(state._asdict()))
        state = state._replace(rows=np.array(state.rows), seconds=np.array(state.seconds))
        _set(log, state)
        course = course._replace(began=began - float(state.elapsed))
        yield _after(course, first - 1, state, {}, restored=True)

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
        yield _after(course, t, state, learned)


def _after(course: Course, task: int, state: State, learned: dict[str, Learned], restored: bool = False) -> After:
    learners, tested = course.learners, [len(task.test) for task in course.setup.stream.tasks]
    outcomes = {
        name: outcome(rows, task, None if learner.train is None else float(seconds), tested)
        for (name, learner), rows, seconds in zip(learners.items(), state.rows.copy(), state.seconds, strict=True)
    }
    frozen = outcomes.pop(_FROZEN.name)
    snapshots = {name: course.snapshot(name, task, state) for name in learners}
    return After(
        course.setup, task, restored, outcomes, frozen, state.reference, learned, learners, snapshots, course.began
    )


def _set(log: Log | None, state: State) -> None:
    """What was written since is written again."""
    if log is not None:
        log.position = int(state.position)


def _in_words(method: Method) -> str:
    """The options of a method, for a page."""
    if method.adapter is None:
        return "trains nothing"
    parts = [f"rank {method.adapter.settings['rank']}"] if "rank" in method.adapter.settings else []
    parts.append(f"learning rate {method.learning_rate:g}")
    if method.alpha:
        parts.append(f"penalty {method.alpha:g} in {method.units} units")
    if any(method.pull):
        parts.append("heads pulled by {:g} and {:g}".format(*method.pull))
    return ", ".join(parts)


def summary(
    after: After, *, name: str, backbone: str, images_per_second: float | None = None,
    published: Mapping[str, float] | None = None,
) -> Results:  # fmt: skip
    """The results of a run after its last task, with what the main method's pool knows when modules are left out.

    Args:
      name, backbone, images_per_second, published: see `Results`.
    """
    setup, main = after.setup, next(iter(after.outcomes))
    stream, snapshot, tasks = setup.stream, after.snapshots[main], [task.name for task in setup.stream.tasks]
    if after.task != len(tasks) - 1:
        raise ValueError(f"{after.task + 1} of {len(tasks)} tasks are learned: take what the last task left")

    def of(weighting: str) -> list[Skill]:
        if len(tasks) < 2 or snapshot.composition.modules != module_names(setup):  # one module knows all tasks
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
        settings={
            "trained for": f"{setup.settings.epochs} epochs in batches of {setup.settings.batch}",
            main: _in_words(after.learners[main].method),
        },
        tasks=tasks,
        classes=[len(task.classes) for task in stream.tasks],
        tested=[len(task.test) for task in stream.tasks],
        methods=after.outcomes,
        frozen=after.frozen,
        specialise=of("specialise"),
        unlearn=of("unlearn"),
        images_per_second=images_per_second,
        seconds=time.perf_counter() - after.began,
        published={name: number for name, number in (published or {}).items() if name in after.outcomes},
    )
