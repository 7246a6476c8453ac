"""The reports of transfer, adaptation and block reuse: every number, read back from what was drawn and written."""

import copy
import re

import numpy as np
import pytest
from pages import PlainPage as Page
from pages import printed

from compo_jax import report
from compo_jax.report import adaptation_figures, modular_figures, reuse_figures, transfer_figures
from compo_jax.report import figures as shared
from compo_jax.report.adaptation_numbers import read
from compo_jax.report.modular_numbers import paired, paired_text

SHARED = {
    "data": "glyphs <i>", "seeds": [3, 4], "seconds": 1234.5,
    "net": {"layers": 2, "templates": 3, "width": 8, "patch": 4, "block": "basic <u>", "bn": "task", "size": 28},
}  # fmt: skip


def measured_transfer():
    def method(few, every, trained, control=False):
        return {"accuracy": [every, few], "trained": trained, "stored": trained + 1, "control": control}

    return copy.deepcopy(SHARED) | {
        "name": "transfer <1>", "tasks": [["x", "y"], ["x"]], "held_out": [["a<b>", "b"], ["b", "$c_{"]],
        "classes": [[2, 3], [3, 4]], "budgets": [None, 10], "source": [[0.9, 0.7], [0.8]],
        "chosen": [[["x", "y"], ["x", "x"]], [["x", "<s>y"], ["x", "x"]]],
        "methods": {
            "head": method([[0.4, 0.6], [0.5, 0.7]], [[0.6, 0.8], [0.7, 0.9]], 650),
            "head+route": method([[0.5, 0.6], [0.6, 0.9]], [[None, 0.8], [0.6, 0.9]], 714),
            "_<s>untrained": method([[0.1, 0.1], [0.1, 0.1]], [[0.2, 0.2], [0.2, 0.2]], 714, True),
        },
    }  # fmt: skip


def measured_adaptation():
    targets = {"photo": 0.9, "art <s>": 0.8}
    names = ["photo", "art <s>", "$sketch_{"]
    return copy.deepcopy(SHARED) | {
        "name": "adaptation <1>", "domains": names, "targets": list(targets), "classes": ["one", "two"],
        "made": "the domains are one set, <s>blurred", "baseline": "best source",
        "methods": {
            "oracle": {"accuracy": [[0.55, 0.9], [0.7, 0.8]], "objective": [[-1.3, None], [-1.1, -1]],
                       "group": "oracle"},
            "Tent": {"accuracy": [[0.7, 0.5], [0.9, 0.5]], "objective": [[-1.2, None], [-1.4, -1]], "group": "bn"},
            "best source": {"accuracy": [[0.5, 0.6], [0.6, 0.7]], "objective": [[-1.0, -1], [-1.0, -1]],
                            "group": "sources"},
            "<s>route": {"accuracy": [[0.6, 0.6], [0.8, 0.9]], "objective": [[-1.1, -1], [-1.3, -1]], "group": "order"},
        },
        "sources": [[{name: x + 0.1 * i for name in names if name != target} for target, x in
                     {"photo": 0.2, "art <s>": 0.4}.items()] for i in range(2)],
        "source_accuracy": [[{name: targets[target] for name in names if name != target} for target in targets]] * 2,
        "routes": {"photo": {"sources": {"art <s>": [0, 2], "$sketch_{": [1, 1]},
                             "adapted": {"<s>route": [[0.5, 0.25, 0.25], [0, 1, 0]]}}},
        "templates": 3,
    }  # fmt: skip


def measured_reuse():
    def method(accuracy, layers, templates, route, parameters=2_000_000):
        return {
            "accuracy": accuracy, "train_accuracy": [0.9, 0.7], "parameters": parameters, "macs": 1_500_000 * layers,
            "layers": layers, "templates": templates, "route": route, "seconds": [100.0, 120.0],
        }  # fmt: skip

    return copy.deepcopy(SHARED) | {
        "name": "reuse <1>", "classes": 10, "blocks": 2,
        "methods": {
            "2-layers": method([0.5, 0.6], 2, 2, [[0, 1]] * 2),
            "aabb": method([0.6, 0.6], 4, 2, [[0, 0, 1, 1]] * 2),
            "learned": method([0.75, 0.65], 4, 2, [[0, 1, 0, 1], [1, 1, 1, 0]], None),
        },
        "gap": {"learned": {"soft": [0.7, 0.6], "hard": [0.4, None], "reestimated": [0.6, 0.6],
                            "finetuned": [0.75, 0.65]}},
    }  # fmt: skip


