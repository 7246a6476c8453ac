"""The work that throughput.py times, on our side: each piece a function of sizes that returns it ready to be done again
and again. Run by timing.py in a process of its own."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import Sizes, Work, serve

from compo_jax import adapters, curvature, incremental, modular, tree
from compo_jax.data import ArraySplit, Task, TaskStream
from compo_jax.incremental import Method, Metric, Reference, Settings, Setup, empty_mixtures
from compo_jax.incremental.learner import training
from compo_jax.memory import keep_memory
from compo_jax.models import ViT
from compo_jax.train import TrainState, init_state, jit_runner
from compo_jax.tree import Tree

CLASSES = 10  # of a task
TARGETS = [pattern for pattern, _ in adapters.VIT_TARGETS]


class Network(NamedTuple):
    """A ViT with weights, and a batch for it: `apply(params, images)`, `loss(params, images, labels)`."""

    model: ViT
    params: Tree
    images: jax.Array
    labels: jax.Array

    def apply(self, params, images):
        return self.model.apply({"params": params}, images)

    def loss(self, params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(self.apply(params, images), labels).mean()


def vit(sizes: Sizes, images: int | None = None, large: bool = False, classes: int | None = None) -> Network:
    """With `sizes.classes` outputs and `sizes.batch` images where not said otherwise."""
    classes, images = sizes.classes if classes is None else classes, images or sizes.batch
    half = sizes.dtype == "bfloat16"
    kernel = "cudnn" if half and jax.default_backend() == "gpu" else "xla"
    model = ViT(*(sizes.large if large else sizes.net), classes=classes, dtype=jnp.bfloat16 if half else None)
    model, rng = model.copy(kernel=kernel), np.random.default_rng(0)
    shape = (images, model.image_size, model.image_size, 3)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape[1:])))["params"]
    return Network(
        model, params, jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.arange(images) % max(classes, 1)
    )


def ready(function: Callable, *arguments: Any) -> Work:
    """The function of these arguments as work, jitted."""
    jitted, placed = jax.jit(function), jax.device_put(arguments)
    return lambda: jax.block_until_ready(jitted(*placed))


# -- passes and products ---------------------------------------------------------------------------------------------
def forward(sizes: Sizes) -> Work:
    net = vit(sizes)
    return ready(net.apply, net.params, net.images)


def gradient(sizes: Sizes) -> Work:
    net = vit(sizes)
    return ready(jax.grad(net.loss), net.params, net.images, net.labels)


def large_gradient(sizes: Sizes) -> Work:
    net = vit(sizes, sizes.large_batch, large=True)
    return ready(jax.grad(net.loss), net.params, net.images, net.labels)


def hvp(sizes: Sizes) -> Work:
    net = vit(sizes)
    return ready(partial(curvature.hvp, net.loss), net.params, net.params, net.images, net.labels)


def hvp8(sizes: Sizes) -> Work:
    net = vit(sizes)
    eight = jax.tree.map(lambda p: jnp.stack([p] * 8), net.params)
    return ready(partial(curvature.hvp, net.loss, stacked=True), net.params, eight, net.images, net.labels)


def ggn(sizes: Sizes) -> Work:
    net = vit(sizes)
    return ready(partial(curvature.ggnvp, net.apply), net.params, net.params, net.images)


def _dense(net: Network) -> tuple[Callable, Tree]:
    """(the logits as a function of the weights that adapters change, these weights)."""
    kept, rest = tree.partition(net.params, TARGETS)
    return lambda kept, images: net.apply(tree.combine(kept, rest), images), kept


def fisher(sizes: Sizes) -> Work:
    net = vit(sizes, sizes.fisher_images)
    apply, kept = _dense(net)
    return ready(partial(curvature.fisher_diagonal, apply), kept, net.images)


def kfac(sizes: Sizes) -> Work:
    net = vit(sizes, sizes.kfac_images)
    apply, kept = _dense(net)
    return ready(partial(curvature.kronecker, apply, method="monte_carlo", key=jax.random.key(0)), kept, net.images)


# -- evaluation ------------------------------------------------------------------------------------------------------
def evaluation(sizes: Sizes) -> Work:
    net = vit(sizes, sizes.eval_batch)
    return ready(net.apply, net.params, net.images)


def composed(sizes: Sizes) -> Work:
    """The modules are composed once, before."""
    net = vit(sizes)
    adapter, share = adapters.lora(sizes.rank), 1 / sizes.composed
    keys = jax.random.split(jax.random.key(1), sizes.composed)
    whole = adapter.sum((adapter.init(key, net.params) for key in keys), net.params, [share] * len(keys))
    return ready(net.apply, tree.add(net.params, adapter.delta(whole, net.params)), net.images)


# -- training steps --------------------------------------------------------------------------------------------------
def _taking_steps(runner, state, context, batch) -> Work:
    state = runner.place(jax.tree.map(jnp.copy, state))  # which the steps use up
    context, batch = runner.place(context), runner.shard(batch)

    def once():
        nonlocal state
        state, _ = jax.block_until_ready(runner.step(state, context, batch))

    return once


class Stream(NamedTuple):
    """Random tasks, and a reference that knows random curvature of them: what a step takes, without its making."""

    tasks: TaskStream
    reference: Reference


def random_stream(net: Network, tasks: int, images: int) -> Stream:
    rng, side = np.random.default_rng(0), net.model.image_size
    labels = np.arange(images) % CLASSES

    def task(t):
        split = ArraySplit(rng.integers(0, 256, (images, side, side, 3), np.uint8), labels)
        return Task(f"{t}", tuple(f"{t}.{c}" for c in range(CLASSES)), split, split)

    def like(x):
        return jnp.asarray(1e-3 * rng.random(x.shape), x.dtype)

    head = {"kernel": np.zeros((net.model.width, tasks * CLASSES)), "bias": np.zeros(tasks * CLASSES)}
    head = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), head)
    metric = Metric({"diagonal": jax.tree.map(like, tree.partition(net.params, TARGETS)[0])}, jax.tree.map(like, head))
    stream = TaskStream("random", tuple(map(task, range(tasks))), side)
    return Stream(stream, Reference(empty_mixtures(1, 1, 1), head, {}, {}, metric, metric))


def method(adapter: adapters.Adapter, way: str = "ita") -> Method:
    weight = {"ita": 0.02, "iel": 20.0}[way]
    return incremental.method(way, adapter, learning_rate=3e-4, alpha=weight, pull=(0.025, 0.001), units="paper")


def step(sizes: Sizes, adapter: adapters.Adapter, way: str = "ita", tasks: int = 1) -> Work:
    """A step of a run's own training, with penalties, at the task that is number `tasks`."""
    net = vit(sizes, classes=0)
    stream = random_stream(net, 1, sizes.batch)
    setup = Setup(net.model, net.params, stream.tasks, Settings(batch=sizes.batch), seed=0)
    plan = training(setup, method(adapter, way))
    memory = plan.mode.memory | ({"tasks": jnp.float32(tasks - 1)} if way == "iel" else {})
    params, context = plan.start(stream.tasks.tasks[0], 0, stream.reference, memory)
    runner = jit_runner(plan.loss, plan.optimizer, extras=plan.extras)
    batch = next(iter(plan.batches(stream.tasks.tasks[0], 0)(0)))
    return _taking_steps(runner, init_state(params, plan.optimizer), context, batch)


