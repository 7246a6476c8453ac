"""The report of a check of curvature: every number, read back from what was drawn and written."""

import json
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from pages import PlainPage as Page
from pages import printed

from compo_jax import report
from compo_jax.curvature.check_results import (
    CurvatureResults,
    Expansion,
    FisherCheck,
    FisherEstimate,
    ForecastCheck,
    ProductCheck,
    SpectrumCheck,
    Theorem,
)
from compo_jax.report import charts
from compo_jax.report import curvature as figures
from compo_jax.train import read_result, write_result

ESTIMATES = {"first <i>kind</i>": (1, 8), "[red]second": (1, 8), "third $x_{$": (8,)}
UNIFORM = "the uniform <u>composition</u>"


def anchor(shift, error, gain_error):
    return Expansion(
        forecast=np.array([2.0, 2.1, 2.3]) + shift, correlation=0.5 - shift, relative_error=error,
        standard_error=0.0531, remainder_loss=np.array([0.1, 0.2]), remainder_slope=np.array([1.0, 2.0]),
        gram_eigenvalues=np.array([-0.061 + shift, 0.77]), best_weights=np.array([0.17, 0.83]),
        best_forecast=1.812 + shift, best_true=1.984 + shift, gain_error=gain_error,
    )  # fmt: skip


def pool(shift=0.0):
    """Around the base the best weights are worse than uniform ones, around the uniform composition they are better."""
    individual, composed = np.array([2.5, 2.3 + shift, 2.2]), np.array([2.5, 2.1, 1.9 - shift])
    anchors = {"the base": anchor(shift, 0.1234, 0.1), UNIFORM: anchor(-0.46 + shift, 0.00456, 0.2 if shift else 0.3)}
    gap = np.array([0.0, 0.15, 0.6])
    theorem = Theorem(np.array([0.0, 0.125, 1.5]), individual, composed, gap, individual - composed)
    return ForecastCheck(np.array([2.05, 2.2, 2.25]), 1.975, anchors, theorem)


@pytest.fixture
def results():
    rows = [
        FisherEstimate(
            name, size, seconds=0.111 * 40**i + size / 100, trace_ratio=0.705 + i + size / 100,
            diagonal_cosine=0.961 - i / 10, form_ratio=0.0041 * 10**i, form_error=0.99, product_cosine=0.241 + i / 10,
        )
        for i, (name, sizes) in enumerate(ESTIMATES.items()) for size in sizes
    ]  # fmt: skip
    return CurvatureResults(
        name="check <1> & $x_{$", data="glyphs <i>", backbone="ViT <u>96x4", seed=5, tasks=["greek", "<b>nko</b>"],
        images=1320,
        products=ProductCheck("blocks/bias", 1384, 2.5e-15, 1.3e-6, 5.6e-15, np.array([1.0, 1e-2, 1e-5]),
                              np.array([1e-2, 1e-6, 3e-8])),
        fisher=FisherCheck(128, 40, 442368, rows), forecast={"ita-<b>lora</b>": pool(), "none-lora": pool(0.01)},
        spectrum=SpectrumCheck(128, 442368, np.array([-4.78, -0.5, 0.0017, 33.6]), np.array([6e-6, 0.004, 0.99, 0.006]),
                               -4.7787, 0.0026, 33.55, 0.406),
        seconds=235.4,
    )  # fmt: skip


