"""The report of multi-task training: numbers against hand calculations, read back from what was drawn and written."""

import io
import re

import numpy as np
import pages
import pytest
from rich.console import Console

from compo_jax import report
from compo_jax.report import multitask_figures, route_blocks, route_figures
from compo_jax.report import page as written

ORDERED = "ordered-3"
HARD = [[0, 1, 0, 1], [0, 1, 2, 0], [0, 0, 2, 0]]  # three tasks, four layers; template 3 of four is dead


def method(accuracy, parameters=250_000, **changes):
    return {"accuracy": accuracy, "parameters": parameters, "macs": 37_850_000, "seconds": [10.0, 14.0]} | changes


def measured():
    soft = 0.6 * np.eye(4)[np.array(HARD)] + 0.1
    drop = np.array([[0.3, 0.2, 0.1], [0.1, 0.1, 0.1], [0.0, 0.1, 0.2], [0.0, 0.0, 0.0]])
    amounts = [0.1, 0.5, 1.0]
    return {
        "name": "multi <1> $x_{$", "data": "scripts <i>", "seeds": [0, 1], "seconds": 1234.5,
        "net": {"layers": 4, "templates": 4, "width": 64}, "tasks": ["greek <i>", "n$ko", "vai"],
        "classes": [20, 30, 40],
        "methods": {
            "single-task": method([[0.9, 0.8, 0.7], [0.9, 0.8, 0.4]], 1_000_000),
            "hard-sharing-bn": method([[0.8, 0.7, 0.6], [0.8, 0.7, 0.6]]),
            "random-3": method([[0.8, 0.8, None], [0.9, 0.8, 0.4]], macs=None),
            ORDERED: method([[1.0, 0.8, 0.9], [0.9, 0.9, 0.6]]),
        },
        "gap": {ORDERED: {
            "soft": [[0.9] * 3] * 2, "hard": [[0.2] * 3, [0.4] * 3], "reestimated": [[0.6] * 3] * 2,
            "finetuned": [[1.0, 0.8, 0.9], [0.9, 0.9, 0.6]],
        }},
        "curves": {ORDERED: {
            "step": [10, 20, 40], "cross_entropy": [2.0, 1.0, 0.5], "accuracy": [0.1, 0.5, 0.9],
            "entropy": [1.0, 0.5, 0.0], "unused": [0.0, 0.1, 0.2], "temperature": [1.0, 0.5, 0.1],
            "phases": [0.2, 0.7], "steps": 40,
        }},
        "routes": {ORDERED: {"templates": 4, "hard": [HARD, [[0] * 4] * 3], "soft": soft.tolist()}},
        "removal": {ORDERED: {
            "drop": drop.tolist(), "null": [[0.1] * 3] * 3 + [[0.0] * 3], "deviation": [[0.03, 0.0, 0.04]] * 4,
            "images": 512,
        }},
        "bridge": {
            "method": ORDERED, "task": "vai", "layer": 2, "images": 64, "chosen": 2, "amounts": amounts, "loss": 0.5,
            "true": [[0.5 + k * a for a in amounts] for k in (1, 3, 0, 2)],
            "forecast": [[0.5 + k * a + a * a for a in amounts] for k in (1, 3, 0, 2)], "error": [0.05, 0.25, 0.5],
        },
    }  # fmt: skip


@pytest.fixture
def metrics():
    return measured()


