"""Different tasks merged into one network: which rule keeps most of what each module knows?

    python experiments/vision8.py                                          # eight rendered scripts, no download
    python experiments/vision8.py --data-dir DIR --backbone FILE           # eight small sets of real images
    python experiments/vision8.py --data mnist dtd64 cars64 eurosat64 --data-dir DIR --backbone FILE
    python experiments/vision8.py --data-dir DIR --zero-shot hf:openai/clip-vit-base-patch32
    python experiments/vision8.py --kinds linear tak delta                 # modules to be added, and subtracted

The protocol of task arithmetic (Ilharco et al., 2023, arXiv 2212.04089): each task has a linear head that is fitted on
the base's features, or with --zero-shot, as the field has it, made of its classes' names by CLIP's text tower, and
stays (the base's own row is the zero-shot one then); a module of each kind is trained for each task alone, and one for
all tasks together (joint); then the rules merge the modules, as merging.py does it, those that go by steps only where
they are named. Modules that are made to be added (linear and tak, of the linearised model, and delta) are
averaged, added, and each taken off the base; coefficients, and the strength of the penalty, are chosen by a fifth of
the training images, which no kind learns from then.
Absolute accuracy is a task's, among its own classes; normalised accuracy is that over the module's own; the accuracy
among all classes is of heads that were never put in scale with one another. All tasks get equally many steps. No image
is mirrored, for signs and letters would be others. Writes `runs/NAME/`: report.html, metrics.json, metrics.jsonl and
pools for each seed and kind. A killed run goes on behind its last module, and then its last rule; its seconds are of
the last start. A few minutes on 2 CPU cores with no arguments. Expected numbers: README.md.
"""

import itertools
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import job
import options as line
from job import closing, console
from vision8_options import ADDED, HELD, MERGED, Options, parse

parse = partial(parse, documentation=__doc__)

if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import merge_bench
import numpy as np
import vision8_added as added
from class_texts import zero_shot_head
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from vision8_training import Bench, learned

from compo_jax import curvature, data, incremental, models, report
from compo_jax.compose.rule_results import MergingResults, MergingRun, PoolMerges
from compo_jax.pool import ModulePool
from compo_jax.train import open_run, progress_bar, write_result


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
        return data.SubsetSplit(split, np.sort(added.shuffled(split, seed)[:count]))

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


# -- merged ------------------------------------------------------------------------------------------------------------
def disentangled(bench: Bench, kind: str) -> PoolMerges:
    """A pool that is made to be added, of the strength by which modules, added, do best on images left out."""
    how, run, penalties = bench.options.training, bench.run, [None]
    if kind in HELD:
        others = curvature.factors_of_others(added.shared_factors(run, how.factor_images, bench.seed))
        penalties = [added.Penalty(strength, others) for strength in how.strengths]
    best = None
    for penalty in penalties:
        strength = 0.0 if penalty is None else penalty.strength
        pool, joint = learned(bench, kind, penalty)
        test = added.reached(run, kind, list(pool.deltas(run.base)), bench.validation)
        sweep = added.sweep(test, len(run.stream.tasks), added.COEFFICIENTS[kind])
        reached = float(sweep.added[-1].mean())
        console.print(f"seed {bench.seed}: {kind}, strength {strength:g}: added, on validation images {reached:.3f}")
        if best is None or reached > best[0]:
            best = reached, pool, joint, sweep, strength
    return added.merged(run, kind, *best[1:])


def some(bench: Bench, kind: str, pool: ModulePool, tasks: range) -> incremental.FinishedRun:
    """The run of these tasks alone, with their modules and their heads."""
    run = bench.run
    place = slice(tasks.start, tasks.stop)
    part = run.stream._replace(tasks=run.stream.tasks[place])
    folder = run.folder / together(tasks) / f"seed-{bench.seed}"
    kept = ModulePool(folder / "pools" / kind)
    for module in pool.names()[place]:
        merge_bench.copy(pool, kept, module)
    head = incremental.task_columns(run.head, run.stream.offsets[tasks.start], *[len(part.classes)] * 2)
    return run._replace(folder=folder, stream=part, pools={kind: kept}, head=head)


def together(tasks: range) -> str:
    """The name of their folder."""
    return f"tasks-{tasks.start + 1}-{tasks.stop}"


def unfinished(folder: Path, tasks: range, kind: str, seed: int) -> Path:
    """The folder of what was tested of these tasks, for a run that is killed to go on."""
    return folder / "unfinished" / f"{together(tasks)}-{kind}-{seed}"


def measured(bench: Bench, programs: dict[tuple[str, int], dict[str, merge_bench.Program]]) -> dict[range, MergingRun]:
    """The modules of a seed under every rule, all tasks at once, and so many as --together says."""
    how, count = bench.options.merging, len(bench.run.stream.tasks)
    groups = [range(i, i + n) for n in how.together for i in range(0, count - n + 1, n)]
    merges, runs = {tasks: {} for tasks in (range(count), *groups)}, {}
    for kind in bench.options.training.kinds:
        if kind in ADDED:
            merges[range(count)][kind] = disentangled(bench, kind)
            continue
        pool, joint = learned(bench, kind)
        runs[range(count)] = bench.run._replace(folder=bench.run.folder / f"seed-{bench.seed}", pools={kind: pool})
        runs |= {tasks: some(bench, kind, pool, tasks) for tasks in groups}
        for tasks, run in runs.items():
            compiled = programs.setdefault((kind, len(tasks)), {})
            of_all = joint if len(tasks) == count else None
            rest = unfinished(bench.run.folder, tasks, kind, bench.seed)
            merges[tasks][kind] = merge_bench.merged_pool(
                run, kind, how.rules, compiled, how.curvature_images, bench.seed, rest, of_all, known=True
            )
    own = {"run": f"seed {bench.seed}", "seed": bench.seed}
    return {
        tasks: merge_bench.merged_run(runs.get(tasks, bench.run), pools)._replace(**own)
        for tasks, pools in merges.items()
        if pools
    }


class Opened(NamedTuple):
    """What the command line names: a backbone, its tasks by seed, with images left out where there are kinds to be
    added, and the heads of texts, if any."""

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
    if set(ADDED) & set(options.training.kinds):
        parts = {seed: added.held_out(stream, seed) for seed, stream in streams.items()}
        streams, validation = ({seed: one[i] for seed, one in parts.items()} for i in (0, 1))
    stream, head = next(iter(streams.values())), None
    if any(not 2 <= n < len(stream.tasks) for n in options.merging.together):
        raise ValueError(f"--together is two tasks at least and less than all, and there are {len(stream.tasks)}")
    for one in streams.values():
        job.enough_images(one.tasks, options.training.batch, "--batch")
        if set(options.training.kinds) & set(MERGED):
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
    config["left_out"] = bool(set(ADDED) & set(options.training.kinds))  # a part of the training images
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
            job.put_aside(folder, options)
            write_result(folder / "metrics.json", results)
            path = report.merging_page(folder, results)
            for table in report.merging_tables(results):
                console.print(table.rich())
        for tasks, kind, seed in itertools.product(runs, options.training.kinds, streams):
            merge_bench.forget(unfinished(run.folder, tasks, kind, seed))
    console.print(f"{results.seconds:.0f} s; report: {path}", soft_wrap=True)


if __name__ == "__main__":
    closing(main)
