"""Different tasks merged into one network: which rule keeps most of what each module knows?

    python experiments/vision8.py                                          # eight rendered scripts, no download
    python experiments/vision8.py --data-dir DIR --backbone FILE           # eight small sets of real images
    python experiments/vision8.py --data mnist dtd64 cars64 eurosat64 --data-dir DIR --backbone FILE
    python experiments/vision8.py --data-dir DIR --zero-shot hf:openai/clip-vit-base-patch32

The protocol of task arithmetic (Ilharco et al., 2023, arXiv 2212.04089): each task has a linear head that is fitted on
the base's features, or with --zero-shot, as the field has it, made of its classes' names by CLIP's text tower, and
stays (the base's own row is the zero-shot one then); a module of each kind is trained for each task alone, and one for
all tasks together (joint); then the rules merge the modules, as merging.py does it, those that go by steps only where
they are named.
Absolute accuracy is a task's, among its own classes; normalised accuracy is that over the module's own; the accuracy
among all classes is of heads that were never put in scale with one another. All tasks get equally many steps. No image
is mirrored, for signs and letters would be others. Writes `runs/NAME/`: report.html, metrics.json, metrics.jsonl and
pools for each seed and kind. A killed run goes on behind its last module; its seconds are of the last start. A few
minutes on 2 CPU cores with no arguments. Expected numbers: README.md.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import job
import options as line
from incremental_options import Backbone
from job import closing, console
from merge_rules import A_TASK, BY_STEPS, RULES
from options import Count, LocalPath, Name, Names, OpenPath, Rate, Seeds, names

EIGHT = ("mnist", "gtsrb32", "eurosat64", "resisc64", "dtd64", "cars64", "scenes64", "letters64")
KINDS = ("lora", "full")
COMPARED = tuple(rule for rule in RULES if rule not in (*A_TASK, "slerp"))
QUICK = tuple(rule for rule in COMPARED if rule not in BY_STEPS)


@dataclass(frozen=True)
class Stream:
    """What is learned"""

    data: Names = ()
    """TFDS sets, a task each, or glyphs (default: eight small sets with --data-dir, else glyphs)"""
    data_dir: OpenPath = None
    """where TFDS has prepared the sets"""
    images: Count = 3000
    """training images of a task at most, drawn by the seed"""
    test_images: Count = 1000
    """test images of a task at most, drawn once"""


@dataclass(frozen=True)
class Texts:
    """What tells its classes apart"""

    zero_shot: OpenPath = None
    """CLIP, in a folder, a file or as hf:OWNER/NAME, whose texts make the heads; the base if --backbone names none"""
    token_ids: OpenPath = None
    """folder of the tasks' token ids, TASK.npz or TASK.json (default: made by the tokenizer.json beside that CLIP)"""


@dataclass(frozen=True)
class Training:
    """How it is learned"""

    kinds: Annotated[tuple[str, ...], names(KINDS)] = ("lora",)
    """of modules"""
    steps: Count = 100
    """of a module's training; the joint one gets as many for each task"""
    batch: Count = 32
    """images in a step"""
    rank: Count = 8
    """of LoRA modules"""
    learning_rate: Rate = 3e-3
    """of LoRA modules, at its highest"""
    full_learning_rate: Rate = 3e-4
    """of full deltas, at its highest"""


@dataclass(frozen=True)
class Merging:
    """How it is merged"""

    rules: Annotated[tuple[str, ...], names(COMPARED)] = QUICK
    """rules to compare (default: those that go by no steps)"""
    curvature_images: Count = 64
    """training images of a task for its module's curvature"""


@dataclass(frozen=True)
class Place:
    """The run"""

    seeds: Seeds = (0,)
    """of the images, the modules and the batches"""
    name: Name = None
    """folder of the run (default: vision8-DATA)"""
    runs: LocalPath = Path("runs")
    """folder of the runs"""


