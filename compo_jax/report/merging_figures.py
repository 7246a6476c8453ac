"""A legend that shows names as they are."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from compo_jax.report.figures import middle

MARKERS = "osD^vP"


def named_legend(figure: Figure, handles: Sequence[Line2D], names: Sequence[str], ncols: int) -> None:
    """A legend below the figure that shows names as they are, those with "$" or a leading "_" too."""
    legend = figure.legend(handles, ["name"] * len(names), loc="outside lower left", ncols=ncols)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(middle(name, 30))
