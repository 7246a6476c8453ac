"""Different tasks merged under frozen heads: the run's numbers, what is kept of it, and what it says to bad input."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jobs import ROOT, main, run

from compo_jax import adapters, curvature, data, incremental, models, tree
from compo_jax.compose.rule_results import MergingResults
from compo_jax.pool import ModulePool
from compo_jax.train import read_result

sys.path.insert(0, str(ROOT / "experiments"))
import vision8
import vision8_added
import vision8_training

SMALL = ["--images", "60", "--test-images", "40", "--steps", "12", "--batch", "8", "--curvature-images", "8"]
RULES = ["average", "ties", "fisher"]


def test_tasks_are_merged_under_heads_that_stay_and_a_run_that_is_there_is_not_made_again(tmp_path):
    line = [*SMALL, "--kinds", "lora", "--runs", tmp_path, "--name", "small"]
    done = run(*line, "--rules", *RULES, "--together", 4, script="vision8.py")
    assert done.returncode == 0, done.stdout + done.stderr
    for place, of in (("tasks-1-4", slice(0, 4)), ("tasks-5-8", slice(4, 8))):
        (part,) = read_result(tmp_path / "small" / place / "metrics.json", MergingResults).runs
        (measured,) = read_result(tmp_path / "small" / "metrics.json", MergingResults).runs
        np.testing.assert_array_equal(part.pools["lora"].individual, measured.pools["lora"].individual[of])
        np.testing.assert_array_equal(part.pools["lora"].base, measured.pools["lora"].base[of])
        np.testing.assert_allclose(part.pools["lora"].cosines, measured.pools["lora"].cosines[of, of], atol=1e-6)
        assert part.tasks == measured.tasks[of]
        assert list(part.pools["lora"].rules) == RULES
        assert (tmp_path / "small" / place / "report.html").exists()
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
    assert not (tmp_path / "small" / "unfinished").exists()
    of_others = tmp_path / "small" / "unfinished" / "tasks-1-8-lora-1"
    of_others.mkdir(parents=True)
    again = run(*line, "--rules", "average", script="vision8.py")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "trained in" not in again.stdout
    assert list(of_others.parent.iterdir()) == [of_others]  # another seed's, which was killed
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
        (["--images", 60], "--curvature-images 64 is more than the 60 training images of 'arabic': name fewer"),
        (["--images", 60, "--batch", 64], "--batch 64 is more than the 60 training images of 'arabic'"),
        (["--images", 60, "--kinds", "tak", "--batch", 56], "--batch 56 is more than the 48 training images of"),
        (["--data", "mnist", "dtd64"], "mnist needs data_dir"),
        (["--kinds", "linear", "--strengths", 5], "--strengths plays no part without tak or delta among"),
        (["--kinds", "tak", "--distillation", 5], "--distillation plays no part without delta among --kinds"),
        (["--kinds", "full", "--rank", 4], "--rank plays no part without lora among --kinds"),
        (["--kinds", "tak", "--together", 4], "--together plays no part without lora or full among"),
        (["--test-images", 5], "arabic has 8 classes, and 5 images are not one of each"),
        (["--together", 4, 8], "--together is two tasks at least and less than all, and there are 8"),
    ):
        with pytest.raises(ValueError, match=told):
            main(*arguments, "--runs", tmp_path, script="vision8.py")
    assert not list(tmp_path.iterdir())


# -- modules to be added -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def parts():
    """Two tasks of twenty training images."""
    stream = data.open_tasks(["glyphs"], models.backbone().model.image_size, tasks=2, classes=2, images=10)
    return vision8_added.held_out(stream._replace(augment=None), 0)


@pytest.fixture(scope="module")
def small(parts):
    """A run of these tasks, without pools or a folder."""
    model, base, described, _ = models.backbone()
    head = vision8.fitted_head(model, base, parts.stream)
    return incremental.FinishedRun(Path(), {"seed": 0}, model, base, described, parts.stream, {}, head)


def full_delta(base, seed):
    adapter = adapters.full()
    module = adapter.init(jax.random.key(seed), base)
    return jax.tree.map(lambda x: 0.01 * jax.random.normal(jax.random.key(seed + x.size), x.shape), module)


def test_a_fifth_of_the_training_images_is_left_out(parts):
    for task, left in zip(parts.stream.tasks, parts.validation.tasks, strict=True):
        rows = [set(split.rows.tolist()) for split in (task.train, left.test)]
        assert len(rows[1]) == 4 and not rows[0] & rows[1] and rows[0] | rows[1] == set(range(20))


def test_all_weightings_are_tested_at_once_as_each_is_by_itself(small):
    deltas = [full_delta(small.base, t) for t in range(2)]
    weighed = vision8_added.weighed(small, deltas, small.stream, batch=16)
    extract = incremental.features(small.model, small.stream, 16, around=small.base)
    test = incremental.evaluator(extract, small.stream)
    for weights in ([1.0, 1.0], [-0.6, 0.0]):
        params = tree.add(small.base, tree.weighted_sum(deltas, weights))
        for task, logits in zip(small.stream.tasks, weighed.logits, strict=True):
            expected = extract(params, task.test) @ small.head["kernel"] + small.head["bias"]
            np.testing.assert_allclose(logits.at(np.array(weights)), expected, atol=1e-2)
        expected = test(params, small.head, 2)
        jax.tree.map(np.testing.assert_array_equal, weighed.accuracies(np.array(weights)), expected)
    sweep = vision8_added.sweep(weighed.accuracies, 2, np.linspace(0, 1, 11))
    np.testing.assert_array_equal(sweep.added[-1], weighed.accuracies(np.ones(2)).within)
    np.testing.assert_array_equal(sweep.negated[6, 0], weighed.accuracies(np.array([-0.6, 0.0])).within)
    np.testing.assert_array_equal(sweep.target()[6], (sweep.negated[6, 0, 0] + sweep.negated[6, 1, 1]) / 2)
    np.testing.assert_array_equal(sweep.control()[6], (sweep.negated[6, 0, 1] + sweep.negated[6, 1, 0]) / 2)


def test_shared_factors_measure_how_far_a_delta_moves_the_features_of_a_task(small):
    for factors in vision8_added.shared_factors(small, 16, 0):
        assert int(factors.count) == 16
        assert set(factors.inputs) == {name for name in tree.names(small.base) if "blocks" in name and "kernel" in name}
        assert float(factors.quadratic(full_delta(small.base, 3))) > 0


def test_the_strength_of_the_penalty_is_chosen_by_the_images_left_out(small, parts, tmp_path):
    line = ["--kinds", "tak", "--steps", "3", "--batch", "8", "--strengths", "1", "1e5"]
    options = vision8.parse([*line, "--linear-learning-rate", "1e-4"])
    run = small._replace(folder=tmp_path)
    pool = vision8.disentangled(vision8.Bench(run, options, 0, {}, parts.validation), "tak")
    assert list(pool.rules) == ["average", "added", "added, scaled"]
    np.testing.assert_array_equal(pool.rules["added"].within, pool.scaled.test.added[-1])
    np.testing.assert_array_equal(pool.base, pool.scaled.test.added[0])
    assert {path.name for path in (tmp_path / "pools").iterdir()} == {"tak-1.0-0", "tak-100000.0-0", "linear-joint-0"}
    pools = {strength: ModulePool(tmp_path / "pools" / f"tak-{strength}-0") for strength in ("1.0", "100000.0")}
    deltas = {strength: list(pool.deltas(run.base)) for strength, pool in pools.items()}
    reached = {
        strength: vision8_added.weighed(run, some, parts.validation).accuracies(np.ones(2)).within.mean()
        for strength, some in deltas.items()
    }
    assert pool.rules["added"].options == {"coefficient": "1", "strength": f"{float(max(reached, key=reached.get)):g}"}
    others = curvature.factors_of_others(vision8_added.shared_factors(run, 256, 0))[0]
    assert others.quadratic(deltas["100000.0"][0]) < others.quadratic(deltas["1.0"][0])


def test_delta_learns_along_its_path_from_1_to_between_a_half_and_2():
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = lambda progress: np.asarray(jax.vmap(lambda key: vision8_added.along_path(key, progress))(keys))
    np.testing.assert_array_equal(drawn(0.0), 1)
    for progress, low, high in ((0.25, 0.75, 1.5), (1.0, 0.5, 2.0)):
        some = drawn(progress)
        assert low <= some.min() < low + 0.01 and high - 0.01 < some.max() <= high
        np.testing.assert_allclose(some.mean(), (low + high) / 2, atol=0.03)


def options_of_delta(*more):
    return vision8.parse(["--kinds", "delta", "--steps", "8", "--batch", "8", *map(str, more)])


def test_the_loss_of_delta_is_that_of_its_parts(small):
    options, base = options_of_delta("--distillation", 3.0), small.base
    bench = vision8.Bench(small, options, 0, {}, None)
    way = vision8_training.method(options, "delta")
    mode = way.mode(incremental.Setup(small.model, base, small.stream, incremental.Settings(), 0), way)
    loss = vision8_training.learning(bench, "delta", mode, 40, True)
    deltas = {name: full_delta(base, seed) for name, seed in (("module", 1), ("teacher", 2))}
    others = curvature.factors_of_others(vision8_added.shared_factors(small, 16, 0))[0]
    key, images = jax.random.key(5), small.stream.tasks[1].train.images(np.arange(6))
    labels = small.stream.tasks[1].train.labels[:6]
    context = {"held": mode.hold({}), "head": small.head, "key": key, "others": others, "strength": 0.7}
    value, metrics = loss(deltas, context, {"image": images, "label": labels + 2}, 10)

    part = float(vision8_added.along_path(jax.random.fold_in(key, 10), 0.25))
    features = lambda params: small.model.apply({"params": params}, small.stream.prepare(images), method="features")
    at = lambda name, part: tree.add(base, deltas[name], part)
    student, start = (np.asarray(features(p), np.float64) for p in (at("module", part), base))
    width = 1e-2  # a central difference in float32
    slope = (np.asarray(features(at("teacher", width))) - np.asarray(features(at("teacher", -width)))) / (2 * width)
    expected, teacher = 0.0, start + part * slope
    for name, z in (("module", student), ("teacher", teacher)):
        logits = (z @ small.head["kernel"] + small.head["bias"])[:, 2:]  # of task 1 alone
        expected += np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(6), labels])
        expected += 0.7 * float(others.quadratic(deltas[name]))
        if name == "module":
            np.testing.assert_allclose(metrics["accuracy"], np.mean(logits.argmax(1) == labels))
    expected += 3.0 * ((student - teacher) ** 2).sum() / (teacher**2).sum()
    np.testing.assert_allclose(value, expected, rtol=2e-3)

    gradients = jax.grad(lambda p: vision8_added.distance(p["student"], p["teacher"]))(
        {"student": student.astype(np.float32), "teacher": teacher.astype(np.float32)}
    )
    np.testing.assert_allclose(gradients["student"], 2 * (student - teacher) / (teacher**2).sum(), rtol=1e-4, atol=1e-8)
    np.testing.assert_array_equal(gradients["teacher"], 0)


def test_a_module_that_a_teacher_drew_is_added_and_taken_off_in_the_network_itself(small, parts, tmp_path):
    options, run = options_of_delta("--strengths", 0.5), small._replace(folder=tmp_path)
    measured = vision8.disentangled(vision8.Bench(run, options, 0, {}, parts.validation), "delta")
    assert {path.name for path in (tmp_path / "pools").iterdir()} == {"delta-0.5-0", "full-joint-0"}
    deltas = list(ModulePool(tmp_path / "pools" / "delta-0.5-0").deltas(run.base))
    assert all(any(np.any(leaf) for leaf in jax.tree.leaves(delta)) for delta in deltas)
    test = incremental.evaluator(incremental.features(small.model, small.stream, 16), small.stream)
    for weights, at in (([1.0, 1.0], measured.scaled.test.added[4]), ([0.0, -0.5], measured.scaled.test.negated[2, 1])):
        params = tree.add(run.base, tree.weighted_sum(deltas, weights))
        np.testing.assert_array_equal(at, test(params, run.head, 2).within)
    np.testing.assert_array_equal(measured.rules["added"].within, measured.scaled.test.added[4])
    np.testing.assert_array_equal(measured.scaled.coefficients, [0, 0.25, 0.5, 0.75, 1])
