"""A new task on frozen templates: how far does learning the order of blocks alone go, at few labels and at many?

    python experiments/modular_transfer.py                                              # rendered scripts, no download
    python experiments/modular_transfer.py --data cifar100 --data-dir DIR --held-out 4  # of 20 superclasses

For each seed some tasks are left out, the others learn templates and an order each, and each task left out is learned
from few labelled images: its head, its route, its BN, all, or a network from scratch. Where a source's route is the
start, it is the source whose features tell the few images' classes apart best (nearest centroid, cross-validated).
Controls: a random route, a new route, untrained templates. Writes `runs/NAME/`: metrics.json, metrics.jsonl,
report.html and a pool of templates and source tasks for each seed. A killed run goes on behind its last finished part,
a finished one may be given more seeds. The first takes a few minutes on 2 CPU cores. Expected numbers: README.md.
"""

import argparse
import functools

import job
from job import closing, console
from modular_options import modular_parser, parsed

PRESETS = {
    "glyphs": {
        "tasks": 5,
        "layers": 4,
        "width": 16,
        "templates": 4,
        "steps": 250,
        "batch": 16,
        "budgets": [5, 0],
        "new_steps": 80,
        "images": 50,
    },
    "cifar100": {"width": 16, "steps": 750, "batch": 16},
}
PRESET = {
    "size": 32, "layers": 8, "width": 32, "templates": 8, "steps": 1000, "batch": 32,
    "budgets": [10, 100, 0], "new_steps": 150,
}  # fmt: skip
PARTS = ("head", "head+route", "head+bn", "head+bn+route", "all")  # those of modular.PARTS
CONTROLS = ("head, random route", "head+route, new route", "head+route, untrained templates")
METHODS = (*PARTS, "scratch", *CONTROLS)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = modular_parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["glyphs"], help="glyphs, or names of TFDS image classification sets")
    add("--tasks", type=job.count, help="tasks that a divided set gives; default all")
    add("--templates", type=job.count, help="modules")
    add("--held-out", type=job.count, default=1, help="tasks left out, drawn by the seed")
    add("--budgets", type=job.number(int, 0), nargs="+", help="labelled images of each class of a new task; 0 for all")
    add("--new-steps", type=job.count, help="steps of a new task's training")
    add("--new-batch", type=job.count, default=32)
    add("--new-learning-rate", type=job.rate, default=1e-2)
    add(
        "--smoothing",
        type=job.number(float, above=0, below=1),
        default=0.3,
        help="of the source's route, where a new one starts from it",
    )
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="; ".join(METHODS))
    options = parsed(parser, arguments, PRESETS, PRESET)
    if "head" not in options.methods:
        raise ValueError("the other methods are held against head: name it among --methods, too")
    if not {"head+route", "head+bn+route", "all"} & set(options.methods):
        parser.refuse("where no method learns the source's route", "smoothing")
    if 1 in options.budgets:
        raise ValueError(
            "--budgets are 2 or more, for the nearest source is told by two images of each class; 0 for all"
        )
    return options


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import jax.numpy as jnp
import modular_job
import numpy as np
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import NearestCentroid

from compo_jax import data, modular, report, tree
from compo_jax.modular import ModularNet, Network, routes


def few(task: data.Task, budget: int, seed: int) -> data.ArraySplit:
    """`budget` images of each class, the same for all methods; all of them for 0."""
    rng = np.random.default_rng(seed)
    each = [rng.permutation(np.flatnonzero(task.train.labels == c)) for c in range(len(task.classes))]
    rows = np.sort(np.concatenate([own[: budget or None] for own in each]))
    return data.ArraySplit(task.train.images(rows), task.train.labels[rows])


