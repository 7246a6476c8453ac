"""Training one module on one task, by any of the methods."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compo_jax.compose.numbers import require_not_negative
from compo_jax.data import Task, TaskStream, steps_per_epoch, train_batches
from compo_jax.incremental.classifier import Head, logits, masked, task_columns
from compo_jax.incremental.descent import penalty_step
from compo_jax.incremental.fisher import KINDS
from compo_jax.incremental.modes import Memory, Method, Mode
from compo_jax.incremental.optimizer import coupled_adamw, decoupled_adamw, rates
from compo_jax.incremental.reference import Reference
from compo_jax.incremental.regularisers import head_penalty
from compo_jax.incremental.settings import Setup
from compo_jax.train import fit, init_state, jit_runner
from compo_jax.tree import Tree


class Learned(NamedTuple):
    """What training on a task gives: its module, the columns of its head, and the memory for the next task."""

    module: Tree
    head: Head
    memory: Memory


class Training(NamedTuple):
    """A method as the pieces of a training loop.

    Attributes:
      mode: see `modes`, with the memory before the first task.
      loss, extras, optimizer: see `train.make_step`.
      start: `(task, first, reference, memory) -> (params, context)` of the task whose first class is number `first`.
      batches: `(task, first) -> (step -> iterator of batches)`.
      finish: `(task, first, params, memory) -> Learned`, a task's trained parameters taken apart.
    """

    mode: Mode
    loss: Callable
    extras: Callable
    optimizer: optax.GradientTransformationExtraArgs
    start: Callable[[Task, int, Reference, Memory], tuple[Tree, Tree]]
    batches: Callable[[Task, int], Callable]
    finish: Callable[[Task, int, Tree, Memory], Learned]


@runtime_checkable
class TrainTask(Protocol):
    """Trains the task whose first class is number `first`; `fit_options` are those of `train.fit`."""

    def __call__(self, task: Task, first: int, reference: Reference, memory: Memory, **fit_options) -> Learned: ...


class TaskTrainer(NamedTuple):
    """A method's mode, with the memory before the first task, and what trains its tasks one by one."""

    mode: Mode
    train: TrainTask


def head_width(mode: Mode, stream: TaskStream) -> int:
    """Columns of a head that serves all that the mode trains: one compilation for all tasks."""
    lessons = [mode.lesson(stream, t) for t in range(len(stream.tasks))]
    return max((len(lesson.task.classes) for lesson in lessons if lesson), default=0)


def _require_values(method: Method) -> None:
    """ValueError for a number or a word that the method can't have."""
    of = f"{method.name}'s"
    for field, allowed in (("units", ("relative", "paper")), ("curvature", KINDS), ("coupled", (True, False, None))):
        if getattr(method, field) not in [*allowed]:
            known = ", ".join(map(str, allowed))
            raise ValueError(f"{of} {field} is one of {known}, not {getattr(method, field)!r}")
    if np.shape(method.pull) != (2,):
        raise ValueError(f"{of} pull is two numbers, λ_F and λ_I, not {method.pull}")
    require_not_negative(**{f"{of} {field}": getattr(method, field) for field in ("alpha", "learning_rate")})
    require_not_negative(**{f"{of} pull's {name}": x for name, x in zip(("λ_F", "λ_I"), method.pull, strict=True)})


