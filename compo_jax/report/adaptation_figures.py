"""The figures of adaptation by order: pure functions from numbers to a matplotlib `Figure`, as in `figures`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compo_jax.report.figures import ANNOTATED, COLOURS, INK, STYLE, cell_texts, middle, name_ticks, titled_figure
from compo_jax.report.modular_figures import GREY, legend, lines, panels


class Group(NamedTuple):
    """What methods of a group adapt, in words, and how they are drawn."""

    label: str
    colour: str
    marker: str
    face: str | None = None

    def look(self) -> dict[str, Any]:
        """Properties of a large mark."""
        face = self.colour if self.face is None else self.face
        edge = INK if self.face is None else self.colour
        return {"marker": self.marker, "color": self.colour, "markerfacecolor": face, "markeredgecolor": edge,
                "markeredgewidth": 0.6 if self.face is None else 1.2, "linestyle": "none"}  # fmt: skip


GROUPS = {
    "sources": Group("nothing", GREY, "s"),
    "order": Group("order", COLOURS[0], "o"),
    "bn": Group("BN", COLOURS[1], "D"),
    "order+bn": Group("order + BN", COLOURS[2], "^"),
    "oracle": Group("(labels)", COLOURS[5], "v", "none"),
}


def _marks(groups: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The legend's marks: of the groups that there are."""
    return {f"adapts {part.label}" if name != "oracle" else "chosen by labels": part.look()
            for name, part in GROUPS.items() if name in groups.values()}  # fmt: skip


@mpl.rc_context(STYLE)
def by_target(
    found: Mapping[str, Float[np.ndarray, "seeds targets"]],
    groups: Mapping[str, str],
    targets: Sequence[str],
    baseline: str,
) -> Figure:
    """A panel for each target, a row for each method: its accuracy, large the mean, small the seeds.

    Args:
      found: fractions.
      groups: the key in `GROUPS` of each method.
      baseline: the method whose mean is the dashed line, if it is there.
    """
    methods = list(found)
    figure = titled_figure(
        "Accuracy on each target, by what is adapted", 0.9 + lines(len(targets)) * (0.55 + 0.2 * len(methods))
    )
    grid = panels(figure, len(targets), "accuracy (%)", sharex=False)
    breaks = [i - 0.5 for i in range(1, len(methods)) if groups[methods[i]] != groups[methods[i - 1]]]
    for j, (axes, target) in enumerate(zip(grid, targets, strict=True)):
        if baseline in found:
            axes.axvline(100 * np.mean(found[baseline][:, j]), color=INK, linestyle="--", linewidth=1)
        for i, name in enumerate(methods):
            values, group = 100 * found[name][:, j], GROUPS[groups[name]]
            if len(values) > 1:
                axes.plot(
                    values, np.full(len(values), i + 0.27), group.marker, color=group.colour, alpha=0.5, markersize=3,
                    markeredgewidth=0, label=f"seeds {i}",
                )  # fmt: skip
            axes.plot(values.mean(), i - 0.1 * (len(values) > 1), **group.look(), markersize=6, label=f"mean {i}")
        axes.set_title(middle(target, 22), loc="left", fontsize=9, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(axis="y", which="both", length=0)
        axes.set_yticks(breaks, minor=True)
        axes.grid(axis="x")
        axes.grid(axis="y", which="minor", alpha=0.5)
    name_ticks(grid[0], "y", [middle(name, 27) for name in methods], length=27)
    grid[0].set_ylim(len(methods) - 0.5, -0.5)
    legend(figure, _marks(groups), 3)
    return figure


@mpl.rc_context(STYLE)
def objective(
    accuracy: Mapping[str, Float[np.ndarray, "seeds targets"]],
    objective: Mapping[str, Float[np.ndarray, "seeds targets"]],
    groups: Mapping[str, str],
    targets: Sequence[str],
    correlation: Float[np.ndarray, " targets"],
) -> Figure:
    """A panel for each target: accuracy over the objective (nats), a mark for each method and seed.

    Args:
      accuracy: fractions.
      correlation: rank correlations for the titles; nan is left out.
    """
    figure = titled_figure("Accuracy over the unlabelled objective", 1.0 + 2.0 * lines(len(targets)))
    grid = panels(figure, len(targets), "objective (nats)", "accuracy (%)", sharex=False, sharey=False)
    for j, (axes, target) in enumerate(zip(grid, targets, strict=True)):
        for name, values in accuracy.items():
            look = GROUPS[groups[name]].look() | {"alpha": 0.75}
            axes.plot(objective[name][:, j], 100 * values[:, j], **look, markersize=4.5, label=name)
        shown = "" if np.isnan(correlation[j]) else f", ρ = {correlation[j]:.2f}".replace("-", "−")
        axes.set_title(middle(target, 14) + shown, loc="left", fontsize=9, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid()
    legend(figure, _marks(groups), 3)
    return figure


@mpl.rc_context(STYLE)
def sources(
    found: Float[np.ndarray, "domains targets"],
    own: Float[np.ndarray, " domains"],
    domains: Sequence[str],
    targets: Sequence[str],
) -> Figure:
    """Heat map of each source's accuracy on each target and, apart, on its own test images; nan stays blank."""
    figure = titled_figure("Sources as they are, on each target", 1.7 + 0.28 * len(domains))
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [max(2, len(targets)), 1]})
    known = 100 * np.concatenate([found.ravel(), own])
    low = 10 * np.floor(np.nanmin(known, initial=90) / 10)
    for axes, values, names in ((left, found, targets), (right, own[:, None], ["its own images"])):
        image = axes.imshow(100 * values, cmap="viridis", vmin=low, vmax=100, interpolation="nearest", aspect="auto")
        name_ticks(axes, "x", names)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if len(domains) <= ANNOTATED:
            texts = [["" if np.isnan(x) else f"{100 * x:.0f}" for x in row] for row in values]
            cell_texts(axes, image, texts)
    name_ticks(left, "y", domains, length=18)
    left.set(xlabel="target", ylabel="source")
    bar = figure.colorbar(image, ax=[left, right], label="accuracy (%)", ticks=MaxNLocator(5, integer=True))
    bar.outline.set_visible(False)
    return figure