MEASURED = {"transfer": measured_transfer, "adaptation": measured_adaptation, "reuse": measured_reuse}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return {kind: getattr(report, kind)(folder / kind, make()) for kind, make in MEASURED.items()}


@pytest.mark.parametrize("own, reference, text", [
    ([0.5, 0.6, 0.6, 0.9], [0.4, 0.6, 0.5, 0.7], "+10.0 ± 4.1 (3/4, 1 tied)"),  # sqrt(0.02 / 3) / 2
    ([0.5, np.nan], [0.75, 0.1], "−25.0 (0/1)"), ([np.nan], [0.1], "–"),
    ([0.4999, 0.5], [0.5, 0.5], "0.0 ± 0.0 (0/2, 1 tied)"),
])  # fmt: skip
def test_paired_differences(own, reference, text):
    assert paired_text(paired(np.array(own), np.array(reference))).replace("\u00a0", " ") == text


def test_transfer_page(paths):
    page = Page(paths["transfer"])
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
        "head alone, 10 a class 55.0 %", "head alone, all labels 75.0 %", "with its order, 10 a class +10.0 points",
        "with its order, all labels −3.3 points", "an order is 64 scalars", "tasks trained on 80.0 %",
        "over 4 such pairs",
    ):  # fmt: skip
        assert number in numbers, number


def test_adaptation_page(paths):
    page = Page(paths["adaptation"])
    assert page.tags.count("svg") == page.tags.count("figcaption") == 4
    rows = [row for row in page.rows if len(row) > 5]
    assert [row[0] for row in rows] == ["method (%)", "best source", "<s>route", "Tent", "oracle †"]
    assert ["<s>route", "order", "70.0 ± 14.1", "75.0 ± 21.2", "72.5 ± 17.7", "+12.5 ± 4.8 (3/4, 1 tied)",
            "−1.10 ± 0.07"] in rows  # fmt: skip
    assert ["all that no label chose", "−1.00 ± 0.00", "–"] in page.rows  # −0.4 with the oracle; none where all are one
    assert "The domains are one set, <s>blurred." in page.text
    numbers = " ".join(page.text.split())
    assert "order alone, lowest objective: <s>route +12.5 points" in numbers
    assert "† was chosen by the target's labels" in numbers


def test_the_objective_is_held_against_accuracy():
    correlation = read(measured_adaptation()).correlation(list(adaptation_figures.GROUPS))
    # ranks (1, 2, 3, 4) and (4, 1, 3, 2): 1 - 6 * 14 / (4 * 15)
    np.testing.assert_allclose(correlation, [[-0.4, np.nan], [-1, np.nan]], atol=1e-12)


def test_reuse_page(paths):
    page = Page(paths["reuse"])
    assert page.tags.count("svg") == page.tags.count("figcaption") == 3
    for row in (
        ["2-layers", "2", "2", "2,000,000", "3.00", "55.0 ± 7.1", "80.0 ± 14.1", ""],
        ["aabb", "4", "2", "2,000,000", "6.00", "60.0 ± 0.0", "80.0 ± 14.1", "+5.0 ± 5.0 (1/2, 1 tied)"],
        ["learned", "4", "2", "–", "6.00", "70.0 ± 7.1", "80.0 ± 14.1", "+15.0 ± 10.0 (2/2)"],
        ["learned", "65.0 ± 7.1", "–", "60.0 ± 0.0", "70.0 ± 7.1"], ["aabb", "110 ± 14"],
    ):  # fmt: skip
        if row[-1]:
            assert row in page.rows, row
        else:  # an empty cell has no text
            assert row[:-1] in page.rows, row


