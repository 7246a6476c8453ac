"""The reports on modular networks: numbers against hand calculations, read back from what was drawn and written."""

import jax
import modular_results
import numpy as np
import pytest
from modular_results import UNKNOWN
from pages import PlainPage as Page
from pages import printed

from compo_jax import report
from compo_jax.modular.comparison import paired
from compo_jax.modular.results import ReuseMethod, stacked
from compo_jax.report import adaptation, charts, modular_facts, reuse, route_figures, transfer
from compo_jax.train import read_result, write_result

KINDS = ("multitask", "transfer", "adaptation", "reuse")


def page_of(folder, kind, results):
    return Page(getattr(report, f"{kind}_page")(folder, results))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return {kind: page_of(folder / kind, kind, getattr(modular_results, kind)()) for kind in KINDS}


@pytest.mark.parametrize("values, reference, text", [
    ([0.5, 0.6, 0.6, 0.9], [0.4, 0.6, 0.5, 0.7], "+10.0 ± 4.1 (3/4, 1 tied)"),  # sqrt(0.02 / 3) / 2
    ([0.5, np.nan], [0.75, 0.1], "−25.0 (0/1)"), ([np.nan], [0.1], "–"),
    ([0.4999, 0.5], [0.5, 0.5], "0.0 ± 0.0 (0/2, 1 tied)"),
])  # fmt: skip
def test_paired_differences(values, reference, text):
    assert modular_facts.paired_text(paired(np.array(values), np.array(reference))).replace("\u00a0", " ") == text


