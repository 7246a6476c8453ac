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
import functools
import itertools
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import job
from job import closing, console

# What a data set wants where the command line says nothing.
PRESETS = {
    "glyphs": {"tasks": 10, "epochs": 8, "batch": 64, "images": 100},
    "omniglot": {"tasks": 10, "epochs": 6, "batch": 64, "by": "alphabet", "train_split": "test"},
    "mnist": {"tasks": 5, "epochs": 1, "batch": 128},
}
PRESET = {"tasks": 10, "epochs": 20, "batch": 128, "by": None, "train_split": None}
FROZEN = ("ncm", "ranpac")  # classifiers on the base's features, which train no module
FEATURES_BATCH = 128  # images in a forward pass: enough for a GPU, and of a small model a CPU's cache holds it
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
    add("--by", help="label feature that divides the set into tasks; default: equal groups of classes")
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

from compo_jax import adapters, data, incremental, mesh, models, report, tree
from compo_jax.incremental import Method, Settings
from compo_jax.incremental.outcomes import Results, Skill, outcome
from compo_jax.pool import ModulePool
from compo_jax.train import (
    Checkpoints,
    jit_runner,
    open_run,
    pmap_runner,
    progress_bar,
    read_result,
    write_result,
)


def class_means(z, labels, seed):
    del seed
    return lambda z: z, incremental.nearest_class_mean(z, labels)


def projected(z, labels, seed):
    projection, head = incremental.random_projection(jax.random.key(seed), z, labels)
    return lambda z: np.maximum(z @ projection, 0), head


CLASSIFIERS = {"ncm": class_means, "ranpac": projected}  # (features, labels, seed) -> (change of features, head)


def methods(options) -> list[Method]:
    """The methods asked for that train: composition, its ablations and the baselines, for each kind of module."""
    kinds = {
        "lora": {"adapter": adapters.lora(options.rank), "learning_rate": options.learning_rate},
        "ia3": {"adapter": adapters.ia3(), "learning_rate": options.ia3_learning_rate},
        "full": {"adapter": adapters.full(), "learning_rate": options.full_learning_rate},
    }
    pull = tuple(options.pull)
    more = {
        "ita": {"alpha": options.alpha, "pull": pull},
        "tak": {"alpha": options.tak_alpha, "pull": pull, "curvature": "kronecker", "coupled": True},
        "pull": {"pull": pull},
        "none": {},
        "iel": {"alpha": options.beta, "pull": pull, "mode": "ensemble"},
        "iel_pull": {"pull": pull, "mode": "ensemble"},
        "iel_none": {"mode": "ensemble"},
        "tmc": {"learning_rate": options.tmc_learning_rate, "pull": pull, "mode": "tangent"},
        "sequential": {"mode": "sequential"},
        "ewc": {"alpha": options.ewc, "mode": "ewc", "coupled": True},
        "lwf": {"alpha": options.lwf, "mode": "lwf"},
        "joint": {"mode": "joint"},
    }
    named = [(name, *name.split("-")) for name in options.methods if name not in FROZEN]
    asked = {"coupled": options.penalty == "coupled"} if options.penalty else {}
    return [Method(name, units=options.units, **(kinds[kind] | more[way] | asked)) for name, way, kind in named]