@mpl.rc_context(STYLE)
def routes(
    target: str,
    sources: Mapping[str, Float[np.ndarray, "layers templates"]],
    adapted: Mapping[str, Float[np.ndarray, "layers templates"]],
) -> Figure:
    """Heat maps of routes, three in a line: the sources', then on new lines the adapted ones."""
    columns = 3
    rows = [-(-len(part) // columns) for part in (sources, adapted)]
    layers, templates = next(iter({**sources, **adapted}.values())).shape
    tall = 0.35 + float(np.clip(1.25 * layers / templates, 0.8, 1.6))
    figure = titled_figure(f"Routes of the sources, and adapted to {middle(target, 24)}", 0.7 + tall * sum(rows))
    grid = figure.subplots(sum(rows), columns, sharex=True, sharey=True, squeeze=False)
    used = [*grid[: rows[0]].ravel()[: len(sources)], *grid[rows[0] :].ravel()[: len(adapted)]]
    for axes in set(grid.ravel()) - set(used):
        axes.set_visible(False)
    for column in grid.T:
        for lowest in [axes for axes in column if axes.get_visible()][-1:]:
            lowest.tick_params(axis="x", labelbottom=True)
    names = [*(f"source: {middle(name, 16)}" for name in sources), *(middle(name, 19) for name in adapted)]
    for axes, name, route in zip(used, names, [*sources.values(), *adapted.values()], strict=True):
        image = axes.imshow(route, cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_title(name, loc="left", fontsize=8, parse_math=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=7)
    for axis, count in (("x", templates), ("y", layers)):
        places = range(0, count, -(-count // 8))
        getattr(grid[0, 0], f"set_{axis}ticks")(places)
    figure.supxlabel("template", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    bar = figure.colorbar(image, ax=list(grid.ravel()), label="weight", shrink=0.8 if sum(rows) > 1 else 1.0)
    bar.outline.set_visible(False)
    return figure