@pytest.mark.parametrize("kind", KINDS)
def test_results_come_back_from_json(tmp_path, kind):
    results = getattr(modular_results, kind)()
    write_result(tmp_path / "metrics.json", results)
    back = read_result(tmp_path / "metrics.json", type(results))
    assert jax.tree.structure(back) == jax.tree.structure(results)
    for value, expected in zip(jax.tree.leaves(back), jax.tree.leaves(results), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_says_seeds_settings_test_images_and_error_bars(pages, kind):
    text = " ".join(pages[kind].text.split())
    assert f"seeds: {'0, 1' if kind == 'multitask' else '3, 4'}" in text
    for words in (
        "glyphs <i>", "basic <u> blocks of 8 channels", "40 steps of 32 images of each task at rate 0.001; hard routes",
        "at first the same in all tasks, at 3 times that rate, soft until then, hardening from 20% and fixed from 70%",
        "sample standard deviation over 2 runs",
        "± standard error over",
        f"tested on: {dict(zip(KINDS, ('40', '50 to 100', '20', '100'), strict=True))[kind]} images",
    ):  # fmt: skip
        assert words in text, words


def test_transfer_page(pages):
    page = pages["transfer"]
    assert page.tags.count("svg") == page.tags.count("figcaption") == 3
    for row in (
        ["head", "75.0 ± 7.1", "55.0 ± 7.1", "650", "651"],  # 0.7 and 0.8, 0.5 and 0.6
        ["head+route", "–", "65.0 ± 14.1", "714", "715"],
        ["_<s>untrained (control)", "20.0 ± 0.0", "10.0 ± 0.0", "714", "715"],
        ["head+route", "−3.3 ± 3.3 (0/3, 2 tied)", "+10.0 ± 4.1 (3/4, 1 tied)"],  # 0, -0.1 and 0 of what is known
        ["10 a class (%)", "a<b>", "b", "$c_{"],
        ["head", "40.0", "55.0 ± 7.1", "70.0"],  # b is new in both seeds
        ["its route starts from that of", "x", "<s>y, x", "x"],
    ):  # fmt: skip
        assert row in page.rows, row
    numbers = " ".join(page.text.split())
    for number in (
        "head alone, 10 a class 55.0 %", "head alone, all labels 75.0 %", "with its order, 10 a class +10.0",
        "with its order, all labels −3.3", "an order is 64 scalars", "tasks trained on 80.0 %", "over 4 pairs",
    ):  # fmt: skip
        assert number in numbers, number
    assert "from scratch overtakes" not in numbers  # which didn't run


def test_adaptation_page(pages):
    page = pages["adaptation"]
    assert page.tags.count("svg") == page.tags.count("figcaption") == 5
    rows = [row for row in page.rows if len(row) > 5]
    assert [row[0] for row in rows] == ["method (%)", "best source", "<s>route", "Tent", "oracle †"]
    assert ["<s>route", "order", "70.0 ± 14.1", "75.0 ± 21.2", "72.5 ± 17.7", "+12.5 ± 4.8 (3/4, 1 tied)",
            "−1.10 ± 0.07"] in rows  # fmt: skip
    assert ["all that no label chose", "−1.00 ± 0.00", "–"] in page.rows  # −0.4 with the oracle; none where all are one
    numbers = " ".join(page.text.split())
    for words in (
        "The domains are one set, <s>blurred.", "order alone, lowest objective: <s>route +12.5 ± 4.8 points",
        "† is chosen by the target's labels",
        "at rate 0.001, of a mixture's weights at 100 times that, of a free route at 3 times",
    ):  # fmt: skip
        assert words in numbers, words


def test_the_objective_is_held_against_accuracy():
    correlation = modular_results.adaptation().correlation(list(adaptation.GROUPS))
    # ranks (1, 2, 3, 4) and (4, 1, 3, 2): 1 - 6 * 14 / (4 * 15)
    np.testing.assert_allclose(correlation, [[-0.4, np.nan], [-1, np.nan]], atol=1e-12)


def test_reuse_page(pages):
    page = pages["reuse"]
    assert page.tags.count("svg") == page.tags.count("figcaption") == 3
    for row in (
        ["2-layers", "2", "2", "2,000,000", "3.00", "55.0 ± 7.1", "80.0 ± 14.1"],
        ["aabb", "4", "2", "2,000,000", "6.00", "60.0 ± 0.0", "80.0 ± 14.1", "+5.0 ± 5.0 (1/2, 1 tied)"],
        ["learned", "4", "2", "2,000,008", "6.00", "70.0 ± 7.1", "80.0 ± 14.1", "+15.0 ± 10.0 (2/2)"],
        ["learned", "65.0 ± 7.1", "–", "60.0 ± 0.0", "70.0 ± 7.1"], ["aabb", "110 ± 14"],
    ):  # fmt: skip
        assert row in page.rows, row


def smallest(kind):
    """One seed, and of everything as little as there may be."""
    results = getattr(modular_results, kind)()
    results = results._replace(job=results.job._replace(seeds=(3,)))
    if kind == "transfer":
        few = results.parts[1][0]
        only = few._replace(accuracy={"head": few.accuracy["head"]})
        part = {key: getattr(results, key)[:1] for key in ("tasks", "sources", "source_parts")}
        return results._replace(budgets=(10,), methods={"head": results.methods["head"]}, parts=((only,),), **part)
    if kind == "adaptation":
        part = results.parts[0][0]
        one = {"best source": np.array(0.5)}
        part = part._replace(accuracy=one, objective={"best source": np.array(UNKNOWN)}, routes={})
        sources = ((results.source_parts[0][0],),)
        only = {"methods": {"best source": "sources"}, "made": "", "targets": ("photo",), "parts": ((part,),)}
        return results._replace(source_parts=sources, **only)
    return results._replace(methods={"2-layers": jax.tree.map(lambda x: x[:1], results.methods["2-layers"])})


@pytest.mark.parametrize("kind, row, figures", [
    ("transfer", ["head", "50.0 ± 4.1", "650", "651"], 2),  # of 150 images
    ("adaptation", ["best source", "nothing", "50.0 ± 11.2", "–"], 4), ("reuse", ["2-layers", "2", "2"], 2),
])  # fmt: skip
def test_the_smallest_pages(tmp_path, kind, row, figures):
    page = page_of(tmp_path, kind, smallest(kind))
    assert any(cells[: len(row)] == row for cells in page.rows), page.rows
    assert page.tags.count("svg") == figures
    assert "what another seed would change is not in them" in " ".join(page.text.split())


def test_terminal_tables():
    _, text = printed(report.transfer_table(modular_results.transfer()).rich())
    assert "head+route" in text and "650" in text
    for kind in KINDS:
        results = getattr(modular_results, kind)()
        rows, _ = printed(getattr(report, f"{kind}_table")(results).rich())
        assert len(rows) >= len(results.methods)


@pytest.mark.parametrize("last, strong", [([0.7, 0.71], [False, True, False]), ([0.4, 0.9], [False, False, False])])
def test_only_a_lead_beyond_the_error_bars_is_bold(last, strong):
    cells = modular_facts.accuracy_cells([np.array(runs) for runs in ([0.5, 0.51], [0.9, 0.91], last)], 100)
    assert [cell.strong for cell in cells] == strong


# -- figures -----------------------------------------------------------------------------------------------------------
def test_accuracy_over_budgets():
    values = {"a": np.array([[0.5, 0.7], [0.1, 0.3]]), "_$b": np.array([[0.9, 0.9], [0.2, 0.2]])}
    figure = transfer.by_budget(values, [None, 10], charts.looks(list(values), ["_$b"]))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "all"]
    line, _, (bars,) = axes.containers[0]
    np.testing.assert_allclose(line.get_ydata(), [20, 60])
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], 20 + 10 * np.array([-1, 1]))  # the standard error
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "_$b"]


@pytest.mark.parametrize("largest, scale, count", [(0.1, "linear", 1), (0.5, "symlog", 4), (0.1, "linear", 5)])
def test_differences_of_pairs(largest, scale, count):
    values = np.tile([[0.0, largest, np.nan]], (count, 1))
    axes, *others = transfer.differences({"a": values}, ["t"] * count, charts.looks(["a"])).axes
    np.testing.assert_allclose(float(axes.containers[0][0].get_xdata()[0]), 50 * largest)
    assert axes.get_xscale() == scale
    assert sum(panel.get_visible() for panel in (axes, *others)) == count