@pytest.mark.parametrize("kind", MEASURED)
def test_pages_need_nothing_else_and_escape_names(paths, kind):
    page = Page(paths[kind])
    assert not page.open
    assert not {"script", "link", "iframe", "object", "b", "i", "u", "s"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert all(value.startswith(("#", "data:image/png")) for value in sources)
    assert shared.INK not in paths[kind].read_text(encoding="utf-8")
    for words in (f"{kind} <1>", "glyphs <i>", "basic <u> blocks of 8 channels"):
        assert words in page.text


def smallest(kind):
    """One seed, and of everything as little as there may be."""
    metrics = MEASURED[kind]()
    metrics["seeds"] = [3]
    if kind == "transfer":
        metrics |= {key: metrics[key][:1] for key in ("tasks", "held_out", "classes", "source")}
        metrics |= {"budgets": [10], "chosen": [metrics["chosen"][0][:1]]}
        head = metrics["methods"]["head"]
        metrics["methods"] = {"head": head | {"accuracy": [head["accuracy"][1][:1]]}}
    elif kind == "adaptation":
        metrics |= {"targets": ["photo"], "made": None}
        for key in ("sources", "source_accuracy"):
            metrics[key] = [metrics[key][0][:1]]
        metrics["methods"] = {"best source": {"accuracy": [[0.5]], "objective": [[None]], "group": "sources"}}
        del metrics["routes"], metrics["templates"]
    else:
        first = {key: [value[0]] if isinstance(value, list) else value
                 for key, value in metrics["methods"]["2-layers"].items()}  # fmt: skip
        metrics["methods"] = {"2-layers": first}
        del metrics["gap"]
    return metrics


@pytest.mark.parametrize("kind, row, figures", [
    ("transfer", ["head", "50.0", "650", "651"], 2), ("adaptation", ["best source", "nothing", "50.0", "–"], 3),
    ("reuse", ["2-layers", "2", "2", "2,000,000", "3.00", "50.0", "90.0"], 2),
])  # fmt: skip
def test_the_smallest_pages(tmp_path, kind, row, figures):
    page = Page(getattr(report, kind)(tmp_path, smallest(kind)))
    assert row in page.rows
    assert page.tags.count("svg") == figures
    assert all("±" not in cell for row in page.rows for cell in row)
    assert "Numbers are mean" not in page.text
    printed(getattr(report, f"{kind}_table")(smallest(kind)))


def test_terminal_tables():
    rows, text = printed(report.transfer_table(measured_transfer()))
    assert rows[:4] == [
        ["head", "75.0 ±7.1", "55.0 ±7.1", "650"], ["", "", "", "651"], ["head+route", "–", "65.0 ±14.1", "714"],
        ["", "−3.3 ±3.3", "+10.0 ±4.1", "715"],
    ]  # fmt: skip
    assert "new tasks of glyphs <i>" in text
    rows, _ = printed(report.adaptation_table(measured_adaptation()))
    assert ["<s>route", "70.0", "75.0", "72.5", "+12.5", "−1.10"] in rows
    assert ["", "±14.1", "±21.2", "±17.7", "±4.8", "±0.07"] in rows
    rows, _ = printed(report.reuse_table(measured_reuse()))
    assert ["aabb", "4/2", "2.00", "6.00", "60.0 ±0.0", "80.0 ±14.1", "+5.0 ±5.0"] in rows


def test_accuracy_over_budgets():
    found = {"a": np.array([[0.5, 0.7], [0.1, 0.3]]), "_$b": np.array([[0.9, 0.9], [0.2, 0.2]])}
    marks = modular_figures.looks(list(found), ["_$b"])
    figure = transfer_figures.by_budget(found, [None, 10], marks)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10", "all"]
    line, _, (bars,) = axes.containers[0]
    np.testing.assert_allclose(line.get_ydata(), [20, 60])
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], 20 + 10 * np.sqrt(2) * np.array([-1, 1]))
    assert (marks["_$b"]["color"], marks["_$b"]["linestyle"]) == (modular_figures.GREY, "--")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "_$b"]