class Plain(NamedTuple):
    """A step of the cross-entropy alone; `loss_of(model)` is of the ViT itself, or of another with its weights."""

    net: Network
    loss_of: Callable
    optimizer: optax.GradientTransformation
    state: TrainState
    batch: Tree


def plain(sizes: Sizes, adapter: adapters.Adapter) -> Plain:
    net, optimizer = vit(sizes, classes=0), optax.adamw(3e-4, weight_decay=0)
    params = {"module": adapter.init(jax.random.key(1), net.params), "head": jnp.zeros((net.model.width, CLASSES))}

    def loss_of(model):
        features = adapters.adapted(model, adapter)

        def loss(params, context, batch, step):
            z = features(context, params["module"], batch["image"], method="features")
            logits = z.astype(jnp.float32) @ params["head"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}

        return loss

    batch = {"image": net.images, "label": np.arange(sizes.batch, dtype=np.int32) % CLASSES}
    return Plain(net, loss_of, optimizer, init_state(params, optimizer), batch)


def plain_step(step: Plain) -> Work:
    return _taking_steps(
        jit_runner(step.loss_of(step.net.model), step.optimizer), step.state, step.net.params, step.batch
    )


def iel(sizes: Sizes, tasks: int) -> Work:
    return step(sizes, adapters.lora(sizes.rank), "iel", tasks)


def multitask(sizes: Sizes) -> Work:
    side, patch = sizes.net[:2]
    net = modular.ModularNet((CLASSES,) * sizes.tasks, sizes.layers, sizes.templates, sizes.channels, patch)
    rows = sizes.tasks * sizes.task_batch
    variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((sizes.tasks, 2, side, side, 3)))
    settings = modular.Settings(1000, sizes.task_batch)
    optimizer = modular.optimizer(settings)
    params, frozen = tree.partition(variables["params"], "")
    context = {"frozen": frozen, "statistics": variables["batch_stats"], "key": jax.random.key(1)}
    batch = {
        "image": np.random.default_rng(0).normal(size=(rows, side, side, 3)).astype(np.float32),
        "label": np.arange(rows, dtype=np.int32) % CLASSES,
    }
    loss = modular.objective(net, lambda images: images, settings)
    return _taking_steps(jit_runner(loss, optimizer), init_state(params, optimizer), context, batch)


ROWS = {
    "forward": forward,
    "gradient": gradient,
    "large-gradient": large_gradient,
    "hvp": hvp,
    "hvp8": hvp8,
    "ggn": ggn,
    "lora": lambda sizes: plain_step(plain(sizes, adapters.lora(sizes.rank))),
    "ita-lora": lambda sizes: step(sizes, adapters.lora(sizes.rank)),
    "ita-ia3": lambda sizes: step(sizes, adapters.ia3()),
    "ita-full": lambda sizes: step(sizes, adapters.full()),
    "iel-1": partial(iel, tasks=1),
    "iel-5": partial(iel, tasks=5),
    "iel-20": partial(iel, tasks=20),
    "iel-20-summed": partial(iel, tasks=20),
    "evaluation": evaluation,
    "composed": composed,
    "fisher": fisher,
    "kfac": kfac,
    "multitask": multitask,
}

if __name__ == "__main__":
    keep_memory()
    serve(ROWS)