@dataclass(frozen=True)
class Options:
    stream: Stream
    backbone: Backbone
    texts: Texts
    training: Training
    merging: Merging
    place: Place


def parse(arguments: list[str] | None = None) -> Options:
    options = line.parse(Options, __doc__, arguments)
    data = options.stream.data or (("glyphs",) if options.stream.data_dir is None else EIGHT)
    if not options.training.kinds or not options.merging.rules or not options.place.seeds:
        raise ValueError("--kinds, --rules and --seeds need one value at least")
    if options.texts.zero_shot is None:
        line.refuse(options.texts, "without --zero-shot", "token_ids")
    if data == ("glyphs",):
        line.refuse(options.stream, "with glyphs, which are rendered", "data_dir")
    name = options.place.name or line.plain("vision8-" + ("sets" if data == EIGHT else "+".join(data)))
    return dataclasses.replace(
        options,
        stream=dataclasses.replace(options.stream, data=data),
        place=dataclasses.replace(options.place, name=name),
    )


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import jax.numpy as jnp
import merging
import numpy as np
import optax
from class_texts import zero_shot_head
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from compo_jax import adapters, data, incremental, models, report, tree
from compo_jax.compose.rule_results import MergingResults, MergingRun
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints, fit, init_state, jit_runner, open_run, progress_bar, write_result


class Bench(NamedTuple):
    """What all modules of a seed share: the run that they come to, without pools, and where a training is told."""

    run: incremental.FinishedRun
    options: Options
    seed: int
    watched: dict


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
        rows = np.random.default_rng(seed).permutation(len(split))
        _, first = np.unique(split.labels[rows], return_index=True)
        rows = np.concatenate([rows[first], np.delete(rows, first)])[:count]
        return data.SubsetSplit(split, np.sort(rows))

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
    return incremental.method("none", adapters.full(), learning_rate=how.full_learning_rate)


