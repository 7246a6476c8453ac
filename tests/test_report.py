"""What reports are made of: numbers as text, tables, which number is the best, charts, and the page."""

import io
import itertools
import re

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from pages import Page, printed
from rich.console import Console

from compo_jax.report import Block, Cell, Table, Tile, charts, page, write_page
from compo_jax.report.charts import Bars, Curve, Dots, Picture, Point
from compo_jax.report.table import binomial_error, clear_best, column, mean_error, run_facts, score
from compo_jax.report.text import counted, middle, short, signed, significant, spread, with_error

ODD = "<b>nko</b> & $x_{$"  # markup, and what matplotlib would take for a formula


# -- text ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value, digits, text", [
    (0.0, 2, "0.0"), (1.0, 3, "1.00"), (17.36, 2, "17"), (-0.0508, 2, "−0.051"), (178.0, 2, "178"), (99.7, 2, "100"),
    (12345.6, 2, "12,346"), (-2.52e-15, 2, "−2.5·10⁻¹⁵"), (3e12, 1, "3·10¹²"), (None, 2, "–"), (float("nan"), 2, "–"),
])  # fmt: skip
def test_numbers_have_significant_digits(value, digits, text):
    assert significant(value, digits) == text


@pytest.mark.parametrize("values, places, text", [
    ([1.0, 2.0, 6.0], 1, "3.0 ± 2.6"),  # sqrt((4 + 1 + 9) / 2)
    ([0.5], 2, "0.50"), ([1.0, np.nan], 1, "–"), ([-1.0, -3.0], 0, "−2 ± 1"),
])  # fmt: skip
def test_runs_are_a_mean_and_a_standard_deviation(values, places, text):
    assert spread(np.array(values), places).replace("\u00a0", " ") == text


def test_short_texts():
    assert [signed(x) for x in (0.123, -0.2, 0.0, np.nan)] == ["+12.3", "−20.0", "0.0", "–"]
    assert [counted(n, "task") for n in (1, 2000)] == ["1 task", "2,000 tasks"]
    assert (short("abcdef", 4), middle("abcdef", 5), short("abc", 3)) == ("abc…", "ab…ef", "abc")
    assert (with_error(1.0, None), with_error(None, 1.0)) == ("1.0", "–")


# -- tables ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("values, errors, largest, best", [
    ([50.0, 52.0, 40.0], [0.7, 0.7, 0.7], True, 1),  # two errors of the difference are 1.98
    ([50.0, 51.9, 40.0], [0.7, 0.7, 0.7], True, None),
    ([50.0, 52.0, 40.0], [0.7, 0.7, 0.7], False, 2),
    ([50.0, None, 40.0], [0.7, np.nan, 0.7], True, 0),  # what isn't there doesn't compete
    ([50.0, 90.0], [0.7, np.nan], True, None), ([50.0, 90.0], [None, None], True, None),  # no error bar, no winner
    ([50.0], [0.1], True, None), ([50.0, 50.0], [0.0, 0.0], True, None), ([], [], True, None),
])  # fmt: skip
def test_the_best_leads_by_more_than_the_error_bars(values, errors, largest, best):
    assert clear_best(values, errors, largest=largest) == best
    cells = column([str(x) for x in values], values, errors, largest=largest)
    assert [cell.strong for cell in cells] == [i == best for i in range(len(values))]


def test_errors_come_from_the_images_or_from_the_runs():
    np.testing.assert_allclose(binomial_error(0.8, 100), 0.04)
    assert binomial_error(1.0, 100) == pytest.approx(0.00705, rel=1e-2)  # a hundred images prove no perfection
    np.testing.assert_allclose(mean_error(np.array([3.0, 4.0, np.nan])), 2.5)
    one, two = score(np.array([0.8]), 100), score(np.array([0.7, 0.9]), 100)
    assert (one.text(), two.text()) == ("80.0\u00a0±\u00a04.0", "80.0\u00a0±\u00a014.1")
    np.testing.assert_allclose([one.error, two.error], [0.04, 0.1])
    facts = run_facts([3], [[320, 320]])
    assert (facts["seed"], facts["tested on"]) == ("3", "320 images of each task, 640 in all")
    assert "binomial" in facts["error bars"] and "over 2 runs" in run_facts([3, 4], [[2, 5]] * 2)["error bars"]


def test_a_table_of_the_terminal_shows_names_as_they_are_and_breaks_before_errors():
    long = ["accuracy on the tasks (%)"] * 6
    table = Table(f"[red]{ODD}", ["name", *long], [("[red]x", *[Cell("72.5\u00a0±\u00a010.6", True)] * 6)], ["note"])
    rows, text = printed(table.rich())
    first, second = rows[-2:]
    cells = [" ".join(cell).strip() for cell in zip(first, second, strict=True)]
    assert cells == ["[red]x", *["72.5 ±10.6"] * 6] and set(second) <= {"", "±10.6"}
    names = [row[0] for row in printed(Table("t", ["method", *long], [("hard-sharing-bn", *["1.0"] * 6)]).rich())[0]]
    assert names[-1] == "hard-sharing-bn"
    assert f"[red]{ODD}" in text and "note" in text and max(map(len, text.splitlines())) <= 80
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard", legacy_windows=False)
    console.print(Table("t", ["a", "b", "c"], [("x", Cell("1.0", True), "2.0")]).rich())
    assert re.findall(r"\x1b\[1m\s*([\d.]+)", console.file.getvalue()) == ["1.0"]


