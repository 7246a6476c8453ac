"""The page of block reuse: the same blocks called more than once."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from compo_jax.modular.comparison import paired
from compo_jax.modular.results import ReuseMethod, ReuseResults
from compo_jax.report import charts, route_figures
from compo_jax.report.charts import styled
from compo_jax.report.modular_facts import accuracy_cells, facts, paired_text
from compo_jax.report.page import Block, Page, Tile, write_page
from compo_jax.report.table import BOLD, Table, standard_error
from compo_jax.report.text import counted, millions, percent, spread

WORDS = {  # of the tiles
    "learned": "learned order of reused blocks",
    "aabb": "each block again in a row",
    "abab": "all blocks, then again",
    "distinct": "as many blocks as layers (bound)",
}
CONTROL = "aabb"  # a learned order starts from it


def reuse_table(results: ReuseResults, *, won: bool = False) -> Table:
    """Every network's size and accuracy (%), and its difference to the one without reuse; with the seeds `won`."""
    methods = results.methods
    images = sum(results.job.test_images.values())
    test = accuracy_cells([method.accuracy for method in methods.values()], images)
    rows = [
        [
            name, str(method.route.shape[1]), str(method.templates[0]), f"{method.parameters[0]:,}",
            millions(method.macs[0]), accuracy, spread(100 * method.train_accuracy),
            "" if name == results.reference else paired_text(results.against_reference(name), won=won),
        ]
        for (name, method), accuracy in zip(methods.items(), test, strict=True)
    ]  # fmt: skip
    headings = (
        "method", "layers", "blocks", "parameters", "multiply-adds (M)", "test (%)", "train (%)",
        f"difference to {results.reference} (points)",
    )  # fmt: skip
    return Table(f"{results.job.name}: {results.classes} classes of {results.job.data}", headings, rows, [BOLD])


@styled
def by_cost(
    accuracies: Mapping[str, Float[np.ndarray, " seeds"]], costs: Mapping[str, tuple[float, float]], reference: str
) -> Figure:
    """Accuracy (fractions) over parameters and over multiply-adds of an image; dashed is the reference."""
    figure = charts.figure("Accuracy over parameters and over work", 3.2 + 0.09 * len(accuracies))
    panels = charts.panels(figure, 2, sharex=False)
    dots = {**charts.EDGE, "linestyle": "none"}
    looks = {name: look | dots for name, look in charts.looks(list(accuracies)).items()}
    for k, (axes, label) in enumerate(zip(panels, ("parameters (M)", "multiply-adds of an image (M)"), strict=True)):
        places = {name: costs[name][k] / 1e6 for name in accuracies}
        width = max(np.ptp(list(places.values())), 0.2 * max(places.values()))  # sizes that hardly differ stay together
        charts.dashed_line(axes, "y", 100 * np.mean(accuracies[reference]))
        points = {}
        for name, values in accuracies.items():
            near = [other for other in accuracies if abs(places[other] - places[name]) < 0.02 * width]
            x = places[name] + 0.035 * width * (near.index(name) - (len(near) - 1) / 2)
            points[name] = charts.Point(x, 100 * values.mean(), 100 * standard_error(values))
            small = {**looks[name], "markersize": 3.2, "alpha": 0.5, "markeredgewidth": 0}
            if len(values) > 1:
                axes.plot(np.full(len(values), x), 100 * values, **small, label=f"seeds of {name}")
        charts.scatter(axes, points, looks)
        middle = (min(places.values()) + max(places.values())) / 2
        beside = [point.x + side * width for point in points.values() for side in (-0.04, 0.04)]
        low, high = middle + np.array([-0.65, 0.65]) * width
        axes.set(xlabel=label, xlim=(min(low, *beside), max(high, *beside)))
        charts.number_ticks(axes, "x", 4)
    panels[0].set_ylabel("test accuracy (%)")
    charts.legend(figure, looks, 4, 16)
    return figure


def _family(name: str) -> str:
    """The kind of order, whatever the depth: `aabb` of `aabb x3`."""
    return name.rpartition(" x")[0] or name


