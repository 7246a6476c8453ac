"""The figures of trained routes, beside random ones: pure functions from numbers to a matplotlib `Figure`."""

import colorsys
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from compo_jax.report.figures import ANNOTATED, COLOURS, INK, STYLE, cell_texts, name_ticks, titled_figure


def _bare(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


@mpl.rc_context(STYLE)
def chosen(
    templates: Int[np.ndarray, "tasks layers"],
    count: int,
    tasks: Sequence[str],
    surety: Float[np.ndarray, "tasks layers"] | None,
) -> Figure:
    """The template that each task takes at each layer, as a number on a colour of its own.

    Args:
      count: of templates.
      surety: the soft weight of these templates before routes were fixed; beside, where it is given.
    """
    rows, layers = templates.shape
    beside = surety is not None and layers <= ANNOTATED
    shape = (1, 2) if beside else (1 if surety is None else 2, 1)
    figure = titled_figure("Routes: the template at each layer", 0.7 + shape[0] * (0.55 + 0.2 * rows))
    panels = figure.subplots(*shape, sharey=True, squeeze=False).ravel()
    # hues by the golden ratio, so that templates next to each other in number are far apart
    shades = [colorsys.hsv_to_rgb(0.55 + m * 0.618034, (0.5, 0.25)[m // 2 % 2], 0.95) for m in range(count)]
    image = panels[0].imshow(
        np.ma.asarray(templates), cmap=ListedColormap(shades), vmin=-0.5, vmax=count - 0.5, interpolation="nearest",
        aspect="auto",
    )  # fmt: skip
    cell_texts(panels[0], image, templates.astype(str).tolist(), 7.0 if layers <= 2 * ANNOTATED else 5.0)
    panels[0].set_title("template", loc="left", fontsize=9)
    if surety is not None:
        image = panels[1].imshow(
            np.ma.masked_invalid(surety), cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto"
        )
        panels[1].set_title("its soft weight", loc="left", fontsize=9)
        bar = figure.colorbar(image, ax=panels[1], shrink=0.8)
        bar.outline.set_visible(False)
    for axes in panels:
        axes.set_xticks(range(0, layers, 1 if layers <= 2 * ANNOTATED else 4))
        axes.set_xlabel("layer")
        _bare(axes)
        name_ticks(axes, "y", tasks, length=16)
    return figure


@mpl.rc_context(STYLE)
def distances(
    matrix: Float[np.ndarray, "tasks tasks"], linkage: Float[np.ndarray, "merges 4"], tasks: Sequence[str]
) -> Figure:
    """Heat map of distances between tasks under their dendrogram, in whose order they stand."""
    from scipy.cluster.hierarchy import dendrogram

    tree = dendrogram(linkage, no_plot=True)
    order = tree["leaves"]
    figure = titled_figure("Distance between the tasks' routes", 2.8 + 0.13 * len(tasks))
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3.6))
    for x, y in zip(tree["icoord"], tree["dcoord"], strict=True):  # leaves stand at 5, 15, ...
        above.plot((np.array(x) - 5) / 10, y, color=COLOURS[0], linewidth=1.2)
    above.set_ylabel("distance")
    above.set_ylim(0, max(0.1, 1.05 * linkage[:, 2].max()))
    above.spines["bottom"].set_visible(False)
    above.tick_params(axis="x", length=0, labelbottom=False)
    above.grid(axis="y")
    image = axes.imshow(
        np.ma.asarray(matrix[np.ix_(order, order)]), cmap="viridis", vmin=0, vmax=1, interpolation="nearest",
        aspect="auto",
    )  # fmt: skip
    names = [tasks[i] for i in order]
    name_ticks(axes, "x", names)
    name_ticks(axes, "y", names)
    _bare(axes)
    if len(tasks) <= ANNOTATED:
        cell_texts(axes, image, [[f"{x:.2f}" for x in row] for row in matrix[np.ix_(order, order)]])
    bar = figure.colorbar(image, ax=axes, label="Jensen-Shannon distance", shrink=0.8)
    bar.outline.set_visible(False)
    return figure


@mpl.rc_context(STYLE)
def similarity(
    value: Float[np.ndarray, "layers layers"],
    null: Float[np.ndarray, "layers layers"],
    rare: Float[np.ndarray, "layers layers"],
) -> Figure:
    """|cos| between the routes of layers, beside random routes'; a dot where at most 5 % of the draws are as large.

    Args:
      rare: the part of the draws at least as large as `value`.
    """
    layers = len(value)
    figure = titled_figure("How often two layers take the same template", 2.9)
    panels = figure.subplots(1, 2, sharey=True)
    off = ~np.eye(layers, dtype=bool)
    top = max(0.1, float(np.nanmax(np.stack([value, null])[:, off], initial=0)))
    for axes, matrix, title in zip(panels, (value, null), ("learned", "random routes, mean"), strict=True):
        image = axes.imshow(np.ma.array(matrix, mask=~off), cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(9, integer=True))
        _bare(axes)
    rows, columns = np.nonzero(off & (rare <= 0.05))
    panels[0].plot(
        columns, rows, "o", color="white", markeredgecolor="black", markeredgewidth=0.6, markersize=4, label="rare"
    )
    panels[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(panels), label="|cos|, mean over tasks", shrink=0.8)
    bar.outline.set_visible(False)
    return figure


def _templates(axes: Axes, order: Sequence[int]) -> None:
    """Every template's number below its place."""
    axes.set_xticks(range(len(order)), [str(m) for m in order], fontsize=8 if len(order) <= 2 * ANNOTATED else 6)
    axes.set(xlabel="template, the most used first", xlim=(-0.6, len(order) - 0.4))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")


@mpl.rc_context(STYLE)
def usage(
    used: Float[np.ndarray, " templates"],
    mean: Float[np.ndarray, " templates"],
    deviation: Float[np.ndarray, " templates"],
    order: list[int],
) -> Figure:
    """The part of all places that each template takes, in this order, over the band of random routes of each rank."""
    figure = titled_figure("Use of the templates", 2.9)
    axes = figure.add_subplot()
    place = np.arange(len(order))
    axes.bar(place, 100 * used[order], 0.7, color=COLOURS[0], label="learned")
    axes.bar(place, 200 * deviation, 0.9, 100 * (mean - deviation), color=COLOURS[1], alpha=0.45, label="random routes")
    axes.hlines(100 * mean, place - 0.45, place + 0.45, color=INK, linewidth=1.2)
    _templates(axes, order)
    axes.set_ylabel("part of all places (%)")
    axes.set_ylim(bottom=0)
    handles = [Patch(color=COLOURS[0]), Patch(color=COLOURS[1], alpha=0.45)]
    labels = ["learned routes", "random routes, same rank: mean ± standard deviation"]
    figure.legend(handles, labels, loc="outside lower left", ncols=2)
    return figure


@mpl.rc_context(STYLE)
def removal(
    drop: Float[np.ndarray, " templates"],
    null: Float[np.ndarray, " templates"],
    deviation: Float[np.ndarray, " templates"],
    order: list[int],
) -> Figure:
    """Points of accuracy lost without each template, in this order, beside as many random places; nan deviations are
    left out."""
    figure = titled_figure("Accuracy lost without a template", 2.9)
    axes = figure.add_subplot()
    place = np.arange(len(order))
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.errorbar(
        place + 0.14, 100 * null[order], np.nan_to_num(100 * deviation[order]), fmt="s", color=COLOURS[1], markersize=4,
        elinewidth=1.4, markeredgecolor=INK, markeredgewidth=0.5, label="as many random places",
    )  # fmt: skip
    axes.plot(
        place - 0.14, 100 * drop[order], "o", color=COLOURS[0], markersize=6, markeredgecolor=INK, markeredgewidth=0.6,
        label="without the template",
    )  # fmt: skip
    _templates(axes, order)
    axes.set_ylabel("drop (points)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure
