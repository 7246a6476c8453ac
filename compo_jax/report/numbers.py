"""The numbers of an incremental run: checked, in rows, as text, and as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table
from rich.text import Text

Metrics = Mapping[str, Any]
ABSENT = "–"
_NEEDED = ("name", "data", "backbone", "tasks", "classes", "method", "methods", "accuracy_matrix")


class Row(NamedTuple):
    """What one method reached; accuracies and forgetting in [0, 1], None where there is no such number.

    Attributes:
      name: of the method.
      final_accuracy: mean over tasks after the last one, the prediction among all classes.
      final_forgetting: mean over tasks of the best accuracy before the end, less the one at the end.
      task_incremental_accuracy: as `final_accuracy`, the prediction among the task's own classes.
      seconds: of training.
    """

    name: str
    final_accuracy: float | None
    final_forgetting: float | None
    task_incremental_accuracy: float | None
    seconds: float | None


HEADINGS = ("method", "final accuracy (%)", "forgetting (points)", "task-incremental (%)", "time (s)")


def full_matrix(matrix: Sequence[Sequence[float | None] | None]) -> Float[np.ndarray, "tasks tasks"]:
    """A stored accuracy matrix as an array, nan where it holds None (one entry or a whole row)."""
    return np.array([[None] * len(matrix) if row is None else row for row in matrix], float)


def check(metrics: Metrics) -> None:
    """Raises KeyError or ValueError where the metrics of an incremental run don't fit together."""
    if missing := [key for key in _NEEDED if key not in metrics]:
        raise KeyError(
            f"the metrics lack {', '.join(missing)}: they may be of another kind of run, or of a run that didn't finish"
        )
    if metrics["method"] not in metrics["methods"]:
        raise ValueError(
            f"the main method {metrics['method']!r} is not among the methods ({', '.join(metrics['methods'])}): "
            "`method` must be one of the names in `methods`"
        )
    count = len(metrics["tasks"])
    for name, matrix in [
        (metrics["method"], metrics["accuracy_matrix"]),
        *((name, values["accuracy_matrix"]) for name, values in metrics["methods"].items()),
    ]:
        lengths = {len(row) for row in matrix if row is not None}
        if len(matrix) != count or lengths - {count}:
            raise ValueError(
                f"the accuracy matrix of {name!r} has {len(matrix)} rows of {sorted(lengths)} numbers and the run has "
                f"{count} tasks: it needs a row and a column for each task, None where a task was not learned yet"
            )


def rows(metrics: Metrics) -> list[Row]:
    """One row for each method, in their order, then the frozen features."""
    made = [Row(name, *(values.get(key) for key in Row._fields[1:])) for name, values in metrics["methods"].items()]
    frozen = metrics.get("frozen_features_accuracy")
    within = metrics.get("frozen_features_task_incremental_accuracy")
    return made if frozen is None else [*made, Row("frozen features", frozen, None, within, None)]


def decimal(value: float | None, places: int = 1) -> str:
    """A number as text, a dash for None and nan."""
    if value is None or np.isnan(value):
        return ABSENT
    return f"{value:,.{places}f}".replace("-", "−")


def percent(fraction: float | None) -> str:
    """A fraction in % with one decimal, without the sign; a dash for None and nan."""
    return decimal(None if fraction is None else 100 * fraction)


def cells(made: Sequence[Row]) -> list[list[tuple[str, bool]]]:
    """The numbers of the rows as (text, whether best of its column); ties in the text are all best."""
    columns = []
    for key in Row._fields[1:]:
        places = 0 if key == "seconds" else 1
        scale = 1 if key == "seconds" else 100
        values = np.array([getattr(row, key) for row in made], float)
        shown = np.round(scale * values, places)
        known = shown[np.isfinite(shown)]
        best = None if len(known) < 2 else known.max() if key.endswith("accuracy") else known.min()
        columns.append([(decimal(float(x), places), bool(x == best)) for x in shown])
    return [list(row) for row in zip(*columns, strict=True)]


def table(metrics: Metrics) -> Table:
    """The methods of a run and the frozen features for the terminal, the best of each column in bold.

    FA is the final accuracy and FF the final forgetting; see `Row`.
    """
    check(metrics)
    made = rows(metrics)
    drawn = Table(title=Text(f"{metrics['name']}: {len(metrics['tasks'])} tasks of {metrics['data']}"))
    drawn.add_column("method", overflow="fold")
    for heading in ("FA (%)", "FF (points)", "task-incr. (%)", "time (s)"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for row, numbers in zip(made, cells(made), strict=True):
        drawn.add_row(Text(row.name), *(Text(text, style="bold" if best else "") for text, best in numbers))
    return drawn
