"""The figures of a multi-task comparison: pure functions from numbers to a matplotlib `Figure`, as in `figures`."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from compo_jax.report.figures import COLOURS, INK, STYLE, cell_texts, middle, name_ticks, short, titled_figure
from compo_jax.report.merging_figures import MARKERS, named_legend
from compo_jax.report.numbers import decimal, signed, significant

Seeds = Float[np.ndarray, " seeds"]
GAP = {"soft": "soft route", "hard": "argmax", "reestimated": "… statistics\ntaken again", "finetuned": "… trained on"}
CURVES = {"entropy": "H(a) / log M", "unused": "1 − H(ā) / log M", "cross_entropy": "cross-entropy\n(nats)"}
PHASES = ("free", "hardening", "fixed")


@mpl.rc_context(STYLE)
def methods(found: Mapping[str, Seeds], parameters: Mapping[str, float], reference: str | None) -> Figure:
    """A row for each method: its mean accuracy (large), of single seeds (small), and its parameters on the right.

    Args:
      found: of each method, the mean accuracy over tasks of each seed.
      reference: the method whose mean is dashed.
    """
    figure = titled_figure("Accuracy and parameters of the methods", 1.15 + 0.3 * len(found))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    if reference is not None:
        left.axvline(100 * np.mean(found[reference]), color=INK, linestyle="--", linewidth=1)
    for i, (name, single) in enumerate(found.items()):
        if len(single) > 1:
            left.plot(
                100 * single, np.full(len(single), i), "o", color=COLOURS[0], alpha=0.45, markersize=3.5,
                markeredgewidth=0, label=f"seeds {i}",
            )  # fmt: skip
        left.plot(
            100 * np.mean(single), i, "D", color=COLOURS[0], markersize=6, markeredgecolor=INK, markeredgewidth=0.6,
            label=f"mean {i}",
        )  # fmt: skip
        right.plot(parameters[name], i, "s", color=COLOURS[1], markersize=6, markeredgecolor=INK, markeredgewidth=0.6)
    left.set_xlabel("accuracy (%)")
    left.xaxis.set_major_locator(MaxNLocator(6))
    known = np.array([x for x in parameters.values() if x > 0])
    right.set_xscale("log")
    few = len(known) > 0 and known.max() < 50 * known.min()
    right.xaxis.set_major_locator(LogLocator(subs=(1, 3) if few else (1,), numticks=4))
    right.xaxis.set_minor_locator(NullLocator())
    right.xaxis.set_major_formatter(EngFormatter(sep="\u202f"))
    if len(known):
        right.set_xlim(known.min() / 2, known.max() * 2)
    right.set_xlabel("parameters, all tasks")
    name_ticks(left, "y", [middle(name, 20) for name in found], length=20)
    left.set_ylim(len(found) - 0.4, -0.6)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid()
    return figure


@mpl.rc_context(STYLE)
def by_task(
    values: Float[np.ndarray, "tasks methods"],
    names: Sequence[str],
    tasks: Sequence[str],
    base: Float[np.ndarray, " tasks"] | None,
    reference: str,
) -> Figure:
    """Heat map of fractions: a row for each task, a column for each method.

    Args:
      values: differences to `base` where there is one, else accuracies; nan stays blank.
      base: the accuracy of the method `reference` on each task, which stands with its name.
    """
    title = "Accuracy by task" if base is None else f"Accuracy by task, against {middle(reference, 30)}"
    figure = titled_figure(title, max(2.8, 1.6 + 0.2 * len(tasks)))
    axes = figure.add_subplot()
    if base is None:
        labels, look, bar_label = list(tasks), {"cmap": "viridis"}, "accuracy (%)"
    else:
        labels = [f"{short(task, 16)}  {decimal(100 * x)}" for task, x in zip(tasks, base, strict=True)]
        limit = max(5.0, 5 * float(np.ceil(20 * np.nanmax(np.abs(values), initial=0))))
        look, bar_label = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}, "points"
        beside = f"beside the tasks: accuracy of {middle(reference, 20)} (%)"
        axes.set_title(beside, loc="right", fontsize=8, parse_math=False)
    image = axes.imshow(np.ma.masked_invalid(100 * values), interpolation="nearest", aspect="auto", **look)
    texts = [[decimal(100 * x) if base is None else signed(x) for x in row] for row in values]
    cell_texts(axes, image, texts)
    name_ticks(axes, "x", names, length=18)
    name_ticks(axes, "y", labels, length=24)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, label=bar_label, shrink=0.8, ticks=MaxNLocator(6, integer=True))
    bar.outline.set_visible(False)
    return figure


@mpl.rc_context(STYLE)
def gap(found: Mapping[str, Float[np.ndarray, "points seeds"]]) -> Figure:
    """The accuracy from soft to hard routes at the points of `GAP`, a line for each method, thin ones for seeds."""
    figure = titled_figure("From soft to hard routes: the discretisation gap", 3.1 + 0.18 * ((len(found) - 1) // 2))
    axes = figure.add_subplot()
    for i, values in enumerate(found.values()):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        if values.shape[1] > 1:
            axes.plot(100 * values, **look, linewidth=0.8, alpha=0.5, markersize=2)
        axes.plot(
            100 * values.mean(1), **look, linewidth=2, markersize=6, markeredgecolor=INK, markeredgewidth=0.6,
            label=f"mean {i}",
        )  # fmt: skip
    axes.set_xticks(range(len(GAP)), list(GAP.values()))
    axes.set(ylabel="accuracy (%)", xlim=(-0.3, len(GAP) - 0.7))
    axes.grid(axis="y")
    named_legend(figure, [line for line in axes.lines if line.get_label().startswith("mean")], list(found), 2)
    return figure


@mpl.rc_context(STYLE)
def curves(
    found: Mapping[str, Mapping[str, np.ndarray]], phases: Mapping[str, Sequence[float]], steps: Mapping[str, int]
) -> Figure:
    """How decided routes are, how many modules they use, and the loss, over the part of the training that is done.

    Args:
      found: of each method `step` and the keys of `CURVES`, a number for each record.
      phases: of each method the parts of its `steps` after which the second and the third phase begin; dotted.
    """
    figure = titled_figure("Routes in the course of training", 5.2)
    panels = figure.subplots(len(CURVES), 1, sharex=True)
    for axes, (key, label) in zip(panels, CURVES.items(), strict=True):
        for i, (name, own) in enumerate(found.items()):
            axes.plot(own["step"] / steps[name], own[key], color=COLOURS[i % len(COLOURS)], linewidth=1.4)
        for place in {float(part) for parts in phases.values() for part in parts}:
            axes.axvline(place, color=INK, linestyle=":", linewidth=1.2)
        axes.set_ylabel(label)
        axes.grid(axis="y")
        least = {"entropy": 1.04, "unused": 0.25}.get(key, 0.0)
        axes.set_ylim(-0.04 * least, max(least, axes.get_ylim()[1]))
    begin, end = next(iter(phases.values()))
    for place, width, name in zip((0, begin, end), (begin, end - begin, 1 - end), PHASES, strict=True):
        if width >= 0.12:
            panels[0].text(
                place + width / 2, 1.02, name, transform=panels[0].get_xaxis_transform(), ha="center", fontsize=8
            )
    panels[-1].set(xlabel="part of the training", xlim=(0, 1))
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)]) for i in range(len(found))]
    named_legend(figure, handles, list(found), 3)
    return figure


@mpl.rc_context(STYLE)
def bridge(
    amounts: np.ndarray,
    true: Float[np.ndarray, "templates amounts"],
    forecast: Float[np.ndarray, "templates amounts"],
    loss: float,
    error: np.ndarray,
    shown: Sequence[int],
) -> Figure:
    """The loss as a layer's route moves to each of the templates `shown`, true and forecast; last, the forecast's
    median error over all templates."""
    lines = (len(shown) + 2) // 2
    figure = titled_figure("Another template at one layer: the loss, forecast and true", 0.9 + 2.1 * lines)
    panels = figure.subplots(lines, 2).ravel()
    for axes, template in zip(panels, shown, strict=False):
        for values, look, label in (
            (true, {"color": COLOURS[0], "marker": "o", "markersize": 4}, "true"),
            (forecast, {"color": COLOURS[5], "linestyle": "--", "marker": "s", "markersize": 3}, "forecast"),
        ):
            axes.plot(np.append(0, amounts), np.append(loss, values[template]), **look, label=label)
        axes.set_title(f"to template {template}", loc="left", fontsize=9)
        axes.set_ylabel("loss (nats)")
        axes.grid()
    last = panels[len(shown)]
    last.plot(amounts, error, "D-", color=COLOURS[2], markersize=4)
    last.set_xscale("log")
    last.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
    last.xaxis.set_minor_locator(NullLocator())
    last.xaxis.set_major_formatter(lambda x, _: significant(x, 1))
    if np.any(error > 0):
        last.set_yscale("log")
        low, high = (np.floor(np.log10(np.nanmin(error[error > 0]))), np.ceil(np.log10(np.nanmax(error))))
        last.set_ylim(10**low / 1.5, 10 ** max(high, low + 1) * 1.5)
        last.yaxis.set_minor_locator(NullLocator())
        last.yaxis.set_major_formatter(lambda x, _: significant(x, 1))
    last.set_title("error / change, all templates", loc="left", fontsize=9)
    last.set_ylabel("median error")
    last.grid()
    for axes in panels[len(shown) + 1 :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(shown) - 1) : len(shown) + 1]:
        axes.set_xlabel("ε")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure
