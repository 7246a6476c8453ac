"""The report: every number and figure of a run, read back from what was drawn and written."""

import copy
import io
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from pages import Page
from rich.console import Console

from compo_jax import report
from compo_jax.report import figures

TASKS = ["greek", "lao", "<b>nko</b>"]
MAIN = [[0.91, None, None], [0.83, 0.97, None], [0.72, 0.88, 0.95]]  # means 0.91, 0.90, 0.85; forgetting 0.14
JOINT = [[None] * 3, None, [0.96, 0.93, 0.99]]  # a row may be None as a whole
SEQUENTIAL = [[0.9, None, None], [0.3, 0.8, None], [0.1, 0.2, 0.9]]


def method(matrix, forgetting, within, seconds):
    return {
        "final_accuracy": sum(matrix[-1]) / len(matrix), "final_forgetting": forgetting,
        "task_incremental_accuracy": within, "accuracy_matrix": matrix, "seconds": seconds,
    }  # fmt: skip


@pytest.fixture
def metrics():
    methods = {
        "ita-lora": method(MAIN, 0.14, 0.977, 61.0),
        "sequential-lora": method(SEQUENTIAL, 0.7, 0.888, 72.0),
        "joint-lora": method(JOINT, None, 0.983, 83.0),
    }
    return {
        "name": "run <1> & $x_{$", "data": "glyphs <i>", "backbone": "ViT <u>96x4", "method": "ita-lora",
        "tasks": TASKS, "classes": [16, 16, 18], **{k: v for k, v in methods["ita-lora"].items() if k != "seconds"},
        "frozen_features_accuracy": 0.634, "images_per_second": 4321.4, "seconds": 987.6, "methods": methods,
        "composed": dict(zip(TASKS, MAIN[-1], strict=True)),
        "specialise": [{"task": t, "target": 0.90 + i / 100, "control": 0.41 + i / 100} for i, t in enumerate(TASKS)],
        "unlearn": [{"task": t, "target": 0.21 + i / 100, "control": 0.80 + i / 100} for i, t in enumerate(TASKS)],
    }  # fmt: skip


@pytest.fixture
def samples():
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
    names = [("α", "α"), ("א", "ב"), ("<b>", "$\\frac"), ("ߋ", "ߋ"), ("ກ", "β")]
    return [(image, TASKS[0], true, guess) for image, (true, guess) in zip(images, names, strict=True)]


@pytest.fixture
def records():
    return [
        {"run": run, "task": task, "step": step, "loss": offset + 1 / step, "accuracy": 0.5, "images_per_second": 9.0}
        for run, offset in (("ita-lora", 0.0), ("joint-lora", 5.0))
        for task in TASKS
        for step in (10, 20, 25)
    ]


def test_the_page_holds_every_number_and_every_figure(tmp_path, metrics, samples, records):
    path = report.incremental(tmp_path / "new", metrics, samples, records)
    assert path == tmp_path / "new" / "report.html"
    page = Page(path)
    assert not page.open
    assert page.tags.count("svg") == page.tags.count("figcaption") == 6
    for number in (
        "85.0", "63.4", "14.0", "97.7", "4,321", "988",  # the key numbers
        "40.0", "70.0", "88.8", "72", "96.0", "98.3", "83", "61",  # the methods
        "91.0", "83.0", "97.0", "72.0", "88.0", "95.0",  # the matrix
        "92.0", "41.0", "42.0", "43.0", "21.0", "22.0", "23.0", "80.0", "81.0", "82.0",  # specialise and unlearn
    ):  # fmt: skip
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d.,])", page.text), number
    for words in ("ita-lora learned 3 tasks of glyphs <i>", "50 classes", "<u>96x4", "joint-lora", "frozen features"):
        assert words in page.text


def test_the_page_needs_nothing_else(tmp_path, metrics, samples, records):
    path = report.incremental(tmp_path, metrics, samples, records)
    page = Page(path)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert sources
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in sources)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import", text)
    named = {value for name, value in page.attributes if name == "id"}
    assert {value[1:] for value in sources if value[0] == "#"} <= named
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= named
    assert figures.INK not in text
    assert "currentColor" in text


def test_names_are_escaped(tmp_path, metrics, samples, records):
    page = Page(report.incremental(tmp_path, metrics, samples, records))
    assert not {"b", "i", "u"} & set(page.tags)
    for words in ("<b>nko</b>", "glyphs <i>", "run <1> & $x_{$"):
        assert words in page.text


