"""The reports of merge rules and of unlearning: every number, read back from what was drawn and written."""

import copy
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from pages import PlainPage as Page
from pages import printed

from compo_jax import report
from compo_jax.report import figures as shared
from compo_jax.report import merging_figures, unlearning_figures
from compo_jax.report.numbers import spread

TASKS = [["greek <i>", "n$ko"], ["nko", "greek"]]


def rule(within, **changes):
    return {
        "within": within, "incremental": [[x and x / 2 for x in row] for row in within], "normalised": [0.9, 0.8],
        "seconds": [1.0, 2.0], "told": [[], []], "options": {}, "memory": 3.25,
    } | changes  # fmt: skip


def measured_merging():
    rules = {
        "average": rule([[0.8, 0.6], [0.5, 0.7]]),
        "_best <b>": rule(
            [[0.8, 0.8], [0.6, 0.7]], normalised=[0.98, 0.94], seconds=[0.011, 0.013], memory=None,
            told=[["residual <u>0.04</u>", "residual <u>0.04</u>"], ["residual <u>0.04</u>"]],
            options={"damping": "<s>0.001"},
        ),
        "ggn": rule([[0.1, 0.2], [None, 0.3]], normalised=[0.2, float("nan")], seconds=[150.0, 170.0], memory=3.3),
    }  # fmt: skip
    pool = {
        "individual": [[0.8, 1.0], [0.6, 0.8]], "base": [[0.2, 0.5], [0.3, 0.2]], "rules": rules,
        "curvature_seconds": [{"diagonal": 10.0, "kronecker": 20.0, "landscape": 3.0} for _ in range(2)],
    }  # fmt: skip
    other = copy.deepcopy(pool)
    del other["rules"]["ggn"]
    other["rules"]["_best <b>"] |= {"told": [[], []], "normalised": [0.5, 0.7]}
    return {
        "name": "merging <1> & $x_{$", "data": "glyphs <i>", "backbone": "ViT <u>96x4", "runs": ["run-<b>0", "run-1"],
        "tasks": TASKS, "images": 1064, "seconds": 1234.5, "pools": {"none-<b>lora": pool, "_none-$x_{$": other},
    }  # fmt: skip


def measured_unlearning():
    method = {
        "frozen": [[0.1, 0.2, 0.3], [0.2, 0.2, 0.2]], "all": [[0.8, 0.7, 0.6], [0.9, 0.8, 0.7]],
        "specialise": [
            [[0.9, 0.3, 0.3], [0.2, 0.8, 0.4], [0.3, 0.3, 0.7]], [[0.9, 0.2, 0.2], [0.2, 0.9, 0.2], [0.2, 0.2, 0.9]],
        ],
        "unlearn": [
            [[0.3, 0.7, 0.6], [0.8, 0.2, 0.6], [0.8, 0.7, 0.1]], [[0.4, 0.8, 0.8], [0.8, 0.4, 0.8], [0.8, 0.8, 0.4]],
        ],
        "subtract": [
            [[0.1, 0.6, 0.6], [0.6, 0.1, 0.6], [0.6, 0.6, 0.1]], [[0.1, 0.6, 0.6], [0.6, 0.1, 0.6], [0.6, 0.6, 0.1]],
        ],
    }  # fmt: skip
    other = copy.deepcopy(method)
    other["unlearn"] = [[[0.0] * 3] * 3] * 2
    tasks = ["greek <i>", "n$ko", "vai"]
    return {
        "name": "unlearning <1>", "data": "glyphs <i>", "backbone": "ViT <u>", "runs": ["run-<b>0", "run-1"],
        "tasks": [tasks, tasks[::-1]], "seconds": 321.4, "methods": {"ita-<b>lora": method, "iel-$x_{$": other},
    }  # fmt: skip


MEASURED = {"merging": measured_merging, "unlearning": measured_unlearning}


@pytest.fixture
def merging():
    return measured_merging()


@pytest.fixture
def unlearning():
    return measured_unlearning()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return {kind: getattr(report, kind)(folder / kind, make()) for kind, make in MEASURED.items()}


