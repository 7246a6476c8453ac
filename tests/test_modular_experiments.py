"""The four experiments on modular networks from their command lines: results, a kill, more seeds, bad input."""

import re

import jax
import numpy as np
import pytest
from jobs import comparable, killed, main, run

from compo_jax.modular.results import AdaptationResults, MultitaskResults, ReuseResults, TransferResults
from compo_jax.pool import ModulePool
from compo_jax.train import read_result

TINY = ["--images", 6, "--size", 8, "--layers", 2, "--width", 4, "--steps", 5, "--batch", 4]
MULTITASK = [*TINY, "--tasks", 2, "--templates", 2, "--baselines", "hard-sharing-bn", "--orders", "linear", "hard"]
MULTITASK += ["--analysis-images", 4, "--harden-steps", 3]


def results_of(done, folder, kind):
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "report.html").stat().st_size > 10_000
    return read_result(folder / "metrics.json", kind)


def test_a_killed_multitask_run_that_is_given_more_seeds_ends_as_a_whole_one(tmp_path):
    job = {"script": "modular_multitask.py"}
    begun = tmp_path / "a" / "checkpoints" / "0-hard-2" / "fixed"  # in the third phase of its third part
    assert killed(begun, *MULTITASK, "--seeds", 0, "--runs", tmp_path, "--name", "a", **job)
    assert not (tmp_path / "a" / "parts" / "0-hard-2.json").exists()
    both = []
    for name in "ab":
        done = run(*MULTITASK, "--seeds", 0, 1, "--runs", tmp_path, "--name", name, **job)
        both.append(results_of(done, tmp_path / name, MultitaskResults))
    first, _ = both
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")
    assert not list((tmp_path / "a" / "checkpoints").iterdir())
    timeless = []
    for results in both:
        assert all(method.seconds.min() > 0 for method in results.methods.values())
        methods = {name: method._replace(seconds=None) for name, method in results.methods.items()}
        timeless.append(results._replace(job=results.job._replace(name="", seconds=0.0), methods=methods))
    for value, other in zip(*map(jax.tree.leaves, timeless), strict=True):
        np.testing.assert_array_equal(value, other)
    shared, linear, hard = (first.methods[name] for name in ("hard-sharing-bn", "linear-2", "hard-2"))
    assert list(first.methods) == ["hard-sharing-bn", "linear-2", "hard-2"]
    np.testing.assert_array_equal(hard.accuracy, hard.order.gap.finetuned)
    np.testing.assert_array_equal(linear.accuracy, linear.order.gap.learned)
    for ordered in (linear, hard):  # tasks, layers, templates
        np.testing.assert_array_equal(ordered.parameters - shared.parameters, 2 * 2 * 2)
    assert first.analysis.removal.drop.shape == (2, 2) and first.analysis.random.draws == 200
    assert first.analysis.linear and first.analysis.rerouting.true.shape == (2, 5)
    pool = ModulePool(tmp_path / "a" / "pools" / "linear-2-1")
    assert pool.names() == ["task-000", "task-001", "templates"]
    assert pool.manifest("task-001").task == "armenian"
    done = run(*MULTITASK, "--seeds", 0, 1, "--analysis-images", 3, "--runs", tmp_path, "--name", "a", **job)
    assert done.returncode == 0, done.stdout + done.stderr
    fewer = read_result(tmp_path / "a" / "metrics.json", MultitaskResults).analysis
    assert (fewer.removal_images, first.analysis.removal_images) == (3, 4)
    assert not np.array_equal(fewer.removal.drop, first.analysis.removal.drop)
    with pytest.raises(ValueError, match="patch: 4 there, 2 now"):
        main(*MULTITASK, "--batch", 8, "--patch", 2, "--runs", tmp_path, "--name", "a", **job)


def test_every_way_to_learn_several_tasks_runs(tmp_path):
    kinds = ["single-task", "hard-sharing", "hard-sharing-bn", "hard-sharing-wide", "frozen", "random"]
    kinds += ["random-linear", "mmoe", "cgc", "dselect-k"]
    options = [*TINY, "--steps", 2, "--tasks", 2, "--templates", 4, "--groups", 2, "--orders", "linear", "soft"]
    done = run(*options, "--baselines", *kinds, "--seeds", 0, "--runs", tmp_path, script="modular_multitask.py")
    results = results_of(done, tmp_path / "modular-multitask-glyphs", MultitaskResults)
    numbered = [name + "-4" * (i > 2) for i, name in enumerate(kinds)]
    assert list(results.methods) == [*numbered, "linear-4", "soft-4"]
    size = {name: int(method.parameters[0]) for name, method in results.methods.items()}
    assert size["frozen-4"] == size["random-4"] == size["random-linear-4"]
    assert size["linear-4"] - size["frozen-4"] == 2 * 2 * 2 * 4  # tasks, layers, groups, templates
    assert size["soft-4"] - size["frozen-4"] == 2 * 2 * 4
    assert results.methods["linear-4"].order.weights.shape == (1, 2, 4, 4)  # layers and groups together
    assert results.analysis.rerouting is None


