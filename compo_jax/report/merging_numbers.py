"""The numbers of a comparison of merge rules: checked, as arrays, as text, and as a table for the terminal."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table
from rich.text import Text

from compo_jax.report.numbers import Metrics, by_run, check_runs, fitting, require, spread

_NEEDED = ("name", "data", "backbone", "runs", "tasks", "images", "seconds", "pools")
_POOL = ("individual", "base", "curvature_seconds", "rules")
_RULE = ("within", "incremental", "normalised", "seconds", "told", "options", "memory")
CURVATURE = ("diagonal", "kronecker", "landscape")
HEADINGS = ("task known (%)", "all classes (%)", "normalised (%)", "time (s)", "memory (× base)")
DAGGER = " †"  # at the name of a rule that told something
ALONE, BASE = "each module alone", "base, no module"
Runs = Float[np.ndarray, " runs"]
Cells = list[tuple[str, bool]]  # text, and whether it is the best of its column


class Reached(NamedTuple):
    """What a rule, the modules alone or the base reached: numbers of each run, accuracies as fractions."""

    known: Runs  # mean over tasks, the prediction among the task's own classes
    among_all: Runs
    normalised: Runs
    seconds: Runs
    memory: Runs  # of the first run alone, in multiples of the base
    by_task: Float[np.ndarray, " tasks"]  # normalised, of the first run
    told: Sequence[Sequence[str]] = ()


class Pool(NamedTuple):
    """What is known of one pool: each module alone, the base, the rules by name; and the cost of their curvature."""

    alone: Reached
    base: Reached
    rules: dict[str, Reached]
    seconds: dict[str, Runs]  # that the curvature took, by kind

    def told(self) -> list[str]:
        """The rules that had a warning."""
        return [name for name, rule in self.rules.items() if any(rule.told)]


def _ratio(values: np.ndarray, own: np.ndarray) -> np.ndarray:
    """`values / own`, nan where a module alone gets nothing right."""
    return np.divide(values, own, out=np.full_like(values, np.nan), where=own > 0)


def read(metrics: Metrics) -> dict[str, Pool]:
    """The pools as arrays; KeyError or ValueError where the metrics don't fit together."""
    require(metrics, _NEEDED)
    check_runs(metrics)
    if not metrics["pools"] or not all(pool.get("rules") for pool in metrics["pools"].values()):
        raise ValueError("the metrics have no pool, or a pool without rules: the run may not have finished")
    runs = len(metrics["runs"])
    unknown = np.full(runs, np.nan)
    pools = {}
    for name, pool in metrics["pools"].items():
        require(pool, _POOL, f"pools.{name}.")
        own, base = (by_run(pool[key], metrics, f"pools.{name}.{key}", 1) for key in ("individual", "base"))
        ratios = [_ratio(b, a) for b, a in zip(base, own, strict=True)]
        alone = Reached(np.array([a.mean() for a in own]), unknown, np.ones(runs), unknown, unknown[:1], own[0])
        below = Reached(
            np.array([b.mean() for b in base]), unknown, np.array([r.mean() for r in ratios]), unknown, unknown[:1],
            ratios[0],
        )  # fmt: skip
        rules = {}
        for rule, row in pool["rules"].items():
            where = f"pools.{name}.rules.{rule}."
            require(row, _RULE, where)
            known, among_all = (by_run(row[key], metrics, where + key, 1) for key in ("within", "incremental"))
            normalised, seconds = (np.array(by_run(row[key], metrics, where + key, 0)) for key in _RULE[2:4])
            if len(row["told"]) != runs:
                raise ValueError(
                    f"{where}told in the metrics has {len(row['told'])} lists of warnings for {runs} runs: it needs "
                    "one for each run, empty where nothing was told"
                )
            memory = fitting([row["memory"]], (1,), where + "memory", "one number")
            means = (np.array([x.mean() for x in values]) for values in (known, among_all))
            rules[rule] = Reached(*means, normalised, seconds, memory, _ratio(known[0], own[0]), row["told"])
        if len(pool["curvature_seconds"]) != runs:
            raise ValueError(
                f"pools.{name}.curvature_seconds in the metrics has {len(pool['curvature_seconds'])} entries for "
                f"{runs} runs: it needs one for each run; perhaps a list of runs was cut"
            )
        for i, seconds in enumerate(pool["curvature_seconds"]):
            require(seconds, CURVATURE, f"pools.{name}.curvature_seconds.{i}.")
        spent = {
            kind: fitting([s[kind] for s in pool["curvature_seconds"]], (runs,), f"pools.{name}.{kind}", "runs")
            for kind in CURVATURE
        }
        pools[name] = Pool(alone, below, rules, spent)
    return pools


def seconds_text(values: Runs) -> str:
    """As `spread`, with two significant digits of the mean."""
    mean = float(np.mean(values))
    return spread(values, int(np.clip(1 - np.floor(np.log10(mean)), 0, 4)) if mean > 0 else 1)


def _column(values: Sequence[Runs], text: Callable[[Runs], str], best: Callable) -> Cells:
    """Texts, and which are best; all that read the same mean as the best."""
    texts = [text(one) for one in values]
    means = np.array([float(np.mean(one)) for one in values])
    known = np.isfinite(means)
    if known.sum() < 2:
        return [(one, False) for one in texts]
    winner = texts[int(np.flatnonzero(means == best(means[known]))[0])].split("\u00a0")[0]
    return [(one, bool(one.split("\u00a0")[0] == winner)) for one in texts]


def cells(pool: Pool) -> list[tuple[str, Cells]]:
    """(name, cells under `HEADINGS`) of the modules alone, the base, and each rule; only rules can be best."""
    shown = [(lambda x: spread(100 * x), np.max)] * 3 + [(seconds_text, np.min), (spread, np.min)]
    rules = list(pool.rules.values())
    columns = [_column([rule[i] for rule in rules], text, best) for i, (text, best) in enumerate(shown)]
    known = pool.told()
    return [
        *((name, [(text(one[i]), False) for i, (text, _) in enumerate(shown)])
          for name, one in ((ALONE, pool.alone), (BASE, pool.base))),
        *((name + DAGGER * (name in known), list(cells))
          for name, cells in zip(pool.rules, zip(*columns, strict=True), strict=True)),
    ]  # fmt: skip


def merging_table(metrics: Metrics) -> Table:
    """The rules of each pool for the terminal, the best of each column in bold; † had warnings.

    Mean ± sample standard deviation over runs. KeyError or ValueError where the metrics don't fit together.
    """
    pools = read(metrics)
    drawn = Table(
        title=Text(f"{metrics['name']}: {len(metrics['tasks'][0])} modules of {metrics['data']}"),
        caption="accuracies in %, time in s, memory × the base's",
    )
    drawn.add_column("rule", overflow="fold", min_width=19)
    for heading in ("task\nknown", "all\nclasses", "norma-\nlised", "time", "memory"):
        drawn.add_column(heading, justify="right")
    for name, pool in pools.items():
        drawn.add_row(Text(name, style="bold"))
        for row, found in cells(pool):
            texts = [(text.replace("\u00a0±\u00a0", " ±"), "bold" if best else "") for text, best in found]
            texts[3] = (texts[3][0].split()[0], texts[3][1])  # a terminal has no room for the deviation of the time
            drawn.add_row(Text(f"  {row}"), *(Text(*text) for text in texts))
        drawn.add_section()
    return drawn
