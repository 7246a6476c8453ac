"""What a way to learn says of itself: how a task is trained, what is remembered of it, and how all is tested."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from compo_jax.adapters import Adapter
from compo_jax.data import Task, TaskStream
from compo_jax.incremental.classifier import Head
from compo_jax.incremental.evaluate import Classifier, linear
from compo_jax.incremental.extraction import Extract, SplitFeatures
from compo_jax.incremental.pooled import pool_head
from compo_jax.incremental.reference import Metric, Reference
from compo_jax.incremental.regularisers import Curvature
from compo_jax.incremental.settings import Setup
from compo_jax.pool import ModulePool
from compo_jax.tree import Tree

Memory = dict[str, Any]


class Lesson(NamedTuple):
    """What is trained at one time: a task, the number of its first class, and the name of its module in the pool."""

    module: str
    task: Task
    first: int


class Composition(NamedTuple):
    """Names in the pool: of the modules that are composed, and of those whose heads are."""

    modules: Sequence[str]
    heads: Sequence[str]


class Snapshot(NamedTuple):
    """What there is after a task for a method to classify with.

    Attributes:
      task: its number.
      reference: of all tasks so far.
      pool: the modules that the method has learned, each with the parts `head`, and `start`, where that began.
      composition: what the mode says is composed now.
      memory: what the method remembers.
      extract: the features that the method is tested on.
      base_features: a split's features by the base; those of a task's split are made once.
    """

    setup: Setup
    task: int
    reference: Reference
    pool: ModulePool
    composition: Composition
    memory: Memory
    extract: Extract
    base_features: SplitFeatures


def each_task(stream: TaskStream, task: int) -> Lesson:
    """The stream's task with this number, by itself; pools list their modules in the tasks' order."""
    name, digits = stream.tasks[task].name, max(2, len(str(len(stream.tasks) - 1)))
    module = f"{task:0{digits}d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}"
    return Lesson(module, stream.tasks[task], stream.offsets[task])


def all_so_far(names: Sequence[str], task: int) -> Composition:
    """All modules and their heads."""
    return Composition(names[: task + 1], names[: task + 1])


def newest(names: Sequence[str], task: int) -> Composition:
    """The module that was learned last, which the earlier ones went into, under all heads."""
    return Composition([names[task]], names[: task + 1])


def apart(names: Sequence[str], task: int) -> Composition:
    """All heads, and no mean of the modules: `classify` goes by each of them."""
    return Composition([], names[: task + 1])


def nothing(names: Sequence[str], task: int) -> Composition:
    """Of a mode that trains no modules."""
    return Composition([], [])


def composed(snapshot: Snapshot, params: Tree | None = None) -> Classifier:
    """The head that the tasks' heads make, on `params`; default: the base with the mean of the modules' deltas."""
    head = pool_head(snapshot.pool, snapshot.composition.heads, snapshot.reference.head)
    if params is None:
        params = snapshot.pool.compose(snapshot.setup.base, snapshot.composition.modules)
    return linear(partial(snapshot.extract, params), head)


def training_features(
    snapshot: Snapshot,
) -> tuple[Float[np.ndarray, "images features"], Int[np.ndarray, " images"]]:
    """The base's features of all tasks' training images so far, and the images' classes."""
    stream, seen = snapshot.setup.stream, range(snapshot.task + 1)
    labels = np.concatenate([stream.tasks[k].train.labels + stream.offsets[k] for k in seen])
    return np.concatenate([snapshot.base_features(stream.tasks[k].train) for k in seen]), labels


