"""A new task on frozen templates: how far does learning the order of blocks alone go, at few labels and at many?

    python experiments/modular_transfer.py                                              # rendered scripts, no download
    python experiments/modular_transfer.py --data cifar100 --data-dir DIR --held-out 4  # of 20 superclasses

For each seed some tasks are left out, the others learn templates and an order each, and each task left out is learned
from few labelled images: its head, its route (closed-form: by one Newton step), its gain, its BN, all, or a network
from scratch. Where a source's route is the start, it is the source whose features tell the few images' classes apart
best (nearest centroid, cross-validated). Controls: a random source, a random route, a random start, untrained
templates. Writes `runs/NAME/`: metrics.json, metrics.jsonl, report.html and a pool of templates and source tasks for
each seed. A killed run goes on behind its last finished part, a finished one may be given more seeds. The first takes
a few minutes on 2 CPU cores. Expected numbers: README.md.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import job
import modular_options
from job import closing, console
from modular_options import CLOSED, CONTROLS
from modular_options import Transfer as Options


def parse(arguments: list[str] | None = None) -> Options:
    return modular_options.parse(Options, __doc__, arguments)


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import modular_job
import numpy as np
from modular_job import Session, part

from compo_jax import data, modular, report, tree
from compo_jax.modular import ModularNet, Network, routes
from compo_jax.modular.results import NewTasks, Sources, TransferMethod, TransferResults


class Division(NamedTuple):
    """The tasks of a seed."""

    seed: int
    new: tuple[data.Task, ...]
    sources: tuple[data.Task, ...]


def divided(stream: data.TaskStream, held_out: int, seed: int) -> Division:
    drawn = set(np.random.default_rng(seed).permutation(len(stream.tasks))[:held_out].tolist())
    new, sources = (tuple(t for i, t in enumerate(stream.tasks) if (i in drawn) == out) for out in (True, False))
    return Division(seed, new, sources)


def few(task: data.Task, budget: int, seed: int) -> data.Split:
    """`budget` images of each class, the same for all methods; all of them for 0."""
    rng = np.random.default_rng(seed)
    each = [rng.permutation(np.flatnonzero(task.train.labels == c)) for c in range(len(task.classes))]
    return data.SubsetSplit(task.train, np.sort(np.concatenate([of_class[: budget or None] for of_class in each])))


def check(options: modular_options.NewTask, stream: data.TaskStream) -> None:
    """ValueError for what these tasks can't give."""
    if not 1 <= options.held_out <= len(stream.tasks) - 1:
        raise ValueError(f"{options.held_out} of {len(stream.tasks)} tasks can't be left out: one must stay at least")
    for task in stream.tasks:
        fewest = int(np.bincount(task.train.labels, minlength=len(task.classes)).min())
        if max(options.budgets) > fewest:
            raise ValueError(
                f"{max(options.budgets)} images of each class were asked for and a class of {task.name!r} has "
                f"{fewest}: lower --budgets; 0 takes all"
            )
        if fewest < 2:
            raise ValueError(
                f"a class of {task.name!r} has {fewest} training image, and a new task's source is told by two of "
                "each: raise --images"
            )


def network_of(options: Options, classes: tuple[int, ...]) -> ModularNet:
    return ModularNet(classes, gain=True, **vars(options.net))


# -- the templates, by the other tasks ---------------------------------------------------------------------------------
def templates(session: Session, division: Division, folder: Path) -> Sources:
    seed, tasks = division.seed, division.sources
    net = network_of(session.options, tuple(len(task.classes) for task in tasks))
    trained, _ = modular_job.train(session, net, tasks, "sources", seed, folder)
    accuracy = modular_job.accuracies(session, net, trained.variables, tasks)
    modular_job.store_network(session, str(seed), Network(net, trained.variables), tasks, accuracy, seed)
    return Sources(accuracy)


# -- the tasks left out ------------------------------------------------------------------------------------------------
def start(options: Options, method: str, network: Network, source: int, classes: int, key) -> Network:
    """What a method starts a new task from; `source` is the number of the task whose order it begins with."""
    if method in ("scratch", "head+route, untrained templates"):
        alone, seed = network.net.clone(classes=(classes,)), int(jax.random.randint(key, (), 0, 2**30))
        order = None
        if method == "scratch":
            alone, order = alone.clone(route="linear", groups=1), np.arange(alone.layers) % alone.templates
        return Network(alone, modular_job.initial(alone, options.stream.size, seed, order))
    one, begun = modular.new_task(network, key, classes, like=source)
    route, linear = begun["params"]["route"], one.route == "linear"
    if method == "head, random route" and not linear:
        route = routes.to_logits(routes.random(key, route.shape[:-1], one.templates))
    elif method in ("head, random route", "head+route, random start"):
        route = jax.random.normal(key, route.shape) * (one.templates**-0.5 if linear else 0.01)
    elif one.route == "hard":
        route = routes.to_logits(routes.hard(route), options.new.smoothing)
    return Network(one, modular.set_route(begun, route))