@pytest.fixture(scope="module", autouse=True)
def few_random_routes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route_blocks, "_DRAWS", 10)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are not written, which takes most of the time."""
    monkeypatch.setattr(written, "svg", lambda figure: "<svg></svg>")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return report.multitask(tmp_path_factory.mktemp("page"), measured())


class Page(pages.Page):
    def __init__(self, path):
        super().__init__(path)
        self.rows = [[cell.replace("\u00a0", " ") for cell in row] for row in self.rows]
        self.text = self.text.replace("\u00a0", " ")


def test_the_page(path):
    page = Page(path)
    assert not page.open
    assert page.tags.count("svg") == page.tags.count("figcaption") == 10
    for row in (
        ["single-task", "75.0 ± 7.1", "–", "1,000,000", "100.0", "37.9", "12 ± 3"],  # 0.8 and 0.7
        ["hard-sharing-bn", "70.0 ± 0.0", "−5.0 ± 7.1", "250,000", "25.0", "37.9", "12 ± 3"],  # -0.1 and 0
        ["random-3", "–", "–", "250,000", "25.0", "–", "12 ± 3"],
        [ORDERED, "85.0 ± 7.1", "+10.0 ± 0.0", "250,000", "25.0", "37.9", "12 ± 3"],  # 0.9 and 0.8: 0.1 twice
        ["vai", "40", "55.0 ± 21.2", "60.0 ± 0.0", "–", "75.0 ± 21.2"],
        [ORDERED, "90.0 ± 0.0", "30.0 ± 14.1", "60.0 ± 0.0", "85.0 ± 7.1"],  # the discretisation gap
        ["n$ko", "0", "1", "2", "0"],
        ["greek <i>", "0.00", "0.50", "0.75"],  # two of four layers differ, then three
        ["0", "1.00", "0.33", "0.33", "0.67"],  # the parts of three tasks that take template 0 again
        ["0", "58.3", "+20.0", "+10.0", "1.7"],  # seven of twelve places; sqrt(0.03² + 0.04²) / 3
        ["3", "0.0", "0.0", "0.0", "1.7"],
        ["template 1", "0.800 / 0.810", "2.00 / 2.25", "3.50 / 4.50"],
    ):  # fmt: skip
        assert row in page.rows, row
    for words in (
        f"{ORDERED} less random-3: – points; less hard-sharing-bn: +15.0 ± 7.1 points",
        "(other seeds 0.00)", "Nearest are n$ko and vai, 0.25;", "Dead, without any place: 3 (1 of 4;",
        "Beyond two deviations: templates 0.", "512 images of each task",
        "5.0 % at ε = 0.1, 25 % at ε = 0.5, 50 % at ε = 1 of the true change",
    ):  # fmt: skip
        assert words in page.text, words
    assert re.search(rf"parts shared: {ORDERED}\s+85\.0 ± 7\.1", page.text)
    assert re.search(r"beats them\s+3 of 3", page.text)  # 0.95, 0.85, 0.75 against 0.9, 0.8, 0.55

    # it needs nothing else, and escapes names
    assert not {"script", "link", "iframe", "object", "i", "b"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert all(value.startswith(("#", "data:image/png")) for value in sources)
    for words in ("multi <1> $x_{$", "scripts <i>", "greek <i>"):
        assert words in page.text


def test_the_terminal_table(metrics):
    console = Console(file=io.StringIO(), width=80)
    console.print(report.multitask_table(metrics))
    text = console.file.getvalue()
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows[:4] == [
        ["single-task", "75.0", "–", "1,000,000", "100.0", "37.9", "12"], ["", "±7.1", "", "", "", "", "±3"],
        ["hard-sharing-bn", "70.0", "−5.0", "250,000", "25.0", "37.9", "12"], ["", "±0.0", "±7.1", "", "", "", "±3"],
    ]  # fmt: skip
    assert [ORDERED, "85.0", "+10.0", "250,000", "25.0", "37.9", "12"] in rows
    assert "3 tasks of scripts <i>" in text


def cut(metrics, tasks=1, layers=1, templates=1):
    """One seed of it, with fewer tasks, layers and templates."""
    metrics["seeds"], metrics["net"]["layers"] = [0], layers
    metrics |= {key: metrics[key][:tasks] for key in ("tasks", "classes")}
    for own in metrics["methods"].values():
        own |= {"accuracy": [own["accuracy"][0][:tasks]], "seconds": own["seconds"][:1]}
    route = {"templates": templates, "hard": [[[0] * layers] * tasks], "soft": None}
    return metrics | {"routes": {ORDERED: route}, "bridge": None, "gap": {}, "curves": {}, "removal": {}}


@pytest.mark.parametrize("tasks, layers, templates, figures", [(1, 1, 1, 4), (2, 14, 1, 6)])
def test_small_pages(tmp_path, metrics, tasks, layers, templates, figures):
    page = Page(report.multitask(tmp_path, cut(metrics, tasks, layers, templates)))
    assert page.tags.count("svg") == figures
    first = {1: ["100.0", "+10.0"], 2: ["90.0", "+5.0"]}[tasks]  # against 90 and 85
    assert [ORDERED, *first, "250,000", "25.0", "37.9", "10"] in page.rows


@pytest.mark.parametrize("names", [["hard-sharing-bn", "random-3"], ["single-task"], [ORDERED]])
def test_any_subset_of_the_methods_and_parts(tmp_path, undrawn, metrics, names):
    metrics["methods"] = {name: metrics["methods"][name] for name in names}
    for key in ("gap", "curves", "routes", "removal", "bridge"):
        del metrics[key]
    page = Page(report.multitask(tmp_path, metrics))
    assert (page.tags.count("svg"), page.rows[1][2]) == (2, "–")


def test_nothing_known(tmp_path, metrics):
    def emptied(value):
        return [emptied(v) for v in value] if isinstance(value, list) else None

    for part in ("methods", "gap", "removal"):
        for own in metrics[part].values():
            own |= {key: emptied(value) for key, value in own.items()}
    metrics["curves"][ORDERED] |= {key: [None] * 3 for key in ("cross_entropy", "entropy", "unused")}
    metrics["bridge"] |= {key: emptied(metrics["bridge"][key]) for key in ("true", "forecast", "error")}
    page = Page(report.multitask(tmp_path, metrics))
    assert [ORDERED, *["–"] * 6] in page.rows


METHOD, ROUTES = ("methods", ORDERED), ("routes", ORDERED)


@pytest.mark.parametrize("path, named", [
    (("classes",), "classes"), (("net", "width"), "net.width"), ((*METHOD, "macs"), f"methods.{ORDERED}.macs"),
    (("gap", ORDERED, "hard"), f"gap.{ORDERED}.hard"), (("curves", ORDERED, "unused"), f"curves.{ORDERED}.unused"),
    ((*ROUTES, "hard"), f"routes.{ORDERED}.hard"), (("removal", ORDERED, "null"), f"removal.{ORDERED}.null"),
    (("bridge", "error"), "bridge.error"),
])  # fmt: skip
def test_metrics_that_lack_something(tmp_path, undrawn, metrics, path, named):
    part = metrics
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    with pytest.raises(KeyError, match=rf"the metrics lack {named}: .* of a run that didn't finish"):
        report.multitask(tmp_path / "new", metrics)
    if path[0] in ("classes", "net", "methods"):
        with pytest.raises(KeyError, match=named):
            report.multitask_table(metrics)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path, value, match", [
    (("methods",), {}, "2 seeds, 3 tasks and 0 methods, and need one of each at least: the run may not have"),
    (("seeds",), [], "0 seeds"),
    (("classes",), [20, 30], r"classes in the metrics has shape \(2,\) and must have \(3,\)"),
    ((*METHOD, "accuracy"), [[0.1] * 3], r"accuracy in the metrics has shape \(1, 3\) .* \(2, 3\), seeds by tasks"),
    ((*METHOD, "parameters"), "many", "parameters in the metrics is no array of one number"),
    (("gap", ORDERED, "soft"), [[0.9] * 3, [0.9]], "soft in the metrics is no array of seeds by tasks"),
    (("curves", ORDERED, "entropy"), [1.0], r"entropy in the metrics has shape \(1,\) and must have \(3,\), records"),
    (("curves", ORDERED, "phases"), [0.2], "two parts of the steps"),
    ((*ROUTES, "hard"), [HARD], "seeds by tasks by layers"), ((*ROUTES, "templates"), 2, "not among the 2, from 0 on"),
    ((*ROUTES, "hard"), [HARD, [[0.5] * 4] * 3], "not among the 4"),
    ((*ROUTES, "soft"), [[[1.0]]], "tasks by layers by templates"),
    (("removal", ORDERED, "drop"), [[0.1] * 3], r"shape \(1, 3\) and must have \(4, 3\), templates by tasks"),
    (("bridge", "forecast"), [[0.1] * 3], r"shape \(1, 3\) and must have \(4, 3\), templates by amounts"),
])  # fmt: skip
def test_metrics_that_do_not_fit(tmp_path, undrawn, metrics, path, value, match):
    part = metrics
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ValueError, match=match):
        report.multitask(tmp_path / "new", metrics)
    assert not list(tmp_path.iterdir())


def test_what_figures_draw():
    found = {"a": np.array([0.5, 0.7]), "$b_{": np.array([0.8, 0.9])}
    left, right = multitask_figures.methods(found, {"a": 1e6, "$b_{": 2e7}, "a").axes
    lines = {line.get_label(): line.get_xydata() for line in left.lines}
    np.testing.assert_allclose(lines["mean 1"], [[85, 1]])
    np.testing.assert_allclose(lines["seeds 0"], [[50, 0], [70, 0]])
    np.testing.assert_allclose(left.lines[0].get_xdata(), 60)  # dashed
    assert [line.get_xdata()[0] for line in right.lines] == [1e6, 2e7]

    values = np.array([[0.2, -0.1], [np.nan, 0.001]])
    axes, _ = multitask_figures.by_task(values, ["a", "b"], ["t", "u"], np.array([0.5, 0.75]), "one").axes
    assert [text.get_text() for text in axes.texts] == ["+20.0", "−10.0", "–", "+0.1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["t  50.0", "u  75.0"]

    drop, null, deviation = np.array([0.1, 0.3]), np.array([0.1, 0.2]), np.array([np.nan, 0.05])
    (axes,) = route_figures.removal(drop, null, deviation, [1, 0]).axes
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [30, 10])
    # tasks 0 and 2 merge first, and stand together
    matrix = np.array([[0, 0.9, 0.1], [0.9, 0, 0.8], [0.1, 0.8, 0]])
    linkage = np.array([[0, 2, 0.1, 2], [1, 3, 0.85, 3]])
    above, axes, _ = route_figures.distances(matrix, linkage, ["a", "b", "c"]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a", "c"]
    np.testing.assert_allclose(axes.images[0].get_array()[0], [0, 0.9, 0.8])
    assert sorted(max(line.get_ydata()) for line in above.lines) == [0.1, 0.85]
