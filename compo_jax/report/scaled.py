"""The part of a merging report on sums of modules over their coefficient, and on negated modules."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from compo_jax.compose.rule_results import MergingResults
from compo_jax.compose.scaled_results import Scaled
from compo_jax.report import charts
from compo_jax.report.charts import Curve, styled
from compo_jax.report.page import Block
from compo_jax.report.table import Table, score
from compo_jax.report.text import decimal

TARGET, CONTROL = "the negated task", "the other tasks"
Values = Callable[[Scaled], Float[np.ndarray, " coefficients"]]
CURVES: dict[str, Values] = {
    "all modules added": lambda one: one.test.added.mean(axis=-1),
    TARGET: lambda one: one.test.target(),
    CONTROL: lambda one: one.test.control(),
}


def scaled_pools(results: MergingResults) -> dict[str, list[Scaled]]:
    """Of each pool that has them its sums and negations in every run."""
    return {
        name: [run.pools[name].scaled for run in results.runs]
        for name, pool in results.runs[0].pools.items()
        if pool.scaled is not None
    }


def scaled_tables(results: MergingResults) -> list[Table]:
    """What negation does in each pool that has it, in one table; or none."""
    rows = []

    def text(of_name: list[Scaled], values: Values, place: Callable[[Scaled], int]) -> str:
        return score(np.array([values(one)[place(one)] for one in of_name]), sum(results.runs[0].tested)).text()

    for name, of_name in scaled_pools(results).items():
        for place in (lambda one: 0, lambda one: -1, Scaled.forgetting):
            coefficients = dict.fromkeys(decimal(float(one.coefficients[place(one)])) for one in of_name)
            rows.append(
                (name, " ".join(coefficients), *(text(of_name, CURVES[what], place) for what in (TARGET, CONTROL)))
            )
    notes = [
        "Rows: the base; coefficient 1; and that which forgets most, on images left out of training, while the other "
        "tasks keep 95 % of the base's accuracy."
    ]
    headings = ("pool", "coefficient", f"{TARGET} (%)", f"{CONTROL} (%)")
    return [Table("a module taken off the base, task known", headings, rows, notes)] if rows else []


def _curve(pools: list[Scaled], values: Values) -> Curve:
    """The mean over runs."""
    return Curve(pools[0].coefficients, 100 * np.mean([values(one) for one in pools], axis=0))


@styled
def sweeps(pools: dict[str, list[Scaled]]) -> Figure:
    """Accuracy over the coefficient: left, of all modules added; right, of one negated, on its task and on the others
    (dashed)."""
    figure = charts.figure("Modules added and negated, over their coefficient", 2.9)
    left, right = charts.panels(figure, 2, "coefficient", "accuracy, task known (%)", sharey=False)
    looks = charts.looks(list(pools))
    dashed = {name: look | {"linestyle": "--"} for name, look in looks.items()}
    for axes, what, look in ((left, "all modules added", looks), (right, TARGET, looks), (right, CONTROL, dashed)):
        charts.lines(axes, {name: _curve(one, CURVES[what]) for name, one in pools.items()}, look)
    left.set_title("all modules added")
    right.set_title("one module negated")
    charts.legend(figure, looks, 2)
    return figure


def scaled_blocks(results: MergingResults) -> Iterator[Block]:
    """The figure of sums and negations with its numbers, where any pool has them."""
    pools = scaled_pools(results)
    if pools:
        yield Block(
            sweeps(pools),
            "Modules that don't meet can be added with coefficient 1: the curve on the left goes on rising to its end. "
            f"On the right a module is taken off the base: {TARGET} should fall and {CONTROL} (dashed) stay.",
            [
                Table(f"{name}: {what}", ["coefficient", *(decimal(float(c)) for c in one[0].coefficients)], [
                    ("accuracy (%)", *(decimal(float(y)) for y in _curve(one, values).y))
                ])
                for name, one in pools.items()
                for what, values in CURVES.items()
            ],
        )  # fmt: skip