def test_a_new_task_is_learned_from_few_labels(tmp_path):
    methods = ["head", "head+route", "head+route+gain", "head+bn", "scratch"]
    options = ["--tasks", 3, "--templates", 2, "--new-steps", 4, "--new-batch", 8, "--budgets", 2, 0]
    done = run(*TINY, *options, "--methods", *methods, "--seeds", 0, "--runs", tmp_path, script="modular_transfer.py")
    results = results_of(done, tmp_path / "modular-transfer-glyphs", TransferResults)
    assert results.budgets == (2, None)
    assert sorted([*results.tasks[0], *results.sources[0]]) == ["arabic", "armenian", "cyrillic"]
    assert results.parts[0][0].chosen[0] in results.sources[0]
    sizes = {name: method.trained for name, method in results.methods.items()}
    head, kernels, stem, norms = 8 * (4 + 1), 2 * 2 * (3 * 3 * 4 * 4), 4 * 4 * 3 * 4, 2 * 4 * (1 + 2 * 2)
    scratch = head + kernels + stem + norms + 2  # and a gain a layer
    learned = {"head": 0, "head+route": 2 * 2, "head+route+gain": 2 * 2 + 2, "head+bn": norms}
    assert sizes == {name: head + more for name, more in learned.items()} | {"scratch": scratch}
    kept = {name: method.stored for name, method in results.methods.items()}  # the route and gain of a source, too
    assert kept == {name: head + 2 * 2 + 2 + norms * (name == "head+bn") for name in learned} | {"scratch": scratch}
    assert all(results.accuracy(name).shape == (2, 1, 1) for name in methods)


def test_a_target_without_labels_is_adapted_to(tmp_path):
    options = [*TINY, "--templates", 2, "--adapt-steps", 2, "--adapt-batch", 8, "--targets", "scan", "--seeds", 0]
    methods = ["route from best source", "convex mixture + AdaBN"]
    done = run(*options, "--methods", *methods, "--runs", tmp_path, script="modular_adaptation.py")
    results = results_of(done, tmp_path / "modular-adaptation-rendered", AdaptationResults)
    ((part,),) = results.parts
    for name in ("sources for scan", "scan: mean of sources", *(f"scan: {method}" for method in methods)):
        assert len(re.findall(rf"^seed 0[:,] {re.escape(name)} [\d.]+ % in \d+ s$", done.stdout, re.MULTILINE)) == 1
    by_source = dict(zip(results.sources_of("scan"), part.sources, strict=True))
    assert sorted(by_source) == ["clean", "faint", "slanted"]
    assert part.accuracy["best source (by objective)"] == by_source[part.chosen]
    assert part.accuracy["best source (by labels)"] == max(by_source.values())
    assert set(methods) < set(part.accuracy) == set(results.methods)
    assert list(part.routes) == methods
    assert all(weights.shape == (2, 2) for weights in part.routes.values())
    mixed, (a, b, c) = part.routes["convex mixture + AdaBN"], part.source_routes
    parts = np.linalg.lstsq(np.stack([x.ravel() for x in (a, b, c)], 1), mixed.ravel(), rcond=None)[0]
    np.testing.assert_allclose(parts.sum(), 1, atol=0.02)


def test_targets_that_are_held_out_have_the_same_sources(tmp_path):
    options = [*TINY, "--images", 2, "--templates", 2, "--adapt-steps", 2, "--adapt-batch", 8, "--seeds", 0]
    chosen = ["--targets", "fog-5", "contrast+gaussian_noise", "--methods", "convex mixture + AdaBN"]
    done = run(*options, *chosen, "--data", "rendered-corrupted", "--runs", tmp_path, script="modular_adaptation.py")
    folder = tmp_path / "modular-adaptation-rendered-corrupted"
    results = results_of(done, folder, AdaptationResults)
    sources = results.sources_of("fog-5")
    assert len(sources) == 13 and len(results.domains) == 20 and set(results.targets) < set(results.held_out)
    (parts,), (learned,) = results.parts, results.source_parts
    np.testing.assert_array_equal(learned[0].accuracy, learned[1].accuracy)
    assert [len(part.sources) for part in parts] == [13, 13] and {part.chosen for part in parts} <= set(sources)
    assert [pool.name for pool in (folder / "pools").iterdir()] == ["0-held-out"]


