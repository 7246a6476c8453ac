"""The report of a check of curvature: its page, and two tables for the terminal."""

import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from compo_jax.report import curvature_figures as figures
from compo_jax.report.numbers import Metrics, decimal, percent, require, significant
from compo_jax.report.page import block, html_table, write_page

_NEEDED = ("name", "data", "backbone", "tasks", "images", "products", "fisher", "forecast", "spectrum", "seconds")
_PRODUCTS = ("leaf", "dimension", "error_float64", "error_float32", "difference_steps", "difference_errors")
_FISHER = ("images", "classes", "parameters", "rows")
_ROW = ("estimate", "batch", "seconds", "diagonal_cosine", "trace_ratio", "product_cosine", "form_ratio", "form_error")
_POOL = ("true", "anchors", "uniform_true", "theorem")
_ANCHOR = ("forecast", "correlation", "relative_error", "standard_error", "remainder_loss", "gram_eigenvalues",
           "best_weights", "best_forecast", "best_true")  # fmt: skip
_THEOREM = ("scale", "individual", "composed", "gap", "measured_gap")
_SPECTRUM = ("images", "dimension", "nodes", "weights", "smallest", "largest", "negative_mass")
_DIAGONAL: list[figures.Measure] = [
    ("trace_ratio", "trace / exact trace", 1.0),
    ("diagonal_cosine", "cosine with the exact diagonal", 1.0),
]
_PRODUCT: list[figures.Measure] = [
    ("form_ratio", "τᵀFτ / τᵀGτ", 1.0),
    ("product_cosine", "cosine of Fτ and Gτ", 1.0),
    ("seconds", "time (s)", None),
]


def _require_fisher(fisher: Mapping[str, Any]) -> None:
    require(fisher, _FISHER, "fisher.")
    for i, row in enumerate(fisher["rows"]):
        require(row, _ROW, f"fisher.rows.{i}.")


def _require_forecast(forecast: Mapping[str, Mapping[str, Any]]) -> None:
    if not forecast or not all(pool.get("anchors") for pool in forecast.values()):
        raise KeyError("the metrics' forecast has no pool, or a pool without anchors: the run may not have finished")
    for name, pool in forecast.items():
        require(pool, _POOL, f"forecast.{name}.")
        require(pool["theorem"], _THEOREM, f"forecast.{name}.theorem.")
        for anchor, found in pool["anchors"].items():
            require(found, _ANCHOR, f"forecast.{name}.anchors.{anchor}.")


def _fisher_cells(row: Mapping[str, Any]) -> list[str]:
    """Batch size, trace ratio, cosine of the diagonal, τᵀFτ / τᵀGτ, cosine of the product, seconds."""
    return [
        str(row["batch"]),
        *(decimal(row[key], 3) for key in ("trace_ratio", "diagonal_cosine")),
        significant(row["form_ratio"]),
        decimal(row["product_cosine"], 3),
        significant(row["seconds"]),
    ]


def _forecast_rows(forecast: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Mapping, Mapping]]:
    for pool, numbers in forecast.items():
        for anchor, found in numbers["anchors"].items():
            yield pool, anchor, numbers, found


