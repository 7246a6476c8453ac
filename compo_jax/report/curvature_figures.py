"""The figures of a check of curvature: pure functions from numbers to a matplotlib `Figure`, as in `figures`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from compo_jax.report.figures import COLOURS, INK, STYLE, name_ticks, short, titled_figure

POSITIVE, NEGATIVE = COLOURS[0], COLOURS[5]
Measure = tuple[str, str, float | None]  # key in a row, label, and the value that the exact matrix has


def _log(axes: Axes, axis: str) -> None:
    """A logarithmic axis that names decades only, and at most five of them."""
    getattr(axes, f"set_{axis}scale")("log")
    chosen = getattr(axes, f"{axis}axis")
    chosen.set_major_locator(LogLocator(numticks=6))
    chosen.set_minor_locator(NullLocator())


@mpl.rc_context(STYLE)
def differences(products: Mapping[str, Any]) -> Figure:
    """The error of central differences over their step size, and of exact products as horizontal lines."""
    figure = titled_figure("Error of Hessian products, against the dense Hessian", 3.6)
    axes = figure.add_subplot()
    steps, errors = (np.array(products[f"difference_{key}"], float) for key in ("steps", "errors"))
    axes.plot(steps, errors, "o-", color=COLOURS[1], markersize=4, label="central differences of the gradient, float64")
    for kind, colour, line in (("float64", COLOURS[0], "-"), ("float32", COLOURS[2], "--")):
        error = products[f"error_{kind}"]
        axes.axhline(error, color=colour, linestyle=line, label=f"exact product, {kind}")
        axes.annotate(
            f"{error:.1e}".replace("-", "−"),
            (1, error),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    for axis in "xy":
        _log(axes, axis)
    axes.set(xlabel="step size along a direction of length one", ylabel="relative error")
    axes.grid(axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=1)
    return figure


@mpl.rc_context(STYLE)
def estimates(title: str, rows: Sequence[Mapping[str, Any]], measures: Sequence[Measure]) -> Figure:
    """A panel for each measure, a line for each estimate, a dot for each batch size, larger for larger batches.

    An axis is logarithmic where its values are positive and span more than a factor of 30.
    """
    names = list(dict.fromkeys(row["estimate"] for row in rows))
    sizes = sorted({row["batch"] for row in rows})
    figure = titled_figure(title, 1.5 + 0.26 * len(names))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    shades = mpl.colormaps["viridis"](np.linspace(0.95, 0.3, len(sizes)))
    for axes, (key, label, ideal) in zip(panels, measures, strict=True):
        if ideal is not None:
            axes.axvline(ideal, color=INK, linestyle="--", linewidth=1)
        for i, size in enumerate(sizes):
            own = [row for row in rows if row["batch"] == size]
            axes.plot(
                np.array([row[key] for row in own], float),
                [names.index(row["estimate"]) for row in own],
                "o",
                markersize=4 + 2.2 * i,
                color=shades[i],
                markeredgecolor=INK,
                markeredgewidth=0.6,
                zorder=4 - i / len(sizes),  # coinciding dots are rings around one another
                label=f"batch of {size}",
            )
        values = np.array([row[key] for row in rows] + ([] if ideal is None else [ideal]), float)
        values = values[np.isfinite(values)]
        if len(values) and values.min() > 0 and values.max() > 30 * values.min():
            _log(axes, "x")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(2 if len(measures) > 2 else 4))
        axes.margins(x=0.12)
        axes.set_xlabel(label)
        axes.grid(axis="both")
    name_ticks(panels[0], "y", names, length=24)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


@mpl.rc_context(STYLE | {"figure.constrained_layout.h_pad": 0.09})  # a title is not to touch the label above it
def forecasts(forecast: Mapping[str, Mapping[str, Any]]) -> Figure:
    """True loss over forecast loss: a row of panels for each pool, a column for each anchor of the expansion.

    Both axes of a panel have the same limits. A diamond is the composition that the forecast holds for the best.
    """
    anchors = list(dict.fromkeys(name for pool in forecast.values() for name in pool["anchors"]))
    figure = titled_figure("Loss of random compositions: forecast and truth", 0.9 + 2.75 * len(forecast))
    panels = figure.subplots(len(forecast), len(anchors), squeeze=False)
    for line, (pool, numbers) in zip(panels, forecast.items(), strict=True):
        for axes, name in zip(line, anchors, strict=True):
            if name not in numbers["anchors"]:
                axes.set_axis_off()
                continue
            found = numbers["anchors"][name]
            points = np.array([found["forecast"], numbers["true"]], float)
            best = found["best_forecast"], found["best_true"]
            everything = np.append(points, best)
            everything = everything[np.isfinite(everything)]
            low, high = (everything.min(), everything.max()) if len(everything) else (0.0, 1.0)
            margin = 0.05 * (high - low) or 0.5
            limits = low - margin, high + margin
            axes.plot(limits, limits, color=INK, linestyle="--", linewidth=1, label="forecast = truth")
            axes.scatter(*points, s=12, color=COLOURS[0], alpha=0.75, linewidths=0, label="a random composition")
            axes.plot(*best, "D", color=COLOURS[1], markeredgecolor=INK, markersize=6, label="best by the forecast")
            axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel="forecast loss (nats)")
            correlation, error = found["correlation"], 100 * found["relative_error"]
            axes.set_title(
                f"around {short(name, 28)}\ncorrelation {correlation:.3f}, error {error:.2g} %".replace("-", "−"),
                loc="left",
                fontsize=8,
                parse_math=False,
            )
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4))
            axes.grid()
        line[0].set_ylabel(f"{short(pool, 24)}\ntrue loss (nats)", parse_math=False)
    shown = next(axes for axes in panels.flat if axes.lines)
    figure.legend(*shown.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


@mpl.rc_context(STYLE)
def theorem(forecast: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Theorem 1 of Porrello et al. (2025), a row for each pool, as its modules are scaled from nothing.

    On the left the losses and what the theorem makes of the single ones, on the right the gap between them, under the
    smallest eigenvalue of the Gram matrix of the first anchor, which is to be the base.
    """
    figure = titled_figure("One composition, and the mean of its single modules", 1.1 + 2.2 * len(forecast))
    panels = figure.subplots(len(forecast), 2, squeeze=False)
    for (left, right), (pool, numbers) in zip(panels, forecast.items(), strict=True):
        found = {key: np.array(values, float) for key, values in numbers["theorem"].items()}
        scale, theory = found["scale"], {"color": INK, "linestyle": "--", "linewidth": 1.2}
        left.plot(scale, found["individual"], "s-", color=NEGATIVE, markersize=4, label="single modules, mean loss")
        left.plot(scale, found["composed"], "o-", color=COLOURS[0], markersize=4, label="the composition's loss")
        left.plot(scale, found["individual"] - found["gap"], **theory, label="by the theorem")
        right.plot(scale, found["measured_gap"], "D-", color=COLOURS[2], markersize=4, label="measured gap")
        right.plot(scale, found["gap"], **theory, label="by the theorem")
        left.set_title(short(pool, 30), loc="left", fontsize=9, parse_math=False)
        lowest = min(next(iter(numbers["anchors"].values()))["gram_eigenvalues"])
        right.set_title(f"smallest Gram eigenvalue {lowest:.2g}".replace("-", "−"), loc="left", fontsize=8)
        left.set_ylabel("loss (nats)")
        right.set_ylabel("gap (nats)")
        for axes in (left, right):
            axes.set_xlabel("scale of the modules")
            axes.grid()
    handles = [axes.get_legend_handles_labels() for axes in panels[0]]
    lines, labels = (first + second[:1] for first, second in zip(*handles, strict=True))
    figure.legend(lines, labels, loc="outside lower left", ncols=2)
    return figure


