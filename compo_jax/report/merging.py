"""The report of a comparison of merge rules."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from compo_jax.compose.rule_results import MergingResults, PoolMerges
from compo_jax.report import charts
from compo_jax.report.charts import INK, Point, styled
from compo_jax.report.expected import expected_blocks, expected_tables
from compo_jax.report.page import Block, Page, Tile, write_page
from compo_jax.report.scaled import scaled_blocks, scaled_tables
from compo_jax.report.table import BOLD, Score, Table, run_facts, score, score_column, standard_error
from compo_jax.report.text import ABSENT, counted, decimal, middle, percent, spread

HEADINGS = ("task known (%)", "all classes (%)", "normalised (%)", "time (s)", "memory (× base)")
ALONE, JOINT, BASE = "each module alone", "one module of all tasks", "base, no module"
DAGGER = " †"  # at the name of a rule that had a warning
Runs = Float[np.ndarray, " runs"]


# -- numbers ---------------------------------------------------------------------------------------------------------
class _Rule(NamedTuple):
    """What a rule reached on a pool, over runs."""

    within: Score
    incremental: Score
    normalised: Score
    seconds: Runs
    memory: float


def _pools(results: MergingResults) -> dict[str, list[PoolMerges]]:
    """Of each name its pool in every run."""
    return {name: [run.pools[name] for run in results.runs] for name in results.runs[0].pools}


def _scores(results: MergingResults, pools: list[PoolMerges], accuracies: list[np.ndarray]) -> tuple[Score, Score]:
    """The mean over tasks of each run's accuracies, and of the normalised ones."""
    mean = score(np.array([accuracy.mean() for accuracy in accuracies]), sum(results.runs[0].tested))
    ratios = np.array([pool.normalised(accuracy).mean() for pool, accuracy in zip(pools, accuracies, strict=True)])
    # that of a single run is the accuracy's error, in units of the accuracy that the modules have alone
    error = standard_error(ratios) if len(pools) > 1 else mean.error / float(pools[0].individual.mean())
    return mean, Score(ratios, error)


def _rules(results: MergingResults, pools: list[PoolMerges]) -> dict[str, _Rule]:
    rules = {}
    for name in pools[0].rules:
        merged = [pool.rules[name] for pool in pools]
        within, normalised = _scores(results, pools, [one.within for one in merged])
        incremental, _ = _scores(results, pools, [one.incremental for one in merged])
        seconds = np.array([one.seconds for one in merged], float)
        memory = float(np.mean(np.array([one.memory for one in merged], float)))
        rules[name] = _Rule(within, incremental, normalised, seconds, memory)
    return rules


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
        rules, warned = _rules(results, pools), _warned(pools)
        columns = [score_column([getattr(rule, key) for rule in rules.values()]) for key in _Rule._fields[:3]]
        costs = [(_seconds(rule.seconds), decimal(rule.memory)) for rule in rules.values()]
        alone, _ = _scores(results, pools, [pool.individual for pool in pools])
        base, ratio = _scores(results, pools, [pool.base for pool in pools])
        joint = [pool.joint for pool in pools if pool.joint is not None]
        scores = _scores(results, pools, joint) if len(joint) == len(pools) else None
        rows = [
            (ALONE, alone.text(), ABSENT, "100.0", ABSENT, ABSENT),
            *([(JOINT, scores[0].text(), ABSENT, scores[1].text(), ABSENT, ABSENT)] if scores else []),
            (BASE, base.text(), ABSENT, ratio.text(), ABSENT, ABSENT),
            *(
                (_marked(rule, warned), *cells)
                for rule, *cells in zip(rules, *columns, *zip(*costs, strict=True), strict=True)
            ),
        ]
        notes = [BOLD, *(["† had warnings."] if warned else [])]
        title = f"{name}: {counted(len(results.runs[0].tasks), 'module')} of {results.data}"
        tables.append(Table(title, ("rule", *HEADINGS), rows, notes))
    return [*tables, *expected_tables(results), *scaled_tables(results)]


# -- figures ---------------------------------------------------------------------------------------------------------
def _marked(rule: str, warned: list[str]) -> str:
    return rule + DAGGER * (rule in warned)


