"""The report of a check of curvature: every number, read back from what was drawn and written."""

import copy
import io
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from pages import Page
from rich.console import Console

from compo_jax import report
from compo_jax.report import curvature_figures as figures
from compo_jax.report import figures as shared
from compo_jax.report.curvature import significant

ESTIMATES = {"first <i>kind</i>": (1, 8), "[red]second": (1, 8), "third $x_{$": (8,)}


def anchor(shift, error):
    return {
        "forecast": [2.0 + shift, 2.1 + shift, 2.3 + shift], "correlation": 0.5 - shift, "relative_error": error,
        "standard_error": 0.0531, "remainder_loss": [0.1, 0.2], "remainder_slope": [1.0, 2.0],
        "gram_eigenvalues": [-0.061 + shift, 0.2, 0.77], "best_weights": [0.17, 0.83], "best_forecast": 1.812 + shift,
        "best_true": 1.984 + shift,
    }  # fmt: skip


def pool(shift=0.0):
    individual, composed = [2.5, 2.3 + shift, 2.2], [2.5, 2.1, 1.9 - shift]
    return {
        "true": [2.05, 2.2, 2.25], "uniform_true": 1.975,
        "anchors": {
            "the base": anchor(shift, 0.1234), "the uniform <u>composition</u>": anchor(-0.46 + shift, 0.00456),
        },
        "theorem": {
            "scale": [0.0, 0.125, 1.5], "individual": individual, "composed": composed, "gap": [0.0, 0.15, 0.6],
            "measured_gap": [a - b for a, b in zip(individual, composed, strict=True)],
        },
    }  # fmt: skip


def measured():
    rows = [
        {"estimate": name, "batch": size, "seconds": 0.111 * 40**i + size / 100, "diagonal_cosine": 0.961 - i / 10,
         "trace_ratio": 0.705 + i + size / 100, "product_cosine": 0.241 + i / 10, "form_ratio": 0.0041 * 10**i,
         "form_error": 0.99}
        for i, (name, sizes) in enumerate(ESTIMATES.items()) for size in sizes
    ]  # fmt: skip
    return {
        "name": "check <1> & $x_{$", "data": "glyphs <i>", "backbone": "ViT <u>96x4", "tasks": ["greek", "<b>nko</b>"],
        "images": 1320, "seconds": 235.4,
        "products": {
            "leaf": "blocks/bias", "dimension": 1384, "error_float64": 2.5e-15, "error_float32": 1.3e-6,
            "asymmetry_of_dense": 5.6e-15, "difference_steps": [1.0, 1e-2, 1e-5],
            "difference_errors": [1e-2, 1e-6, 3e-8],
        },
        "fisher": {"images": 128, "classes": 40, "parameters": 442368, "rows": rows},
        "forecast": {"ita-<b>lora</b>": pool(), "none-lora": pool(0.01)},
        "spectrum": {
            "images": 128, "dimension": 442368, "nodes": [-4.78, -0.5, 0.0017, 33.6],
            "weights": [6e-6, 0.004, 0.99, 0.006], "smallest": [-4.7787, 0.0026],
            "largest": 33.55, "negative_mass": 0.406,
        },
    }  # fmt: skip


@pytest.fixture
def metrics():
    return measured()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return report.curvature(tmp_path_factory.mktemp("page") / "new", measured())


def test_the_page_holds_every_number_and_every_figure(path):
    assert path.parts[-2:] == ("new", "report.html")
    page = Page(path)
    assert not page.open
    assert page.tags.count("svg") == page.tags.count("figcaption") == 6
    # the key numbers: of the first pool around its last anchor
    values = re.search(r"error of a Hessian product(.*?)pool", page.text, re.DOTALL)[1]
    for number in ("2.5·10⁻¹⁵", "0.960", "0.46", "−4.78", "1,320", "235"):
        assert number in values
    for words in ("−4.779 (to within 0.0026), the largest 33.55, and 40.6 %", "1,384 dimensions", "blocks/bias"):
        assert words in page.text
    uniform = "the uniform <u>composition</u>"
    for row in (
        ["ita-<b>lora</b>", "the base", "1.812", "1.984", "1.975", "0.17", "0.83"],
        ["ita-<b>lora</b>", uniform, "1.352", "1.524", "1.975", "0.17", "0.83"],
        ["none-lora", "the base", "1.822", "1.994", "1.975", "0.17", "0.83"],
        ["ita-<b>lora</b>", "the base", "0.5000", "12", "0.053", "−0.061 to 0.77"],
        ["none-lora", uniform, "0.9500", "0.46", "0.053", "−0.51 to 0.77"],
        ["0.125", "2.300", "2.100", "0.200", "0.150"],
        ["0.125", "2.310", "2.100", "0.210", "0.150"],
        ["first <i>kind</i>", "8", "0.785", "0.961", "0.0041", "0.241", "0.19"],
        ["third $x_{$", "8", "2.785", "0.761", "0.41", "0.441", "178"],
        ["−4.780", "6.0·10⁻⁶"], ["1.0·10⁻⁵", "3.0·10⁻⁸"],
    ):  # fmt: skip
        assert row in page.rows, row


