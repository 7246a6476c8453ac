"""A domain without labels: its images find a route through the sources' blocks, templates and head left as they are.

    python experiments/modular_adaptation.py                              # digits rendered in four ways, no download
    python experiments/modular_adaptation.py --data pacs64 --data-dir DIR
    python experiments/modular_adaptation.py --data digits --data-dir DIR # MNIST, USPS and rendered digits
    python experiments/modular_adaptation.py --data rendered-corrupted    # or cifar100-corrupted: twelve corruptions

Each domain is left out in turn, of a corrupted set combinations and higher severities once for all: the others learn
templates, a head that they share, and an order each; then the target's training images, their labels unread, choose a
source (by information maximisation, under BN statistics of the target), or learn a route, or adapt BN (AdaBN, Tent), or
both. Nothing in a run is chosen by target labels but the row that says so. Writes `runs/NAME/`: metrics.json,
metrics.jsonl, report.html and a pool of the sources for each seed and target. A killed run goes on behind its last
finished target, a finished one may be given more seeds. The first takes a few minutes on 2 CPU cores. Expected numbers:
README.md.
"""

import time
from functools import cache, partial
from pathlib import Path

import job
import modular_options
from adaptation_ways import ADAPTED, BASELINE, MEAN, ORACLE, UNADAPTED, Way
from job import closing, console
from modular_options import Adaptation as Options

METHODS = UNADAPTED | ADAPTED
MADE = {
    "rendered": "the domains are one set of digits, rendered in four ways",
    "corrupted": "the domains are one set, corrupted in other ways each; combinations and severities are held out",
}


def parse(arguments: list[str] | None = None) -> Options:
    return modular_options.parse(Options, __doc__, arguments)


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax.numpy as jnp
import modular_job
import numpy as np
from modular_job import Session, part

from compo_jax import data, modular, report
from compo_jax.modular import ModularNet, Network, routes
from compo_jax.modular.results import AdaptationResults, Sources, Target


def open_domains(options: modular_options.Domains) -> data.TaskStream:
    where = {"data_dir": options.data_dir, "label": options.label}
    stream = data.open_domains(options.data, options.size, images=options.images, **where)
    job.tell_images(stream, options.images)
    domains = [task.name for task in stream.tasks]
    if unknown := sorted(set(options.targets) - set(domains)):
        raise ValueError(f"no domain is called {', '.join(unknown)}; there are {', '.join(domains)}")
    if len({target in stream.held_out for target in options.targets}) > 1:
        raise ValueError("--targets are all held out or none is: the same sources are learned for all of them")
    if len(domains) < 3:
        raise ValueError(f"there are {len(domains)} domains: with one left out, two sources at least must stay")
    console.print(f"{stream.name}: {', '.join(domains)}; {len(stream.tasks[0].classes)} classes")
    return modular_job.held_out(stream, options.validation)


def learned(session: Session, target: data.Task, seed: int) -> str:
    """The name of the sources' network: targets that are held out have the same sources, learned once."""
    return f"{seed}-{'held-out' if target.name in session.stream.held_out else target.name}"


# -- the sources -------------------------------------------------------------------------------------------------------
def sources(session: Session, net: ModularNet, target: data.Task, seed: int, folder: Path) -> Sources:
    tasks = session.stream.sources(target.name)
    trained, seconds = modular_job.train(session, net, tasks, f"without {target.name}", seed, folder)
    accuracy = modular_job.accuracies(session, net, trained.variables, tasks)
    console.print(f"seed {seed}: sources for {target.name} {100 * accuracy.mean():.1f} % in {seconds:.0f} s")
    network = Network(net, trained.variables)
    modular_job.store_network(session, learned(session, target, seed), network, tasks, accuracy, seed)
    return Sources(accuracy)


# -- the target --------------------------------------------------------------------------------------------------------
def adapting(session: Session, free: bool = False) -> modular.Settings:
    """Of a mixture, or of a `free` route."""
    it, linear = session.options.adapting, session.options.net.route == "linear"
    rate = it.adapt_route_rate or (3.0 if free and linear else 100.0)
    return session.settings._replace(
        steps=it.adapt_steps, batch=it.adapt_batch, learning_rate=it.adapt_learning_rate, route_rate=rate
    )


@cache
def adaptation(net: ModularNet, stream: data.TaskStream, settings: modular.Settings, way: Way, runner: str):
    return modular.adaptation(
        net, stream.prepare, settings, stream.tasks[0].classes,
        route=way.route, bn=way.bn, prior=way.prior, consistency=way.consistency,
        augment=data.augment.random_affine if way.consistency else None, runner=modular_job.RUNNERS[runner],
    )  # fmt: skip