def _best_cells(numbers: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Forecast and truth at the best weights, and truth at uniform ones."""
    return [decimal(x, 3) for x in (found["best_forecast"], found["best_true"], numbers["uniform_true"])]


def _terminal(title: str, names: Sequence[str], headings: Sequence[str]) -> Table:
    drawn = Table(title=title)
    for name in names:
        drawn.add_column(name, overflow="fold", min_width=11)
    for heading in headings:
        drawn.add_column(heading, justify="right", no_wrap=True)
    return drawn


def fisher_table(fisher: Mapping[str, Any]) -> Table:
    """The estimates F of the Fisher against the exact Gauss-Newton matrix G, for the terminal; τ are task vectors."""
    _require_fisher(fisher)
    headings = ("batch", "trace\nratio", "diagonal\ncosine", "τᵀFτ /\nτᵀGτ", "Fτ, Gτ\ncosine", "time\n(s)")
    title = f"Fisher estimates: {fisher['images']} images, {fisher['classes']} classes"
    drawn = _terminal(title, ["estimate"], headings)
    rows = fisher["rows"]
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        last = after is None or after["estimate"] != row["estimate"]
        drawn.add_row(Text(row["estimate"]), *_fisher_cells(row), end_section=last)
    return drawn


def forecast_table(forecast: Mapping[str, Mapping[str, Any]]) -> Table:
    """The forecasts of random compositions, and the best weights by the forecast, for the terminal; losses in nats."""
    _require_forecast(forecast)
    headings = ("corre-\nlation", "error\n(%)", "forecast\nat best", "true at\nbest", "true at\nuniform")
    drawn = _terminal("Forecast of the loss of compositions", ["pool", "around"], headings)
    for pool, anchor, numbers, found in _forecast_rows(forecast):
        accuracy = decimal(found["correlation"], 3), significant(100 * found["relative_error"])
        drawn.add_row(Text(pool), Text(anchor), *accuracy, *_best_cells(numbers, found))
    return drawn


def _best_table(metrics: Metrics) -> str:
    """The best weights by each forecast; the truth in bold where they do beat the uniform ones."""
    body = []
    for pool, anchor, numbers, found in _forecast_rows(metrics["forecast"]):
        forecast, best, uniform = _best_cells(numbers, found)
        better = f"<strong>{best}</strong>" if found["best_true"] < numbers["uniform_true"] else best
        weights = [decimal(w, 2) for w in found["best_weights"]]
        body.append((pool, [html.escape(anchor), forecast, better, uniform, *weights]))
    tasks = (f"weight of {task}" for task in metrics["tasks"])
    return html_table(["pool", "around", "forecast at best", "true at best", "true at uniform", *tasks], body)


def _blocks(metrics: Metrics) -> Iterable[str]:
    """The figures, each with what to look for in it."""
    products, fisher, forecast, spectrum = (metrics[key] for key in ("products", "fisher", "forecast", "spectrum"))
    pairs = zip(products["difference_steps"], products["difference_errors"], strict=True)
    yield block(
        figures.forecasts(forecast),
        "The nearer the dots are to the dashed line, the better a second-order expansion foretells the loss: compare "
        "the anchors, and see whether the composition that the forecast likes best (diamond) is as good in truth.",
        html_table(
            ["pool", "around", "correlation", "error (%)", "sampling error (nats)", "Gram eigenvalues"],
            (
                (pool, [
                    html.escape(anchor), decimal(found["correlation"], 4), significant(100 * found["relative_error"]),
                    significant(found["standard_error"]),
                    " to ".join(significant(f(found["gram_eigenvalues"])) for f in (min, max)),
                ])
                for pool, anchor, _, found in _forecast_rows(forecast)
            ),
        ),
    )  # fmt: skip
    yield block(
        figures.theorem(forecast),
        "Where the Gram matrix at the base is positive, Theorem 1 puts the composition below the mean of its single "
        "modules: look whether it is, and up to which scale the dashed line of the theorem holds, which sees only the "
        "second order at scale zero.",
        "".join(
            html_table(
                [f"{pool}: scale", "single modules", "composition", "measured gap", "gap by the theorem"],
                (
                    (f"{scale:g}", [decimal(x, 3) for x in numbers])
                    for scale, *numbers in zip(
                        *(found["theorem"][k] for k in ("scale", "individual", "composed", "measured_gap", "gap")),
                        strict=True,
                    )
                ),
            )
            for pool, found in forecast.items()
        ),
    )
    yield block(
        figures.estimates("Fisher estimates: the diagonal, by batch size", fisher["rows"], _DIAGONAL),
        "Dots around one another mean that the batch size, a matter of memory, does not change the estimate; the "
        "square of a batch's gradient is no Fisher: look how far it wanders off from the dashed line of the exact one.",
        html_table(
            ["estimate", "batch", "trace ratio", "diagonal cosine", "τᵀFτ / τᵀGτ", "cosine of Fτ, Gτ", "time (s)"],
            ((row["estimate"], _fisher_cells(row)) for row in fisher["rows"]),
        ),
    )
    yield block(
        figures.estimates("Fisher estimates: what they see of the task vectors", fisher["rows"], _PRODUCT),
        "An estimate F stands in for the exact Gauss-Newton matrix G on task vectors τ as well as it comes near the "
        "dashed line: see how much of τᵀGτ a diagonal misses, and what the better estimates cost.",
    )
    smallest, bound = spectrum["smallest"]
    yield block(
        figures.density(spectrum),
        f"The smallest eigenvalue is {significant(smallest, 4)} (to within {significant(bound)}), the largest "
        f"{significant(spectrum['largest'], 4)}, and {percent(spectrum['negative_mass'])} % of the absolute spectrum "
        "lies below zero: Theorem 1 holds for any modules only if nothing does.",
        html_table(
            ["eigenvalue (node)", "share of the dimensions"],
            (
                (significant(node, 4), [significant(weight)])
                for node, weight in zip(spectrum["nodes"], spectrum["weights"], strict=True)
            ),
        ),
    )
    yield block(
        figures.differences(products),
        f"Differences of gradients (on {products['leaf']}, {products['dimension']:,} dimensions) trade steps too long "
        "against rounding: look how far even their lowest error lies above the exact product in float64, which has no "
        "step to choose.",
        html_table(["step", "relative error"], ((significant(h), [significant(error)]) for h, error in pairs)),
    )


def curvature(folder: str | os.PathLike, metrics: Metrics) -> Path:
    """Writes `folder/report.html`, the page of a check of curvature, and returns its path.

    Args:
      metrics: name, data, backbone, tasks, images and seconds of the check, and its four parts: products, fisher,
        forecast (a dict for each pool; the last anchor of the first pool gives the key numbers) and spectrum. Losses
        in nats, ratios and errors as fractions.

    Raises KeyError where the metrics lack something.
    """
    require(metrics, _NEEDED)
    require(metrics["products"], _PRODUCTS, "products.")
    _require_fisher(metrics["fisher"])
    _require_forecast(metrics["forecast"])
    require(metrics["spectrum"], _SPECTRUM, "spectrum.")
    pool, numbers = next(iter(metrics["forecast"].items()))
    anchor, found = list(numbers["anchors"].items())[-1]
    lead = (
        f"Exact curvature of the pools {', '.join(metrics['forecast'])} on {len(metrics['tasks'])} tasks of "
        f"{metrics['data']}; backbone: {metrics['backbone']}. The forecast's numbers here are those of {pool} around "
        f"{anchor}; the table has the best weights by each forecast, in bold where they do beat uniform ones (nats)."
    )
    key_numbers = [
        ("error of a Hessian product, float64", significant(metrics["products"]["error_float64"]), ""),
        ("correlation of forecast and truth", decimal(found["correlation"], 3), ""),
        ("relative error of the forecast", significant(100 * found["relative_error"]), "%"),
        ("smallest eigenvalue at the base", significant(metrics["spectrum"]["smallest"][0], 3), ""),
        ("images", f"{metrics['images']:,}", ""),
        ("whole check", decimal(metrics["seconds"], 0), "s"),
    ]
    return write_page(folder, metrics["name"], lead, key_numbers, _best_table(metrics), _blocks(metrics))
