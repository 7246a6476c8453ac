"""The ways in which the tasks of a stream meet one another in training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compo_jax import adapters, tree
from compo_jax.data import Task, TaskStream
from compo_jax.incremental.classifier import Head, logits, masked, task_columns
from compo_jax.incremental.features import feature_width, tangent_features
from compo_jax.incremental.fisher import task_fisher
from compo_jax.incremental.regularisers import Curvature, iel_penalty, ita_penalty, mean_entry
from compo_jax.incremental.settings import Method, Settings
from compo_jax.tree import Tree

Memory = dict[str, Any]


class Mode(NamedTuple):
    """What one task's training takes from the earlier ones. A memory has one structure from the first task to the
    last, and so a step is one program, whose cost doesn't know how many tasks there were.

    Attributes:
      memory: before the first task.
      begin: `(key, memory) -> module`, where training begins.
      hold: `memory -> held`, what stays fixed while a task is trained; made once a task.
      features: `(held, module, images) -> (images, features)`, the model in training.
      penalty: `(held, module, curvature, alpha) -> scalar`.
      scale: `(memory, curvature) -> scalar`, what alpha is divided by in relative units: the mean entry of the diagonal
        that the penalty is taken in; `curvature` is that of the tasks so far.
      distil: `(held, features, images, alpha) -> scalar` added to the cross-entropy; None for nothing.
      remember: `(memory, task, first, module, head, key) -> memory` after a task whose first class is number `first`.
    """

    memory: Memory
    begin: Callable[[jax.Array, Memory], Tree]
    hold: Callable[[Memory], Tree]
    features: Callable[[Tree, Tree, jax.Array], jax.Array]
    penalty: Callable[[Tree, Tree, Curvature, jax.Array], jax.Array]
    scale: Callable[[Memory, Curvature], jax.Array]
    distil: Callable[[Tree, jax.Array, jax.Array, jax.Array], jax.Array] | None
    remember: Callable[[Memory, Task, int, Tree, Head, jax.Array], Memory]


def independent(model, base: Tree, method: Method, *_) -> Mode:
    """Each module is trained alone, from the base (incremental task arithmetic); also one module on all tasks."""
    adapter = method.adapter
    forward = adapters.adapted(model, adapter)
    return Mode(
        memory={},
        begin=lambda key, memory: adapter.init(key, base),
        hold=lambda memory: {"base": base},
        features=lambda held, module, images: forward(held["base"], module, images, method="features"),
        penalty=lambda held, module, f, alpha: ita_penalty(adapter.delta(module, held["base"]), f, alpha),
        scale=lambda memory, curvature: mean_entry(curvature),
        distil=None,
        remember=lambda memory, *_: memory,
    )


def tangent(model, base: Tree, method: Method, *_) -> Mode:
    """The same for the model linearised at the base (tangent model composition; Liu and Soatto, 2023, arXiv
    2307.08114): features are `f(base) + Jf(base) Δ`. The loss stays the cross-entropy, where theirs is a square."""
    features = tangent_features(model)

    def linear(held, module, images):
        return features(held["base"], method.adapter.delta(module, held["base"]), images)

    return independent(model, base, method)._replace(features=linear)


def ensemble(model, base: Tree, method: Method, *_) -> Mode:
    """The composed model is trained, the earlier modules frozen in it (incremental ensemble learning): `W₀ +
    (1/T)(Σ_{s<t} Δ_s + Δ_t)`.

    The past is folded once a task: a sum of LoRA modules, whose ranks add up, into the weight; one of full deltas or of
    (IA)³, which is as large as each, into a module beside the base.
    """
    adapter = method.adapter
    forward = adapters.adapted(model, adapter)
    blank = adapter.scale(adapter.init(jax.random.key(0), base), base, 0.0)
    doubled = jax.eval_shape(lambda: adapter.sum([blank, blank], base, [1.0, 1.0]))
    closed = jax.tree.map(lambda x: x.shape, doubled) == jax.tree.map(lambda x: x.shape, blank)

    def hold(memory):
        past, tasks = memory["sum"], memory["tasks"] + 1
        if closed:
            return {"base": base, "module": past, "past": adapter.delta(past, base), "tasks": tasks}
        return {"base": tree.add(base, past, 1 / tasks), "past": past, "tasks": tasks}

    def features(held, module, images):
        share = 1 / held["tasks"]
        if closed:
            whole = adapter.sum([held["module"], module], held["base"], [share, share])
        else:
            whole = adapter.scale(module, held["base"], share)
        return forward(held["base"], whole, images, method="features")

    def remember(memory, task, first, module, head, key):
        if closed:
            total = adapter.sum([memory["sum"], module], base, [1.0, 1.0])
        else:
            total = tree.add(memory["sum"], adapter.delta(module, base))
        return {"sum": total, "tasks": memory["tasks"] + 1}

    return independent(model, base, method)._replace(
        memory={"sum": blank if closed else adapter.delta(blank, base), "tasks": jnp.zeros(())},
        hold=hold,
        features=features,
        penalty=lambda held, module, f, alpha: iel_penalty(
            adapter.delta(module, held["base"]), held["past"], f, alpha, held["tasks"]
        ),
        remember=remember,
    )


def sequential(model, base: Tree, method: Method, stream: TaskStream, settings: Settings, key: jax.Array) -> Mode:
    """One module is trained on and on."""
    return independent(model, base, method)._replace(
        memory={"module": method.adapter.init(key, base)},
        begin=lambda key, memory: memory["module"],
        remember=lambda memory, task, first, module, head, key: {**memory, "module": module},
    )


def ewc(model, base: Tree, method: Method, stream: TaskStream, settings: Settings, key: jax.Array) -> Mode:
    """Sequential, held by `½ λ Σ F̃ ⊙ (Δ - Δ_before)²` where F̃, the Fisher diagonal of each task at the weights that
    it left, is summed over the tasks with an older one's share falling by γ = 0.95 a task (online elastic weight
    consolidation; Schwarz et al., 2018, arXiv 1805.06370)."""
    plain = sequential(model, base, method, stream, settings, key)
    adapter, start = method.adapter, plain.memory["module"]
    adapted = [f"^{name}$" for name in tree.names(adapter.delta(start, base))]
    fisher = task_fisher(model, stream, settings, adapted, ["diagonal"])

    def remember(memory, task, first, module, head, key):
        params, classes = tree.add(base, adapter.delta(module, base)), len(task.classes)
        wide = task_columns(head, 0, classes, len(stream.classes))  # one shape, one compilation
        found = fisher.of(params, task.train, wide, 0, classes, key, seed=[first])["diagonal"].mean
        total = tree.weighted_sum([memory["fisher"], found], [0.95, 1.0])
        return {"module": module, "fisher": total, "tasks": 0.95 * memory["tasks"] + 1}

    return plain._replace(
        memory=plain.memory
        | {"fisher": jax.tree.map(jnp.zeros_like, adapter.delta(start, base)), "tasks": jnp.zeros(())},
        hold=lambda memory: {"base": base, "before": adapter.delta(memory["module"], base), "fisher": memory["fisher"]},
        penalty=lambda held, module, _, alpha: ita_penalty(
            tree.weighted_sum([adapter.delta(module, held["base"]), held["before"]], [1.0, -1.0]), held["fisher"], alpha
        ),
        scale=lambda memory, _: mean_entry(memory["fisher"]) / jnp.maximum(memory["tasks"], 1),  # of one task
        remember=remember,
    )


def lwf(model, base: Tree, method: Method, stream: TaskStream, settings: Settings, key: jax.Array) -> Mode:
    """Sequential, with the earlier classes' answers of the model before the task kept, on the task's own images, by
    distillation at temperature 2 (learning without forgetting; Li and Hoiem, 2016, arXiv 1606.09282). The earlier
    heads stand still."""
    plain = sequential(model, base, method, stream, settings, key)
    width, total = feature_width(model, base, stream), len(stream.classes)

    def remember(memory, task, first, module, head, key):
        put = lambda all, own: all.at[..., first : first + len(task.classes)].set(own)
        return {
            "module": module,
            "head": jax.tree.map(put, memory["head"], head),
            "seen": jnp.int32(first + len(task.classes)),
        }

    def distil(held, z, images, alpha):
        before = jax.lax.stop_gradient(logits(held["head"], plain.features(held, held["module"], images)))
        known = jnp.arange(total) < jnp.maximum(held["seen"], 1)  # of one class alone there is nothing to keep
        old, new = (
            jnp.where(known, jax.nn.log_softmax(masked(values, known) / 2), 0)
            for values in (before, logits(held["head"], z))
        )
        return alpha * 4 * jnp.mean(jnp.sum(jnp.where(known, jnp.exp(old) * (old - new), 0), axis=-1))

    head = {"kernel": jnp.zeros((width, total)), "bias": jnp.zeros(total)}
    return plain._replace(
        memory=plain.memory | {"head": head, "seen": jnp.int32(0)},
        hold=lambda memory: {"base": base, **memory},
        penalty=lambda *_: jnp.zeros(()),
        scale=lambda *_: jnp.ones(()),
        distil=distil,
        remember=remember,
    )


MODES = {
    "independent": independent,
    "ensemble": ensemble,
    "tangent": tangent,
    "sequential": sequential,
    "ewc": ewc,
    "lwf": lwf,
    "joint": independent,
}
