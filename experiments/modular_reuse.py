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

from functools import partial
from pathlib import Path

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


def orders(options: modular_options.Blocks, classes: int) -> dict[str, tuple[ModularNet, np.ndarray | str]]:
    """The network of each method and the order of its blocks: fixed, drawn at "random" or "learned"."""
    shape, blocks = {key: getattr(options, key) for key in ("width", "patch", "block", "bn")}, np.arange(options.layers)
    short = ModularNet((classes,), layers=len(blocks), templates=len(blocks), **shape)
    deep = short.clone(layers=2 * len(blocks))
    return {
        f"{len(blocks)}-layers": (short, blocks),
        "aabb": (deep, np.repeat(blocks, 2)),
        "abab": (deep, np.tile(blocks, 2)),
        "random": (deep, "random"),
        "learned": (deep, "learned"),
        "distinct": (deep.clone(templates=2 * len(blocks)), np.arange(2 * len(blocks))),
    }


def measured(
    session: Session, task: data.Task, name: str, net: ModularNet, order: np.ndarray | str, seed: int, folder: Path
) -> ReuseMethod:
    """A method trained and tested; a learned order goes into a pool."""
    learns, gap = isinstance(order, str) and order == "learned", None
    if isinstance(order, str):
        twice = np.repeat(np.arange(net.templates), 2)
        order = None if learns else np.random.default_rng(seed).permutation(twice)
    trained, seconds = modular_job.train(session, net, [task], name, seed, folder, order)
    rows = np.random.default_rng(0).permutation(len(task.train))[: len(task.test)]
    some = data.ArraySplit(task.train.images(rows), task.train.labels[rows])
    accuracy, of_train = (
        float(modular.accuracies(net, session.stream.prepare)(trained.variables, [split], 256)[0])
        for split in (task.test, some)
    )
    params = trained.variables["params"]
    if learns:
        gap = session.learner(net, session.settings).gap(trained, [task.train], seed, [task.test])
        network = Network(net, trained.variables)
        modular_job.store_network(session, f"learned-{seed}", network, [task], [accuracy], seed)
    costs = modular.parameters(params, route=learns), modular.macs(net, session.size)
    return ReuseMethod(accuracy, of_train, *costs, seconds, net.templates, routes.indices(params["route"])[0], gap)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    stream = modular_job.open_tasks(options)
    task = data.pooled(stream)
    methods = orders(options.net, len(task.classes))
    deep = methods["learned"][0]
    with modular_job.opened(options, stream, deep) as session:
        results = {name: [] for name in methods}
        for seed in options.place.seeds:
            for name, (net, order) in methods.items():
                made = part(
                    session, f"{seed}-{name}", ReuseMethod, partial(measured, session, task, name, net, order, seed)
                )
                results[name].append(made)
                console.print(f"seed {seed}: {name} {100 * made.accuracy:.1f} % in {made.seconds:.0f} s")
        reached = ReuseResults(
            modular_job.about(session, deep, [task]),
            len(task.classes),
            options.net.layers,
            next(iter(methods)),
            {name: stacked(made) for name, made in results.items()},
        )
        modular_job.finish(session, reached, report.reuse_page, report.reuse_table)


if __name__ == "__main__":
    closing(main)