@styled
def by_depth(methods: Mapping[str, ReuseMethod], reference: str) -> Figure:
    """Accuracy over layers, a line for each kind of order, all from the network that calls each block once."""
    figure = charts.figure("Accuracy over depth", 3.2)
    axes, looks = figure.add_subplot(), charts.looks(list(dict.fromkeys(map(_family, methods))))
    for kind, look in looks.items():
        points = {reference: methods[reference]} | {n: m for n, m in methods.items() if _family(n) == kind}
        if len(points) > 1:
            depths = [method.route.shape[1] for method in points.values()]
            values = [100 * method.accuracy for method in points.values()]
            errors = np.nan_to_num([standard_error(runs) for runs in values])
            axes.errorbar(depths, [runs.mean() for runs in values], errors, **look, markersize=5, label=kind)
    axes.set_xticks(sorted({method.route.shape[1] for method in methods.values()}))
    axes.set(xlabel="layers", ylabel="test accuracy (%)")
    axes.grid(axis="y")
    charts.legend(figure, {kind: look for kind, look in looks.items() if kind != reference}, 3)
    return figure


def _routes(results: ReuseResults) -> dict[str, Int[np.ndarray, " layers"]]:
    """The routes to show: of each seed where seeds differ."""
    routes = {}
    for name, method in results.methods.items():
        if (method.route == method.route[0]).all():
            routes[name] = method.route[0]
        else:
            routes |= {f"{name}, seed {s}": route for s, route in zip(results.job.seeds, method.route, strict=True)}
    return routes


def _against_control(methods: Mapping[str, ReuseMethod]) -> str:
    """What learned orders gain over the order that they start from, which has a free gain at each layer as well."""
    told = ""
    for name, method in methods.items():
        control = name.replace("learned", CONTROL)
        if _family(name) == "learned" and control in methods:
            gained = paired_text(paired(method.accuracy, methods[control].accuracy), won=False)
            told += f" {name} less {control}, which has a free gain at each layer, too: {gained} points."
    return told


def _blocks(results: ReuseResults) -> Iterator[Block]:
    """The figures, each with what to look for in it."""
    methods = results.methods
    bound = " and the upper bound, whose blocks are all distinct, pays in both" * ("distinct" in map(_family, methods))
    yield Block(
        by_cost(
            {name: method.accuracy for name, method in methods.items()},
            {name: (float(method.parameters[0]), float(method.macs[0])) for name, method in methods.items()},
            results.reference,
        ),
        f"Left, what the networks store: reuse should lift the accuracy above the dashed line ({results.reference}) "
        f"without moving to the right. Right, what an image costs: reuse pays in multiply-adds{bound}. Small marks are "
        f"seeds; networks of one size are moved apart.{_against_control(methods)}",
        [Table("Time", ["method", "training time (s)"], [[n, spread(m.seconds, 0)] for n, m in methods.items()])],
    )
    if len({method.route.shape[1] for method in methods.values()}) > 2:
        yield Block(
            by_depth(methods, results.reference),
            "Parameters are those of the shallowest network but for a gain a layer, and for the distinct blocks. See "
            "whether depth goes on to pay, and whether an order makes more of it than the fixed ones. Mean ± standard "
            "error over seeds.",
        )
    learned = (
        " In a learned order see whether blocks repeat at once, come back in loops, or stay unused, and whether seeds "
        "agree. Of coefficients the largest is shown." * ("learned" in map(_family, methods))
    )
    yield Block(
        route_figures.orders(_routes(results), max(int(method.templates[0]) for method in methods.values())),
        "A cell is the template, one of the blocks, that a layer calls: a colour that comes back is a block used again."
        f"{learned}",
    )
    gaps = {name: method.gap for name, method in methods.items() if method.gap is not None}
    if gaps:
        yield route_figures.gap_block(gaps)


def reuse_page(folder: str | os.PathLike, results: ReuseResults) -> Path:
    """Writes `folder/report.html`, the page of block reuse, and returns its path."""
    job, reference = results.job, results.reference
    bound = ", beside more, distinct blocks" * ("distinct" in map(_family, results.methods))
    lead = (
        f"{results.classes} classes of {job.data} by networks of {counted(results.blocks, 'block')}, each called once "
        f"({reference}) or more often, in a fixed or a learned order{bound}. "
        f"A difference is to {reference} of the same seed."
    )
    tiles = [Tile(f"{reference}: test accuracy", percent(results.methods[reference].accuracy.mean()), "%")]
    deeper = {name: method.route.shape[1] for name, method in results.methods.items() if _family(name) in WORDS}
    tiles += [
        Tile(f"{name}: {WORDS[_family(name)]}", paired_text(results.against_reference(name), won=False), "points")
        for name, layers in deeper.items()
        if layers == min(deeper.values()) or _family(name) == "learned"  # further depths have a figure of their own
    ]
    told = facts(job, "seeds")
    return write_page(folder, Page(job.name, lead, told, tiles, [reuse_table(results, won=True)], _blocks(results)))
