"""Incremental task arithmetic: a pool of modules, one for each task, and what their composition knows.

    python experiments/incremental.py                                          # 10 scripts x 16 characters, rendered
    python experiments/incremental.py --compare                                # with ablations and baselines
    python experiments/incremental.py --data omniglot --data-dir DIR           # real handwriting, alphabets as tasks
    python experiments/incremental.py --data folder:PATH --backbone FILE       # with train and test in it
    python experiments/incremental.py --benchmark cifar100-10x10 --data-dir DIR --backbone FILE --class-order 1993

The first needs nothing but the package and takes under 3 minutes on 2 CPU cores. For each task: mixtures, probe,
alignment and Fisher of the base; a LoRA module and a head trained around the base; the pool composed and tested. Writes
`runs/NAME/`: config.json, metrics.jsonl, metrics.json, pool/, report.html. A killed run goes on where it was. Expected:
final accuracy 50.8 %, frozen features 42.5; tables of all methods: README.md beside this file.

On several hosts with one file system the batch is divided over all their devices: start the command on each, with
`--hosts ADDRESS:PORT,N,I`, the address of host 0 and a free port there, the number of hosts, and this one's from 0;
under Slurm or on a Cloud TPU with `--hosts auto`. Where one dies all end, and the same commands go on.
"""

import functools
import shutil
import time
from typing import Any

import benchmarks
import job
from incremental_options import Options, at_once, parse
from job import closing, console
from options import flat

parse = functools.partial(parse, documentation=__doc__)
if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import numpy as np

from compo_jax import adapters, data, incremental, mesh, models, report
from compo_jax.train import RUNNERS, open_run, progress_bar, read_result, write_result


def setup(options: Options) -> tuple[incremental.Setup, str]:
    """(base, stream and settings; the backbone in words)."""
    where, how = options.backbone, options.training
    backbone = models.backbone(where.backbone, where.heads, where.image_size, where.dtype, where.activation)
    model = backbone.model
    if where.dtype == "bfloat16" and jax.default_backend() == "gpu":
        model = model.copy(kernel="cudnn")
    stream = backbone.normalised(open_stream(options, model.image_size))
    job.tell_images(stream, options.stream.images)
    images = sum(len(task.train) for task in stream.tasks)
    counts = f"{len(stream.tasks)} tasks, {len(stream.classes)} classes, {images} images"
    console.print(f"{backbone.description}; {stream.name}: {counts}")
    if how.batch > images:
        raise ValueError(f"--batch {how.batch} is more than all the {images} training images: name a smaller one")
    fisher = {"fisher_method": options.penalties.fisher, "fisher_images": options.penalties.fisher_images}
    settings = incremental.Settings(how.epochs, how.batch, probe_epochs=how.probe_epochs, **fisher)
    return incremental.Setup(model, backbone.params, stream, settings, options.place.seed), backbone.description


def open_stream(options: Options, size: int) -> data.TaskStream:
    """The tasks; a benchmark's data that isn't there is told with how to lay it out."""
    source: dict[str, Any] = vars(options.stream) | {"seed": options.place.seed}
    benchmark = benchmarks.BENCHMARKS.get(source.pop("benchmark"))
    try:
        return data.open_stream(source.pop("data"), size, **source)
    except FileNotFoundError as error:
        if benchmark is None or not benchmark.layout:
            raise
        raise FileNotFoundError(f"{error}. Here: {benchmark.layout}") from error


def published(options: Options, stream: data.TaskStream) -> dict[str, float]:
    """The paper's numbers for a benchmark's methods, where the tasks are its."""
    if (name := options.stream.benchmark) is None:
        return {}
    told = benchmarks.differs(name, options.stream, tuple(len(task.classes) for task in stream.tasks))
    if told:
        console.print(told)
    return {} if told else benchmarks.published(name)