def test_best_weights_are_bold_where_they_beat_uniform_ones(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"<strong>([^<]*)</strong>", text) == ["1.524", "1.534"]


def test_the_page_needs_nothing_else(path):
    page = Page(path)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert sources
    assert all(value.startswith("#") for value in sources)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import", text)
    named = {value for name, value in page.attributes if name == "id"}
    assert {value[1:] for value in sources} | set(re.findall(r"url\(#([^)]*)\)", text)) <= named
    assert shared.INK not in text
    assert "prefers-color-scheme: dark" in text


def test_names_are_escaped(path):
    page = Page(path)
    assert not {"b", "i", "u"} & set(page.tags)
    for words in ("check <1> & $x_{$", "glyphs <i>", "<u>96x4", "<b>nko</b>", "ita-<b>lora</b>", "[red]second"):
        assert words in page.text


def test_the_same_check_gives_the_same_page(tmp_path, path, metrics):
    assert report.curvature(tmp_path, metrics).read_bytes() == path.read_bytes()


def test_one_pool_and_a_number_that_is_not_known(tmp_path, metrics):
    del metrics["forecast"]["none-lora"]
    base = metrics["forecast"]["ita-<b>lora</b>"]["anchors"]["the base"]
    base |= {"forecast": [2.0, None, float("nan")], "standard_error": float("nan")}  # one batch has no sampling error
    page = Page(report.curvature(tmp_path, metrics))
    assert page.tags.count("svg") == 6
    assert "–" in page.text
    assert "none-lora" not in page.text


def test_differences_beside_exact_products(metrics):
    axes = figures.differences(metrics["products"]).axes[0]
    curve, double, single = axes.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[1, 1e-2], [1e-2, 1e-6], [1e-5, 3e-8]])
    assert (double.get_ydata()[0], single.get_ydata()[0]) == (2.5e-15, 1.3e-6)
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_dots_of_estimates(metrics):
    rows = metrics["fisher"]["rows"]
    measures = [("trace_ratio", "a", 1.0), ("seconds", "b", None)]
    left, right = figures.estimates("title", rows, measures).axes
    assert [label.get_text() for label in left.get_yticklabels()] == list(ESTIMATES)
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first on top
    for axes, key in ((left, "trace_ratio"), (right, "seconds")):
        dots = {line.get_label(): line for line in axes.lines if line.get_marker() == "o"}
        assert set(dots) == {"batch of 1", "batch of 8"}
        for size in (1, 8):
            own = [[row[key], list(ESTIMATES).index(row["estimate"])] for row in rows if row["batch"] == size]
            np.testing.assert_array_equal(dots[f"batch of {size}"].get_xydata(), own)
        assert dots["batch of 1"].get_markersize() < dots["batch of 8"].get_markersize()
        assert dots["batch of 1"].get_zorder() > dots["batch of 8"].get_zorder()  # a ring, not hidden
    assert [line.get_xdata()[0] for line in left.lines if line.get_linestyle() == "--"] == [1]
    assert (left.get_xscale(), right.get_xscale()) == ("linear", "log")


def test_a_value_below_zero_keeps_its_axis_linear(metrics):
    rows = [dict(metrics["fisher"]["rows"][0], form_ratio=x) for x in (-0.1, 0.001, 1.0)]
    (axes,) = figures.estimates("title", rows, [("form_ratio", "a", 1.0)]).axes
    assert axes.get_xscale() == "linear"
    assert axes.get_xlim()[0] < -0.1


def test_forecasts_against_the_truth(metrics):
    panels = figures.forecasts(metrics["forecast"]).axes
    found = [(p, name, a) for p in metrics["forecast"].values() for name, a in p["anchors"].items()]
    for axes, (numbers, name, expansion) in zip(panels, found, strict=True):
        np.testing.assert_array_equal(
            axes.collections[0].get_offsets(), np.stack([expansion["forecast"], numbers["true"]], axis=1)
        )
        diagonal, best = axes.lines
        np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
        np.testing.assert_array_equal(best.get_xydata(), [[expansion["best_forecast"], expansion["best_true"]]])
        assert axes.get_xlim() == axes.get_ylim()
        low, high = axes.get_xlim()
        everything = [*expansion["forecast"], *numbers["true"], expansion["best_forecast"], expansion["best_true"]]
        assert low < min(everything) < max(everything) < high
        assert axes.get_title(loc="left").startswith(f"around {name[:27]}")
    assert "correlation 0.500, error 12 %" in panels[0].get_title(loc="left")
    assert "correlation 0.960, error 0.46 %" in panels[1].get_title(loc="left")
    assert panels[2].get_ylabel().startswith("none-lora")