def test_the_page_holds_every_number_and_every_figure(tmp_path, results):
    page = Page(report.curvature_page(tmp_path, results))
    assert page.tags.count("svg") == page.tags.count("figcaption") == 6
    text = " ".join(page.text.split())
    for words in (  # the tiles are of the first pool around its last anchor
        "error of a Hessian product, float64 2.5·10⁻¹⁵", f"ita-<b>lora</b> around {UNIFORM} 0.960", "forecast 0.46 %",
        "smallest eigenvalue at the base −4.78", "whole check 235 s", "seed: 5", "means over 1,320 test images",
        "−4.779 (to within 0.0026), the largest 33.55, and 40.6 %", "1,384 dimensions", "blocks/bias",
    ):  # fmt: skip
        assert words in text, words
    for row in (
        ["ita-<b>lora</b>", "the base", "0.500", "12", "1.812", "1.984", "1.975"],
        ["ita-<b>lora</b>", UNIFORM, "0.960", "0.46", "1.352", "1.524", "1.975"],
        ["none-lora", "the base", "0.490", "12", "1.822", "1.994", "1.975"],
        ["ita-<b>lora</b>", "the base", "0.5000", "12", "0.053", "−0.061 to 0.77"],
        ["none-lora", UNIFORM, "0.9500", "0.46", "0.053", "−0.51 to 0.77"],
        ["ita-<b>lora</b>", "the base", "0.17", "0.83"],
        ["0.125", "2.300", "2.100", "0.200", "0.150"], ["0.125", "2.310", "2.100", "0.210", "0.150"],
        ["first <i>kind</i>", "8", "0.785", "0.961", "0.0041", "0.241", "0.19"],
        ["third $x_{$", "8", "2.785", "0.761", "0.41", "0.441", "178"],
        ["−4.780", "6.0·10⁻⁶"], ["1.0·10⁻⁵", "3.0·10⁻⁸"],
    ):  # fmt: skip
        assert row in page.rows, row


def test_best_weights_are_bold_where_they_beat_uniform_ones_by_more_than_the_error_bars(results):
    table = report.forecast_table(results.forecast)
    # 1.975 - 1.534 is more than twice 0.2, and 1.975 - 1.524 less than twice 0.3
    assert [cell.text for row in table.cells for cell in row if cell.strong] == ["1.534"]


def test_tables_for_the_terminal(results):
    rows, text = printed(report.fisher_table(results.fisher).rich())
    assert ["[red]second", "1", "1.715", "0.861", "0.041", "0.341", "4.5"] in rows
    assert "128 images, 40 classes" in text
    rows, _ = printed(report.forecast_table(results.forecast).rich())
    assert any(row[0] == "none-lora" and row[2:] == ["0.950", "0.46", "1.362", "1.534", "1.975"] for row in rows)


def test_numbers_that_are_not_known_are_dashes(tmp_path, results):
    check = pool()
    base = check.anchors["the base"]._replace(forecast=np.array([2.0, np.nan, np.nan]), standard_error=None)
    check.anchors["the base"] = base  # one batch has no sampling error
    page = Page(report.curvature_page(tmp_path, results._replace(forecast={"ita-lora": check})))
    assert page.tags.count("svg") == 6
    assert ["ita-lora", "the base", "0.5000", "12", "–", "−0.061 to 0.77"] in page.rows
    assert "none-lora" not in page.text


def test_differences_beside_exact_products(results):
    axes = figures.differences(results).axes[0]
    curve, double, single = axes.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[1, 1e-2], [1e-2, 1e-6], [1e-5, 3e-8]])
    assert [line.get_ydata()[0] for line in (double, single)] == [2.5e-15, 1.3e-6]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_estimates_are_larger_dots_for_larger_batches(results):
    left, right = figures.estimates("title", results.fisher, ("trace_ratio", "form_ratio")).axes
    small, large = (line for line in left.lines if line.get_marker() == "o")
    np.testing.assert_allclose(small.get_xydata(), [[0.715, 0], [1.715, 1]])
    np.testing.assert_allclose(large.get_xydata(), [[0.785, 0], [1.785, 1], [2.785, 2]])
    assert small.get_markersize() < large.get_markersize()
    assert (left.get_xscale(), right.get_xscale()) == ("linear", "log")  # factors of 4 and of 100
    rows = [results.fisher.rows[0]._replace(form_ratio=x) for x in (-0.1, 0.001, 1.0)]
    (axes,) = figures.estimates("title", results.fisher._replace(rows=rows), ("form_ratio",)).axes
    assert axes.get_xscale() == "linear" and axes.get_xlim()[0] < -0.1


