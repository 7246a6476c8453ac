"""The page of adaptation to a domain without labels, by its order of blocks or by batch norm."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from compo_jax.modular.comparison import mean_known
from compo_jax.modular.results import AdaptationResults
from compo_jax.report import charts
from compo_jax.report.charts import ANNOTATED, COLOURS, EDGE, GREY, styled
from compo_jax.report.modular_facts import accuracy_cells, facts, paired_text, training_text
from compo_jax.report.page import Block, Page, Tile, write_page
from compo_jax.report.table import BOLD, Table
from compo_jax.report.text import counted, decimal, middle, percent, spread

Cells = Float[np.ndarray, "seeds targets"]

HOLLOW = {"markerfacecolor": "none", "markeredgewidth": 1.2}


class Group(NamedTuple):
    """What methods of a group adapt, in words, and how they are drawn."""

    label: str
    look: charts.Look


GROUPS = {
    "sources": Group("nothing", {"color": GREY, "marker": "s"} | EDGE),
    "order": Group("order", {"color": COLOURS[0], "marker": "o"} | EDGE),
    "bn": Group("BN", {"color": COLOURS[1], "marker": "D"} | EDGE),
    "order+bn": Group("order + BN", {"color": COLOURS[2], "marker": "^"} | EDGE),
    "oracle": Group("(labels)", {"color": COLOURS[5], "marker": "v", **HOLLOW, "markeredgecolor": COLOURS[5]}),
}
UNLABELLED = [group for group in GROUPS if group != "oracle"]


def _names(results: AdaptationResults) -> dict[str, str]:
    """The methods by group, each with its name to show: † uses the target's labels."""
    order = sorted(results.methods, key=lambda name: list(GROUPS).index(results.methods[name]))
    return {name: name + " †" * (results.methods[name] == "oracle") for name in order}


def adaptation_table(results: AdaptationResults, *, won: bool = False) -> Table:
    """Every method's accuracy (%) on each target, difference to the baseline (with the pairs `won`) and objective."""
    names, several = _names(results), len(results.targets) > 1
    accuracies, images = [results.accuracy(name) for name in names], results.job.test_images
    columns = [
        accuracy_cells([x[:, t] for x in accuracies], images[target]) for t, target in enumerate(results.targets)
    ]
    if several:
        columns.append(accuracy_cells([x.mean(1) for x in accuracies], sum(images[t] for t in results.targets)))
    rows = [
        [
            shown, GROUPS[results.methods[name]].label, *cells,
            "" if name == results.baseline else paired_text(results.against_baseline(name), won=won),
            spread(results.objective(name).mean(1), 2),
        ]
        for (name, shown), cells in zip(names.items(), zip(*columns, strict=True), strict=True)
    ]  # fmt: skip
    headings = [
        "method (%)", "adapts", *results.targets, *["mean"] * several,
        f"difference to {results.baseline} (points)", "objective (nats)",
    ]  # fmt: skip
    notes = ["† is chosen by the target's labels, as no method may be."] if "oracle" in results.methods.values() else []
    return Table(f"{results.job.name}: domains of {results.job.data}", headings, rows, [*notes, BOLD])


# -- figures -----------------------------------------------------------------------------------------------------------
def _legend(figure: Figure, groups: Mapping[str, str]) -> None:
    """Of the groups that there are."""
    marks = {
        "chosen by labels" if name == "oracle" else f"adapts {group.label}": {**group.look, "linestyle": "none"}
        for name, group in GROUPS.items()
        if name in groups.values()
    }
    charts.legend(figure, marks, 3)


@styled
def by_target(
    accuracies: Mapping[str, Cells], groups: Mapping[str, str], targets: Sequence[str], baseline: str
) -> Figure:
    """A panel for each target, a row for each method: its accuracy (fractions); dashed, the baseline's mean."""
    lines = charts.rows_of(len(targets))
    figure = charts.figure("Accuracy on each target, by what is adapted", 0.9 + lines * (0.55 + 0.2 * len(accuracies)))
    panels = charts.panels(figure, len(targets), "accuracy (%)", sharex=False)
    for j, (axes, target) in enumerate(zip(panels, targets, strict=True)):
        if baseline in accuracies:
            charts.dashed_line(axes, "x", 100 * np.mean(accuracies[baseline][:, j]))
        for name, values in accuracies.items():
            dots = charts.Dots({name: 100 * values[:, j]}, {**GROUPS[groups[name]].look, "markersize": 6})
            charts.dots(axes, list(accuracies), {name: dots}, length=27)
        axes.set_title(middle(target, 18), fontsize=8)
        charts.number_ticks(axes, "x", 4, whole=True)
    _legend(figure, groups)
    return figure


