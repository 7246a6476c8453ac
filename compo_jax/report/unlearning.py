"""The report of specialising and unlearning."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from compo_jax.incremental.unlearning_results import PoolSkills, UnlearningResults
from compo_jax.report import charts
from compo_jax.report.charts import COLOURS, INK, styled
from compo_jax.report.page import Block, Page, Tile, write_page
from compo_jax.report.table import Score, Table, run_facts, score
from compo_jax.report.text import counted, decimal, middle, signed

OPERATIONS = {
    "specialise": "the task's module alone",
    "unlearn": "all modules but the task's",
    "subtract": "all modules but the task's, less its share",
}
ITSELF, OTHERS = "the task itself", "the other tasks"


# -- numbers ---------------------------------------------------------------------------------------------------------
def _scores(results: UnlearningResults, mean: Callable[[PoolSkills], float]) -> dict[str, Score]:
    """Of each method, a mean of its pool's accuracies in every run."""
    images = sum(results.runs[0].tested)
    return {
        name: score(np.array([mean(run.methods[name]) for run in results.runs]), images)
        for name in results.runs[0].methods
    }


def _whole(results: UnlearningResults) -> tuple[dict[str, Score], dict[str, Score]]:
    """The mean accuracy over tasks with all modules, and with none."""
    return _scores(results, lambda pool: pool.composed.mean()), _scores(results, lambda pool: pool.frozen.mean())


def _itself(results: UnlearningResults, operation: str) -> dict[str, Score]:
    """The mean accuracy on the task that the operation is asked for."""
    return _scores(results, lambda pool: np.diag(getattr(pool, operation)).mean())


def _others(results: UnlearningResults, operation: str) -> dict[str, Score]:
    """The mean accuracy on the other tasks."""
    return _scores(results, lambda pool: getattr(pool, operation)[~np.eye(len(pool.frozen), dtype=bool)].mean())


def unlearning_tables(results: UnlearningResults) -> list[Table]:
    """A table for each operation: every method's accuracies in %; ± as of `Score.text`."""
    headings = ("method", f"{ITSELF} (%)", f"{OTHERS} (%)", "all modules (%)", "no module (%)")
    composed, frozen = _whole(results)
    return [
        Table(f"{operation}: {words}", headings, [
            (name, *(part[name].text() for part in (itself, others, composed, frozen))) for name in composed
        ])
        for operation, words in OPERATIONS.items()
        for itself, others in [(_itself(results, operation), _others(results, operation))]
    ]  # fmt: skip


# -- figures ---------------------------------------------------------------------------------------------------------
@styled
def changes(results: UnlearningResults) -> Figure:
    """A panel for each operation, a row for each method: where the accuracy on a task, and on the others, moves to.

    A line goes from all modules (a bar) to the mean after the operation (a large mark); dotted is no module.
    """
    composed, frozen = _whole(results)
    looks = {ITSELF: {"color": COLOURS[0], "marker": "o"}, OTHERS: {"color": COLOURS[1], "marker": "s"}}
    figure = charts.figure("From all modules to some: the task itself and the others", 1.35 + 0.42 * len(composed))
    for axes, operation in zip(charts.panels(figure, 3, "accuracy (%)"), OPERATIONS, strict=True):
        ends = {ITSELF: _itself(results, operation), OTHERS: _others(results, operation)}
        for i, name in enumerate(composed):
            axes.vlines(100 * composed[name].mean, i - 0.3, i + 0.3, color=INK, linewidth=2)
            axes.vlines(100 * frozen[name].mean, i - 0.4, i + 0.4, color=INK, linewidth=1.3, linestyle=":")
            for shift, (part, look) in zip((-0.16, 0.16), looks.items(), strict=True):
                path = 100 * composed[name].mean, 100 * ends[part][name].mean
                axes.hlines(i + shift, *path, color=look["color"], linewidth=1.6)
        charts.dots(
            axes, list(composed), {part: charts.percent_dots(ends[part], looks[part]) for part in looks}, length=18
        )
        axes.set_title(operation)
        charts.number_ticks(axes, "x", 4, whole=True)
    bars = {"all modules": {"linewidth": 2}, "no module": {"linestyle": ":", "linewidth": 1.3}}
    marks = {name: look | charts.EDGE | {"linewidth": 1.6} for name, look in looks.items()}
    charts.legend(figure, marks | {name: {"color": INK} | look for name, look in bars.items()}, 4)
    return figure


