"""The report of an incremental run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from compo_jax.incremental.outcomes import Outcome, Results, Skill
from compo_jax.report import charts
from compo_jax.report.charts import COLOURS, INK, Bars, Curve, styled
from compo_jax.report.page import Block, Page, Tile, write_page
from compo_jax.report.table import BOLD, Score, Table, binomial_error, mean_error, run_facts, score, score_column
from compo_jax.report.text import counted, decimal, percent, short

FROZEN = "frozen features"
BANDS = 6  # lines up to which one can see whose a band is
Matrix = Float[np.ndarray, "tasks tasks"]


class Sample(NamedTuple):
    """A test image (uint8, height x width x 3), its task, its class and the predicted one."""

    image: np.ndarray
    task: str
    true: str
    predicted: str


# -- numbers ---------------------------------------------------------------------------------------------------------
def _final(outcome: Outcome, tested: Sequence[int]) -> Score:
    """The final accuracy, with the error of a mean over the tasks' test sets; nan where there is none."""
    error = mean_error(binomial_error(outcome.accuracy_matrix[-1], np.array(tested)))
    return Score(np.array([outcome.final_accuracy], float), float(error))


def _last(outcome: Outcome, tested: Sequence[int]) -> Score:
    """The accuracy over all test images at the end."""
    images = np.array(tested, float)
    errors = images / images.sum() * binomial_error(outcome.accuracy_matrix[-1], images)
    return Score(np.array([outcome.last_accuracy], float), float(np.sqrt(np.sum(errors**2))))


def _average(outcome: Outcome, _: Sequence[int]) -> Score:
    """The mean of that over the steps, without an error: the steps share their images."""
    return Score(np.array([outcome.average_accuracy], float), np.nan)


def _forgetting(outcome: Outcome, tested: Sequence[int]) -> Score:
    """The final forgetting: differences of two accuracies on each task, whose errors are taken as independent."""
    value = np.array([outcome.final_forgetting], float)
    if len(tested) < 2 or np.isnan(value[0]):
        return Score(value, np.nan)
    before, end = np.nanmax(outcome.accuracy_matrix[:-1, :-1], axis=0), outcome.accuracy_matrix[-1, :-1]
    errors = [binomial_error(accuracy, np.array(tested[:-1])) for accuracy in (before, end)]
    return Score(value, float(mean_error(np.hypot(*errors))))


def _task_incremental(outcome: Outcome, tested: Sequence[int]) -> Score:
    return score(np.array([outcome.task_incremental_accuracy], float), sum(tested))


def incremental_table(results: Results) -> Table:
    """The methods and the frozen features, each number with its standard error from the size of the test set; where
    numbers of a publication are known, they stand beside ours."""
    outcomes = {**results.methods, FROZEN: results.frozen._replace(final_forgetting=None)}
    columns = [
        score_column([of(outcome, results.tested) for outcome in outcomes.values()], largest=of is not _forgetting)
        for of in (_final, _last, _average, _forgetting, _task_incremental)
    ]
    headings = ["FA (%)", "A_last (%)", "Ā (%)", "FF (points)", "task known (%)"]
    notes = [
        "FA: final accuracy, a mean over tasks. A_last: over all test images, at the end. Ā: mean of that over the "
        "steps. FF: final forgetting.",
        "± one standard error. " + BOLD,
    ]
    if results.published:
        columns.insert(1, [percent(results.published.get(name), 2) for name in outcomes])
        headings.insert(1, "paper's FA (%)")
        notes.append("Paper: Porrello et al. (2025), with a ViT-B/16 pre-trained on ImageNet-21k.")
    seconds = [decimal(outcome.seconds, 0) for outcome in outcomes.values()]
    return Table(
        f"{results.name}: {counted(len(results.tasks), 'task')} of {results.data}",
        ("method", *headings, "time (s)"),
        list(zip(outcomes, *columns, seconds, strict=True)),
        notes,
    )


# -- figures ---------------------------------------------------------------------------------------------------------
def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour by what stands before a name's last dash (the way to learn), line and marker by the adapter after it."""
    parts = [name.rpartition("-") if "-" in name else (name, "", "") for name in names]
    ways, forms = (list(dict.fromkeys(part[i] for part in parts)) for i in (0, 2))
    lines, markers = ("-", ":", "-.", (0, (5, 1))), "osD^"
    return {
        name: {
            "color": COLOURS[ways.index(part[0]) % len(COLOURS)],
            "linestyle": lines[forms.index(part[2]) % len(lines)],
            "marker": markers[forms.index(part[2]) % len(markers)],
        }
        for name, part in zip(names, parts, strict=True)
    }


