"""The page of a new task on frozen templates: what learning its order alone is worth."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from compo_jax.modular.results import TransferResults
from compo_jax.report import charts
from compo_jax.report.charts import Look, styled
from compo_jax.report.modular_facts import accuracy_cells, facts, paired_text, training_text
from compo_jax.report.page import Block, Page, Tile, write_page
from compo_jax.report.table import BOLD, Table, standard_error
from compo_jax.report.text import counted, percent, spread

REFERENCE = "head"


def _label(budget: int | None) -> str:
    return "all labels" if budget is None else f"{budget:,} a class"


def by_size(budgets: Sequence[int | None]) -> list[int]:
    """The places of label budgets from the smallest to the largest; None is all labels."""
    return sorted(range(len(budgets)), key=lambda i: (budgets[i] is None, budgets[i] or 0))


def _of_seeds(results: TransferResults) -> dict[str, Float[np.ndarray, "budgets seeds"]]:
    """Of each method the mean over new tasks."""
    return {name: results.accuracy(name).mean(-1) for name in results.methods}


def transfer_table(results: TransferResults) -> Table:
    """Every method's accuracy (%) on new tasks at each budget, and the scalars that it trains and stores."""
    images = sum(results.job.test_images[name] for name in results.tasks[0])
    budgets, seeds = range(len(results.budgets)), _of_seeds(results).values()
    columns = [accuracy_cells([of_method[i] for of_method in seeds], images) for i in budgets]
    rows = [
        [name + " (control)" * method.control, *texts, f"{method.trained:,}", f"{method.stored:,}"]
        for (name, method), texts in zip(results.methods.items(), zip(*columns, strict=True), strict=True)
    ]
    headings = ["method (%)", *map(_label, results.budgets), "trained scalars", "stored scalars"]
    return Table(f"{results.job.name}: accuracy on new tasks of {results.job.data}", headings, rows, [BOLD])


def difference_table(results: TransferResults) -> Table:
    """Every method's difference to the head alone at each budget, in points."""
    others = [name for name in results.methods if name != REFERENCE]
    rows = [[name, *map(paired_text, results.against(name, REFERENCE))] for name in others]
    headings = [f"difference to {REFERENCE} (points)", *map(_label, results.budgets)]
    return Table("Differences on the same seed and new task ± standard error, and pairs won", headings, rows)


# -- figures -----------------------------------------------------------------------------------------------------------
Marks = Mapping[str, Look]


def _errors(values: Float[np.ndarray, "budgets seeds"]) -> list[float]:
    return np.nan_to_num([100 * standard_error(one) for one in values]).tolist()


@styled
def by_budget(
    accuracies: Mapping[str, Float[np.ndarray, "budgets seeds"]], budgets: Sequence[int | None], marks: Marks
) -> Figure:
    """Mean accuracy over labelled images of a class, a line for each method; None, all labels, at the right end."""
    figure = charts.figure("Accuracy on new tasks over their labels", 3.4 + 0.09 * len(accuracies))
    axes, order = figure.add_subplot(), by_size(budgets)
    largest = max([budget for budget in budgets if budget is not None], default=0.25)
    places = np.array([4.0 * largest if budgets[i] is None else budgets[i] for i in order], float)
    for i, (name, values) in enumerate(accuracies.items()):
        apart = 1.05 ** (i - (len(accuracies) - 1) / 2)
        look = {**marks[name], "markersize": 4.5, "linewidth": 1.3, "elinewidth": 0.8, "label": name}
        axes.errorbar(places * apart, 100 * values[order].mean(1), _errors(values[order]), **look)
    axes.set_xscale("log")
    axes.set_xticks(places, ["all" if budgets[i] is None else f"{budgets[i]:,}" for i in order])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(places.min() / 1.6, places.max() * 1.6)
    axes.set(xlabel="labelled images of each class", ylabel="accuracy (%)")
    axes.grid(axis="y")
    charts.legend(figure, {name: {**marks[name], "markersize": 4.5} for name in accuracies}, 2)
    return figure


def _points_axis(axes: Axes, largest: float) -> None:
    """In points; logarithmic beyond 5 where some methods lie far below the others, which should stay legible."""
    if largest > 20:
        axes.set_xscale("symlog", linthresh=5, linscale=1)
        axes.set_xticks([-50, -5, 0, 5, 50])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(*np.array([-1, 1]) * max(60, 1.1 * largest))
    else:
        charts.number_ticks(axes, "x", 5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("-", "−")))


@styled
def differences(
    pairs: Mapping[str, Float[np.ndarray, "budgets pairs"]], budgets: Sequence[str], marks: Marks
) -> Figure:
    """A panel for each budget, a row for each method: the mean difference ± standard error, pairs as dots below it."""
    height = 0.7 + charts.rows_of(len(budgets)) * (0.4 + 0.28 * len(pairs))
    figure = charts.figure("Difference to the head alone, pair by pair", height)
    largest = max(100 * np.max(np.abs(values[np.isfinite(values)]), initial=0) for values in pairs.values())
    look = lambda name: {**marks[name], "linestyle": "none", "markerfacecolor": marks[name]["color"]}
    for j, (axes, title) in enumerate(zip(charts.panels(figure, len(budgets), "points"), budgets, strict=True)):
        charts.dashed_line(axes, "x", 0.0, linestyle="-")
        for name, values in pairs.items():
            known = values[j][np.isfinite(values[j])]
            if len(known):
                charts.dots(axes, list(pairs), {name: charts.Dots({name: 100 * known}, look(name))}, length=24)
        axes.set_title(title)
        _points_axis(axes, largest)
    return figure