# -- charts ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def axes():
    return charts.styled(lambda: charts.figure(ODD, 3.0).add_subplot())()


def test_figures_leave_the_global_settings_alone_and_take_names_as_they_are():
    @charts.styled
    def made():
        figure = charts.figure(ODD, 2.0)
        charts.dots(figure.add_subplot(xlabel="x"), [ODD], {"a": Dots({ODD: np.ones(2)}, {"color": "red"})})
        charts.legend(figure, {f"_{ODD}": {"color": "red"}}, 1)
        return figure

    before = dict(mpl.rcParams)
    figure = made()
    figure.savefig(io.BytesIO())
    with mpl.rc_context({"text.color": "red", "axes.labelcolor": "red"}):
        assert made().axes[0].xaxis.label.get_color() == charts.INK
    assert dict(mpl.rcParams) == before
    assert figure.axes[0].get_yticklabels()[0].get_text() == ODD
    assert figure.legends[0].get_texts()[0].get_text() == f"_{ODD}"


def test_lines_have_bands_and_names_at_their_ends_that_stand_apart_in_order(axes):
    curves = {f"m{i}": Curve([1.0, 2.0], [50.0, 80 + i / 10], [1.0, 2.0]) for i in range(9)}
    axes.set(xlim=(1, 2), ylim=(40, 90))
    charts.lines(axes, curves, charts.looks(list(curves)), ends=True, bold=["m3"])
    axes.figure.canvas.draw()
    for line, (name, curve) in zip(axes.lines, curves.items(), strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xydata(), np.transpose(curve[:2]))
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (low, high) == (49, 82)
    labels = sorted(axes.texts, key=lambda text: text.xyann[1])
    assert [label.get_text() for label in labels] == list(curves)
    assert [label.get_text() for label in labels if label.get_fontweight() == "bold"] == ["m3"]
    places = np.array([label.xyann[1] for label in labels]) * axes.get_window_extent().height * 72 / axes.figure.dpi
    assert np.diff(places).min() > 8  # the labels' font has 8 points


def test_bars_stand_or_lie_with_their_errors(axes):
    kinds = {"a": Bars([1.0, 2.0], [0.5, np.nan]), "b": Bars([3.0, 4.0])}
    charts.bars(axes, ["x", "y"], kinds)
    assert [bar.get_height() for bar in axes.patches] == [1, 2, 3, 4]
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx([-0.2, 0.8, 0.2, 1.2])
    ends = axes.collections[0].get_segments()
    np.testing.assert_allclose(ends[0], [[-0.2, 0.5], [-0.2, 1.5]])
    lying = charts.figure("", 2.0).add_subplot()
    charts.bars(lying, ["x", "y"], {"": kinds["a"]}, lying=True)
    assert [bar.get_width() for bar in lying.patches] == [1, 2]
    assert lying.get_ylim() == (1.6, -0.6)  # the first on top


def test_dots_are_means_with_their_errors_over_runs(axes):
    runs = {"low": np.array([1.0, 3.0]), "high": np.array([9.0]), "unknown": np.array([np.nan, 1.0])}
    charts.dots(axes, ["high", "low", "unknown"], {"a": Dots(runs, {"color": "red"}, {"high": 0.5})})
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["runs of a"].get_xdata(), [1, 3, np.nan, 1])
    mean = next(line for line in axes.lines if line.get_markersize() == 6.5)
    np.testing.assert_array_equal(mean.get_xdata(), [9, 2, np.nan])
    segments = axes.collections[0].get_segments()
    np.testing.assert_allclose([segments[0][:, 0], segments[1][:, 0]], [[8.5, 9.5], [1, 3]])  # sqrt(2) / sqrt(2)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "low", "unknown"]


def test_points_that_are_not_finite_are_left_out(axes):
    points = {"a": Point(1.0, 2.0, 0.5), "b": Point(np.nan, 2.0), "c": Point(2.0, 3.0)}
    axes.set_ylim(0, 4)
    charts.scatter(axes, points, charts.looks(list(points)), named=True)
    assert sorted(text.get_text() for text in axes.texts) == ["a", "c"]
    drawn = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert drawn == [(1, 2), (2, 3)]


def test_a_heat_map_says_where_its_colours_begin_and_end(axes):
    values = np.array([[10.0, np.nan], [90.0, 50.0]])
    image = charts.heat(axes, values, (0.0, 100.0), ["a", "b"], ["c", "d"], texts="{:.0f}".format)
    charts.colour_bar(axes.figure, image, axes, "%")
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), values)
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "10", (0, 1): "90", (1, 1): "50"}
    ticks = axes.figure.axes[1].get_yticks()
    assert image.get_clim() == (0, 100) == (ticks[0], ticks[-1])


