"""Several tasks at once: does each learn its own order of shared blocks, and what is that worth?

    python experiments/modular_multitask.py                                             # rendered scripts, no download
    python experiments/modular_multitask.py --data cifar100 --data-dir DIR --templates 8 32   # 20 superclasses
    python experiments/modular_multitask.py --data mnist usps omniglot --data-dir DIR --tasks 6

Learned orders beside single-task networks, hard sharing, hard sharing with a BN for each task, and fixed random routes
through as many templates. Writes `runs/NAME/`: metrics.json, metrics.jsonl, report.html, and for each learned order and
seed a pool with its templates and tasks. A killed run goes on where it was, a finished one may be given more seeds. The
first takes a few minutes on 2 CPU cores. Expected numbers: README.md.
"""

import argparse
import functools
import time

import job
from job import closing, console
from modular_options import modular_parser, parsed

BASELINES = ("single-task", "hard-sharing", "hard-sharing-bn", "random")
PRESETS = {
    "glyphs": {"tasks": 5, "layers": 4, "width": 16, "templates": [4], "steps": 250, "batch": 16, "images": 50},
    "cifar100": {"steps": 750, "batch": 16, "width": 16},
}
PRESET = {"size": 32, "layers": 8, "width": 32, "templates": [8], "steps": 1000, "batch": 32}
AMOUNTS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of a re-routing


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = modular_parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["glyphs"], help="glyphs, or names of TFDS image classification sets")
    add("--tasks", type=job.count, help="tasks that a divided set gives; default all")
    add("--templates", type=job.count, nargs="+", help="modules; several numbers make several networks")
    add("--bn", choices=["task", "layer", "template"], default="task", help="of learned orders and random routes")
    add("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES))
    add("--analysis-images", type=job.count, default=50, help="test images of a task that modules are removed on")
    options = parsed(parser, arguments, PRESETS, PRESET)
    if options.templates[0] == 1:
        parser.refuse("with one template, which can't be removed", "analysis_images")
    return options


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import jax.numpy as jnp
import modular_job
import numpy as np
import optax

from compo_jax import data, modular, report
from compo_jax.modular import ModularNet, Network, routes


def some(split: data.Split, count: int) -> data.ArraySplit:
    rows = np.random.default_rng(0).permutation(len(split))[:count]
    return data.ArraySplit(split.images(rows), split.labels[rows])


def bridge(network: Network, prepare, task: int, layer: int, split: data.Split) -> dict:
    """The loss when one layer is re-routed by and by to each template, and what its curvature forecasts."""
    one, taken = modular.take_tasks(network, [task])
    images, labels = prepare(split.images(np.arange(len(split)))), jnp.asarray(split.labels)
    found = modular.route_landscape(network, task, layer, images, labels)
    whole = routes.hard(taken["params"]["route"])

    @jax.jit
    def loss(weights):
        logits = one.apply(taken, images[None], lambda _: whole.at[0, layer].set(weights))[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    start = whole[0, layer]
    moved = start + jnp.asarray(AMOUNTS)[:, None] * (jnp.eye(one.templates)[:, None] - start)  # (M, amounts, M)
    true = np.array([[float(loss(b)) for b in row] for row in moved])
    forecast = np.array([[float(found.predict(b)) for b in row] for row in moved])
    chosen, at = int(start.argmax()), float(loss(start))
    others = np.arange(one.templates) != chosen
    wrong = np.abs(forecast - true)[others] / np.abs(true - at)[others]
    return {
        "layer": layer,
        "images": len(split),
        "chosen": chosen,
        "amounts": list(AMOUNTS),
        "true": true.tolist(),
        "forecast": forecast.tolist(),
        "loss": at,
        "error": np.median(wrong, axis=0).tolist(),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)

    # -- tasks and networks --------------------------------------------------------------------------------------------
    stream = data.open_tasks(
        options.data, options.size, data_dir=options.data_dir, tasks=options.tasks, images=options.images
    )
    job.tell_images(stream, options.images)
    names, prepare = [task.name for task in stream.tasks], stream.prepare
    train, test = [task.train for task in stream.tasks], [task.test for task in stream.tasks]
    classes, layers = tuple(len(task.classes) for task in stream.tasks), options.layers
    console.print(f"{stream.name}: {len(names)} tasks, {sum(classes)} classes, {sum(map(len, train))} images")
    settings = modular_job.settings_of(options)
    in_order = settings._replace(phases=modular_job.FIXED)
    shape = {key: getattr(options, key) for key in ("layers", "width", "patch", "block")}
    first = ModularNet(classes, templates=options.templates[0], bn=options.bn, **shape)
    plain = ModularNet(classes, templates=layers, **shape)  # each block once
    ordered = {f"ordered-{count}": first.clone(templates=count) for count in options.templates}
    nets = {"single-task": plain, "hard-sharing": plain.clone(bn="layer"), "hard-sharing-bn": plain}
    nets = {name: net for name, net in nets.items() if name in options.baselines}
    if "random" in options.baselines:
        nets |= {f"random-{net.templates}": net for net in ordered.values()}
    nets |= ordered
    runner = modular_job.runner_of(options)

    @functools.cache
    def learner(net, settings):
        return modular.learner(net, prepare, settings, stream.augment, runner=runner)

    with modular_job.opened(options, first) as (run, progress):

        def fitted(net, settings, splits, seed, order, label, folder):
            """(trained network, seconds)."""
            variables, clock = modular_job.initial(net, options.size, seed, order), time.perf_counter()
            record = {"run": label, "task": f"seed {seed}"}
            found = learner(net, settings).train(
                variables, splits, seed, folder, log=run.log, record=record, progress=progress
            )
            return found, time.perf_counter() - clock

        # -- a method and a seed ---------------------------------------------------------------------------------------
        def alone(seed, folder):
            """Every task's own network."""
            found = {"accuracy": [], "parameters": 0, "seconds": 0.0}
            for t, task in enumerate(names):
                net, order = plain.clone(classes=classes[t : t + 1]), np.arange(layers)
                one, seconds = fitted(net, in_order, train[t : t + 1], seed, order, f"alone: {task}", folder / str(t))
                found["accuracy"] += modular.accuracies(net, prepare)(one.variables, test[t : t + 1]).tolist()
                found["parameters"] += modular.parameters(one.variables["params"], route=False)
                found["seconds"] += seconds
            return found

        def fixed(name, seed, folder):
            net, order = nets[name], np.arange(layers)
            if name.startswith("random"):
                order = np.random.default_rng(seed).integers(net.templates, size=(len(names), layers))
            trained, seconds = fitted(net, in_order, train, seed, order, name, folder)
            return {
                "accuracy": modular.accuracies(net, prepare)(trained.variables, test).tolist(),
                "parameters": modular.parameters(trained.variables["params"], route=False),
                "seconds": seconds,
            }

        def learned(name, seed, folder):
            net = nets[name]
            trained, seconds = fitted(net, settings, train, seed, None, name, folder)
            variables = trained.variables
            gap = learner(net, settings).gap(trained, train, seed, test)
            modular_job.store_network(
                pool(name, seed), Network(net, variables), stream.tasks, gap.finetuned.tolist(), seed
            )
            soft = routes.soft(trained.before["params"]["route"], settings.temperature[1])
            lines = [r for r in run.log.records() if (r["run"], r["task"]) == (name, f"seed {seed}")]
            keys = ("step", "cross_entropy", "accuracy", "entropy", "unused", "temperature")
            return {
                "accuracy": gap.finetuned.tolist(),
                "parameters": modular.parameters(variables["params"]),
                "seconds": seconds,
                "gap": {key: value.tolist() for key, value in gap._asdict().items()},
                "hard": routes.indices(variables["params"]["route"]).tolist(),
                "soft": np.round(soft, 4).tolist(),
                "curves": {key: [line[key] for line in lines] for key in keys},
            }

        def pool(name, seed):
            return run.folder / "pools" / f"{name}-{seed}"

        results = {name: [] for name in nets}
        for seed in options.seeds:
            for name in nets:
                make = functools.partial(learned if name in ordered else fixed, name, seed)
                make = functools.partial(alone, seed) if name == "single-task" else make
                results[name].append(modular_job.part(run, f"{seed}-{name}", make))
                accuracy = 100 * np.mean(results[name][-1]["accuracy"])
                console.print(f"seed {seed}: {name} {accuracy:.1f} %, trained in {results[name][-1]['seconds']:.0f} s")

        # -- what the first learned order says -------------------------------------------------------------------------
        main_method, seed = next(iter(ordered)), options.seeds[0]

        @functools.cache
        def stored():
            return modular_job.load_network(pool(main_method, seed), len(names))

        def removed(folder):
            net, variables = stored()
            few = [some(split, options.analysis_images) for split in test]
            score = modular.accuracies(net, prepare)
            lost = modular.analysis.removal(
                lambda logits: score(modular.set_route(variables, logits), few),
                variables["params"]["route"], jax.random.key(seed),
            )  # fmt: skip
            return {key: value.tolist() for key, value in lost._asdict().items()} | {"images": options.analysis_images}

        def bridged(folder):
            found = bridge(stored(), prepare, 0, layers // 2, some(train[0], 256))
            return {"method": main_method, "task": names[0], **found}

        several = nets[main_method].templates > 1
        removal = modular_job.part(run, f"{seed}-removal", removed) if several else None
        forecast = modular_job.part(run, f"{seed}-bridge", bridged) if several else None

        # -- report ----------------------------------------------------------------------------------------------------
        points = modular.Gap._fields
        by_seed = lambda name, key: [found[key] for found in results[name]]
        metrics = {
            "name": options.name,
            "data": stream.name,
            "tasks": names,
            "classes": list(classes),
            "seeds": options.seeds,
            "net": modular_job.described(first, options.size),
            "steps": options.steps,
            "phases": list(settings.phases),
            "methods": {
                name: {
                    "accuracy": by_seed(name, "accuracy"),
                    "parameters": results[name][0]["parameters"],
                    "macs": modular.macs(net, options.size),
                    "seconds": by_seed(name, "seconds"),
                }
                for name, net in nets.items()
            },
            "gap": {name: {p: [found["gap"][p] for found in results[name]] for p in points} for name in ordered},
            "curves": {
                name: results[name][0]["curves"] | {"phases": list(settings.phases), "steps": options.steps}
                for name in ordered
            },
            "routes": {
                name: {
                    "templates": net.templates, "hard": by_seed(name, "hard"), "soft": results[name][0]["soft"]
                }
                for name, net in ordered.items()
            },
            "removal": {main_method: removal} if removal else {},
            "bridge": forecast,
        }  # fmt: skip
        modular_job.finish(run, metrics, report.multitask, report.multitask_table)


if __name__ == "__main__":
    closing(main)
