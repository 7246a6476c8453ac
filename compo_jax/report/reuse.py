"""The report of block reuse: the same blocks called more than once, its page and a table for the terminal."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from rich.table import Table
from rich.text import Text

from compo_jax.report import reuse_figures as figures
from compo_jax.report.modular_numbers import (
    Paired,
    check_modular,
    millions,
    net_text,
    paired,
    paired_text,
    several,
    templates_of,
)
from compo_jax.report.numbers import Metrics, decimal, fitting, percent, require, signed, spread
from compo_jax.report.previous import block, html_table, write_page

_METHOD = ("accuracy", "train_accuracy", "parameters", "macs", "layers", "templates", "route", "seconds")
GAP = {"soft": "soft", "hard": "argmax", "reestimated": "statistics again", "finetuned": "tuned on"}
Seeds = Float[np.ndarray, " seeds"]


class _Method(NamedTuple):
    """What one network reached, as fractions, and what it costs."""

    accuracy: Seeds
    train: Seeds
    parameters: float
    macs: float
    seconds: Seeds
    layers: int
    templates: int
    route: Int[np.ndarray, "seeds layers"]


class _Found(NamedTuple):
    """The networks, the name of the one that the others are held against, and the four points of the learned ones."""

    methods: dict[str, _Method]
    reference: str
    gap: dict[str, Float[np.ndarray, "points seeds"]]

    def against(self, name: str) -> Paired:
        """The difference to the reference, seed by seed."""
        return paired(self.methods[name].accuracy, self.methods[self.reference].accuracy)


def _read(metrics: Metrics) -> _Found:
    """The networks as arrays; KeyError or ValueError where the metrics don't fit together."""
    check_modular(metrics, ("classes", "blocks"))
    reference = f"{metrics['blocks']}-layers"
    require(metrics["methods"], (reference,), "methods.")
    count = len(metrics["seeds"])
    found = {}
    for name, method in metrics["methods"].items():
        where = f"methods.{name}."
        require(method, _METHOD, where)
        accuracy, train, seconds = (
            fitting(method[key], (count,), where + key, "a number for each seed")
            for key in ("accuracy", "train_accuracy", "seconds")
        )
        costs = fitting([method["parameters"], method["macs"]], (2,), where + "parameters and macs", "two numbers")
        layers, templates = method["layers"], method["templates"]
        if len(method["route"]) != count:
            raise ValueError(
                f"{where}route in the metrics has {len(method['route'])} entries for {count} seeds: it needs the route "
                "of each seed; perhaps a list of seeds was cut"
            )
        route = [templates_of(one, layers, templates, f"{where}route.{i}") for i, one in enumerate(method["route"])]
        found[name] = _Method(accuracy, train, *costs, seconds, layers, templates, np.array(route))
    gap = {}
    for name, points in (metrics.get("gap") or {}).items():
        require(points, tuple(GAP), f"gap.{name}.")
        gap[name] = fitting([points[key] for key in GAP], (len(GAP), count), f"gap.{name}", "four points by seeds")
    return _Found(found, reference, gap)


def _difference(found: _Found, name: str) -> str:
    return "" if name == found.reference else paired_text(found.against(name))


def reuse_table(metrics: Metrics) -> Table:
    """Every network's size and accuracy (%) for the terminal, and its paired difference to the one without reuse.

    Mean ± sample standard deviation over seeds, difference ± standard error. KeyError or ValueError where the metrics
    don't fit together.
    """
    found = _read(metrics)
    drawn = Table(
        title=Text(f"{metrics['name']}: {metrics['classes']} classes of {metrics['data']}, accuracy (%)"),
        caption=f"L/M: layers and templates; par., MACs in millions; diff.: to {found.reference}, ± standard error",
    )
    drawn.add_column("method", overflow="fold")
    for heading in ("L/M", "par.", "MACs", "test", "train", "diff."):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for name, method in found.methods.items():
        cells = [
            f"{method.layers}/{method.templates}", millions(method.parameters), millions(method.macs),
            spread(100 * method.accuracy), spread(100 * method.train), _difference(found, name).split(" (")[0],
        ]  # fmt: skip
        drawn.add_row(Text(name), *(text.replace("\u00a0±\u00a0", " ±") for text in cells))
    return drawn


