"""The figures of transfer by order: pure functions from numbers to a matplotlib `Figure`, as in `figures`."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compo_jax.report.figures import INK, STYLE, middle, name_ticks, titled_figure
from compo_jax.report.modular_figures import Looks, legend, lines, panels
from compo_jax.report.modular_numbers import by_size


def _deviation(values: Float[np.ndarray, " seeds"]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


@mpl.rc_context(STYLE)
def by_budget(
    found: Mapping[str, Float[np.ndarray, "budgets seeds"]], budgets: Sequence[int | None], marks: Looks
) -> Figure:
    """Mean accuracy over labelled images of a class, a line for each method with bars of ± standard deviation.

    Args:
      found: fractions. None among the budgets is all labels, drawn at the right end.
      marks: as of `looks`.
    """
    figure = titled_figure("Accuracy on new tasks over their labels", 3.4 + 0.09 * len(found))
    axes = figure.add_subplot()
    order = by_size(budgets)
    largest = max([budget for budget in budgets if budget is not None], default=0.25)
    places = np.array([4.0 * largest if budgets[i] is None else budgets[i] for i in order], float)
    for i, (name, values) in enumerate(found.items()):
        axes.errorbar(
            places * 1.05 ** (i - (len(found) - 1) / 2), 100 * values[order].mean(1),
            [100 * _deviation(one) for one in values[order]], **marks[name], markersize=4.5, linewidth=1.3,
            elinewidth=0.8, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(places, ["all" if budgets[i] is None else f"{budgets[i]:,}" for i in order])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(places.min() / 1.6, places.max() * 1.6)
    axes.set(xlabel="labelled images of each class", ylabel="accuracy (%)")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y")
    legend(figure, {name: marks[name] | {"markersize": 4.5} for name in found}, 2)
    return figure


def _points_axis(axes: Axes, largest: float) -> None:
    """In points; logarithmic beyond 5 where some methods lie far below the others, which should stay legible."""
    if largest > 20:
        axes.set_xscale("symlog", linthresh=5, linscale=1)
        axes.set_xticks([-50, -5, 0, 5, 50])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(*np.array([-1, 1]) * max(60, 1.1 * largest))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}".replace("-", "−")))


@mpl.rc_context(STYLE)
def differences(
    found: Mapping[str, Float[np.ndarray, "budgets pairs"]], budgets: Sequence[str], marks: Looks
) -> Figure:
    """A panel for each budget, a row for each method: the mean difference ± standard error, pairs as dots below it.

    Args:
      found: differences as fractions, nan where one isn't known.
      budgets: titles of the panels.
      marks: as of `looks`.
    """
    height = 0.7 + lines(len(budgets)) * (0.4 + 0.28 * len(found))
    figure = titled_figure("Difference to the head alone, pair by pair", height)
    grid = panels(figure, len(budgets), "points")
    largest = max(100 * np.max(np.abs(values[np.isfinite(values)]), initial=0) for values in found.values())
    for j, (axes, title) in enumerate(zip(grid, budgets, strict=True)):
        axes.axvline(0, color=INK, linewidth=1)
        for i, (name, values) in enumerate(found.items()):
            points = 100 * values[j][np.isfinite(values[j])]
            if not len(points):
                continue
            colour, marker = marks[name]["color"], marks[name]["marker"]
            axes.plot(
                points, i + np.resize([0.16, 0.24, 0.32], len(points)), "o", color=colour, alpha=0.6, markersize=2.8,
                markeredgewidth=0, label=f"pairs {i}",
            )  # fmt: skip
            axes.errorbar(
                points.mean(), i - 0.14, xerr=_deviation(points) / np.sqrt(len(points)), color=INK, marker=marker,
                markerfacecolor=colour, markeredgecolor=INK, markeredgewidth=0.6, markersize=5.5, elinewidth=1.3,
                label=f"mean {i}",
            )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=9)
        _points_axis(axes, largest)
        axes.tick_params(axis="y", which="both", length=0)
        axes.set_yticks(np.arange(len(found) - 1) + 0.5, minor=True)
        axes.grid(axis="x")
        axes.grid(axis="y", which="minor")
    name_ticks(grid[0], "y", [middle(name, 24) for name in found], length=24)
    grid[0].set_ylim(len(found) - 0.5, -0.5)
    return figure


@mpl.rc_context(STYLE)
def by_trained(
    found: Mapping[str, Float[np.ndarray, " seeds"]], trained: Mapping[str, float], marks: Looks, budget: str
) -> Figure:
    """Mean accuracy at one budget over the scalars that a new task trains, with bars of ± standard deviation."""
    figure = titled_figure(f"Accuracy over what is trained, {budget}", 3.0 + 0.09 * len(found))
    axes = figure.add_subplot()
    dots = {name: marks[name] | {"linestyle": "none"} for name in found}
    for name, values in found.items():
        axes.errorbar(
            trained[name], 100 * values.mean(), 100 * _deviation(values), **dots[name], markersize=6, elinewidth=0.8,
            label=name,
        )  # fmt: skip
    known = np.array([trained[name] for name in found if trained[name] > 0])
    if len(known):
        axes.set_xscale("log")
        few = known.max() < 100 * known.min()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.set_xlim(known.min() / 1.6, known.max() * 1.6)
    axes.set(xlabel="scalars trained for a new task", ylabel="accuracy (%)")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid()
    legend(figure, dots, 2)
    return figure