def test_the_same_run_gives_the_same_page(tmp_path, metrics, samples, records):
    first, again = (report.incremental(tmp_path / x, metrics, samples, records).read_bytes() for x in "ab")
    assert first == again


def test_what_is_missing_is_left_out(tmp_path, metrics):
    bare = {k: v for k, v in metrics.items() if k not in ("specialise", "unlearn", "composed", "seconds")}
    page = Page(report.incremental(tmp_path, bare | {"images_per_second": None, "final_forgetting": None}, [], []))
    assert page.tags.count("svg") == 3
    assert page.text.count("–") >= 3
    half = bare | {"unlearn": metrics["unlearn"]}
    assert Page(report.incremental(tmp_path, half)).tags.count("svg") == 4


def test_one_task(tmp_path, metrics):
    only = {
        "tasks": ["greek"], "classes": [16], "accuracy_matrix": [[0.9]], "specialise": [], "unlearn": [],
        "composed": {}, "methods": {"ita-lora": method([[0.9]], 0.0, 0.9, 1.0)}, "final_accuracy": 0.9,
    }  # fmt: skip
    page = Page(report.incremental(tmp_path, metrics | only))
    assert page.tags.count("svg") == 1
    assert "90.0" in page.text
    assert "1 task of" in page.text


@pytest.mark.parametrize("count", [1, 12, 13, 20])
def test_the_heat_map_is_the_matrix(count):
    matrix = np.random.default_rng(count).uniform(size=(count, count))
    matrix[np.triu_indices(count, 1)] = np.nan
    axes = figures.accuracy_matrix(matrix, [f"task {i}" for i in range(count)]).axes[0]
    drawn = axes.images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(drawn, np.nan) / 100, matrix, rtol=1e-12)
    cells = {tuple(int(x) for x in text.get_position()[::-1]): text.get_text() for text in axes.texts}
    known = [(t, s) for t in range(count) for s in range(t + 1)] if count <= 12 else []
    assert cells == {(t, s): f"{100 * matrix[t, s]:.0f}" for t, s in known}
    low, high = axes.images[0].get_clim()
    assert low <= 100 * np.nanmin(matrix)
    assert high == 100
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"task {i}" for i in range(count)]


def test_lines_are_the_means_over_the_tasks_seen():
    matrices = {
        "ita-lora": np.array(MAIN, float),
        "joint-lora": np.array([[np.nan] * 3, [np.nan] * 3, JOINT[-1]]),
        "ita-full": np.array(SEQUENTIAL, float),
    }
    axes = figures.accuracy_so_far(matrices, 0.634, "ita-lora").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    for name, steps, means in (
        ("ita-lora", [1, 2, 3], [91, 90, 85]), ("joint-lora", [3], [96]), ("ita-full", [1, 2, 3], [90, 55, 40]),
    ):  # fmt: skip
        np.testing.assert_array_equal(lines[name].get_xdata(), steps)
        np.testing.assert_allclose(lines[name].get_ydata(), means, rtol=1e-12)
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [63.4]
    assert lines["ita-lora"].get_color() == lines["ita-full"].get_color() != lines["joint-lora"].get_color()
    assert lines["ita-lora"].get_marker() == lines["joint-lora"].get_marker() != lines["ita-full"].get_marker()


def test_labels_of_close_lines_stand_apart_and_in_order():
    matrices = {f"m{i}": np.full((2, 2), 0.8 + i / 1000) for i in range(9)}
    figure = figures.accuracy_so_far(matrices, 0.8045, "m0")
    figure.savefig(io.BytesIO())
    axes = figure.axes[0]
    labels = sorted(axes.texts, key=lambda text: text.get_position()[1])
    order = [*(f"m{i}" for i in range(5)), "frozen features", *(f"m{i}" for i in range(5, 9))]
    assert [label.get_text() for label in labels] == order
    pixels = axes.transData.transform([label.get_position() for label in labels])[:, 1]
    assert np.diff(pixels).min() > 8 * figure.dpi / 72  # the labels' font has 8 points


def test_bars_are_sorted_accuracies():
    axes = figures.final_accuracies({"a": 0.5, "b": 0.9, "c": 0.7}, 0.6, "c").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [50, 70, 90]  # from below
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "b"]
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["normal", "bold", "normal"]
    assert axes.lines[0].get_xdata()[0] == 60


