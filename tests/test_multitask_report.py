"""The report of several tasks learned at once: numbers against hand calculations, read back from what was written."""

import re

import jax
import modular_results
import numpy as np
import pytest
from pages import PlainPage as Page
from pages import printed

from compo_jax import report
from compo_jax.modular import beside_random
from compo_jax.modular.analysis import Removal
from compo_jax.modular.random_routes import route_numbers
from compo_jax.report import multitask, route_figures

ORDERED = "ordered-4"
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(report.multitask_page(tmp_path_factory.mktemp("page"), modular_results.multitask()))


def test_the_page(page):
    assert page.tags.count("svg") == page.tags.count("figcaption") == 10
    for row in (
        ["single-task", "75.0 ± 7.1", "1,000,000", "100.0", "37.9", "12 ± 3"],  # 0.8 and 0.7
        ["hard-sharing-bn", "70.0 ± 0.0", "−5.0 ± 5.0 (0/2, 1 tied)", "250,000", "25.0", "37.9", "12 ± 3"],
        ["random-4", "–", "0.0 (0/1, 1 tied)", "250,000", "25.0", "37.9", "12 ± 3"],  # the second seed alone is known
        [ORDERED, "85.0 ± 7.1", "+10.0 ± 0.0 (2/2)", "250,000", "25.0", "37.9", "12 ± 3"],  # 0.9 and 0.8
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
    text = page.text.replace("\u00a0", " ")
    for words in (
        f"{ORDERED} less random-4: +10.0 points. {ORDERED} less hard-sharing-bn: +15.0 ± 5.0 points.",
        "(other seeds 0.00)", "Nearest are n$ko and vai, 0.25;", "Largest nowhere: 3 (1 of 4;",
        "Beyond two deviations: templates 0.", "512 images of each task", "10 random routes",
        "linear at 1 times the learning rate, soft at 3 times",
        "5.0 % at ε = 0.1, 25 % at ε = 0.5, 50 % at ε = 1 of the true change",
    ):  # fmt: skip
        assert words in text, words
    assert re.search(rf"parts shared: {ORDERED}\s+85\.0 ± 7\.1", text)
    assert re.search(r"beats them\s+3 of 3", text)  # 0.95, 0.85, 0.75 against 0.9, 0.8, 0.55


def test_what_is_said_of_a_removed_template_is_of_the_routes_kind(tmp_path):
    results = modular_results.multitask()
    for route, told in (
        ("hard", "its layers take their next best; beside, as many places"),
        ("soft", "removed from all mixtures, whose other templates share its weight; beside, every layer loses one"),
    ):
        text = Page(
            report.multitask_page(tmp_path, results._replace(analysis=results.analysis._replace(route=route)))
        ).text
        assert told in text and ("Beyond two deviations" in text) == (route == "hard")


def test_a_forecast_of_no_change_has_an_infinite_error(tmp_path):
    results = modular_results.multitask()
    analysis = results.analysis
    rerouting = analysis.rerouting._replace(error=np.array([np.inf, np.nan, 0.5]))
    page = Page(report.multitask_page(tmp_path, results._replace(analysis=analysis._replace(rerouting=rerouting))))
    assert "∞ % at ε = 0.1, – % at ε = 0.5, 50 %" in page.text.replace("\u00a0", " ")


def test_the_terminal_table_leaves_out_the_seeds_won():
    _, text = printed(report.multitask_table(modular_results.multitask()).rich())
    assert "(2/2)" not in text and "1,000,000" in text


def one_seed(tasks, layers, templates):
    """The first tasks and layers of one seed."""
    results = modular_results.multitask()
    order = results.methods[ORDERED].order
    hard = np.minimum(order.hard[:1, :tasks, :1].repeat(layers, 2), templates - 1)
    gap = order.gap._make(points[:1, :tasks] for points in order.gap)
    curves = order.curves._make(records[:1] for records in order.curves)
    order = order._replace(hard=hard, weights=np.eye(templates)[hard], gap=gap, curves=curves)
    methods = {
        name: method._replace(accuracy=method.accuracy[:1, :tasks], seconds=method.seconds[:1], order=None)
        for name, method in results.methods.items()
    }
    methods[ORDERED] = methods[ORDERED]._replace(order=order)
    random = beside_random(np.eye(templates)[hard[0]], KEY, 5)
    analysis = results.analysis._replace(random=random, removal=None, removal_images=None, rerouting=None)
    job = results.job._replace(seeds=(0,))
    return results._replace(
        job=job, tasks=results.tasks[:tasks], classes=results.classes[:tasks], methods=methods, analysis=analysis
    )


@pytest.mark.parametrize("tasks, layers, templates, figures", [(1, 1, 1, 6), (2, 14, 1, 8)])
def test_small_pages(tmp_path, tasks, layers, templates, figures):
    page = Page(report.multitask_page(tmp_path, one_seed(tasks, layers, templates)))
    assert page.tags.count("svg") == figures
    first = {1: ["100.0 ± 0.6", "+10.0 (1/1)"], 2: ["90.0 ± 2.7", "+5.0 (1/1)"]}[tasks]  # against 90 and 85
    assert [ORDERED, *first, "250,000", "25.0", "37.9", "10"] in page.rows, page.rows


@pytest.mark.parametrize("names", [["hard-sharing-bn", "random-4"], ["single-task"]])
def test_any_subset_of_the_methods_without_an_analysis(tmp_path, names):
    results = modular_results.multitask()
    methods = {name: results.methods[name] for name in names}
    page = Page(report.multitask_page(tmp_path, results._replace(methods=methods, analysis=None)))
    assert page.tags.count("svg") == 2
    assert "single-task networks" not in page.text or "single-task" in names


def test_the_numbers_of_routes_and_what_random_ones_have():
    weights = np.eye(4)[modular_results.HARD]
    numbers = route_numbers(weights)
    np.testing.assert_allclose([numbers.distance, numbers.nearest, numbers.dead], [(0.5 + 0.75 + 0.25) / 3, 0.25, 1])
    np.testing.assert_allclose(numbers.usage, np.array([7, 3, 2, 0]) / 12)
    random = beside_random(weights, KEY, 20)
    assert random.draws == 20 and random.mean.similarity.shape == (4, 4)
    np.testing.assert_allclose(np.diag(random.above.similarity), 1)
    assert 0 <= random.mean.nearest <= random.mean.distance <= 1
    assert np.isnan(route_numbers(weights[:1]).distance)


def test_what_figures_draw():
    methods = modular_results.multitask().methods
    left, right = multitask.methods_figure(methods).axes
    np.testing.assert_allclose(left.lines[0].get_xdata(), 75)  # dashed
    assert [float(x) for x in right.lines[0].get_xdata()] == [1e6, 250_000, 250_000, 250_000]

    values = np.array([[0.2, -0.1], [np.nan, 0.001]])
    axes, bar = multitask.by_task_figure(values, ["a", "b"], ["t", "u"], np.array([0.5, 0.75])).axes
    assert [text.get_text() for text in axes.texts] == ["+20.0", "−10.0", "+0.1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["t  50.0", "u  75.0"]
    assert bar.get_ylim() == (-25, 25)

    lost = Removal(*(np.array([[x], [y]]) for x, y in ((0.1, 0.3), (0.1, 0.2), (np.nan, 0.05))))
    (axes,) = route_figures.removal(lost, [1, 0]).axes
    np.testing.assert_allclose(axes.containers[0][0].get_ydata(), [30, 10])
    # tasks 0 and 2 merge first, and stand together
    matrix = np.array([[0, 0.9, 0.1], [0.9, 0, 0.8], [0.1, 0.8, 0]])
    linkage = np.array([[0, 2, 0.1, 2], [1, 3, 0.85, 3]])
    above, axes, _ = route_figures.distances(matrix, linkage, ["a", "b", "c"]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a", "c"]
    np.testing.assert_allclose(axes.images[0].get_array()[0], [0, 0.9, 0.8])
    assert sorted(max(line.get_ydata()) for line in above.lines) == [0.1, 0.85]