def test_blocks_are_used_twice_at_equal_parameters(tmp_path):
    done = run(*TINY, "--tasks", 2, "--seeds", 0, "--runs", tmp_path, script="modular_reuse.py")
    methods = results_of(done, tmp_path / "modular-reuse-glyphs", ReuseResults).methods
    short, parameters = methods["2-layers"], {name: int(method.parameters[0]) for name, method in methods.items()}
    gained = parameters["2-layers"] + 2  # of two more layers
    assert {parameters[name] for name in ("aabb", "abab", "random")} == {gained}
    assert parameters["aabb, no gain"] == gained - 4
    assert parameters["learned"] == gained + 4 * 2
    block = 2 * (3 * 3 * 4 * 4) + 2 * 2 * 4
    assert parameters["distinct"] == gained + 2 * block
    assert [methods[name].route[0].tolist() for name in ("aabb", "abab")] == [[0, 0, 1, 1], [0, 1, 0, 1]]
    multiplications = 2 * (2 * 2) * 2 * (3 * 3 * 4 * 4)  # two more layers on 2 x 2 positions
    assert methods["aabb"].macs == methods["distinct"].macs == short.macs + multiplications


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("multitask", ["--data", "mnist"], "mnist needs data_dir"),
        ("transfer", ["--tasks", 2, "--held-out", 2], "one must stay at least"),
        ("transfer", ["--tasks", 2, "--budgets", 7], "7 images of each class were asked for"),
        ("transfer", ["--tasks", 3, "--images", 1, "--budgets", 0], "has 1 training image, .* by two of each"),
        ("transfer", ["--methods", "scratch"], "held against head"),
        ("adaptation", ["--targets", "snow"], "no domain is called snow"),
        ("adaptation", ["--label", "coarse_label"], "--label plays no part with rendered"),
        ("adaptation", ["--data", "rendered-corrupted", "--targets", "fog", "fog-5"], "all held out or none is"),
        ("multitask", ["--batch", 100_000], "--batch 100000 is more than the 48 training images of 'arabic'"),
        ("transfer", ["--tasks", 2, "--batch", 56], "--batch 56 is more than the 48 training images of '"),
        ("transfer", ["--tasks", 2, "--new-batch", 56], "--new-batch 56 is more than the 48 training images of '"),
        ("adaptation", ["--batch", 72], "--batch 72 is more than the 60 training images of '"),
        ("adaptation", ["--adapt-batch", 72], "--adapt-batch 72 is more than the 60 training images of 'clean'"),
        ("reuse", ["--tasks", 2, "--batch", 104], "--batch 104 is more than the 96 training images of 'glyphs'"),
        ("reuse", ["--patch", 3], "can't be cut into patches of 3"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(script, arguments, told, tmp_path):
    line = [*TINY, "--batch", 8, "--seeds", 0, *arguments, "--name", "bad", "--runs", tmp_path]
    with pytest.raises(ValueError, match=told):
        main(*line, script=f"modular_{script}.py")
    assert not (tmp_path / "bad").exists()


def test_settings_are_chosen_on_a_part_of_the_training_images(tmp_path):
    options = [*TINY, "--steps", 2, "--tasks", 2, "--templates", 2, "--baselines", "random", "--validation", 0.34]
    done = run(*options, "--seeds", 0, "--runs", tmp_path, script="modular_multitask.py")
    results = results_of(done, tmp_path / "modular-multitask-glyphs", MultitaskResults)
    assert set(results.job.test_images.values()) == {8 * 2} and set(results.job.train_images.values()) == {8 * 4}
    page = (tmp_path / "modular-multitask-glyphs" / "report.html").read_text()
    assert results.job.validation == 0.34 and "34% of the training images, to choose by" in page


@pytest.mark.parametrize("kind", ["linear", "soft", "hard"])
def test_a_new_task_is_learned_by_every_kind_of_route(kind, tmp_path):
    options = ["--tasks", 3, "--templates", 2, "--new-steps", 2, "--new-batch", 8, "--budgets", 2, "--route", kind]
    options += ["--groups", 2] * (kind == "linear")
    methods = ["head", "head+route", "scratch", "head, random route", "head+route, random start"]
    methods += ["head, random source"]
    methods += ["head, closed-form route"] * (kind == "linear")
    line = [*TINY, "--steps", 2, *options, "--methods", *methods, "--seeds", 0]
    done = run(*line, "--runs", tmp_path, script="modular_transfer.py")
    results = results_of(done, tmp_path / "modular-transfer-glyphs", TransferResults)
    assert list(results.methods) == methods and all(np.isfinite(results.accuracy(name)).all() for name in methods)