@styled
def normalised(results: MergingResults) -> Figure:
    """Normalised accuracy of each rule, the best on top; dashed, each module alone; dotted, the base, by pool."""
    pools, means = _pools(results), {}
    warned = [rule for of_name in pools.values() for rule in _warned(of_name)]
    scores = {
        name: {_marked(rule, warned): row.normalised for rule, row in _rules(results, of_name).items()}
        for name, of_name in pools.items()
    }
    for rule, one in (item for by_rule in scores.values() for item in by_rule.items()):
        means.setdefault(rule, []).append(one.mean)
    order = sorted(means, key=lambda rule: -np.nan_to_num(np.mean(means[rule]), nan=-np.inf))
    figure = charts.figure("Normalised accuracy of the rules", 1.7 + len(order) * (0.16 + 0.09 * len(pools)))
    axes = figure.add_subplot(xlabel="normalised accuracy (%)")
    charts.dashed_line(axes, "x", 100.0)
    looks = {name: look | {"linestyle": "none"} for name, look in charts.looks(list(pools)).items()}
    for name, of_name in pools.items():
        _, base = _scores(results, of_name, [pool.base for pool in of_name])
        charts.dashed_line(axes, "x", 100 * base.mean, color=looks[name]["color"], linestyle=":", linewidth=1.4)
    charts.dots(axes, order, {name: charts.percent_dots(scores[name], looks[name]) for name in pools})
    ends = {ALONE: {"color": INK, "linestyle": "--"}, BASE: {"color": INK, "linestyle": ":"}}
    charts.legend(figure, {name: look | charts.EDGE for name, look in looks.items()} | ends, 2)
    return figure


@styled
def over_time(name: str, rules: Mapping[str, _Rule], alone: float, warned: list[str], look: charts.Look) -> Figure:
    """Accuracy of each rule over its seconds, named at the right; dashed, the modules alone. `look` is the pool's."""
    figure = charts.figure(f"Accuracy over the rule's time, {middle(name, 30)}", max(2.6, 1 + 0.165 * len(rules)))
    axes = figure.add_subplot()
    points = {
        _marked(rule, warned): Point(float(np.mean(row.seconds)), 100 * row.within.mean, 100 * row.within.error)
        for rule, row in rules.items()
    }
    charts.log_axis(axes, "x", [point.x for point in points.values()], "{:g}".format)
    axes.set(xlabel="time (s)", ylabel="accuracy, task known (%)")
    axes.margins(y=0.08)
    charts.number_ticks(axes, "y")
    charts.dashed_line(axes, "y", 100 * alone, ALONE)
    charts.scatter(axes, points, dict.fromkeys(points, look), named=True)
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


@styled
def likeness(cosines: Mapping[str, np.ndarray], tasks: list[str]) -> Figure:
    """Heat maps of the cosines between the modules' deltas, one for each pool."""
    figure = charts.figure("Likeness of the modules", 1.9 + 0.2 * len(tasks))
    panels = figure.subplots(1, len(cosines), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, cosines.items(), strict=True):
        texts = "{:.2f}".format if len(tasks) * len(cosines) <= charts.ANNOTATED else None
        rows = tasks if axes is panels[0] else ()
        image = charts.heat(axes, values, (-1.0, 1.0), rows, tasks, colours="RdBu", texts=texts, length=16)
        axes.set_title(middle(name, 24))
    charts.colour_bar(figure, image, list(panels), "cosine")
    return figure


def _by_task(pool: PoolMerges) -> dict[str, Float[np.ndarray, " tasks"]]:
    """The normalised accuracy of each rule, and of the base, on each task."""
    rows = {rule: merged.within for rule, merged in pool.rules.items()} | {BASE: pool.base}
    return {label: pool.normalised(accuracy) for label, accuracy in rows.items()}