@pytest.mark.parametrize("values, places, text", [
    ([1.0, 2.0, 6.0], 1, "3.0 ± 2.6"),  # sqrt((4 + 1 + 9) / 2)
    ([0.5], 2, "0.50"), ([1.0, np.nan], 1, "–"), ([-1.0, -3.0], 0, "−2 ± 1"),
])  # fmt: skip
def test_mean_and_standard_deviation(values, places, text):
    assert spread(np.array(values), places).replace("\u00a0", " ") == text


def test_merging_page(paths):
    page = Page(paths["merging"])
    assert not page.open
    assert page.tags.count("svg") == page.tags.count("figcaption") == 1 + 2 * 2
    for row in (
        ["each module alone", "80.0 ± 14.1", "–", "100.0 ± 0.0", "–", "–"],  # 0.9 and 0.7
        ["base, no module", "30.0 ± 7.1", "–", "37.5 ± 0.0", "–", "–"],  # 0.35 and 0.25; (1/4 + 1/2) / 2 twice
        ["average", "65.0 ± 7.1", "32.5 ± 3.5", "85.0 ± 7.1", "1.5 ± 0.7", "3.2"],  # 0.7 and 0.6
        ["_best <b> †", "72.5 ± 10.6", "36.2 ± 5.3", "96.0 ± 2.8", "0.012 ± 0.001", "–"],  # 0.8 and 0.65
        ["ggn", "–", "–", "–", "160 ± 14", "3.3"],
        ["_best <b>", "72.5 ± 10.6", "36.2 ± 5.3", "60.0 ± 14.1", "0.012 ± 0.001", "–"],  # told nothing there
        ["average", "85.0 ± 7.1", "85.0 ± 7.1"], ["ggn", "–", "–"],  # of the first figure
        ["_best <b>", "0.012 ± 0.001", "–", "damping <s>0.001"], ["kronecker", "20 ± 0"],
        ["_best <b>", "100.0", "80.0"], ["ggn", "12.5", "20.0"], ["base, no module", "25.0", "50.0"],
    ):  # fmt: skip
        assert row in page.rows, row
    assert ["average", "100.0", "60.0"] in page.rows  # 0.8 / 0.8 and 0.6 / 1.0 of the first run
    numbers = re.search(r"best normalised accuracy(.*?)whole comparison\s+(\S+)", page.text, re.DOTALL)
    for number in (": _best <b> on none-<b>lora", "96.0", "72.5", "36.2", "80.0", "1,064"):
        assert number in numbers[1]
    assert numbers[2] == "1,234"
    # the same warning of the same rule once, with both runs
    assert page.text.count("residual <u>0.04</u>") == 1
    assert "† _best <b> on none-<b>lora (run run-<b>0, run-1): residual <u>0.04</u>" in page.text


def test_the_best_rule_of_a_column_is_bold_in_each_pool(paths):
    text = paths["merging"].read_text(encoding="utf-8").replace("\u00a0", " ")
    best = ["72.5 ± 10.6", "36.2 ± 5.3", "96.0 ± 2.8", "0.012 ± 0.001"]
    # the second pool has but one rule whose memory is known, and there it's the average that has the best normalised
    expected = ["3.2", *best, "85.0 ± 7.1", *best[:2], best[3]]
    assert re.findall(r"<strong>([^<]*)</strong>", text) == expected


def test_unlearning_page(paths):
    page = Page(paths["unlearning"])
    assert not page.open
    assert page.tags.count("svg") == page.tags.count("figcaption") == 1 + 2
    cells = ["75.0 ± 7.1", "85.0 ± 7.1", "25.0 ± 7.1", "30.0 ± 14.1", "75.0 ± 7.1", "10.0 ± 0.0", "60.0 ± 0.0"]
    assert ["ita-<b>lora", *cells, "20.0 ± 0.0"] in page.rows
    assert ["iel-$x_{$", *cells[:3], "0.0 ± 0.0", "0.0 ± 0.0", *cells[5:], "20.0 ± 0.0"] in page.rows
    assert ["greek <i>", "−50.0", "0.0", "0.0"] in page.rows
    assert ["n$ko", "−60.0", "+10.0", "−20.0"] in page.rows
    assert re.search(r"unlearned: iel-\$x_\{\$\s+−75\.0\s+points", page.text)
    assert re.search(r"when unlearning: ita-<b>lora\s+0\.0\s+points", page.text)
    assert re.search(r"and of its task\s+−45\.0\s+points", page.text)