def _orders(metrics: Metrics, found: _Found) -> dict[str, Int[np.ndarray, " layers"]]:
    """The routes to show: of each seed where seeds differ."""
    rows = {}
    for name, method in found.methods.items():
        if (method.route == method.route[0]).all():
            rows[name] = method.route[0]
        else:
            rows |= {f"{name}, seed {s}": route for s, route in zip(metrics["seeds"], method.route, strict=True)}
    return rows


def _blocks(metrics: Metrics, found: _Found) -> Iterator[str]:
    """The figures, each with what to look for in it."""
    methods = found.methods
    yield block(
        figures.by_cost(
            {name: method.accuracy for name, method in methods.items()},
            {name: (method.parameters, method.macs) for name, method in methods.items()},
            found.reference,
        ),
        "Left, what the networks store: reuse should lift the accuracy above the dashed line without moving to the "
        "right. Right, what an image costs: reuse pays in multiply-adds, and the upper bound, whose blocks are all "
        "distinct, pays in both. Small marks are seeds; networks of one size are moved apart.",
        html_table(
            ["method", "training time (s)"],
            ((name, [spread(method.seconds, 0)]) for name, method in methods.items()),
        ),
    )
    orders = _orders(metrics, found)
    yield block(
        figures.orders(orders),
        "A cell is the block that a layer calls, counted from 0: a colour that comes back is a block used again. In a "
        "learned order see whether blocks repeat at once, come back in loops, or stay unused, and whether seeds agree.",
    )
    if found.gap:
        yield block(
            figures.gap(found.gap, list(GAP.values())),
            "From the soft mixture to one block for each layer (argmax), with the batch statistics taken again, and "
            "after training on with the route fixed: a large fall at argmax tells that the mixture had not become "
            "sharp. Thin lines are seeds.",
            html_table(
                ["accuracy (%)", *GAP.values()],
                ((name, [spread(100 * one) for one in points]) for name, points in found.gap.items()),
            ),
        )


def reuse(folder: str | os.PathLike, metrics: Metrics) -> Path:
    """Writes `folder/report.html`, the page of block reuse, and returns its path.

    Args:
      metrics: name, data, seeds, seconds, net, classes, blocks (L), and methods, one of them `L-layers`: of each
        accuracy, train_accuracy, seconds and route by seed, parameters, macs, layers, templates. Optionally gap: of
        each learned order its accuracies soft, hard, reestimated and finetuned, by seed. Fractions; None is not known.

    Raises KeyError or ValueError where the metrics don't fit together.
    """
    found = _read(metrics)
    blocks, seeds, reference = metrics["blocks"], metrics["seeds"], found.reference
    lead = (
        f"{metrics['classes']} classes of {metrics['data']} by networks of {blocks} blocks, each called once "
        f"({reference}) or more often, in a given or a learned order, beside deeper networks of distinct blocks; "
        f"{net_text(metrics['net'])}. A difference is to {reference} of the same seed, in points ± standard error over "
        f"seeds, with the seeds won.{several(seeds)}"
    )
    accuracy = float(np.mean(found.methods[reference].accuracy))
    key_numbers = [(f"{reference}: test accuracy", percent(accuracy), "%")]
    key_numbers += [
        (f"{name}: {what}", signed(found.against(name).mean), "points")
        for name, what in (
            ("learned", "learned order of reused blocks"), ("aabb", "each block twice in a row"),
            ("abab", "all blocks, then again"), ("distinct", "twice the blocks (bound)"),
        ) if name in found.methods
    ]  # fmt: skip
    key_numbers += [(f"seed{'s' * (len(seeds) != 1)}", str(len(seeds)), ""),
                    ("whole job", decimal(metrics["seconds"], 0), "s")]  # fmt: skip
    headings = (
        "method", "layers", "templates", "parameters", "multiply-adds (M)", "test (%)", "train (%)",
        f"difference to {reference} (points)",
    )  # fmt: skip
    body = (
        (name, [
            str(method.layers), str(method.templates), decimal(method.parameters, 0), millions(method.macs),
            spread(100 * method.accuracy), spread(100 * method.train), _difference(found, name),
        ])
        for name, method in found.methods.items()
    )  # fmt: skip
    return write_page(folder, metrics["name"], lead, key_numbers, html_table(headings, body), _blocks(metrics, found))