def test_networks_of_one_size_are_moved_apart_and_no_further():
    values = {name: np.array([0.1 * i, 0.2 * i]) for i, name in enumerate("abc")}
    costs = {"a": (1e6, 1e6), "b": (1e6, 2e6), "c": (2e6, 3e6)}
    left, right = reuse.by_cost(values, costs, "b").axes
    places = [[float(drawn[0].get_xdata()[0]) for drawn in axes.containers] for axes in (left, right)]
    np.testing.assert_allclose(places, [[0.9825, 1.0175, 2], [1, 2, 3]])


def test_every_network_of_one_size_lies_inside_its_panel():
    values = {name: np.array([0.1, 0.2]) for name in "abcdefghijkl"}
    costs = {**dict.fromkeys(values, (1e6, 2e6)), "l": (2e6, 3e6)}
    for axes in reuse.by_cost(values, costs, "b").axes[:2]:
        low, high = axes.get_xlim()
        assert all(low < float(drawn[0].get_xdata()[0]) < high for drawn in axes.containers)


def test_orders_of_several_lengths():
    axes, *_ = route_figures.orders({"a": np.array([0, 31]), "b": np.array([1, 2, 3])}, 32).axes
    assert [text.get_text() for text in axes.texts] == ["0", "31", "1", "2", "3"]


def test_maps_of_sources_and_routes():
    results = modular_results.adaptation()
    on_targets, at_home = results.source_accuracy()
    np.testing.assert_allclose(on_targets, [[np.nan, 0.45], [0.25, np.nan], [0.25, 0.45]])
    np.testing.assert_allclose(at_home, [0.8, 0.9, 0.85])  # photo is a source of art alone
    left, right, _ = adaptation.sources_figure(on_targets, at_home, ["a", "b", "c"], ["a", "b"]).axes
    assert sorted(text.get_text() for text in left.texts) == ["25", "25", "45", "45"]
    assert [text.get_text() for text in right.texts] == ["80", "90", "85"]
    part = results.parts[0][0]
    sources = dict(zip(results.sources_of("photo"), part.source_routes, strict=True))
    figure = adaptation.routes_figure("photo", sources, part.routes)
    shown = [axes for axes in figure.axes if axes.images and axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["source: art <s>", "source: $sketch_{", "<s>route"]
    np.testing.assert_array_equal(shown[0].images[0].get_array(), [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(shown[2].images[0].get_array(), [[0.5, 0.25, 0.25], [0, 1, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_known(tmp_path, kind):
    """Accuracies that are all nan are a page of dashes."""
    results = getattr(modular_results, kind)()
    empty = lambda x: np.full(np.shape(x), np.nan) if np.asarray(x).dtype.kind == "f" else x
    if kind in ("transfer", "adaptation"):
        emptied = lambda part: part._replace(accuracy=jax.tree.map(empty, part.accuracy))
        results = results._replace(parts=tuple(tuple(map(emptied, row)) for row in results.parts))
    else:
        methods = {name: jax.tree.map(empty, method) for name, method in results.methods.items()}
        results = results._replace(methods=methods)
    page = page_of(tmp_path, kind, results)
    assert any(row.count("–") > 1 for row in page.rows)
    printed(getattr(report, f"{kind}_table")(results).rich())


def test_stacked_seeds_have_an_axis_in_front():
    one = ReuseMethod(0.5, 0.6, 10, 20, 3.0, 2, np.array([0, 1]))
    both = stacked([one, one._replace(accuracy=0.7)])
    np.testing.assert_array_equal(both.accuracy, [0.5, 0.7])
    assert both.route.shape == (2, 2) and both.gap is None


def test_accuracy_over_depth_is_drawn_where_there_are_several(tmp_path):
    results = modular_results.reuse()
    aabb = results.methods["aabb"]
    deeper = aabb._replace(route=np.tile([[0, 0, 0, 1, 1, 1]], (2, 1)), accuracy=np.array([0.7, 0.8]))
    names = {"2-layers": results.methods["2-layers"], "aabb x2": aabb, "aabb x3": deeper}
    names["learned x3"] = deeper._replace(accuracy=np.array([0.75, 0.9]))
    page = page_of(tmp_path, "reuse", results._replace(methods=names))
    assert page.tags.count("svg") == 3
    text = page.text.replace("\u00a0", " ")
    assert "learned x3 less aabb x3, which has a free gain at each layer, too: +7.5 ± 2.5 points." in text
    (axes,) = reuse.by_depth(names, "2-layers").axes
    lines = {bars.get_label(): bars[0].get_xydata().tolist() for bars in axes.containers}
    assert lines == {"aabb": [[2, 55], [4, 60], [6, 75]], "learned": [[2, 55], [6, 82.5]]}
