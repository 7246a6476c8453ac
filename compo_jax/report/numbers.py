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


def require(given: Metrics, needed: Sequence[str], where: str = "") -> None:
    """Raises KeyError for what `given`, which stands at `where` in the metrics, lacks."""
    if missing := [where + key for key in needed if key not in given]:
        raise KeyError(
            f"the metrics lack {', '.join(missing)}: they may be of another kind of run, or of a run that didn't finish"
        )


def fitting(values: Any, shape: tuple[int, ...], where: str, parts: str) -> Float[np.ndarray, "..."]:
    """Numbers of this shape, nan for None and what is not finite; ValueError where they don't have it.

    Args:
      where: the place in the metrics, for the message.
      parts: what each dimension counts, as "tasks by tasks".
    """
    try:
        array = np.array(values, float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where} in the metrics is no array of {parts} ({error}): it needs as many numbers in each of its parts, "
            "None where one is not known; the file may have been cut or put together by hand"
        ) from error
    if array.shape != shape:
        raise ValueError(
            f"{where} in the metrics has shape {array.shape} and must have {shape}, {parts}: the numbers may be of "
            "another run, or of one that didn't finish"
        )
    return np.where(np.isfinite(array), array, np.nan)


def check_runs(metrics: Metrics) -> None:
    """Raises ValueError where the metrics don't name the tasks, two at least, of every run, one at least."""
    runs, counts = metrics["runs"], [len(tasks) for tasks in metrics["tasks"]]
    if not runs or len(counts) != len(runs) or min(counts) < 2:
        raise ValueError(
            f"the metrics name {len(runs)} runs, and in `tasks` there are {len(counts)} lists, of {counts} tasks: they "
            "need a run at least, and for each the list of its tasks, two or more; perhaps a list of runs was cut"
        )


def by_run(values: Any, metrics: Metrics, where: str, axes: int) -> list[Float[np.ndarray, "..."]]:
    """For each run a number, or an array with `axes` axes of its tasks, as of `fitting`."""
    if not isinstance(values, Sequence) or len(values) != len(metrics["runs"]):
        found = f"{len(values)} entries" if isinstance(values, Sequence) else "no list"
        raise ValueError(
            f"{where} in the metrics has {found} and must have one for each of the {len(metrics['runs'])} runs: "
            "the numbers may be of other runs, or of one that didn't finish"
        )
    parts = ("numbers", "tasks", "tasks by tasks")[axes]
    return [
        fitting(value, (len(tasks),) * axes, f"{where}.{i}", parts)
        for i, (value, tasks) in enumerate(zip(values, metrics["tasks"], strict=True))
    ]


def check(metrics: Metrics) -> None:
    """Raises KeyError or ValueError where the metrics of an incremental run don't fit together."""
    require(metrics, _NEEDED)
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


def signed(fraction: float, places: int = 1) -> str:
    """A difference in points with its sign, none at zero; a dash for nan."""
    points = round(100 * fraction, places)
    return f"{'+' if points > 0 else ''}{decimal(points or 0.0, places)}"


def significant(value: float | None, digits: int = 2) -> str:
    """A number as text, in powers of ten where it is far from one; a dash for None and nan."""
    if value is None or np.isnan(value):
        return ABSENT
    if value != 0 and not 1e-4 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}·10{raised}".replace("-", "−")
    return (
        f"{value:#.{digits}g}".removesuffix(".").replace("-", "−")
        if round(abs(value)) < 10**digits
        else decimal(value, 0)
    )


def spread(values: Float[np.ndarray, " runs"], places: int = 1) -> str:
    """Mean ± sample standard deviation over runs as text, without a break; the number itself where there is one run."""
    if len(values) < 2 or np.isnan(values).any():
        return decimal(float(np.mean(values)), places)
    return f"{decimal(float(np.mean(values)), places)}\u00a0±\u00a0{decimal(float(np.std(values, ddof=1)), places)}"


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