def _banded(results: Results) -> bool:
    return len(results.methods) + 1 <= BANDS  # the frozen features are a line, too


def _so_far(matrix: Matrix, tested: Sequence[int], banded: bool) -> Curve:
    """The mean accuracy (%) over the tasks seen, where there is one."""
    rows = np.flatnonzero(np.isfinite(matrix).any(axis=1))
    errors = 100 * mean_error(binomial_error(matrix[rows], np.array(tested))) if banded else None
    return Curve(rows + 1, 100 * np.nanmean(matrix[rows], axis=1), errors)


@styled
def accuracy_so_far(results: Results) -> Figure:
    """The mean accuracy over the tasks seen, after each task: a line for each method, the main one bold."""
    outcomes = {**results.methods, FROZEN: results.frozen}
    curves = {
        name: _so_far(outcome.accuracy_matrix, results.tested, _banded(results))
        for name, outcome in outcomes.items() if np.isfinite(outcome.accuracy_matrix).any()
    }  # fmt: skip
    looks = _looks(list(results.methods)) | {FROZEN: {"color": INK, "linestyle": "--", "linewidth": 1, "marker": "."}}
    figure = charts.figure("Mean accuracy over the tasks seen so far", max(3.5, 1 + 0.24 * len(curves)))
    axes = figure.add_subplot()
    bands = [(y, np.zeros(len(y)) if error is None else np.nan_to_num(error)) for _, y, error in curves.values()]
    drawn = np.concatenate([y + side * error for y, error in bands for side in (-1, 1)])
    axes.set(xlabel="tasks seen", ylabel="mean accuracy (%)", xlim=(1, len(results.tasks)))
    axes.set_ylim(max(0, drawn.min() - 4), min(100, drawn.max() + 4))
    charts.number_ticks(axes, "x", 10, whole=True)
    axes.grid(axis="y")
    charts.lines(axes, curves, looks, ends=True, bold=[results.method])
    return figure


@styled
def final_accuracies(results: Results) -> Figure:
    """The final accuracy of each method as a bar, the best on top; the frozen features' is dashed."""
    scores = {name: _final(outcome, results.tested) for name, outcome in results.methods.items()}
    names = sorted((name for name in scores if np.isfinite(scores[name].mean)), key=lambda name: -scores[name].mean)
    values, errors = ([100 * getattr(scores[name], key) for name in names] for key in ("mean", "error"))
    looks = _looks(list(results.methods))
    figure = charts.figure("Final accuracy of the methods", 1.3 + 0.3 * len(names))
    axes = figure.add_subplot()
    charts.bars(axes, names, {"": Bars(values, errors, {"color": [looks[n]["color"] for n in names]})}, lying=True)
    for i, value in enumerate(values):  # in a column of their own, clear of the dashed line
        axes.text(112, i, f"{value:.1f}", ha="right", va="center", fontsize=8)
    for name, label in zip(names, axes.get_yticklabels(), strict=False):
        label.set_fontweight("bold" if name == results.method else "normal")
    axes.set(xlabel="final accuracy (%)", xlim=(0, 112), xticks=range(0, 101, 20))
    if results.frozen.final_accuracy is not None:
        frozen = 100 * results.frozen.final_accuracy
        charts.dashed_line(axes, "x", frozen, f"{FROZEN} {frozen:.1f}")
    return figure


@styled
def accuracy_matrix(matrix: Matrix, tasks: Sequence[str], method: str) -> Figure:
    """Heat map of `matrix[t, s]`, the accuracy on task s after task t; nan stays blank."""
    figure = charts.figure(f"Accuracy on each task as tasks are learned, {method}", 4.9)
    axes = figure.add_subplot()
    texts = "{:.0f}".format if len(tasks) <= charts.ANNOTATED else None
    image = charts.heat(axes, 100 * matrix, (0.0, 100.0), tasks, tasks, texts=texts)
    axes.set(xlabel="accuracy on task", ylabel="after learning task")
    charts.colour_bar(figure, image, axes, "accuracy (%)")
    return figure