@mpl.rc_context(STYLE)
def density(spectrum: Mapping[str, Any]) -> Figure:
    """The nodes of the quadrature as stems: eigenvalue across, share of the dimensions up; the negative in orange."""
    figure = titled_figure("Spectrum of the Hessian at the base", 3.2)
    axes = figure.add_subplot()
    nodes, weights = (np.array(spectrum[key], float) for key in ("nodes", "weights"))
    drawn = np.isfinite(nodes) & (weights > 0)
    nodes, weights = nodes[drawn], weights[drawn]
    _log(axes, "y")
    floor = 10.0 ** math.floor(math.log10(weights.min()) - 0.2) if len(weights) else 1e-8
    for own, colour, label in ((nodes < 0, NEGATIVE, "below zero"), (nodes >= 0, POSITIVE, "above zero")):
        axes.vlines(nodes[own], floor, weights[own], color=colour, linewidth=1.5)
        axes.plot(nodes[own], weights[own], "o", color=colour, markersize=5, label=label)
    widest = np.abs(nodes).max(initial=1e-12)
    linear = 10.0 ** (math.floor(math.log10(widest)) - 1)
    axes.set_xscale("symlog", linthresh=linear)
    axes.axvline(0, color=INK, linestyle="--", linewidth=1)
    axes.set(xlabel="eigenvalue", ylabel="share of the dimensions", ylim=(floor, 3))
    axes.grid(axis="y")
    axes.legend(loc="upper right")
    return figure
