"""What is minimised: the mean of the tasks' losses, and what keeps routes sharp and modules used."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from compo_jax import tree
from compo_jax.data.stream import Augmentation
from compo_jax.modular import routes
from compo_jax.modular.net import ModularNet
from compo_jax.modular.settings import Phase, Settings, phase
from compo_jax.tree import Tree

Prepare = Callable[[Any], Array]
Rows = Float[Array, "rows height width channels"]


def by_task(rows: Array, tasks: int) -> Array:
    """Rows `i · tasks + t` of `balanced_batches` as (tasks, batch, ...). ValueError where they are no such rows."""
    if len(rows) % tasks:
        raise ValueError(
            f"a device has {len(rows)} rows of {tasks} tasks: each device takes as many images of each task, so choose "
            "a batch (images of a task) that the devices divide"
        )
    return jnp.moveaxis(rows.reshape(-1, tasks, *rows.shape[1:]), 1, 0)


def forward(net: ModularNet, variables: Tree, images: Array, weights: Array, train: bool) -> Array:
    """The logits under these route weights. With `train` by the batch's own statistics, which are not kept."""
    logits, _ = net.apply(variables, images, lambda _: weights, train, mutable=["batch_stats"])
    return logits


def relaxed(settings: Settings, logits: Array, now: Phase, key: Key[Array, ""]) -> Array:
    """The weights of hard routes in a training step: of the settings' relaxation, or one-hot once they are fixed."""
    kinds = {
        "soft": lambda: routes.soft(logits, now.temperature),
        "straight_through": lambda: routes.straight_through(logits, now.temperature),
        "gumbel": lambda: routes.gumbel(logits, key, now.temperature),
    }
    return jnp.where(now.fixed, routes.hard(logits), kinds[settings.relaxation]())


def cross_entropy(logits: Float[Array, "tasks batch classes"], labels: Int[Array, "tasks batch"]) -> Float[Array, ""]:
    """The plain mean of the tasks' means; a logit of -inf is a class that the task doesn't have."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(wide, labels).mean()


def objective(net: ModularNet, prepare: Prepare, settings: Settings, augment: Augmentation | None = None) -> Callable:
    """`(params, context, batch, step) -> (J, metrics)` for `train.jit_runner`.

    `J = mean_t CE_t`; where routes are hard, `β mean_{t,l} H(a) / log M + γ (1 - H(ā) / log M)` is added, with the
    phase's τ, β and γ.

    `context` has `frozen` (the parameters that aren't trained, None where they are), `statistics` (the collection
    `batch_stats`) and `key`; a batch is one of `balanced_batches`.
    """
    tasks = len(net.classes)

    def loss(params, context, batch, step):
        key_route, key_augment = jax.random.split(jax.random.fold_in(context["key"], step))
        whole = tree.combine(params, context["frozen"])
        images = prepare(batch["image"])
        if augment is not None:
            images = augment(key_augment, images)
        images, labels = by_task(images, tasks), by_task(batch["label"], tasks)
        if net.route == "hard":
            now = phase(settings, step)
            weights, a = relaxed(settings, whole["route"], now, key_route), routes.soft(whole["route"], now.temperature)
        else:
            weights = routes.KINDS[net.route](whole["route"])
            a = routes.shares(weights) if net.route == "linear" else weights
        variables = {"params": whole, "batch_stats": context["statistics"]}
        logits = forward(net, variables, images, weights, settings.statistics == "batch")
        value = cross_entropy(logits, labels)
        sharpness, waste = routes.scaled_entropy(a), routes.unused(a)
        metrics = {"cross_entropy": value, "accuracy": jnp.mean(logits.argmax(-1) == labels)}
        if net.route != "hard":
            return value, metrics | {"entropy": sharpness, "unused": waste}
        metrics |= {
            "entropy": jnp.where(now.fixed, 0.0, sharpness),
            "unused": jnp.where(now.fixed, routes.unused(routes.hard(whole["route"])), waste),
            "temperature": now.temperature,
        }
        return value + now.entropy * sharpness + now.usage * waste, metrics

    return loss
