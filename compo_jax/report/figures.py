"""The figures of an incremental run: pure functions from numbers to a matplotlib `Figure`, without pyplot.

Accuracies come in as fractions and are drawn in %. Text and lines are in `INK`, on nothing, so that a page can put its
own colour in their place. Colours are those of Okabe and Ito (2008), apart for every kind of colour vision.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

INK = "#333333"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
WRONG = "#d62728"
WIDTH = 5.6  # inches: 9-point text stays legible on a phone's width
ANNOTATED = 12  # tasks up to which the numbers fit into their cells
STYLE = {
    "font.family": "DejaVu Sans",  # it has the letters of many scripts
    "font.size": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "grid.color": INK, "grid.alpha": 0.15, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "hatch.linewidth": 0.6, "figure.constrained_layout.use": True,
}  # fmt: skip


def titled_figure(title: str, height: float) -> Figure:
    """An empty figure of the page's width, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height))
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", parse_math=False)
    return figure


def short(name: str, length: int) -> str:
    """The name, cut to `length` letters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def middle(name: str, length: int) -> str:
    """The name, cut to `length` letters in its middle, where what tells names apart stands at their ends."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}…{name[-half:]}"


def name_ticks(
    axes: Axes, axis: str, names: Sequence[str], at: Sequence[float] | None = None, length: int = 14
) -> None:
    """Names as tick labels, upright on x where they are many, and only every so many beyond 25."""
    chosen = range(0, len(names), max(1, math.ceil(len(names) / 25)))
    turned = {"rotation": 45 if len(names) <= ANNOTATED else 90} if axis == "x" else {}
    slanted = {"ha": "right", "rotation_mode": "anchor"} if turned.get("rotation") == 45 else {}
    places = [i if at is None else at[i] for i in chosen]
    getattr(axes, f"set_{axis}ticks")(
        places, [short(names[i], length) for i in chosen], parse_math=False, **turned, **slanted
    )


def cell_texts(axes: Axes, image: AxesImage, texts: Sequence[Sequence[str]], size: float = 7.5) -> None:
    """A text in each cell of a heat map where it isn't empty, black or white by what stands out from its colour."""
    for (row, column), colour in np.ndenumerate(np.ma.filled(image.get_array(), np.nan)):
        if not texts[row][column]:
            continue
        luminance = np.dot(image.to_rgba(colour)[:3], (0.299, 0.587, 0.114)) if np.isfinite(colour) else 1
        axes.text(
            column, row, texts[row][column], ha="center", va="center", fontsize=size,
            color="black" if luminance > 0.5 else "white",
        )  # fmt: skip


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour by what stands before a name's last dash (the method), line and marker by what follows (the adapter)."""
    parts = [name.rpartition("-") if "-" in name else (name, "", "") for name in names]
    methods, forms = (list(dict.fromkeys(part[i] for part in parts)) for i in (0, 2))
    lines, markers = ("-", ":", "-.", (0, (5, 1))), "osD^"
    return {
        name: {
            "color": COLOURS[methods.index(part[0]) % len(COLOURS)],
            "linestyle": lines[forms.index(part[2]) % len(lines)],
            "marker": markers[forms.index(part[2]) % len(markers)],
        }
        for name, part in zip(names, parts, strict=True)
    }