def members(method: Method, names: list[str], t: int) -> tuple[list[str], list[str]]:
    """(modules that are composed, modules whose heads are) after task t."""
    if method.mode == "joint":
        return ["joint"], ["joint"]
    alone = method.mode in ("sequential", "ewc", "lwf")
    return ([names[t]] if alone else names[: t + 1]), names[: t + 1]


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
            console.print(report.incremental_table(read_result(run.folder / "metrics.json", Results)).rich())
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
        memories = {name: memory for name, (memory, _) in trainers.items()}
        patterns = [pattern for pattern, _ in adapters.VIT_TARGETS]
        kinds = ["diagonal", *sorted({m.curvature for m in tried} - {"diagonal"})]
        extract = incremental.features(model, stream, FEATURES_BATCH)
        linear = incremental.features(model, stream, FEATURES_BATCH, around=base)
        reference, refer = incremental.reference_stage(
            model, base, stream, settings, patterns, options.seed, kinds, extract
        )
        base_features = functools.cache(lambda t: extract(base, stream.tasks[t].train))
        evaluate = incremental.evaluator(extract, stream)
        of = {m.name: linear if m.mode == "tangent" else extract for m in tried}  # the model that was trained
        fingerprint = tree.fingerprint(base)
        pools = {m.name: ModulePool(run.folder / ("pool" if m is tried[0] else f"pools/{m.name}")) for m in tried}
        digits = max(2, len(str(tasks - 1)))  # in the pool's order, which is the alphabet's
        names = [
            f"{t:0{digits}d}-" + re.sub(r"[^A-Za-z0-9._-]+", "_", task.name) for t, task in enumerate(stream.tasks)
        ]

        # -- resume ----------------------------------------------------------------------------------------------------
        # rows[m, t, s]: accuracy of method m after task t on task s, class-incremental and within the task; the last m
        # is the frozen features; elapsed: seconds of earlier starts
        checkpoints = Checkpoints(run.folder / "checkpoints" / "learned")
        kept = {
            "reference": reference,
            "memories": memories,
            "rows": np.full((len(options.methods) + 1, tasks, tasks, 2), np.nan),
            "seconds": np.zeros(len(options.methods)),
            "position": np.zeros((), np.int64),
            "elapsed": np.zeros(()),
        }
        first_task, begun = 0, reference
        if checkpoints.latest is not None:
            kept = checkpoints.load(kept)
            first_task = checkpoints.latest
            console.print(f"going on after {first_task} tasks")
        reference, memories = kept["reference"], kept["memories"]
        rows, seconds = np.array(kept["rows"]), np.array(kept["seconds"])
        run.log.position, began = int(kept["position"]), began - float(kept["elapsed"])

        # -- tasks at once ---------------------------------------------------------------------------------------------
        references, ahead = None, {}
        if options.parallel:
            references = list(itertools.accumulate(range(tasks), refer, initial=begun))[1:]
            for method in tried:
                if method.mode not in ("independent", "tangent"):
                    continue
                train = incremental.parallel_trainer(model, base, stream, settings, method, options.seed, width=widest)
                clock = time.perf_counter()
                ahead[method.name] = train(
                    stream.tasks, stream.offsets, references, log=run.log, record={"run": method.name, "task": "all"},
                    progress=progress, checkpoints=Checkpoints(run.folder / "checkpoints" / f"{method.name}-all"),
                )  # fmt: skip
                seconds[options.methods.index(method.name)] += time.perf_counter() - clock
            if first_task:  # what was written since
                run.log.position = int(kept["position"])

        # -- task by task ----------------------------------------------------------------------------------------------
        for t in range(first_task, tasks):
            reference = references[t] if references else refer(reference, t)
            for method in tried:
                if method.mode == "joint" and t < tasks - 1:
                    continue
                i, joint = options.methods.index(method.name), method.mode == "joint"
                task, first = (data.pooled(stream), 0) if joint else (stream.tasks[t], stream.offsets[t])
                pool, name = pools[method.name], "joint" if joint else names[t]
                if method.name in ahead:
                    learned = ahead[method.name][t]
                else:
                    clock = time.perf_counter()
                    learned = trainers[method.name][1](
                        task, first, reference, memories[method.name], log=run.log, progress=progress,
                        record={"run": method.name, "task": task.name},
                        checkpoints=Checkpoints(run.folder / "checkpoints" / f"{method.name}-{t}"),
                    )  # fmt: skip
                    seconds[i] += time.perf_counter() - clock
                memories[method.name] = learned.memory
                start = incremental.task_columns(reference.head, first, len(task.classes), len(task.classes))
                pool.add(
                    name, learned.module, base=fingerprint, adapter=method.adapter, task=task.name,
                    classes=task.classes, seed=options.seed, extra=config, overwrite=True, head=learned.head,
                    start=start, **({} if joint else {"curvature": reference.own["diagonal"]}),
                )  # fmt: skip
                if not joint and "kronecker" in kinds:
                    pool.attach(name, curvature=reference.own["kronecker"])
                composed, with_heads = members(method, names, t)
                head = incremental.pool_head(pool, with_heads, reference.head)
                test = incremental.evaluator(of[method.name], stream)
                rows[i, t, : t + 1] = np.stack(test(pool.compose(base, composed), head, t + 1), axis=-1)
            for name in set(options.methods) & set(FROZEN):
                seen = range(t + 1)
                labels = np.concatenate([stream.tasks[k].train.labels + stream.offsets[k] for k in seen])
                lift, head = CLASSIFIERS[name](np.concatenate([base_features(k) for k in seen]), labels, options.seed)
                test = incremental.evaluator(lambda params, split, lift=lift: lift(extract(params, split)), stream)
                rows[options.methods.index(name), t, : t + 1] = np.stack(test(base, head, t + 1), axis=-1)
            rows[-1, t, : t + 1] = np.stack(evaluate(base, reference.head, t + 1), axis=-1)
            learned_state = {"reference": reference, "memories": memories, "rows": rows, "seconds": seconds}
            learned_state["elapsed"] = np.array(time.perf_counter() - began)
            checkpoints.save(t + 1, learned_state | {"position": np.array(run.log.position, np.int64)})
            means = rows[:-1, t, : t + 1, 0].mean(axis=1)
            reached = [f"{name} {x:.3f}" for name, x in zip(options.methods, means, strict=True) if not np.isnan(x)]
            console.print(f"after {stream.tasks[t].name} ({t + 1}/{tasks}): {', '.join(reached)}")

        if not mesh.is_writer():  # the rest is process 0's
            return

        # -- what the pool can do without training ---------------------------------------------------------------------
        pool, main = pools[tried[0].name], tried[0]
        composed, with_heads = members(main, names, tasks - 1)
        params, head = pool.compose(base, composed), incremental.pool_head(pool, with_heads, reference.head)
        test = incremental.evaluator(of[main.name], stream)
        task_of = np.repeat(range(tasks), [len(task.classes) for task in stream.tasks])  # each column's

        def skill(t, kept):
            """Accuracies with the modules `kept` alone, and the head's training on the others' tasks undone."""
            own = jax.tree.map(lambda h, r: np.where(np.isin(task_of, kept), h, r), head, reference.head)
            known = test(pool.compose(base, [names[k] for k in kept]), own, tasks).incremental
            others = float(np.delete(known, t).mean())
            return Skill(stream.tasks[t].name, float(known[t]), others)

        apart = tasks > 1 and composed == names  # one module knows all tasks otherwise
        with ThreadPoolExecutor(2) as threads:  # a module is read while another is tested
            specialise = list(threads.map(lambda t: skill(t, [t]), range(tasks * apart)))
            unlearn = list(threads.map(lambda t: skill(t, [k for k in range(tasks) if k != t]), range(tasks * apart)))
        samples = draw_samples(of[main.name], stream, params, head)

        # -- results ---------------------------------------------------------------------------------------------------
        records = run.log.records()
        rates = [r["images_per_second"] for r in records if r["run"] == main.name]
        taken = [None if name in FROZEN else float(x) for name, x in zip(options.methods, seconds, strict=True)]
        results = Results(
            name=options.name,
            data=stream.name,
            backbone=backbone,
            seed=options.seed,
            settings={"trained for": f"{options.epochs} epochs in batches of {options.batch}"},
            tasks=[task.name for task in stream.tasks],
            classes=[len(task.classes) for task in stream.tasks],
            tested=[len(task.test) for task in stream.tasks],
            methods={n: outcome(x, tasks - 1, s) for n, x, s in zip(options.methods, rows, taken, strict=False)},
            frozen=outcome(rows[-1], tasks - 1, None),
            specialise=specialise,
            unlearn=unlearn,
            images_per_second=float(np.median(rates)) if rates else None,
            seconds=time.perf_counter() - began,
        )
        np.savez(run.folder / "reference.npz", **reference.head)
        path = report.incremental_page(run.folder, results, samples, records)
        write_result(run.folder / "metrics.json", results)
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    console.print(report.incremental_table(results).rich())
    console.print(f"{results.seconds:.0f} s; report: {path}")


def draw_samples(extract, stream, params, head, each: int = 4):
    """A few test images of each task with the composed model's predictions, for the report."""
    samples = []
    for task, first in zip(stream.tasks, stream.offsets, strict=True):
        chosen = np.random.default_rng(first).permutation(len(task.test))[:each]
        images, labels = task.test.images(chosen), task.test.labels[chosen]
        z = extract(params, data.ArraySplit(images, labels))
        predicted, _ = incremental.predictions(z, head, first, len(task.classes))
        samples += [
            report.Sample(image, task.name, task.classes[label], stream.classes[guess])
            for image, label, guess in zip(images, labels, predicted, strict=True)
        ]
    return samples


if __name__ == "__main__":
    closing(main)