class Mode(NamedTuple):
    """How a task is trained, composed and tested: functions, and all that is said of it, in one place.

    A memory has one structure from the first task to the last, and so a training step is one program, whose cost
    doesn't know how many tasks there were. A mode that trains no module has no `begin` and no `features`.

    Attributes, how a task is trained:
      begin: `(key, memory, task) -> module`, where training begins.
      features: `(held, module, images) -> (images, features)`, the model in training.
      memory: before the first task.
      hold: `memory -> held`, what stays fixed while a task is trained; made once a task.
      penalty: `(held, module, curvature, alpha) -> scalar`.
      alpha_unit: `(memory, curvature) -> scalar`, what alpha is divided by in relative units: the mean entry of the
        diagonal that the penalty is taken in; `curvature` is that of the tasks so far.
      distil: `(held, features, images, alpha) -> scalar` added to the cross-entropy; None for nothing.
      module_rate: the module's learning rate as a part of the method's, which is the head's.
      remember: `(memory, task, first, module, head, key) -> memory` after a task whose first class is number `first`.
      keep: `(memory, module) -> module`, what a pool can store of what was trained, where that isn't a module.
    What is trained when:
      lesson: `(stream, task) -> Lesson` that is trained when this task has come; None where nothing is.
      at_once: whether the lessons are `each_task` and none needs what another left: all can be trained together.
      metric: `reference -> Metric`, the curvature that the penalty measures lengths by (the metric of geometry).
    How it is tested:
      compose: `(names of all tasks' modules, task) -> Composition` after this task; None where none can be tested.
      extract: `(params, split) -> features`, where they aren't the model's own.
      classify: `snapshot -> Classifier`.
    """

    begin: Callable[[jax.Array, Memory, Task], Tree] | None = None
    features: Callable[[Tree, Tree, jax.Array], jax.Array] | None = None
    memory: Memory = {}
    hold: Callable[[Memory], Tree] = lambda memory: {}
    penalty: Callable[[Tree, Tree, Curvature, jax.Array], jax.Array] = lambda *_: jnp.zeros(())
    alpha_unit: Callable[[Memory, Curvature], jax.Array] = lambda *_: jnp.ones(())
    distil: Callable[[Tree, jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    module_rate: float = 1.0
    remember: Callable[[Memory, Task, int, Tree, Head, jax.Array], Memory] = lambda memory, *_: memory
    keep: Callable[[Memory, Tree], Tree] = lambda memory, module: module
    lesson: Callable[[TaskStream, int], Lesson | None] = each_task
    at_once: bool = False
    metric: Callable[[Reference], Metric] = lambda reference: reference.others
    compose: Callable[[Sequence[str], int], Composition | None] = all_so_far
    extract: Extract | None = None
    classify: Callable[[Snapshot], Classifier] = composed


@runtime_checkable
class MakeMode(Protocol):
    """The constructor of a mode: what differs from run to run and from method to method goes in."""

    def __call__(self, setup: Setup, method: "Method") -> Mode: ...


class Method(NamedTuple):
    """A mode with an adapter and every number chosen: what a run compares. `incremental.method` makes it by its name.

    Attributes:
      name: under which it is reported.
      mode: how the tasks meet in training: `task_arithmetic`, `ensemble_learning` or another constructor.
      adapter: the form of its modules; None where it trains none.
      learning_rate: of AdamW at the first epoch; None where it trains nothing.
      alpha: weight of the penalty: α of incremental task arithmetic, β of incremental ensemble learning, λ of elastic
        weight consolidation, the weight of the distillation of learning without forgetting; 0 for none.
      pull: (λ_F, λ_I), the pull of a task's head to its aligned reference.
      curvature: that the penalty is taken in. `kronecker` is TAK's penalty (arXiv 2602.17385) in the Fisher's factors,
        merged as a mean over images, where TAK takes the Jacobian's and sums over tasks.
      coupled: whether the penalty is added to the loss, or takes a step of its own; None as Porrello et al. (2025) do,
        coupled for full deltas only.
      units: of `alpha` where it weighs a curvature. `relative`: the curvature is divided by its mean over the adapted
        weights and the tasks so far, so that one value serves backbones whose Fishers differ by orders of magnitude;
        `paper`: the curvature as it is.
    """

    name: str
    mode: MakeMode
    adapter: Adapter | None = None
    learning_rate: float | None = None
    alpha: float = 0.0
    pull: tuple[float, float] = (0.0, 0.0)
    curvature: Literal["diagonal", "kronecker"] = "diagonal"
    coupled: bool | None = None
    units: Literal["relative", "paper"] = "relative"