@pytest.mark.parametrize("largest, scale, count", [(0.1, "linear", 1), (0.5, "symlog", 4), (0.1, "linear", 5)])
def test_differences_of_pairs(largest, scale, count):
    values = np.tile([[0.0, largest, np.nan]], (count, 1))
    axes, *others = transfer_figures.differences({"a": values}, ["t"] * count, modular_figures.looks(["a"])).axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["pairs 0"].get_xdata(), [0, 100 * largest])
    np.testing.assert_allclose(float(axes.containers[0][0].get_xdata()[0]), 50 * largest)
    assert axes.get_xscale() == scale
    assert sum(panel.get_visible() for panel in (axes, *others)) == count


def test_networks_of_one_size_are_moved_apart_and_no_further():
    found = {name: np.array([0.1 * i, 0.2 * i]) for i, name in enumerate("abc")}
    costs = {"a": (1e6, 1e6), "b": (1e6, 2e6), "c": (2e6, np.nan)}
    left, right = reuse_figures.by_cost(found, costs, "b").axes
    lines = [{line.get_label(): line for line in axes.lines} for axes in (left, right)]
    np.testing.assert_allclose([lines[0][f"mean {i}"].get_xdata()[0] for i in range(3)], [0.9825, 1.0175, 2])
    np.testing.assert_allclose([lines[1][f"mean {i}"].get_xdata()[0] for i in range(3)], [1, 2, np.nan])
    np.testing.assert_allclose(lines[0]["seeds 2"].get_ydata(), [20, 40])


def test_orders_and_gap():
    figure = reuse_figures.orders({"a": np.array([0, 31]), "b": np.array([1, 2, 3])})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0", "31", "1", "2", "3"]
    assert axes.get_xlim() == (-0.5, 2.5)
    (axes,) = reuse_figures.gap({"a": np.array([[0.5, 0.7], [0.1, 0.3]])}, ["soft", "argmax"]).axes
    np.testing.assert_allclose([line.get_ydata() for line in axes.lines], [[50, 10], [70, 30], [60, 20]])


def test_methods_on_targets():
    values = {"a": np.array([[0.5, 0.1], [0.7, 0.2]]), "b": np.array([[0.4, 0.1], [0.4, np.nan]])}
    groups = {"a": "order", "b": "oracle"}
    first, second = adaptation_figures.by_target(values, groups, ["x", "$y"], "a").axes
    lines = {line.get_label(): line for line in first.lines}
    np.testing.assert_allclose(lines["mean 0"].get_xdata(), 60)
    np.testing.assert_allclose(lines["seeds 1"].get_xdata(), [40, 40])
    assert first.lines[0].get_xdata()[0] == 60
    assert second.get_title(loc="left") == "$y"
    first, second = adaptation_figures.objective(
        values, {name: -x for name, x in values.items()}, groups, ["x", "$y"], np.array([-0.5, np.nan])
    ).axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["x, ρ = −0.50", "$y"]
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[-0.5, 50], [-0.7, 70]])


