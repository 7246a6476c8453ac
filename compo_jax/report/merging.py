"""The report of a comparison of merge rules."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from compo_jax.compose.rule_results import MergedPool, MergingResults, PoolMerges
from compo_jax.report import charts
from compo_jax.report.charts import COLOURS, INK, MARKERS, Point, styled
from compo_jax.report.page import Block, Page, Tile, write_page
from compo_jax.report.table import BOLD, Cell, Score, Table, column, run_facts, score
from compo_jax.report.text import ABSENT, counted, decimal, middle, percent, spread

HEADINGS = ("task known (%)", "all classes (%)", "normalised (%)", "time (s)", "memory (× base)")
ALONE, BASE = "each module alone", "base, no module"
DAGGER = " †"  # at the name of a rule that had a warning
Runs = Float[np.ndarray, " runs"]


# -- numbers ---------------------------------------------------------------------------------------------------------
class _Row(NamedTuple):
    """What a rule, the modules alone or the base reached on a pool, over runs."""

    known: Score
    among_all: Score
    normalised: Score
    seconds: Runs
    memory: Runs


def _pools(results: MergingResults) -> dict[str, list[PoolMerges]]:
    """Of each name its pool in every run."""
    return {name: [run.pools[name] for run in results.runs] for name in results.runs[0].pools}


def _row(
    results: MergingResults,
    pools: list[PoolMerges],
    accuracies: list[Float[np.ndarray, " tasks"]],
    merged: list[MergedPool] | None = None,
) -> _Row:
    """Of each run's accuracies, and of what a rule made where there is one."""
    images, nothing = sum(results.runs[0].tested), np.full(len(pools), np.nan)
    known = np.array([accuracy.mean() for accuracy in accuracies])
    normalised = np.array([pool.normalised(accuracy).mean() for pool, accuracy in zip(pools, accuracies, strict=True)])
    # of a single run it is the accuracy's error, in units of the accuracy that the modules have alone
    ratio = score(normalised, images)
    if len(pools) == 1:
        ratio = ratio._replace(error=score(known, images).error / float(np.mean(pools[0].individual)))
    if merged is None:
        return _Row(score(known, images), score(nothing), ratio, nothing, nothing)
    among_all = score(np.array([one.incremental.mean() for one in merged]), images)
    seconds, memory = (np.array([one[i] for one in merged], float) for i in (2, 3))
    return _Row(score(known, images), among_all, ratio, seconds, memory)


def _rules(results: MergingResults, name: str) -> dict[str, _Row]:
    pools = _pools(results)[name]
    merged = {rule: [pool.rules[rule] for pool in pools] for rule in pools[0].rules}
    return {rule: _row(results, pools, [one.within for one in ones], ones) for rule, ones in merged.items()}


def _warned(pools: list[PoolMerges]) -> list[str]:
    """The rules that had a warning in any run."""
    return [rule for rule in pools[0].rules if any(pool.rules[rule].warnings for pool in pools)]


def _warnings(results: MergingResults) -> list[str]:
    """Each message once for a rule and a pool, with its runs."""
    runs: dict[tuple[str, str, str], list[str]] = {}
    for run in results.runs:
        for name, pool in run.pools.items():
            for rule, merged in pool.rules.items():
                for message in dict.fromkeys(merged.warnings):
                    runs.setdefault((rule, name, message), []).append(run.run)
    return [f"† {rule} on {name} (run {', '.join(which)}): {message}" for (rule, name, message), which in runs.items()]


def _seconds(values: Runs) -> str:
    """As `spread`, with two significant digits of the mean."""
    mean = float(np.mean(values))
    return spread(values, int(np.clip(1 - np.floor(np.log10(mean)), 0, 4)) if mean > 0 else 1)


def merging_tables(results: MergingResults) -> list[Table]:
    """A table for each pool: the modules alone, the base and every rule, of which the clear best is bold."""
    tables = []
    for name, pools in _pools(results).items():
        rules, warned = _rules(results, name), _warned(pools)
        columns: list[list[Cell] | list[str]] = [
            column([row[i].text() for row in rules.values()], [row[i].mean for row in rules.values()],
                   [row[i].error for row in rules.values()])
            for i in range(3)
        ]  # fmt: skip
        columns += [
            [_seconds(row.seconds) for row in rules.values()],
            [decimal(np.mean(row.memory)) for row in rules.values()],
        ]
        alone = _row(results, pools, [pool.individual for pool in pools])
        base = _row(results, pools, [pool.base for pool in pools])
        tables.append(Table(
            f"{name}: {counted(len(results.runs[0].tasks), 'module')} of {results.data}",
            ("rule", *HEADINGS),
            [
                (ALONE, alone.known.text(), ABSENT, "100.0", ABSENT, ABSENT),
                (BASE, base.known.text(), ABSENT, base.normalised.text(), ABSENT, ABSENT),
                *zip([rule + DAGGER * (rule in warned) for rule in rules], *columns, strict=True),
            ],
            [BOLD, *(["† had warnings."] if warned else [])],
        ))  # fmt: skip
    return tables