def nearest_source(network: Network, prepare, split: data.Split, images: int = 250) -> int:
    """The source task whose hard route tells the classes of these labelled images apart best; BN is theirs."""
    net, count = network.net, int(split.labels.max()) + 1
    rows = np.concatenate([np.flatnonzero(split.labels == c)[: max(images // count, 2)] for c in range(count)])
    labels = split.labels[rows]
    folds = int(min(5, np.bincount(labels).min()))
    features = jax.jit(
        lambda variables, images: net.apply(
            variables, jnp.stack([images] * len(net.classes)), routes.hard, True,
            method="features", mutable=["batch_stats"],
        )[0]
    )(network.variables, prepare(split.images(rows)))  # fmt: skip
    scores = [cross_val_score(NearestCentroid(), np.asarray(x), labels, cv=folds).mean() for x in features]
    return int(np.argmax(scores))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)

    # -- tasks and network ---------------------------------------------------------------------------------------------
    stream = data.open_tasks(
        options.data, options.size, data_dir=options.data_dir, tasks=options.tasks, images=options.images
    )
    job.tell_images(stream, options.images)
    total, prepare = len(stream.tasks), stream.prepare
    if not 1 <= options.held_out <= total - 1:
        raise ValueError(f"{options.held_out} of {total} tasks can't be left out: one must stay at least")
    for task in stream.tasks:
        fewest = int(np.bincount(task.train.labels).min())
        if max(options.budgets) > fewest:
            raise ValueError(
                f"{max(options.budgets)} images of each class were asked for and a class of {task.name!r} has "
                f"{fewest}: lower --budgets; 0 takes all"
            )
    console.print(f"{stream.name}: {total} tasks, {options.held_out} of them left out")
    shape = {key: getattr(options, key) for key in ("layers", "templates", "width", "patch", "block")}
    first = ModularNet((len(stream.tasks[0].classes),), **shape)
    settings = modular_job.settings_of(options)
    new = settings._replace(steps=options.new_steps, batch=options.new_batch, learning_rate=options.new_learning_rate)
    runner = modular_job.runner_of(options)

    @functools.cache
    def transfer(net, part, settings):
        return modular.transfer(net, prepare, settings, part, stream.augment, runner=runner)

    def divided(seed):
        """(tasks left out, the others)."""
        out = np.sort(np.random.default_rng(seed).permutation(total)[: options.held_out]).tolist()
        return [stream.tasks[t] for t in out], [stream.tasks[t] for t in range(total) if t not in out]

    with modular_job.opened(options, first) as (run, progress):

        def pool(seed):
            return run.folder / "pools" / str(seed)

        # -- the templates, by the other tasks -------------------------------------------------------------------------
        def templates(seed, folder):
            sources = divided(seed)[1]
            net = ModularNet(tuple(len(task.classes) for task in sources), **shape)
            trained = modular.learner(net, prepare, settings, stream.augment, runner=runner).train(
                modular_job.initial(net, options.size, seed), [task.train for task in sources], seed,
                folder, log=run.log, record={"run": "sources", "task": f"seed {seed}"}, progress=progress,
            )  # fmt: skip
            accuracy = modular.accuracies(net, prepare)(trained.variables, [task.test for task in sources]).tolist()
            modular_job.store_network(pool(seed), Network(net, trained.variables), sources, accuracy, seed)
            return {"accuracy": accuracy}

        # -- a new task ------------------------------------------------------------------------------------------------
        def start(method, network, source, classes, key):
            """(network, variables, part that learns, settings) of a method on a new task."""
            part = method.split(",")[0]
            if method in ("scratch", "head+route, untrained templates"):
                alone = network.net.clone(classes=(classes,))
                order = np.arange(options.layers) % options.templates if method == "scratch" else None
                fresh = modular_job.initial(alone, options.size, int(jax.random.randint(key, (), 0, 2**30)), order)
                fixed = new._replace(phases=modular_job.FIXED)
                return alone, fresh, *(("all", fixed) if method == "scratch" else (part, new))
            if method == "head+route, new route":
                return *modular.new_task(network, key, classes), part, new
            one, begun = modular.new_task(network, key, classes, like=source)
            chosen = routes.hard(begun["params"]["route"])
            logits = routes.to_logits(chosen, options.smoothing)
            if method == "head, random route":
                logits = routes.random(key, chosen.shape[:-1], options.templates)
            return one, modular.set_route(begun, logits), part, new

        def learned(seed, budget, folder):
            """Every method on every task left out, from this many labelled images of each class."""
            new_tasks, sources = divided(seed)
            network = modular_job.load_network(pool(seed), len(sources))
            found, chosen = {name: [] for name in options.methods}, []
            for h, task in enumerate(new_tasks):
                split = few(task, budget, seed)
                source = nearest_source(network, prepare, split)
                chosen.append(sources[source].name)
                for method in options.methods:
                    key = jax.random.fold_in(jax.random.key(seed), h)
                    one, begun, part, trains = start(method, network, source, len(task.classes), key)
                    learn = transfer(one, part, trains)
                    trained = learn.train(
                        begun, [split], seed, log=run.log, progress=progress,
                        record={"run": method, "task": f"{task.name}, {budget or 'all'} labels, seed {seed}"},
                    ).variables  # fmt: skip
                    accuracy = modular.accuracies(one, prepare)(trained, [task.test])[0]
                    found[method].append(float(accuracy))
            return {"accuracy": found, "chosen": chosen}

        source, results = [], {budget: [] for budget in options.budgets}
        for seed in options.seeds:
            source.append(modular_job.part(run, f"{seed}-sources", functools.partial(templates, seed)))
            console.print(f"seed {seed}: sources {100 * np.mean(source[-1]['accuracy']):.1f} %")
            for budget in options.budgets:
                made = modular_job.part(run, f"{seed}-{budget}", functools.partial(learned, seed, budget))
                results[budget].append(made)
                means = {name: 100 * np.mean(values) for name, values in results[budget][-1]["accuracy"].items()}
                told = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
                console.print(f"seed {seed}, {budget or 'all'} labels a class: {told}")

        # -- report ----------------------------------------------------------------------------------------------------
        pairs = [divided(seed) for seed in options.seeds]
        net = ModularNet((len(pairs[0][0][0].classes),), **shape)
        params = modular_job.initial(net, options.size, 0)["params"]
        size = lambda patterns: modular.parameters(tree.partition(params, patterns)[0])
        shared = modular.parameters({key: params[key] for key in ("stem", "templates")})
        whole = modular.parameters(params)

        def sizes(method):
            """(scalars that learn, scalars that a new task adds to the pool)."""
            if method == "scratch":
                alone = modular.parameters(params, route=False)
                return alone, alone
            part = method.split(",")[0]
            return size(modular.PARTS[part]), whole if part == "all" else whole - shared

        metrics = {
            "name": options.name,
            "data": stream.name,
            "tasks": [[task.name for task in sources] for _, sources in pairs],
            "held_out": [[task.name for task in out] for out, _ in pairs],
            "classes": [[len(task.classes) for task in out] for out, _ in pairs],
            "seeds": options.seeds,
            "net": modular_job.described(net, options.size),
            "budgets": [budget or None for budget in options.budgets],
            "training": {"steps": options.new_steps, "batch": options.new_batch, "rate": options.new_learning_rate},
            "methods": {
                name: {
                    "accuracy": [[found["accuracy"][name] for found in results[b]] for b in options.budgets],
                    "trained": sizes(name)[0],
                    "stored": sizes(name)[1],
                    "control": name in CONTROLS,
                }
                for name in options.methods
            },
            "source": [found["accuracy"] for found in source],
            "chosen": [[found["chosen"] for found in results[b]] for b in options.budgets],
        }
        modular_job.finish(run, metrics, report.transfer, report.transfer_table)


if __name__ == "__main__":
    closing(main)