def adapted(session: Session, target: data.Task, seed: int, folder: Path) -> Target:
    """All methods on one target, whose labels only the accuracies and the oracle see."""
    prepare, names = session.stream.prepare, [task.name for task in session.stream.sources(target.name)]
    network = modular_job.load_network(session, learned(session, target, seed), len(names))
    net, variables = network
    score = modular.accuracies(net, prepare)(variables, [target.test] * len(names))
    best = int(np.argmin(modular.source_objectives(network, prepare, target, bn="target")))
    bound = int(np.argmax(score))
    of_source = modular.source_objectives(network, prepare, target)
    accuracy = {BASELINE: score[best], ORACLE: score[bound]}
    objective = {BASELINE: of_source[best], ORACLE: of_source[bound]}
    of_sources = routes.KINDS[net.route](variables["params"]["route"])
    ways = [METHODS[name] for name in session.options.adapting.methods]
    soup = modular.soup_of_sources(network, prepare, target) if any(way.start == "soup" for way in ways) else []
    weights, runner = {}, session.options.training.runner
    for name in (MEAN, *session.options.adapting.methods):
        way, clock = METHODS[name], time.perf_counter()
        smoothing = 1e-6 if way.route == "fixed" else 0.05  # a route that is to be learned starts a little soft
        if way.start == "best":
            one, begun = modular.one_source(network, best, smoothing)
        else:
            some = modular.take_tasks(network, soup) if way.start == "soup" else network
            one, begun = modular.mean_source(some, smoothing)
        if name != MEAN:
            adapt = adaptation(one, session.stream, adapting(session, way.route == "free"), way, runner)
            mixed = of_sources if way.route in modular.MIXTURES else None
            begun = adapt(begun, target, seed, mixed, **session.logged(f"{target.name}: {name}", f"seed {seed}"))
        accuracy[name] = modular.accuracies(one, prepare)(begun, [target.test])[0]
        logits = modular.predictions(one, prepare)(begun, [target.train])[0]
        objective[name] = modular.information_maximisation(jnp.asarray(logits))
        if way.route != "fixed":
            weights[name] = rows(routes.KINDS[one.route](begun["params"]["route"]))[0]
        took = time.perf_counter() - clock
        console.print(f"seed {seed}, {target.name}: {name} {100 * accuracy[name]:.1f} % in {took:.0f} s")
    return Target(accuracy, objective, score, names[best], rows(of_sources), weights)


def rows(weights) -> np.ndarray:
    """Weights (..., layers, templates); of groups of channels a row each."""
    return np.round(np.asarray(weights).reshape(len(weights), -1, weights.shape[-1]), 4)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    stream = open_domains(options.stream)
    domains = {task.name: task for task in stream.tasks}
    targets = [domains[name] for name in options.stream.targets or stream.held_out or domains]
    for target in targets:
        job.enough_images(stream.sources(target.name), options.training.batch, "--batch")
        if options.adapting.methods:
            job.enough_images([target], options.adapting.adapt_batch, "--adapt-batch")
    classes = (len(stream.tasks[0].classes),) * len(stream.sources(targets[0].name))
    net = ModularNet(classes, shared_head=True, **vars(options.net))
    with modular_job.opened(options, stream, net) as session:
        trained, made = {seed: [] for seed in options.place.seeds}, {seed: [] for seed in options.place.seeds}
        for seed in options.place.seeds:
            for target in targets:
                name, make = f"{seed}-{target.name}", partial(sources, session, net, target, seed)
                trained[seed].append(part(session, f"{learned(session, target, seed)}-sources", Sources, make))
                made[seed].append(part(session, name, Target, partial(adapted, session, target, seed)))
                accuracies = ", ".join(f"{method} {100 * x:.1f}" for method, x in made[seed][-1].accuracy.items())
                console.print(f"seed {seed}, {target.name}: {accuracies}")
        results = AdaptationResults(
            job=modular_job.about(session, net),
            adapting=adapting(session),
            free_rate=adapting(session, free=True).route_rate,
            domains=tuple(domains),
            targets=tuple(target.name for target in targets),
            classes=stream.tasks[0].classes,
            made=MADE.get(stream.name.split("-")[-1], ""),
            baseline=BASELINE,
            methods={name: METHODS[name].group for name in (BASELINE, MEAN, *options.adapting.methods, ORACLE)},
            source_parts=tuple(map(tuple, trained.values())),
            parts=tuple(map(tuple, made.values())),
            held_out=stream.held_out,
        )
        modular_job.finish(session, results, report.adaptation_page, report.adaptation_table)


if __name__ == "__main__":
    closing(main)
