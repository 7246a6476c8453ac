"""The page of multi-task training with learned orders."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from compo_jax.report import multitask_figures as figures
from compo_jax.report.multitask_numbers import HEADINGS, REFERENCE, Method, cells, change, read, sizes
from compo_jax.report.numbers import Metrics, decimal, fitting, require, significant, spread
from compo_jax.report.previous import block, html_table, write_page
from compo_jax.report.route_blocks import route_blocks


def _methods(metrics: Metrics, found: Mapping[str, Method]) -> Iterator[str]:
    ordered = next((name for name in found if name.startswith("ordered")), None)
    null = (ordered or "").replace("ordered", "random")
    against = [name for name in (null, "hard-sharing-bn") if name in found and ordered is not None]
    told = "; ".join(f"less {name}: {change(ordered, found, name)} points" for name in against)
    yield block(
        figures.methods(
            {name: own.mean for name, own in found.items()},
            {name: own.parameters for name, own in found.items()},
            REFERENCE if REFERENCE in found else None,
        ),
        f"Mean over tasks; dashed, the {REFERENCE} nets. See whether the learned order beats random routes through as "
        "many templates, and sharing with a batch norm for each task: what these reach is not the order's merit. Small "
        "marks are seeds; they share what is hard about a task, so a difference counts by seed."
        + (f" {ordered} {told}." if told else ""),
    )


def _gap(metrics: Metrics, found: Mapping[str, Method]) -> Iterator[str]:
    gaps = {}
    for name, given in (metrics.get("gap") or {}).items():
        require(given, tuple(figures.GAP), f"gap.{name}.")
        points = [fitting(given[key], sizes(metrics), f"gap.{name}.{key}", "seeds by tasks") for key in figures.GAP]
        gaps[name] = np.stack([values.mean(1) for values in points])
    if gaps:
        yield block(
            figures.gap(gaps),
            "Mean over tasks; thin, single seeds. The fall from the first to the second point is the price of a hard "
            "route; what comes back at the third was batch statistics alone, and the rest needs training.",
            html_table(
                ["accuracy (%)", "soft", "argmax", "statistics again", "trained on"],
                ((name, [spread(100 * values) for values in points]) for name, points in gaps.items()),
            ),
        )


def _by_task(metrics: Metrics, found: Mapping[str, Method]) -> Iterator[str]:
    tasks = metrics["tasks"]
    means = {name: own.accuracy.mean(0) for name, own in found.items()}
    shown = [name for name in means if name != REFERENCE] or list(means)
    base = means[REFERENCE] if REFERENCE in means and shown != [REFERENCE] else None
    values = np.stack([means[name] - (0 if base is None else base) for name in shown], 1)
    yield block(
        figures.by_task(values, shown, tasks, base, REFERENCE),
        "Mean over seeds. See which tasks are hard for every method."
        if base is None
        else "Blue is gained and red is lost by sharing, mean over seeds. See whether a loss in the mean is a little "
        "of every task or the ruin of one, and which tasks gain whatever the method.",
        html_table(
            ["accuracy (%)", "classes", *found],
            (
                (task, [str(metrics["classes"][i]), *(spread(100 * own.accuracy[:, i]) for own in found.values())])
                for i, task in enumerate(tasks)
            ),
        ),
    )


def _curves(metrics: Metrics, found: Mapping[str, Method]) -> Iterator[str]:
    curves, given = {}, metrics.get("curves") or {}
    for name, own in given.items():
        require(own, ("step", *figures.CURVES, "phases", "steps"), f"curves.{name}.")
        curves[name] = {
            key: fitting(own[key], (len(own["step"]),), f"curves.{name}.{key}", "records")
            for key in ("step", *figures.CURVES)
        }
        fitting(own["phases"], (2,), f"curves.{name}.phases", "two parts of the steps")
    if curves:
        yield block(
            figures.curves(curves, *({name: own[key] for name, own in given.items()} for key in ("phases", "steps"))),
            "H(a) / log M is 1 where a route takes all templates alike and 0 where it takes one; 1 − H(ā) / log M is 0 "
            "where all templates are used alike and 1 where one does all the work. Routes should have decided before "
            "they are fixed, without the second number rising. First seed.",
        )


def _forecast(metrics: Metrics) -> Iterator[str]:
    """The figure of the bridge to curvature."""
    if not (given := metrics.get("bridge")):
        return
    require(given, ("method", "task", "layer", "chosen", "amounts", "true", "forecast", "loss", "error"), "bridge.")
    count = len(given["amounts"])
    amounts, error = (fitting(given[key], (count,), f"bridge.{key}", "amounts") for key in ("amounts", "error"))
    shape = (len(given["true"]), count)
    true, forecast = (
        fitting(given[key], shape, f"bridge.{key}", "templates by amounts") for key in ("true", "forecast")
    )
    others = [m for m in range(len(true)) if m != given["chosen"]]
    if not others or not count:
        return
    others.sort(key=lambda m: np.nan_to_num(true[m, -1], nan=np.inf))
    shown = list(dict.fromkeys((others[0], others[len(others) // 2], others[-1])))
    errors = ", ".join(
        f"{significant(100 * e)}\u00a0% at ε = {significant(a, 1)}" for a, e in zip(amounts, error, strict=True)
    )
    yield block(
        figures.bridge(amounts, true, forecast, float(given["loss"]), error, shown),
        f"{given['method']}, task {given['task']}, layer {given['layer']}, from template {given['chosen']} by ε "
        "towards another: those with the least, the middle and the greatest loss at the largest ε. The forecast is a "
        "quadratic from the curvature at the trained route, and holds nearby only. "
        f"Its median error is {errors} of the true "
        "change: a forecast of no change at all would have 100\u00a0%.",
        html_table(
            ["loss, true / forecast (nats)", *(f"ε = {significant(a, 1)}" for a in amounts)],
            (
                (f"template {m}", [f"{significant(t, 3)} / {significant(f, 3)}"
                                   for t, f in zip(true[m], forecast[m], strict=True)])
                for m in range(len(true))
            ),
        ),
    )  # fmt: skip


def _key_numbers(metrics: Metrics, found: Mapping[str, Method]) -> list[tuple[str, str, str]]:
    seeds, tasks = sizes(metrics)
    shared = [name for name in found if name != REFERENCE] or list(found)
    best = max(shared, key=lambda name: np.nan_to_num(np.mean(found[name].mean), nan=-np.inf))
    numbers = [(f"best with parts shared: {best}", spread(100 * found[best].mean), "%")]
    if REFERENCE in found and best != REFERENCE:
        reference = found[REFERENCE]
        gained = (found[best].accuracy.mean(0) > reference.accuracy.mean(0)).sum()
        numbers += [
            (f"against {REFERENCE} nets", change(best, found), "points"),
            ("tasks on which it beats them", f"{gained} of {tasks}", ""),
            ("its parameters, of theirs", decimal(100 * found[best].parameters / reference.parameters), "%"),
        ]
    return [
        *numbers,
        (f"methods, {seeds} seed{'s' * (seeds != 1)}", str(len(found)), ""),
        ("whole job", decimal(metrics["seconds"], 0), "s"),
    ]


def _blocks(metrics: Metrics, found: Mapping[str, Method]) -> Iterator[str]:
    """The figures, each with what to look for in it; neighbours are of like height."""
    for part in (_methods, _gap, _by_task, _curves):
        yield from part(metrics, found)
    yield from route_blocks(metrics)
    yield from _forecast(metrics)


def multitask(folder: str | os.PathLike, metrics: Metrics) -> Path:
    """Writes `folder/report.html`, the page of a multi-task comparison, and returns its path.

    Args:
      metrics: name, data, seeds, seconds, net (layers, templates, width), tasks, classes, and methods: of each
        accuracy (by seed, of each task), parameters, macs, seconds (by seed); `single-task` is the reference. Where
        known gap, curves, routes, removal and bridge of the methods with learned routes; the first of `routes` is
        analysed. Fractions; None is not known.

    Raises KeyError or ValueError where the metrics don't fit together.
    """
    found = read(metrics)
    seeds, tasks = sizes(metrics)
    net = metrics["net"]
    several = f"; numbers are mean ± standard deviation over {seeds} seeds, differences by seed" if seeds > 1 else ""
    lead = (
        f"{tasks} task{'s' * (tasks != 1)} of {metrics['data']}, {sum(metrics['classes'])} classes in all, learned by "
        f"one network of {net['layers']} layers and width {net['width']}, each layer one of {net['templates']} shared "
        f"templates unless a method's name says otherwise, against {', '.join(found)}. Accuracies in %, the task "
        f"known, mean over tasks{several}."
    )
    card = html_table(["method", *HEADINGS], ((name, cells(name, found)) for name in found))
    return write_page(folder, metrics["name"], lead, _key_numbers(metrics, found), card, _blocks(metrics, found))
