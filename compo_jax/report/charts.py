"""What figures are made of: lines, bars, dots, scattered points, heat maps and images, drawn on matplotlib's axes.

Text and lines are in `INK`, on nothing, so that a page can put its own colour in their place. Colours are those of
Okabe and Ito (2008), apart for every kind of colour vision. Functions that make a figure are decorated with `styled`;
nothing here touches pyplot or the global settings.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from compo_jax.report.table import Score, standard_error
from compo_jax.report.text import middle, short, significant

INK = "#333333"
GREY = "#8a9099"  # of controls
WRONG = "#d62728"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MARKERS = "osD^vPX*"
WIDTH = 5.6  # inches: 9-point text stays legible on a phone's width
ANNOTATED = 12  # rows or columns up to which numbers fit into the cells of a heat map
EDGE = {"markeredgecolor": INK, "markeredgewidth": 0.6}
_CJK = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Microsoft YaHei", "Arial Unicode MS")  # where there
STYLE = {
    "font.family": ["DejaVu Sans", *(font for font in _CJK if font in get_font_names())],  # of many scripts
    "font.size": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "axes.titlesize": 9, "axes.titlelocation": "left", "text.parse_math": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.facecolor": "none", "figure.facecolor": "none", "grid.color": INK, "grid.alpha": 0.15, "grid.linewidth": 0.8,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "hatch.linewidth": 0.6, "figure.constrained_layout.use": True,
}  # fmt: skip
styled = mpl.rc_context(STYLE)  #: decorates a function that makes a figure
Look = Mapping[str, Any]  # properties of a matplotlib line


# -- figures, panels, axes -------------------------------------------------------------------------------------------
def figure(title: str, height: float) -> Figure:
    """An empty figure of the page's width, `height` inches high."""
    made = Figure(figsize=(WIDTH, height))
    made.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return made