@pytest.mark.parametrize("kind", MEASURED)
def test_pages_need_nothing_else_and_escape_names(tmp_path, paths, kind):
    page = Page(paths[kind])
    assert not {"script", "link", "iframe", "object", "b", "i", "u", "s"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert all(value.startswith(("#", "data:image/png")) for value in sources)
    text = paths[kind].read_text(encoding="utf-8")
    assert shared.INK not in text
    for words in (f"{kind} <1>", "glyphs <i>", "ViT <u>", "greek <i>"):
        assert words in page.text
    assert getattr(report, kind)(tmp_path, MEASURED[kind]()).read_bytes() == paths[kind].read_bytes()


def test_the_smallest_pages(tmp_path, merging, unlearning):
    merging["runs"], merging["tasks"] = merging["runs"][:1], TASKS[:1]
    pool = merging["pools"]["none-<b>lora"]
    for part in (pool, pool["rules"]["average"]):
        part |= {key: value[:1] for key, value in part.items() if isinstance(value, list)}
    merging["pools"] = {"one": pool | {"rules": {"average": pool["rules"]["average"]}}}
    page = Page(report.merging(tmp_path, merging))
    assert ["average", "70.0", "35.0", "90.0", "1.0", "3.2"] in page.rows
    assert "strong" not in page.tags
    assert "±" not in page.text
    assert "†" not in page.text
    for key in ("runs", "tasks"):
        unlearning[key] = unlearning[key][:1]
    unlearning["methods"] = {
        "one": {key: runs[:1] for key, runs in unlearning["methods"]["ita-<b>lora"].items()}
    }  # fmt: skip
    page = Page(report.unlearning(tmp_path, unlearning))
    assert ["one", "70.0", "80.0", "30.0", "20.0", "70.0", "10.0", "60.0", "20.0"] in page.rows


def test_terminal_tables(merging, unlearning):
    rows, _ = printed(report.merging_table(merging))
    assert rows[0] == ["none-<b>lora", "", "", "", "", ""]
    assert ["_best <b> †", "72.5 ±10.6", "36.2 ±5.3", "96.0 ±2.8", "0.012", "–"] in rows
    assert ["average", "65.0 ±7.1", "32.5 ±3.5", "85.0 ±7.1", "1.5", "3.2"] in rows
    table = report.merging_table(merging)
    bold = [text.plain for column in table.columns[1:] for text in column.cells if text and text.style == "bold"]
    assert bold == ["72.5 ±10.6"] * 2 + ["36.2 ±5.3"] * 2 + ["96.0 ±2.8", "85.0 ±7.1"] + ["0.012"] * 2 + ["3.2"]
    rows, text = printed(report.unlearning_table(unlearning))
    assert rows[0] == ["ita-<b>lora", "75.0", "85.0", "25.0", "30.0", "75.0", "10.0", "60.0", "20.0"]
    assert rows[1] == ["", "±7.1", "±7.1", "±7.1", "±14.1", "±7.1", "±0.0", "±0.0", "±0.0"]
    assert "3 tasks of glyphs <i>" in text


def test_dots_of_normalised_accuracy():
    found = {
        "a": {"low": np.array([0.2, 0.4]), "high": np.array([0.9, 1.0]), "unknown": np.array([np.nan, 0.1])},
        "_$b": {"low": np.array([0.5, 0.5])},
    }
    figure = merging_figures.normalised(found, {"a": np.array([0.1, 0.3]), "_$b": np.array([0.2, 0.2])}, ["low"])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "low †", "unknown"]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["mean 0"].get_xdata(), [95, 30, np.nan])
    np.testing.assert_allclose(lines["mean 0"].get_ydata(), [-0.16, 0.84, 1.84])
    np.testing.assert_allclose(lines["runs 0"].get_xdata(), [90, 100, 20, 40, np.nan, 10])
    np.testing.assert_allclose(lines["mean 1"].get_xydata(), [[50, 1.16]])
    assert lines["mean 0"].get_marker() != lines["mean 1"].get_marker()
    vertical = {to_hex(line.get_color()): line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1
                and line.get_marker() == "None"}  # fmt: skip
    assert vertical == {shared.INK: 100, shared.COLOURS[0]: 20, shared.COLOURS[1]: 20}
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["a", "_$b", "each module alone", "the base, without a module"]