@styled
def change_maps(
    method: str, maps: dict[str, Float[np.ndarray, "tasks tasks"]], tasks: Sequence[str], limit: float
) -> Figure:
    """A heat map for each operation: the change of accuracy (points) on the task of a column, asked for that of a row.

    The colours go from -`limit` to `limit` points.
    """
    beside = len(tasks) <= charts.ANNOTATED
    height = 3.3 if beside else 0.6 + 3.7 * len(maps)
    figure = charts.figure(f"Change of accuracy, {middle(method, 40)}", height)
    axes = charts.panels(figure, len(maps), "tested on", "asked for", rows=1 if beside else len(maps), sharex=False)
    for one, (operation, change) in zip(axes, maps.items(), strict=True):
        texts = (lambda x: signed(x / 100, 0)) if len(tasks) <= charts.ANNOTATED // 2 else None
        image = charts.heat(one, 100 * change, (-limit, limit), tasks, tasks, colours="RdBu", texts=texts, length=12)
        one.set_title(operation)
    charts.colour_bar(figure, image, axes, "points")
    return figure


# -- page ------------------------------------------------------------------------------------------------------------
def _blocks(results: UnlearningResults) -> Iterator[Block]:
    """The figures, each with what to look for in it."""
    yield Block(
        changes(results),
        "Specialise keeps a task's module alone, unlearn all but it, subtract takes its share off besides. To forget "
        "one task and nothing else, the round mark should go left and the square stay at the bar; to specialise, the "
        "round one should stay and the square go left. See for which methods both move together.",
    )
    first = results.runs[0]
    maps_of = {
        name: {operation: getattr(pool, operation) - pool.composed for operation in ("unlearn", "specialise")}
        for name, pool in first.methods.items()
    }
    largest = max(100 * np.nanmax(np.abs(change), initial=0) for maps in maps_of.values() for change in maps.values())
    limit = next(limit for limit in (25.0, 50.0, 100.0) if largest <= limit)
    for name, maps in maps_of.items():
        yield Block(
            change_maps(name, maps, first.tasks, limit),
            "Red is lost, blue gained, in points against all modules. Unlearning one task alone is a red diagonal on "
            f"white; specialising is a white or blue diagonal on red. The colours are the same for all methods. Run "
            f"{first.run}.",
            [
                Table(operation, [f"{operation} (points)", *first.tasks], [
                    (task, *map(signed, row)) for task, row in zip(first.tasks, change, strict=True)
                ])
                for operation, change in maps.items()
            ],
        )  # fmt: skip


def _tiles(results: UnlearningResults) -> list[Tile]:
    """Which method unlearns its task best, and which keeps the others best while unlearning."""
    whole, _ = _whole(results)
    gone, lost = (
        {name: part[name].mean - whole[name].mean for name in whole}
        for part in (_itself(results, "unlearn"), _others(results, "unlearn"))
    )
    forgets = min(gone, key=lambda name: np.nan_to_num(gone[name], nan=np.inf))
    keeps = max(lost, key=lambda name: np.nan_to_num(lost[name], nan=-np.inf))
    return [
        Tile(f"most of its task unlearned: {forgets}", signed(gone[forgets]), "points"),
        Tile("… and of the other tasks", signed(lost[forgets]), "points"),
        Tile(f"others kept best when unlearning: {keeps}", signed(lost[keeps]), "points"),
        Tile("… and of its task", signed(gone[keeps]), "points"),
        Tile("methods", str(len(whole))),
        Tile("whole job", decimal(results.seconds, 0), "s"),
    ]


def unlearning_page(folder: str | os.PathLike, results: UnlearningResults) -> Path:
    """Writes `folder/report.html`, the page of specialising and unlearning, and returns its path."""
    runs, tasks = results.runs, len(results.runs[0].tasks)
    lead = (
        f"The pools of {', '.join(runs[0].methods)} after {counted(tasks, 'task')} of {results.data}, each task asked "
        f"for in turn: specialise in it, unlearn it, subtract it; backbone: {results.backbone}. Accuracies in %, the "
        "prediction among all classes."
    )
    page = Page(
        results.name,
        lead,
        run_facts([run.seed for run in runs], [run.tested for run in runs]),
        _tiles(results),
        unlearning_tables(results),
        _blocks(results),
    )
    return write_page(folder, page)
