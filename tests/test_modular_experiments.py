"""The four experiments on modular networks from their command lines: results, a kill, more seeds, bad input."""

import json

import numpy as np
import pytest
from jobs import comparable, killed, main, run

from compo_jax.pool import ModulePool

TINY = ["--images", 6, "--size", 8, "--layers", 2, "--width", 4, "--steps", 5, "--batch", 4]
MULTITASK = [*TINY, "--tasks", 2, "--templates", 2, "--baselines", "hard-sharing-bn", "--analysis-images", 4]


def metrics_of(done, folder):
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "report.html").stat().st_size > 10_000
    return json.loads((folder / "metrics.json").read_text())


def test_a_killed_multitask_run_that_is_given_more_seeds_ends_as_a_whole_one(tmp_path):
    job = {"script": "modular_multitask.py"}
    begun = tmp_path / "a" / "checkpoints" / "0-ordered-2" / "fixed"  # in the third phase of its second part
    assert killed(begun, *MULTITASK, "--seeds", 0, "--runs", tmp_path, "--name", "a", **job)
    assert not (tmp_path / "a" / "parts" / "0-ordered-2.json").exists()
    found = []
    for name in "ab":
        done = run(*MULTITASK, "--seeds", 0, 1, "--runs", tmp_path, "--name", name, **job)
        found.append(metrics_of(done, tmp_path / name))
    first, second = found
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")
    assert not list((tmp_path / "a" / "checkpoints").iterdir())
    for metrics in found:
        for method in metrics["methods"].values():
            assert min(method.pop("seconds")) > 0
    keys = ("tasks", "classes", "methods", "gap", "curves", "routes", "removal", "bridge")
    assert {key: first[key] for key in keys} == {key: second[key] for key in keys}
    assert list(first["methods"]) == ["hard-sharing-bn", "ordered-2"]
    assert first["methods"]["ordered-2"]["accuracy"] == first["gap"]["ordered-2"]["finetuned"]
    logits = 2 * 2 * 2  # tasks, layers, templates
    sizes = [method["parameters"] for method in first["methods"].values()]
    assert sizes[1] - sizes[0] == logits
    assert np.shape(first["removal"]["ordered-2"]["drop"]) == (2, 2)
    bridge = first["bridge"]
    assert bridge["true"][bridge["chosen"]] == pytest.approx([bridge["loss"]] * 5)  # no re-routing at all
    pool = ModulePool(tmp_path / "a" / "pools" / "ordered-2-1")
    assert pool.names() == ["task-000", "task-001", "templates"]
    assert pool.manifest("task-001").task == "armenian"
    with pytest.raises(ValueError, match="patch: 4 there, 2 now"):
        main(*MULTITASK, "--batch", 8, "--patch", 2, "--runs", tmp_path, "--name", "a", **job)


def test_a_new_task_is_learned_from_few_labels(tmp_path):
    methods = ["head", "head+route", "scratch"]
    options = ["--tasks", 3, "--templates", 2, "--new-steps", 4, "--new-batch", 8, "--budgets", 2, 0]
    done = run(*TINY, *options, "--methods", *methods, "--seeds", 0, "--runs", tmp_path, script="modular_transfer.py")
    found = metrics_of(done, tmp_path / "modular-transfer-glyphs")
    assert found["budgets"] == [2, None]
    assert sorted([*found["tasks"][0], *found["held_out"][0]]) == ["arabic", "armenian", "cyrillic"]
    assert found["chosen"][0][0][0] in found["tasks"][0]
    sizes = {name: method["trained"] for name, method in found["methods"].items()}
    head, kernels, stem, norms = 8 * (4 + 1), 2 * 2 * (3 * 3 * 4 * 4), 4 * 4 * 3 * 4, 2 * 4 * (1 + 2 * 2)
    assert sizes == {"head": head, "head+route": head + 2 * 2, "scratch": head + kernels + stem + norms}
    assert all(np.shape(method["accuracy"]) == (2, 1, 1) for method in found["methods"].values())


def test_a_target_without_labels_is_adapted_to(tmp_path):
    options = [*TINY, "--templates", 2, "--adapt-steps", 2, "--adapt-batch", 8, "--targets", "scan", "--seeds", 0]
    methods = ["route from best source", "convex mixture + AdaBN"]
    done = run(*options, "--methods", *methods, "--runs", tmp_path, script="modular_adaptation.py")
    found = metrics_of(done, tmp_path / "modular-adaptation-rendered")
    by_source, told = found["sources"][0][0], {name: m["accuracy"][0][0] for name, m in found["methods"].items()}
    assert sorted(by_source) == ["clean", "faint", "slanted"]
    assert told["best source (by objective)"] == by_source[found["chosen"][0][0]]
    assert told["best source (by labels)"] == max(by_source.values())
    assert set(methods) < set(told)
    weights = found["routes"]["scan"]["adapted"]
    for name in methods:
        np.testing.assert_allclose(np.sum(weights[name], axis=-1), 1, atol=1e-3)


def test_blocks_are_used_twice_at_equal_parameters(tmp_path):
    done = run(*TINY, "--tasks", 2, "--seeds", 0, "--runs", tmp_path, script="modular_reuse.py")
    found = metrics_of(done, tmp_path / "modular-reuse-glyphs")["methods"]
    short = found["2-layers"]
    assert {found[name]["parameters"] for name in ("aabb", "abab", "random")} == {short["parameters"]}
    assert found["learned"]["parameters"] == short["parameters"] + 4 * 2
    block = 2 * (3 * 3 * 4 * 4) + 2 * 2 * 4
    assert found["distinct"]["parameters"] == short["parameters"] + 2 * block
    assert [found[name]["route"][0] for name in ("aabb", "abab")] == [[0, 0, 1, 1], [0, 1, 0, 1]]
    multiplications = 2 * (2 * 2) * 2 * (3 * 3 * 4 * 4)  # two more layers on 2 x 2 positions
    assert found["aabb"]["macs"] == found["distinct"]["macs"] == short["macs"] + multiplications


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("multitask", ["--data", "mnist"], "mnist needs data_dir"),
        ("transfer", ["--tasks", 2, "--held-out", 2], "one must stay at least"),
        ("transfer", ["--tasks", 2, "--budgets", 7], "7 images of each class were asked for"),
        ("transfer", ["--methods", "scratch"], "held against head"),
        ("adaptation", ["--targets", "snow"], "no domain is called snow"),
        ("reuse", ["--patch", 3], "can't be cut into patches of 3"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(script, arguments, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        main(
            *TINY,
            "--batch",
            8,
            "--seeds",
            0,
            *arguments,
            "--name",
            "bad",
            "--runs",
            tmp_path,
            script=f"modular_{script}.py",
        )
    assert not (tmp_path / "bad").exists()
