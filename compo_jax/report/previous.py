"""The report of an incremental run, and what all reports share: one HTML page that needs nothing else."""

import html
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from compo_jax.files import local_path
from compo_jax.report import figures
from compo_jax.report.numbers import ABSENT, HEADINGS, Metrics, cells, check, decimal, full_matrix, percent, rows

KeyNumber = tuple[str, str, str]  # label, number and unit
_STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #24292f; --quiet: #5f6770; --line: #dfe2e6; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17191c; --card: #1f2226; --ink: #dfe3e8; --quiet: #9aa3ad; --line: #363b42; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
p.lead { max-width: 46rem; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0 0 1.25rem; }
dl div, figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; }
dt { color: var(--quiet); font-size: .85rem; overflow-wrap: anywhere; }
dd { margin: 0; font-size: 1.4rem; font-weight: 600; }
dd small { color: var(--quiet); font-size: .85rem; font-weight: 400; }
.card { overflow-x: auto; margin-bottom: 1.25rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.card > table { width: 100%; }
table + table { margin-top: 1.25rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--quiet); font-size: .85rem; vertical-align: bottom; }
th:first-child { text-align: left; }
tbody th { color: inherit; font-size: inherit; }
tr:last-child > * { border-bottom: 0; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.25rem;
  align-items: start; }
figure { margin: 0; }
figure svg { display: block; width: 100%; max-width: 40rem; height: auto; margin: 0 auto; }
figcaption { color: var(--quiet); font-size: .9rem; margin-top: .5rem; }
details { font-size: .85rem; overflow-x: auto; margin-top: .5rem; }
summary { cursor: pointer; color: var(--quiet); }
"""


def svg(figure: Figure) -> str:
    """A figure as an SVG element: letters as paths, images inside it, `figures.INK` as the text's colour around."""
    file = io.StringIO()
    title = figure.get_suptitle()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": title, "svg.image_inline": True}):
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", dpi=150, transparent=True, metadata=none)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(figures.INK, "currentColor")
    return drawn.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def html_table(headings: Iterable[str], body: Iterable[tuple[str, Iterable[str]]]) -> str:
    """A table of escaped headings and (name, cells); the cells are HTML."""
    head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in headings)
    lines = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in numbers)}</tr>'
        for name, numbers in body
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def block(figure: Figure, caption: str, numbers: str = "") -> str:
    """A figure with its caption, and its numbers (HTML) to unfold."""
    numbers = numbers and f"<details><summary>Numbers</summary>{numbers}</details>"
    return f"<figure>{svg(figure)}<figcaption>{html.escape(caption)}</figcaption>{numbers}</figure>"


def write_page(
    folder: str | os.PathLike, name: str, lead: str, key_numbers: Iterable[KeyNumber], card: str, blocks: Iterable[str]
) -> Path:
    """Writes `folder/report.html` and returns its path; `card` and `blocks` are HTML, the rest is escaped."""
    name = html.escape(name)
    shown = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{text}{'' if text == ABSENT else f' <small>{unit}</small>'}</dd></div>"
        for label, text, unit in key_numbers
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{name}</h1><p class="lead">{html.escape(lead)}</p><dl>{shown}</dl>'
        f'<div class="card">{card}</div><main>{"".join(blocks)}</main>'
        "</body></html>\n"
    )
    path = local_path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _lead(metrics: Metrics) -> str:
    tasks, classes = metrics["tasks"], sum(metrics["classes"])
    told = ", ".join(tasks if len(tasks) <= 12 else [*tasks[:6], "…", tasks[-1]])
    order = "one after another, " if len(tasks) > 1 else ""
    return (
        f"{metrics['method']} learned {len(tasks)} task{'s' * (len(tasks) != 1)} of {metrics['data']} ({told}), {order}"
        f"{classes} classes in all; backbone: {metrics['backbone']}."
    )


def _key_numbers(metrics: Metrics) -> list[KeyNumber]:
    rate = metrics.get("images_per_second")
    return [
        ("final accuracy", percent(metrics.get("final_accuracy")), "%"),
        ("with frozen features", percent(metrics.get("frozen_features_accuracy")), "%"),
        ("forgetting", percent(metrics.get("final_forgetting")), "points"),
        ("task-incremental accuracy", percent(metrics.get("task_incremental_accuracy")), "%"),
        ("training speed", decimal(rate, 0 if rate is None or rate >= 10 else 1), "images/s"),
        ("whole run", decimal(metrics.get("seconds"), 0), "s"),
    ]