def test_accuracy_over_time():
    found = {f"rule {i}": (10.0**i, 0.9 - 0.001 * i) for i in range(14)} | {"lost": (np.nan, 0.5)}
    figure = merging_figures.over_time("_p$_{$", found, 0.95, ["rule 3"])
    figure.canvas.draw()
    (axes,) = figure.axes
    points, line = axes.lines
    np.testing.assert_allclose(points.get_xydata(), [[10.0**i, 90 - 0.1 * i] for i in reversed(range(14))])
    assert line.get_ydata()[0] == 95
    assert axes.get_xscale() == "log"
    names = [text for text in axes.texts if text.get_text().startswith("rule")]
    assert {text.get_text() for text in names} == {f"rule {i}" + " †" * (i == 3) for i in range(14)}
    # the boxes of texts include their leader lines: their places are compared instead, by a line of 8 points
    places = np.sort([text.xyann[1] for text in names]) * axes.get_window_extent().height * 72 / figure.dpi
    assert np.diff(places).min() > 8


@pytest.mark.parametrize("tasks, numbers", [(2, 5), (20, 0)])
def test_heat_map_of_rules_and_tasks(tasks, numbers):
    values = np.full((3, tasks), 0.5)
    values[1, 1] = np.nan
    axes, bar = merging_figures.by_task("p", values, ["a", "b", "c"], ["t"] * tasks, (20.0, 100.0)).axes
    image = axes.images[0].get_array()
    assert image.shape == (3, tasks)
    np.testing.assert_array_equal(image.filled(np.nan), 100 * values)
    assert len(axes.texts) == numbers
    assert bar.get_ylabel() == "normalised accuracy (%)"


def test_from_all_modules_to_some(unlearning):
    parts = {
        "all": {"all": np.array([0.7, 0.8])},
        "unlearn": {"target": np.array([0.2, 0.4]), "control": np.array([0.7, 0.7])},
        "subtract": {"target": np.array([0.1, 0.1]), "control": np.array([0.6, np.nan])},
    }  # fmt: skip
    frozen = {"a": np.array([0.1, 0.3]), "b": np.array([0.2, 0.2])}
    unlearn, subtract = unlearning_figures.changes({"a": parts, "b": parts}, frozen).axes
    assert (unlearn.get_title(loc="left"), subtract.get_title(loc="left")) == ("unlearn", "subtract")
    assert [label.get_text() for label in unlearn.get_yticklabels()] == ["a", "b"]
    lines = {line.get_label(): line for line in unlearn.lines}
    for i in (0, 1):
        np.testing.assert_allclose(lines[f"all {i}"].get_xdata(), [75, 75])
        np.testing.assert_allclose(lines[f"frozen {i}"].get_xdata(), [20, 20])
        np.testing.assert_allclose(lines[f"target {i}"].get_xydata(), [[30, i - 0.17]])
        np.testing.assert_allclose(lines[f"control {i}"].get_xydata(), [[70, i + 0.17]])
        np.testing.assert_allclose(lines[f"runs target {i}"].get_xdata(), [20, 40])
    paths = [line.get_xdata() for line in unlearn.lines if line.get_label().startswith("_")]
    np.testing.assert_allclose(paths, [[75, 30], [75, 70]] * 2)


@pytest.mark.parametrize("tasks, lines, numbers", [(3, 1, 8), (10, 1, 0), (20, 2, 0)])
def test_maps_of_changes(tasks, lines, numbers):
    change = np.full((tasks, tasks), -0.1)
    change[0, 1] = np.nan
    figure = unlearning_figures.change_maps("$m_{$", {"unlearn": change, "specialise": -change}, ["t"] * tasks, 40.0)
    *panels, _ = figure.axes
    assert len(panels) == 2
    assert panels[0].get_subplotspec().get_gridspec().nrows == lines
    for axes, sign in zip(panels, (1, -1), strict=True):
        image = axes.images[0]
        assert image.get_array().shape == (tasks, tasks)
        np.testing.assert_allclose(image.get_array().filled(np.nan), 100 * sign * change)
        assert image.get_clim() == (-40, 40)
        assert [text.get_text() for text in axes.texts] == ["−10" if sign > 0 else "+10"] * numbers