def test_a_logarithmic_axis_names_few_decades(axes):
    charts.log_axis(axes, "x", [0.2, 5.0, np.nan, 0.0], "{:g}".format)
    assert axes.get_xlim() == (0.1, 10)
    axes.figure.canvas.draw()
    assert {"0.2", "1", "5"} <= {label.get_text() for label in axes.get_xticklabels()}
    charts.log_axis(axes, "y", [1e-15, 1.0])
    assert len(axes.get_yticks()) <= 8


@pytest.mark.parametrize("most", [2e5, 5e5, 3.8e6, 1e9])
def test_the_texts_of_a_logarithmic_axis_do_not_touch_in_a_narrow_panel(most):
    figure = charts.figure("", 2.5)
    _, axes = figure.subplots(1, 2, width_ratios=(2, 1))
    charts.log_axis(axes, "x", [1.6e5, most], "{:.0e}".format)
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    shown = [text for x, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= x <= high]
    boxes = sorted((text.get_window_extent() for text in shown), key=lambda box: box.x0)
    assert boxes and all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


def test_wrong_images_have_a_red_frame_and_a_cross():
    pictures = [Picture(np.full((4, 5, 3), i, np.uint8), f"{i}", "below", i == 1) for i in range(3)]
    figure = charts.figure("", 2.0)
    charts.images(figure, pictures)
    for axes, picture in zip(figure.axes, pictures, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), picture.image)
        framed = all(s.get_visible() and to_hex(s.get_edgecolor()) == charts.WRONG for s in axes.spines.values())
        assert framed == bool(axes.lines) == picture.wrong
        assert (axes.get_title(), axes.get_xlabel()) == (picture.above, "below")


def test_looks_tell_controls_apart():
    looks = charts.looks(["a", "b", "control"], quiet=["control"])
    assert looks["a"]["color"] != looks["b"]["color"] and looks["a"]["marker"] != looks["b"]["marker"]
    assert (looks["control"]["color"], looks["control"]["linestyle"]) == (charts.GREY, "--")


@pytest.mark.parametrize("count, lines", [(1, 1), (3, 1), (4, 2), (5, 2)])
def test_panels_have_labels_at_the_outer_ones(count, lines):
    grid = charts.panels(charts.figure("", 3.0), count, "x", "y")
    assert len(grid) == count and charts.rows_of(count) == lines
    assert grid[0].get_ylabel() == "y" and grid[-1].get_xlabel() == "x"


# -- the page --------------------------------------------------------------------------------------------------------
@charts.styled
def drawn(title):
    figure = charts.figure(title, 2.0)
    charts.heat(figure.add_subplot(xlabel=ODD), np.eye(2), (0.0, 1.0), [ODD, "b"])
    return figure


def example():
    table = Table(f"table {ODD}", ["name", ODD], [(ODD, Cell("1.5", True)), ("other", "–")], [f"note {ODD}"])
    return page.Page(
        f"title {ODD}", f"lead {ODD}", {f"seed {ODD}": ODD},
        [Tile(f"label {ODD}", "85.0", "%"), Tile("none", "–", "%")], [table, table._replace(title="another")],
        (Block(drawn(f"figure {i} {ODD}"), f"caption {ODD}", [table][:i]) for i in range(2)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page") / "new", example())


def test_a_page_holds_all_that_it_is_given_with_names_escaped(path):
    assert path.parts[-2:] == ("new", "report.html")
    read = Page(path)
    assert not read.open
    assert not {"b", "i", "u"} & set(read.tags)
    assert read.tags.count("svg") == read.tags.count("figcaption") == 2
    assert read.tags.count("details") == 1 and read.tags.count("table") == 3
    for part in ("title", "lead", "seed", "label", "note", "caption", "table"):
        assert f"{part} {ODD}" in read.text
    assert "85.0  %" in read.text and "–  %" not in read.text
    assert read.rows == [["name", ODD], [ODD, "1.5"], ["other", "–"]] * 3
    assert re.findall(r"<strong>([^<]*)</strong>", path.read_text(encoding="utf-8")) == ["1.5"] * 3


def test_a_page_needs_nothing_else(path):
    read, text = Page(path), path.read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "object"} & set(read.tags)
    sources = [value for name, value in read.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert sources
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in sources)
    assert not re.search(r"url\((?!#)|@import", text)
    named = {value for name, value in read.attributes if name == "id"}
    assert {value[1:] for value in sources if value[0] == "#"} | set(re.findall(r"url\(#([^)]*)\)", text)) <= named
    assert charts.INK not in text  # the page's colour is in its place, for paper of any colour
    assert "currentColor" in text and "prefers-color-scheme: dark" in text


def test_the_same_results_give_the_same_page(path, tmp_path):
    assert write_page(tmp_path, example()).read_bytes() == path.read_bytes()


def test_a_figure_that_fails_leaves_no_page(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_page(tmp_path / "new", example()._replace(blocks=(1 / 0 for _ in range(1))))
    assert not list(tmp_path.iterdir())