def test_skills_beside_the_composition(metrics):
    figure = figures.specialise_and_unlearn(metrics["specialise"], metrics["unlearn"], metrics["composed"])
    for axes, (target, control) in zip(
        figure.axes, [([90, 91, 92], [41, 42, 43]), ([21, 22, 23], [80, 81, 82])], strict=True
    ):
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [*target, *control])
        wholes = [line.get_ydata() for line in axes.lines]
        np.testing.assert_allclose(wholes[0], [72, 88, 95])
        np.testing.assert_allclose(wholes[1], [91.5, 83.5, 80])  # means of the other two


def test_losses_follow_one_another(records):
    axes = figures.training_loss([r for r in records if r["run"] == "ita-lora"]).axes[0]
    assert len(axes.lines) == 3
    for i, line in enumerate(axes.lines):
        np.testing.assert_array_equal(line.get_xdata(), 25 * i + np.array([10, 20, 25]))
        np.testing.assert_allclose(line.get_ydata(), [1 / 10, 1 / 20, 1 / 25])


def test_wrong_samples_have_a_red_frame_and_a_cross(samples):
    figure = figures.samples(samples)
    assert len(figure.axes) == len(samples)
    for axes, (image, _, true, guess) in zip(figure.axes, samples, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
        crosses = [line for line in axes.lines if line.get_marker() == "x"]
        framed = all(s.get_visible() and to_hex(s.get_edgecolor()) == figures.WRONG for s in axes.spines.values())
        assert bool(crosses) == framed == (true != guess)
        assert re.sub(r"[\u200e\s]", "", axes.get_title()) == f"{true}→{guess}"
    assert "3 of 5 wrong" in figure.get_suptitle()


def test_figures_leave_pyplot_and_the_settings_alone(metrics):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figures.final_accuracies({"a": 0.5}, None, "a").savefig(io.BytesIO())
    assert dict(mpl.rcParams) == before
    plain = figures.final_accuracies({"a": 0.5}, None, "a")
    with mpl.rc_context({"text.color": "red", "axes.labelcolor": "red"}):
        same = figures.final_accuracies({"a": 0.5}, None, "a")
    assert same.axes[0].xaxis.label.get_color() == plain.axes[0].xaxis.label.get_color() == figures.INK


def test_terminal_table(metrics):
    metrics["methods"]["[red]x"] = metrics["methods"]["ita-lora"]  # markup in a name is a name
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard", legacy_windows=False)
    console.print(report.table(metrics))
    lines = console.file.getvalue().splitlines()
    plain = [[c.strip() for c in re.sub(r"\x1b\[[\d;]*m", "", line).split("│")[1:-1]] for line in lines if "│" in line]
    assert plain == [
        ["ita-lora", "85.0", "14.0", "97.7", "61"],
        ["sequential-lora", "40.0", "70.0", "88.8", "72"],
        ["joint-lora", "96.0", "–", "98.3", "83"],
        ["[red]x", "85.0", "14.0", "97.7", "61"],
        ["frozen features", "63.4", "–", "–", "–"],
    ]
    bold = {n for line in lines if "│" in line for n in re.findall(r"\x1b\[1m\s*([\d.]+)", line)}
    assert bold == {"96.0", "14.0", "98.3", "61"}


def test_metrics_that_lack_something(tmp_path, metrics):
    del metrics["tasks"], metrics["classes"]
    with pytest.raises(KeyError, match=r"lack tasks, classes: they may be of another kind of run"):
        report.incremental(tmp_path, metrics)
    assert not list(tmp_path.iterdir())


def test_a_main_method_that_did_not_run(metrics):
    with pytest.raises(ValueError, match=r"'iel' is not among the methods \(ita-lora, sequential-lora, joint-lora\)"):
        report.table(metrics | {"method": "iel"})


@pytest.mark.parametrize("matrix", [MAIN[:2], [row[:2] for row in MAIN], []])
def test_a_matrix_of_another_stream(tmp_path, metrics, matrix):
    wrong = copy.deepcopy(metrics)
    wrong["methods"]["sequential-lora"]["accuracy_matrix"] = matrix
    with pytest.raises(ValueError, match=r"matrix of 'sequential-lora' has \d rows of .* and the run has 3 tasks"):
        report.incremental(tmp_path, wrong)
