"""The page of several tasks learned at once, with learned orders of shared templates beside baselines."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from compo_jax.modular import analysis, routes
from compo_jax.modular.comparison import paired
from compo_jax.modular.forecast import Rerouting
from compo_jax.modular.results import MultitaskMethod, MultitaskResults, OrderAnalysis
from compo_jax.report import charts, route_figures
from compo_jax.report.charts import COLOURS, styled
from compo_jax.report.modular_facts import accuracy_cells, facts, hardening_text, paired_text
from compo_jax.report.page import Block, Page, Tile, write_page
from compo_jax.report.table import BOLD, Table
from compo_jax.report.text import counted, decimal, middle, millions, short, signed, significant, spread

REFERENCE = "single-task"
CURVES = {"entropy": "H(a) / log M", "unused": "1 − H(ā) / log M", "cross_entropy": "cross-entropy\n(nats)"}
PHASES = ("free", "hardening", "fixed")
_COUNTED = "Layers and templates count from 0; first seed."


def _against(methods: Mapping[str, MultitaskMethod], name: str, reference: str = REFERENCE, won: bool = False) -> str:
    """The difference to a method, by seed, as text in points; empty where there is none."""
    if name == reference or reference not in methods:
        return ""
    return paired_text(paired(methods[name].accuracy.mean(1), methods[reference].accuracy.mean(1)), won=won)


def multitask_table(results: MultitaskResults, *, won: bool = False) -> Table:
    """Every method's accuracy (%), mean over tasks, its difference to single-task networks, with the seeds `won`, and
    its costs."""
    methods, single = results.methods, results.methods.get(REFERENCE)
    images = sum(results.job.test_images.values())
    best = accuracy_cells([method.accuracy.mean(1) for method in methods.values()], images)
    there = single is not None
    headings = (
        "method", "accuracy (%)", *[f"against {REFERENCE} (points)"] * there, "parameters",
        *[f"of {REFERENCE} (%)"] * there, "multiply-adds (M)", "time (s)",
    )  # fmt: skip
    rows = [
        [
            name, accuracy, *[_against(methods, name, won=won)] * there, f"{method.parameters[0]:,}",
            *([decimal(100 * method.parameters[0] / single.parameters[0])] if there else []),
            millions(method.macs[0]), spread(method.seconds, 0),
        ]
        for (name, method), accuracy in zip(methods.items(), best, strict=True)
    ]  # fmt: skip
    title = f"{results.job.name}: {counted(len(results.tasks), 'task')} of {results.job.data}"
    return Table(title, headings, rows, [f"Accuracy: mean over tasks, the task known. {BOLD}"])


# -- figures -----------------------------------------------------------------------------------------------------------
@styled
def methods_figure(methods: Mapping[str, MultitaskMethod]) -> Figure:
    """A row for each method: its accuracy, mean over tasks, and beside it its parameters."""
    figure = charts.figure("Accuracy and parameters of the methods", 1.15 + 0.3 * len(methods))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    runs = {name: 100 * method.accuracy.mean(1) for name, method in methods.items()}
    if REFERENCE in methods:
        charts.dashed_line(left, "x", runs[REFERENCE].mean())
    charts.dots(left, list(methods), {"accuracy": charts.Dots(runs, {"color": COLOURS[0], "marker": "D"})})
    parameters = [float(method.parameters[0]) for method in methods.values()]
    right.plot(parameters, range(len(methods)), "s", color=COLOURS[1], markersize=6, **charts.EDGE)
    charts.number_ticks(left, "x", 6)
    charts.log_axis(right, "x", parameters, lambda x: f"{x / 1e3:g} k" if x < 1e6 else f"{x / 1e6:g} M")
    left.set_xlabel("accuracy (%)")
    right.set_xlabel("parameters, all tasks")
    right.grid()
    return figure


@styled
def by_task_figure(
    values: Float[np.ndarray, "tasks methods"],
    names: Sequence[str],
    tasks: Sequence[str],
    base: Float[np.ndarray, " tasks"] | None,
) -> Figure:
    """Heat map: differences to `base`, the reference's accuracies, which stand with the tasks' names; without it,
    accuracies. Fractions."""
    title = "Accuracy by task" + (f", against {REFERENCE}" if base is not None else "")
    figure = charts.figure(title, max(2.8, 1.6 + 0.2 * len(tasks)))
    axes, largest = figure.add_subplot(), 100 * np.nanmax(np.abs(values), initial=0)
    if base is None:
        look = {"limits": (0.0, 100.0), "texts": decimal}
    else:
        tasks = [f"{short(task, 16)}  {decimal(100 * x)}" for task, x in zip(tasks, base, strict=True)]
        limit = next((x for x in (10.0, 25.0, 50.0) if largest <= x), 100.0)
        look = {"limits": (-limit, limit), "texts": lambda x: signed(x / 100), "colours": "RdBu"}
        axes.set_title(f"beside the tasks: accuracy of {REFERENCE} (%)", loc="right", fontsize=8)
    image = charts.heat(axes, 100 * values, rows=tasks, columns=names, length=24, **look)
    charts.colour_bar(figure, image, axes, "accuracy (%)" if base is None else "points")
    return figure


@styled
def curves_figure(methods: Mapping[str, MultitaskMethod], steps: int, phases: tuple[float, ...] = ()) -> Figure:
    """How decided the routes of the first seed are, how many templates they use, and the loss; dotted, where the phases
    of hard routes begin."""
    figure = charts.figure("Routes in the course of training", 5.2)
    panels = charts.panels(figure, len(CURVES), "part of the training", rows=len(CURVES), sharey=False)
    looks = charts.looks(list(methods))
    for axes, (key, label) in zip(panels, CURVES.items(), strict=True):
        for name, method in methods.items():
            curves = method.order.curves
            axes.plot(curves.step[0] / steps, getattr(curves, key)[0], color=looks[name]["color"], linewidth=1.4)
        for place in phases:
            charts.dashed_line(axes, "x", place, linestyle=":")
        top = max({"entropy": 1.04, "unused": 0.25}.get(key, 0.0), axes.get_ylim()[1])
        axes.set(ylabel=label, ylim=(-0.04 * top, top))
        axes.grid(axis="y")
    panels[-1].set_xlim(0, 1)
    for begin, end, name in zip((0, *phases), (*phases, 1), PHASES, strict=True) if phases else ():
        if end - begin >= 0.12:
            place = panels[0].get_xaxis_transform()
            panels[0].text((begin + end) / 2, 1.02, name, transform=place, ha="center", fontsize=8)
    charts.legend(figure, {name: {"color": look["color"]} for name, look in looks.items()}, 3)
    return figure


@styled
def forecast_figure(rerouting: Rerouting, shown: Sequence[int]) -> Figure:
    """The loss as a layer's route moves to each of the templates `shown`, true and forecast; last, the forecast's
    median error over all templates."""
    lines = len(shown) // 2 + 1
    figure = charts.figure("Another template at one layer: the loss, forecast and true", 0.9 + 2.1 * lines)
    panels = charts.panels(figure, len(shown) + 1, "ε", rows=lines, sharex=False, sharey=False)
    looks = {
        "true": {"color": COLOURS[0], "marker": "o", "markersize": 4},
        "forecast": {"color": COLOURS[5], "linestyle": "--", "marker": "s", "markersize": 3},
    }
    for axes, template in zip(panels, shown, strict=False):
        for label, look in looks.items():
            values = np.append(rerouting.loss, getattr(rerouting, label)[template])
            axes.plot(np.append(0, rerouting.amounts), values, **look, label=label)
        axes.set(title=f"to template {template}", ylabel="loss (nats)")
        axes.grid()
    last = panels[-1]
    last.plot(rerouting.amounts, rerouting.error, "D-", color=COLOURS[2], markersize=4)
    charts.log_axis(last, "x", rerouting.amounts)
    if np.any(rerouting.error > 0):
        charts.log_axis(last, "y", rerouting.error)
    last.set(title="error / change, all templates", ylabel="median error")
    last.grid()
    charts.legend(figure, looks, 2)
    return figure


# -- blocks ------------------------------------------------------------------------------------------------------------
def _methods(results: MultitaskResults) -> Iterator[Block]:
    methods = results.methods
    told = ""
    for name, method in methods.items():
        count = name.split("-")[-1]
        for control in (f"frozen-{count}", f"random-{count}", f"random-linear-{count}", "hard-sharing-bn"):
            if method.order is not None and control in methods:
                told += f" {name} less {control}: {_against(methods, name, control)} points."
    dashed = f"; dashed, the {REFERENCE} networks" if REFERENCE in methods else ""
    merit = " What these controls reach is not the order's merit." if told else ""
    seeds = " Small marks are seeds; they share what is hard about a task, so a difference counts by seed."
    yield Block(
        methods_figure(methods),
        f"Mean over tasks{dashed}.{seeds * (len(results.job.seeds) > 1)}{told}{merit}",
    )
    gaps = {name: method.order.gap for name, method in methods.items() if method.order and method.order.gap}
    if gaps:
        yield route_figures.gap_block(gaps)


def _by_task(results: MultitaskResults) -> Iterator[Block]:
    methods, tasks = results.methods, results.tasks
    means = {name: method.accuracy.mean(0) for name, method in methods.items()}
    shown = [name for name in means if name != REFERENCE] or list(means)
    base = means[REFERENCE] if REFERENCE in means and shown != [REFERENCE] else None
    values = np.stack([means[name] - (0 if base is None else base) for name in shown], 1)
    caption = (
        "Mean over seeds. See which tasks are hard for every method."
        if base is None
        else "Blue is gained and red is lost by sharing, mean over seeds. See whether a loss in the mean is a little "
        "of every task or the ruin of one, and which tasks gain whatever the method."
    )
    rows = [
        [task, str(results.classes[i]), *(spread(100 * method.accuracy[:, i]) for method in methods.values())]
        for i, task in enumerate(tasks)
    ]
    table = Table("By task", ["accuracy (%)", "classes", *methods], rows)
    yield Block(by_task_figure(values, shown, tasks, base), caption, [table])


def _curves(results: MultitaskResults) -> Iterator[Block]:
    learned = {name: method for name, method in results.methods.items() if method.order is not None}
    if learned and all(method.order.curves.step.size for method in learned.values()):
        hard = any(name.startswith("hard") for name in learned)
        decided = " Hard routes should have decided before they are fixed, without the second number rising." * hard
        yield Block(
            curves_figure(learned, results.job.training.steps, results.job.training.phases if hard else ()),
            "H(a) / log M is 1 where a layer takes all templates alike and 0 where it takes one (of coefficients a are "
            "the parts of their squares); 1 − H(ā) / log M is 0 where all templates are used alike and 1 where one "
            f"does all the work.{decided} First seed.",
        )


def _routes(results: MultitaskResults, it: OrderAnalysis) -> Iterator[Block]:
    """What the routes of the first seed say, beside random ones."""
    from scipy.cluster.hierarchy import leaves_list

    order, random, tasks, linear = results.methods[it.method].order, it.random, results.tasks, it.linear
    count = order.weights.shape[-1]
    weights = order.weights if linear else np.eye(count)[order.hard]
    hard, matrix = order.hard[0], analysis.task_distances(weights[0], linear=linear)
    linkage = analysis.dendrogram(matrix) if len(tasks) > 1 else None
    rows = np.arange(1) if linkage is None else leaves_list(linkage)
    shares = np.asarray(routes.shares(order.weights[0])) if linear else order.weights[0]
    surety = np.take_along_axis(shares, hard[..., None], -1)[..., 0]
    named = {tasks[i]: hard[i] for i in rows}
    groups = results.job.net.groups if linear else 1
    layers = [f"layer {i // groups}" + f", group {i % groups}" * (groups > 1) for i in range(hard.shape[1])]
    what = (
        "a cell is the template of the largest coefficient, and beside it stands the part of the layer's squared "
        "coefficients that it has: far below 1, a layer is a sum of several and no choice of one."
        if linear
        else "beside, the weight that the template had when routes were learned: 1 was decided. Soft routes are "
        "mixtures all the same; distances, usage and the like are of the largest weights."
    )
    yield Block(
        route_figures.orders(named, count, surety[rows], groups),
        f"{it.method}: down a column, tasks of one colour share that layer; along a row, a colour that comes again "
        f"is a block invoked twice; {what}{' Tasks in the order of the dendrogram.' * (len(tasks) > 1)} {_COUNTED}",
        [Table("Routes", ["task", *layers], [[task, *map(str, route)] for task, route in named.items()])],
    )
    if linkage is not None:
        yield _distances(results, matrix, linkage, weights, it)
    if len(layers) > 1:
        yield _similarity(it)
    used, dead = analysis.usage(weights[0], linear=linear), analysis.dead(weights[0], linear=linear)
    falling = np.argsort(-used, kind="stable").tolist()
    beside = zip(falling, random.mean.usage, random.deviation.usage, strict=True)
    yield Block(
        route_figures.usage(used, random, falling),
        "Bars steeper than the band are a few templates that do most of the work, flatter ones an evenness that "
        f"chance would not give. Largest nowhere: {', '.join(map(str, dead)) or 'none'} ({len(dead)} of "
        f"{count}; of random routes {random.mean.dead:.1f} ± {random.deviation.dead:.1f}). {_COUNTED}",
        [Table("Use", ["template", "weights (%)", "random, same rank (%)", "±"],
               [[str(m), *(decimal(100 * x) for x in (used[m], mean, error))] for m, mean, error in beside])],
    )  # fmt: skip
    if it.removal is not None:
        yield _removal(it, falling, used)


def _distances(results: MultitaskResults, matrix, linkage, weights, it: OrderAnalysis) -> Block:
    tasks, random, count = results.tasks, it.random, len(results.tasks)
    nearest = np.unravel_index(np.argmin(matrix + np.eye(count)), matrix.shape)
    pairs = np.triu_indices(count, 1)
    distance = partial(analysis.task_distances, linear=it.linear)
    by_seed = ", ".join(f"{distance(one)[pairs].mean():.2f}" for one in weights[1:])
    others = f" (other seeds {by_seed})" if by_seed else ""
    rows = [[task, *(f"{x:.2f}" for x in row)] for task, row in zip(tasks, matrix, strict=True)]
    label = "angle / π" if it.linear else "Jensen-Shannon distance"
    what = "the same direction, 0.5 a right angle" if it.linear else "the same route and 1 no common template"
    return Block(
        route_figures.distances(matrix, linkage, tasks, label),
        f"0 is {what} at any layer; look for groups of tasks that are alike. Mean over "
        f"pairs {random.value.distance:.2f}{others}, of random routes {random.mean.distance:.2f} ± "
        f"{random.deviation.distance:.2f}. Nearest are {tasks[nearest[0]]} and {tasks[nearest[1]]}, "
        f"{random.value.nearest:.2f}; the nearest of random routes {random.mean.nearest:.2f} ± "
        f"{random.deviation.nearest:.2f}: groups no nearer than that say nothing. "
        + (
            "Routes that began alike stay nearer than random ones: what counts is which tasks moved away together. "
            if it.linear
            else "Random routes use all templates alike; a few that are used much bring tasks nearer, too. "
        )
        + f"{random.draws} random routes; first seed.",
        [Table("Distances", ["distance", *tasks], rows)],
    )


def _similarity(it: OrderAnalysis) -> Block:
    value, above = it.random.value.similarity, it.random.above.similarity
    pairs = np.triu_indices(len(value), 1)
    rare = int((above[pairs] <= 0.05).sum())
    rows = [[str(i), *(f"{x:.2f}" for x in row)] for i, row in enumerate(value)]
    what = "|cos| of two layers' coefficients" if it.linear else "The part of tasks with one template at both layers"
    return Block(
        route_figures.similarity(it.random),
        f"{what} (of groups of channels: each layer's in turn). A loop over blocks would be a bright line "
        "beside the diagonal, one block again and again a bright square. A dot: at most 5 % of random routes are as "
        f"large. Such pairs: {rare} of {len(pairs[0])}, by chance {0.05 * len(pairs[0]):.1f} or fewer. {_COUNTED}",
        [Table("Layers", ["|cos|", *map(str, range(len(value)))], rows)],
    )


def _removal(it: OrderAnalysis, falling: list[int], used: np.ndarray) -> Block:
    drop, null, deviation = route_figures.over_tasks(it.removal)
    beyond = ", ".join(str(m) for m in falling if drop[m] > null[m] + 2 * deviation[m])
    rows = [
        [str(m), decimal(100 * used[m]), signed(drop[m]), signed(null[m]), decimal(100 * deviation[m])] for m in falling
    ]
    beyond = f"templates {beyond}" if beyond else "none"
    reading = (
        "A much used template costs much either way: what says that it does work of its own is a drop beyond the bar. "
        f"Beyond two deviations: {beyond}."
    )
    what = (
        "A template is removed and its layers take their next best; beside, as many places drawn at random lose what "
        "they have"
    )
    if it.route != "hard":
        left = "all sums" if it.linear else "all mixtures, whose other templates share its weight"
        what = f"A template is removed from {left}; beside, every layer loses one drawn at random"
        reading = (
            f"The bar is the same for all templates: one of large {'coefficients' if it.linear else 'weights'} passes "
            "it by their size. Batch "
            "statistics stay those of all templates, and what that costs is in the drop and in the bar."
        )
    return Block(
        route_figures.removal(it.removal, falling),
        f"{what} (mean ± standard deviation over draws, taken as independent between tasks). {reading} Mean over "
        f"tasks, at most {it.removal_images} images of each task; first seed.",
        [Table("Removal", ["template", "weights (%)", "drop (points)", "random places", "±"], rows)],
    )


def _forecast(method: str, task: str, it: Rerouting) -> Block:
    """The figure of the bridge to curvature."""
    others = [m for m in range(len(it.true)) if m != it.template]
    others.sort(key=lambda m: np.nan_to_num(it.true[m, -1], nan=np.inf))
    shown = list(dict.fromkeys((others[0], others[len(others) // 2], others[-1])))
    amounts = [f"ε = {significant(a, 1)}" for a in it.amounts]
    errors = ", ".join(f"{significant(100 * e)}\u00a0% at {a}" for a, e in zip(amounts, it.error, strict=True))
    both = lambda m: zip(it.true[m], it.forecast[m], strict=True)
    rows = [
        [f"template {m}", *(f"{significant(t, 3)} / {significant(f, 3)}" for t, f in both(m))]
        for m in range(len(it.true))
    ]
    return Block(
        forecast_figure(it, shown),
        f"{method}, task {task}, layer {it.layer}, from its weights (the largest is of template {it.template}) by ε "
        "towards one template: those with the least, the middle and the greatest loss at the largest ε. The forecast "
        "is a quadratic from the curvature at the trained route, and holds nearby only. Its median error is "
        f"{errors} of the true change: a forecast of no change at all would have 100\u00a0%. On {it.images} training "
        "images; first seed.",
        [Table("Forecasts", ["loss, true / forecast (nats)", *amounts], rows)],
    )


def _blocks(results: MultitaskResults) -> Iterator[Block]:
    """The figures, each with what to look for in it; neighbours are of like height."""
    for part in (_methods, _by_task, _curves):
        yield from part(results)
    if results.analysis is not None:
        yield from _routes(results, results.analysis)
        if (rerouting := results.analysis.rerouting) is not None:
            yield _forecast(results.analysis.method, results.tasks[rerouting.task], rerouting)


def _tiles(results: MultitaskResults) -> list[Tile]:
    methods, tasks = results.methods, len(results.tasks)
    shared = [name for name in methods if name != REFERENCE] or list(methods)
    best = max(shared, key=lambda name: np.nan_to_num(methods[name].accuracy.mean(), nan=-np.inf))
    tiles = [Tile(f"highest mean, parts shared: {best}", spread(100 * methods[best].accuracy.mean(1)), "%")]
    if REFERENCE in methods and best != REFERENCE:
        single = methods[REFERENCE]
        gained = (methods[best].accuracy.mean(0) > single.accuracy.mean(0)).sum()
        tiles += [
            Tile(f"against {REFERENCE}", _against(methods, best), "points"),
            Tile("tasks on which it beats them", f"{gained} of {tasks}"),
            Tile("its parameters, of theirs", decimal(100 * methods[best].parameters[0] / single.parameters[0]), "%"),
        ]
    return tiles


def multitask_page(folder: str | os.PathLike, results: MultitaskResults) -> Path:
    """Writes `folder/report.html`, the page of a comparison of ways to learn several tasks, and returns its path."""
    job, tasks = results.job, len(results.tasks)
    lead = (
        f"{counted(tasks, 'task')} of {job.data}, {results.classes.sum()} classes in all, learned by "
        f"{', '.join(middle(name, 40) for name in results.methods)}. Each layer of a shared network is made of "
        f"{job.net.templates} templates unless the method's name says otherwise."
    )
    kinds = {name.split("-")[0] for name, method in results.methods.items() if method.order}
    hard = {"hard orders": hardening_text(job.training)} if "hard" in kinds and job.net.route != "hard" else {}
    rates = [f"{kind} at {rate:g} times the learning rate" for kind, rate in results.route_rates.items()]
    several = {"learned orders": ", ".join(rates)} if len(rates) > 1 else {}
    told = facts(job, "seeds", **several, **hard)
    return write_page(
        folder, Page(job.name, lead, told, _tiles(results), [multitask_table(results, won=True)], _blocks(results))
    )
