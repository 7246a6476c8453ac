"""Incremental task arithmetic: a pool of modules, one for each task, and what their composition knows.

    python experiments/incremental.py                                          # 10 scripts x 16 characters, rendered
    python experiments/incremental.py --compare                                # with ablations and baselines
    python experiments/incremental.py --data omniglot --data-dir DIR           # real handwriting, alphabets as tasks
    python experiments/incremental.py --data cifar100 --data-dir DIR --backbone vit_base_patch16_224.safetensors

The first needs nothing but the package and takes under 3 minutes on 2 CPU cores. For each task: mixtures, probe,
alignment and Fisher of the base; a LoRA module and a head trained around the base; the pool composed and tested. Writes
`runs/NAME/`: config.json, metrics.jsonl, metrics.json, pool/, report.html. A killed run goes on where it was. Expected
numbers: the table in README.md.

On several hosts with one file system the batch is divided over all their devices: start the command on each, with
`--hosts ADDRESS:PORT,N,I`, the address of host 0 and a free port there, the number of hosts, and this one's from 0;
under Slurm or on a Cloud TPU with `--hosts auto`. Where one dies all end, and the same commands go on.
"""

import argparse
import re
import shutil
import time
from pathlib import Path

import job
from job import closing, console

# What a data set wants where the command line says nothing.
PRESETS = {
    "glyphs": {"tasks": 10, "epochs": 8, "batch": 64, "images": 100},
    "omniglot": {"tasks": 10, "epochs": 6, "batch": 64},
    "mnist": {"tasks": 5, "epochs": 1, "batch": 128},
}
PRESET = {"tasks": 10, "epochs": 20, "batch": 128}
FROZEN = ("ncm", "ranpac")  # classifiers on the base's features, which train no module
WAYS = (
    "ita", "tak", "pull", "none", "iel", "iel_pull", "iel_none", "sequential", "ewc", "lwf", "joint",
)  # fmt: skip
METHODS = [f"{way}-{kind}" for kind in ("lora", "ia3", "full") for way in WAYS] + ["tmc-full", *FROZEN]
COMPARED = [
    *(f"{way}-{kind}" for kind in ("lora", "ia3", "full") for way in ("ita", "pull", "none", "iel", "iel_none")),
    "tak-lora", "tak-full", "tmc-full", "sequential-lora", "sequential-full", "ewc-full", "lwf-full", "joint-lora",
    "joint-full", *FROZEN,
]  # fmt: skip


# The methods that an option belongs to; where none of them is asked for, it is refused.
BELONGS = {
    "rank": r".+-lora",
    "learning_rate": r".+-lora",
    "ia3_learning_rate": r".+-ia3",
    "full_learning_rate": r"(?!tmc).+-full",
    "tmc_learning_rate": r"tmc-.+",
    "alpha": r"ita-.+",
    "tak_alpha": r"tak-.+",
    "beta": r"iel-.+",
    "ewc": r"ewc-.+",
    "units": r"(ita|tak|iel|ewc)-.+",
    "lwf": r"lwf-.+",
    "pull": r"(ita|tak|pull|tmc|iel|iel_pull)-.+",
    "penalty": r"(ita|tak|pull|tmc|iel|iel_pull|ewc)-.+",
    "parallel": r"(ita|tak|pull|none|tmc)-.+",
}