def _skill_table(metrics: Metrics, specialise: Sequence[Mapping], unlearn: Sequence[Mapping]) -> str:
    """Target and control of both lists, beside the composition of all modules."""
    known = {
        (kind, value["task"]): [percent(value["target"]), percent(value["control"])]
        for kind, values in (("specialise", specialise), ("unlearn", unlearn))
        for value in values
    }
    headings = ("task (%)", "all modules", "only its module", "… other tasks", "without its module", "… other tasks")
    return html_table(headings, [
        (task, [
            percent(metrics.get("composed", {}).get(task)),
            *(text for kind in ("specialise", "unlearn") for text in known.get((kind, task), [ABSENT, ABSENT])),
        ])
        for task in metrics["tasks"]
    ])  # fmt: skip


def _blocks(metrics: Metrics, samples: Sequence, records: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """The figures that the run has numbers for, each with what to look for in it."""
    tasks, methods, main = metrics["tasks"], metrics["methods"], metrics["method"]
    frozen = metrics.get("frozen_features_accuracy")
    matrix = full_matrix(metrics["accuracy_matrix"])
    matrices = {name: full_matrix(values["accuracy_matrix"]) for name, values in methods.items()}
    if len(tasks) > 1:
        yield block(
            figures.accuracy_so_far(matrices, frozen, main),
            "More tasks mean more classes to tell apart, so lines sink: look for the one that sinks least, and for "
            "whether it ends above the dashed line, a linear classifier on the frozen backbone's features.",
        )
    yield block(
        figures.final_accuracies({name: values["final_accuracy"] for name, values in methods.items()}, frozen, main),
        "Mean test accuracy over all tasks after the last one: what a bar has beyond the dashed line was gained by "
        "training modules.",
    )
    if len(tasks) > 1:
        yield block(
            figures.accuracy_matrix(matrix, tasks),
            f"Follow a column of {main} downwards: the colour darkens where a task is forgotten as later ones are "
            "learned; the lowest row is the end of the run.",
            html_table(
                ["after task (%)", *tasks], zip(tasks, ([percent(x) for x in row] for row in matrix), strict=True)
            ),
        )
    specialise, unlearn = metrics.get("specialise") or [], metrics.get("unlearn") or []
    if specialise or unlearn:
        yield block(
            figures.specialise_and_unlearn(specialise, unlearn, metrics.get("composed") or {}),
            "A good pool keeps a task's accuracy (solid) with its module alone, and loses it without that module while "
            "the other tasks (hatched) stay at the diamonds, where all modules together stand.",
            _skill_table(metrics, specialise, unlearn),
        )
    own = [r for r in records if r.get("run") == main and np.isfinite(r.get("loss", np.nan))]
    if own:
        yield block(
            figures.training_loss(own),
            f"Each stretch is one task's training with {main}: it should fall and level off; a curve still falling at "
            "its end asks for more epochs, a jump for a smaller learning rate.",
        )
    if samples:
        yield block(
            figures.samples(samples),
            "A red frame and a cross mark a wrong prediction, among the classes of all tasks: see whether it is a "
            "look-alike, and of the same task.",
        )


def incremental(
    folder: str | os.PathLike,
    metrics: Metrics,
    samples: Sequence[tuple[np.ndarray, str, str, str]] = (),
    records: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes `folder/report.html`, the page of an incremental run, and returns its path.

    Args:
      metrics: what `metrics.json` holds: name, data, backbone, tasks, classes, method, methods (each with its numbers
        and accuracy matrix), the main method's numbers, and where known specialise, unlearn and composed. Fractions.
      samples: test images (uint8, height x width x 3) with task, true class and predicted class.
      records: the lines of `metrics.jsonl`; the main method's are drawn.

    Raises KeyError or ValueError where the metrics don't fit together.
    """
    check(metrics)
    made = rows(metrics)
    body = [
        (row.name, [f"<strong>{text}</strong>" if best else text for text, best in numbers])
        for row, numbers in zip(made, cells(made), strict=True)
    ]
    blocks = _blocks(metrics, samples, records)
    return write_page(
        folder, metrics["name"], _lead(metrics), _key_numbers(metrics), html_table(HEADINGS, body), blocks
    )
