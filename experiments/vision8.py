"""Different tasks merged into one network: which rule keeps most of what each module knows?

    python experiments/vision8.py                                          # eight rendered scripts, no download
    python experiments/vision8.py --data-dir DIR --backbone FILE           # eight small sets of real images
    python experiments/vision8.py --data mnist dtd64 cars64 eurosat64 --data-dir DIR --backbone FILE
    python experiments/vision8.py --data-dir DIR --zero-shot hf:openai/clip-vit-base-patch32
    python experiments/vision8.py --kinds linear tak                       # modules to be added, and subtracted

The protocol of task arithmetic (Ilharco et al., 2023, arXiv 2212.04089): each task has a linear head that is fitted on
the base's features, or with --zero-shot, as the field has it, made of its classes' names by CLIP's text tower, and
stays (the base's own row is the zero-shot one then); a module of each kind is trained for each task alone, and one for
all tasks together (joint); then the rules merge the modules, as merging.py does it, those that go by steps only where
they are named. Modules of the linearised model (kinds linear and tak) are averaged, added, and each taken off the base,
in that model; coefficients, and TAK's strength, are chosen by a fifth of the training images, which no kind learns from
then.
Absolute accuracy is a task's, among its own classes; normalised accuracy is that over the module's own; the accuracy
among all classes is of heads that were never put in scale with one another. All tasks get equally many steps. No image
is mirrored, for signs and letters would be others. Writes `runs/NAME/`: report.html, metrics.json, metrics.jsonl and
pools for each seed and kind. A killed run goes on behind its last module, and then its last rule; its seconds are of
the last start. A few minutes on 2 CPU cores with no arguments. Expected numbers: README.md.
"""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import job
import options as line
from job import closing, console
from vision8_options import LINEAR, Options, parse

parse = partial(parse, documentation=__doc__)

if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import jax.numpy as jnp
import merging
import numpy as np
import optax
import vision8_tak as tak
from class_texts import zero_shot_head
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from compo_jax import adapters, curvature, data, incremental, models, report, tree
from compo_jax.compose.rule_results import MergingResults, MergingRun, PoolMerges
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints, fit, init_state, jit_runner, open_run, progress_bar, write_result


class Bench(NamedTuple):
    """What all modules of a seed share: the run that they come to, without pools, where a training is told, and the
    tasks with training images that were left out as their tests, where there are linear kinds."""

    run: incremental.FinishedRun
    options: Options
    seed: int
    watched: dict
    validation: data.TaskStream | None


# -- tasks and heads ---------------------------------------------------------------------------------------------------
def open_tasks(options: Options, size: int, seed: int) -> data.TaskStream:
    """The tasks, each with so many images at most."""
    where = options.stream
    stream = data.open_tasks(where.data, size, data_dir=where.data_dir, tasks=8 if "glyphs" in where.data else None)
    if len(stream.tasks) < 2:
        raise ValueError(f"{stream.name} is one task, and there is nothing to merge: name two sets at least")

    def some(task, split, count, seed):
        """`count` images, one of each class at least."""
        if count < len(task.classes):
            raise ValueError(f"{task.name} has {len(task.classes)} classes, and {count} images are not one of each")
        return data.SubsetSplit(split, np.sort(tak.shuffled(split, seed)[:count]))

    tasks = [
        task._replace(
            train=some(task, task.train, where.images, [seed, t]), test=some(task, task.test, where.test_images, t)
        )
        for t, task in enumerate(stream.tasks)
    ]
    return stream._replace(tasks=tuple(tasks), augment=None)


def fitted_head(model, base, stream: data.TaskStream) -> incremental.classifier.Head:
    """The tasks' heads side by side, each by logistic regression on the base's features, their scale taken out."""
    extract, heads = incremental.features(model, stream, 128), []
    for task in stream.tasks:
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        scale, linear = (step for _, step in fitted.fit(extract(base, task.train), task.train.labels).steps)
        columns, bias = linear.coef_, linear.intercept_
        if len(task.classes) == 2:  # one row says all of two classes
            columns, bias = np.stack([-columns[0], columns[0]]) / 2, np.stack([-bias[0], bias[0]]) / 2
        kernel = columns / scale.scale_
        heads.append({"kernel": kernel.T, "bias": bias - kernel @ scale.mean_})
    return jax.tree.map(lambda *parts: np.concatenate(parts, -1).astype(np.float32), *heads)


