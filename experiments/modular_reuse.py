"""Accuracy at equal parameters: twice as many layers, which go through the same blocks again, in a learned order.

    python experiments/modular_reuse.py                                       # rendered characters, no download
    python experiments/modular_reuse.py --data cifar100 --data-dir DIR

L blocks in L layers; in kL layers (--times: 2), each block k times in a row (AABB), the whole k times (ABAB), each
block k times in random order, and in an order that is learned from AABB on; and kL blocks in kL layers, the bound. BN's
scale and bias belong to the block, so that depth costs no parameter but a gain a layer, which every network here has,
and a learned order (`--bn task` gives each layer a BN). Learned coefficients scale what a block adds, too: the gain is
what tells that from an order, and "aabb, no gain" says what it is worth. Writes `runs/NAME/`: metrics.json,
metrics.jsonl, report.html and a pool for each learned order. A killed run goes on where it was, a finished one may be
given more seeds. The first takes a few minutes on 2 CPU cores. Expected numbers: README.md.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import job
import modular_options
from job import closing, console
from modular_options import Reuse as Options


def parse(arguments: list[str] | None = None) -> Options:
    return modular_options.parse(Options, __doc__, arguments)


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import modular_job
import numpy as np
from modular_job import Session, part

from compo_jax import data, modular, report
from compo_jax.modular import ModularNet, Network, routes
from compo_jax.modular.results import ReuseMethod, ReuseResults, stacked


class Order(NamedTuple):
    """A network and the order of its blocks, which may be drawn by the seed; None is learned."""

    net: ModularNet
    of_seed: Callable[[int], np.ndarray | None]


LEARNED = "learned"


def orders(options: modular_options.Blocks, classes: int) -> dict[str, Order]:
    shape = {key: getattr(options, key) for key in ("width", "patch", "block", "bn")}
    once = np.arange(options.layers)
    short = ModularNet((classes,), layers=len(once), templates=len(once), start="one_hot", gain=True, **shape)
    methods, several = {f"{len(once)}-layers": Order(short, lambda _: once)}, len(options.times) > 1
    for times in options.times:
        deep, repeated = short.clone(layers=times * len(once)), np.repeat(once, times)
        of_depth = {
            "aabb": Order(deep, lambda _, order=repeated: order),
            "aabb, no gain": Order(deep.clone(gain=False), lambda _, order=repeated: order),
            "abab": Order(deep, lambda _, times=times: np.tile(once, times)),
            "random": Order(deep, lambda seed, order=repeated: np.random.default_rng(seed).permutation(order)),
            LEARNED: Order(deep.clone(route=options.route), lambda _: None),
            "distinct": Order(
                deep.clone(templates=times * len(once)), lambda _, times=times: np.arange(times * len(once))
            ),
        }
        methods |= {name + f" x{times}" * several: order for name, order in of_depth.items()}
    return methods


def measured(session: Session, task: data.Task, name: str, order: Order, seed: int, folder: Path) -> ReuseMethod:
    """A method trained and tested; a learned order goes into a pool."""
    net, route = order.net, order.of_seed(seed)
    trained, seconds = modular_job.train(session, net, [task], name, seed, folder, route)
    rows = np.random.default_rng(0).permutation(len(task.train))[: len(task.test)]
    some = data.ArraySplit(task.train.images(rows), task.train.labels[rows])
    accuracy, of_train = (
        float(modular.accuracies(net, session.stream.prepare)(trained.variables, [split], 256)[0])
        for split in (task.test, some)
    )
    params, gap = trained.variables["params"], None
    if route is None and net.route == "hard":
        gap = session.learner(net).gap(trained, [task.train], seed, [task.test])
    if route is None:
        network = Network(net, trained.variables)
        modular_job.store_network(session, f"{name}-{seed}", network, [task], [accuracy], seed)
    costs = modular.parameters(params, route=route is None), modular.macs(net, session.size)
    return ReuseMethod(accuracy, of_train, *costs, seconds, net.templates, routes.indices(params["route"])[0], gap)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    stream = modular_job.open_tasks(options)
    task = data.pooled(stream)
    job.enough_images([task], options.training.batch, "--batch")
    methods = orders(options.net, len(task.classes))
    deep = next(order.net for name, order in methods.items() if name.startswith(LEARNED))
    with modular_job.opened(options, stream, deep) as session:
        results = {name: [] for name in methods}
        for seed in options.place.seeds:
            for name, order in methods.items():
                make = partial(measured, session, task, name, order, seed)
                made = part(session, f"{seed}-{name}", ReuseMethod, make)
                results[name].append(made)
                console.print(f"seed {seed}: {name} {100 * made.accuracy:.1f} % in {made.seconds:.0f} s")
        reached = ReuseResults(
            job=modular_job.about(session, deep, [task]),
            classes=len(task.classes),
            blocks=options.net.layers,
            reference=next(iter(methods)),
            methods={name: stacked(made) for name, made in results.items()},
        )
        modular_job.finish(session, reached, report.reuse_page, report.reuse_table)


if __name__ == "__main__":
    closing(main)
