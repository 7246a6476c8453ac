"""The part of a merging report on what training images expect of merged models, beside what they reach."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.stats import rankdata, spearmanr

from compo_jax.compose.rule_results import Expected, MergingResults, PoolMerges, Weightings
from compo_jax.report import charts
from compo_jax.report.charts import Curve, styled
from compo_jax.report.page import Block
from compo_jax.report.table import Table
from compo_jax.report.text import ABSENT, decimal, middle, spread

RULES, WEIGHTINGS = "rules", "weightings"
PREDICTORS = {"forecast": "forecast of the loss", "loss": "the loss itself", "distance": "distance from the average"}
GROUPS = (RULES, WEIGHTINGS, "both")
DRAWS = 1000  # of models, for the error of a rank correlation
PATH_ENDS = "0 is the base, 1 the average, and the largest the sum"


def _models(pool: PoolMerges) -> dict[str, tuple[Expected, Float[np.ndarray, " models"]]]:
    """(what is expected, the mean test accuracy) of the rules that make one model, and of the weightings."""
    groups = {}
    rules = [rule for rule in pool.rules.values() if rule.expected is not None]
    if rules:
        expected = Expected(*(np.array(values) for values in zip(*(rule.expected for rule in rules), strict=True)))
        groups[RULES] = (expected, np.array([rule.within.mean() for rule in rules]))
    if pool.weightings is not None:
        groups[WEIGHTINGS] = (pool.weightings.expected, pool.weightings.within.mean(axis=1))
    return groups


def rank_correlation(values: Float[np.ndarray, " models"], accuracies: Float[np.ndarray, " models"]) -> float:
    """Spearman's, turned so that 1 is: the lower the value, the higher the accuracy; nan of fewer than three."""
    values, accuracies = _finite(values, accuracies)
    if len(values) < 3 or np.ptp(values) == 0 or np.ptp(accuracies) == 0:
        return float("nan")
    return -float(spearmanr(values, accuracies).statistic)