def methods(options: Options, base) -> list[incremental.Method]:
    """The methods asked for: composition, its ablations and the baselines, for each kind of module."""
    how, weigh = options.training, options.penalties
    kinds = {
        "lora": {"adapter": adapters.lora(how.rank), "learning_rate": how.learning_rate},
        "ia3": {"adapter": adapters.ia3(), "learning_rate": how.ia3_learning_rate},
        "full": {"adapter": adapters.full(), "learning_rate": how.full_learning_rate},
        "": {},
    }
    ways = {
        "ita": {"alpha": weigh.alpha},
        "tak": {"alpha": weigh.tak_alpha},
        "iel": {"alpha": weigh.beta},
        "tmc": {"learning_rate": how.tmc_learning_rate},
        "ewc": {"alpha": weigh.ewc},
        "lwf": {"alpha": weigh.lwf},
    }
    shared = {"coupled": weigh.penalty == "coupled"} if weigh.penalty else {}
    made = []
    for name in how.methods:
        way, _, kind = name.partition("-")
        pulls = (way.startswith("iel") and weigh.iel_pull) or weigh.pull
        pull = {"pull": pulls} if "pull" in incremental.WAYS[way].options else {}
        units = {"units": weigh.units or ("paper" if way in benchmarks.WEIGHED else "relative")}
        made.append(incremental.method(way, **units | shared | kinds[kind] | ways.get(way, {}) | pull))
        if made[-1].adapter is not None:  # a wrong rank or pattern is said before there is a run folder
            jax.eval_shape(made[-1].adapter.init, jax.random.key(0), base)
    return made


def predictions(stream, classify: incremental.Classifier, each: int = 4) -> list[report.Sample]:
    """A few test images of each task with the composed model's predictions, for the report."""
    samples = []
    for task, first in zip(stream.tasks, stream.offsets, strict=True):
        chosen = np.random.default_rng(first).permutation(len(task.test))[:each]
        images, labels = task.test.images(chosen), task.test.labels[chosen]
        guesses, _ = incremental.predictions(classify(data.ArraySplit(images, labels)), first, len(task.classes))
        samples += [
            report.Sample(image, task.name, task.classes[label], stream.classes[guess])
            for image, label, guess in zip(images, labels, guesses, strict=True)
        ]
    return samples


def main(arguments: list[str] | None = None) -> None:
    options, began = parse(arguments), time.perf_counter()
    how, place = options.training, options.place
    if place.hosts is not None:  # before anything touches a device
        mesh.start_distributed(*place.hosts)
    if not how.parallel or not at_once(how.methods):
        job.divisible(how.batch, "--batch")
    learned, backbone = setup(options)
    paper = published(options, learned.stream)
    tried, names = methods(options, learned.base), [task.name for task in learned.stream.tasks]
    config = {key: value for key, value in flat(options).items() if key not in ("runs", "tensorboard", "hosts")}
    config["units"] = config["units"] or "paper"  # of a benchmark's own weights
    with (
        open_run(place.runs / place.name, config, tensorboard=place.tensorboard) as run,
        progress_bar(console=console) as progress,
    ):
        if (run.folder / "metrics.json").exists():
            results = read_result(run.folder / "metrics.json", incremental.Results)
            console.print(report.incremental_table(results).rich())
            console.print(
                f"{run.folder} is finished: see its report.html. Remove the folder to start over.", soft_wrap=True
            )
            return

        # -- tasks, one after another ----------------------------------------------------------------------------------
        runner = RUNNERS[options.backbone.runner]
        watched = {"log": run.log, "progress": progress, "extra": config, "began": began}
        for after in incremental.learn_stream(
            learned, tried, run.folder, runner=runner, parallel=how.parallel, **watched
        ):
            reached = {name: outcome.final_accuracy for name, outcome in after.outcomes.items()}
            numbers = ", ".join(f"{name} {x:.3f}" for name, x in reached.items() if x is not None)
            again = "going on " * after.restored
            console.print(f"{again}after {names[after.task]} ({after.task + 1}/{len(names)}): {numbers}")
        if not mesh.is_writer():  # the rest is process 0's
            return

        # -- results ---------------------------------------------------------------------------------------------------
        records = run.log.records()
        rates = [record["images_per_second"] for record in records if record["run"] == tried[0].name]
        rate = float(np.median(rates)) if rates else None
        results = incremental.summary(
            after, name=place.name, backbone=backbone, images_per_second=rate, published=paper
        )
        samples = predictions(learned.stream, after.classifier(results.method))
        path = report.incremental_page(run.folder, results, samples, records)
        np.savez(run.folder / "reference.npz", **after.reference.head)
        write_result(run.folder / "metrics.json", results)
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    console.print(report.incremental_table(results).rich())
    console.print(f"{results.seconds:.0f} s; report: {path}", soft_wrap=True)


if __name__ == "__main__":
    closing(main)
