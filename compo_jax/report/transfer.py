"""The report of transfer by order: new tasks on frozen templates, its page and a table for the terminal."""

import html
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table
from rich.text import Text

from compo_jax.report import transfer_figures as figures
from compo_jax.report.modular_figures import looks
from compo_jax.report.modular_numbers import (
    Paired,
    by_size,
    check_modular,
    net_text,
    paired,
    paired_text,
    several,
)
from compo_jax.report.numbers import ABSENT, Metrics, by_run, decimal, fitting, percent, require, signed, spread
from compo_jax.report.previous import block, html_table, write_page

REFERENCE = "head"
_NEEDED = ("tasks", "held_out", "classes", "budgets", "source", "chosen")


class _Method(NamedTuple):
    """What one way of learning a new task reached, as fractions; a pair is a seed and one of its new tasks."""

    pairs: Float[np.ndarray, "budgets pairs"]
    seeds: Float[np.ndarray, "budgets seeds"]  # means over new tasks
    trained: float
    stored: float
    control: bool


def _label(budget: int | None) -> str:
    return "all labels" if budget is None else f"{budget:,} a class"


def _read(metrics: Metrics) -> dict[str, _Method]:
    """The methods as arrays; KeyError or ValueError where the metrics don't fit together."""
    check_modular(metrics, _NEEDED)
    require(metrics["methods"], (REFERENCE,), "methods.")
    seeds, budgets = metrics["seeds"], metrics["budgets"]
    if any(len(metrics[key]) != len(seeds) or not all(metrics[key]) for key in ("tasks", "held_out")) or not budgets:
        raise ValueError(
            f"the metrics have {len(budgets)} budgets and {len(seeds)} seeds, and {len(metrics['tasks'])} and "
            f"{len(metrics['held_out'])} lists of tasks and new tasks: they need a budget at least, and for each seed "
            "the names of its tasks and of its new tasks; perhaps a list of seeds was cut"
        )
    new, old = ({"runs": seeds, "tasks": metrics[key]} for key in ("held_out", "tasks"))
    by_run(metrics["source"], old, "source", 1)
    by_run(metrics["classes"], new, "classes", 1)
    counts = [len(tasks) for tasks in metrics["held_out"]]
    if [[len(names) for names in chosen] for chosen in metrics["chosen"]] != [counts] * len(budgets):
        raise ValueError(
            f"chosen in the metrics must hold, for each of {len(budgets)} budgets, for each of {len(seeds)} seeds, a "
            "source task for each new one: the names may be of other seeds or budgets"
        )
    found = {}
    for name, method in metrics["methods"].items():
        where = f"methods.{name}."
        require(method, ("accuracy", "trained", "stored", "control"), where)
        if len(method["accuracy"]) != len(budgets):
            raise ValueError(
                f"{where}accuracy in the metrics has {len(method['accuracy'])} entries and must have one for each of "
                f"the {len(budgets)} budgets: the run may not have finished"
            )
        runs = [by_run(values, new, f"{where}accuracy.{i}", 1) for i, values in enumerate(method["accuracy"])]
        found[name] = _Method(
            np.array([np.concatenate(values) for values in runs]),
            np.array([[one.mean() for one in values] for values in runs]),
            *fitting([method["trained"], method["stored"]], (2,), where + "trained and stored", "two numbers"),
            bool(method["control"]),
        )
    return found


def _against(found: dict[str, _Method], name: str) -> list[Paired]:
    """The differences to the reference at each budget."""
    return [paired(*both) for both in zip(found[name].pairs, found[REFERENCE].pairs, strict=True)]


def transfer_table(metrics: Metrics) -> Table:
    """Every method's accuracy (%) on new tasks for the terminal, and its paired difference to the head alone.

    Mean ± sample standard deviation over seeds, difference ± standard error over pairs of a seed and a new task.
    KeyError or ValueError where the metrics don't fit together.
    """
    found = _read(metrics)
    drawn = Table(
        title=Text(f"{metrics['name']}: new tasks of {metrics['data']}, accuracy (%)"),
        caption=f"second line: paired difference to {REFERENCE} in points, ± standard error; labelled images a class",
    )
    drawn.add_column("method", overflow="fold")
    for budget in metrics["budgets"]:
        drawn.add_column("all" if budget is None else f"{budget:,}", justify="right", no_wrap=True)
    drawn.add_column("trained\nstored", justify="right", no_wrap=True)
    for name, method in found.items():
        texts = [spread(100 * seeds) for seeds in method.seeds]
        if name != REFERENCE:
            own = [paired_text(pair).split(" (")[0] for pair in _against(found, name)]
            texts = [f"{text}\n{difference}" for text, difference in zip(texts, own, strict=True)]
        counts = f"{decimal(method.trained, 0)}\n{decimal(method.stored, 0)}"
        drawn.add_row(Text(name), *(text.replace("\u00a0±\u00a0", " ±") for text in texts), counts)
    return drawn


