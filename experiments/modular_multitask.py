"""Several tasks at once: does each learn its own order of shared blocks, and what is that worth?

    python experiments/modular_multitask.py                                             # rendered scripts, no download
    python experiments/modular_multitask.py --data cifar100 --data-dir DIR --templates 8 32   # 20 superclasses
    python experiments/modular_multitask.py --data mnist usps omniglot --data-dir DIR --tasks 6

Learned orders beside single-task networks, hard sharing, hard sharing with a BN for each task, and fixed random routes
through as many templates. Writes `runs/NAME/`: metrics.json, metrics.jsonl, report.html, and for each learned order and
seed a pool with its templates and tasks. A killed run goes on where it was, a finished one may be given more seeds. The
first takes a few minutes on 2 CPU cores. Expected numbers: README.md.
"""

from functools import partial
from pathlib import Path

import modular_options
from job import closing, console
from modular_options import Multitask as Options


def parse(arguments: list[str] | None = None) -> Options:
    return modular_options.parse(Options, __doc__, arguments)


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import modular_job
import numpy as np
from modular_job import Session, part

from compo_jax import data, modular, report
from compo_jax.modular import ModularNet, Network, routes
from compo_jax.modular.forecast import Rerouting
from compo_jax.modular.results import Curves, LearnedOrder, MultitaskMethod, MultitaskResults, OrderAnalysis, stacked


def networks(options: modular_options.Nets, classes: tuple[int, ...]) -> tuple[dict[str, ModularNet], list[str]]:
    """The network of each method, and the names of those whose order is learned."""
    shape = {key: getattr(options, key) for key in ("layers", "width", "patch", "block")}
    single = ModularNet(classes, templates=options.layers, **shape)  # each block once
    baselines = {"single-task": single, "hard-sharing": single.clone(bn="layer"), "hard-sharing-bn": single}
    ordered = {
        f"ordered-{count}": ModularNet(classes, templates=count, bn=options.bn, **shape) for count in options.templates
    }
    random = {f"random-{net.templates}": net for net in ordered.values() if "random" in options.baselines}
    chosen = {name: net for name, net in baselines.items() if name in options.baselines}
    return chosen | random | ordered, list(ordered)


# -- a method and a seed -----------------------------------------------------------------------------------------------
def alone(session: Session, net: ModularNet, seed: int, folder: Path) -> MultitaskMethod:
    """Every task's own network."""
    accuracy, parameters, seconds = [], 0, 0.0
    for t, task in enumerate(session.stream.tasks):
        one, order = net.clone(classes=net.classes[t : t + 1]), np.arange(net.layers)
        trained, took = modular_job.train(session, one, [task], f"alone: {task.name}", seed, folder / str(t), order)
        accuracy += modular_job.accuracies(session, one, trained.variables, [task]).tolist()
        parameters += modular.parameters(trained.variables["params"], route=False)
        seconds += took
    return MultitaskMethod(accuracy, parameters, modular.macs(net, session.size), seconds)


def fixed(session: Session, net: ModularNet, name: str, seed: int, folder: Path) -> MultitaskMethod:
    """One network whose tasks go through its blocks in the same order, or each in a random one."""
    tasks, order = session.stream.tasks, np.arange(net.layers)
    if name.startswith("random"):
        order = np.random.default_rng(seed).integers(net.templates, size=(len(tasks), net.layers))
    trained, seconds = modular_job.train(session, net, tasks, name, seed, folder, order)
    accuracy = modular_job.accuracies(session, net, trained.variables, tasks)
    parameters = modular.parameters(trained.variables["params"], route=False)
    return MultitaskMethod(accuracy, parameters, modular.macs(net, session.size), seconds)


def learned(session: Session, net: ModularNet, name: str, seed: int, folder: Path) -> MultitaskMethod:
    """One network, each task with an order that it learns."""
    tasks = session.stream.tasks
    trained, seconds = modular_job.train(session, net, tasks, name, seed, folder)
    train, test = [task.train for task in tasks], [task.test for task in tasks]
    gap = session.learner(net, session.settings).gap(trained, train, seed, test)
    network = Network(net, trained.variables)
    modular_job.store_network(session, f"{name}-{seed}", network, tasks, gap.finetuned, seed)
    lines = [line for line in session.run.log.records() if (line["run"], line["task"]) == (name, f"seed {seed}")]
    curves = Curves(*([line[key] for line in lines] for key in Curves._fields))
    params = trained.variables["params"]
    soft = routes.soft(trained.before["params"]["route"], session.settings.temperature[1])
    order = LearnedOrder(routes.indices(params["route"]), np.round(soft, 4), gap, curves)
    parameters = modular.parameters(params)
    return MultitaskMethod(gap.finetuned, parameters, modular.macs(net, session.size), seconds, order)


# -- what a learned order says -----------------------------------------------------------------------------------------
def analysed(session: Session, name: str, method: MultitaskMethod, templates: int) -> OrderAnalysis:
    """Of the first seed: its routes beside random ones, what each template is worth, and a forecast by curvature."""
    seed, tasks, images = session.options.place.seeds[0], session.stream.tasks, session.options.net.analysis_images
    random = modular.beside_random(np.eye(templates)[method.order.hard[0]], jax.random.key(0))
    if templates == 1:
        return OrderAnalysis(name, random, None, None, None)

    def removed(_):
        net, variables = modular_job.load_network(session, f"{name}-{seed}", len(tasks))
        few = [some(task.test, images) for task in tasks]
        accuracies = modular.accuracies(net, session.stream.prepare)
        score = lambda logits: accuracies(modular.set_route(variables, logits), few)
        return modular.analysis.removal(score, variables["params"]["route"], jax.random.key(seed))

    def rerouted(_):
        network = modular_job.load_network(session, f"{name}-{seed}", len(tasks))
        few, layer = some(tasks[0].train, 256), network.net.layers // 2
        return modular.rerouting(network, session.stream.prepare, few, 0, layer)

    removal = part(session, f"{seed}-removal", modular.analysis.Removal, removed)
    rerouting = part(session, f"{seed}-bridge", Rerouting, rerouted)
    return OrderAnalysis(name, random, removal, images, rerouting)


def some(split: data.Split, count: int) -> data.ArraySplit:
    rows = np.random.default_rng(0).permutation(len(split))[:count]
    return data.ArraySplit(split.images(rows), split.labels[rows])


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    stream = modular_job.open_tasks(options)
    classes = tuple(len(task.classes) for task in stream.tasks)
    nets, ordered = networks(options.net, classes)
    with modular_job.opened(options, stream, nets[ordered[0]]) as session:
        results = {name: [] for name in nets}
        for seed in options.place.seeds:
            for name, net in nets.items():
                make = partial(learned if name in ordered else fixed, session, net, name, seed)
                make = partial(alone, session, net, seed) if name == "single-task" else make
                made = part(session, f"{seed}-{name}", MultitaskMethod, make)
                results[name].append(made)
                console.print(f"seed {seed}: {name} {100 * made.accuracy.mean():.1f} % in {made.seconds:.0f} s")
        methods = {name: stacked(made) for name, made in results.items()}
        analysis = analysed(session, ordered[0], methods[ordered[0]], nets[ordered[0]].templates)
        names = tuple(task.name for task in stream.tasks)
        job = modular_job.about(session, nets[ordered[0]])
        reached = MultitaskResults(job, names, np.array(classes), methods, analysis)
        modular_job.finish(session, reached, report.multitask_page, report.multitask_table)


if __name__ == "__main__":
    closing(main)
