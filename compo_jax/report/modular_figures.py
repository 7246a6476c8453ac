"""What the figures of modular networks share: how methods look, a legend, panels."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from compo_jax.report.figures import COLOURS, middle

GREY = "#8a9099"  # of controls, apart from both papers
MARKERS = "osD^vPX*"
Looks = dict[str, dict[str, Any]]


def looks(names: Sequence[str], controls: Collection[str] = ()) -> Looks:
    """Colour, line and marker of each method; controls are grey, dashed and hollow."""
    own, grey = ([name for name in names if (name in controls) == kind] for kind in (False, True))
    plain = {name: {"color": COLOURS[i % 6], "marker": MARKERS[i % 8], "linestyle": "-"} for i, name in enumerate(own)}
    quiet = {
        name: {"color": GREY, "marker": MARKERS[i % 8], "linestyle": "--", "markerfacecolor": "none"}
        for i, name in enumerate(grey)
    }
    return {name: (plain | quiet)[name] for name in names}


def legend(figure: Figure, marks: Mapping[str, Mapping[str, Any]], ncols: int, length: int = 34) -> None:
    """A legend below the figure, of lines with these properties, that shows names as they are."""
    handles = [Line2D([], [], **look) for look in marks.values()]
    drawn = figure.legend(
        handles, ["name"] * len(handles), loc="outside lower left", ncols=ncols, columnspacing=1.2, handlelength=2.2
    )
    for text, name in zip(drawn.get_texts(), marks, strict=True):
        text.set_parse_math(False)
        text.set_text(middle(name, length))


def panels(
    figure: Figure, count: int, xlabel: str, ylabel: str = "", *, sharex: bool = True, sharey: bool = True
) -> list[Axes]:
    """`count` panels in `lines(count)` lines; labels stand at the outer ones."""
    columns = -(-count // lines(count))
    grid = figure.subplots(lines(count), columns, sharex=sharex, sharey=sharey, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[max(0, count - columns) : count]:
        axes.tick_params(axis="x", labelbottom=True)
        axes.set_xlabel(xlabel)
    for axes in grid[:count:columns]:
        axes.set_ylabel(ylabel)
    return list(grid[:count])


def lines(count: int) -> int:
    """Three panels beside each other at most, four in a square."""
    return 2 if count == 4 else -(-count // 3)
