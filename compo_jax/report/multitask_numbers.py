"""The numbers of a multi-task comparison: checked, as arrays, as text, and as a table for the terminal."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table
from rich.text import Text

from compo_jax.report.numbers import ABSENT, Metrics, decimal, fitting, require, spread

_NEEDED = ("name", "data", "seeds", "seconds", "net", "tasks", "classes", "methods")
REFERENCE = "single-task"
HEADINGS = (
    "accuracy (%)", f"against {REFERENCE} (points)", "parameters", f"of {REFERENCE} (%)", "multiply-adds (M)",
    "time (s)",
)  # fmt: skip
Seeds = Float[np.ndarray, " seeds"]


class Method(NamedTuple):
    """What a method reached, accuracies as fractions; nan is not known."""

    accuracy: Float[np.ndarray, "seeds tasks"]
    parameters: float  # of all tasks together
    macs: float  # of one image
    seconds: Seeds

    @property
    def mean(self) -> Seeds:
        return self.accuracy.mean(1)


def sizes(metrics: Metrics) -> tuple[int, int]:
    """How many seeds and tasks there are."""
    return len(metrics["seeds"]), len(metrics["tasks"])


def read(metrics: Metrics) -> dict[str, Method]:
    """The methods as arrays; KeyError or ValueError where the metrics don't fit together."""
    require(metrics, _NEEDED)
    require(metrics["net"], ("layers", "templates", "width"), "net.")
    seeds, tasks = sizes(metrics)
    if not seeds or not tasks or not metrics["methods"]:
        raise ValueError(
            f"the metrics have {seeds} seeds, {tasks} tasks and {len(metrics['methods'])} methods, and need one of "
            "each at least: the run may not have finished"
        )
    fitting(metrics["classes"], (tasks,), "classes", "tasks")
    found = {}
    for name, method in metrics["methods"].items():
        where = f"methods.{name}."
        require(method, Method._fields, where)
        found[name] = Method(
            fitting(method["accuracy"], (seeds, tasks), where + "accuracy", "seeds by tasks"),
            *(float(fitting(method[key], (), where + key, "one number")) for key in ("parameters", "macs")),
            fitting(method["seconds"], (seeds,), where + "seconds", "seeds"),
        )
    return found


def change(name: str, found: Mapping[str, Method], reference: str = REFERENCE) -> str:
    """The difference to a method, by seed, as text in points; a dash where there is none."""
    if name == reference or reference not in found:
        return ABSENT
    text = spread(100 * (found[name].mean - found[reference].mean))
    text = text.replace("−0.0", "0.0", 1) if text.startswith("−0.0") else text
    return text if text.startswith(("−", "0.0", ABSENT)) else f"+{text}"


def cells(name: str, found: Mapping[str, Method]) -> list[str]:
    """The texts under `HEADINGS`."""
    own = found[name]
    whole = found[REFERENCE].parameters if REFERENCE in found else np.nan
    return [
        spread(100 * own.mean), change(name, found), decimal(own.parameters, 0), decimal(100 * own.parameters / whole),
        decimal(own.macs / 1e6), spread(own.seconds, 0),
    ]  # fmt: skip


def multitask_table(metrics: Metrics) -> Table:
    """Every method's accuracy, difference to single-task nets and costs, for the terminal.

    Mean ± sample standard deviation over seeds. KeyError or ValueError where the metrics don't fit together.
    """
    found = read(metrics)
    drawn = Table(
        title=Text(f"{metrics['name']}: {len(metrics['tasks'])} tasks of {metrics['data']}"),
        caption=f"accuracy in %, mean over tasks; diff.: to {REFERENCE} nets, in points; MACs: multiply-adds",
    )
    drawn.add_column("method", overflow="fold")
    for heading in ("acc.", "diff.", "parameters", "of single\n(%)", "MACs\n(M)", "time\n(s)"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for name in found:
        drawn.add_row(Text(name), *(text.replace("\u00a0±\u00a0", "\n±") for text in cells(name, found)))
    return drawn
