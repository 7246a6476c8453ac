"""The reports of merge rules and of unlearning: every number, read back from what was drawn and written."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.colors import to_hex
from pages import PlainPage as Page
from pages import printed

from compo_jax import report
from compo_jax.compose.rule_results import (
    Expected,
    MergedPool,
    MergingResults,
    MergingRun,
    PoolMerges,
    Weightings,
)
from compo_jax.compose.scaled_results import Scaled, Sweep
from compo_jax.incremental.unlearning_results import PoolSkills, RunSkills, UnlearningResults
from compo_jax.report import charts, expected, merging, unlearning
from compo_jax.report.merging import BASE
from compo_jax.report.table import Score
from compo_jax.train import read_result, write_result

NAN = np.nan
TOLD = "residual <u>0.04</u>"


def rule(within, **changes):
    within = np.array(within)
    return MergedPool(within, within / 2, 1.0, 3.25, [], {})._replace(**changes)


def pool(individual, base, *rules):
    seconds = {"diagonal": 10.0, "kronecker": None, "landscape": 3.0}
    rules, cosines = dict(zip(("average", "_$b", "ggn"), rules)), np.array([[1.0, -0.25], [-0.25, 1.0]])  # noqa: B905
    return PoolMerges(np.array(individual), np.array(base), seconds, rules, cosines)


def measured_merging():
    """Two runs with a pool of three rules and one of two; `_$b` is clearly the best where the task is known."""
    best = {"seconds": 0.011, "memory": None, "warnings": [TOLD, TOLD], "options": {"damping": "0.001"}}
    first, second = (
        {
            "none-<b>lora": pool([0.8, 1.0], [0.2, 0.5], rule([0.4, 0.4]), rule(high, **best), rule([0.1, last])),
            "other": pool([0.8, 1.0], [0.2, 0.5], rule([0.4, 0.4]), rule([0.4, 0.4])),
        }
        for high, last in (([0.8, 0.8], 0.2), ([0.8, 0.84], NAN))
    )
    tasks, tested = ["greek <i>", "n$ko"], [100, 300]
    return MergingResults(
        "merging <1>", "glyphs <i>", "ViT <u>96x4", 1064,
        [MergingRun("run-<b>0", 3, tasks, tested, first), MergingRun("run-1", 4, tasks[::-1], tested, second)], 1234.5,
    )  # fmt: skip


def swept(shift=0.0):
    """Two tasks at three coefficients: half of all modules is best, and half of one forgets what can be forgotten."""
    added = np.array([[0.5, 0.7], [0.8, 0.9], [0.7, 0.6]])
    negated = np.array([[[0.5, 0.7], [0.5, 0.7]], [[0.2, 0.7], [0.5, 0.3]], [[0.1, 0.5], [0.4, 0.2]]])
    return Sweep(added - shift, negated - shift)


def test_sums_and_negations_stand_in_the_merging_page(tmp_path):
    results = measured_merging()
    scaled = Scaled(np.array([0.0, 0.5, 1.0]), swept(), swept(0.1))
    assert scaled.best() == scaled.forgetting() == 1
    for run, coefficient in zip(results.runs, ("0.8", "0.9"), strict=True):
        run.pools["other"] = run.pools["other"]._replace(scaled=scaled)
        told = {"coefficient": coefficient, "strength": "500"}
        run.pools["other"].rules["average"] = rule([0.4, 0.4], options=told)
    write_result(tmp_path / "metrics.json", results)
    back = read_result(tmp_path / "metrics.json", MergingResults)
    assert back.runs[0].pools["none-<b>lora"].scaled is None
    np.testing.assert_array_equal(back.runs[1].pools["other"].scaled.test.negated, scaled.test.negated)
    page = Page(report.merging_page(tmp_path, back))
    assert page.tags.count("svg") == 1 + 2 * 2 + 1 + 1
    for row in (
        ["other", "0.0", "50.0 ± 0.0", "50.0 ± 0.0"],  # (0.5 + 0.7) / 2 - 0.1, both
        ["other", "1.0", "5.0 ± 0.0", "35.0 ± 0.0"],  # (0.1 + 0.2) / 2, (0.5 + 0.4) / 2
        ["other", "0.5", "15.0 ± 0.0", "50.0 ± 0.0"],
        ["accuracy (%)", "50.0", "75.0", "55.0"], ["accuracy (%)", "50.0", "15.0", "5.0"],
        ["average", "1.0 ± 0.0", "3.2", "coefficient 0.8 / 0.9, strength 500"],
    ):  # fmt: skip
        assert row in page.rows
    assert "curvature from" in page.text
    for run in results.runs:
        del run.pools["none-<b>lora"]
    page = Page(report.merging_page(tmp_path, results))
    assert "curvature from" not in page.text  # which sums in the linearised model don't take


@pytest.mark.parametrize("tasks", [2, 4, 12])
def test_ticks_at_the_scale_of_a_map_do_not_touch(tasks):
    figure = charts.figure("a map", 1.6 + 0.24 * tasks)
    axes = figure.add_subplot()
    image = charts.heat(axes, np.full((tasks, 3), 50.0), (0.0, 110.0), ["t"] * tasks, ["a", "b", "c"])
    charts.colour_bar(figure, image, axes, "%")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[1].get_yticklabels() if text.get_text()]
    assert len(boxes) >= 2
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(sorted(boxes, key=lambda box: box.y0)))


def measured_unlearning():
    """Two runs of two methods on three tasks."""
    one = PoolSkills(
        frozen=np.array([0.1, 0.2, 0.3]), composed=np.array([0.8, 0.7, 0.6]),
        specialise=np.array([[0.9, 0.3, 0.3], [0.2, 0.8, 0.4], [0.3, 0.3, 0.7]]),
        unlearn=np.array([[0.3, 0.7, 0.6], [0.8, 0.2, 0.6], [0.8, 0.7, 0.1]]),
        subtract=np.array([[0.1, 0.6, 0.6], [0.6, 0.1, 0.6], [0.6, 0.6, 0.1]]),
    )  # fmt: skip
    other = one._replace(composed=one.composed + 0.1, unlearn=one.unlearn + 0.2)
    tasks, tested = ["greek <i>", "n$ko", "vai"], [100, 100, 200]
    runs = [
        RunSkills(f"run-{i}", i, tasks, tested, {"ita-<b>lora": pool, "iel": pool._replace(unlearn=0 * pool.unlearn)})
        for i, pool in enumerate((one, other))
    ]
    return UnlearningResults("unlearning <1>", "glyphs <i>", "ViT <u>", runs, 321.4)


def expected_merging():
    """One run: the forecast puts three rules in order, distance turns it around; a weighting where the loss is low."""
    rules = [
        rule([a, a], expected=Expected(*(np.array(x) for x in (f, f * f, d))))
        for a, f, d in ((0.8, 1.0, 3.0), (0.6, 2.0, 2.0), (0.4, 3.0, 1.0))
    ]
    each = rule([0.9, 0.9])._replace(incremental=np.array([NAN, NAN]))
    of_weights = Expected(np.array([9.0, 0.5, 4.0]), np.array([1.5, 0.5, 2.5]), np.array([1.0, 0.0, 7.0]))
    weights = np.array([[0.0, 0.0], [0.5, 0.5], [0.3, 0.7]])
    one = pool([0.8, 1.0], [0.2, 0.5], *rules)
    weightings = Weightings(weights, of_weights, np.array([[0.1, 0.3], [0.7, 0.7], [0.5, 0.5]]))
    one = one._replace(rules=one.rules | {"emr": each}, weightings=weightings)
    return MergingResults("m", "d", "b", 16, [MergingRun("run", 0, ["x", "y"], [100, 100], {"lora": one})], 1.0)


def test_what_was_expected_of_merged_models_stands_beside_what_they_reach(tmp_path):
    results = expected_merging()
    write_result(tmp_path / "r.json", results)
    table = report.merging_tables(read_result(tmp_path / "r.json", MergingResults))[-1]
    assert [row[1:] for row in table.rows] == [
        ("1.00 (–; 3)", "1.00 (–; 3)", "0.89 (0.25; 6)"),  # by hand: 1 - 6 · 4 / 210
        ("1.00 (–; 3)", "0.50 (–; 3)", "0.54 (0.39; 6)"),  # 1 - 6 · 16 / 210
        ("−1.00 (–; 3)", "0.50 (–; 3)", "−0.17 (0.51; 6)"),  # -3 / sqrt(17 · 17.5), two are equally far
    ]  # fmt: skip
    page = Page(report.merging_page(tmp_path, results))
    assert page.tags.count("svg") == 1 + 2 + 1 + 2
    assert ["emr", "–", "–", "–", "90.0"] in page.rows
    assert ["0.50, 0.50", "0.500", "0.500", "0.000", "70.0"] in page.rows
    assert ["emr", "90.0 ± 2.1", "–", "101.2 ± 2.4", "1.0", "3.2"] in page.rows


def test_the_path_of_equal_weights_is_drawn_with_its_forecast():
    results = expected_merging()
    (one,) = (run.pools["lora"].weightings for run in results.runs)
    left, right = expected.path({"lora": one}, {"lora": 0.9}).axes
    measured, forecast = left.lines
    np.testing.assert_array_equal(measured.get_xydata(), [[0, 1.5], [1, 0.5]])
    np.testing.assert_array_equal(forecast.get_xydata(), [[0, 9], [1, 0.5]])
    np.testing.assert_allclose(right.lines[0].get_xydata(), [[0, 20], [1, 70]])
    assert left.get_ylim()[1] < 2  # the forecast may leave the panel, the loss may not


def test_a_rank_correlation_is_of_finite_numbers_that_differ():
    up = np.arange(4.0)
    assert expected.rank_correlation(up, -(up**3)) == 1
    np.testing.assert_allclose(expected.rank_correlation(np.array([1, 2, 4, 3.0]), up), -0.8)
    assert expected.rank_correlation(np.array([0, 1, 2, NAN]), np.array([5, 4, 3, 9.0])) == 1
    assert np.isnan(expected.rank_correlation(up, np.ones(4)))
    assert np.isnan(expected.rank_correlation(up[:2], up[:2]))


def test_the_error_of_a_rank_correlation_is_from_drawing_models():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 30))
    drawn = expected.drawn_correlations(x, y - x)
    np.testing.assert_array_equal(drawn, expected.drawn_correlations(np.r_[x, NAN], np.r_[y - x, 1]))  # the same draws
    rows = np.random.default_rng(0).integers(30, size=(expected.DRAWS, 30))
    by_one = [expected.rank_correlation(x[some], (y - x)[some]) for some in rows[:20]]
    np.testing.assert_allclose(drawn[:20], by_one, rtol=1e-12)
    others = [expected.rank_correlation(*pair) for pair in ((x, y - x) for x, y in random.normal(size=(300, 2, 30)))]
    np.testing.assert_allclose(np.std(drawn), np.std(others), rtol=0.35)
    few = np.arange(4.0)
    assert np.isnan(expected.drawn_correlations(few[:3], few[:3])).all()
    assert 0 < np.isnan(expected.drawn_correlations(few, few)).sum() < 40  # one model four times


def test_rank_correlations_of_several_runs_have_their_spread_and_an_error_of_the_mean():
    results = expected_merging()
    (run,) = results.runs
    fewer = run.pools["lora"].weightings
    fewer = fewer._replace(within=fewer.within + np.array([[0], [0], [NAN]]))
    other = run._replace(pools={"lora": run.pools["lora"]._replace(weightings=fewer)})
    (table,) = expected.expected_tables(results._replace(runs=[run, other]))
    assert table.headings[3] == "over both (error; models)" and "1,000 draws; none of fewer than four" in table.notes[0]
    rules, weightings, both = table.rows[0][1:]
    assert (rules, weightings) == ("1.00\u00a0±\u00a00.00 (–; 3)", "– (–; 2 to 3)")
    assert both.endswith("; 5 to 6)") and "±" in both and "–" not in both
    alone = run._replace(pools={"lora": run.pools["lora"]._replace(weightings=None)})
    (table,) = expected.expected_tables(results._replace(runs=[alone]))
    assert table.rows[0][1:] == ("1.00 (–; 3)", "–", "1.00 (–; 3)")


def test_merging_page(tmp_path):
    page = Page(report.merging_page(tmp_path, measured_merging()))
    assert page.tags.count("svg") == page.tags.count("figcaption") == 1 + 2 * 2 + 1
    assert ["n$ko", "−0.25", "1.00"] in page.rows
    for row in (
        ["each module alone", "90.0 ± 0.0", "–", "100.0", "–", "–"],
        ["base, no module", "35.0 ± 0.0", "–", "37.5 ± 0.0", "–", "–"],  # (1/4 + 1/2) / 2
        ["average", "40.0 ± 0.0", "20.0 ± 0.0", "45.0 ± 0.0", "1.0 ± 0.0", "3.2"],
        ["_$b †", "81.0 ± 1.4", "40.5 ± 0.7", "91.0 ± 1.4", "0.011 ± 0.000", "–"],  # (1 + 0.8) / 2 and (1 + 0.84) / 2
        ["ggn", "–", "–", "–", "1.0 ± 0.0", "3.2"],
        ["_$b", "40.0 ± 0.0", "20.0 ± 0.0", "45.0 ± 0.0", "1.0 ± 0.0", "3.2"],  # no warnings there
        ["_$b", "91.0 ± 1.4", "45.0 ± 0.0"], ["ggn", "–", "–"],  # of the first figure
        ["_$b", "0.011 ± 0.000", "–", "damping 0.001"], ["diagonal", "10 ± 0"], ["kronecker", "–"],
        ["_$b", "100.0", "80.0"], ["ggn", "12.5", "20.0"], ["base, no module", "25.0", "50.0"],  # of the first run
    ):  # fmt: skip
        assert row in page.rows, row
    text = " ".join(page.text.split())
    for words in (
        "3 merge rules", "seeds: 3, 4", "curvature from: 1,064 training images of each task",
        "highest normalised accuracy: _$b on none-<b>lora 91.0 %", "task known 81.0 %", "all classes 40.5 %",
        "alone, there 90.0 %", "whole comparison 1,234 s",
    ):  # fmt: skip
        assert words in text, words
    # the same warning of the same rule once, with both runs
    assert page.text.count(TOLD) == 1
    assert f"† _$b on none-<b>lora (run run-<b>0, run-1): {TOLD}" in page.text


def test_only_the_rule_that_leads_clearly_is_bold():
    strong = [[cell.text.replace("\u00a0", " ") for row in table.cells for cell in row if cell.strong]
              for table in report.merging_tables(measured_merging())]  # fmt: skip
    assert strong == [["81.0 ± 1.4", "40.5 ± 0.7", "91.0 ± 1.4"], []]  # in the other pool both are the same


def test_a_single_run_has_the_error_of_its_images(tmp_path):
    one = measured_merging()
    one = one._replace(runs=one.runs[:1])
    page = Page(report.merging_page(tmp_path, one))
    assert ["average", "40.0 ± 2.4", "20.0 ± 2.0", "45.0 ± 2.7", "1.0", "3.2"] in page.rows  # sqrt(0.24 / 400), / 0.9
    assert "whether the runs" not in page.text
    single = measured_unlearning()
    page = Page(report.unlearning_page(tmp_path, single._replace(runs=single.runs[:1])))
    assert ["ita-<b>lora", "80.0 ± 2.0", "30.0 ± 2.3", "70.0 ± 2.3", "20.0 ± 2.0"] in page.rows


def test_unlearning_page(tmp_path):
    page = Page(report.unlearning_page(tmp_path, measured_unlearning()))
    assert page.tags.count("svg") == page.tags.count("figcaption") == 1 + 2
    for row in (
        ["ita-<b>lora", "80.0 ± 0.0", "30.0 ± 0.0", "75.0 ± 7.1", "20.0 ± 0.0"],  # specialise
        ["ita-<b>lora", "30.0 ± 14.1", "80.0 ± 14.1", "75.0 ± 7.1", "20.0 ± 0.0"],  # unlearn
        ["iel", "0.0 ± 0.0", "0.0 ± 0.0", "75.0 ± 7.1", "20.0 ± 0.0"],
        ["ita-<b>lora", "10.0 ± 0.0", "60.0 ± 0.0", "75.0 ± 7.1", "20.0 ± 0.0"],  # subtract
        ["greek <i>", "−50.0", "0.0", "0.0"], ["n$ko", "−60.0", "+10.0", "−20.0"],
    ):  # fmt: skip
        assert row in page.rows, row
    text = " ".join(page.text.split())
    for words in (
        "most of its task unlearned: iel −75.0 points", "kept best when unlearning: ita-<b>lora +5.0 points",
        "and of its task −45.0 points", "whole job 321 s", "3 tasks of glyphs <i>", "seeds: 0, 1",
    ):  # fmt: skip
        assert words in text, words


def test_tables_for_the_terminal_say_the_same_as_the_page():
    rows, text = printed(report.merging_tables(measured_merging())[0].rich())
    assert ["_$b †", "81.0 ±1.4", "40.5 ±0.7", "91.0 ±1.4", "0.011 ±0.000", "–"] in rows
    assert "none-<b>lora: 2 modules of glyphs <i>" in text
    titles = [table.title for table in report.unlearning_tables(measured_unlearning())]
    assert [title.split(":")[0] for title in titles] == list(unlearning.OPERATIONS)


def test_rules_are_dots_by_pool_the_best_on_top():
    axes = merging.normalised(measured_merging()).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["_$b †", "average", "ggn"]
    vertical = [(to_hex(line.get_color()), line.get_xdata()[0]) for line in axes.lines
                if len(set(line.get_xdata())) == 1 and line.get_linestyle() in ("--", ":")]  # fmt: skip
    assert vertical == [(charts.INK, 100), (charts.COLOURS[0], 37.5), (charts.COLOURS[1], 37.5)]


def test_rules_whose_shortened_names_are_alike_are_rows_of_their_own():
    results, names = measured_merging(), [f"kronecker, damping={d}, anchor=average" for d in ("0.001", "0.010")]
    for run in results.runs:
        run.pools["other"].rules.clear()
        run.pools["other"].rules.update({name: rule([0.2, 0.7]) for name in names})
    axes = merging.normalised(results).axes[0]
    assert len(axes.get_yticklabels()) == len(measured_merging().runs[0].pools["none-<b>lora"].rules) + 2


def test_no_error_bar_is_cut_by_the_axes():
    reached = {"average": Score(np.array([0.82]), 0.015), "ggn": Score(np.array([0.84]), 0.05)}
    rules = {name: merging._Rule(score, score, score, np.ones(1), 3.25) for name, score in reached.items()}
    axes = merging.over_time("none-lora", rules, 0.87, [], {"color": "black"}).axes[0]
    ends = np.concatenate([path.vertices[:, 1] for bars in axes.collections for path in bars.get_paths()])
    np.testing.assert_allclose([ends.min(), ends.max()], [79, 89])
    low, high = axes.get_ylim()
    assert low < 79 and high > 89


def test_the_scale_of_normalised_accuracy_begins_at_nothing(tmp_path):
    first = measured_merging().runs[0]
    axes, bar = merging.by_task("p", first.pools["other"], first.tasks, (0.0, 110.0)).axes
    assert axes.images[0].get_clim() == (0, 110)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["average", "_$b", BASE]
    assert bar.get_ylabel() == "normalised accuracy (%)"


def test_paths_go_from_all_modules_to_some():
    specialise, unlearn, _ = unlearning.changes(measured_unlearning()).axes
    assert (specialise.get_title(loc="left"), unlearn.get_title(loc="left")) == ("specialise", "unlearn")
    paths = [tuple(np.round(segment[:, 0], 6)) for c in unlearn.collections for segment in c.get_segments()]
    for path in ((75, 75), (20, 20), (75, 30), (75, 80), (75, 0)):
        assert path in paths, path


@pytest.mark.parametrize("tasks, lines, numbers", [(3, 1, 8), (10, 1, 0), (20, 2, 0)])
def test_maps_of_changes_have_nothing_in_the_middle_of_their_scale(tasks, lines, numbers):
    change = np.full((tasks, tasks), -0.1)
    change[0, 1] = NAN
    maps = {"unlearn": change, "specialise": -change}
    *panels, _ = unlearning.change_maps("$m_{$", maps, ["t"] * tasks, 25.0).axes
    assert panels[0].get_subplotspec().get_gridspec().nrows == lines
    for axes, sign in zip(panels, (1, -1), strict=True):
        assert axes.images[0].get_clim() == (-25, 25)
        np.testing.assert_allclose(axes.images[0].get_array().filled(NAN), 100 * sign * change)
        assert [text.get_text() for text in axes.texts] == ["−10" if sign > 0 else "+10"] * numbers


@pytest.mark.parametrize("results, path, value, told", [
    (measured_merging(), ("images",), None, "images"),
    (measured_merging(), ("runs", 0, "pools", "other", "base"), [0.1], "the sizes of base"),
    (measured_merging(), ("runs", 1, "pools", "other", "rules", "average", "within"), "much", "within"),
    (measured_merging(), ("runs", 1, "pools", "other", "rules", "average", "memory"), [], "memory"),
    (measured_unlearning(), ("runs", 1, "methods", "iel", "unlearn"), [[0.1] * 3] * 2, "unlearn"),
    (measured_unlearning(), ("runs",), {"a": 1}, "runs"),
])  # fmt: skip
def test_results_that_do_not_fit_are_refused(tmp_path, results, path, value, told):
    file = tmp_path / "metrics.json"
    write_result(file, results)
    assert read_result(file, type(results))._replace(runs=[]) == results._replace(runs=[])
    part = stored = json.loads(file.read_text())
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=told):
        read_result(file, type(results))