@styled
def skills(results: Results) -> Figure:
    """Bars of the accuracy on a task and on the others (mean), with its module alone, and with all modules but it.

    Diamonds are the accuracies of all modules together, on the same tasks as the bar that they stand at.
    """
    whole = 100 * results.methods[results.method].accuracy_matrix[-1]
    others = [np.mean(np.delete(whole, t)) for t in range(len(whole))]
    images = np.array(results.tested)
    parts = [("only this task's module", results.specialise), ("all but this task's module", results.unlearn)]
    parts = [(label, values) for label, values in parts if values]
    figure = charts.figure(f"Specialising in a task, and unlearning it, {results.method}", 1.4 + 2 * len(parts))
    panels = charts.panels(figure, len(parts), ylabel="accuracy (%)", rows=len(parts))
    for axes, (label, values) in zip(panels, parts, strict=True):
        target, control = (np.array([value[i] for value in values], float) for i in (1, 2))
        charts.bars(axes, [value.task for value in values], {
            "the task": Bars(100 * target, 100 * binomial_error(target, images), {"color": COLOURS[0]}),
            "the other tasks (mean)": Bars(
                100 * control, 100 * binomial_error(control, images.sum() - images),
                {"color": COLOURS[1], "hatch": "///", "edgecolor": "white"},
            ),
        })  # fmt: skip
        for shift, height in ((-0.2, whole), (0.2, others)):
            name = "all modules" if shift > 0 else None
            axes.plot(
                np.arange(len(whole)) + shift,
                height,
                "D",
                color=INK,
                markersize=4.5,
                markeredgecolor="white",
                label=name,
            )
        axes.set(title=label, ylim=(0, 100))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


@styled
def training_loss(records: Sequence[Mapping[str, Any]], method: str) -> Figure:
    """The logged loss of one method over its steps, the tasks one after another."""
    figure = charts.figure(f"Training loss, task after task, {method}", 3.2)
    axes = figure.add_subplot()
    start, middles, tasks = 0, [], list(dict.fromkeys(record["task"] for record in records))
    for i, task in enumerate(tasks):
        points = [(start + record["step"], record["loss"]) for record in records if record["task"] == task]
        x, y = np.array(points, float).T
        look = {"color": COLOURS[0 if i % 2 == 0 else 5], "marker": "o" if len(x) < 8 else "none", "markersize": 3}
        charts.lines(axes, {task: Curve(x, y)}, {task: look})
        middles.append(x.mean())
        start = x.max()
    charts.name_ticks(axes, "x", tasks, middles)
    axes.set(xlabel=f"task, over {start:,.0f} steps in all", ylabel="training loss (nats)", xlim=(0, 1.02 * start))
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.grid(axis="y")
    return figure