def learned(session: Session, division: Division, budget: int, folder: Path) -> NewTasks:
    """Every method on every task left out, from this many labelled images of each class."""
    options, seed = session.options, division.seed
    network = modular_job.load_network(session, str(seed), len(division.sources))
    accuracy, chosen = {name: [] for name in options.new.methods}, []
    for h, task in enumerate(division.new):
        split, key = few(task, budget, seed), jax.random.fold_in(jax.random.key(seed), h)
        source = modular.nearest_source(network, session.stream.prepare, split)
        chosen.append(division.sources[source].name)
        drawn = int(jax.random.randint(jax.random.fold_in(key, 1), (), 0, len(division.sources)))
        about = f"{task.name}, {budget or 'all'} labels, seed {seed}"
        for method in options.new.methods:
            like = drawn if method == "head, random source" else source
            one, begun = start(options, method, network, like, len(task.classes), key)
            logged, settings, scratch = session.logged(method, about), new_training(session), method == "scratch"
            if method == CLOSED:  # one Newton step of the coefficients, half-way through the head's training
                settings = settings._replace(steps=max(1, settings.steps // 2))
                begun = session.learner(one, settings, part="head").train(begun, [split], seed, **logged).variables
                one, begun = modular.newton_route(Network(one, begun), session.stream.prepare, split).network
            learner = session.learner(one, settings, part=None if scratch else part_of(method), fixed=scratch)
            trained = learner.train(begun, [split], seed, **logged).variables
            accuracy[method].append(modular_job.accuracies(session, one, trained, [task])[0])
    return NewTasks(accuracy, tuple(chosen))


def new_training(session: Session) -> modular.Settings:
    new = session.options.new
    return session.settings._replace(steps=new.new_steps, batch=new.new_batch, learning_rate=new.new_learning_rate)


def part_of(method: str) -> str:
    """The key in `modular.PARTS` of what a method trains."""
    return "all" if method == "scratch" else method.split(",")[0]


def costs(options: Options, classes: int) -> dict[str, TransferMethod]:
    """What each method trains, and adds to the pool."""
    params = modular_job.initial(network_of(options, (classes,)), options.stream.size, 0)["params"]
    count, methods = modular.parameters, {}
    of_task = ("^head", "^route$", "^gain$", *["^norm/"] * (options.net.bn == "task"))
    for name in options.new.methods:
        learned = modular.PARTS["head+route" if name == CLOSED else part_of(name)]
        trained, stored = (count(tree.partition(params, of)[0]) for of in (learned, (*of_task, *learned)))
        if name == "scratch":  # a network of its own, whose blocks stand in a fixed order
            trained = stored = count(params, route=False)
        methods[name] = TransferMethod(trained, stored, name in CONTROLS)
    return methods


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    stream = modular_job.open_tasks(options)
    check(options.new, stream)
    console.print(f"left out: {options.new.held_out}")
    first = network_of(options, (len(stream.tasks[0].classes),))
    divisions = [divided(stream, options.new.held_out, seed) for seed in options.place.seeds]
    for division in divisions:
        job.enough_images(division.sources, options.training.batch, "--batch")
        job.enough_images(division.new, options.new.new_batch, "--new-batch")
    with modular_job.opened(options, stream, first) as session:
        sources, results = [], {budget: [] for budget in options.new.budgets}
        for division in divisions:
            seed = division.seed
            sources.append(part(session, f"{seed}-sources", Sources, partial(templates, session, division)))
            console.print(f"seed {seed}: sources {100 * sources[-1].accuracy.mean():.1f} %")
            for budget in options.new.budgets:
                made = part(session, f"{seed}-{budget}", NewTasks, partial(learned, session, division, budget))
                results[budget].append(made)
                means = ", ".join(f"{name} {100 * values.mean():.1f}" for name, values in made.accuracy.items())
                console.print(f"seed {seed}, {budget or 'all'} labels a class: {means}")

        names = lambda tasks: tuple(task.name for task in tasks)
        reached = TransferResults(
            job=modular_job.about(session, first),
            new_training=new_training(session),
            budgets=tuple(budget or None for budget in options.new.budgets),
            tasks=tuple(names(division.new) for division in divisions),
            sources=tuple(names(division.sources) for division in divisions),
            methods=costs(options, len(divisions[0].new[0].classes)),
            source_parts=tuple(sources),
            parts=tuple(map(tuple, results.values())),
        )
        modular_job.finish(session, reached, report.transfer_page, report.transfer_table)


if __name__ == "__main__":
    closing(main)
