"""The figures of routes: which template each layer takes, what becomes of accuracy on the way to it, and what trained
routes say beside random ones. Pure functions from numbers to a `Figure`; accuracies are fractions."""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from compo_jax.modular.analysis import Removal
from compo_jax.modular.evaluate import Gap
from compo_jax.modular.random_routes import BesideRandom
from compo_jax.report import charts
from compo_jax.report.charts import ANNOTATED, COLOURS, EDGE, INK, styled
from compo_jax.report.page import Block
from compo_jax.report.table import Table
from compo_jax.report.text import middle, spread

POINTS = ("learned", "one-hot", "statistics again", "trained on")  # of a `Gap`


def _shades(count: int) -> ListedColormap:
    """A colour for each template: hues by the golden ratio, so that numbers next to each other are far apart."""
    return ListedColormap(
        [colorsys.hsv_to_rgb((0.55 + m * 0.618034) % 1, (0.5, 0.25)[m // 2 % 2], 0.95) for m in range(count)]
    )


def _layers(axes: Axes, count: int) -> None:
    axes.set_xticks(range(0, count, 1 if count <= 2 * ANNOTATED else 4))


def _templates(axes: Axes, routes: Mapping[str, Int[np.ndarray, " _layers"]], count: int) -> AxesImage:
    longest = max(map(len, routes.values()))
    cells = np.full((len(routes), longest), np.nan)
    for row, route in zip(cells, routes.values(), strict=True):
        row[: len(route)] = route
    names = [middle(name, 22) for name in routes]
    limits = (-0.5, count - 0.5)
    _layers(axes, longest)
    return charts.heat(axes, cells, limits, names, colours=_shades(count), texts=lambda m: f"{m:.0f}", length=22)


@styled
def orders(
    routes: Mapping[str, Int[np.ndarray, " _layers"]],
    templates: int,
    surety: Float[np.ndarray, "routes layers"] | None = None,
    groups: int = 1,
) -> Figure:
    """A row for each route, a colour and a number for the template of each layer, or of each of its groups in turn.

    Args:
      surety: the part of a layer's weights that these templates have, which then stands beside them.
    """
    longest = max(map(len, routes.values()))
    lines = 1 if surety is None or longest <= ANNOTATED else 2
    figure = charts.figure("Which template each layer takes", 0.8 + lines * (0.5 + 0.22 * len(routes)))
    what = "layer" if groups == 1 else f"layer, its {groups} groups of channels in turn"
    panels = charts.panels(figure, 1 if surety is None else 2, what, rows=lines)
    _templates(panels[0], routes, templates)
    if surety is not None:
        panels[0].set_title("template")
        panels[1].set_title("its part of the weights")
        charts.colour_bar(figure, charts.heat(panels[1], surety, (0.0, 1.0)), panels[1], "weight")
    return figure


@styled
def gap(gaps: Mapping[str, Gap]) -> Figure:
    """The mean accuracy over tasks from learned to hard routes: thick the mean over seeds, thin the seeds."""
    figure = charts.figure("From learned to hard routes: the discretisation gap", 3.1 + 0.18 * ((len(gaps) - 1) // 2))
    axes, looks = figure.add_subplot(), charts.looks(list(gaps))
    for name, points in gaps.items():
        values = 100 * np.stack([accuracy.mean(-1) for accuracy in points])
        if values.shape[1] > 1:
            axes.plot(values, color=looks[name]["color"], linewidth=0.8, alpha=0.5, label=f"seeds of {name}")
        axes.plot(values.mean(1), **looks[name], **EDGE, linewidth=2, markersize=6, label=name)
    axes.set_xticks(range(len(POINTS)), POINTS)
    axes.set(ylabel="accuracy (%)", xlim=(-0.3, len(POINTS) - 0.7))
    axes.grid(axis="y")
    charts.legend(figure, looks, 2)
    return figure


def gap_block(gaps: Mapping[str, Gap]) -> Block:
    """`gap` with what to look for in it and its numbers."""
    several = len(next(iter(gaps.values())).learned) > 1
    rows = [[name, *(spread(100 * accuracy.mean(-1)) for accuracy in points)] for name, points in gaps.items()]
    return Block(
        gap(gaps),
        "The fall from the first to the second point is the price of taking one template at each layer; what comes "
        "back at the third was batch statistics alone, and the rest needs training on the fixed route."
        + " Thin lines are seeds."
        * several,
        [Table("From learned to hard routes", ["accuracy (%)", *POINTS], rows)],
    )


# -- beside random routes ----------------------------------------------------------------------------------------------
@styled
def distances(
    matrix: Float[np.ndarray, "tasks tasks"],
    linkage: Float[np.ndarray, "merges 4"],
    tasks: Sequence[str],
    label: str = "Jensen-Shannon distance",
) -> Figure:
    """Heat map of distances between tasks, called `label`, under their dendrogram, in whose order they stand."""
    from scipy.cluster.hierarchy import dendrogram

    tree = dendrogram(linkage, no_plot=True)
    order = tree["leaves"]
    figure = charts.figure("Distance between the tasks' routes", 2.8 + 0.13 * len(tasks))
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3.6))
    for x, y in zip(tree["icoord"], tree["dcoord"], strict=True):  # leaves stand at 5, 15, ...
        above.plot((np.array(x) - 5) / 10, y, color=COLOURS[0], linewidth=1.2)
    above.set(ylabel="distance", ylim=(0, max(0.1, 1.05 * linkage[:, 2].max())))
    above.spines["bottom"].set_visible(False)
    above.grid(axis="y")
    names, shown = [tasks[i] for i in order], matrix[np.ix_(order, order)]
    texts = (lambda x: f"{x:.2f}") if len(tasks) <= ANNOTATED else None
    image = charts.heat(axes, shown, (0.0, 1.0), names, names, texts=texts)
    above.tick_params(axis="x", length=0, labelbottom=False)
    charts.colour_bar(figure, image, axes, label)
    return figure


@styled
def similarity(random: BesideRandom) -> Figure:
    """|cos| between the routes of layers, beside random routes'; a dot where at most 5 % of the draws are as large."""
    layers = len(random.value.similarity)
    figure = charts.figure("How alike the routes of two layers are", 2.9)
    panels = charts.panels(figure, 2, "layer", "layer")
    off = ~np.eye(layers, dtype=bool)
    for axes, numbers, title in zip(
        panels, (random.value, random.mean), ("learned", "random routes, mean"), strict=True
    ):
        image = charts.heat(axes, np.where(off, numbers.similarity, np.nan), (0.0, 1.0))
        axes.set_title(title)
        for axis in "xy":
            charts.number_ticks(axes, axis, 9, whole=True)
    rows, columns = np.nonzero(off & (random.above.similarity <= 0.05))
    dots = {"markeredgecolor": "black", "markeredgewidth": 0.6, "markersize": 4}
    panels[0].plot(columns, rows, "o", color="white", label="rare", **dots)
    charts.colour_bar(figure, image, panels, "|cos|, mean over tasks")
    return figure


def _by_template(axes: Axes, order: Sequence[int], ylabel: str) -> None:
    """Every template's number below its place."""
    axes.set_xticks(range(len(order)), [str(m) for m in order], fontsize=8 if len(order) <= 2 * ANNOTATED else 6)
    axes.set(xlabel="template, the most used first", xlim=(-0.6, len(order) - 0.4), ylabel=ylabel)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")


@styled
def usage(used: Float[np.ndarray, " templates"], random: BesideRandom, order: Sequence[int]) -> Figure:
    """The part of all places that each template takes, in this order, over the band of random routes of each rank."""
    figure = charts.figure("Use of the templates", 2.9)
    axes, place = figure.add_subplot(), np.arange(len(order))
    mean, deviation = random.mean.usage, random.deviation.usage
    axes.bar(place, 100 * used[order], 0.7, color=COLOURS[0], label="learned")
    axes.bar(place, 200 * deviation, 0.9, 100 * (mean - deviation), color=COLOURS[1], alpha=0.45, label="random routes")
    axes.hlines(100 * mean, place - 0.45, place + 0.45, color=INK, linewidth=1.2)
    _by_template(axes, order, "part of all weights (%)")
    axes.set_ylim(bottom=0)
    handles = [Patch(color=COLOURS[0]), Patch(color=COLOURS[1], alpha=0.45)]
    labels = ["learned routes", "random routes, same rank: mean ± standard deviation"]
    figure.legend(handles, labels, loc="outside lower left", ncols=2)
    return figure


@styled
def removal(lost: Removal, order: Sequence[int]) -> Figure:
    """Points of accuracy lost without each template, mean over tasks, in this order, beside as many random places."""
    figure = charts.figure("Accuracy lost without a template", 2.9)
    axes, place = figure.add_subplot(), np.arange(len(order))
    drop, null, deviation = (100 * x[order] for x in over_tasks(lost))
    axes.axhline(0, color=INK, linewidth=0.8)
    looks = {
        "without the template": {"color": COLOURS[0], "marker": "o", "markersize": 6},
        "as many random places": {"color": COLOURS[1], "marker": "s", "markersize": 4, "elinewidth": 1.4},
    }
    for (label, look), x, y, error in zip(looks.items(), (-0.14, 0.14), (drop, null), (None, deviation), strict=True):
        error = None if error is None else np.nan_to_num(error)
        axes.errorbar(place + x, y, error, **look, **EDGE, linestyle="none", label=label)
    _by_template(axes, order, "drop (points)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def over_tasks(lost: Removal) -> Removal:
    """Means over tasks; places of different tasks are drawn almost independently of one another."""
    deviation = np.sqrt((lost.deviation**2).sum(1)) / lost.drop.shape[1]
    return Removal(lost.drop.mean(1), lost.null.mean(1), deviation)