def _finite(values: np.ndarray, accuracies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of the models of which both are there."""
    both = np.isfinite(values) & np.isfinite(accuracies)
    return values[both], accuracies[both]


def drawn_correlations(
    values: Float[np.ndarray, " models"], accuracies: Float[np.ndarray, " models"]
) -> Float[np.ndarray, " draws"]:
    """`rank_correlation` of models drawn with replacement, the same places for equally many of them; nan where those
    that were drawn don't differ, and everywhere of fewer than four."""
    values, accuracies = _finite(values, accuracies)
    count = len(values)
    if count < 4:
        return np.full(DRAWS, np.nan)
    drawn = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    x, y = (rankdata(each[drawn], axis=1) - (count + 1) / 2 for each in (values, accuracies))
    size = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return -np.divide((x * y).sum(axis=1), size, out=np.full(DRAWS, np.nan), where=size > 0)


def _pairs(pool: PoolMerges) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """For each predictor (its values, the accuracies) of rules, weightings, and all of them."""
    groups, made = _models(pool), {}
    for predictor in PREDICTORS:
        pairs = {name: (getattr(expected, predictor), reached) for name, (expected, reached) in groups.items()}
        values, reached = (np.concatenate(parts) for parts in zip(*pairs.values(), strict=True))
        made[predictor] = pairs | {GROUPS[-1]: (values, reached)}
    return made


def _told(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    """The correlation over runs, with its error from drawing models, and their number, in brackets."""
    if not runs:
        return ABSENT
    value = np.array([rank_correlation(*run) for run in runs])
    drawn = np.mean([drawn_correlations(*run) for run in runs], axis=0)
    drawn = drawn[np.isfinite(drawn)]
    error = float(np.std(drawn, ddof=1)) if len(drawn) > 1 and np.isfinite(value).all() else None
    counts = sorted({len(_finite(*run)[0]) for run in runs})
    models = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{spread(value, 2)} ({decimal(error, 2)}; {models})"


def expected_tables(results: MergingResults) -> list[Table]:
    """One table of rank correlations, a row for each predictor in each pool; none where nothing was expected."""
    rows = []
    for name in results.runs[0].pools:
        runs = [_pairs(run.pools[name]) for run in results.runs if _models(run.pools[name])]
        for predictor, label in PREDICTORS.items():
            over = ([run[predictor][group] for run in runs if group in run[predictor]] for group in GROUPS)
            if runs:
                rows.append((f"{name}: {label}", *map(_told, over)))
    headings = ("predicts the accuracy", *(f"over {group} (error; models)" for group in GROUPS))
    note = (
        "Spearman's rank correlation of mean test accuracy, task known, with each number; 1: it puts all models in "
        f"order. In brackets its standard error, by a bootstrap over the models ({DRAWS:,} draws; none of fewer than "
        f"four), and how many they are. Losses are of {results.images} training images of each task."
    )
    return [Table("which merged model is best, without a test", headings, rows, [note])] if rows else []


@styled
def path(weightings: Mapping[str, Weightings], alone: Mapping[str, float]) -> Figure:
    """Loss and accuracy over the sum of equal weights; dashed, the loss as it is forecast, and the modules alone."""
    figure = charts.figure("From the base over the average to the sum", 2.9)
    left, right = charts.panels(figure, 2, "sum of the weights", sharey=False)
    looks = charts.looks(list(weightings))
    highest = 0.0
    for name, one in weightings.items():
        sums = one.weights.sum(axis=1)[one.even]
        loss, forecast = one.expected.loss[one.even], one.expected.forecast[one.even]
        highest = max(highest, float(np.nanmax(loss)))
        charts.lines(left, {name: Curve(sums, loss)}, looks)
        left.plot(sums, forecast, color=looks[name]["color"], linestyle="--", linewidth=1.2)
        charts.lines(right, {name: Curve(sums, 100 * one.within.mean(axis=1)[one.even])}, looks)
        charts.dashed_line(right, "y", 100 * alone[name], color=looks[name]["color"])
    left.set(ylabel="loss, training images", ylim=(0, 1.08 * highest))
    right.set_ylabel("accuracy, task known (%)")
    charts.legend(figure, looks, 3)
    return figure


@styled
def ranks(name: str, pool: PoolMerges) -> Figure:
    """Accuracy over each model's place in the order of the forecast, of the loss itself, and of the distance."""
    figure = charts.figure(f"Expected and reached, {middle(name, 30)}", 3.0)
    panels = charts.panels(figure, 3, "place (1: the lowest)", "accuracy, task known (%)")
    groups, pairs = _models(pool), _pairs(pool)
    looks = {group: look | {"linestyle": "none"} for group, look in charts.looks(list(groups)).items()}
    owner = np.concatenate([np.full(len(reached), group) for group, (_, reached) in groups.items()])
    reached = np.concatenate([reached for _, reached in groups.values()])
    for axes, predictor in zip(panels, PREDICTORS, strict=True):
        values = np.concatenate([getattr(expected, predictor) for expected, _ in groups.values()])
        place = np.empty(len(values))
        place[np.argsort(values)] = np.arange(1, len(values) + 1)
        for group, look in looks.items():
            axes.plot(place[owner == group], 100 * reached[owner == group], **{"markersize": 4} | charts.EDGE | look)
        axes.set_title(f"{predictor}, ρ = {decimal(rank_correlation(*pairs[predictor][GROUPS[-1]]), 2)}")
        axes.grid()
    charts.legend(figure, looks, 2)
    return figure


def _facts(pool: PoolMerges) -> list[Table]:
    """Every model with what was expected of it."""
    rows = [
        (rule, *(ABSENT if merged.expected is None else decimal(float(x), 3) for x in merged.expected or [None] * 3),
         decimal(100 * float(merged.within.mean())))
        for rule, merged in pool.rules.items()
    ]  # fmt: skip
    headings = ("model", *PREDICTORS.values(), "accuracy (%)")
    tables = [Table(RULES, headings, rows)]
    if (one := pool.weightings) is not None:
        weighted = [
            (", ".join(decimal(w, 2) for w in weights), *(decimal(float(x), 3) for x in expected),
             decimal(100 * float(within.mean())))
            for weights, expected, within in zip(one.weights, zip(*one.expected, strict=True), one.within, strict=True)
        ]  # fmt: skip
        tables.append(Table(WEIGHTINGS, headings, weighted))
    return tables


def expected_blocks(results: MergingResults) -> Iterator[Block]:
    """The path of equal weights, and each pool's models by what was expected of them; of the first run."""
    first = results.runs[0]
    weightings = {name: pool.weightings for name, pool in first.pools.items() if pool.weightings is not None}
    if weightings:
        yield Block(
            path(weightings, {name: float(first.pools[name].individual.mean()) for name in weightings}),
            f"All modules with one weight ({PATH_ENDS}). Left, the loss and, dashed, its forecast to second order "
            "around the average: where they part, modules have gone too far for it. Right, what is reached; dashed, "
            f"each module alone. Run {first.run}.",
        )
    for name in weightings:
        pool = first.pools[name]
        yield Block(
            ranks(name, pool),
            "Merge rules and weightings that no rule chose, in the order of what training images tell of them. A good "
            "predictor lets the points fall from the left; the loss itself is the most that a forecast of it can do. "
            f"Run {first.run}.",
            _facts(pool),
        )