@styled
def objective_figure(
    accuracies: Mapping[str, Cells],
    objectives: Mapping[str, Cells],
    groups: Mapping[str, str],
    targets: Sequence[str],
    correlation: Float[np.ndarray, " targets"],
) -> Figure:
    """A panel for each target: accuracy (fractions) over the objective (nats), a mark for each method and seed."""
    figure = charts.figure("Accuracy over the unlabelled objective", 1.0 + 2.0 * charts.rows_of(len(targets)))
    panels = charts.panels(figure, len(targets), "objective (nats)", "accuracy (%)", sharex=False, sharey=False)
    for j, (axes, target) in enumerate(zip(panels, targets, strict=True)):
        for name, values in accuracies.items():
            look = {**GROUPS[groups[name]].look, "alpha": 0.75, "linestyle": "none", "markersize": 4.5}
            axes.plot(objectives[name][:, j], 100 * values[:, j], **look, label=name)
        shown = f", ρ = {decimal(correlation[j], 2)}" if np.isfinite(correlation[j]) else ""
        axes.set_title(middle(target, 14) + shown, fontsize=7)
        charts.number_ticks(axes, "x", 4)
        charts.number_ticks(axes, "y", 5, whole=True)
        axes.grid()
    _legend(figure, groups)
    return figure


@styled
def sources_figure(
    on_targets: Float[np.ndarray, "domains targets"],
    at_home: Float[np.ndarray, " domains"],
    domains: Sequence[str],
    targets: Sequence[str],
) -> Figure:
    """Heat map of each source's accuracy (fractions) on each target and, apart, on its own test images."""
    figure = charts.figure("Sources as they are, on each target", 1.7 + 0.28 * len(domains))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[max(2, len(targets)), 1])
    texts = (lambda x: f"{x:.0f}") if len(domains) <= ANNOTATED else None
    charts.heat(right, 100 * at_home[:, None], (0.0, 100.0), columns=["its own images"], texts=texts)
    image = charts.heat(left, 100 * on_targets, (0.0, 100.0), domains, targets, texts=texts, length=18)
    left.set(xlabel="target", ylabel="source")
    charts.colour_bar(figure, image, [left, right], "accuracy (%)")
    return figure