# -- figures ---------------------------------------------------------------------------------------------------------
def _marked(rule: str, warned: list[str]) -> str:
    return middle(rule, 24) + DAGGER * (rule in warned)


@styled
def normalised(results: MergingResults) -> Figure:
    """Normalised accuracy of each rule, the best on top; dashed, each module alone; dotted, the base, by pool."""
    pools, marks = _pools(results), {}
    scores = {name: {rule: row.normalised for rule, row in _rules(results, name).items()} for name in pools}
    warned = [rule for own in pools.values() for rule in _warned(own)]
    means: dict[str, list[float]] = {}
    for by_rule in scores.values():
        for rule, one in by_rule.items():
            means.setdefault(rule, []).append(one.mean)
    order = sorted(means, key=lambda rule: -np.nan_to_num(np.mean(means[rule]), nan=-np.inf))
    figure = charts.figure("Normalised accuracy of the rules", 1.7 + len(order) * (0.16 + 0.09 * len(pools)))
    axes = figure.add_subplot()
    charts.reference(axes, "x", 100.0)
    kinds = {}
    for i, (name, own) in enumerate(pools.items()):
        marks[name] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": "none"}
        base = _row(results, own, [pool.base for pool in own]).normalised.mean
        charts.reference(axes, "x", 100 * base, color=marks[name]["color"], linestyle=":", linewidth=1.4)
        named = {_marked(rule, warned): one for rule, one in scores[name].items()}
        kinds[name] = charts.percent_dots(named, marks[name])
    charts.dots(axes, [_marked(rule, warned) for rule in order], kinds)
    axes.set_xlabel("normalised accuracy (%)")
    ends = {ALONE: {"color": INK, "linestyle": "--"}, BASE: {"color": INK, "linestyle": ":"}}
    charts.legend(figure, {name: look | charts.EDGE for name, look in marks.items()} | ends, 2)
    return figure


@styled
def over_time(name: str, rules: Mapping[str, _Row], alone: float, warned: list[str], look: int) -> Figure:
    """Accuracy of each rule over its seconds, named at the right; dashed, the modules alone. `look`: of the pool."""
    figure = charts.figure(f"Accuracy over the rule's time, {middle(name, 30)}", max(2.6, 1 + 0.165 * len(rules)))
    axes = figure.add_subplot()
    points = {
        _marked(rule, warned): Point(float(np.mean(row.seconds)), 100 * row.known.mean, 100 * row.known.error)
        for rule, row in rules.items()
    }
    charts.log_axis(axes, "x", [point.x for point in points.values()], "{:g}".format)
    drawn = np.array([100 * alone, *(point.y for point in points.values())])
    drawn = drawn[np.isfinite(drawn)] if np.isfinite(drawn).any() else np.array([0.0, 100.0])
    margin = 0.08 * np.ptp(drawn) or 1.0
    axes.set(xlabel="time (s)", ylabel="accuracy, task known (%)", ylim=(drawn.min() - margin, drawn.max() + margin))
    charts.number_ticks(axes, "y")
    charts.reference(axes, "y", 100 * alone, ALONE)
    mark = {"color": COLOURS[look % len(COLOURS)], "marker": MARKERS[look % len(MARKERS)]}
    charts.scatter(axes, points, dict.fromkeys(points, mark), named=True)
    return figure


@styled
def by_task(name: str, pool: PoolMerges, tasks: list[str], limits: tuple[float, float]) -> Figure:
    """Heat map of normalised accuracies in one run, a row for each rule and a column for each task."""
    rows = _by_task(pool)
    figure = charts.figure(f"Normalised accuracy by task, {middle(name, 30)}", 1.6 + 0.24 * len(rows))
    axes = figure.add_subplot()
    labels = [_marked(rule, _warned([pool])) if rule in pool.rules else rule for rule in rows]
    texts = "{:.0f}".format if len(tasks) <= charts.ANNOTATED else None
    image = charts.heat(axes, 100 * np.array(list(rows.values())), limits, labels, tasks, texts=texts, length=26)
    charts.colour_bar(figure, image, axes, "normalised accuracy (%)")
    return figure


def _by_task(pool: PoolMerges) -> dict[str, Float[np.ndarray, " tasks"]]:
    """The normalised accuracy of each rule, and of the base, on each task."""
    rows = {rule: merged.within for rule, merged in pool.rules.items()} | {BASE: pool.base}
    return {label: pool.normalised(accuracy) for label, accuracy in rows.items()}


