"""Training one module on one task, by any of the methods."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compo_jax.data import Task, TaskStream, steps_per_epoch, train_batches
from compo_jax.incremental.classifier import Head, logits, masked, task_columns
from compo_jax.incremental.descent import penalty_step
from compo_jax.incremental.modes import MODES, Memory, Mode
from compo_jax.incremental.optimizer import coupled_adamw, decoupled_adamw, rates
from compo_jax.incremental.reference import Reference
from compo_jax.incremental.regularisers import head_penalty
from compo_jax.incremental.settings import Method, Settings
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
      keys: `first -> (key of the module's start, of augmentation, of what is remembered)`.
    """

    mode: Mode
    loss: Callable
    extras: Callable
    optimizer: optax.GradientTransformationExtraArgs
    start: Callable[[Task, int, Reference, Memory], tuple[Tree, Tree]]
    batches: Callable[[Task, int], Callable]
    keys: Callable[[int], jax.Array]


def training(
    model, base: Tree, stream: TaskStream, settings: Settings, method: Method, seed: int, *, width: int
) -> Training:
    """The pieces of `method`; see `task_trainer`. ValueError for an unknown mode."""
    if method.mode not in MODES:
        raise ValueError(f"unknown mode {method.mode!r} of method {method.name!r}; known are {', '.join(MODES)}")
    coupled = method.adapter.dense is None if method.coupled is None else method.coupled

    def keys(first):
        key_module, key_augment = jax.random.split(jax.random.fold_in(jax.random.key(seed), first))
        return key_module, key_augment, jax.random.fold_in(key_module, 1)

    mode = MODES[method.mode](model, base, method, stream, settings, keys(0)[0])

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

    def start(task, first, reference, memory):
        key_module, key_augment, _ = keys(first)
        classes = len(task.classes)
        if classes > width:
            raise ValueError(
                f"task {task.name!r} has {classes} classes and its head {width} columns: make the trainer with a width "
                f"of {classes} at least"
            )
        head = task_columns(reference.head, first, classes, width)
        known = reference.every if method.mode == "ensemble" else reference.others
        if method.curvature not in known.weights:
            raise ValueError(
                f"method {method.name!r} wants {method.curvature} curvature, and the reference has "
                f"{', '.join(known.weights)}: make it with reference_stage(..., kinds=[{method.curvature!r}])"
            )
        scale = mode.scale(memory, reference.every.weights[method.curvature]) if method.units == "relative" else 1.0
        context = {
            "held": mode.hold(memory),
            "curvature": known.weights[method.curvature],
            "alpha": jnp.float32(method.alpha / scale),
            "head": head,
            "head_fisher": task_columns(known.head, first, classes, width),
            "pull": jnp.array(method.pull, jnp.float32),
            "mask": jnp.arange(width) < classes,
            "key": key_augment,
            "rates": rates(settings.epochs),
            "steps_per_epoch": jnp.int32(steps_per_epoch(task.train, settings.batch)),
        }
        return {"module": mode.begin(key_module, memory), "head": head}, context

    def batches(task, first):
        return lambda step: train_batches(task.train, settings.batch, [seed, first], start=step)

    optimizer = (coupled_adamw if coupled else decoupled_adamw)(method.learning_rate)
    return Training(mode, loss, extras, optimizer, start, batches, keys)


def task_trainer(
    model,
    base: Tree,
    stream: TaskStream,
    settings: Settings,
    method: Method,
    seed: int,
    *,
    width: int,
    runner=jit_runner,
) -> tuple[Memory, Callable[..., Learned]]:
    """The memory before the first task, and `(task, first, reference, memory, **fit_options) -> Learned`.

    The cross-entropy is over the task's classes only. The penalty takes the decoupled step where the adapter has few
    parameters of its own, and is added to the loss for full deltas (Porrello et al., 2025), unless the method says
    otherwise.

    Args:
      width: columns of a head, at least the classes of any task; one compilation serves all tasks.
      runner: `jit_runner` or `pmap_runner`.
      first: global number of the task's first class, in the call returned.
    """
    plan = training(model, base, stream, settings, method, seed, width=width)
    run = runner(plan.loss, plan.optimizer, extras=plan.extras)

    def train(task: Task, first: int, reference: Reference, memory: Memory, **fit_options) -> Learned:
        params, context = plan.start(task, first, reference, memory)
        steps = settings.epochs * steps_per_epoch(task.train, settings.batch)
        state = fit(run, init_state(params, plan.optimizer), context, plan.batches(task, first), steps, **fit_options)
        return finish(plan, task, first, state.params, memory)

    return plan.mode.memory, train


def finish(plan: Training, task: Task, first: int, params: Tree, memory: Memory) -> Learned:
    """A task's trained parameters, taken apart."""
    head = jax.tree.map(lambda x: np.asarray(x[..., : len(task.classes)]), params["head"])
    module = jax.tree.map(np.asarray, params["module"])
    return Learned(module, head, plan.mode.remember(memory, task, first, module, head, plan.keys(first)[2]))
