"""Accuracy at equal parameters: twice as many layers, which go through the same blocks again, in a learned order.

    python experiments/modular_reuse.py                                       # rendered characters, no download
    python experiments/modular_reuse.py --data cifar100 --data-dir DIR

L blocks in L layers; in 2L layers, each block twice in a row (AABB), the whole twice (ABAB), each block twice in random
order, and in a learned order; and 2L blocks in 2L layers, the upper bound. BN's scale and bias belong to the block, so
that depth costs no parameter but the logits of a learned order (`--bn task` gives each layer its own). Writes
`runs/NAME/`: metrics.json, metrics.jsonl, report.html and a pool for each learned order. A killed run goes on where it
was, a finished one may be given more seeds. The first takes a few minutes on 2 CPU cores. Expected numbers:
README.md.
"""

import argparse
import functools
import time

import job
from job import closing, console
from modular_options import modular_parser, parsed

PRESETS = {
    "glyphs": {"layers": 2, "width": 16, "steps": 400, "batch": 64, "tasks": 4, "images": 50},
    "cifar100": {"layers": 3, "steps": 1600},
}
PRESET = {"tasks": None, "size": 32, "layers": 4, "width": 32, "steps": 2000, "batch": 128}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = modular_parser(__doc__)
    add = parser.add_argument
    add("--data", default="glyphs", help="glyphs, or the name of a TFDS image classification set")
    add("--tasks", type=job.count, help="scripts whose characters are the classes (rendered characters); default all")
    add("--bn", choices=["template", "task"], default="template", help="whose scale and bias: the block's, the layer's")
    return parsed(parser, arguments, PRESETS, PRESET)


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import modular_job
import numpy as np

from compo_jax import data, modular, report
from compo_jax.modular import ModularNet, Network, routes


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)

    # -- one task, and how its blocks are ordered ----------------------------------------------------------------------
    found = data.open_tasks(
        [options.data], options.size, data_dir=options.data_dir, tasks=options.tasks, images=options.images
    )
    job.tell_images(found, options.images)
    task, prepare, blocks = data.pooled(found), found.prepare, options.layers
    classes, double = len(task.classes), 2 * options.layers
    console.print(f"{found.name}: {classes} classes, {len(task.train)} images")
    shape = {key: getattr(options, key) for key in ("width", "patch", "block", "bn")}
    short = ModularNet((classes,), layers=blocks, templates=blocks, **shape)
    deep = short.clone(layers=double)
    orders = {
        f"{blocks}-layers": (short, lambda seed: np.arange(blocks)),
        "aabb": (deep, lambda seed: np.repeat(np.arange(blocks), 2)),
        "abab": (deep, lambda seed: np.tile(np.arange(blocks), 2)),
        "random": (deep, lambda seed: np.random.default_rng(seed).permutation(np.repeat(np.arange(blocks), 2))),
        "learned": (deep, lambda seed: None),
        "distinct": (deep.clone(templates=double), lambda seed: np.arange(double)),
    }
    settings, runner = modular_job.settings_of(options), modular_job.runner_of(options)

    @functools.cache
    def learner(net, settings):
        return modular.learner(net, prepare, settings, found.augment, runner=runner)

    with modular_job.opened(options, deep) as (run, progress):
        # -- an order and a seed ---------------------------------------------------------------------------------------
        def measured(name, seed, folder):
            clock, (net, order) = time.perf_counter(), orders[name]
            learns = learner(net, settings if name == "learned" else settings._replace(phases=modular_job.FIXED))
            trained = learns.train(
                modular_job.initial(net, options.size, seed, order(seed)), [task.train], seed, folder,
                log=run.log, record={"run": name, "task": f"seed {seed}"}, progress=progress,
            )  # fmt: skip
            seconds, params = time.perf_counter() - clock, trained.variables["params"]
            made = {
                "accuracy": float(modular.accuracies(net, prepare)(trained.variables, [task.test], 256)[0]),
                "train_accuracy": float(modular.accuracies(net, prepare)(trained.variables, [some], 256)[0]),
                "parameters": modular.parameters(params, route=name == "learned"),
                "route": routes.indices(params["route"])[0].tolist(),
                "seconds": seconds,
            }
            if name == "learned":
                gap = learns.gap(trained, [task.train], seed, [task.test])
                made["gap"] = {key: float(value[0]) for key, value in gap._asdict().items()}
                modular_job.store_network(
                    run.folder / "pools" / f"learned-{seed}",
                    Network(net, trained.variables),
                    [task],
                    [made["accuracy"]],
                    seed,
                )
            return made

        rows = np.random.default_rng(0).permutation(len(task.train))[: len(task.test)]
        some = data.ArraySplit(task.train.images(rows), task.train.labels[rows])
        results = {name: [] for name in orders}
        for seed in options.seeds:
            for name in orders:
                results[name].append(modular_job.part(run, f"{seed}-{name}", functools.partial(measured, name, seed)))
                made = results[name][-1]
                console.print(f"seed {seed}: {name} {100 * made['accuracy']:.1f} % in {made['seconds']:.0f} s")

        # -- report ----------------------------------------------------------------------------------------------------
        points = modular.Gap._fields
        by_seed = lambda name, key: [made[key] for made in results[name]]
        metrics = {
            "name": options.name,
            "data": found.name,
            "classes": classes,
            "blocks": blocks,
            "seeds": options.seeds,
            "net": modular_job.described(deep, options.size),
            "methods": {
                name: {
                    **{key: by_seed(name, key) for key in ("accuracy", "train_accuracy", "route", "seconds")},
                    "parameters": results[name][0]["parameters"],
                    "macs": modular.macs(net, options.size),
                    "layers": net.layers,
                    "templates": net.templates,
                }
                for name, (net, _) in orders.items()
            },
            "gap": {"learned": {point: [made["gap"][point] for made in results["learned"]] for point in points}},
        }
        modular_job.finish(run, metrics, report.reuse, report.reuse_table)


if __name__ == "__main__":
    closing(main)