def trainer(bench: Bench, kind: str, steps: int) -> Callable[[str, list[int], Path], dict]:
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
        return optax.softmax_cross_entropy_with_integer_labels(values, batch["label"]).mean(), {"accuracy": accuracy}

    schedule = optax.warmup_cosine_decay_schedule(0.0, way.learning_rate, max(steps // 20, 1), steps)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    runner = jit_runner(loss, transform)

    def train(name, tasks, folder):
        split = data.JoinedSplit([stream.tasks[t].train for t in tasks], [stream.offsets[t] for t in tasks])
        key = jax.random.fold_in(jax.random.key(bench.seed), tasks[0])
        state = init_state(mode.begin(key, {}, stream.tasks[tasks[0]]), transform)
        context = {"held": mode.hold({}), "head": jax.tree.map(jnp.asarray, run.head)}
        batches = lambda start: data.train_batches(split, how.batch, [bench.seed, tasks[0]], start=start)
        record = {"run": f"{kind} {name}", "task": f"seed {bench.seed}"}
        watched = {"record": record, "checkpoints": Checkpoints(folder), **bench.watched}
        return jax.tree.map(np.asarray, fit(runner, state, context, batches, steps, **watched).params)

    return train


def learned(bench: Bench, kind: str) -> tuple[ModulePool, np.ndarray]:
    """(the pool of the tasks' modules, what one module of all tasks reaches on each); made where it isn't there."""
    run, adapter, steps = bench.run, method(bench.options, kind).adapter, bench.options.training.steps
    stream, fingerprint = run.stream, tree.fingerprint(run.base)
    pool, joint = (ModulePool(run.folder / "pools" / f"{kind}{end}-{bench.seed}") for end in ("", "-joint"))
    every = list(range(len(stream.tasks)))
    modules = {incremental.modes.each_task(stream, t).module: [t] for t in every}
    for place, wanted in ((pool, modules), (joint, {"joint": every})):
        missing = {name: tasks for name, tasks in wanted.items() if name not in place}
        train = trainer(bench, kind, steps * len(every) if place is joint else steps)
        for name, tasks in missing.items():
            clock = time.perf_counter()
            checkpoints = run.folder / "checkpoints" / f"{kind}-{bench.seed}-{name}"
            module = train(name, tasks, checkpoints)
            first, count = stream.offsets[tasks[0]], sum(len(stream.tasks[t].classes) for t in tasks)
            head = incremental.task_columns(run.head, first, count, count)
            place.add(
                name, module, base=fingerprint, adapter=adapter, task=" ".join(stream.tasks[t].name for t in tasks),
                classes=[f"{stream.tasks[t].name} {c}" for t in tasks for c in stream.tasks[t].classes],
                seed=bench.seed, head=head, start=head,
            )  # fmt: skip
            shutil.rmtree(checkpoints, ignore_errors=True)
            console.print(f"seed {bench.seed}: {kind} {name} trained in {time.perf_counter() - clock:.0f} s")
    test = incremental.evaluator(incremental.features(run.model, stream, 128), stream)
    return pool, test(joint.compose(run.base, ["joint"], [1.0]), run.head, len(every)).within


# -- merged ------------------------------------------------------------------------------------------------------------
def measured(bench: Bench, programs: dict) -> MergingRun:
    """The modules of a seed under every rule."""
    options, merges = bench.options, {}
    for kind in options.training.kinds:
        pool, joint = learned(bench, kind)
        run, how = bench.run._replace(pools={kind: pool}), options.merging
        run = run._replace(folder=bench.run.folder / f"seed-{bench.seed}")
        merges[kind] = merging.merged_pool(
            run, kind, how.rules, programs, how.curvature_images, bench.seed, joint, known=True
        )
    run = merging.merged_run(bench.run, merges)
    return run._replace(run=f"seed {bench.seed}", seed=bench.seed)


def main(arguments: list[str] | None = None) -> None:
    options, began = parse(arguments), time.perf_counter()
    where, texts, place = options.backbone, options.texts, options.place
    job.divisible(options.training.batch, "--batch")
    file = where.backbone or texts.zero_shot
    backbone = models.backbone(file, where.heads, where.image_size, where.dtype, where.activation)
    model, base, described, _ = backbone
    streams = {seed: backbone.normalised(open_tasks(options, model.image_size, seed)) for seed in place.seeds}
    stream, head = next(iter(streams.values())), None
    if texts.zero_shot:
        model, described = model.copy(unit=True), f"{described}, heads of {texts.zero_shot.name}'s texts"
        width = incremental.feature_width(model, base, stream)
        head = zero_shot_head(texts.zero_shot, stream, width, where.activation, texts.token_ids)
    fewest = min(len(task.train) for stream in streams.values() for task in stream.tasks)
    if max(options.merging.curvature_images, options.training.batch) > fewest:
        raise ValueError(f"a task has {fewest} training images: --curvature-images and --batch are as many at most")
    console.print(f"{described}; {', '.join(task.name for task in stream.tasks)}; {len(stream.classes)} classes")
    config = {key: value for key, value in line.flat(options).items() if key not in ("runs", "seeds", "rules")}
    with open_run(place.runs / place.name, config) as run, progress_bar(console=console) as progress:
        programs, runs = {}, []
        for seed, stream in streams.items():
            columns = fitted_head(model, base, stream) if head is None else head
            finished = incremental.FinishedRun(run.folder, {"seed": seed}, model, base, described, stream, {}, columns)
            runs.append(measured(Bench(finished, options, seed, {"log": run.log, "progress": progress}), programs))
        seconds = time.perf_counter() - began
        results = MergingResults(place.name, stream.name, described, options.merging.curvature_images, runs, seconds)
        write_result(run.folder / "metrics.json", results)
        path = report.merging_page(run.folder, results)
    for table in report.merging_tables(results):
        console.print(table.rich())
    console.print(f"{results.seconds:.0f} s; report: {path}")


if __name__ == "__main__":
    closing(main)
