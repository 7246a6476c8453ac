"""A domain without labels: its images find a route through the sources' blocks, templates and head left as they are.

    python experiments/modular_adaptation.py                              # digits rendered in four ways, no download
    python experiments/modular_adaptation.py --data pacs64 --data-dir DIR
    python experiments/modular_adaptation.py --data digits --data-dir DIR # MNIST, USPS and rendered digits

Each domain is left out in turn: the others learn templates, a head that they share, and an order each; then the
target's training images, their labels unread, choose a source (by information maximisation, under BN statistics of the
target), or learn a route, or adapt BN (AdaBN, Tent), or both. Nothing in a run is chosen by target labels but the row
that says so. Writes `runs/NAME/`: metrics.json, metrics.jsonl, report.html and a pool of the sources for each seed and
target. A killed run goes on behind its last finished target, a finished one may be given more seeds. The first takes
a few minutes on 2 CPU cores. Expected numbers: README.md.
"""

import argparse
import functools

import job
from job import closing, console
from modular_options import modular_parser, parsed

PRESETS = {
    "rendered": {
        "layers": 4,
        "width": 16,
        "templates": 4,
        "steps": 250,
        "batch": 16,
        "adapt_steps": 40,
        "adapt_batch": 32,
        "images": 50,
    },
    "digits": {"steps": 500, "width": 16},
    "pacs64": {"size": 64, "patch": 8, "steps": 700},
}
PRESET = {
    "size": 32, "patch": 4, "layers": 8, "width": 32, "templates": 8, "steps": 1000, "batch": 32,
    "adapt_steps": 100, "adapt_batch": 64,
}  # fmt: skip
BASELINE = "best source (by objective)"
ORACLE = "best source (by labels)"
# name: (start, what of the route is learned, BN, group); see modular.adaptation
ADAPTED = {
    "route from best source": ("best", "free", "source", "order"),
    "route from mean": ("mean", "free", "source", "order"),
    "convex mixture": ("mean", "convex", "source", "order"),
    "AdaBN, best source": ("best", "fixed", "target", "bn"),
    "AdaBN, mean of sources": ("mean", "fixed", "target", "bn"),
    "Tent, best source": ("best", "fixed", "affine", "bn"),
    "route from best source + AdaBN": ("best", "free", "target", "order+bn"),
    "route from mean + AdaBN": ("mean", "free", "target", "order+bn"),
    "convex mixture + AdaBN": ("mean", "convex", "target", "order+bn"),
    "route from best source + Tent": ("best", "free", "affine", "order+bn"),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = modular_parser(__doc__)
    add = parser.add_argument
    add("--data", default="rendered", help="rendered; digits; or a TFDS set whose splits are domains")
    add("--templates", type=job.count, help="modules")
    add("--targets", nargs="+", help="domains left out in turn; default all")
    add("--adapt-steps", type=job.count, help="steps of an adaptation")
    add("--adapt-batch", type=job.count)
    add("--adapt-learning-rate", type=job.rate, default=1e-3)
    add("--route-rate", type=job.rate, default=100.0, help="of a route, in multiples of that rate")
    add("--methods", nargs="*", choices=ADAPTED, default=list(ADAPTED), metavar="NAME", help="; ".join(ADAPTED))
    parser.set_defaults(patch=None)
    options = parsed(parser, arguments, PRESETS, PRESET)
    methods, told = [ADAPTED[name] for name in options.methods], "with these --methods"
    if not methods:
        parser.refuse(told, "adapt_batch")
    if not any(route != "fixed" or bn == "affine" for _, route, bn, _ in methods):
        parser.refuse(told, "adapt_steps", "adapt_learning_rate")
    if not any(route != "fixed" for _, route, _, _ in methods):
        parser.refuse(told, "route_rate")
    return options


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax.numpy as jnp
import modular_job
import numpy as np

from compo_jax import data, modular, report
from compo_jax.modular import ModularNet, Network, routes


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)

    # -- domains and network -------------------------------------------------------------------------------------------
    stream = data.open_domains(options.data, options.size, data_dir=options.data_dir, images=options.images)
    job.tell_images(stream, options.images)
    domains = {task.name: task for task in stream.tasks}
    targets, prepare, classes = options.targets or list(domains), stream.prepare, stream.tasks[0].classes
    if unknown := sorted(set(targets) - set(domains)):
        raise ValueError(f"no domain is called {', '.join(unknown)}; there are {', '.join(domains)}")
    if len(domains) < 3:
        raise ValueError(f"there are {len(domains)} domains: with one left out, two sources at least must stay")
    console.print(f"{stream.name}: {', '.join(domains)}; {len(classes)} classes")
    shape = {key: getattr(options, key) for key in ("layers", "templates", "width", "patch", "block")}
    net = ModularNet((len(classes),) * (len(domains) - 1), shared_head=True, **shape)
    one = net.clone(classes=net.classes[:1])
    settings, runner = modular_job.settings_of(options), modular_job.runner_of(options)
    learner = modular.learner(net, prepare, settings, stream.augment, runner=runner)
    adapting = settings._replace(
        steps=options.adapt_steps,
        batch=options.adapt_batch,
        learning_rate=options.adapt_learning_rate,
        route_rate=options.route_rate,
    )

    @functools.cache
    def adaptation(route, bn):
        return modular.adaptation(one, prepare, adapting, classes, route=route, bn=bn, runner=runner)

    with modular_job.opened(options, net) as (run, progress):

        def pool(seed, target):
            return run.folder / "pools" / f"{seed}-{target}"

        def others(target):
            return [domain for name, domain in domains.items() if name != target]

        # -- the sources -----------------------------------------------------------------------------------------------
        def sources(seed, target, folder):
            tasks = others(target)
            trained = learner.train(
                modular_job.initial(net, options.size, seed), [task.train for task in tasks], seed,
                folder, log=run.log, record={"run": f"without {target}", "task": f"seed {seed}"}, progress=progress,
            )  # fmt: skip
            accuracy = modular.accuracies(net, prepare)(trained.variables, [task.test for task in tasks]).tolist()
            modular_job.store_network(pool(seed, target), Network(net, trained.variables), tasks, accuracy, seed)
            return {"accuracy": accuracy}

        # -- the target ------------------------------------------------------------------------------------------------
        def adapted(seed, target, folder):
            task, names = domains[target], [other.name for other in others(target)]
            network = modular_job.load_network(pool(seed, target), len(names))
            net, variables = network
            score = modular.accuracies(net, prepare)(variables, [task.test] * len(names))
            objectives = modular.source_objectives(network, prepare, task, bn="target")
            own = routes.hard(variables["params"]["route"])
            best, bound = int(np.argmin(objectives)), int(np.argmax(score))
            starts = {}  # a route that is to be learned starts a little soft
            for name, smoothing in (("fixed", 1e-6), ("learned", 0.05)):
                starts["best", name] = modular.one_source(network, best, smoothing).variables
                starts["mean", name] = modular.mean_source(network, smoothing).variables
            plain = modular.source_objectives(network, prepare, task)
            accuracy = {BASELINE: score[best], ORACLE: score[bound]}
            objective = {BASELINE: plain[best], ORACLE: plain[bound]}
            weights, learned = {}, [name for name in options.methods if ADAPTED[name][1] != "fixed"]

            def measure(name, found):
                accuracy[name] = modular.accuracies(one, prepare, routes.soft)(found, [task.test])[0]
                logits = modular.predictions(one, prepare, routes.soft)(found, [task.train])[0]
                objective[name] = modular.information_maximisation(jnp.asarray(logits))
                weights[name] = np.round(routes.soft(found["params"]["route"])[0], 4).tolist()

            measure("mean of sources", starts["mean", "fixed"])
            for name in options.methods:
                start, route, bn, _ = ADAPTED[name]
                begun = starts[start, "fixed" if route == "fixed" else "learned"]
                record = {"run": f"{target}: {name}", "task": f"seed {seed}"}
                mixed = own if route == "convex" else None
                measure(
                    name,
                    adaptation(route, bn)(begun, task, seed, mixed, log=run.log, record=record, progress=progress),
                )
            return {
                "accuracy": {name: float(value) for name, value in accuracy.items()},
                "objective": {name: float(value) for name, value in objective.items()},
                "sources": dict(zip(names, score.tolist(), strict=True)),
                "chosen": names[best],
                "routes": {
                    "sources": dict(zip(names, own.argmax(-1).tolist(), strict=True)),
                    "adapted": {name: value for name, value in weights.items() if name in learned},
                },
            }

        trained, found = [], []  # by seed of by target
        for seed in options.seeds:
            trained.append([])
            found.append([])
            for target in targets:
                trained[-1].append(
                    modular_job.part(run, f"{seed}-{target}-sources", functools.partial(sources, seed, target))
                )
                found[-1].append(modular_job.part(run, f"{seed}-{target}", functools.partial(adapted, seed, target)))
                told = ", ".join(f"{name} {100 * x:.1f}" for name, x in found[-1][-1]["accuracy"].items())
                console.print(f"seed {seed}, {target}: {told}")

        # -- report ----------------------------------------------------------------------------------------------------
        groups = {BASELINE: "sources", "mean of sources": "sources", ORACLE: "oracle"}
        groups |= {name: ADAPTED[name][-1] for name in options.methods}
        each = lambda key: [[one[key] for one in row] for row in found]
        metrics = {
            "name": options.name,
            "data": stream.name,
            "domains": list(domains),
            "targets": targets,
            "classes": list(classes),
            "seeds": options.seeds,
            "net": modular_job.described(net, options.size),
            "made": "the domains are one set of digits, rendered in four ways" if stream.name == "rendered" else None,
            "baseline": BASELINE,
            "methods": {
                name: {
                    "accuracy": [[target[name] for target in row] for row in each("accuracy")],
                    "objective": [[target[name] for target in row] for row in each("objective")],
                    "group": group,
                }
                for name, group in groups.items()
            },
            "sources": each("sources"),
            "source_accuracy": [
                [
                    dict(zip([other.name for other in others(target)], one["accuracy"], strict=True))
                    for target, one in zip(targets, row, strict=True)
                ]
                for row in trained
            ],
            "chosen": each("chosen"),
            "routes": {target: one["routes"] for target, one in zip(targets, found[0], strict=True)},
            "templates": options.templates,
        }
        modular_job.finish(run, metrics, report.adaptation, report.adaptation_table)


if __name__ == "__main__":
    closing(main)
