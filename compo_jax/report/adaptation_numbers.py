"""The numbers of adaptation by order: checked, as arrays, as text, and as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table
from rich.text import Text

from compo_jax.report.adaptation_figures import GROUPS
from compo_jax.report.modular_numbers import Paired, check_modular, paired, paired_text, templates_of
from compo_jax.report.numbers import Metrics, fitting, require, spread

_NEEDED = ("domains", "targets", "classes", "made", "baseline", "sources", "source_accuracy")
DAGGER = " †"  # at the name of a method that uses the target's labels
Cells = Float[np.ndarray, "seeds targets"]


class Method(NamedTuple):
    """What one method reached, and what it adapts (a key of `GROUPS`)."""

    accuracy: Cells  # fractions
    objective: Cells  # nats
    group: str


class Routes(NamedTuple):
    """Of one target and the first seed."""

    sources: dict[str, Float[np.ndarray, "layers templates"]]
    adapted: dict[str, Float[np.ndarray, "layers templates"]]


class Found(NamedTuple):
    """The methods by group; of each domain its accuracy as a source of each target, and on its own images."""

    methods: dict[str, Method]
    baseline: str
    sources: Float[np.ndarray, "domains targets"]
    own: Float[np.ndarray, " domains"]
    routes: dict[str, Routes]

    def against(self, name: str) -> Paired:
        """The difference to the baseline, over seeds and targets."""
        return paired(self.methods[name].accuracy.ravel(), self.methods[self.baseline].accuracy.ravel())

    def correlation(self, groups: Sequence[str]) -> Cells:
        """Spearman's rank correlation of the objective and the accuracy over the methods of these groups.

        nan for fewer than three methods that are known, and where all are the same.
        """
        from scipy.stats import spearmanr

        methods = [method for method in self.methods.values() if method.group in groups]
        seeds, targets = self.methods[self.baseline].accuracy.shape
        found = np.full((seeds, targets), np.nan)
        for place in np.ndindex(seeds, targets):
            pairs = np.array([(m.objective[place], m.accuracy[place]) for m in methods]).reshape(-1, 2)
            pairs = pairs[np.isfinite(pairs).all(1)]
            if len(pairs) > 2 and (np.ptp(pairs, axis=0) > 0).all():
                found[place] = spearmanr(*pairs.T).statistic
        return found


def mean_known(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """The mean of what is known, nan where nothing is."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(axis), known.sum(axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _by_domain(metrics: Metrics, key: str) -> Float[np.ndarray, "seeds targets domains"]:
    """Fractions, nan for a domain that isn't a source."""
    seeds, targets, domains = (metrics[name] for name in ("seeds", "targets", "domains"))
    try:
        values = [[[cell.get(domain) for domain in domains] for cell in row] for row in metrics[key]]
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{key} in the metrics must hold, for each seed and target, the accuracy of each source by name ({error})"
        ) from error
    return fitting(values, (len(seeds), len(targets), len(domains)), key, "seeds by targets by domains")


def _read_routes(metrics: Metrics) -> dict[str, Routes]:
    found: dict[str, Routes] = {}
    routes: Mapping[str, Any] = metrics.get("routes") or {}
    for target, parts in routes.items():
        where = f"routes.{target}."
        require(parts, ("sources", "adapted"), where)
        layers, templates = metrics["net"]["layers"], metrics.get("templates") or metrics["net"]["templates"]
        found[target] = Routes(
            {name: np.eye(templates)[templates_of(route, layers, templates, f"{where}sources.{name}")]
             for name, route in parts["sources"].items()},
            {name: fitting(route, (layers, templates), f"{where}adapted.{name}", "layers by templates")
             for name, route in parts["adapted"].items()},
        )  # fmt: skip
    return found


def read(metrics: Metrics) -> Found:
    """The methods as arrays; KeyError or ValueError where the metrics don't fit together."""
    check_modular(metrics, _NEEDED)
    targets = metrics["targets"]
    if not targets or set(targets) - set(metrics["domains"]):
        raise ValueError(
            f"the targets in the metrics ({', '.join(targets)}) must be one or more of the domains "
            f"({', '.join(metrics['domains'])}): the names may be of another run"
        )
    require(metrics["methods"], (metrics["baseline"],), "methods.")
    shape = len(metrics["seeds"]), len(targets)
    methods = {}
    for name, method in metrics["methods"].items():
        where = f"methods.{name}."
        require(method, ("accuracy", "objective", "group"), where)
        if method["group"] not in GROUPS:
            raise ValueError(
                f"{where}group in the metrics is {method['group']!r} and must be one of {', '.join(GROUPS)}: "
                "it says what the method adapts"
            )
        values = (fitting(method[key], shape, where + key, "seeds by targets") for key in ("accuracy", "objective"))
        methods[name] = Method(*values, method["group"])
    order = list(GROUPS)
    methods = dict(sorted(methods.items(), key=lambda item: order.index(item[1].group)))
    sources, own = (_by_domain(metrics, key) for key in ("sources", "source_accuracy"))
    return Found(methods, metrics["baseline"], mean_known(sources, 0).T, mean_known(own, (0, 1)), _read_routes(metrics))


def cells(method: Method) -> list[str]:
    """Accuracy (%) on each target, and the mean over them where there are several."""
    several = [method.accuracy.mean(1)] if method.accuracy.shape[1] > 1 else []
    return [spread(100 * values) for values in (*method.accuracy.T, *several)]


def objective_text(method: Method) -> str:
    """The objective (nats), mean over targets."""
    return spread(method.objective.mean(1), 2)


def marked(name: str, method: Method) -> str:
    """The name, with a dagger where the method uses the target's labels."""
    return name + DAGGER * (method.group == "oracle")


def adaptation_table(metrics: Metrics) -> Table:
    """Every method's accuracy (%) on each target for the terminal, by what it adapts; † uses the target's labels.

    Mean ± sample standard deviation over seeds, paired difference to the baseline ± standard error. KeyError or
    ValueError where the metrics don't fit together.
    """
    found = read(metrics)
    drawn = Table(
        title=Text(f"{metrics['name']}: domains of {metrics['data']}, accuracy (%)"),
        padding=(0, 1 if len(metrics["targets"]) < 5 else 0),  # for a terminal of 80 columns
        caption=Text(f"diff.: to {found.baseline}, points ± standard error; obj.: in nats; † uses the target's labels"),
    )
    drawn.add_column("method", overflow="fold")
    for heading in (*metrics["targets"], *["mean"] * (len(metrics["targets"]) > 1), "diff.", "obj."):
        drawn.add_column(Text(heading), justify="right", overflow="fold")
    previous = None
    for name, method in found.methods.items():
        if previous not in (None, method.group):
            drawn.add_section()
        previous = method.group
        difference = "" if name == found.baseline else paired_text(found.against(name)).split(" (")[0]
        texts = [*cells(method), difference, objective_text(method)]
        drawn.add_row(Text(marked(name, method)), *(text.replace("\u00a0±\u00a0", "\n±") for text in texts))
    return drawn
