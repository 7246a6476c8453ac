"""Incremental task arithmetic: a pool of modules, one for each task, and what their composition knows.

    python experiments/incremental.py                                          # 10 scripts x 16 characters, rendered
    python experiments/incremental.py --compare                                # with ablations and baselines
    python experiments/incremental.py --data omniglot --data-dir DIR           # real handwriting, alphabets as tasks
    python experiments/incremental.py --data cifar100 --data-dir DIR --backbone vit_base_patch16_224.safetensors

The first needs nothing but the package and takes under 5 minutes on 2 CPU cores. For each task: mixtures, probe,
alignment and Fisher of the base; a LoRA module and a head trained around the base; the pool composed and tested. Writes
`runs/NAME/`: config.json, metrics.jsonl, metrics.json, pool/, report.html. A killed run goes on where it was. Expected
numbers: the table in README.md.
"""

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from compo_jax import adapters, data, incremental, models, report, tree
from compo_jax.incremental import Method, Settings
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints, jit_runner, open_run, pmap_runner, progress_bar, write_json

console = Console()

# What a data set wants where the command line says nothing.
PRESETS = {
    "glyphs": {"tasks": 10, "epochs": 8, "batch": 64},
    "omniglot": {"tasks": 10, "epochs": 6, "batch": 64, "by": "alphabet", "train_split": "test"},
    "mnist": {"tasks": 5, "epochs": 1, "batch": 128},
}
PRESET = {"tasks": 10, "epochs": 20, "batch": 128, "by": None, "train_split": None}
METHODS = [f"{way}-{kind}" for kind in ("lora", "full") for way in ("ita", "pull", "none", "sequential", "joint")]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="glyphs", help="glyphs, or the name of a TFDS image classification set")
    add("--data-dir", type=Path, help="where TFDS has prepared the set")
    add("--tasks", type=int, help="number of tasks")
    add("--by", help="label feature that divides the set into tasks; default: equal groups of classes")
    add("--train-split", help="TFDS split to train on; without --test-split a part of it is held out")
    add("--test-split", help="TFDS split to test on")
    add("--classes", type=int, default=16, help="characters of a script (glyphs)")
    add("--images", type=int, default=100, help="training images of a class (glyphs)")
    add("--backbone", type=Path, help="timm ViT checkpoint (.safetensors); default: the embedded one")
    add("--heads", type=int, help="attention heads of the checkpoint; default: width / 64")
    add("--image-size", type=int, help="side of the images; default: the checkpoint's")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute dtype")
    add("--runner", choices=["jit", "pmap"], default="jit")
    add("--epochs", type=int)
    add("--batch", type=int)
    add("--rank", type=int, default=8)
    add("--learning-rate", type=float, default=3e-3, help="of LoRA modules")
    add("--full-learning-rate", type=float, default=1e-3, help="of full deltas")
    add("--alpha", type=float, default=300.0, help="weight of the Fisher penalty")
    add("--pull", type=float, nargs=2, default=(0.1, 0.05), metavar=("F", "I"), help="pull of the heads")
    add("--fisher", default="monte_carlo", choices=["exact", "low_rank", "monte_carlo"])
    add("--fisher-images", type=int, default=256, help="images of a task for its Fisher; 0 for all")
    add("--methods", nargs="+", default=["ita-lora"], choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    add("--compare", action="store_const", dest="methods", const=METHODS, help="all of them")
    add("--seed", type=int, default=0)
    add("--name", help="name of the run; default: made from the data and the seed")
    add("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    add("--tensorboard", action="store_true")
    options = parser.parse_args(arguments)
    for key, value in (PRESET | PRESETS.get(options.data, {})).items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    options.methods = list(dict.fromkeys(options.methods))
    tried = "compare" if options.methods == METHODS else "-".join(options.methods)
    suffix = "" if tried == "ita-lora" else f"-{tried}"
    options.name = options.name or f"incremental-{options.data}-{options.seed}{suffix}"
    return options


def methods(options) -> list[Method]:
    """The methods asked for: ITA, its ablations and the baselines, each for LoRA and for full deltas."""
    kinds = {
        "lora": (adapters.lora(options.rank), options.learning_rate),
        "full": (adapters.full(), options.full_learning_rate),
    }
    pull = tuple(options.pull)
    more = {
        "ita": {"alpha": options.alpha, "pull": pull},
        "pull": {"pull": pull},
        "none": {},
        "sequential": {"mode": "sequential"},
        "joint": {"mode": "joint"},
    }
    return [Method(name, *kinds[kind], **more[way]) for name in options.methods for way, kind in [name.split("-")]]


def composed_head(pool: ModulePool, members: list[str], reference: incremental.Reference):
    """The head over the classes of the modules `members`."""
    trained, started = ([pool.load(name, part) for name in members] for part in ("head", "start"))
    return incremental.stream_head(trained, started, reference.head)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    began = time.perf_counter()

    # -- backbone and stream -------------------------------------------------------------------------------------------
    model, base, backbone = models.backbone(options.backbone, options.heads, options.image_size, options.dtype)
    if options.dtype == "bfloat16" and jax.default_backend() == "gpu":
        model = model.copy(kernel="cudnn")
    source = ("data_dir", "tasks", "seed", "by", "train_split", "test_split", "classes", "images")
    stream = data.open_stream(options.data, model.image_size, **{key: getattr(options, key) for key in source})
    tasks, total = len(stream.tasks), len(stream.classes)
    images = sum(len(task.train) for task in stream.tasks)
    console.print(f"{backbone}; {stream.name}: {tasks} tasks, {total} classes, {images} images")
    tried = methods(options)
    for method in tried:  # a wrong rank or pattern is said before there is a run folder
        jax.eval_shape(method.adapter.init, jax.random.key(0), base)
    chosen = {k: v for k, v in vars(options).items() if k not in ("runs", "tensorboard")}
    config = {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items()}
    with (
        open_run(options.runs / options.name, config, tensorboard=options.tensorboard) as run,
        progress_bar(console=console) as progress,
    ):
        if (run.folder / "metrics.json").exists():
            console.print(report.table(json.loads((run.folder / "metrics.json").read_text())))
            console.print(f"{run.folder} is finished: see its report.html. Remove the folder to start over.")
            return

        # -- what runs -------------------------------------------------------------------------------------------------
        settings = Settings(
            options.epochs, options.batch, fisher_method=options.fisher, fisher_images=options.fisher_images
        )
        runner = {"jit": jit_runner, "pmap": pmap_runner}[options.runner]
        widest = max(len(task.classes) for task in stream.tasks)
        trainers = {
            m.name: incremental.task_trainer(
                model, base, stream, settings, m, options.seed, runner=runner,
                width=total if m.mode == "joint" else widest,
            )
            for m in tried
        }  # fmt: skip
        patterns = [pattern for pattern, _ in adapters.VIT_TARGETS]
        reference, refer = incremental.reference_stage(model, base, stream, settings, patterns, options.seed)
        evaluate = incremental.evaluator(model, stream, settings.eval_batch)
        fingerprint = tree.fingerprint(base)
        pools = {m.name: ModulePool(run.folder / ("pool" if m is tried[0] else f"pools/{m.name}")) for m in tried}
        names = [f"{t:02d}-" + re.sub(r"[^A-Za-z0-9._-]+", "_", task.name) for t, task in enumerate(stream.tasks)]

        # -- resume ----------------------------------------------------------------------------------------------------
        # rows[m, t, s]: accuracy of method m after task t on task s, class-incremental and within the task
        learned = Checkpoints(run.folder / "checkpoints" / "learned")
        kept = {
            "reference": reference,
            "rows": np.full((len(tried), tasks, tasks, 2), np.nan),
            "seconds": np.zeros(len(tried)),
            "position": np.zeros((), np.int64),
        }
        first_task = 0
        if learned.latest is not None:
            kept = learned.load(kept)
            first_task = learned.latest
            console.print(f"going on after {first_task} tasks")
        reference, rows, seconds = kept["reference"], np.array(kept["rows"]), np.array(kept["seconds"])
        run.log.position = int(kept["position"])

        # -- task by task ----------------------------------------------------------------------------------------------
        for t in range(first_task, tasks):
            reference = refer(reference, t)
            for i, method in enumerate(tried):
                if method.mode == "joint" and t < tasks - 1:
                    continue
                joint, sequential = method.mode == "joint", method.mode == "sequential"
                task, first = (data.pooled(stream), 0) if joint else (stream.tasks[t], stream.offsets[t])
                pool, name = pools[method.name], "joint" if joint else names[t]
                before = pool.load(names[t - 1]) if sequential and t else None
                clock = time.perf_counter()
                module, head = trainers[method.name](
                    task, first, reference, before, log=run.log, record={"run": method.name, "task": task.name},
                    progress=progress, checkpoints=Checkpoints(run.folder / "checkpoints" / f"{method.name}-{t}"),
                )  # fmt: skip
                seconds[i] += time.perf_counter() - clock
                start = incremental.task_columns(reference.head, first, len(task.classes), len(task.classes))
                pool.add(
                    name, module, base=fingerprint, adapter=method.adapter, task=task.name, classes=task.classes,
                    seed=options.seed, extra=config, overwrite=True, head=head, start=start,
                )  # fmt: skip
                members = [name] if joint else names[: t + 1]
                params = pool.compose(base, [name] if sequential else members)
                known = evaluate(params, composed_head(pool, members, reference), t + 1)
                rows[i, t, : t + 1] = np.stack(known, axis=-1)
            position = np.array(run.log.position, np.int64)
            learned.save(t + 1, {"reference": reference, "rows": rows, "seconds": seconds, "position": position})
            means = rows[:, t, : t + 1, 0].mean(axis=1)
            reached = [f"{m.name} {x:.3f}" for m, x in zip(tried, means, strict=True) if not np.isnan(x)]
            console.print(f"after {stream.tasks[t].name} ({t + 1}/{tasks}): {', '.join(reached)}")

        # -- what the pool can do without training ---------------------------------------------------------------------
        pool = pools[tried[0].name]
        head = composed_head(pool, names, reference)
        frozen = evaluate(base, reference.head, tasks)
        composed = pool.compose(base)
        whole = evaluate(composed, head, tasks)

        def skill(t, members):
            known = evaluate(pool.compose(base, members), head, tasks).incremental
            return {
                "task": stream.tasks[t].name,
                "target": float(known[t]),
                "control": float(np.delete(known, t).mean()),
            }

        specialise = [skill(t, [names[t]]) for t in range(tasks)] if tasks > 1 else []
        unlearn = [skill(t, [n for n in names if n != names[t]]) for t in range(tasks)] if tasks > 1 else []
        samples = draw_samples(model, stream, settings, composed, head)

        # -- results ---------------------------------------------------------------------------------------------------
        records = run.log.records()
        rates = [r["images_per_second"] for r in records if r["run"] == tried[0].name]
        results = {}
        for i, method in enumerate(tried):
            matrix = rows[i, ..., 0]
            results[method.name] = {
                "final_accuracy": incremental.final_accuracy(matrix),
                "final_forgetting": None if method.mode == "joint" else incremental.final_forgetting(matrix),
                "task_incremental_accuracy": float(rows[i, -1, :, 1].mean()),
                "accuracy_matrix": [[None if np.isnan(x) else float(x) for x in row] for row in matrix],
                "seconds": float(seconds[i]),
            }
        metrics = {
            "name": options.name,
            "data": stream.name,
            "backbone": backbone,
            "method": tried[0].name,
            "tasks": [task.name for task in stream.tasks],
            "classes": [len(task.classes) for task in stream.tasks],
            **{k: v for k, v in results[tried[0].name].items() if k != "seconds"},
            "frozen_features_accuracy": float(frozen.incremental.mean()),
            "frozen_features_task_incremental_accuracy": float(frozen.within.mean()),
            "composed": {task.name: float(a) for task, a in zip(stream.tasks, whole.incremental, strict=True)},
            "specialise": specialise,
            "unlearn": unlearn,
            "images_per_second": float(np.median(rates)) if rates else None,
            "seconds": time.perf_counter() - began,
            "methods": results,
        }
        path = report.incremental(run.folder, metrics, samples, records)
        write_json(run.folder / "metrics.json", metrics)
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    console.print(report.table(metrics))
    console.print(f"{metrics['seconds']:.0f} s; report: {path}")


def draw_samples(model, stream, settings, params, head, each: int = 4):
    """A few test images of each task with the composed model's predictions, for the report."""
    samples = []
    extract = incremental.features(model, stream, settings.eval_batch)
    for task, first in zip(stream.tasks, stream.offsets, strict=True):
        chosen = np.random.default_rng(first).permutation(len(task.test))[:each]
        images, labels = task.test.images(chosen), task.test.labels[chosen]
        z = extract(params, data.ArraySplit(images, labels))
        predicted, _ = incremental.predictions(z, head, first, len(task.classes))
        samples += [
            (image, task.name, task.classes[label], stream.classes[guess])
            for image, label, guess in zip(images, labels, predicted, strict=True)
        ]
    return samples


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, FloatingPointError, OSError, KeyError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