@mpl.rc_context(STYLE)
def accuracy_matrix(matrix: Float[np.ndarray, "tasks tasks"], tasks: Sequence[str]) -> Figure:
    """Heat map of `matrix[t, s]`, the accuracy on task s after task t; nan stays blank."""
    count = len(tasks)
    figure = titled_figure("Accuracy on each task as tasks are learned", 4.9)
    axes = figure.add_subplot()
    low = 10 * math.floor(10 * np.nanmin(matrix, initial=0.9))
    image = axes.imshow(100 * matrix, cmap="viridis", vmin=low, vmax=100, interpolation="nearest")
    name_ticks(axes, "x", tasks)
    name_ticks(axes, "y", tasks)
    axes.set(xlabel="accuracy on task", ylabel="after learning task")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.8, ticks=MaxNLocator(6, integer=True))
    bar.outline.set_visible(False)
    if count <= ANNOTATED:
        for t, s in np.argwhere(np.isfinite(matrix)):
            luminance = np.dot(image.to_rgba(image.get_array()[t, s])[:3], (0.299, 0.587, 0.114))
            colour = "black" if luminance > 0.5 else "white"
            axes.text(s, t, f"{100 * matrix[t, s]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return figure


@mpl.rc_context(STYLE)
def accuracy_so_far(
    matrices: Mapping[str, Float[np.ndarray, "tasks tasks"]], frozen: float | None, main: str
) -> Figure:
    """The mean accuracy over the tasks seen, after each task: a line for each method, labelled at its end, `main` bold.

    A method known only after the last task is one point; `frozen` is a dashed line.
    """
    from scipy.optimize import isotonic_regression

    figure = titled_figure("Mean accuracy over the tasks seen so far", max(3.5, 1 + 0.24 * len(matrices)))
    axes = figure.add_subplot()
    count = len(next(iter(matrices.values())))
    ends: list[tuple[str, float, str]] = []
    for name, look in _looks(list(matrices)).items():
        known = np.flatnonzero(np.isfinite(matrices[name]).any(axis=1))
        if not len(known):
            continue
        means = 100 * np.nanmean(matrices[name][known], axis=1)
        bold = {"linewidth": 2.4, "zorder": 3} if name == main else {"linewidth": 1.2}
        axes.plot(known + 1, means, **look, **bold, markersize=4, clip_on=False, label=name)
        ends.append((name, means[-1], look["color"]))
    if frozen is not None:
        axes.axhline(100 * frozen, color=INK, linestyle="--", linewidth=1)
        ends.append(("frozen features", 100 * frozen, INK))
    drawn = np.concatenate([line.get_ydata() for line in axes.lines])
    low, high = max(0, drawn.min() - 4), min(100, drawn.max() + 4)
    axes.set(xlabel="tasks seen", ylabel="mean accuracy (%)", ylim=(low, high))
    axes.set_xlim((1, count) if count > 1 else (0, 2))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.grid(axis="y")

    ends.sort(key=lambda end: end[1])
    steps = 0.055 * (high - low) * np.arange(len(ends))  # a line of text; the least shift that keeps labels apart
    places = isotonic_regression(np.array([y for _, y, _ in ends]) - steps).x + steps
    right = axes.get_xlim()[1]
    for (name, y, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            short(name, 20),
            (right, y),
            (right + 0.1 * max(1, count - 1), place),
            va="center",
            fontsize=8,
            fontweight="bold" if name == main else "normal",
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 1,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 4,
            },
        )
    return figure