def test_forecasts_against_the_truth(results):
    panels = figures.forecasts(results.forecast).axes
    drawn = [(check, name, found) for check in results.forecast.values() for name, found in check.anchors.items()]
    for axes, (check, name, found) in zip(panels, drawn, strict=True):
        diagonal, dots, best = axes.lines
        np.testing.assert_array_equal(dots.get_xydata(), np.stack([found.forecast, check.true], axis=1))
        np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
        np.testing.assert_array_equal(best.get_xydata(), [[found.best_forecast, found.best_true]])
        assert axes.get_xlim() == axes.get_ylim()
        everything = [*found.forecast, *check.true, found.best_forecast, found.best_true]
        assert axes.get_xlim()[0] < min(everything) < max(everything) < axes.get_xlim()[1]
        assert axes.get_title(loc="left").startswith(f"around {name[:27]}")
    assert "correlation 0.500, error 12 %" in panels[0].get_title(loc="left")
    assert panels[2].get_ylabel().startswith("none-lora")


def test_the_theorem_beside_what_is_measured(results):
    left, right = figures.theorem({"one": results.forecast["none-lora"]}).axes
    single, composed, theory = left.lines
    for line, expected in ((single, [2.5, 2.31, 2.2]), (composed, [2.5, 2.1, 1.89]), (theory, [2.5, 2.16, 1.6])):
        np.testing.assert_array_equal(line.get_xdata(), [0, 0.125, 1.5])
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
    measured, forecast = right.lines
    np.testing.assert_allclose(measured.get_ydata(), [0, 0.21, 0.31], rtol=1e-12)
    np.testing.assert_array_equal(forecast.get_ydata(), [0, 0.15, 0.6])
    assert theory.get_linestyle() == forecast.get_linestyle() == "--"
    assert right.get_title(loc="left").endswith("−0.051")


def test_the_negative_part_of_the_spectrum_has_its_own_colour(results):
    axes = figures.spectrum(results).axes[0]
    negative, positive, zero = axes.lines
    np.testing.assert_array_equal(negative.get_xydata(), [[-4.78, 6e-6], [-0.5, 0.004]])
    np.testing.assert_array_equal(positive.get_xydata(), [[0.0017, 0.99], [33.6, 0.006]])
    assert (to_hex(negative.get_color()), to_hex(positive.get_color())) == (charts.COLOURS[5], charts.COLOURS[0])
    assert zero.get_xdata()[0] == 0
    assert (axes.get_xscale(), axes.get_yscale()) == ("symlog", "log")
    assert axes.get_ylim()[0] < 6e-6
    # a weight that underflowed has no logarithm, and no stem
    weights = np.array([0.0, 0.004, 0.99, 0.006])
    underflowed = results._replace(spectrum=results.spectrum._replace(weights=weights))
    np.testing.assert_array_equal(figures.spectrum(underflowed).axes[0].lines[0].get_xydata(), [[-0.5, 0.004]])


@pytest.mark.parametrize("path, named", [
    (("spectrum",), "spectrum is missing"),
    (("products", "error_float32"), "error_float32 is missing"),
    (("fisher", "rows", 3, "form_ratio"), "form_ratio is missing"),
    (("forecast", "none-lora", "anchors", "the base", "best_true"), "best_true is missing"),
])  # fmt: skip
def test_results_that_lack_something_are_refused(tmp_path, results, path, named):
    file = tmp_path / "metrics.json"
    write_result(file, results)
    assert read_result(file, CurvatureResults).products.leaf == "blocks/bias"
    part = stored = json.loads(file.read_text())
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=re.escape(named)):
        read_result(file, CurvatureResults)
