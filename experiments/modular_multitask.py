"""Several tasks at once: does each learn its own order of shared blocks, and what is that worth?

    python experiments/modular_multitask.py                                             # rendered scripts, no download
    python experiments/modular_multitask.py --data cifar100 --data-dir DIR --orders linear soft hard   # 20 superclasses
    python experiments/modular_multitask.py --data mnist usps omniglot --data-dir DIR --tasks 6 --baselines mmoe random

Learned orders beside single-task networks, hard sharing (with a BN for each task; as wide as gives it as many
parameters), orders that stay as they begin (frozen: the same for all tasks; random), and mixtures of experts (MMoE,
CGC, DSelect-k). Writes `runs/NAME/`: metrics.json, metrics.jsonl, report.html, and for each learned order and
seed a pool with its templates and tasks. A killed run goes on where it was, a finished one may be given more seeds. The
first takes a few minutes on 2 CPU cores. Expected numbers: README.md.
"""

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import job
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
from modular_job import RUNNERS, Session, part

from compo_jax import data, modular, report
from compo_jax.modular import ExpertNet, ModularNet, Network, experts, routes
from compo_jax.modular.forecast import Rerouting
from compo_jax.modular.results import Curves, LearnedOrder, MultitaskMethod, MultitaskResults, OrderAnalysis, stacked


class Arm(NamedTuple):
    """A way to learn all tasks: its network, and what trains it to a `MultitaskMethod`."""

    net: ModularNet | ExpertNet
    train: Callable[..., MultitaskMethod]


def arms(options: modular_options.Nets, classes: tuple[int, ...]) -> dict[str, Arm]:
    """Baselines, then learned orders."""
    shape = {key: getattr(options, key) for key in ("layers", "width", "patch", "block")}
    each_once = ModularNet(classes, templates=options.layers, start="one_hot", **shape)
    wanted = {
        "single-task": Arm(each_once, alone),
        "hard-sharing": Arm(each_once.clone(bn="layer"), fixed),
        "hard-sharing-bn": Arm(each_once, fixed),
    }
    learned_ones = {}
    for count in options.templates:
        # as many parameters in the blocks of other networks as in all templates
        width = lambda blocks, count=count: max(1, round(options.width * (count / blocks) ** 0.5))
        linear = ModularNet(
            classes, templates=count, bn=options.bn, start=options.start, groups=options.groups, **shape
        )
        same = linear.clone(start="shared") if options.start == "distinct" else linear
        several = partial(ExpertNet, classes, **shape)
        wanted |= {
            f"hard-sharing-wide-{count}": Arm(each_once.clone(width=width(options.layers)), fixed),
            f"frozen-{count}": Arm(same, fixed),
            f"random-{count}": Arm(linear.clone(groups=1), fixed),
            f"random-linear-{count}": Arm(linear.clone(start="distinct"), fixed),
            f"mmoe-{count}": Arm(several(width=width(4 * options.layers), gate="mmoe"), mixed),
            f"cgc-{count}": Arm(
                several(width=width((2 + len(classes)) * options.layers), experts=2, task_experts=1, gate="cgc"), mixed
            ),
            f"dselect-k-{count}": Arm(several(width=width(4 * options.layers), gate="dselect_k"), mixed),
        }
        kinds = {"linear": linear, **{kind: linear.clone(route=kind, groups=1) for kind in ("soft", "hard")}}
        learned_ones |= {f"{kind}-{count}": Arm(kinds[kind], learned) for kind in options.orders}
    chosen = {name: arm for name, arm in wanted.items() if re.sub(r"-\d+$", "", name) in options.baselines}
    return chosen | learned_ones


# -- a method and a seed -----------------------------------------------------------------------------------------------
def alone(session: Session, arm: Arm, name: str, seed: int, folder: Path) -> MultitaskMethod:
    """Every task's own network."""
    accuracy, parameters, seconds, net = [], 0, 0.0, arm.net
    for t, task in enumerate(session.stream.tasks):
        one = net.clone(classes=net.classes[t : t + 1])
        trained, took = modular_job.train(
            session, one, [task], f"alone: {task.name}", seed, folder / str(t), fixed=True
        )
        accuracy += modular_job.accuracies(session, one, trained.variables, [task]).tolist()
        parameters += modular.parameters(trained.variables["params"], route=False)
        seconds += took
    return MultitaskMethod(accuracy, parameters, modular.macs(net, session.size), seconds)


def fixed(session: Session, arm: Arm, name: str, seed: int, folder: Path) -> MultitaskMethod:
    """One network in the order that it starts with, or each task in a random one."""
    tasks, net, order = session.stream.tasks, arm.net, None
    if re.fullmatch(r"random-\d+", name):
        order = np.random.default_rng(seed).integers(net.templates, size=(len(tasks), net.layers))
    trained, seconds = modular_job.train(session, net, tasks, name, seed, folder, order, fixed=True)
    accuracy = modular_job.accuracies(session, net, trained.variables, tasks)
    parameters = modular.parameters(trained.variables["params"], route=False)
    return MultitaskMethod(accuracy, parameters, modular.macs(net, session.size), seconds)


def mixed(session: Session, arm: Arm, name: str, seed: int, folder: Path) -> MultitaskMethod:
    """A mixture of experts."""
    tasks, net, clock = session.stream.tasks, arm.net, time.perf_counter()
    train = experts.learner(
        net, session.stream.prepare, session.settings, session.stream.augment,
        runner=RUNNERS[session.options.training.runner],
    )  # fmt: skip
    begun = modular_job.initial(net, session.size, seed)
    trained = train(begun, [task.train for task in tasks], seed, folder, **session.logged(name, f"seed {seed}"))
    seconds = time.perf_counter() - clock
    accuracy = experts.accuracies(net, session.stream.prepare)(trained, [task.test for task in tasks])
    parameters = modular.parameters(trained["params"])
    return MultitaskMethod(accuracy, parameters, modular.expert_macs(net, session.size), seconds)


