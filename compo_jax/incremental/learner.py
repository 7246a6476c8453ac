"""Training one module on one task, by any of the methods."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compo_jax import adapters
from compo_jax.data import Task, TaskStream, steps_per_epoch, train_batches
from compo_jax.incremental.classifier import Head, logits, masked
from compo_jax.incremental.optimizer import coupled_adamw, decoupled_adamw, rates
from compo_jax.incremental.reference import Reference
from compo_jax.incremental.regularisers import head_penalty, ita_penalty
from compo_jax.incremental.settings import Method, Settings
from compo_jax.train import fit, init_state, jit_runner

Tree = Any


def task_columns(head: Head, first: int, count: int, width: int) -> Head:
    """The columns of one task, filled up with zeros to `width`, so that every task's head has one shape."""
    return jax.tree.map(
        lambda x: jnp.pad(x[..., first : first + count], [(0, 0)] * (x.ndim - 1) + [(0, width - count)]), head
    )


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
) -> Callable:
    """`(task, first, reference, module=None, **fit_options) -> (module, head)`: trains a module and its task's head.

    The cross-entropy is over the task's classes only. The penalty takes the decoupled step where the adapter has few
    parameters of its own, and is added to the loss for full deltas (Porrello et al., 2025).

    Args:
      width: columns of a head, at least the classes of any task; one compilation serves all tasks.
      runner: `jit_runner` or `pmap_runner`.
      first: global number of the task's first class, in the call returned.
      module: where training starts; None for the adapter's own start.
    """
    forward = adapters.adapted(model, method.adapter)
    decoupled = method.adapter.dense is not None

    def penalty(params, context):
        delta = method.adapter.delta(params["module"], context["base"])
        return ita_penalty(delta, context["fisher"], context["alpha"]) + head_penalty(
            params["head"], context["head"], context["head_fisher"], *context["pull"]
        )

    def loss(params, context, batch, step):
        images = stream.prepare(batch["image"])
        if stream.augment is not None:
            images = stream.augment(jax.random.fold_in(context["key"], step), images)
        values = logits(params["head"], forward(context["base"], params["module"], images, method="features"))
        values = masked(values, context["mask"])
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(values, batch["label"]).mean()
        accuracy = jnp.mean(values.argmax(-1) == batch["label"])
        total = cross_entropy if decoupled else cross_entropy + penalty(params, context)
        return total, {"accuracy": accuracy}

    def extras(params, context, step):
        more = {"rate": context["rates"][step // context["steps_per_epoch"]]}
        return more | ({"regulariser": jax.grad(penalty)(params, context)} if decoupled else {})

    optimizer = (decoupled_adamw if decoupled else coupled_adamw)(method.learning_rate)
    run = runner(loss, optimizer, extras=extras)

    def train(task: Task, first: int, reference: Reference, module: Tree = None, **fit_options) -> tuple[Tree, Head]:
        key_module, key_augment = jax.random.split(jax.random.fold_in(jax.random.key(seed), first))
        classes = len(task.classes)
        start = task_columns(reference.head, first, classes, width)
        per_epoch = steps_per_epoch(task.train, settings.batch)
        context = {
            "base": base,
            "fisher": reference.others,
            "alpha": jnp.float32(method.alpha),
            "head": start,
            "head_fisher": task_columns(reference.head_fisher, first, classes, width),
            "pull": jnp.array(method.pull, jnp.float32),
            "mask": jnp.arange(width) < classes,
            "key": key_augment,
            "rates": rates(settings.epochs),
            "steps_per_epoch": jnp.int32(per_epoch),
        }
        params = {"module": method.adapter.init(key_module, base) if module is None else module, "head": start}
        state = fit(
            run,
            init_state(params, optimizer),
            context,
            lambda step: train_batches(task.train, settings.batch, [seed, first], start=step),
            settings.epochs * per_epoch,
            **fit_options,
        )
        head = jax.tree.map(lambda x: np.asarray(x[..., :classes]), state.params["head"])
        return jax.tree.map(np.asarray, state.params["module"]), head

    return train