def hosts(text: str) -> tuple:
    """What `mesh.start_distributed` takes."""
    found = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", text)
    if text != "auto" and (found is None or int(found[3]) >= int(found[2])):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto or ADDRESS:PORT,N,I with I from 0 to N - 1")
    return () if found is None else (found[1], int(found[2]), int(found[3]))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = job.Parser(__doc__)
    add = parser.add_argument
    add("--data", default="glyphs", help="glyphs, or the name of a TFDS image classification set")
    add("--data-dir", type=job.path, help="where TFDS has prepared the set")
    add("--tasks", type=job.count, help="number of tasks")
    add("--by", help="label feature that divides the set into tasks; default: Omniglot's alphabets, else none")
    add("--train-split", help="TFDS split to train on; without --test-split a part of it is held out")
    add("--test-split", help="TFDS split to test on")
    add("--classes", type=job.number(int, 2), default=16, help="characters of a script (glyphs)")
    add("--images", type=job.count, help="training images of a class, drawn by the seed; default: 100 glyphs, else all")
    add("--backbone", type=job.path, help="timm ViT checkpoint (.safetensors); default: the embedded one")
    add("--heads", type=job.count, help="attention heads of the checkpoint; default: width / 64")
    add("--image-size", type=job.count, help="side of the images; default: the checkpoint's")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute dtype")
    add("--runner", choices=["jit", "pmap"], default="jit")
    add("--epochs", type=job.count)
    add("--batch", type=job.count)
    add("--rank", type=job.count, default=8, help="of LoRA modules")
    add("--learning-rate", type=job.rate, default=3e-3, help="of LoRA modules")
    add("--ia3-learning-rate", type=job.rate, default=1e-2, help="of (IA)³ modules")
    add("--tmc-learning-rate", type=job.rate, default=2e-5, help="of the tangent model")
    add("--full-learning-rate", type=job.rate, default=1e-3, help="of full deltas")
    add("--alpha", type=job.weight, default=0.1, help="weight of ITA's penalty")
    add("--tak-alpha", type=job.weight, default=0.004, help="weight of ITA's penalty by Kronecker factors")
    add("--beta", type=job.weight, default=0.1, help="weight of IEL's penalty")
    add("--ewc", type=job.weight, default=0.1, help="weight of elastic weight consolidation")
    add("--lwf", type=job.weight, default=10.0, help="weight of learning without forgetting's distillation")
    add(
        "--units", choices=["relative", "paper"], default="relative",
        help="of the weights of ITA, IEL and EWC: relative to the curvature's mean, or the curvature as it is",
    )  # fmt: skip
    add("--penalty", choices=["coupled", "decoupled"], help="default: coupled for full deltas and TAK")
    add("--pull", type=job.weight, nargs=2, default=(0.1, 0.05), metavar=("F", "I"), help="pull of the heads")
    add("--fisher", default="monte_carlo", choices=["exact", "low_rank", "monte_carlo"])
    add("--fisher-images", type=job.number(int, 0), default=256, help="images of a task for its Fisher; 0 for all")
    add("--methods", nargs="+", default=["ita-lora"], choices=METHODS, metavar="NAME", help=", ".join(METHODS))
    add("--compare", action="store_true", default=None, help="the methods that are usually compared")
    add("--parallel", action="store_true", help="train the independent methods' tasks at once")
    add("--seed", type=job.seed, default=0)
    add("--name", type=job.name, help="name of the run; default: made from the data and the seed")
    add("--runs", type=job.path, default=Path("runs"), help="folder of the runs")
    add("--tensorboard", action="store_true")
    add(
        "--hosts",
        type=hosts,
        metavar="ADDRESS:PORT,N,I",
        help="host 0's address, how many hosts, which is this; or auto",
    )
    options = parser.parse_args(arguments)
    refuse_what_plays_no_part(parser, options)
    for key, value in (PRESET | PRESETS.get(options.data, {})).items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    if options.compare:
        options.methods = COMPARED
    del options.compare
    options.methods = sorted(options.methods, key=lambda name: name in FROZEN)  # in order, those last
    if set(options.methods) <= set(FROZEN):
        raise ValueError(f"{', '.join(options.methods)} train nothing: name a method before them, ita-lora say")
    tried = "compare" if options.methods == COMPARED else "-".join(options.methods)
    suffix = "" if tried == "ita-lora" else f"-{tried}"
    options.name = options.name or job.plain(f"incremental-{options.data}-{options.seed}{suffix}")
    return options