@styled
def routes_figure(
    target: str,
    sources: Mapping[str, Float[np.ndarray, "layers templates"]],
    adapted: Mapping[str, Float[np.ndarray, "layers templates"]],
) -> Figure:
    """Heat maps of routes, three in a line: the sources', then on new lines the adapted ones."""
    lines = [charts.rows_of(3 * (-(-len(part) // 3))) for part in (sources, adapted)]
    layers, templates = next(iter({**sources, **adapted}.values())).shape
    tall = 0.35 + float(np.clip(1.25 * layers / templates, 0.8, 1.6))
    figure = charts.figure(f"Routes of the sources, and adapted to {middle(target, 24)}", 0.7 + tall * sum(lines))
    grid = np.array(charts.panels(figure, 3 * sum(lines), rows=sum(lines))).reshape(-1, 3)
    cells = [*grid[: lines[0]].ravel()[: len(sources)], *grid[lines[0] :].ravel()[: len(adapted)]]
    names = [*(f"source: {middle(name, 14)}" for name in sources), *(middle(name, 22) for name in adapted)]
    every = [*sources.values(), *adapted.values()]
    largest = float(np.nanmax(np.abs(every), initial=0.1))
    signs = any(np.min(route, initial=0) < 0 for route in every)
    look = {"limits": (-largest, largest), "colours": "RdBu"} if signs else {"limits": (0.0, max(largest, 1.0))}
    for axes, name, route in zip(cells, names, every, strict=True):
        image = charts.heat(axes, route, **look)
        axes.set_title(name, fontsize=7)
        axes.tick_params(labelsize=7, labelbottom=False)
    for axes in set(grid.ravel()) - set(cells):
        axes.set_visible(False)
    for upright in grid.T:
        for lowest in [axes for axes in upright if axes.get_visible()][-1:]:
            lowest.tick_params(axis="x", labelbottom=True)
    grid[0, 0].set(xticks=range(0, templates, -(-templates // 8)), yticks=range(0, layers, -(-layers // 8)))
    figure.supxlabel("template", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    charts.colour_bar(figure, image, list(grid.ravel()), "weight")
    return figure


# -- the page ----------------------------------------------------------------------------------------------------------
def _blocks(results: AdaptationResults) -> Iterator[Block]:
    """The figures, each with what to look for in it."""
    names, targets = _names(results), results.targets
    groups = {shown: results.methods[name] for name, shown in names.items()}
    accuracies = {shown: results.accuracy(name) for name, shown in names.items()}
    objectives = {shown: results.objective(name) for name, shown in names.items()}
    there, labels = set(groups.values()), "oracle" in groups.values()
    order = (
        " Compare the order alone with batch normalisation (BN) alone, and both together with either: what the order "
        "adds is the gap between them." * ({"order", "bn", "order+bn"} <= there)
    )
    yield Block(
        by_target(accuracies, groups, targets, results.baseline),
        f"Right of the dashed line a method beats {results.baseline}.{order} Each target has its own axis, and small "
        f"marks are seeds{'; † was chosen by the labels of the target: no method may be' * labels}.",
    )
    correlation, alone = results.correlation(UNLABELLED), results.correlation(("sources", "order"))
    rows = [
        [label, *(spread(x, 2) for x in values.T)]
        for label, values in (("all that no label chose", correlation), ("sources and order alone", alone))
    ]
    yield Block(
        objective_figure(accuracies, objectives, groups, targets, mean_known(correlation, 0)),
        "A mark is a method with one seed. The objective needs no label: where it can choose among methods, marks go "
        "from the top left to the bottom right, and their rank correlation ρ is near −1. Near 0 or above, a low "
        "objective tells nothing about accuracy.",
        [Table("Rank correlation of objective and accuracy", ["rank correlation", *targets], rows)],
    )
    on_targets, at_home = results.source_accuracy()
    known = np.isfinite(on_targets).any(1) | np.isfinite(at_home)
    named = [domain for domain, there in zip(results.domains, known, strict=True) if there]
    yield Block(
        sources_figure(on_targets[known], at_home[known], named, targets),
        "How far each source gets on a target as it is, beside its own test images: a dark column is a far target. "
        "Where rows differ much, the choice of the source matters. Mean over seeds.",
    )
    for target, part in zip(targets, results.parts[0], strict=True):
        adapted = (
            " See which source the adapted ones resemble, and in which layers they leave all sources."
            if part.routes
            else " Look for layers in which they agree."
        )
        yield Block(
            routes_figure(target, dict(zip(results.sources_of(target), part.source_routes, strict=True)), part.routes),
            f"The weights of the blocks, counted from 0, at each layer.{adapted} Seed {results.job.seeds[0]}.",
        )


def _tiles(results: AdaptationResults) -> list[Tile]:
    tiles = [Tile(results.baseline, percent(results.accuracy(results.baseline).mean()), "%")]
    for group, words in (("order", "order alone"), ("bn", "BN alone"), ("order+bn", "order and BN")):
        names = [name for name, of in results.methods.items() if of == group and name != results.baseline]
        if names:
            name = min(names, key=lambda name: np.nan_to_num(results.objective(name).mean(), nan=np.inf))
            difference = paired_text(results.against_baseline(name), won=False)
            tiles.append(Tile(f"{words}, lowest objective: {name}", difference, "points"))
    correlation = mean_known(results.correlation(UNLABELLED), (0, 1))
    return [*tiles, Tile("rank correlation of objective and accuracy", decimal(float(correlation), 2))]


def adaptation_page(folder: str | os.PathLike, results: AdaptationResults) -> Path:
    """Writes `folder/report.html`, the page of adaptation by order, and returns its path."""
    job, targets = results.job, results.targets
    made = f" {results.made[:1].upper()}{results.made[1:]}." if results.made else ""
    turn = " in turn" * (len(targets) > 1 and not results.held_out)
    lead = (
        f"{counted(len(results.domains), 'domain')} of {job.data} with {len(results.classes)} classes; "
        f"{', '.join(targets)} left out of training{turn}, then adapted to without labels."
        f"{made} The objective is lower where predictions are surer and more varied."
    )
    pairs = f"{counted(len(job.seeds) * len(targets), 'pair')} of a seed and a target (taken as independent)"
    adapting = training_text(results.adapting, "the target")
    mixed, free = results.adapting.route_rate, results.free_rate
    rate = f"{adapting}, of a mixture's weights at {mixed:g} times that, of a free route at {free:g} times"
    told = facts(job, pairs, [targets] * len(job.seeds), adaptation=rate)
    return write_page(
        folder, Page(job.name, lead, told, _tiles(results), [adaptation_table(results, won=True)], _blocks(results))
    )