# -- modules -----------------------------------------------------------------------------------------------------------
def method(options: Options, kind: str) -> incremental.Method:
    how = options.training
    if kind == "lora":
        return incremental.method("none", adapters.lora(how.rank), learning_rate=how.learning_rate)
    way, rate = ("tmc", how.linear_learning_rate) if kind in LINEAR else ("none", how.full_learning_rate)
    return incremental.method(way, adapters.full(), learning_rate=rate)


def trainer(
    bench: Bench, kind: str, steps: int, penalty: tak.Penalty | None = None
) -> Callable[[str, list[int], Path], dict]:
    """What trains a module around the base on these tasks, under their heads, which stay; each image is told apart from
    its own task's classes."""
    run, how, stream = bench.run, bench.options.training, bench.run.stream
    setup = incremental.Setup(run.model, run.base, stream, incremental.Settings(batch=how.batch), bench.seed)
    way = method(bench.options, kind)
    mode = way.mode(setup, way)
    owner = jnp.asarray(np.repeat(np.arange(len(stream.tasks)), [len(task.classes) for task in stream.tasks]))

    def loss(module, context, batch, step):
        z = mode.features(context["held"], module, stream.prepare(batch["image"]))
        values = incremental.classifier.logits(context["head"], z)
        values = jnp.where(owner == owner[batch["label"]][:, None], values, -jnp.inf)
        accuracy = jnp.mean(values.argmax(-1) == batch["label"])
        value = optax.softmax_cross_entropy_with_integer_labels(values, batch["label"]).mean()
        if penalty is not None:
            delta = way.adapter.delta(module, context["held"]["base"])
            value += context["strength"] * context["others"].quadratic(delta)
        return value, {"accuracy": accuracy}

    schedule = optax.warmup_cosine_decay_schedule(0.0, way.learning_rate, min(max(steps // 20, 1), steps - 1), steps)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    runner = jit_runner(loss, transform)

    def train(name, tasks, folder):
        split = data.JoinedSplit([stream.tasks[t].train for t in tasks], [stream.offsets[t] for t in tasks])
        key = jax.random.fold_in(jax.random.key(bench.seed), tasks[0])
        state = init_state(mode.begin(key, {}, stream.tasks[tasks[0]]), transform)
        context = {"held": mode.hold({}), "head": jax.tree.map(jnp.asarray, run.head)}
        if penalty is not None:
            (task,) = tasks
            context |= {"others": penalty.others[task], "strength": jnp.asarray(penalty.strength)}
        batches = lambda start: data.train_batches(split, how.batch, [bench.seed, tasks[0]], start=start)
        record = {"run": f"{kind} {name}", "task": f"seed {bench.seed}"}
        watched = {"record": record, "checkpoints": Checkpoints(folder), **bench.watched}
        return jax.tree.map(np.asarray, fit(runner, state, context, batches, steps, **watched).params)

    return train


def learned(bench: Bench, kind: str, penalty: tak.Penalty | None = None) -> tuple[ModulePool, np.ndarray]:
    """(the pool of the tasks' modules, what one module of all tasks reaches on each); made where it isn't there."""
    label, around = kind if penalty is None else f"{kind}-{penalty.strength}", None
    if kind in LINEAR:  # the joint module has no other tasks to stay clear of, and is the same for both
        kind, around = "linear", bench.run.base
    run, adapter, steps = bench.run, method(bench.options, kind).adapter, bench.options.training.steps
    stream, fingerprint = run.stream, tree.fingerprint(run.base)
    pool, joint = (ModulePool(run.folder / "pools" / f"{one}-{bench.seed}") for one in (label, f"{kind}-joint"))
    every = list(range(len(stream.tasks)))
    modules = {incremental.modes.each_task(stream, t).module: [t] for t in every}
    for place, of, wanted in ((pool, label, modules), (joint, kind, {"joint": every})):
        missing = {name: tasks for name, tasks in wanted.items() if name not in place}
        many, of_place = (steps * len(every), None) if place is joint else (steps, penalty)
        train = trainer(bench, kind, many, of_place)
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
    test = incremental.evaluator(incremental.features(run.model, stream, 128, around), stream)
    return pool, test(joint.compose(run.base, ["joint"], [1.0]), run.head, len(every)).within


def disentangled(bench: Bench, kind: str) -> PoolMerges:
    """A pool of the linearised model; of several strengths the one whose modules, added, do best on images left out."""
    how, penalties = bench.options.training, [None]
    if kind == "tak":
        others = curvature.factors_of_others(tak.shared_factors(bench.run, how.factor_images, bench.seed))
        penalties = [tak.Penalty(strength, others) for strength in how.strengths]
    best = None
    for penalty in penalties:
        strength = 0.0 if penalty is None else penalty.strength
        pool, joint = learned(bench, kind, penalty)
        sweep = tak.weighed(bench.run, list(pool.deltas(bench.run.base)), bench.validation).sweep()
        reached = float(sweep.added[-1].mean())
        console.print(f"seed {bench.seed}: {kind}, strength {strength:g}: added, on validation images {reached:.3f}")
        if best is None or reached > best[0]:
            best = reached, pool, joint, sweep, strength
    return tak.merged(bench.run, *best[1:])


# -- merged ------------------------------------------------------------------------------------------------------------
def some(bench: Bench, kind: str, pool: ModulePool, tasks: range) -> incremental.FinishedRun:
    """The run of these tasks alone, with their modules and their heads."""
    run = bench.run
    place = slice(tasks.start, tasks.stop)
    part = run.stream._replace(tasks=run.stream.tasks[place])
    folder = run.folder / together(tasks) / f"seed-{bench.seed}"
    kept = ModulePool(folder / "pools" / kind)
    for module in pool.names()[place]:
        merging.copy(pool, kept, module)
    head = incremental.task_columns(run.head, run.stream.offsets[tasks.start], *[len(part.classes)] * 2)
    return run._replace(folder=folder, stream=part, pools={kind: kept}, head=head)


def together(tasks: range) -> str:
    """The name of their folder."""
    return f"tasks-{tasks.start + 1}-{tasks.stop}"


def measured(bench: Bench, programs: dict[tuple[str, int], dict[str, merging.Program]]) -> dict[range, MergingRun]:
    """The modules of a seed under every rule, all tasks at once, and so many as --together says."""
    how, count = bench.options.merging, len(bench.run.stream.tasks)
    groups = [range(i, i + n) for n in how.together for i in range(0, count - n + 1, n)]
    merges, runs = {tasks: {} for tasks in (range(count), *groups)}, {}
    for kind in bench.options.training.kinds:
        if kind in LINEAR:
            merges[range(count)][kind] = disentangled(bench, kind)
            continue
        pool, joint = learned(bench, kind)
        runs[range(count)] = bench.run._replace(folder=bench.run.folder / f"seed-{bench.seed}", pools={kind: pool})
        runs |= {tasks: some(bench, kind, pool, tasks) for tasks in groups}
        for tasks, run in runs.items():
            compiled = programs.setdefault((kind, len(tasks)), {})
            of_all = joint if len(tasks) == count else None
            unfinished = bench.run.folder / "unfinished" / f"{together(tasks)}-{kind}-{bench.seed}"
            merges[tasks][kind] = merging.merged_pool(
                run, kind, how.rules, compiled, how.curvature_images, bench.seed, unfinished, of_all, known=True
            )
    return {
        tasks: merging.merged_run(runs.get(tasks, bench.run), pools)._replace(run=f"seed {bench.seed}", seed=bench.seed)
        for tasks, pools in merges.items()
        if pools
    }


class Opened(NamedTuple):
    """What the command line names: a backbone, its tasks by seed, with images left out where there are linear kinds,
    and the heads of texts, if any."""

    model: models.ViT
    base: dict
    described: str
    streams: dict[int, data.TaskStream]
    validation: dict[int, data.TaskStream | None]
    head: dict | None


def opened(options: Options) -> Opened:
    where, texts, seeds = options.backbone, options.texts, options.place.seeds
    file = where.backbone or texts.zero_shot
    backbone = models.backbone(file, where.heads, where.image_size, where.dtype, where.activation)
    model, base, described, _ = backbone
    streams = {seed: backbone.normalised(open_tasks(options, model.image_size, seed)) for seed in seeds}
    validation = dict.fromkeys(streams)
    if set(LINEAR) & set(options.training.kinds):
        parts = {seed: tak.held_out(stream, seed) for seed, stream in streams.items()}
        streams, validation = ({seed: one[i] for seed, one in parts.items()} for i in (0, 1))
    stream, head = next(iter(streams.values())), None
    if any(not 2 <= n < len(stream.tasks) for n in options.merging.together):
        raise ValueError(f"--together is two tasks at least and less than all, and there are {len(stream.tasks)}")
    for one in streams.values():
        job.enough_images(one.tasks, options.training.batch, "--batch")
        if set(options.training.kinds) - set(LINEAR):
            job.enough_images(one.tasks, options.merging.curvature_images, "--curvature-images")
    if texts.zero_shot:
        model, described = model.copy(unit=True), f"{described}, heads of {texts.zero_shot.name}'s texts"
        width = incremental.feature_width(model, base, stream)
        head = zero_shot_head(texts.zero_shot, stream, width, where.activation, texts.token_ids)
    return Opened(model, base, described, streams, validation, head)


def main(arguments: list[str] | None = None) -> None:
    options, began = parse(arguments), time.perf_counter()
    place, images = options.place, options.merging.curvature_images
    job.divisible(options.training.batch, "--batch")
    model, base, described, streams, validation, head = opened(options)
    stream = next(iter(streams.values()))
    console.print(f"{described}; {', '.join(task.name for task in stream.tasks)}; {len(stream.classes)} classes")
    untold = ("runs", "seeds", "kinds", "rules", "strengths", "together")  # that a run may go on with others
    config = {key: value for key, value in line.flat(options).items() if key not in untold}
    config["left_out"] = bool(set(LINEAR) & set(options.training.kinds))  # a part of the training images
    with open_run(place.runs / place.name, config) as run, progress_bar(console=console) as progress:
        programs, runs = {}, {}
        for seed, stream in streams.items():
            columns = fitted_head(model, base, stream) if head is None else head
            finished = incremental.FinishedRun(run.folder, {"seed": seed}, model, base, described, stream, {}, columns)
            bench = Bench(finished, options, seed, {"log": run.log, "progress": progress}, validation[seed])
            for tasks, merged in measured(bench, programs).items():
                runs.setdefault(tasks, []).append(merged)
        for tasks, of_seeds in reversed(runs.items()):
            whole = len(tasks) == len(stream.tasks)
            folder = run.folder if whole else run.folder / together(tasks)
            name = place.name if whole else f"{place.name}, {together(tasks)}"
            sets = stream.name if whole else "+".join(of_seeds[0].tasks)
            seconds = time.perf_counter() - began
            results = MergingResults(name, sets, described, images, of_seeds, seconds)
            write_result(folder / "metrics.json", results)
            path = report.merging_page(folder, results)
            for table in report.merging_tables(results):
                console.print(table.rich())
        shutil.rmtree(run.folder / "unfinished", ignore_errors=True)  # where there are linear kinds alone
    console.print(f"{results.seconds:.0f} s; report: {path}")


if __name__ == "__main__":
    closing(main)
