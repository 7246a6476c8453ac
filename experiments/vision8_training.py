"""vision8's modules: how each kind is trained around the base, under heads that stay."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import vision8_added as added
from job import console
from vision8_options import LINEAR, Options

from compo_jax import adapters, data, incremental, tree
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints, fit, init_state, jit_runner


class Bench(NamedTuple):
    """What all modules of a seed share: the run that they come to, without pools, where a training is told, and the
    tasks with training images that were left out as their tests, where there are kinds to be added."""

    run: incremental.FinishedRun
    options: Options
    seed: int
    watched: dict
    validation: data.TaskStream | None


def method(options: Options, kind: str) -> incremental.Method:
    how = options.training
    if kind == "lora":
        return incremental.method("none", adapters.lora(how.rank), learning_rate=how.learning_rate)
    way, rate = ("tmc", how.linear_learning_rate) if kind in LINEAR else ("none", how.full_learning_rate)
    return incremental.method(way, adapters.full(), learning_rate=rate)


def learning(bench: Bench, kind: str, mode: incremental.modes.Mode, steps: int, penalised: bool) -> Callable:
    """`(params, context, batch, step) -> (loss, metrics)` of `params["module"]`; each image is told apart from its own
    task's classes.

    DELTA's module learns beside a linear teacher, `params["teacher"]`, and from it, both with the same part of their
    deltas in place, which each step draws.
    """
    run, stream = bench.run, bench.run.stream
    adapter, tangent = method(bench.options, kind).adapter, incremental.tangent_features(run.model)
    owner = jnp.asarray(np.repeat(np.arange(len(stream.tasks)), [len(task.classes) for task in stream.tasks]))

    def told_apart(module, features, context, labels):
        values = incremental.classifier.logits(context["head"], features)
        values = jnp.where(owner == owner[labels][:, None], values, -jnp.inf)
        value = optax.softmax_cross_entropy_with_integer_labels(values, labels).mean()
        if penalised:
            delta = adapter.delta(module, context["held"]["base"])
            value += context["strength"] * context["others"].quadratic(delta)
        return value, {"accuracy": jnp.mean(values.argmax(-1) == labels)}

    def alone(params, context, batch, step):
        features = mode.features(context["held"], params["module"], stream.prepare(batch["image"]))
        return told_apart(params["module"], features, context, batch["label"])

    def with_teacher(params, context, batch, step):
        images, held = stream.prepare(batch["image"]), context["held"]
        part = added.along_path(jax.random.fold_in(context["key"], step), step / steps)
        partly = jax.tree.map(lambda x: part * x, params)
        features = mode.features(held, partly["module"], images)
        shown = tangent(held["base"], adapter.delta(partly["teacher"], held["base"]), images)
        value, metrics = told_apart(params["module"], features, context, batch["label"])
        value += told_apart(params["teacher"], shown, context, batch["label"])[0]
        return value + bench.options.training.distillation * added.distance(features, shown), metrics

    return with_teacher if kind == "delta" else alone


def trainer(
    bench: Bench, kind: str, steps: int, penalty: added.Penalty | None = None
) -> Callable[[str, list[int], Path], dict]:
    """What trains a module around the base on these tasks."""
    run, how, stream = bench.run, bench.options.training, bench.run.stream
    setup = incremental.Setup(run.model, run.base, stream, incremental.Settings(batch=how.batch), bench.seed)
    way = method(bench.options, kind)
    mode, learners = way.mode(setup, way), ("module", "teacher") if kind == "delta" else ("module",)
    schedule = optax.warmup_cosine_decay_schedule(0.0, way.learning_rate, min(max(steps // 20, 1), steps - 1), steps)
    one = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    transform = optax.partition(dict.fromkeys(learners, one), {name: name for name in learners})
    runner = jit_runner(learning(bench, kind, mode, steps, penalty is not None), transform)

    def train(name, tasks, folder):
        split = data.JoinedSplit([stream.tasks[t].train for t in tasks], [stream.offsets[t] for t in tasks])
        key = jax.random.fold_in(jax.random.key(bench.seed), tasks[0])
        start = mode.begin(key, {}, stream.tasks[tasks[0]])
        state = init_state(dict.fromkeys(learners, start), transform)
        context = {"held": mode.hold({}), "head": jax.tree.map(jnp.asarray, run.head), "key": key}
        if penalty is not None:
            (task,) = tasks
            context |= {"others": penalty.others[task], "strength": jnp.asarray(penalty.strength)}
        batches = lambda start: data.train_batches(split, how.batch, [bench.seed, tasks[0]], start=start)
        record = {"run": f"{kind} {name}", "task": f"seed {bench.seed}"}
        watched = {"record": record, "checkpoints": Checkpoints(folder), **bench.watched}
        return jax.tree.map(np.asarray, fit(runner, state, context, batches, steps, **watched).params["module"])

    return train


def learned(bench: Bench, kind: str, penalty: added.Penalty | None = None) -> tuple[ModulePool, np.ndarray]:
    """(the pool of the tasks' modules, what one module of all tasks reaches on each); made where it isn't there."""
    label = kind if penalty is None else f"{kind}-{penalty.strength}"
    common = {"tak": "linear", "delta": "full"}.get(kind, kind)  # a joint module has no other tasks to stay clear of
    run, adapter, steps = bench.run, method(bench.options, kind).adapter, bench.options.training.steps
    stream, fingerprint = run.stream, tree.fingerprint(run.base)
    pool, joint = (ModulePool(run.folder / "pools" / f"{one}-{bench.seed}") for one in (label, f"{common}-joint"))
    every = list(range(len(stream.tasks)))
    modules = {incremental.modes.each_task(stream, t).module: [t] for t in every}
    for place, of, as_kind, wanted in ((pool, label, kind, modules), (joint, common, common, {"joint": every})):
        missing = {name: tasks for name, tasks in wanted.items() if name not in place}
        many, of_place = (steps * len(every), None) if place is joint else (steps, penalty)
        train = trainer(bench, as_kind, many, of_place)
        for name, tasks in missing.items():
            clock = time.perf_counter()
            checkpoints = run.folder / "checkpoints" / f"{of}-{bench.seed}-{name}"
            module = train(name, tasks, checkpoints)
            first, count = stream.offsets[tasks[0]], sum(len(stream.tasks[t].classes) for t in tasks)
            head = incremental.task_columns(run.head, first, count, count)
            place.add(
                name, module, base=fingerprint, adapter=adapter, task=" ".join(stream.tasks[t].name for t in tasks),
                classes=[f"{stream.tasks[t].name} {c}" for t in tasks for c in stream.tasks[t].classes],
                seed=bench.seed, head=head, start=head,
            )  # fmt: skip
            shutil.rmtree(checkpoints, ignore_errors=True)
            console.print(f"seed {bench.seed}: {of} {name} trained in {time.perf_counter() - clock:.0f} s")
    around = run.base if kind in LINEAR else None
    test = incremental.evaluator(incremental.features(run.model, stream, 128, around), stream)
    return pool, test(joint.compose(run.base, ["joint"], [1.0]), run.head, len(every)).within