def test_theorem(metrics):
    left, right = figures.theorem({"one": metrics["forecast"]["none-lora"]}).axes
    single, composed, theory = left.lines
    for line, expected in (
        (single, [2.5, 2.31, 2.2]), (composed, [2.5, 2.1, 1.89]), (theory, [2.5, 2.16, 1.6]),
    ):  # fmt: skip
        np.testing.assert_array_equal(line.get_xdata(), [0, 0.125, 1.5])
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
    measured, forecast = right.lines
    np.testing.assert_allclose(measured.get_ydata(), [0, 0.21, 0.31], rtol=1e-12)
    np.testing.assert_array_equal(forecast.get_ydata(), [0, 0.15, 0.6])
    assert theory.get_linestyle() == forecast.get_linestyle() == "--"
    assert right.get_title(loc="left").endswith("−0.051")


def test_the_negative_part_of_the_spectrum_has_its_own_colour(metrics):
    axes = figures.density(metrics["spectrum"]).axes[0]
    negative, positive, zero = axes.lines
    np.testing.assert_array_equal(negative.get_xydata(), [[-4.78, 6e-6], [-0.5, 0.004]])
    np.testing.assert_array_equal(positive.get_xydata(), [[0.0017, 0.99], [33.6, 0.006]])
    assert (to_hex(negative.get_color()), to_hex(positive.get_color())) == (figures.NEGATIVE, figures.POSITIVE)
    assert zero.get_xdata()[0] == 0
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "log")
    assert axes.get_ylim()[0] < 6e-6
    # a weight that underflowed has no logarithm, and no stem
    underflowed = metrics["spectrum"] | {"weights": [0.0, 0.004, 0.99, 0.006]}
    np.testing.assert_array_equal(figures.density(underflowed).axes[0].lines[0].get_xydata(), [[-0.5, 0.004]])


def printed(table):
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return [[c.strip() for c in line.split("│")[1:-1]] for line in lines if "│" in line], console.file.getvalue()


def test_terminal_tables(metrics):
    rows, text = printed(report.fisher_table(metrics["fisher"]))
    assert rows == [
        ["first <i>kind</i>", "1", "0.715", "0.961", "0.0041", "0.241", "0.12"],
        ["first <i>kind</i>", "8", "0.785", "0.961", "0.0041", "0.241", "0.19"],
        ["[red]second", "1", "1.715", "0.861", "0.041", "0.341", "4.5"],
        ["[red]second", "8", "1.785", "0.861", "0.041", "0.341", "4.5"],
        ["third $x_{$", "8", "2.785", "0.761", "0.41", "0.441", "178"],
    ]
    assert "128 images, 40 classes" in text
    metrics["forecast"]["ita-lora"] = metrics["forecast"].pop("ita-<b>lora</b>")
    rows, _ = printed(report.forecast_table(metrics["forecast"]))
    assert ["ita-lora", "the base", "0.500", "12", "1.812", "1.984", "1.975"] in rows
    assert any(
        row[:2] == ["none-lora", "the uniform"] and row[2:] == ["0.950", "0.46", "1.362", "1.534", "1.975"]
        for row in rows
    )


@pytest.mark.parametrize("value, digits, text", [
    (0.0, 2, "0.0"), (1.0, 3, "1.00"), (17.36, 2, "17"), (-0.0508, 2, "−0.051"), (178.0, 2, "178"), (99.7, 2, "100"),
    (12345.6, 2, "12,346"), (-2.52e-15, 2, "−2.5·10⁻¹⁵"), (3e12, 1, "3·10¹²"), (None, 2, "–"), (float("nan"), 2, "–"),
])  # fmt: skip
def test_numbers_as_text(value, digits, text):
    assert significant(value, digits) == text


@pytest.mark.parametrize("path, named", [
    (("spectrum",), "spectrum"),
    (("seconds",), "seconds"),
    (("products", "error_float32"), "products.error_float32"),
    (("fisher", "rows", 3, "form_ratio"), "fisher.rows.3.form_ratio"),
    (("forecast", "none-lora", "theorem"), "forecast.none-lora.theorem"),
    (("forecast", "none-lora", "theorem", "gap"), "forecast.none-lora.theorem.gap"),
    (("forecast", "none-lora", "anchors", "the base", "best_true"), "forecast.none-lora.anchors.the base.best_true"),
    (("spectrum", "nodes"), "spectrum.nodes"),
])  # fmt: skip
def test_metrics_that_lack_something(tmp_path, metrics, path, named):
    wrong = part = copy.deepcopy(metrics)
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    with pytest.raises(KeyError, match=rf"the metrics lack {re.escape(named)}: they may be of another kind of run"):
        report.curvature(tmp_path / "new", wrong)
    assert not list(tmp_path.iterdir())
    if path[0] in ("fisher", "forecast"):
        with pytest.raises(KeyError, match=re.escape(named)):
            getattr(report, f"{path[0]}_table")(wrong[path[0]])


@pytest.mark.parametrize("forecast", [{}, {"ita-lora": {"anchors": {}}}])
def test_no_forecast(tmp_path, metrics, forecast):
    with pytest.raises(KeyError, match="has no pool, or a pool without anchors"):
        report.curvature(tmp_path, metrics | {"forecast": forecast})