def rows_of(count: int) -> int:
    """In how many lines `panels` sets so many: three beside each other at most, four in a square."""
    return 2 if count == 4 else -(-count // 3)


def panels(
    figure: Figure, count: int, xlabel: str = "", ylabel: str = "", *, rows: int | None = None, **options: Any
) -> list[Axes]:
    """`count` axes in `rows` rows (default: `rows_of`), with labels at the outer ones.

    Args:
      options: of `Figure.subplots`; axes are shared where it isn't said otherwise.
    """
    rows = rows or rows_of(count)
    columns = -(-count // rows)
    grid = figure.subplots(rows, columns, **{"sharex": True, "sharey": True, "squeeze": False} | options).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[max(0, count - columns) : count]:
        axes.tick_params(axis="x", labelbottom=True)
        axes.set_xlabel(xlabel)
    for axes in grid[:count:columns]:
        axes.set_ylabel(ylabel)
    return list(grid[:count])


def looks(names: Sequence[str], quiet: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each name; the quiet ones (controls) are grey, dashed and hollow."""
    loud = [name for name in names if name not in quiet]
    grey = [name for name in names if name in quiet]
    made = {name: {"color": COLOURS[i % 6], "marker": MARKERS[i % 8], "linestyle": "-"} for i, name in enumerate(loud)}
    for i, name in enumerate(grey):
        made[name] = {"color": GREY, "marker": MARKERS[i % 8], "linestyle": "--", "markerfacecolor": "none"}
    return {name: made[name] for name in names}


def legend(figure: Figure, marks: Mapping[str, Look], columns: int, length: int = 34) -> None:
    """A legend below the figure, of lines with these looks; names are shown as they are, with a leading "_" too."""
    handles = [Line2D([], [], **look) for look in marks.values()]
    drawn = figure.legend(
        handles, ["name"] * len(handles), loc="outside lower left", ncols=columns, columnspacing=1.2, handlelength=2.2
    )
    for text, name in zip(drawn.get_texts(), marks, strict=True):
        text.set_text(middle(name, length))


def name_ticks(
    axes: Axes, axis: str, names: Sequence[str], at: Sequence[float] | None = None, length: int = 14
) -> None:
    """Names as tick labels, slanted on x, upright where they are many, and only every so many beyond 25 (40 on y)."""
    chosen = range(0, len(names), max(1, math.ceil(len(names) / (25 if axis == "x" else 40))))
    turned = {"rotation": 45 if len(names) <= ANNOTATED else 90} if axis == "x" else {}
    slanted = {"ha": "right", "rotation_mode": "anchor"} if turned.get("rotation") == 45 else {}
    places = [i if at is None else at[i] for i in chosen]
    getattr(axes, f"set_{axis}ticks")(places, [short(names[i], length) for i in chosen], **turned, **slanted)
    axes.tick_params(axis=axis, length=0)


def number_ticks(axes: Axes, axis: str, count: int = 5, *, whole: bool = False) -> None:
    """About so many ticks at round numbers."""
    getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(count, integer=whole))


def log_axis(axes: Axes, axis: str, values: Collection[float] = (), text: Callable[[float], str] | None = None) -> None:
    """A logarithmic axis that names six decades at most, and 2 and 5 beside them where they are few and have room.

    Args:
      values: what is drawn; of those that are positive, the axis ends at half the least and twice the largest.
      text: of a tick.
    """
    text = text or (lambda x: significant(x, 1))
    positive = np.array([x for x in values if np.isfinite(x) and x > 0])
    across, height = axes.get_position().size * axes.figure.get_size_inches()
    room = across / 0.45 if axis == "x" else height / 0.2  # for so many texts
    spread = positive.max() / positive.min() if len(positive) else np.inf
    few = spread < 100 and 3 * np.log10(4 * spread) < room
    subs, most = ((1, 2, 5), 8) if few else ((1,), max(2, int(min(6, room))))
    getattr(axes, f"set_{axis}scale")("log")
    chosen = getattr(axes, f"{axis}axis")
    chosen.set_major_locator(LogLocator(subs=subs, numticks=most))
    chosen.set_minor_locator(NullLocator())
    chosen.set_major_formatter(FuncFormatter(lambda x, _: text(x)))
    if len(positive):
        getattr(axes, f"set_{axis}lim")(positive.min() / 2, positive.max() * 2)


def dashed_line(axes: Axes, axis: str, value: float, label: str = "", **look: Any) -> None:
    """A dashed line at a value of the axis; where there is a label, it stands at the line's end."""
    across = axis == "x"
    look = {"color": INK, "linestyle": "--", "linewidth": 1} | look
    (axes.axvline if across else axes.axhline)(value, **look)
    if label:
        axes.annotate(
            label, (value, 1) if across else (0, value), (0, 3) if across else (4, 3),
            xycoords=("data", "axes fraction") if across else ("axes fraction", "data"), textcoords="offset points",
            ha="center" if across else "left", va="bottom", fontsize=8,
        )  # fmt: skip


def name_points(
    axes: Axes, points: Mapping[str, tuple[float, float, str]], bold: Collection[str] = (), length: int = 24
) -> None:
    """Names at the right of the axes, each with a thin line to its point; none covers another.

    Takes the limits of the axes, y linear, as they are.

    Args:
      points: x, y and colour of each.
      bold: names in bold.
    """
    from scipy.optimize import isotonic_regression

    low, high = axes.get_ylim()
    ordered = sorted(points.items(), key=lambda item: item[1][1])
    heights = (np.array([y for _, (_, y, _) in ordered]) - low) / (high - low)
    line = 11 / 72 / (axes.figure.get_figheight() - 0.8)  # of text, in fractions of the axes
    steps = np.arange(len(ordered)) * min(line, 1 / max(1, len(ordered)))
    if not len(ordered):
        return
    # the least shift that keeps a line of text between names, and all of them beside the axes
    places = np.clip(isotonic_regression(heights - steps).x, 0.02, max(0.02, 0.98 - steps[-1])) + steps
    for (name, (x, y, colour)), place in zip(ordered, places, strict=True):
        axes.annotate(
            middle(name, length), (x, y), (1.06, place), textcoords="axes fraction", va="center", fontsize=8,
            fontweight="bold" if name in bold else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.6, "linewidth": 0.8, "relpos": (0, 0.5),
                        "shrinkA": 2, "shrinkB": 4},
        )  # fmt: skip


# -- lines -----------------------------------------------------------------------------------------------------------
class Curve(NamedTuple):
    """Points of a line; `error` is half the height of a band around it."""

    x: Float[np.ndarray, " points"] | Sequence[float]
    y: Float[np.ndarray, " points"] | Sequence[float]
    error: Float[np.ndarray, " points"] | Sequence[float] | None = None


def lines(
    axes: Axes,
    curves: Mapping[str, Curve],
    looks: Mapping[str, Look],
    *,
    ends: bool = False,
    bold: Collection[str] = (),
) -> None:
    """A line for each curve, with its band.

    Args:
      looks: of each, by its name; see `looks`.
      ends: whether each is named at its end (the limits of y must have been set), instead of in a legend.
      bold: names of the thicker ones.
    """
    for name, (x, y, error) in curves.items():
        weight = {"linewidth": 2.4, "zorder": 3} if name in bold else {"linewidth": 1.2}
        (line,) = axes.plot(x, y, **{"markersize": 4, "label": name} | weight | dict(looks[name]))
        if error is not None:
            low, high = np.asarray(y) - np.asarray(error), np.asarray(y) + np.asarray(error)
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    if ends:
        last = {
            name: (float(curve.x[-1]), float(curve.y[-1]), looks[name]["color"])
            for name, curve in curves.items()
            if len(curve.x) and np.isfinite(curve.y[-1])
        }
        name_points(axes, last, bold)


# -- bars ------------------------------------------------------------------------------------------------------------
class Bars(NamedTuple):
    """The heights of one kind of bars, their errors where there are any, and their look."""

    heights: Float[np.ndarray, " names"] | Sequence[float]
    errors: Float[np.ndarray, " names"] | Sequence[float] | None = None
    look: Look = {"color": COLOURS[0]}


def bars(axes: Axes, names: Sequence[str], kinds: Mapping[str, Bars], *, lying: bool = False) -> None:
    """A group of bars for each name, one of each kind; lying bars go from left to right, the first on top."""
    place, width = np.arange(len(names)), 0.8 / len(kinds)
    for i, (label, (heights, errors, look)) in enumerate(kinds.items()):
        at = place + width * (i - (len(kinds) - 1) / 2)
        (axes.barh if lying else axes.bar)(at, heights, width, **{"label": label, "linewidth": 0} | dict(look))
        if errors is not None:
            places, kind = ((heights, at), "xerr") if lying else ((at, heights), "yerr")
            axes.errorbar(*places, **{kind: np.nan_to_num(errors)}, fmt="none", ecolor=INK, elinewidth=1)
    name_ticks(axes, "y" if lying else "x", names, length=20 if lying else 14)
    axes.grid(axis="x" if lying else "y")
    if lying:
        axes.set_ylim(len(names) - 0.4, -0.6)


# -- dots in rows ----------------------------------------------------------------------------------------------------
class Dots(NamedTuple):
    """One kind of dots: for each row that has them, the numbers of single runs; and their look.

    Attributes:
      errors: standard errors of the means over runs; default: from the runs, where there are several.
    """

    runs: Mapping[str, Float[np.ndarray, " runs"]]
    look: Look
    errors: Mapping[str, float] = {}


def percent_dots(scores: Mapping[str, Score], look: Look) -> Dots:
    """Scores in %, with their errors."""
    return Dots({n: 100 * x.runs for n, x in scores.items()}, look, {n: 100 * x.error for n, x in scores.items()})


def dots(axes: Axes, rows: Sequence[str], kinds: Mapping[str, Dots], *, length: int = 26) -> None:
    """A row for each name: large, the mean over runs with its standard error; small, below it, the single runs.

    A mean that isn't finite is left out. The first row is on top.
    """
    for i, (label, (runs, look, errors)) in enumerate(kinds.items()):
        shift, height = 0.64 * ((i + 0.5) / len(kinds) - 0.5), 0.64 / len(kinds)
        chosen = [row for row in rows if row in runs]
        at = np.array([rows.index(row) for row in chosen]) + shift
        look = {"linestyle": "none", "markersize": 6.5} | EDGE | dict(look)
        small = [
            (x, y + 0.3 * height)
            for row, y in zip(chosen, at, strict=True)
            for x in runs[row] if len(runs[row]) > 1
        ]  # fmt: skip
        if small:
            quiet = {"markersize": 3, "alpha": 0.5, "markeredgewidth": 0, "label": f"runs of {label}"}
            axes.plot(*np.array(small).T, **look | quiet)
        means = np.array([np.mean(runs[row]) for row in chosen])
        bars = np.nan_to_num([errors.get(row, standard_error(runs[row])) for row in chosen])
        axes.errorbar(means, at, xerr=bars, ecolor=INK, elinewidth=1, label=label, **look)
    name_ticks(axes, "y", [middle(row, length) for row in rows], length=length)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.tick_params(axis="y", which="minor", length=0)
    axes.grid(True, axis="x")
    axes.grid(True, axis="y", which="minor")


# -- scattered points ------------------------------------------------------------------------------------------------
class Point(NamedTuple):
    """Where a point stands, and its standard error in y."""

    x: float
    y: float
    error: float = 0.0


def scatter(
    axes: Axes,
    points: Mapping[str, Point],
    looks: Mapping[str, Look],
    *,
    named: bool = False,
    bold: Collection[str] = (),
) -> None:
    """A mark with an error bar for each point that is finite; `named` at the right of the axes (see `name_points`)."""
    finite = {name: point for name, point in points.items() if np.isfinite(point.x) and np.isfinite(point.y)}
    for name, (x, y, error) in finite.items():
        look = {"markersize": 6} | EDGE | dict(looks[name]) | {"linestyle": "none"}
        axes.errorbar(x, y, yerr=np.nan_to_num(error), elinewidth=1, label=name, **look)
    axes.grid()
    if named:
        name_points(axes, {name: (x, y, INK) for name, (x, y, _) in finite.items()}, bold)


# -- heat maps -------------------------------------------------------------------------------------------------------
def heat(
    axes: Axes,
    values: Float[np.ndarray, "rows columns"],
    limits: tuple[float, float],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    *,
    colours: str | Colormap = "viridis",
    texts: Callable[[float], str] | Sequence[Sequence[str]] | None = None,
    length: int = 14,
) -> AxesImage:
    """A heat map; what isn't finite stays blank.

    Args:
      limits: the values at the ends of the colour scale, which are said at its bar: chosen by what the numbers mean
        (0 and 100 %; -x and x for changes), not by the least and largest of them.
      rows, columns: names; none where there are none.
      texts: of a number in its cell, or all of them; left out by default, and where they don't fit leave them out.
    """
    low, high = limits
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, interpolation="nearest", aspect="auto"
    )
    for axis, names in (("x", columns), ("y", rows)):
        if len(names):
            name_ticks(axes, axis, names, length=length)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(np.asarray(values)):
        if texts is None or not np.isfinite(value):
            continue
        luminance = np.dot(image.to_rgba(value)[:3], (0.299, 0.587, 0.114))
        axes.text(
            column, row, texts(value) if callable(texts) else texts[row][column], ha="center", va="center",
            fontsize=7.5 if values.shape[1] <= 2 * ANNOTATED else 5, color="black" if luminance > 0.5 else "white",
        )  # fmt: skip
    return image


def colour_bar(figure: Figure, image: AxesImage, axes: Axes | Sequence[Axes], label: str) -> None:
    """The scale of a heat map's colours, with a tick at either end."""
    low, high = image.get_clim()
    space = max(0.07, 0.3 / figure.get_figheight())  # at both ends, of the bar's length; a text is 0.15 inches high
    inner = [x for x in MaxNLocator(5).tick_values(low, high) if space < (x - low) / (high - low) < 1 - space]
    bar = figure.colorbar(image, ax=axes, label=label, shrink=0.8, ticks=[low, *inner, high])
    text = lambda x, _: f"{x:.{2 if abs(x) < 100 else 4}g}".replace("-", "−")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(text))
    bar.outline.set_visible(False)


# -- images ----------------------------------------------------------------------------------------------------------
class Picture(NamedTuple):
    """An image (uint8, height x width x 3), what stands above and below it, and whether it is marked as wrong."""

    image: np.ndarray
    above: str
    below: str = ""
    wrong: bool = False


def images(figure: Figure, pictures: Sequence[Picture], columns: int = 8) -> None:
    """A grid of images; wrong ones have a red frame and a cross."""
    for i, (image, above, below, wrong) in enumerate(pictures):
        axes = figure.add_subplot(-(-len(pictures) // columns), columns, i + 1, xticks=[], yticks=[])
        axes.imshow(image)
        axes.set_title(above, fontsize=6.5 if "\n" in above else 8, loc="center", pad=3)
        axes.set_xlabel(below, fontsize=7, labelpad=2)
        axes.spines[:].set(visible=wrong, color=WRONG, linewidth=2.5)
        if wrong:
            for colour, width in (("white", 4), (WRONG, 2)):
                axes.plot(0.85, 0.85, "x", transform=axes.transAxes, color=colour, markersize=8, markeredgewidth=width)