# -- page ------------------------------------------------------------------------------------------------------------
def _costs(pools: list[PoolMerges], rules: Mapping[str, _Row]) -> list[Table]:
    """Seconds, memory and options of a pool's rules, and the seconds of its curvature."""
    options = {
        rule: ", ".join(f"{key} {value:g}" for key, value in merged.options.items()) or ABSENT
        for rule, merged in pools[0].rules.items()
    }
    taken = {
        kind: np.array([pool.curvature_seconds[kind] for pool in pools], float) for kind in pools[0].curvature_seconds
    }
    rows = [(rule, _seconds(row.seconds), decimal(np.mean(row.memory)), options[rule]) for rule, row in rules.items()]
    return [
        Table("rules", ["rule", *HEADINGS[3:], "options"], rows),
        Table("curvature, for all rules", ["kind", "time (s)"], [(kind, _seconds(x)) for kind, x in taken.items()]),
    ]


def _across(results: MergingResults, cell: Callable[[_Row], str]) -> list[tuple[str, ...]]:
    """A row for each rule of any pool, a cell for each pool."""
    rules = {name: _rules(results, name) for name in _pools(results)}
    names = dict.fromkeys(rule for pool in rules.values() for rule in pool)
    return [(name, *(cell(pool[name]) if name in pool else ABSENT for pool in rules.values())) for name in names]


def _blocks(results: MergingResults) -> Iterator[Block]:
    """The figures, each with what to look for in it."""
    pools, warnings, first = _pools(results), _warnings(results), results.runs[0]
    several = len(results.runs) > 1
    yield Block(
        normalised(results),
        "What is left of each module's accuracy on its own task (dashed) when all are merged, mean over tasks; "
        "a rule should at least beat the base (dotted)."
        + (" See whether the order of the rules is the same in all pools." if len(pools) > 1 else "")
        + (" See whether the runs (small) lie nearer together than the rules." if several else "")
        + (" † had warnings, which stand with the numbers." if warnings else ""),
        [Table("normalised (%)", ["rule", *pools], _across(results, lambda row: row.normalised.text()), warnings)],
    )
    highest = max(np.nanmax(list(_by_task(pool).values()), initial=1.0) for pool in first.pools.values())
    for name, pool in first.pools.items():
        rows = [(rule, *map(percent, values)) for rule, values in _by_task(pool).items()]
        yield Block(
            by_task(name, pool, first.tasks, (0.0, 10 * float(np.ceil(10 * highest)))),
            "A dark cell is a task that a rule gave up for the others; a dark column is a task that no rule keeps. "
            f"Run {first.run}.",
            [Table(name, ["rule (%)", *first.tasks], rows)],
        )
    for i, (name, own) in enumerate(pools.items()):
        rules = _rules(results, name)
        alone = float(np.mean([pool.individual.mean() for pool in own]))
        yield Block(
            over_time(name, rules, alone, _warned(own), i),
            "Best are the rules at the top left. The time is of the rule alone; what the curvature took once, and what "
            "memory each rule asks for, stands with the numbers.",
            _costs(own, rules),
        )


def _tiles(results: MergingResults) -> list[Tile]:
    rows = {(rule, name): row for name in _pools(results) for rule, row in _rules(results, name).items()}
    rule, name = max(rows, key=lambda one: np.nan_to_num(rows[one].normalised.mean, nan=-np.inf))
    best, own = rows[rule, name], _pools(results)[name]
    return [
        Tile(f"highest normalised accuracy: {rule} on {name}", percent(best.normalised.mean), "%"),
        Tile("its accuracy, task known", percent(best.known.mean), "%"),
        Tile("its accuracy, all classes", percent(best.among_all.mean), "%"),
        Tile(f"{ALONE}, there", percent(float(np.mean([pool.individual.mean() for pool in own]))), "%"),
        Tile("rules", str(len({rule for rule, _ in rows}))),
        Tile("whole comparison", decimal(results.seconds, 0), "s"),
    ]


def merging_page(folder: str | os.PathLike, results: MergingResults) -> Path:
    """Writes `folder/report.html`, the page of a comparison of merge rules, and returns its path."""
    first = results.runs[0]
    rules = dict.fromkeys(rule for pool in first.pools.values() for rule in pool.rules)
    lead = (
        f"{counted(len(rules), 'merge rule')}, each on the {len(first.tasks)} modules of {', '.join(first.pools)}; "
        f"data: {results.data}; backbone: {results.backbone}. Normalised accuracy is the merged model's over that of "
        "each module alone, where the task is known."
    )
    facts = run_facts([run.seed for run in results.runs], [run.tested for run in results.runs])
    facts["curvature from"] = f"{counted(results.images, 'training image')} of each task"
    return write_page(
        folder, Page(results.name, lead, facts, _tiles(results), merging_tables(results), _blocks(results))
    )
