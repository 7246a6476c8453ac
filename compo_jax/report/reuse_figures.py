"""The figures of block reuse: pure functions from numbers to a matplotlib `Figure`, as in `figures`."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from compo_jax.report.figures import COLOURS, INK, STYLE, middle, name_ticks, titled_figure
from compo_jax.report.modular_figures import GREY, legend, looks

# beyond these, colours come back: the numbers tell templates apart
TEMPLATES = (*COLOURS, "#f0e442", GREY, *map(to_hex, mpl.colormaps["tab20b"].colors))


@mpl.rc_context(STYLE)
def by_cost(
    found: Mapping[str, Float[np.ndarray, " seeds"]], costs: Mapping[str, tuple[float, float]], reference: str
) -> Figure:
    """Accuracy over parameters and over multiply-adds of an image; small marks are seeds, dashed is the reference.

    Args:
      found: fractions.
      costs: parameters and multiply-adds of each method.
    """
    figure = titled_figure("Accuracy over parameters and over work", 3.2 + 0.09 * len(found))
    panels = figure.subplots(1, 2, sharey=True)
    marks = looks(list(found))
    for k, (axes, label) in enumerate(zip(panels, ("parameters (M)", "multiply-adds of an image (M)"), strict=True)):
        places = {name: costs[name][k] / 1e6 for name in found}
        known = [x for x in places.values() if np.isfinite(x)] or [1.0]
        width = max(max(known) - min(known), 0.2 * max(known))  # sizes that hardly differ stay together
        axes.axhline(100 * np.mean(found[reference]), color=INK, linestyle="--", linewidth=1)
        for i, (name, values) in enumerate(found.items()):
            near = [other for other in found if abs(places[other] - places[name]) < 0.02 * width] or [name]
            x = places[name] + 0.035 * width * (near.index(name) - (len(near) - 1) / 2)
            colour, marker = marks[name]["color"], marks[name]["marker"]
            if len(values) > 1:
                axes.plot(
                    np.full(len(values), x), 100 * values, marker, color=colour, alpha=0.5, markersize=3.2,
                    markeredgewidth=0, label=f"seeds {i}",
                )  # fmt: skip
            axes.plot(
                x, 100 * np.mean(values), marker, color=colour, markersize=7, markeredgecolor=INK, markeredgewidth=0.6,
                label=f"mean {i}",
            )  # fmt: skip
        axes.set_xlabel(label)
        axes.set_xlim((min(known) + max(known)) / 2 + np.array([-0.65, 0.65]) * width)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid()
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].yaxis.set_major_locator(MaxNLocator(6))
    edge = {"linestyle": "none", "markeredgecolor": INK, "markeredgewidth": 0.6}
    legend(figure, {name: look | edge for name, look in marks.items()}, 4, 16)
    return figure


def _cell(axes: Axes, x: int, y: int, number: int, colour: str) -> None:
    axes.add_patch(Rectangle((x - 0.46, y - 0.38), 0.92, 0.76, facecolor=colour, linewidth=0))
    luminance = np.dot(to_rgb(colour), (0.299, 0.587, 0.114))
    axes.text(
        x,
        y,
        str(number),
        ha="center",
        va="center_baseline",
        fontsize=7.5,
        color="black" if luminance > 0.5 else "white",
    )


@mpl.rc_context(STYLE)
def orders(routes: Mapping[str, Int[np.ndarray, " layers"]]) -> Figure:
    """A row for each route, a coloured cell with a template's number for each layer."""
    figure = titled_figure("Which block each layer calls", 0.9 + 0.27 * len(routes))
    axes = figure.add_subplot()
    longest = max(len(route) for route in routes.values())
    for row, route in enumerate(routes.values()):
        for layer, template in enumerate(route):
            _cell(axes, layer, row, int(template), TEMPLATES[template % len(TEMPLATES)])
    name_ticks(axes, "y", [middle(name, 22) for name in routes], length=22)
    axes.set(xlabel="layer", xlim=(-0.5, longest - 0.5), ylim=(len(routes) - 0.5, -0.5))
    axes.set_xticks(range(0, longest, max(1, longest // 12)))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


@mpl.rc_context(STYLE)
def gap(found: Mapping[str, Float[np.ndarray, "points seeds"]], points: Sequence[str]) -> Figure:
    """Accuracy from the soft mixture to the tuned hard route: thin lines are seeds, the thick one their mean."""
    figure = titled_figure("From the soft mixture to a hard order", 3.0)
    axes = figure.add_subplot()
    marks = looks(list(found))
    for i, (name, values) in enumerate(found.items()):
        if values.shape[1] > 1:
            axes.plot(100 * values, color=marks[name]["color"], alpha=0.45, linewidth=0.8, label=f"seeds {i}")
        axes.plot(100 * values.mean(1), **marks[name], linewidth=2, markersize=5.5, label=f"mean {i}")
    name_ticks(axes, "x", points, length=24)
    for label in axes.get_xticklabels():
        label.set(rotation=0, ha="center")
    axes.set_ylabel("test accuracy (%)")
    axes.margins(x=0.08, y=0.12)
    axes.grid(axis="y")
    if len(found) > 1:
        legend(figure, marks, 3)
    return figure