POOL = ("pools", "none-<b>lora")


@pytest.mark.parametrize("kind, path, named", [
    ("merging", ("images",), "images"),
    ("merging", (*POOL, "base"), "pools.none-<b>lora.base"),
    ("merging", (*POOL, "rules", "ggn", "told"), "pools.none-<b>lora.rules.ggn.told"),
    ("merging", (*POOL, "curvature_seconds", 1, "kronecker"), "pools.none-<b>lora.curvature_seconds.1.kronecker"),
    ("unlearning", ("methods",), "methods"),
    ("unlearning", ("methods", "iel-$x_{$", "subtract"), "methods.iel-$x_{$.subtract"),
])  # fmt: skip
def test_metrics_that_lack_something(tmp_path, kind, path, named):
    wrong = part = copy.deepcopy(MEASURED[kind]())
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    for function in (lambda m: getattr(report, kind)(tmp_path / "new", m), getattr(report, f"{kind}_table")):
        with pytest.raises(KeyError, match=rf"the metrics lack {re.escape(named)}: they may be of another kind of run"):
            function(wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, path, value, match", [
    ("merging", ("pools",), {}, "no pool, or a pool without rules: the run may not have finished"),
    ("merging", (*POOL, "rules"), {}, "a pool without rules"),
    ("merging", ("runs",), [], "name 0 runs"),
    ("merging", ("tasks",), [["a", "b"]], "name 2 runs, and in `tasks` there are 1 lists"),
    ("merging", ("tasks",), [["a"], ["a"]], r"of \[1, 1\] tasks: they need"),
    ("merging", (*POOL, "individual"), [[0.8, 1.0]], r"individual in the metrics has 1 entries and must have one for"),
    ("merging", (*POOL, "base", 1), [0.8], r"base.1 in the metrics has shape \(1,\) and must have \(2,\), tasks"),
    ("merging", (*POOL, "base", 1), [[0.8], [0.1, 0.2]], "base.1 in the metrics is no array of tasks"),
    ("merging", (*POOL, "rules", "ggn", "seconds"), [1.0] * 3, "seconds in the metrics has 3 entries"),
    ("merging", (*POOL, "rules", "ggn", "within"), None, "within in the metrics has no list"),
    ("merging", (*POOL, "rules", "ggn", "told"), [], "told in the metrics has 0 lists of warnings for 2 runs"),
    ("merging", (*POOL, "rules", "ggn", "memory"), "much", "memory in the metrics is no array of one number"),
    ("merging", (*POOL, "curvature_seconds"), [], "curvature_seconds in the metrics has 0 entries for 2 runs"),
    ("unlearning", ("methods",), {}, "the metrics have no method: the run may not have finished"),
    ("unlearning", ("methods", "iel-$x_{$", "all", 0), [0.1], r"all.0 in the metrics has shape \(1,\)"),
    ("unlearning", ("methods", "iel-$x_{$", "unlearn", 1), [[0.1] * 3] * 2,
     r"unlearn.1 in the metrics has shape \(2, 3\) and must have \(3, 3\), tasks by tasks"),
])  # fmt: skip
def test_metrics_that_do_not_fit(tmp_path, kind, path, value, match):
    wrong = part = copy.deepcopy(MEASURED[kind]())
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    for function in (lambda m: getattr(report, kind)(tmp_path / "new", m), getattr(report, f"{kind}_table")):
        with pytest.raises(ValueError, match=match):
            function(wrong)
    assert not list(tmp_path.iterdir())


def test_nothing_known(tmp_path, merging, unlearning):
    """Everything None is a page of dashes."""

    def emptied(value):
        return [emptied(v) for v in value] if isinstance(value, list) else None

    for pool in merging["pools"].values():
        pool |= {key: emptied(pool[key]) for key in ("individual", "base")}
        for found in pool["rules"].values():
            found |= {key: emptied(found[key]) for key in ("within", "incremental", "normalised", "seconds")}
    page = Page(report.merging(tmp_path, merging))
    assert ["average", "–", "–", "–", "–", "3.2"] in page.rows
    for method in unlearning["methods"].values():
        method |= {key: emptied(value) for key, value in method.items()}
    page = Page(report.unlearning(tmp_path, unlearning))
    assert ["iel-$x_{$", *["–"] * 8] in page.rows