def test_maps_of_sources_and_routes():
    found = read(measured_adaptation())
    np.testing.assert_allclose(found.sources, [[np.nan, 0.45], [0.25, np.nan], [0.25, 0.45]])
    np.testing.assert_allclose(found.own, [0.8, 0.9, 0.85])  # photo is a source of art alone
    left, right, _ = adaptation_figures.sources(found.sources, found.own, ["a", "b", "c"], ["a", "b"]).axes
    assert sorted(text.get_text() for text in left.texts) == ["25", "25", "45", "45"]
    assert [text.get_text() for text in right.texts] == ["80", "90", "85"]
    routes = found.routes["photo"]
    figure = adaptation_figures.routes("photo", routes.sources, routes.adapted)
    shown = [axes for axes in figure.axes if axes.images and axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["source: art <s>", "source: $sketch_{", "<s>route"]
    np.testing.assert_array_equal(shown[0].images[0].get_array(), [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(shown[2].images[0].get_array(), [[0.5, 0.25, 0.25], [0, 1, 0]])


def changed(kind, path, value=None):
    """Metrics with one part replaced, or without it."""
    wrong = part = MEASURED[kind]()
    for key in path[:-1]:
        part = part[key]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return wrong


@pytest.mark.parametrize("kind, path, named", [
    ("transfer", ("net", "width"), "net.width"), ("transfer", ("methods", "head"), "methods.head"),
    ("transfer", ("methods", "head", "control"), "methods.head.control"), ("adaptation", ("made",), "made"),
    ("adaptation", ("methods", "best source"), "methods.best source"),
    ("adaptation", ("routes", "photo", "adapted"), "routes.photo.adapted"),
    ("reuse", ("methods", "2-layers"), "methods.2-layers"), ("reuse", ("gap", "learned", "hard"), "gap.learned.hard"),
])  # fmt: skip
def test_metrics_that_lack_something(tmp_path, kind, path, named):
    for function in (lambda m: getattr(report, kind)(tmp_path / "new", m), getattr(report, f"{kind}_table")):
        with pytest.raises(KeyError, match=rf"the metrics lack {re.escape(named)}: they may be of another kind of run"):
            function(changed(kind, path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, path, value, match", [
    ("transfer", ("seeds",), [], "0 seeds and 3 methods and need at least one of each"),
    ("transfer", ("budgets",), [], "0 budgets and 2 seeds"),
    ("transfer", ("held_out", 1), [], "for each seed the names of its tasks and of its new tasks"),
    ("transfer", ("budgets",), [1], "chosen in the metrics must hold, for each of 1 budgets"),
    ("transfer", ("methods", "head", "accuracy"), [[]], "accuracy in the metrics has 1 entries .* 2 budgets"),
    ("transfer", ("methods", "head", "accuracy", 0), [[0.1, 0.2]], "accuracy.0 in the metrics has 1 entries"),
    ("transfer", ("methods", "head", "accuracy", 1, 1), [0.1], r"accuracy.1.1 in the metrics has shape \(1,\)"),
    ("adaptation", ("targets", 0), "phot", r"the targets in the metrics \(phot, art <s>\) must be one or more of"),
    ("adaptation", ("methods", "Tent", "group"), "BN", "group in the metrics is 'BN' and must be one of sources, "),
    ("adaptation", ("methods", "Tent", "objective"), [[1, 2]], r"shape \(1, 2\) and must have \(2, 2\), seeds by"),
    ("adaptation", ("sources", 0, 0), 0.5, "must hold, for each seed and target, the accuracy of each source by name"),
    ("adaptation", ("routes", "photo", "sources", "art <s>"), [0, 3], r"is \[0, 3\] and must hold .* 0 to 2"),
    ("adaptation", ("routes", "photo", "adapted", "<s>route"), [[1, 0]], "layers by templates"),
    ("reuse", ("methods", "aabb", "accuracy"), [0.1], r"shape \(1,\) and must have \(2,\), a number for each seed"),
    ("reuse", ("methods", "aabb", "route"), [[0] * 4], "route in the metrics has 1 entries for 2 seeds"),
    ("reuse", ("methods", "aabb", "route", 1), [0, 0.5, 1, 1], "one of 2 templates for each layer"),
    ("reuse", ("gap", "learned", "hard"), [0.4], "four points by seeds"),
])  # fmt: skip
def test_metrics_that_do_not_fit(tmp_path, kind, path, value, match):
    for function in (lambda m: getattr(report, kind)(tmp_path / "new", m), getattr(report, f"{kind}_table")):
        with pytest.raises(ValueError, match=match):
            function(changed(kind, path, value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", MEASURED)
def test_nothing_known(tmp_path, kind):
    """Accuracies that are all None are a page of dashes."""

    def emptied(value):
        return [emptied(v) for v in value] if isinstance(value, list) else None

    metrics = MEASURED[kind]()
    for method in metrics["methods"].values():
        method |= {key: emptied(method[key]) for key in method if key in ("accuracy", "objective", "train_accuracy")}
    page = Page(getattr(report, kind)(tmp_path, metrics))
    assert any(row.count("–") > 1 for row in page.rows)
    printed(getattr(report, f"{kind}_table")(metrics))
