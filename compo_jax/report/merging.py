"""The page of a comparison of merge rules."""

import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from compo_jax.report import merging_figures as figures
from compo_jax.report.merging_numbers import BASE, HEADINGS, Pool, Reached, cells, read, seconds_text
from compo_jax.report.numbers import ABSENT, Metrics, decimal, percent, spread
from compo_jax.report.page import block, html_table, write_page


def _notes(pools: Mapping[str, Pool], runs: Sequence[str]) -> str:
    """What rules told, as HTML: each message once for a rule and a pool, with its runs."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for name, pool in pools.items():
        for rule, reached in pool.rules.items():
            for run, messages in zip(runs, reached.told, strict=True):
                for message in dict.fromkeys(messages):
                    said.setdefault((rule, name, message), []).append(run)
    lines = (f"† {rule} on {pool} (run {', '.join(own)}): {message}" for (rule, pool, message), own in said.items())
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _across(pools: Mapping[str, Pool], cell: Callable[[Reached], str]) -> list[tuple[str, list[str]]]:
    """A row for each rule of any pool, a cell for each pool."""
    rules = dict.fromkeys(rule for pool in pools.values() for rule in pool.rules)
    return [
        (rule, [cell(pool.rules[rule]) if rule in pool.rules else ABSENT for pool in pools.values()]) for rule in rules
    ]


def _costs(found: Pool, options: Mapping[str, Mapping]) -> str:
    """Seconds, memory and options of a pool's rules, and the seconds of its curvature, as HTML."""
    rows = [
        (
            rule,
            [
                seconds_text(reached.seconds),
                spread(reached.memory),
                html.escape(", ".join(f"{key} {value}" for key, value in options[rule].items())) or ABSENT,
            ],
        )
        for rule, reached in found.rules.items()
    ]
    taken = [(kind, [seconds_text(values)]) for kind, values in found.seconds.items()]
    return html_table(["rule", "time (s)", "memory (× base)", "options"], rows) + html_table(
        ["curvature, for all rules", "time (s)"], taken
    )


def _blocks(metrics: Metrics, pools: Mapping[str, Pool]) -> Iterator[str]:
    """The figures, each with what to look for in it."""
    told = {rule for pool in pools.values() for rule in pool.told()}
    notes = _notes(pools, metrics["runs"])
    yield block(
        figures.normalised(
            {name: {rule: r.normalised for rule, r in pool.rules.items()} for name, pool in pools.items()},
            {name: pool.base.normalised for name, pool in pools.items()},
            told,
        ),
        "What is left of each module's accuracy on its own task (dashed) when all are merged, mean over tasks; "
        "a rule should at least beat the base (dotted). See whether the order of the rules is the same in all pools, "
        "and whether the runs lie nearer together than the rules."
        + (" † had warnings, which stand with the numbers." if notes else ""),
        html_table(["rule", *pools], _across(pools, lambda r: spread(100 * r.normalised))) + notes,
    )
    tasks = metrics["tasks"][0]
    tables = {name: {**pool.rules, BASE: pool.base} for name, pool in pools.items()}
    values = {name: np.array([reached.by_task for reached in rows.values()]) for name, rows in tables.items()}
    known = [100 * x[np.isfinite(x)] for x in values.values()]
    low, high = (min(x.min(initial=90) for x in known), max(x.max(initial=100) for x in known))
    for name, rows in tables.items():
        labels = [figures.marked(rule, pools[name].told()) for rule in rows]
        yield block(
            figures.by_task(name, values[name], labels, tasks, (low, high)),
            f"A dark cell is a task that a rule gave up for the others; a dark column is a task that no rule keeps. "
            f"Run {metrics['runs'][0]}.",
            html_table(
                ["rule (%)", *tasks],
                zip(rows, ([percent(x) for x in row] for row in values[name]), strict=True),
            ),
        )
    for i, (name, pool) in enumerate(pools.items()):
        yield block(
            figures.over_time(
                name,
                {rule: (np.mean(r.seconds), np.mean(r.known)) for rule, r in pool.rules.items()},
                float(np.mean(pool.alone.known)),
                pool.told(),
                i,
            ),
            "Best are the rules at the top left. The time is of the rule alone; what the curvature took once, and what "
            "memory each rule asks for, stands with the numbers.",
            _costs(pool, {rule: row["options"] for rule, row in metrics["pools"][name]["rules"].items()}),
        )


def merging(folder: str | os.PathLike, metrics: Metrics) -> Path:
    """Writes `folder/report.html`, the page of a comparison of merge rules, and returns its path.

    Args:
      metrics: name, data, backbone, runs, tasks (of each run), images (of a task, for its curvature), seconds, and
        pools: of each its modules' accuracy alone (individual), the base's, curvature_seconds, and rules, each with
        accuracies where the task is known (within) and not (incremental), normalised accuracy, seconds, warnings
        (told), options and memory (multiples of the base, or None). Accuracies are fractions; None is not known.

    Raises KeyError or ValueError where the metrics don't fit together.
    """
    pools = read(metrics)
    runs, tasks = len(metrics["runs"]), len(metrics["tasks"][0])
    scores = {(rule, name): np.mean(r.normalised) for name, pool in pools.items() for rule, r in pool.rules.items()}
    rule, name = max(scores, key=lambda one: np.nan_to_num(scores[one], nan=-np.inf))
    best = pools[name].rules[rule]
    count = len({rule for rule, _ in scores})
    lead = (
        f"{count} merge rule{'s' * (count != 1)}, each on the {tasks} modules of {', '.join(pools)}; data: "
        f"{metrics['data']}; backbone: {metrics['backbone']}. Normalised accuracy is the merged model's over that of "
        "each module alone, where the task is known. Bold is the best rule of a column"
        + (f"; numbers are mean ± standard deviation over {runs} runs." if runs > 1 else ".")
        + (" † had warnings: see the first figure's numbers." if any(pool.told() for pool in pools.values()) else "")
    )
    key_numbers = [
        (f"best normalised accuracy: {rule} on {name}", percent(float(scores[rule, name])), "%"),
        ("its accuracy, task known", percent(float(np.mean(best.known))), "%"),
        ("its accuracy, all classes", percent(float(np.mean(best.among_all))), "%"),
        ("each module alone, there", percent(float(np.mean(pools[name].alone.known))), "%"),
        (f"rules, on {tasks} modules a pool, {runs} run{'s' * (runs != 1)}", str(count), ""),
        ("images a task for curvature", f"{metrics['images']:,}", ""),
        ("whole comparison", decimal(metrics["seconds"], 0), "s"),
    ]
    body = [
        html_table(
            [pool, *HEADINGS],
            [(row, [f"<strong>{text}</strong>" if best else text for text, best in cells])
             for row, cells in cells(found)],
        )
        for pool, found in pools.items()
    ]  # fmt: skip
    return write_page(folder, metrics["name"], lead, key_numbers, "".join(body), _blocks(metrics, pools))