def training(setup: Setup, method: Method, *, width: int | None = None) -> Training:
    """The pieces of `method`; see `task_trainer`."""
    stream, settings, mode = setup.stream, setup.settings, method.mode(setup, method)
    pieces = {
        "`begin` and `features` of its mode": mode.begin and mode.features,
        "an adapter": method.adapter,
        "a learning rate": method.learning_rate,
    }
    if missing := [what for what, value in pieces.items() if value is None]:
        raise ValueError(f"method {method.name!r} can't train: it lacks {' and '.join(missing)}")
    _require_values(method)
    width = head_width(mode, stream) if width is None else width
    coupled = method.adapter.dense is None if method.coupled is None else method.coupled

    def penalty(params, context):
        weights = mode.penalty(context["held"], params["module"], context["curvature"], context["alpha"])
        pull = head_penalty(params["head"], context["head"], context["head_fisher"], *context["pull"])
        return weights + pull

    def loss(params, context, batch, step):
        images = stream.prepare(batch["image"])
        if stream.augment is not None:
            images = stream.augment(jax.random.fold_in(context["key"], step), images)
        z = mode.features(context["held"], params["module"], images)
        values = masked(logits(params["head"], z), context["mask"])
        total = optax.softmax_cross_entropy_with_integer_labels(values, batch["label"]).mean()
        metrics = {"accuracy": jnp.mean(values.argmax(-1) == batch["label"])}
        if mode.distil is not None:
            total = total + mode.distil(context["held"], z, images, context["alpha"])
        if coupled:
            metrics["penalty"] = penalty(params, context)
            total = total + metrics["penalty"]
        return total, metrics

    def extras(params, context, step):
        rate, of_params = context["rates"][step // context["steps_per_epoch"]], lambda params: penalty(params, context)
        if coupled:
            return {"rate": rate, "penalty": of_params}, {}
        update, metrics = penalty_step(of_params, params, rate)
        return {"rate": rate, "penalty_step": update}, metrics

    def batches(task, first):
        return lambda step: train_batches(task.train, settings.batch, [setup.seed, first], start=step)

    def finish(task, first, params, memory):
        head = jax.tree.map(lambda x: np.asarray(x[..., : len(task.classes)]), params["head"])
        trained = jax.tree.map(np.asarray, params["module"])
        module = jax.tree.map(np.asarray, mode.keep(memory, trained))
        return Learned(module, head, mode.remember(memory, task, first, trained, head, setup.keys(first).memory))

    optimizer = (coupled_adamw if coupled else decoupled_adamw)(method.learning_rate)
    if mode.module_rate != 1:
        slower = optax.masked(optax.scale(mode.module_rate), {"module": True, "head": False})
        optimizer = optax.chain(optimizer, slower)
    return Training(mode, loss, extras, optimizer, _starts(setup, method, mode, width), batches, finish)


def _starts(setup: Setup, method: Method, mode: Mode, width: int) -> Callable[..., tuple[Tree, Tree]]:
    """`Training.start`; what it gives to the loss as a context has one structure for all tasks."""
    settings = setup.settings

    def start(task, first, reference, memory):
        keys = setup.keys(first)
        classes = len(task.classes)
        if classes > width:
            raise ValueError(
                f"task {task.name!r} has {classes} classes and its head {width} columns: make the trainer with a width "
                f"of {classes} at least"
            )
        head = task_columns(reference.head, first, classes, width)
        metric = mode.metric(reference)
        if method.curvature not in metric.weights:
            raise ValueError(
                f"method {method.name!r} wants {method.curvature} curvature, and the reference has "
                f"{', '.join(metric.weights)}: make it with reference_stage(..., kinds=[{method.curvature!r}])"
            )
        every = reference.every.weights[method.curvature]
        unit = mode.alpha_unit(memory, every) if method.units == "relative" else 1.0
        context = {
            "held": mode.hold(memory),
            "curvature": metric.weights[method.curvature],
            "alpha": jnp.float32(method.alpha / unit),
            "head": head,
            "head_fisher": task_columns(metric.head, first, classes, width),
            "pull": jnp.array(method.pull, jnp.float32),
            "mask": jnp.arange(width) < classes,
            "key": keys.augmentation,
            "rates": rates(settings.epochs),
            "steps_per_epoch": jnp.int32(steps_per_epoch(task.train, settings.batch)),
        }
        return {"module": mode.begin(keys.module, memory, task), "head": head}, context

    return start


def task_trainer(setup: Setup, method: Method, *, width: int | None = None, runner=jit_runner) -> TaskTrainer:
    """What trains a module and a head on one task after another.

    The cross-entropy is over the task's classes only. The penalty takes the decoupled step where the adapter has few
    parameters of its own, and is added to the loss for full deltas (Porrello et al., 2025), unless the method says
    otherwise.

    Args:
      width: columns of a head, at least the classes of any task; default: those of the largest.
      runner: `jit_runner` or `pmap_runner`.

    ValueError for a method that trains nothing.
    """
    plan = training(setup, method, width=width)
    run = runner(plan.loss, plan.optimizer, extras=plan.extras)

    def train(task: Task, first: int, reference: Reference, memory: Memory, **fit_options) -> Learned:
        params, context = plan.start(task, first, reference, memory)
        steps = setup.settings.epochs * steps_per_epoch(task.train, setup.settings.batch)
        state = fit(run, init_state(params, plan.optimizer), context, plan.batches(task, first), steps, **fit_options)
        return plan.finish(task, first, state.params, memory)

    return TaskTrainer(plan.mode, train)
