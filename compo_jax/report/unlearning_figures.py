"""The figures of specialising and unlearning: pure functions from numbers to a matplotlib `Figure`, as in `figures`."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from compo_jax.report.figures import ANNOTATED, COLOURS, INK, STYLE, middle, name_ticks, titled_figure

Runs = Float[np.ndarray, " runs"]
PARTS = (("target", -0.17, COLOURS[0], "o", "the task itself"), ("control", 0.17, COLOURS[1], "s", "the other tasks"))


@mpl.rc_context(STYLE)
def changes(found: Mapping[str, Mapping[str, Mapping[str, Runs]]], frozen: Mapping[str, Runs]) -> Figure:
    """A panel for each operation, a row for each method: where the accuracy on a task, and on the others, moves to.

    A line goes from all modules (a bar) to the mean after the operation (a large mark); small marks are runs.

    Args:
      found: of each method "all" (a number for each run), and of each operation "target" and "control", as
        {method: {"all": {"all": runs}, operation: {"target": runs, "control": runs}}}.
      frozen: of each method, the accuracy without a module; dotted.
    """
    methods = list(found)
    operations = [name for name in next(iter(found.values())) if name != "all"]
    figure = titled_figure("From all modules to some: the task itself and the others", 1.35 + 0.42 * len(methods))
    panels = figure.subplots(1, len(operations), sharex=True, sharey=True, squeeze=False)[0]
    for axes, operation in zip(panels, operations, strict=True):
        for i, method in enumerate(methods):
            start = 100 * np.mean(found[method]["all"]["all"])
            axes.plot([start, start], [i - 0.3, i + 0.3], "-", color=INK, linewidth=2, label=f"all {i}")
            nothing = 100 * np.mean(frozen[method])
            axes.plot([nothing, nothing], [i - 0.4, i + 0.4], ":", color=INK, linewidth=1.3, label=f"frozen {i}")
            for part, shift, colour, marker, _ in PARTS:
                single = 100 * found[method][operation][part]
                y, end = i + shift, np.mean(single)
                axes.plot([start, end], [y, y], "-", color=colour, linewidth=1.6)
                if len(single) > 1:
                    axes.plot(
                        single, np.full(len(single), y), marker, color=colour, alpha=0.45, markersize=3,
                        markeredgewidth=0, label=f"runs {part} {i}",
                    )  # fmt: skip
                axes.plot(
                    end, y, marker, color=colour, markersize=6, markeredgecolor=INK, markeredgewidth=0.6,
                    label=f"{part} {i}",
                )  # fmt: skip
        axes.set_title(operation, loc="left", fontsize=9)
        axes.set_xlabel("accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(axis="y", which="both", length=0)
        axes.set_yticks(np.arange(len(methods) - 1) + 0.5, minor=True)
        axes.grid(axis="x")
        axes.grid(axis="y", which="minor")
    name_ticks(panels[0], "y", [middle(method, 18) for method in methods], length=18)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=colour, marker=marker, markeredgecolor=INK, markeredgewidth=0.6, label=label)
        for _, _, colour, marker, label in PARTS
    ]
    handles += [
        Line2D([], [], color=INK, linewidth=2, label="all modules"),
        Line2D([], [], color=INK, linestyle=":", linewidth=1.3, label="no module"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, columnspacing=1.2, handlelength=1.6)
    return figure


@mpl.rc_context(STYLE)
def change_maps(
    method: str, maps: Mapping[str, Float[np.ndarray, "tasks tasks"]], tasks: Sequence[str], limit: float
) -> Figure:
    """A heat map for each operation: the change of accuracy on the task of a column, asked for the task of a row.

    Args:
      maps: changes as fractions, by operation; nan stays blank.
      limit: the colours span -`limit` to `limit` points.
    """
    count = len(tasks)
    beside = count <= ANNOTATED
    lines, columns = (1, len(maps)) if beside else (len(maps), 1)
    figure = titled_figure(f"Change of accuracy, {middle(method, 40)}", 3.3 if beside else 0.6 + 3.7 * len(maps))
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes, (operation, change) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(100 * change, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
        name_ticks(axes, "x", tasks, length=12)
        name_ticks(axes, "y", tasks, length=12)
        axes.set_title(operation, loc="left", fontsize=9)
        axes.set_xlabel("tested on")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if count <= ANNOTATED // 2:
            for row, column in np.argwhere(np.isfinite(change)):
                points = 100 * change[row, column]
                shown = f"{points:+.0f}".replace("-", "−") if round(points) else "0"
                axes.text(
                    column, row, shown, ha="center", va="center", fontsize=7.5,
                    color="white" if abs(points) > 0.6 * limit else "black",
                )  # fmt: skip
    for axes in panels if not beside else panels[:1]:
        axes.set_ylabel("asked for")
    bar = figure.colorbar(image, ax=list(panels), label="points", shrink=0.8, ticks=MaxNLocator(6, integer=True))
    bar.outline.set_visible(False)
    return figure
