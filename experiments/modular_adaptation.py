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

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import job
import modular_options
import options as line
from job import closing, console
from modular_options import Images, Names, Place, Templates, Training
from options import OpenCount, Rate

PRESETS = {
    "rendered": {
        "layers": 4, "width": 16, "templates": 4, "steps": 250, "batch": 16, "adapt_steps": 40, "adapt_batch": 32,
        "images": 50,
    },
    "digits": {"steps": 500, "width": 16},
    "pacs64": {"size": 64, "patch": 8, "steps": 700},
}  # fmt: skip
PRESET = {
    "layers": 8, "width": 32, "templates": 8, "steps": 1000, "batch": 32, "adapt_steps": 100, "adapt_batch": 64,
}  # fmt: skip
BASELINE = "best source (by objective)"
ORACLE = "best source (by labels)"
MEAN = "mean of sources"
# name: (start, what of the route is learned, BN, group); see modular.adaptation
METHODS = {
    BASELINE: ("best", "fixed", "source", "sources"),
    MEAN: ("mean", "fixed", "source", "sources"),
    ORACLE: ("best", "fixed", "source", "oracle"),
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
ADAPTED = tuple(name for name, (_, route, bn, _) in METHODS.items() if (route, bn) != ("fixed", "source"))


@dataclass(frozen=True)
class Domains(Images):
    """What is learned"""

    data: str = "rendered"
    """rendered; digits; or a TFDS set whose splits are domains"""
    targets: Names = ()
    """domains left out in turn (default: all)"""


@dataclass(frozen=True)
class Adapting:
    """A domain without labels"""

    methods: Annotated[tuple[str, ...], line.names(ADAPTED)] = ADAPTED
    """what is adapted, and where it starts: see the table in README.md"""
    adapt_steps: OpenCount = None
    """steps of an adaptation (default: the set's)"""
    adapt_batch: OpenCount = None
    """images in such a step (default: the set's)"""
    adapt_learning_rate: Rate = 1e-3
    """of batch norm"""
    route_rate: Rate = 100.0
    """of a route, in multiples of that rate"""


@dataclass(frozen=True)
class Options:
    stream: Domains
    net: Templates
    training: Training
    adapting: Adapting
    place: Place


def parse(arguments: list[str] | None = None) -> Options:
    options = line.parse(Options, __doc__, arguments)
    methods, when = [METHODS[name] for name in options.adapting.methods], "with these --methods"
    if not methods:
        line.refuse(options.adapting, when, "adapt_batch")
    if not any(route != "fixed" or bn == "affine" for _, route, bn, _ in methods):
        line.refuse(options.adapting, when, "adapt_steps", "adapt_learning_rate")
    if not any(route != "fixed" for _, route, _, _ in methods):
        line.refuse(options.adapting, when, "route_rate")
    return modular_options.completed(options, "modular-adaptation", PRESETS, PRESET)


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax.numpy as jnp
import modular_job
import numpy as np
from modular_job import Session, part, pool

from compo_jax import data, modular, report
from compo_jax.modular import ModularNet, Sources, Target, routes


def open_domains(options: Domains) -> data.TaskStream:
    stream = data.open_domains(options.data, options.size, data_dir=options.data_dir, images=options.images)
    job.tell_images(stream, options.images)
    domains = [task.name for task in stream.tasks]
    if unknown := sorted(set(options.targets) - set(domains)):
        raise ValueError(f"no domain is called {', '.join(unknown)}; there are {', '.join(domains)}")
    if len(domains) < 3:
        raise ValueError(f"there are {len(domains)} domains: with one left out, two sources at least must stay")
    console.print(f"{stream.name}: {', '.join(domains)}; {len(stream.tasks[0].classes)} classes")
    return stream


def others(session: Session, target: data.Task) -> list[data.Task]:
    return [domain for domain in session.stream.tasks if domain.name != target.name]


# -- the sources -------------------------------------------------------------------------------------------------------
def sources(session: Session, net: ModularNet, target: data.Task, seed: int, folder: Path) -> Sources:
    tasks = others(session, target)
    trained, _ = modular_job.train(session, net, tasks, f"without {target.name}", seed, folder)
    accuracy = modular_job.accuracies(session, net, trained.variables, tasks)
    modular_job.store_network(pool(session, f"{seed}-{target.name}"), net, trained.variables, tasks, accuracy, seed)
    return Sources(accuracy)


# -- the target --------------------------------------------------------------------------------------------------------
def adapting(session: Session) -> modular.Settings:
    it = session.options.adapting
    return session.settings._replace(
        steps=it.adapt_steps, batch=it.adapt_batch, learning_rate=it.adapt_learning_rate, route_rate=it.route_rate
    )


@cache
def adaptation(net: ModularNet, stream: data.TaskStream, settings: modular.Settings, route: str, bn: str, runner: str):
    classes, runner = stream.tasks[0].classes, modular_job.RUNNERS[runner]
    return modular.adaptation(net, stream.prepare, settings, classes, route=route, bn=bn, runner=runner)


def adapted(session: Session, target: data.Task, seed: int, folder: Path) -> Target:
    """All methods on one target, whose labels only the accuracies and the oracle see."""
    prepare, names = session.stream.prepare, [task.name for task in others(session, target)]
    net, variables = modular_job.load_network(pool(session, f"{seed}-{target.name}"), len(names))
    score = modular.accuracies(net, prepare)(variables, [target.test] * len(names))
    best = int(np.argmin(modular.source_objectives(net, prepare, variables, target, bn="target")))
    bound = int(np.argmax(score))
    of_source = modular.source_objectives(net, prepare, variables, target)
    accuracy, objective = (
        {BASELINE: score[best], ORACLE: score[bound]},
        {BASELINE: of_source[best], ORACLE: of_source[bound]},
    )
    hard, weights = routes.hard(variables["params"]["route"]), {}
    for name in (MEAN, *session.options.adapting.methods):
        start, route, bn, _ = METHODS[name]
        smoothing = 1e-6 if route == "fixed" else 0.05  # a route that is to be learned starts a little soft
        if start == "best":
            one, begun = modular.one_source(net, variables, best, smoothing)
        else:
            one, begun = modular.mean_source(net, variables, smoothing)
        if name != MEAN:
            adapt = adaptation(one, session.stream, adapting(session), route, bn, session.options.training.runner)
            mixed = hard if route == "convex" else None
            begun = adapt(begun, target, seed, mixed, **session.logged(f"{target.name}: {name}", f"seed {seed}"))
        accuracy[name] = modular.accuracies(one, prepare, routes.soft)(begun, [target.test])[0]
        logits = modular.predictions(one, prepare, routes.soft)(begun, [target.train])[0]
        objective[name] = modular.information_maximisation(jnp.asarray(logits))
        if route != "fixed":
            weights[name] = np.round(routes.soft(begun["params"]["route"])[0], 4)
    return Target(accuracy, objective, score, names[best], routes.indices(variables["params"]["route"]), weights)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    stream = open_domains(options.stream)
    domains = {task.name: task for task in stream.tasks}
    targets = [domains[name] for name in options.stream.targets or domains]
    classes = (len(stream.tasks[0].classes),) * (len(stream.tasks) - 1)
    net = ModularNet(classes, shared_head=True, **vars(options.net))
    with modular_job.opened(options, stream, net) as session:
        trained, made = {seed: [] for seed in options.place.seeds}, {seed: [] for seed in options.place.seeds}
        for seed in options.place.seeds:
            for target in targets:
                name, make = f"{seed}-{target.name}", partial(sources, session, net, target, seed)
                trained[seed].append(part(session, f"{name}-sources", Sources, make))
                made[seed].append(part(session, name, Target, partial(adapted, session, target, seed)))
                accuracies = ", ".join(f"{method} {100 * x:.1f}" for method, x in made[seed][-1].accuracy.items())
                console.print(f"seed {seed}, {target.name}: {accuracies}")
        results = modular.AdaptationResults(
            modular_job.about(session, net),
            adapting(session),
            tuple(domains),
            tuple(target.name for target in targets),
            stream.tasks[0].classes,
            "the domains are one set of digits, rendered in four ways" if stream.name == "rendered" else "",
            BASELINE,
            {name: METHODS[name][-1] for name in (BASELINE, MEAN, *options.adapting.methods, ORACLE)},
            tuple(map(tuple, trained.values())),
            tuple(map(tuple, made.values())),
        )
        modular_job.finish(session, results, report.adaptation_page, report.adaptation_table)


if __name__ == "__main__":
    closing(main)