@styled
def by_trained(
    accuracies: Mapping[str, Float[np.ndarray, " seeds"]], trained: Mapping[str, int], marks: Marks, budget: str
) -> Figure:
    """Mean accuracy at one budget over the scalars that a new task trains."""
    figure = charts.figure(f"Accuracy over what is trained, {budget}", 3.0 + 0.09 * len(accuracies))
    axes = figure.add_subplot()
    points = {
        name: charts.Point(trained[name], 100 * values.mean(), 100 * standard_error(values))
        for name, values in accuracies.items()
    }
    charts.scatter(axes, points, marks)
    charts.log_axis(axes, "x", [float(x) for x in trained.values()], lambda x: f"{x:,.0f}")
    axes.set(xlabel="scalars trained for a new task", ylabel="accuracy (%)")
    charts.legend(figure, {name: {**marks[name], "linestyle": "none"} for name in accuracies}, 2)
    return figure


# -- the page ----------------------------------------------------------------------------------------------------------
def _by_task(results: TransferResults) -> list[Table]:
    """A table for each budget: accuracy of each method on each new task, over the seeds that leave it out."""
    names = [name for tasks in results.tasks for name in tasks]
    places = {task: [i for i, name in enumerate(names) if name == task] for task in dict.fromkeys(names)}
    tables = []
    for b, budget in enumerate(results.budgets):
        flat = {name: results.accuracy(name)[b].ravel() for name in results.methods}
        rows = [[name, *(spread(100 * values[at]) for at in places.values())] for name, values in flat.items()]
        starts = [start for part in results.parts[b] for start in part.chosen]
        sources = [", ".join(dict.fromkeys(starts[i] for i in at)) for at in places.values()]
        rows.append(["its route starts from that of", *sources])
        tables.append(Table(_label(budget), [f"{_label(budget)} (%)", *places], rows))
    return tables


def _blocks(results: TransferResults) -> Iterator[Block]:
    """The figures, each with what to look for in it."""
    methods, budgets, seeds = results.methods, results.budgets, _of_seeds(results)
    controls = [name for name, method in methods.items() if method.control]
    marks = charts.looks(list(methods), controls)
    grey = " Grey and dashed are controls." if controls else ""
    others = [name for name in ("all", "scratch") if name in methods]
    overtaken = f", and at which budget {' or '.join(others)} overtakes it" if others else ""
    yield Block(
        by_budget(seeds, budgets, marks),
        f"See whether a learned order lifts a method above the head alone{overtaken}.{grey} Marks of a budget are "
        "moved apart.",
        _by_task(results),
    )
    head = results.accuracy(REFERENCE)
    pairs = {name: results.accuracy(name) - head for name in methods if name != REFERENCE}
    if pairs:
        pairs = {name: values.reshape(len(budgets), -1) for name, values in pairs.items()}
        yield Block(
            differences(pairs, [_label(budget) for budget in budgets], marks),
            "A dot is a new task of one seed, the large mark the mean with ± its standard error: right of the line, "
            f"the method beats {REFERENCE} on the same images. Beside the mean, see whether nearly all dots are on one "
            "side. Where some differences are large, the scale is logarithmic beyond ±5.",
        )
    first = by_size(budgets)[0]
    yield Block(
        by_trained(
            {name: values[first] for name, values in seeds.items()},
            {name: method.trained for name, method in methods.items()},
            marks,
            _label(budgets[first]),
        ),
        "More to train isn't always better: best are the methods at the top left."
        f"{' A route costs a new task a few scalars beside its head.' * ('head+route' in methods)}{grey}",
    )


def _tiles(results: TransferResults) -> list[Tile]:
    methods, budgets, seeds = results.methods, results.budgets, _of_seeds(results)
    ends = list(dict.fromkeys((by_size(budgets)[0], by_size(budgets)[-1])))
    tiles = [Tile(f"{REFERENCE} alone, {_label(budgets[i])}", percent(seeds[REFERENCE][i].mean()), "%") for i in ends]
    if "head+route" in methods:
        pairs = [paired_text(pair, won=False) for pair in results.against("head+route", REFERENCE)]
        tiles += [Tile(f"… with its order, {_label(budgets[i])}", pairs[i], "points") for i in ends]
        extra = methods["head+route"].trained - methods[REFERENCE].trained
        tiles.append(Tile("an order is", f"{extra:,}", "scalars"))
    accuracy = np.concatenate([part.accuracy for part in results.source_parts])
    return [*tiles, Tile("tasks trained on", percent(accuracy.mean()), "%")]


def transfer_page(folder: str | os.PathLike, results: TransferResults) -> Path:
    """Writes `folder/report.html`, the page of transfer by order, and returns its path."""
    job, new = results.job, len(results.tasks[0])
    pairs = results.accuracy(REFERENCE)[0].size
    lead = (
        f"{counted(new, 'new task')} of {job.data} on templates trained on {len(results.sources[0])} others, which "
        "stay as they are unless a method trains all or starts from scratch. Accuracy is the mean over new "
        f"tasks, by labelled images of each class; differences are to {REFERENCE} on the same seed and task."
    )
    told = facts(
        job,
        f"{counted(pairs, 'pair')} of a seed and a new task (taken as independent)",
        results.tasks,
        **{"training of a new task": training_text(results.new_training, "all classes")},
    )
    tables = [transfer_table(results), *[difference_table(results)] * (len(results.methods) > 1)]
    return write_page(folder, Page(job.name, lead, told, _tiles(results), tables, _blocks(results)))
