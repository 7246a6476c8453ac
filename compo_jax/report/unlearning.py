"""The report of specialising and unlearning: its page, and a table for the terminal."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table
from rich.text import Text

from compo_jax.report import unlearning_figures as figures
from compo_jax.report.numbers import Metrics, by_run, check_runs, decimal, require, signed, spread
from compo_jax.report.page import block, html_table, write_page

_NEEDED = ("name", "data", "backbone", "runs", "tasks", "seconds", "methods")
_OPERATIONS = ("specialise", "unlearn", "subtract")
_HEADINGS = (
    "all modules (%)", *(f"{operation}: {part}" for operation in _OPERATIONS for part in ("target", "control")),
    "no module (%)",
)  # fmt: skip
Runs = Float[np.ndarray, " runs"]


class _Method(NamedTuple):
    """Means over tasks of each run, as fractions, and what the heat maps show."""

    all: Runs
    frozen: Runs
    target: dict[str, Runs]  # of each operation, the accuracy on the task that was asked for
    control: dict[str, Runs]  # … on the other tasks
    changes: dict[str, Float[np.ndarray, "tasks tasks"]]  # of the first run, from all modules


def _off_diagonal(matrix: Float[np.ndarray, "tasks tasks"]) -> np.ndarray:
    return matrix[~np.eye(len(matrix), dtype=bool)]


def _read(metrics: Metrics) -> dict[str, _Method]:
    """The methods as arrays; KeyError or ValueError where the metrics don't fit together."""
    require(metrics, _NEEDED)
    check_runs(metrics)
    if not metrics["methods"]:
        raise ValueError("the metrics have no method: the run may not have finished")
    found = {}
    for name, method in metrics["methods"].items():
        where = f"methods.{name}."
        require(method, ("frozen", "all", *_OPERATIONS), where)
        whole, frozen = (by_run(method[key], metrics, where + key, 1) for key in ("all", "frozen"))
        matrices = {key: by_run(method[key], metrics, where + key, 2) for key in _OPERATIONS}
        found[name] = _Method(
            *(np.array([values.mean() for values in runs]) for runs in (whole, frozen)),
            {key: np.array([np.diag(matrix).mean() for matrix in runs]) for key, runs in matrices.items()},
            {key: np.array([_off_diagonal(matrix).mean() for matrix in runs]) for key, runs in matrices.items()},
            {key: runs[0] - whole[0] for key, runs in matrices.items()},
        )
    return found


def _cells(method: _Method) -> list[str]:
    """The texts under `_HEADINGS`."""
    parts = [spread(100 * part[key]) for key in _OPERATIONS for part in (method.target, method.control)]
    return [spread(100 * method.all), *parts, spread(100 * method.frozen)]


def unlearning_table(metrics: Metrics) -> Table:
    """Every method's accuracies (%) for the terminal: on the task asked for (target) and on the others (control).

    Mean ± sample standard deviation over runs. KeyError or ValueError where the metrics don't fit together.
    """
    found = _read(metrics)
    counts = "/".join(str(count) for count in dict.fromkeys(len(tasks) for tasks in metrics["tasks"]))
    drawn = Table(
        title=Text(f"{metrics['name']}: {counts} tasks of {metrics['data']}, accuracy (%)"),
        caption="spec.: its module alone; unl.: all others; subt.: less its share; t: the task itself; c: other tasks",
    )
    drawn.add_column("method", overflow="fold")
    for heading in ("all", *(f"{key}\n{part}" for key in ("spec.", "unl.", "subt.") for part in "tc"), "none"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for name, method in found.items():
        drawn.add_row(Text(name), *(text.replace("\u00a0±\u00a0", "\n±") for text in _cells(method)))
    return drawn


def _blocks(metrics: Metrics, found: dict[str, _Method]) -> Iterator[str]:
    """The figures, each with what to look for in it."""
    yield block(
        figures.changes(
            {
                name: {"all": {"all": method.all}}
                | {key: {"target": method.target[key], "control": method.control[key]} for key in _OPERATIONS}
                for name, method in found.items()
            },
            {name: method.frozen for name, method in found.items()},
        ),
        "Specialise keeps a task's module alone, unlearn all but it, subtract takes its share off besides. To forget "
        "one task and nothing else, the round mark should go left and the square stay at the bar; to specialise, the "
        "round one should stay and the square go left. See for which methods both move together.",
    )
    tasks, maps = metrics["tasks"][0], {name: {key: method.changes[key] for key in ("unlearn", "specialise")}
                                        for name, method in found.items()}  # fmt: skip
    largest = max(100 * np.nanmax(np.abs(change), initial=0) for pair in maps.values() for change in pair.values())
    limit = max(10.0, 10 * float(np.ceil(largest / 10)))
    for name, pair in maps.items():
        yield block(
            figures.change_maps(name, pair, tasks, limit),
            "Red is lost, blue gained, in points against all modules. Unlearning one task alone is a red diagonal on "
            f"white; specialising is a white or blue diagonal on red. Run {metrics['runs'][0]}.",
            "".join(
                html_table(
                    [f"{key} (points)", *tasks],
                    zip(tasks, ([signed(x) for x in row] for row in change), strict=True),
                )
                for key, change in pair.items()
            ),
        )


def unlearning(folder: str | os.PathLike, metrics: Metrics) -> Path:
    """Writes `folder/report.html`, the page of specialising and unlearning, and returns its path.

    Args:
      metrics: name, data, backbone, runs, tasks (of each run), seconds, and methods: of each, for every run, the
        accuracies on all tasks without a module (frozen) and with all, and three matrices (specialise, unlearn,
        subtract) with a row for the task asked for and a column for the task tested. Fractions; None is not known.

    Raises KeyError or ValueError where the metrics don't fit together.
    """
    found = _read(metrics)
    runs, tasks = len(metrics["runs"]), len(metrics["tasks"][0])
    several = f"; numbers are mean ± standard deviation over {runs} runs" if runs > 1 else ""
    lead = (
        f"The pools of {', '.join(found)} after {tasks} tasks of {metrics['data']}, each task asked for in turn: "
        f"specialise in it, unlearn it, subtract it; backbone: {metrics['backbone']}. Accuracies in %, the prediction "
        f"among all classes: target is on the task asked for, control on the others{several}."
    )
    lost = {name: method.control["unlearn"] - method.all for name, method in found.items()}
    gone = {name: method.target["unlearn"] - method.all for name, method in found.items()}
    forgets = min(gone, key=lambda name: np.nan_to_num(np.mean(gone[name]), nan=np.inf))
    keeps = max(lost, key=lambda name: np.nan_to_num(np.mean(lost[name]), nan=-np.inf))
    key_numbers = [
        (f"most of its task unlearned: {forgets}", signed(float(np.mean(gone[forgets]))), "points"),
        ("… and of the other tasks", signed(float(np.mean(lost[forgets]))), "points"),
        (f"others kept best when unlearning: {keeps}", signed(float(np.mean(lost[keeps]))), "points"),
        ("… and of its task", signed(float(np.mean(gone[keeps]))), "points"),
        (f"methods, on {tasks} tasks, {runs} run{'s' * (runs != 1)}", str(len(found)), ""),
        ("whole job", decimal(metrics["seconds"], 0), "s"),
    ]
    card = html_table(["method", *_HEADINGS], ((name, _cells(method)) for name, method in found.items()))
    return write_page(folder, metrics["name"], lead, key_numbers, card, _blocks(metrics, found))