@styled
def predictions(samples: Sequence[Sample]) -> Figure:
    """Images with their true and predicted class, 8 in a row; wrong ones are marked."""
    wrong = sum(sample.true != sample.predicted for sample in samples)
    title = f"Test images: true class → predicted class ({wrong} of {len(samples)} wrong)"
    figure = charts.figure(title, 0.4 + 1.05 * -(-len(samples) // 8))
    long = max(len(sample.true) + len(sample.predicted) for sample in samples) > 7
    # marks of direction around the arrow, or the two of a right-to-left script would change places
    arrow = "\n\u200e→ \u200e" if long else "\u200e → \u200e"
    charts.images(figure, [
        charts.Picture(x.image, f"\u200e{short(x.true, 11)}{arrow}{short(x.predicted, 9)}", short(x.task, 10),
                       x.true != x.predicted)
        for x in samples
    ])  # fmt: skip
    return figure


# -- page ------------------------------------------------------------------------------------------------------------
def _matrix_table(results: Results) -> Table:
    rows = zip(results.tasks, results.methods[results.method].accuracy_matrix, strict=True)
    return Table(results.method, ["after task (%)", *results.tasks], [(t, *map(percent, row)) for t, row in rows])


def _skill_table(results: Results) -> Table:
    """Target and control of both operations, beside the composition of all modules."""
    headings = ("task (%)", "all modules", "only its module", "… other tasks", "without its module", "… other tasks")
    empty = [Skill(task, np.nan, None) for task in results.tasks]
    parts = zip(
        results.tasks, results.methods[results.method].accuracy_matrix[-1], results.specialise or empty,
        results.unlearn or empty, strict=True,
    )  # fmt: skip
    return Table(results.method, headings, [
        (task, percent(whole), *map(percent, (alone.target, alone.control, without.target, without.control)))
        for task, whole, alone, without in parts
    ])  # fmt: skip


def _blocks(results: Results, samples: Sequence[Sample], records: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """The figures that the run has numbers for, each with what to look for in it."""
    main, several = results.method, len(results.tasks) > 1
    if several:
        yield Block(
            accuracy_so_far(results),
            "More tasks mean more classes to tell apart, so lines sink: look for the one that sinks least, and for "
            "whether it ends above the dashed line, a linear classifier on the frozen backbone's features as it was "
            "after so many tasks." + (" Bands are ± one standard error." if _banded(results) else ""),
        )
    yield Block(
        final_accuracies(results),
        "Mean test accuracy over all tasks after the last one, ± one standard error: what a bar has beyond the dashed "
        "line was gained by training modules.",
    )
    if several:
        yield Block(
            accuracy_matrix(results.methods[main].accuracy_matrix, results.tasks, main),
            f"Follow a column of {main} downwards: the colour darkens where a task is forgotten as later ones are "
            "learned; the lowest row is the end of the run.",
            [_matrix_table(results)],
        )
    if results.specialise or results.unlearn:
        yield Block(
            skills(results),
            "A good pool keeps a task's accuracy (solid) with its module alone, and loses it without that module while "
            "the other tasks (hatched) stay at the diamonds, where all modules together stand.",
            [_skill_table(results)],
        )
    losses = [r for r in records if r.get("run") == main and np.isfinite(r.get("loss", np.nan))]
    if losses:
        yield Block(
            training_loss(losses, main),
            f"Each stretch is one task's training with {main}: it should fall and level off; a curve still falling at "
            "its end asks for more epochs, a jump for a smaller learning rate.",
        )
    if samples:
        yield Block(
            predictions(samples),
            f"Predictions of {main} among the classes of all tasks; a red frame and a cross mark a wrong one: see "
            "whether it is a look-alike, and of the same task.",
        )


def _tiles(results: Results) -> list[Tile]:
    """The best of each kind, with the name of its method where there are several."""
    tiles, several = [], len(results.methods) > 1
    for key, label, unit, best in (
        ("final_accuracy", "final accuracy", "%", max), ("final_forgetting", "forgetting", "points", min),
        ("task_incremental_accuracy", "accuracy, task known", "%", max),
    ):  # fmt: skip
        values = {name: getattr(outcome, key) for name, outcome in results.methods.items()}
        values = {name: value for name, value in values.items() if value is not None}
        name = best(values, key=lambda name: values[name], default=None)
        if several and name:
            label = f"{'highest' if best is max else 'least'} {label}: {name}"
        tiles.append(Tile(label, percent(values.get(name)), unit))
    tiles.insert(1, Tile(f"final accuracy: {FROZEN}", percent(results.frozen.final_accuracy), "%"))
    speed = results.images_per_second
    return [
        *tiles,
        Tile(f"training speed: {results.method}", decimal(speed, 0 if speed is None or speed >= 10 else 1), "images/s"),
        Tile("whole run", decimal(results.seconds, 0), "s"),
    ]


def incremental_page(
    folder: str | os.PathLike,
    results: Results,
    samples: Sequence[Sample] = (),
    records: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes `folder/report.html`, the page of an incremental run, and returns its path.

    Args:
      samples: test images with the main method's predictions.
      records: the lines of `metrics.jsonl`; the main method's are drawn.
    """
    names, tasks = list(results.methods), results.tasks
    who = names[0] if len(names) == 1 else counted(len(names), "method")
    listed = ", ".join(tasks if len(tasks) <= 12 else [*tasks[:6], "…", tasks[-1]])
    lead = (
        f"{who} learned {counted(len(tasks), 'task')} of {results.data} ({listed})"
        f"{', one after another' if len(tasks) > 1 else ''}, {sum(results.classes)} classes in all; backbone: "
        f"{results.backbone}."
    )
    if len(names) > 1:
        lead += f" Figures that show one method are of {results.method}."
    facts = run_facts([results.seed], [results.tested]) | results.settings
    blocks = _blocks(results, samples, records)
    page = Page(results.name, lead, facts, _tiles(results), [incremental_table(results)], blocks)
    return write_page(folder, page)