# -- page ------------------------------------------------------------------------------------------------------------
def _costs(pools: list[PoolMerges], rules: Mapping[str, _Rule]) -> list[Table]:
    """Seconds, memory and options of a pool's rules, and the seconds of its curvature."""
    rows = [(rule, _seconds(row.seconds), decimal(row.memory), _options(pools, rule)) for rule, row in rules.items()]
    kinds = [
        (kind, _seconds(np.array([pool.curvature_seconds[kind] for pool in pools], float)))
        for kind in pools[0].curvature_seconds
    ]
    curvature = [Table("curvature, for all rules", ["kind", "time (s)"], kinds)] if kinds else []
    return [Table("rules", ["rule", *HEADINGS[3:], "options"], rows), *curvature]


def _options(pools: list[PoolMerges], rule: str) -> str:
    """Of a rule; where the runs differ, as where images choose a coefficient, all values in their order."""
    of_runs = [pool.rules[rule].options for pool in pools]
    values = {key: dict.fromkeys(options[key] for options in of_runs) for key in of_runs[0]}
    return ", ".join(f"{key} {' / '.join(different)}" for key, different in values.items()) or ABSENT


def _normalised_table(results: MergingResults) -> Table:
    """A row for each rule of any pool, a cell for each pool, and all warnings."""
    rules = {name: _rules(results, pools) for name, pools in _pools(results).items()}
    rows = [
        (rule, *(of_pool[rule].normalised.text() if rule in of_pool else ABSENT for of_pool in rules.values()))
        for rule in dict.fromkeys(rule for of_pool in rules.values() for rule in of_pool)
    ]
    return Table("normalised (%)", ["rule", *rules], rows, _warnings(results))


def _blocks(results: MergingResults) -> Iterator[Block]:
    """The figures, each with what to look for in it."""
    pools, first = _pools(results), results.runs[0]
    yield Block(
        normalised(results),
        "What is left of each module's accuracy on its own task (dashed) when all are merged, mean over tasks; "
        "a rule should at least beat the base (dotted)."
        + (" See whether the order of the rules is the same in all pools." if len(pools) > 1 else "")
        + (" See whether the runs (small) lie nearer together than the rules." if len(results.runs) > 1 else "")
        + (" † had warnings, which stand with the numbers." if _warnings(results) else ""),
        [_normalised_table(results)],
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
    yield Block(
        likeness({name: pool.cosines for name, pool in first.pools.items()}, first.tasks),
        "Cosines between the modules' deltas. Modules at right angles (white) add without meeting; of those that are "
        f"alike (blue) the mean keeps both; red ones go against one another. Run {first.run}.",
        [
            Table(name, ["cosine", *first.tasks], [
                (task, *(decimal(float(x), 2) for x in row))
                for task, row in zip(first.tasks, pool.cosines, strict=True)
            ])
            for name, pool in first.pools.items()
        ],
    )  # fmt: skip
    for (name, of_name), look in zip(pools.items(), charts.looks(list(pools)).values(), strict=True):
        rules = _rules(results, of_name)
        alone = float(np.mean([pool.individual.mean() for pool in of_name]))
        yield Block(
            over_time(name, rules, alone, _warned(of_name), look),
            "Best are the rules at the top left. The time is of the rule alone; what the curvature took once, and what "
            "memory each rule asks for, stands with the numbers.",
            _costs(of_name, rules),
        )
    yield from expected_blocks(results)
    yield from scaled_blocks(results)


def _tiles(results: MergingResults) -> list[Tile]:
    rows = {
        (rule, name): row for name, pools in _pools(results).items() for rule, row in _rules(results, pools).items()
    }
    rule, name = max(rows, key=lambda one: np.nan_to_num(rows[one].normalised.mean, nan=-np.inf))
    best, alone = rows[rule, name], np.mean([pool.individual.mean() for pool in _pools(results)[name]])
    return [
        Tile(f"highest normalised accuracy: {rule} on {name}", percent(best.normalised.mean), "%"),
        Tile("its accuracy, task known", percent(best.within.mean), "%"),
        Tile("its accuracy, all classes", percent(best.incremental.mean), "%"),
        Tile(f"{ALONE}, there", percent(float(alone)), "%"),
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
    if any(pool.scaled is None for pool in first.pools.values()):  # modules of the linearised model want none
        facts["curvature from"] = f"{counted(results.images, 'training image')} of each task"
    return write_page(
        folder, Page(results.name, lead, facts, _tiles(results), merging_tables(results), _blocks(results))
    )
