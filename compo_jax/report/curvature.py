"""The report of a check of curvature."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from compo_jax.curvature.check_results import CurvatureResults, Expansion, FisherCheck, ForecastCheck
from compo_jax.report import charts
from compo_jax.report.charts import COLOURS, INK, Curve, styled
from compo_jax.report.page import Block, Page, Tile, write_page
from compo_jax.report.table import Cell, Table
from compo_jax.report.text import decimal, percent, short, significant

POSITIVE, NEGATIVE = COLOURS[0], COLOURS[5]
THEORY = {"color": INK, "linestyle": "--"}
#: Of an estimate: the field, its heading, the value of the exact matrix, and the number as text.
MEASURES = (
    ("trace_ratio", "trace / exact trace", 1.0, lambda x: decimal(x, 3)),
    ("diagonal_cosine", "cosine of the diagonals", 1.0, lambda x: decimal(x, 3)),
    ("form_ratio", "τᵀFτ / τᵀGτ", 1.0, significant),
    ("product_cosine", "cosine of Fτ and Gτ", 1.0, lambda x: decimal(x, 3)),
    ("seconds", "time (s)", None, significant),
)
Pools = Mapping[str, ForecastCheck]


# -- tables ----------------------------------------------------------------------------------------------------------
def fisher_table(fisher: FisherCheck) -> Table:
    """The estimates F of the Fisher against the exact Gauss-Newton matrix G; τ are task vectors."""
    return Table(
        f"Fisher estimates: {fisher.images} images, {fisher.classes} classes",
        ["estimate", "batch", *(heading for _, heading, _, _ in MEASURES)],
        [(row.estimate, str(row.batch), *(text(getattr(row, key)) for key, _, _, text in MEASURES))
         for row in fisher.rows],
    )  # fmt: skip


def _expansions(forecast: Pools) -> Iterator[tuple[str, str, ForecastCheck, Expansion]]:
    for pool, check in forecast.items():
        for anchor, expansion in check.anchors.items():
            yield pool, anchor, check, expansion


def forecast_table(forecast: Pools) -> Table:
    """The forecasts of random compositions, and the best weights by the forecast; losses in nats.

    The truth at the best weights is bold where it is below that of uniform ones by more than two standard errors.
    """
    rows = []
    for pool, anchor, check, expansion in _expansions(forecast):
        clear = check.uniform_true - expansion.best_true > 2 * expansion.gain_error
        best, at_best, uniform = (
            decimal(x, 3) for x in (expansion.best_forecast, expansion.best_true, check.uniform_true)
        )
        accuracy = decimal(expansion.correlation, 3), significant(100 * expansion.relative_error)
        rows.append((pool, anchor, *accuracy, best, Cell(at_best, clear), uniform))
    return Table(
        "Forecast of the loss of compositions (nats)",
        ("pool", "around", "correlation", "error (%)", "forecast at best", "true at best", "true at uniform"),
        rows,
        ["Bold: truly better than uniform weights, by more than two standard errors."],
    )


# -- figures ---------------------------------------------------------------------------------------------------------
@styled
def differences(results: CurvatureResults) -> Figure:
    """The error of central differences over their step size, and of exact products as horizontal lines."""
    figure = charts.figure("Error of Hessian products, against the dense Hessian", 3.6)
    axes, products = figure.add_subplot(), results.products
    looks = {
        "central differences of the gradient, float64": {"color": COLOURS[1], "marker": "o"},
        "exact product, float64": {"color": COLOURS[0]},
        "exact product, float32": {"color": COLOURS[2], "linestyle": "--"},
    }
    by_step, *exact = looks
    charts.lines(axes, {by_step: Curve(products.difference_steps, products.difference_errors)}, looks)
    for name, error in zip(exact, (products.error_float64, products.error_float32), strict=True):
        charts.dashed_line(axes, "y", error, significant(error), **{"linestyle": "-"} | looks[name])
    for axis in "xy":
        charts.log_axis(axes, axis)
    axes.set(xlabel="step size along a direction of length one", ylabel="relative error")
    axes.grid(axis="y")
    charts.legend(figure, looks, 1, 60)
    return figure


@styled
def estimates(title: str, fisher: FisherCheck, keys: tuple[str, ...]) -> Figure:
    """A panel for each measure, a line for each estimate, a dot for each batch size, larger for larger batches.

    An axis is logarithmic where its values are positive and span more than a factor of 30.
    """
    rows = fisher.rows
    names, sizes = list(dict.fromkeys(row.estimate for row in rows)), sorted({row.batch for row in rows})
    figure = charts.figure(title, 1.5 + 0.26 * len(names))
    shades = mpl.colormaps["viridis"](np.linspace(0.95, 0.3, len(sizes)))
    looks = {  # coinciding dots are rings around one another
        f"batch of {size}": {"marker": "o", "color": shade, "markersize": 4 + 2.2 * i, "zorder": 4 - i / len(sizes)}
        for i, (size, shade) in enumerate(zip(sizes, shades, strict=True))
    }
    measures = {key: (label, ideal) for key, label, ideal, _ in MEASURES}
    for axes, key in zip(charts.panels(figure, len(keys), rows=1, sharex=False), keys, strict=True):
        label, ideal = measures[key]
        for size, look in zip(sizes, looks.values(), strict=True):
            some = [(getattr(row, key), names.index(row.estimate)) for row in rows if row.batch == size]
            axes.plot(*np.array(some, float).T, **{"linestyle": "none"} | charts.EDGE | look)
        values = np.array([getattr(row, key) for row in rows] + ([] if ideal is None else [ideal]), float)
        values = values[np.isfinite(values)]
        if len(values) and values.min() > 0 and values.max() > 30 * values.min():
            charts.log_axis(axes, "x")
        else:
            charts.number_ticks(axes, "x", 2 if len(keys) > 2 else 4)
        if ideal is not None:
            charts.dashed_line(axes, "x", ideal)
        axes.margins(x=0.12)
        axes.set_xlabel(label)
        axes.grid(axis="both")
        charts.name_ticks(axes, "y", names, length=24)
        axes.set_ylim(len(names) - 0.4, -0.6)
    charts.legend(figure, {name: look | charts.EDGE | {"linestyle": "none"} for name, look in looks.items()}, 4)
    return figure


@styled
def forecasts(forecast: Pools) -> Figure:
    """True loss over forecast loss: a row of panels for each pool, a column for each anchor of the expansion.

    Both axes of a panel have the same limits. A diamond is the composition that the forecast holds for the best.
    """
    anchors = list(dict.fromkeys(anchor for check in forecast.values() for anchor in check.anchors))
    figure = charts.figure("Loss of random compositions: forecast and truth", 0.9 + 2.75 * len(forecast))
    figure.get_layout_engine().set(h_pad=0.09)  # a title is not to touch the label above it
    looks = {
        "forecast = truth": THEORY,
        "a random composition": {"color": COLOURS[0], "marker": "o", "markersize": 3.5, "alpha": 0.75,
                                 "markeredgewidth": 0, "linestyle": "none"},
        "best by the forecast": {"color": COLOURS[1], "marker": "D", "linestyle": "none"} | charts.EDGE,
    }  # fmt: skip
    panels = figure.subplots(len(forecast), len(anchors), squeeze=False)
    for line, (pool, check) in zip(panels, forecast.items(), strict=True):
        for axes, anchor in zip(line, anchors, strict=True):
            if anchor not in check.anchors:
                axes.set_axis_off()
                continue
            expansion = check.anchors[anchor]
            x, y = [*expansion.forecast, expansion.best_forecast], [*check.true, expansion.best_true]
            drawn = np.array(x + y)
            low, high = (np.nanmin(drawn), np.nanmax(drawn)) if np.isfinite(drawn).any() else (0.0, 1.0)
            margin = 0.05 * (high - low) or 0.5
            limits = low - margin, high + margin
            diagonal, dots, best = looks.values()
            axes.plot(limits, limits, linewidth=1, **diagonal)
            axes.plot(x[:-1], y[:-1], **dots)
            axes.plot(x[-1:], y[-1:], markersize=6, **best)
            error = significant(100 * expansion.relative_error)
            title = f"around {short(anchor, 28)}\ncorrelation {decimal(expansion.correlation, 3)}, error {error} %"
            axes.set_title(title, fontsize=8)
            axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel="forecast loss (nats)")
            for axis in "xy":
                charts.number_ticks(axes, axis, 4)
            axes.grid()
        line[0].set_ylabel(f"{short(pool, 24)}\ntrue loss (nats)")
    charts.legend(figure, looks, 3)
    return figure


@styled
def theorem(forecast: Pools) -> Figure:
    """Theorem 1 of Porrello et al. (2025), a row for each pool, as its modules are scaled from nothing.

    On the left the losses and what the theorem makes of the single ones, on the right the gap between them, under the
    smallest eigenvalue of the Gram matrix of the first anchor, which is to be the base.
    """
    figure = charts.figure("One composition, and the mean of its single modules", 1.1 + 2.2 * len(forecast))
    looks = {
        "single modules, mean loss": {"color": NEGATIVE, "marker": "s"},
        "the composition's loss": {"color": COLOURS[0], "marker": "o"},
        "by the theorem": THEORY,
        "measured gap": {"color": COLOURS[2], "marker": "D"},
    }
    single, whole, theory, measured = looks
    panels = figure.subplots(len(forecast), 2, squeeze=False)
    for (left, right), (pool, check) in zip(panels, forecast.items(), strict=True):
        scale, individual, composed, gap, measured_gap = check.theorem
        charts.lines(left, {
            single: Curve(scale, individual), whole: Curve(scale, composed), theory: Curve(scale, individual - gap),
        }, looks)  # fmt: skip
        charts.lines(right, {measured: Curve(scale, measured_gap), theory: Curve(scale, gap)}, looks)
        lowest = min(next(iter(check.anchors.values())).gram_eigenvalues)
        left.set(title=short(pool, 30), ylabel="loss (nats)", xlabel="scale of the modules")
        right.set(title=f"smallest Gram eigenvalue {significant(lowest)}", ylabel="gap (nats)")
        right.set_xlabel("scale of the modules")
        for axes in (left, right):
            axes.grid()
    charts.legend(figure, looks, 2)
    return figure


@styled
def spectrum(results: CurvatureResults) -> Figure:
    """The nodes of the quadrature as stems: eigenvalue across, share of the dimensions up; the negative in orange."""
    figure = charts.figure("Spectrum of the Hessian at the base", 3.2)
    axes, check = figure.add_subplot(), results.spectrum
    drawn = np.isfinite(check.nodes) & (check.weights > 0)
    nodes, weights = check.nodes[drawn], check.weights[drawn]
    charts.log_axis(axes, "y")
    floor = 10.0 ** math.floor(math.log10(weights.min()) - 0.2) if len(weights) else 1e-8
    for part, colour, label in ((nodes < 0, NEGATIVE, "below zero"), (nodes >= 0, POSITIVE, "above zero")):
        axes.vlines(nodes[part], floor, weights[part], color=colour, linewidth=1.5)
        axes.plot(nodes[part], weights[part], "o", color=colour, markersize=5, label=label)
    widest = np.abs(nodes).max(initial=1e-12)
    axes.set_xscale("symlog", linthresh=10.0 ** (math.floor(math.log10(widest)) - 1))
    axes.xaxis.set_major_formatter(lambda x, _: significant(x, 1))
    charts.dashed_line(axes, "x", 0.0)
    axes.set(xlabel="eigenvalue", ylabel="share of the dimensions", ylim=(floor, 3))
    axes.grid(axis="y")
    axes.legend(loc="upper right")
    return figure


# -- page ------------------------------------------------------------------------------------------------------------
def _theorem_table(pool: str, check: ForecastCheck) -> Table:
    headings = ("scale", "single modules", "composition", "measured gap", "gap by the theorem")
    scale, individual, composed, gap, measured = check.theorem
    rows = zip(scale, individual, composed, measured, gap, strict=True)
    return Table(pool, headings, [(f"{x:g}", *(decimal(y, 3) for y in numbers)) for x, *numbers in rows])


def _expansion_table(forecast: Pools) -> Table:
    headings = ("pool", "around", "correlation", "error (%)", "sampling error (nats)", "Gram eigenvalues")
    return Table("expansions", headings, [
        (pool, anchor, decimal(expansion.correlation, 4), significant(100 * expansion.relative_error),
         significant(expansion.standard_error),
         " to ".join(significant(float(f(expansion.gram_eigenvalues))) for f in (min, max)))
        for pool, anchor, _, expansion in _expansions(forecast)
    ])  # fmt: skip


def _weight_table(results: CurvatureResults) -> Table:
    rows = [
        (pool, anchor, *(decimal(w, 2) for w in expansion.best_weights))
        for pool, anchor, _, expansion in _expansions(results.forecast)
    ]
    return Table("Best weights by the forecast", ["pool", "around", *results.tasks], rows)


def _blocks(results: CurvatureResults) -> Iterator[Block]:
    """The figures, each with what to look for in it."""
    products, fisher, forecast, check = results.products, results.fisher, results.forecast, results.spectrum
    yield Block(
        forecasts(forecast),
        "The nearer the dots are to the dashed line, the better a second-order expansion foretells the loss: compare "
        "the anchors, and see whether the composition that the forecast likes best (diamond) is as good in truth.",
        [_expansion_table(forecast), _weight_table(results)],
    )
    yield Block(
        theorem(forecast),
        "Where the Gram matrix at the base is positive, Theorem 1 puts the composition below the mean of its single "
        "modules: look whether it is, and up to which scale the dashed line of the theorem holds, which sees only the "
        "second order at scale zero.",
        [_theorem_table(pool, one) for pool, one in forecast.items()],
    )
    yield Block(
        estimates("Fisher estimates: the diagonal, by batch size", fisher, ("trace_ratio", "diagonal_cosine")),
        "Dots around one another mean that the batch size, a matter of memory, does not change the estimate; the "
        "square of a batch's gradient is no Fisher: look how far it wanders off from the dashed line of the exact one.",
        [fisher_table(fisher)],
    )
    yield Block(
        estimates(
            "Fisher estimates: what they see of the task vectors", fisher, ("form_ratio", "product_cosine", "seconds")
        ),
        "An estimate F stands in for the exact Gauss-Newton matrix G on task vectors τ as well as it comes near the "
        "dashed line: see how much of τᵀGτ a diagonal misses, and what the better estimates cost.",
    )  # fmt: skip
    nodes = [(significant(x, 4), significant(w)) for x, w in zip(check.nodes, check.weights, strict=True)]
    yield Block(
        spectrum(results),
        f"The smallest eigenvalue is {significant(check.smallest, 4)} (to within {significant(check.bound)}), the "
        f"largest {significant(check.largest, 4)}, and {percent(check.negative_mass)} % of the absolute spectrum lies "
        "below zero: Theorem 1 holds for any modules only if nothing does.",
        [Table("spectrum", ["eigenvalue (node)", "share of the dimensions"], nodes)],
    )
    errors = zip(products.difference_steps, products.difference_errors, strict=True)
    yield Block(
        differences(results),
        f"Differences of gradients (on {products.leaf}, {products.dimension:,} dimensions) trade steps too long "
        "against rounding: look how far even their lowest error lies above the exact product in float64, which has no "
        "step to choose.",
        [Table("differences", ["step", "relative error"], [tuple(map(significant, pair)) for pair in errors])],
    )


def curvature_page(folder: str | os.PathLike, results: CurvatureResults) -> Path:
    """Writes `folder/report.html`, the page of a check of curvature, and returns its path.

    The first pool around its last anchor gives the tiles.
    """
    pool, check = next(iter(results.forecast.items()))
    anchor, expansion = list(check.anchors.items())[-1]
    lead = (
        f"Exact curvature of the pools {', '.join(results.forecast)} on {len(results.tasks)} tasks of {results.data}; "
        f"backbone: {results.backbone}. The table has the forecast's accuracy, and the best weights by each forecast."
    )
    facts = {
        "seed": str(results.seed),
        "losses": f"means over {results.images:,} test images, in nats",
        "error bars": "the sampling error of a forecast, from the number of images, stands with the first figure",
    }
    tiles = [
        Tile("error of a Hessian product, float64", significant(results.products.error_float64)),
        Tile(f"correlation of forecast and truth: {pool} around {anchor}", decimal(expansion.correlation, 3)),
        Tile("relative error of that forecast", significant(100 * expansion.relative_error), "%"),
        Tile("smallest eigenvalue at the base", significant(results.spectrum.smallest, 3)),
        Tile("whole check", decimal(results.seconds, 0), "s"),
    ]
    page = Page(results.name, lead, facts, tiles, [forecast_table(results.forecast)], _blocks(results))
    return write_page(folder, page)
