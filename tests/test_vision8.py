"""Different tasks merged under frozen heads: the run's numbers, what is kept of it, and what it says to bad input."""

import sys

import jax
import numpy as np
import pytest
from jobs import ROOT, main, run

from compo_jax import adapters, data, models
from compo_jax.compose.rule_results import MergingResults
from compo_jax.pool import ModulePool
from compo_jax.train import read_result

sys.path.insert(0, str(ROOT / "experiments"))
import vision8

SMALL = ["--images", "60", "--test-images", "40", "--steps", "12", "--batch", "8", "--curvature-images", "8"]
RULES = ["average", "ties", "fisher"]


def test_tasks_are_merged_under_heads_that_stay_and_a_run_that_is_there_is_not_made_again(tmp_path):
    line = [*SMALL, "--kinds", "lora", "--runs", tmp_path, "--name", "small"]
    done = run(*line, "--rules", *RULES, script="vision8.py")
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_result(tmp_path / "small" / "metrics.json", MergingResults)
    (measured,) = results.runs
    pool = measured.pools["lora"]
    assert len(measured.tasks) == 8
    assert list(pool.rules) == RULES
    assert pool.joint.shape == pool.individual.shape == (8,)
    assert pool.individual.mean() > pool.base.mean() - 0.02  # modules were trained from there
    np.testing.assert_allclose(np.diag(pool.cosines), 1, rtol=1e-5)

    modules = ModulePool(tmp_path / "small" / "pools" / "lora-0")
    base = models.backbone().params
    adapter = adapters.lora(rank=8)
    for name in modules.names():
        head, start = modules.load(name, "head"), modules.load(name, "start")
        jax.tree.map(np.testing.assert_array_equal, head, start)
    module = modules.load(modules.names()[0])
    assert any(np.any(leaf) for leaf in jax.tree.leaves(adapter.delta(module, base)) if leaf is not None)

    assert not list((tmp_path / "small").glob("checkpoints/*"))
    again = run(*line, "--rules", "average", script="vision8.py")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "trained in" not in again.stdout
    np.testing.assert_array_equal(
        read_result(tmp_path / "small" / "metrics.json", MergingResults).runs[0].pools["lora"].individual,
        pool.individual,
    )


def test_a_head_is_the_regression_on_the_features_themselves():
    model, base, *_ = models.backbone()
    stream = data.open_tasks(["glyphs"], model.image_size, tasks=2, classes=2, images=30)
    head = vision8.fitted_head(model, base, stream)
    assert head["kernel"].shape == (model.width, 4)
    for first, task in zip(stream.offsets, stream.tasks, strict=True):
        features = model.apply({"params": base}, stream.prepare(task.train.images(np.arange(len(task.train)))))
        logits = np.asarray(features) @ head["kernel"] + head["bias"]
        guesses = logits[:, first : first + 2].argmax(1)
        assert np.mean(guesses == task.train.labels) > 0.95


def test_what_cannot_be_merged_is_told(tmp_path):
    for arguments, told in (
        (["--data-dir", tmp_path, "--data", "glyphs"], "--data-dir plays no part with glyphs"),
        (["--curvature-images", 4000], "a task has .* training images: --curvature-images and --batch are as many"),
        (["--data", "mnist", "dtd64"], "mnist needs data_dir"),
        (["--test-images", 5], "arabic has 8 classes, and 5 images are not one of each"),
    ):
        with pytest.raises(ValueError, match=told):
            main(*arguments, "--runs", tmp_path, script="vision8.py")
    assert not list(tmp_path.iterdir())