def refuse_what_plays_no_part(parser: job.Parser, options: argparse.Namespace) -> None:
    if options.compare:
        parser.refuse("with --compare, which names its own", "methods")
    if options.data == "glyphs":
        parser.refuse("with glyphs, which are rendered", "data_dir", "by", "train_split", "test_split")
    else:
        parser.refuse(f"with {options.data}, for they are the characters of a script of glyphs", "classes")
    if options.backbone is None:
        parser.refuse("without --backbone, for the embedded one has its own", "heads", "image_size")
    if options.parallel and options.runner == "pmap":
        raise ValueError("--parallel divides the tasks among the devices and pmap the batch: name one of the two")
    asked = COMPARED if options.compare else options.methods
    for key, pattern in BELONGS.items():
        if not any(re.fullmatch(pattern, name) for name in asked):
            parser.refuse(f"with {', '.join(asked)}", key)


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import numpy as np

from compo_jax import adapters, data, incremental, mesh, models, report
from compo_jax.incremental import Method, Settings, Setup
from compo_jax.train import jit_runner, open_run, pmap_runner, progress_bar, read_json, write_json


def methods(options) -> list[Method]:
    """The methods asked for: composition, its ablations and the baselines, for each kind of module."""
    kinds = {
        "lora": {"adapter": adapters.lora(options.rank), "learning_rate": options.learning_rate},
        "ia3": {"adapter": adapters.ia3(), "learning_rate": options.ia3_learning_rate},
        "full": {"adapter": adapters.full(), "learning_rate": options.full_learning_rate},
    }
    given = {
        "ita": {"alpha": options.alpha},
        "tak": {"alpha": options.tak_alpha},
        "iel": {"alpha": options.beta},
        "tmc": {"learning_rate": options.tmc_learning_rate},
        "ewc": {"alpha": options.ewc},
        "lwf": {"alpha": options.lwf},
    }
    asked = {"coupled": options.penalty == "coupled"} if options.penalty else {}

    def made(name):
        way, _, kind = name.partition("-")
        pulled = "pull" in incremental.WAYS[way].options
        return incremental.method(
            way, units=options.units, **kinds.get(kind, {}) | given.get(way, {}) | asked
            | ({"pull": tuple(options.pull)} if pulled else {}),
        )  # fmt: skip

    return [made(name) for name in options.methods]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if (place := vars(options).pop("hosts")) is not None:  # before anything touches a device
        mesh.start_distributed(*place)
    if not options.parallel or not all(re.fullmatch(BELONGS["parallel"], name) for name in options.methods):
        job.divisible(options.batch, "--batch")
    began = time.perf_counter()

    # -- backbone and stream -------------------------------------------------------------------------------------------
    model, base, backbone = models.backbone(options.backbone, options.heads, options.image_size, options.dtype)
    if options.dtype == "bfloat16" and jax.default_backend() == "gpu":
        model = model.copy(kernel="cudnn")
    source = ("data_dir", "tasks", "seed", "by", "train_split", "test_split", "classes", "images")
    stream = data.open_stream(options.data, model.image_size, **{key: getattr(options, key) for key in source})
    job.tell_images(stream, options.images)
    tasks, total = len(stream.tasks), len(stream.classes)
    images = sum(len(task.train) for task in stream.tasks)
    console.print(f"{backbone}; {stream.name}: {tasks} tasks, {total} classes, {images} images")
    if options.batch > images:
        raise ValueError(f"--batch {options.batch} is more than all the {images} training images: name a smaller one")
    tried = methods(options)
    for method in tried:  # a wrong rank or pattern is said before there is a run folder
        if method.adapter is not None:
            jax.eval_shape(method.adapter.init, jax.random.key(0), base)
    chosen = {k: v for k, v in vars(options).items() if k not in ("runs", "tensorboard")}
    if options.data != "glyphs":  # under another name than in older runs, whose `images` held for glyphs alone
        chosen["train_images"] = chosen.pop("images")
    config = {k: str(v) if isinstance(v, Path) else v for k, v in chosen.items()}
    with (
        open_run(options.runs / options.name, config, tensorboard=options.tensorboard) as run,
        progress_bar(console=console) as progress,
    ):
        if (run.folder / "metrics.json").exists():
            console.print(report.table(read_json(run.folder / "metrics.json")))
            console.print(f"{run.folder} is finished: see its report.html. Remove the folder to start over.")
            return

        # -- learning --------------------------------------------------------------------------------------------------
        settings = Settings(
            options.epochs, options.batch, fisher_method=options.fisher, fisher_images=options.fisher_images
        )
        setup = Setup(model, base, stream, settings, options.seed)
        runner = {"jit": jit_runner, "pmap": pmap_runner}[options.runner]
        for after in incremental.learn_stream(
            setup, tried, run.folder, runner=runner, parallel=options.parallel, log=run.log, progress=progress,
            extra=config,
        ):  # fmt: skip
            if after.restored:
                console.print(f"going on after {after.task + 1} tasks")
                continue
            reached = {name: found.final_accuracy for name, found in after.outcomes.items()}
            told = ", ".join(f"{name} {x:.3f}" for name, x in reached.items() if x is not None)
            console.print(f"after {stream.tasks[after.task].name} ({after.task + 1}/{tasks}): {told}")
        if not mesh.is_writer():  # the rest is process 0's
            return

        # -- results ---------------------------------------------------------------------------------------------------
        records = run.log.records()
        rates = [r["images_per_second"] for r in records if r["run"] == tried[0].name]
        results = incremental.summary(
            after, name=options.name, backbone=backbone, began=began,
            images_per_second=float(np.median(rates)) if rates else None,
        )  # fmt: skip
        samples, metrics = draw_samples(stream, after.classifier(results.method)), as_metrics(results)
        np.savez(run.folder / "reference.npz", **after.reference.head)
        path = report.incremental(run.folder, metrics, samples, records)
        write_json(run.folder / "metrics.json", metrics)
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    console.print(report.table(metrics))
    console.print(f"{metrics['seconds']:.0f} s; report: {path}")