@mpl.rc_context(STYLE)
def final_accuracies(accuracies: Mapping[str, float], frozen: float | None, main: str) -> Figure:
    """The final accuracy of each method as a bar, the best on top, `main` in bold; `frozen` is a dashed line."""
    figure = titled_figure("Final accuracy of the methods", 1.3 + 0.3 * len(accuracies))
    axes = figure.add_subplot()
    looks = _looks(list(accuracies))
    names = sorted(accuracies, key=lambda name: accuracies[name])
    values = [100 * accuracies[name] for name in names]
    axes.barh(range(len(names)), values, color=[looks[name]["color"] for name in names], height=0.7)
    for i, value in enumerate(values):  # in a column of their own, clear of the dashed line
        axes.text(112, i, f"{value:.1f}", ha="right", va="center", fontsize=8)
    name_ticks(axes, "y", names, length=20)
    for name, label in zip(names, axes.get_yticklabels(), strict=False):
        label.set_fontweight("bold" if name == main else "normal")
    axes.set(xlabel="final accuracy (%)", xlim=(0, 112), xticks=range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    if frozen is not None:
        axes.axvline(100 * frozen, color=INK, linestyle="--", linewidth=1)
        axes.annotate(
            f"frozen features {100 * frozen:.1f}",
            (100 * frozen, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    return figure


@mpl.rc_context(STYLE)
def specialise_and_unlearn(
    specialise: Sequence[Mapping[str, Any]], unlearn: Sequence[Mapping[str, Any]], composed: Mapping[str, float]
) -> Figure:
    """Bars of the accuracy on a task and on the others (mean), with its module alone, and with all modules but it.

    Diamonds are the accuracies of all modules together, on the same tasks as the bar that they stand at.
    """
    parts = [
        (label, values)
        for label, values in (("only this task's module", specialise), ("all but this task's module", unlearn))
        if values
    ]
    figure = titled_figure("Specialising in a task, and unlearning it", 1.4 + 2 * len(parts))
    panels = figure.subplots(len(parts), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (label, values) in zip(panels, parts, strict=True):
        tasks, place = [value["task"] for value in values], np.arange(len(values))
        wholes = {
            "target": [composed.get(task, math.nan) for task in tasks],
            "control": [
                np.mean([a for other, a in composed.items() if other != task]) if len(composed) > 1 else math.nan
                for task in tasks
            ],
        }
        for key, text, shift, colour, hatch in (
            ("target", "the task", -0.2, COLOURS[0], None),
            ("control", "the other tasks (mean)", 0.2, COLOURS[1], "///"),
        ):
            heights = [100 * value[key] for value in values]
            axes.bar(place + shift, heights, 0.4, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=text)
            axes.plot(
                place + shift,
                100 * np.array(wholes[key]),
                "D",
                color=INK,
                markeredgecolor="white",
                markersize=4.5,
                label="all modules" if key == "control" else None,
            )
        name_ticks(axes, "x", tasks)
        axes.set_title(label, loc="left", fontsize=9)
        axes.set(ylabel="accuracy (%)", ylim=(0, 100))
        axes.grid(axis="y")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


@mpl.rc_context(STYLE)
def training_loss(records: Sequence[Mapping[str, Any]]) -> Figure:
    """The logged loss of one method over its steps, the tasks one after another."""
    figure = titled_figure("Training loss, task after task", 3.2)
    axes = figure.add_subplot()
    tasks = list(dict.fromkeys(record["task"] for record in records))
    start, middles = 0, []
    for i, task in enumerate(tasks):
        own = [record for record in records if record["task"] == task]
        steps = start + np.array([record["step"] for record in own])
        axes.plot(steps, [record["loss"] for record in own], color=COLOURS[0 if i % 2 == 0 else 5], linewidth=1.2)
        middles.append((start + steps.max()) / 2)
        start = steps.max()
    name_ticks(axes, "x", tasks, middles)
    axes.tick_params(axis="x", length=0)
    axes.set(xlabel=f"task, over {start:,} steps in all", ylabel="training loss (nats)", xlim=(0, start))
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.grid(axis="y")
    return figure


@mpl.rc_context(STYLE)
def samples(samples: Sequence[tuple[np.ndarray, str, str, str]]) -> Figure:
    """Images of (image, task, true class, predicted class), 8 in a row; wrong ones have a red frame and a cross."""
    wrong = sum(true != predicted for _, _, true, predicted in samples)
    columns, lines = 8, math.ceil(len(samples) / 8)
    figure = titled_figure(
        f"Test images: true class → predicted class ({wrong} of {len(samples)} wrong)", 0.4 + 1.05 * lines
    )
    long = max(len(true) + len(predicted) for _, _, true, predicted in samples) > 7
    for i, (image, task, true, predicted) in enumerate(samples):
        axes = figure.add_subplot(lines, columns, i + 1, xticks=[], yticks=[])
        axes.imshow(image)
        # marks of direction around the arrow, or the two of a right-to-left script would change places
        arrow, size = ("\n\u200e→ \u200e", 6.5) if long else ("\u200e → \u200e", 8)
        axes.set_title(f"\u200e{short(true, 11)}{arrow}{short(predicted, 9)}", fontsize=size, pad=3, parse_math=False)
        axes.set_xlabel(short(task, 10), fontsize=7, labelpad=2, parse_math=False)
        axes.spines[:].set(visible=true != predicted, color=WRONG, linewidth=2.5)
        if true != predicted:
            for colour, width in (("white", 4), (WRONG, 2)):
                axes.plot(0.85, 0.85, "x", transform=axes.transAxes, color=colour, markersize=8, markeredgewidth=width)
    return figure
