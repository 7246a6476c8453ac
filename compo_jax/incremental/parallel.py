"""Modules of independent tasks trained at once: vmapped on one device, or divided among several."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from compo_jax import mesh as meshes
from compo_jax.data import Task, steps_per_epoch
from compo_jax.incremental.learner import Learned, training
from compo_jax.incremental.modes import Method
from compo_jax.incremental.reference import Reference
from compo_jax.incremental.settings import Setup
from compo_jax.train import Runner, fit, init_state, make_step


@runtime_checkable
class TrainTasks(Protocol):
    """What `task_trainer` makes of one task after another; `fit_options` are those of `train.fit`."""

    def __call__(
        self, tasks: Sequence[Task], firsts: Sequence[int], references: Sequence[Reference], **fit_options
    ) -> list[Learned]: ...


def parallel_trainer(setup: Setup, method: Method, *, width: int | None = None, mesh: Mesh | None = None) -> TrainTasks:
    """Trains all tasks in one loop: a step takes a batch of every task.

    The base is held once a device; states, heads and batches are stacked over the tasks and divided over `mesh`
    (default: a device of this process for each task, as far as there are), with no communication.
    A task whose steps are done waits for the others; a number of tasks that the devices don't divide is filled up.

    ValueError for a method whose tasks depend on each other.
    """
    settings, plan = setup.settings, training(setup, method, width=width)
    if not plan.mode.at_once:
        raise ValueError(
            f"tasks of {method.name!r} are trained one after another, for one needs what the others left: see "
            "task_trainer"
        )
    step = make_step(plan.loss, plan.optimizer, extras=plan.extras)
    axes = {"held": None, **dict.fromkeys(("step_limit", "task"), 0)}

    def one(state, context, batch):
        new, metrics = step(state, {"held": context["held"], **context["task"]}, batch)
        running = state.step < context["step_limit"]
        return jax.tree.map(lambda n, o: jnp.where(running, n, o), new, state), (running, metrics)

    @jax.jit
    def every(state, context, batch):
        state, (running, metrics) = jax.vmap(one, in_axes=(0, axes, 0))(state, context, batch)
        mean = {name: jnp.mean(value, where=running) for name, value in metrics.items()}
        # each by itself, too: the mean would hide one that diverges
        each = {f"loss_{t}": loss for t, loss in enumerate(metrics["loss"])}
        return state, mean | each | {"not_finite": jnp.sum(metrics["not_finite"])}

    def train(
        tasks: Sequence[Task], firsts: Sequence[int], references: Sequence[Reference], **fit_options
    ) -> list[Learned]:
        devices = meshes.data_mesh(min(len(tasks), len(jax.local_devices()))) if mesh is None else mesh
        members = [*range(len(tasks)), *[0] * (-len(tasks) % devices.size)]
        split, whole = meshes.split(devices), meshes.replicated(devices)

        def stack(trees):
            return jax.tree.map(lambda *x: jnp.stack(x), *(trees[t] for t in members))

        started = [plan.start(*lesson, plan.mode.memory) for lesson in zip(tasks, firsts, references, strict=True)]
        steps = [settings.epochs * steps_per_epoch(task.train, settings.batch) for task in tasks]
        context = {
            "held": started[0][1]["held"],
            "task": stack([{k: v for k, v in context.items() if k != "held"} for _, context in started]),
            "step_limit": jnp.array([steps[t] for t in members]),
        }
        state = stack([init_state(params, plan.optimizer) for params, _ in started])

        def batches(start):
            each = [plan.batches(task, first)(start) for task, first in zip(tasks, firsts, strict=True)]
            for parts in zip(*each, strict=True):
                yield jax.tree.map(lambda *x: np.concatenate(x), *parts)

        def place(tree):
            return jax.device_put(
                tree, {k: whole if k == "held" else split for k in tree} if tree is context else split
            )

        def shard(batch):
            return jax.device_put(
                jax.tree.map(lambda x: x.reshape(len(tasks), -1, *x.shape[1:])[members], batch), split
            )

        runner = Runner(place, shard, step=every, fetch=lambda tree: tree)
        params = jax.device_get(fit(runner, state, context, batches, max(steps), **fit_options).params)
        return [
            plan.finish(task, first, jax.tree.map(lambda x, t=t: x[t], params), plan.mode.memory)
            for t, (task, first) in enumerate(zip(tasks, firsts, strict=True))
        ]

    return train