def _by_task(metrics: Metrics, found: dict[str, _Method]) -> str:
    """A table for each budget as HTML: accuracy of each method on each new task, over the seeds that leave it out."""
    names = [name for tasks in metrics["held_out"] for name in tasks]
    tasks = list(dict.fromkeys(names))
    own = {task: [i for i, name in enumerate(names) if name == task] for task in tasks}

    def rows(budget: int) -> Iterator[tuple[str, Sequence[str]]]:
        for name, method in found.items():
            yield name, [spread(100 * method.pairs[budget][own[task]]) for task in tasks]
        starts = [start for seed in metrics["chosen"][budget] for start in seed]
        texts = [", ".join(dict.fromkeys(str(starts[i] or ABSENT) for i in own[task])) for task in tasks]
        yield "its route starts from that of", [html.escape(text) for text in texts]

    return "".join(
        html_table([f"{_label(budget)} (%)", *tasks], rows(i)) for i, budget in enumerate(metrics["budgets"])
    )


def _blocks(metrics: Metrics, found: dict[str, _Method]) -> Iterator[str]:
    """The figures, each with what to look for in it."""
    budgets = metrics["budgets"]
    controls = {name for name, method in found.items() if method.control}
    marks = looks(list(found), controls)
    seeds = {name: method.seeds for name, method in found.items()}
    grey = " Grey and dashed are controls." if controls else ""
    yield block(
        figures.by_budget(seeds, budgets, marks),
        "See whether a learned order lifts a method above the head alone, and at which budget training more, or from "
        f"scratch, overtakes it.{grey} Bars are ± standard deviation over seeds; marks of a budget are moved apart.",
        _by_task(metrics, found),
    )
    differences = {name: method.pairs - found[REFERENCE].pairs for name, method in found.items() if name != REFERENCE}
    if differences:
        yield block(
            figures.differences(differences, [_label(budget) for budget in budgets], marks),
            "A dot is a new task of one seed, the large mark the mean with ± its standard error: right of the line, "
            f"the method beats {REFERENCE} on the same images. Beside the mean, see whether nearly all dots are on one "
            "side. Where some differences are large, the scale is logarithmic beyond ±5.",
        )
    first = by_size(budgets)[0]
    yield block(
        figures.by_trained(
            {name: values[first] for name, values in seeds.items()},
            {name: method.trained for name, method in found.items()},
            marks,
            _label(budgets[first]),
        ),
        "With few labels, more to train isn't always better: best are the methods at the top left. A route costs a "
        f"new task a few scalars beside its head.{grey}",
    )


def transfer(folder: str | os.PathLike, metrics: Metrics) -> Path:
    """Writes `folder/report.html`, the page of transfer by order, and returns its path.

    Args:
      metrics: name, data, seeds, seconds, net, tasks, held_out and classes (of each seed), budgets (labelled images of
        a class, None for all), source (accuracies on the tasks trained on), chosen (the source task whose route a new
        one starts from, by budget and seed), and methods: of each its accuracy by budget, by seed, on the new tasks,
        the scalars trained and stored, and whether it is a control. Fractions; None is not known.

    Raises KeyError or ValueError where the metrics don't fit together.
    """
    found = _read(metrics)
    seeds, budgets, net = metrics["seeds"], metrics["budgets"], metrics["net"]
    new, pairs = len(metrics["held_out"][0]), found[REFERENCE].pairs.shape[1]
    training = metrics.get("training")
    told = (
        f" A new task is trained for {training['steps']} steps of {training['batch']} images at rate "
        f"{training['rate']:g}, by every method, from scratch too."
        if training
        else ""
    )
    lead = (
        f"{new} new task{'s' * (new != 1)} of {metrics['data']} on templates trained on {len(metrics['tasks'][0])} "
        f"others, frozen except where a method trains all or starts from scratch; {net['layers']} layers of "
        f"{net['templates']} templates, {net_text(net)}. Accuracy (%) is the mean over new tasks, by labelled images "
        f"of each class; a difference is to {REFERENCE} on the same seed and task, mean ± standard error over {pairs} "
        f"such pairs (taken as independent), and the pairs won.{told}{several(seeds)}"
    )
    order = by_size(budgets)
    key_numbers = [
        (f"{REFERENCE} alone, {_label(budgets[i])}", percent(float(np.mean(found[REFERENCE].seeds[i]))), "%")
        for i in dict.fromkeys((order[0], order[-1]))
    ]
    if "head+route" in found:
        pair = _against(found, "head+route")
        key_numbers += [
            (f"… with its order, {_label(budgets[i])}", signed(pair[i].mean), "points")
            for i in dict.fromkeys((order[0], order[-1]))
        ]
        extra = found["head+route"].trained - found[REFERENCE].trained
        key_numbers.append(("an order is", decimal(extra, 0), "scalars"))
    source = fitting([x for seed in metrics["source"] for x in seed], (sum(map(len, metrics["tasks"])),), "source", "")
    key_numbers += [
        ("tasks trained on", percent(float(np.mean(source))), "%"),
        ("whole job", decimal(metrics["seconds"], 0), "s"),
    ]
    body = (
        (
            name + " (control)" * method.control,
            [*(spread(100 * one) for one in method.seeds), decimal(method.trained, 0), decimal(method.stored, 0)],
        )
        for name, method in found.items()
    )
    labels = [_label(budget) for budget in budgets]
    against = [(name, map(paired_text, _against(found, name))) for name in found if name != REFERENCE]
    card = html_table(["method (%)", *labels, "trained scalars", "stored scalars"], body)
    card += html_table([f"difference to {REFERENCE} (points)", *labels], against) if against else ""
    return write_page(folder, metrics["name"], lead, key_numbers, card, _blocks(metrics, found))