def learned(session: Session, arm: Arm, name: str, seed: int, folder: Path) -> MultitaskMethod:
    """One network, each task with an order that it learns."""
    tasks, net = session.stream.tasks, arm.net
    trained, seconds = modular_job.train(session, net, tasks, name, seed, folder)
    accuracy = modular_job.accuracies(session, net, trained.variables, tasks)
    network = Network(net, trained.variables)
    modular_job.store_network(session, f"{name}-{seed}", network, tasks, accuracy, seed)
    lines = [line for line in session.run.log.records() if (line["run"], line["task"]) == (name, f"seed {seed}")]
    curves = Curves(*([line[key] for line in lines] for key in Curves._fields))
    weights = route_function(session, net)(trained.before["params"]["route"])
    weights = np.asarray(weights).reshape(len(tasks), -1, net.templates)
    order = LearnedOrder(weights.argmax(-1), np.round(weights, 4), gap(session, network, trained, seed, folder), curves)
    parameters = modular.parameters(trained.variables["params"])
    return MultitaskMethod(accuracy, parameters, modular.macs(net, session.size), seconds, order)


def route_function(session: Session, net: ModularNet) -> modular.Route:
    """What gave the weights when the learning of routes ended: of hard ones a softmax at that step's temperature."""
    if net.route != "hard":
        return routes.KINDS[net.route]
    return partial(routes.soft, temperature=modular.learned_temperature(session.settings))


def gap(session: Session, network: Network, trained: modular.Trained, seed: int, folder: Path) -> modular.Gap | None:
    """What making the order hard costs: in the training of hard routes, of coefficients where steps are asked for."""
    net, steps = network.net, session.options.net.harden_steps
    train, test = ([getattr(task, split) for task in session.stream.tasks] for split in ("train", "test"))
    if net.route == "hard":
        return session.learner(net).gap(trained, train, seed, test)
    if net.route == "soft" or not steps:
        return None
    learner = session.learner(net, session.settings._replace(steps=steps), fixed=True)
    options = session.logged(f"{net.route}-{net.templates}, hardened", f"seed {seed}")
    done = learner.train(modular.harden(network).variables, train, seed, folder / "hardened", **options)
    return learner.gap(done._replace(before=network.variables), train, seed, test)


# -- what a learned order says -----------------------------------------------------------------------------------------
def analysed(session: Session, name: str, net: ModularNet, method: MultitaskMethod) -> OrderAnalysis:
    """Of the first seed: its routes beside random ones, what each template is worth, and a forecast by curvature."""
    seed, tasks, images = session.options.place.seeds[0], session.stream.tasks, session.options.net.analysis_images
    linear = net.route == "linear"
    weights = method.order.weights[0] if linear else np.eye(net.templates)[method.order.hard[0]]
    random = modular.beside_random(weights, jax.random.key(0), linear=linear)
    if net.templates == 1:
        return OrderAnalysis(name, net.route, random, None, None, None)

    def removed(_):
        net, variables = modular_job.load_network(session, f"{name}-{seed}", len(tasks))
        few = [some(task.test, images) for task in tasks]
        accuracies = modular.accuracies(net, session.stream.prepare)
        score = lambda route: accuracies(modular.set_route(variables, route), few)
        return modular.analysis.removal(score, variables["params"]["route"], jax.random.key(seed), route=net.route)

    def rerouted(_):
        network = modular_job.load_network(session, f"{name}-{seed}", len(tasks))
        few, layer = some(tasks[0].train, 256), network.net.layers // 2
        return modular.rerouting(network, session.stream.prepare, few, 0, layer)

    removal = part(session, f"{seed}-removal-{images}", modular.analysis.Removal, removed)
    rerouting = None if net.groups > 1 else part(session, f"{seed}-bridge", Rerouting, rerouted)
    return OrderAnalysis(name, net.route, random, removal, images, rerouting)


def some(split: data.Split, count: int) -> data.Split:
    return data.SubsetSplit(split, np.random.default_rng(0).permutation(len(split))[:count])


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    stream = modular_job.open_tasks(options)
    job.enough_images(stream.tasks, options.training.batch, "--batch")
    classes = tuple(len(task.classes) for task in stream.tasks)
    methods = arms(options.net, classes)
    first = next(name for name, arm in methods.items() if arm.train is learned)
    with modular_job.opened(options, stream, methods[first].net) as session:
        results = {name: [] for name in methods}
        for seed in options.place.seeds:
            for name, arm in methods.items():
                made = part(session, f"{seed}-{name}", MultitaskMethod, partial(arm.train, session, arm, name, seed))
                results[name].append(made)
                console.print(f"seed {seed}: {name} {100 * made.accuracy.mean():.1f} % in {made.seconds:.0f} s")
        reached = {name: stacked(made) for name, made in results.items()}
        analysis = analysed(session, first, methods[first].net, reached[first])
        names, about = tuple(task.name for task in stream.tasks), modular_job.about(session, methods[first].net)
        kinds = {arm.net.route: arm.net for arm in methods.values() if arm.train is learned}
        rates = {kind: modular_job.route_rate(options, net) for kind, net in kinds.items()}
        whole = MultitaskResults(about, names, np.array(classes), rates, reached, analysis)
        modular_job.finish(session, whole, report.multitask_page, report.multitask_table)


if __name__ == "__main__":
    closing(main)
