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
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
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
    "omniglot": {"tasks": 10, "epochs": 8, "batch": 64, "by": "alphabet", "train_split": "test"},
    "mnist": {"tasks": 5, "epochs": 1, "batch": 128},
}
PRESET = {"tasks": 10, "epochs": 20, "batch": 128, "by": None, "train_split": None}


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
    add("--full-learning-rate", type=float, default=1e-3, help="of full deltas (--compare)")
    add("--alpha", type=float, default=300.0, help="weight of the Fisher penalty")
    add("--pull", type=float, nargs=2, default=(0.1, 0.05), metavar=("F", "I"), help="pull of the heads: Fisher, identity")
    add("--fisher", default="monte_carlo", choices=["exact", "low_rank", "monte_carlo"])
    add("--fisher-images", type=int, default=256, help="images of a task for its Fisher; 0 for all")
    add("--compare", action="store_true", help="also run the ablations and baselines, LoRA and full deltas")
    add("--seed", type=int, default=0)
    add("--name", help="name of the run; default: made from the data and the seed")
    add("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    add("--tensorboard", action="store_true")
    options = parser.parse_args(arguments)
    for key, value in (PRESET | PRESETS.get(options.data, {})).items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    options.name = options.name or f"incremental-{options.data}-{options.seed}" + ("-compare" if options.compare else "")
    return options


def load_backbone(options):
    """(model without its head, params, description)."""
    if options.backbone is None:
        model, params, made = models.embedded()
        described = f"embedded ViT {model.width}x{model.depth}, pre-trained on {sum(made['characters'].values())} Latin characters"
    else:
        model, params = models.load(options.backbone, heads=options.heads, image_size=options.image_size)
        described = options.backbone.name
    model = model.copy(classes=0, dtype=None if options.dtype == "float32" else jnp.dtype(options.dtype))
    if options.dtype == "bfloat16" and jax.default_backend() == "gpu":
        model = model.copy(kernel="cudnn")
    return model, {name: leaf for name, leaf in params.items() if name != "head"}, described


def load_stream(options, size: int) -> data.TaskStream:
    if options.data == "glyphs":
        return data.glyph_stream(
            list(data.glyphs.TASKS)[: options.tasks], classes=options.classes, train=options.images, test=20, size=size,
            seed=options.seed, distortion=data.glyphs.SCAN,
        )
    if options.data_dir is None:
        raise ValueError(f"--data {options.data} needs --data-dir, the folder where TFDS has prepared the set")
    return data.tfds_stream(
        options.data, options.data_dir, size=size, tasks=options.tasks, by=options.by, seed=options.seed,
        train_split=options.train_split, test_split=options.test_split,
    )


def methods(options) -> list[Method]:
    """The main method, and with --compare the ablations and baselines, each for LoRA and for full deltas."""
    kinds = {"lora": (adapters.lora(options.rank), options.learning_rate)}
    if options.compare:
        kinds["full"] = (adapters.full(), options.full_learning_rate)
    made = []
    for kind, (adapter, rate) in kinds.items():
        made.append(Method(f"ita-{kind}", adapter, rate, options.alpha, tuple(options.pull)))
        if options.compare:
            made += [
                Method(f"pull-{kind}", adapter, rate, 0.0, tuple(options.pull)),
                Method(f"none-{kind}", adapter, rate),
                Method(f"sequential-{kind}", adapter, rate, mode="sequential"),
                Method(f"joint-{kind}", adapter, rate, mode="joint"),
            ]
    return made


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    began = time.perf_counter()

    # -- backbone and stream -------------------------------------------------------------------------------------------
    model, base, backbone = load_backbone(options)
    stream = load_stream(options, model.image_size)
    tasks, total = len(stream.tasks), len(stream.classes)
    console.print(f"{backbone}; {stream.name}: {tasks} tasks, {total} classes, {sum(len(t.train) for t in stream.tasks)} images")
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in ("runs", "tensorboard")}
    with open_run(options.runs / options.name, config, tensorboard=options.tensorboard) as run, progress_bar(
        console=console
    ) as progress:
        if (run.folder / "metrics.json").exists():
            console.print(f"{run.folder} is finished; its report is {run.folder / 'report.html'}. Remove it to start over.")
            return

        # -- what runs ---------------------------------------------------------------------------------------------------
        settings = Settings(
            options.epochs, options.batch, fisher_method=options.fisher, fisher_images=options.fisher_images
        )
        runner = {"jit": jit_runner, "pmap": pmap_runner}[options.runner]
        tried = methods(options)
        widest = max(len(task.classes) for task in stream.tasks)
        trainers = {
            m.name: incremental.task_trainer(
                model, base, stream, settings, m, options.seed, width=total if m.mode == "joint" else widest, runner=runner
            )
            for m in tried
        }
        patterns = [pattern for pattern, _ in adapters.VIT_TARGETS]
        reference, refer = incremental.reference_stage(model, base, stream, settings, patterns, options.seed)
        evaluate = incremental.evaluator(model, stream, settings.eval_batch)
        fingerprint = tree.fingerprint(base)
        pools = {m.name: ModulePool(run.folder / ("pool" if m is tried[0] else f"pools/{m.name}")) for m in tried}
        names = [f"{t:02d}-{task.name}" for t, task in enumerate(stream.tasks)]

        # -- resume -------------------------------------------------------------------------------------------------------
        # rows[m, t, s]: accuracy of method m after task t on task s; [..., 0] class-incremental, [..., 1] within the task
        learned = Checkpoints(run.folder / "checkpoints" / "learned")
        kept = {
            "reference": reference, "rows": np.full((len(tried), tasks, tasks, 2), np.nan),
            "seconds": np.zeros(len(tried)), "position": np.zeros((), np.int64),
        }
        first_task = 0
        if learned.latest is not None:
            kept = learned.load(kept)
            first_task = learned.latest
            console.print(f"going on after {first_task} tasks")
        reference, rows, seconds = kept["reference"], np.array(kept["rows"]), np.array(kept["seconds"])
        run.log.position = int(kept["position"])

        # -- task by task -------------------------------------------------------------------------------------------------
        heads = {}
        for t in range(first_task, tasks):
            reference = refer(reference, t)
            for i, method in enumerate(tried):
                if method.mode == "joint" and t < tasks - 1:
                    continue
                clock = time.perf_counter()
                joint, sequential = method.mode == "joint", method.mode == "sequential"
                task = data.pooled(stream) if joint else stream.tasks[t]
                begin = 0 if joint else stream.offsets[t]
                pool = pools[method.name]
                module, head = trainers[method.name](
                    task, begin, reference, pool.load(names[t - 1]) if sequential and t else None,
                    log=run.log, record={"run": method.name, "task": task.name}, progress=progress,
                    checkpoints=Checkpoints(run.folder / "checkpoints" / f"{method.name}-{t}"),
                )
                seconds[i] += time.perf_counter() - clock
                start = jax.tree.map(
                    lambda x, b=begin, n=len(task.classes): np.asarray(x[..., b : b + n]), reference.head
                )
                pool.add(
                    "joint" if joint else names[t], module, base=fingerprint, adapter=method.adapter, task=task.name,
                    classes=task.classes, seed=options.seed, extra=config, overwrite=True, head=head, start=start,
                )
                members = ["joint"] if joint else names[: t + 1]
                params = pool.compose(base, members[-1:] if sequential else members)
                heads[method.name] = incremental.stream_head(
                    [pool.load(name, "head") for name in members], [pool.load(name, "start") for name in members],
                    reference.head,
                )
                rows[i, t, : t + 1] = np.stack(evaluate(params, heads[method.name], t + 1), axis=-1)
            learned.save(t + 1, {
                "reference": reference, "rows": rows, "seconds": seconds,
                "position": np.array(run.log.position, np.int64),
            })
            line = ", ".join(f"{m.name} {np.nanmean(rows[i, t, :, 0]):.3f}" for i, m in enumerate(tried) if t == tasks - 1 or m.mode != "joint")
            console.print(f"after {stream.tasks[t].name} ({t + 1}/{tasks}): {line}")

        # -- what the pool can do without training ------------------------------------------------------------------------
        pool, head = pools[tried[0].name], incremental.stream_head(
            [pools[tried[0].name].load(name, "head") for name in names],
            [pools[tried[0].name].load(name, "start") for name in names],
            reference.head,
        )
        frozen = evaluate(base, reference.head, tasks)
        composed = pool.compose(base)
        whole = evaluate(composed, head, tasks)

        def skill(t, members):
            known = evaluate(pool.compose(base, members), head, tasks).incremental
            return {
                "task": stream.tasks[t].name, "target": float(known[t]), "control": float(np.delete(known, t).mean())
            }

        specialise = [skill(t, [names[t]]) for t in range(tasks)] if tasks > 1 else []
        unlearn = [skill(t, [n for n in names if n != names[t]]) for t in range(tasks)] if tasks > 1 else []
        samples = draw_samples(model, stream, settings, composed, head)

        # -- results ------------------------------------------------------------------------------------------------------
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
            "name": options.name, "data": stream.name, "backbone": backbone, "method": tried[0].name,
            "tasks": [task.name for task in stream.tasks], "classes": [len(task.classes) for task in stream.tasks],
            **{k: v for k, v in results[tried[0].name].items() if k != "seconds"},
            "frozen_features_accuracy": float(frozen.incremental.mean()),
            "frozen_features_task_incremental_accuracy": float(frozen.within.mean()),
            "composed": {task.name: float(a) for task, a in zip(stream.tasks, whole.incremental, strict=True)},
            "specialise": specialise, "unlearn": unlearn,
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