def as_metrics(results: incremental.Results) -> dict:
    """The results as the report wants them."""
    methods = {
        name: found._asdict()
        | {"accuracy_matrix": [[None if np.isnan(x) else float(x) for x in row] for row in found.accuracy_matrix]}
        for name, found in results.methods.items()
    }
    main = methods[results.method]
    return {
        "name": results.name,
        "data": results.data,
        "backbone": results.backbone,
        "method": results.method,
        "tasks": results.tasks,
        "classes": results.classes,
        **{k: v for k, v in main.items() if k != "seconds"},
        "frozen_features_accuracy": results.frozen.final_accuracy,
        "frozen_features_task_incremental_accuracy": results.frozen.task_incremental_accuracy,
        "composed": dict(zip(results.tasks, main["accuracy_matrix"][-1], strict=True)),
        "specialise": [skill._asdict() for skill in results.specialise],
        "unlearn": [skill._asdict() for skill in results.unlearn],
        "images_per_second": results.images_per_second,
        "seconds": results.seconds,
        "methods": methods,
    }


def draw_samples(stream, classify: incremental.Classifier, each: int = 4):
    """A few test images of each task with the composed model's predictions, for the report."""
    samples = []
    for task, first in zip(stream.tasks, stream.offsets, strict=True):
        chosen = np.random.default_rng(first).permutation(len(task.test))[:each]
        images, labels = task.test.images(chosen), task.test.labels[chosen]
        guesses, _ = incremental.predictions(classify(data.ArraySplit(images, labels)), first, len(task.classes))
        samples += [
            (image, task.name, task.classes[label], stream.classes[guess])
            for image, label, guess in zip(images, labels, guesses, strict=True)
        ]
    return samples


if __name__ == "__main__":
    closing(main)
