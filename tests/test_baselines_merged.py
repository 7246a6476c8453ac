"""Baselines of 2023 to 2025: each by its formula in float64, and against the mistake that is usually made with it."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jobs import ROOT, main
from sklearn.linear_model import Ridge
from way_cases import MODEL, noisy_pictures

from compo_jax import adapters, incremental, tree
from compo_jax.incremental import Results
from compo_jax.incremental.baselines.magmax import largest_magnitude
from compo_jax.incremental.baselines.opcm import projected
from compo_jax.incremental.baselines.simplecil import class_prototypes, unit_rows
from compo_jax.incremental.baselines.slca import DRAWN, align_classes, draw, gaussians
from compo_jax.mesh import data_mesh
from compo_jax.train import jit_runner, read_result

NEW = ["magmax", "opcm", "slca", "ranpac", "simplecil"]
LORA, FULL = adapters.lora(1), adapters.full()


@pytest.fixture(scope="module")
def setup():
    """Three tasks of two classes: noisy pictures of one pattern a class."""
    return noisy_pictures([[0, 1], [2, 3], [4, 5]], noise=40)


RUNNERS = {}


def shared_runner(loss, optimizer, **options):
    """One for all methods of an optimiser, whose steps differ in nothing but their context, to save compilations."""
    kind = jax.tree.structure(optimizer.init({"module": jnp.zeros(1), "head": jnp.zeros(1)}))
    if kind not in RUNNERS:
        RUNNERS[kind] = jit_runner(loss, optimizer, mesh=data_mesh(1), **options)
    return RUNNERS[kind]


def learned(setup, folder):
    methods = [incremental.method(way, LORA, learning_rate=1e-2) for way in NEW]
    return incremental.learn_stream(setup, methods, folder, runner=shared_runner)


@pytest.fixture(scope="module")
def run(setup, tmp_path_factory):
    """What is known after each task, without a kill, and the logits of the test images of all tasks after the last."""
    afters = list(learned(setup, tmp_path_factory.mktemp("whole")))
    tests = [task.test for task in setup.stream.tasks]
    return afters, {
        f"{way}-lora": np.concatenate([afters[-1].classifier(f"{way}-lora")(test) for test in tests]) for way in NEW
    }


def mode_of(setup, way, adapter=FULL, **options):
    return incremental.WAYS[way].mode(setup, incremental.method(way, adapter, learning_rate=1e-2), **options)


def modules(setup, count, adapter=FULL):
    """Some away from their start."""
    random = np.random.default_rng(count)
    start = adapter.init(jax.random.key(0), setup.base)
    return [jax.tree.map(lambda x: x + np.float32(0.1 * random.normal(size=x.shape)), start) for _ in range(count)]


def remembered(setup, mode, learned):
    memory = mode.memory
    for module, task in zip(learned, setup.stream.tasks, strict=False):
        memory = mode.remember(memory, task, 0, module, None, None)
    return memory


def features_of(setup, params, split):
    return incremental.features(MODEL, setup.stream, 16)(params, split)


# -- all of them in a stream -------------------------------------------------------------------------------------------


def test_they_learn_a_stream_and_go_on_after_a_kill(setup, run, tmp_path):
    whole, _ = run
    assert [*whole[0].learned] == [f"{way}-lora" for way in NEW]
    assert [*whole[2].learned] == ["magmax-lora", "opcm-lora", "slca-lora"]  # the others adapt on the first task alone
    for name, outcome in whole[2].outcomes.items():
        assert np.isfinite(outcome.accuracy_matrix[2]).all(), name
        assert outcome.final_accuracy > 0.3, name  # by chance 0.17
    stopped = learned(setup, tmp_path)
    next(stopped)
    stopped.close()
    *_, last = learned(setup, tmp_path)
    for name, outcome in last.outcomes.items():
        np.testing.assert_array_equal(outcome.accuracy_matrix, whole[2].outcomes[name].accuracy_matrix, name)
        one, other = (after.snapshots[name].memory for after in (whole[2], last))
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_memory_has_one_structure_from_the_first_task_to_the_last(setup):
    for way in ("magmax", "opcm", "slca"):
        mode = mode_of(setup, way)
        after = remembered(setup, mode, modules(setup, 2))
        shapes = [jax.tree.map(lambda x: (np.shape(x), str(x.dtype)), memory) for memory in (mode.memory, after)]
        assert shapes[0] == shapes[1], way


def test_the_main_job_takes_their_names(tmp_path, monkeypatch):
    """A run of seconds, with a classifier that adapts first and one that trains nothing under the same way."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    names = importlib.import_module("incremental_options").METHODS
    assert {f"{way}-{kind}" for way in NEW for kind in ("lora", "ia3", "full")} | {"simplecil"} <= {*names}
    tiny = ["--tasks", "2", "--classes", "2", "--images", "8", "--epochs", "1", "--batch", "8", "--fisher-images", "8"]
    tried = ["slca-full", "magmax-lora", "opcm-lora", "ranpac-lora", "simplecil-lora", "simplecil", "ranpac"]
    main(*tiny, "--methods", *tried, "--runs", tmp_path, "--name", "tiny")
    methods = read_result(tmp_path / "tiny" / "metrics.json", Results).methods
    assert [*methods] == tried
    assert [name for name in tried if methods[name].seconds is None] == ["simplecil", "ranpac"]


# -- SimpleCIL, APER and RanPAC ----------------------------------------------------------------------------------------


def cosines(z, labels, new):
    """By their definition, image by image and class by class."""
    means = [z[labels == label].astype(np.float64).mean(axis=0) for label in range(labels.max() + 1)]
    return np.array([[x @ m / np.linalg.norm(x) / np.linalg.norm(m) for m in means] for x in new.astype(np.float64)])


def test_prototypes_are_means_and_logits_are_cosines():
    """Not the nearest mean, and not the mean of normalised features: a class of long features would win or lose."""
    random, labels = np.random.default_rng(0), np.repeat(np.arange(3), 20)
    z = np.array([[3, 1, 0], [1, 2, 1], [0, 1, 9]])[labels] + random.normal(size=(60, 3))
    z = np.float32(z * random.lognormal(size=(60, 1)))
    new = random.normal(1, 2, size=(200, 3)).astype(np.float32)
    head = class_prototypes(z, labels)
    logits = unit_rows(new) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, cosines(z, labels, new), atol=1e-6)
    for wrong in (incremental.nearest_class_mean(z, labels), class_prototypes(unit_rows(z), labels)):
        assert np.mean((new @ wrong["kernel"] + wrong["bias"]).argmax(1) == logits.argmax(1)) < 0.99


def all_features(setup, params, part):
    return np.concatenate([features_of(setup, params, getattr(task, part)) for task in setup.stream.tasks])


def test_what_adapts_first_classifies_by_the_first_task_s_module(setup, run):
    """APER by one cosine of the base's features and the adapted ones in one vector, where two cosines that are added
    are the usual mistake; RanPAC by the adapted ones alone. No later task moves the module."""
    (*_, last), logits = run
    labels, parts = np.repeat(np.arange(6), 16), {}
    for name in ("simplecil-lora", "ranpac-lora"):
        pool = last.learners[name].pool
        assert len(pool.names()) == 1
        adapted = tree.add(setup.base, LORA.delta(pool.load(pool.names()[0]), setup.base))
        parts[name] = [(all_features(setup, p, "train"), all_features(setup, p, "test")) for p in (setup.base, adapted)]
    (train, test), (tuned_train, tuned_test) = parts["simplecil-lora"]
    expected = cosines(np.hstack([train, tuned_train]), labels, np.hstack([test, tuned_test]))
    np.testing.assert_allclose(logits["simplecil-lora"], expected, atol=1e-5)
    added = (cosines(train, labels, test) + cosines(tuned_train, labels, tuned_test)) / 2
    assert np.abs(added - expected).max() > 1e-3
    train, test = parts["ranpac-lora"][1]
    projection, head = incremental.random_projection(jax.random.key(0), train, labels, newest=32)
    np.testing.assert_allclose(logits["ranpac-lora"], np.maximum(test @ projection, 0) @ head["kernel"], atol=1e-4)


def test_the_ridge_is_chosen_on_a_held_out_fifth_of_the_newest_task():
    """With all that is left of the images in the fit, more of them or fewer than the projection is wide. The usual
    mistake is to measure the ridges on images that were fitted: the smallest always wins."""
    random, labels = np.random.default_rng(0), np.repeat(np.arange(4), 15)
    z = (2 * random.normal(size=(4, 5))[labels] + 2 * random.normal(size=(60, 5))).astype(np.float32)
    held, y = np.zeros(60, bool), np.eye(4)[labels]
    held[30:] = np.random.default_rng(0).permutation(30) % 5 == 4
    ridges = (1e-6, 1e0, 1e2, 1e4)
    for width in (20, 200):
        projection, head = incremental.random_projection(
            jax.random.key(0), z, labels, width=width, ridges=ridges, newest=30
        )
        h = np.maximum(z.astype(np.float64) @ projection, 0)
        fits = [Ridge(alpha=r, fit_intercept=False, solver="svd").fit(h[~held], y[~held]) for r in ridges]
        best = ridges[int(np.argmin([np.sum((f.predict(h[held]) - y[held]) ** 2) for f in fits]))]
        expected = Ridge(alpha=best, fit_intercept=False, solver="svd").fit(h, y).coef_.T
        np.testing.assert_allclose(head["kernel"], expected, rtol=1e-5, atol=1e-8)
        assert best > ridges[0]
    with pytest.raises(ValueError, match="newest=61 of 60 images"):
        incremental.random_projection(jax.random.key(0), z, labels, newest=61)


# -- SLCA --------------------------------------------------------------------------------------------------------------


def test_a_class_s_gaussian_is_its_mean_and_its_whole_covariance():
    random, labels = np.random.default_rng(0), np.repeat(np.arange(3), [9, 1, 20])
    z = (random.normal(size=(30, 4)) @ random.normal(size=(4, 4))).astype(np.float32)
    means, roots = gaussians(z, labels)
    for label, rows in enumerate(np.split(z.astype(np.float64), [9, 10])):
        centred = rows - rows.mean(axis=0)
        covariance = centred.T @ centred / max(len(rows) - 1, 1) + 1e-4 * np.eye(4)
        np.testing.assert_allclose(means[label], rows.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(roots[label] @ roots[label].T, covariance, rtol=1e-4, atol=1e-5)
    z, drawn = jax.jit(draw)(jax.random.key(0), means, roots, 2)
    assert np.bincount(drawn[: 2 * DRAWN]).tolist() == [DRAWN, DRAWN]  # of the classes seen, as many of each
    rows = np.asarray(z, np.float64)[np.asarray(drawn) == 0]
    covariance = roots[0] @ roots[0].T
    np.testing.assert_allclose(np.cov(rows.T), covariance, atol=0.4 * np.abs(covariance).max())
    assert np.mean(np.diff(drawn[: 2 * DRAWN]) != 0) > 0.3  # shuffled: a batch is not of one class


def test_the_alignment_is_sgd_on_normalised_logits():
    """The usual mistake is the plain cross-entropy: classes whose head was trained long keep their longer logits."""
    random, total, seen = np.random.default_rng(0), 4, 3
    means = random.normal(size=(total, 5)).astype(np.float32)
    roots = np.stack([0.3 * np.eye(5, dtype=np.float32)] * total)
    head = {"kernel": random.normal(size=(5, total)).astype(np.float32), "bias": np.zeros(total, np.float32)}
    head["kernel"] *= [5, 1, 1, 1]
    aligned = jax.jit(align_classes)(jax.random.key(3), head, means, roots, seen)
    w, b = (np.float64(head[part][..., :seen]) for part in ("kernel", "bias"))
    pace, push = np.zeros_like(w), np.zeros_like(b)
    for epoch in range(5):
        rate = 0.01 * 0.5 * (1 + np.cos(np.pi * epoch / 5))
        z, labels = draw(jax.random.fold_in(jax.random.key(3), epoch), means, roots, seen)
        for batch in range(seen):
            rows = slice(256 * batch, 256 * (batch + 1))
            x, y = np.asarray(z, np.float64)[rows], np.eye(seen)[np.asarray(labels)[rows]]
            logits = x @ w + b
            norm = np.linalg.norm(logits, axis=1, keepdims=True)
            p = np.exp(logits / norm / 0.1)
            slope = (p / p.sum(1, keepdims=True) - y) / 0.1 / 256  # in the logits divided by their norm
            direction = logits / norm
            slope = (slope - direction * np.sum(slope * direction, axis=1, keepdims=True)) / norm
            pace, push = (0.9 * v + g + 5e-4 * h for v, g, h in ((pace, x.T @ slope, w), (push, slope.sum(0), b)))
            w, b = w - rate * pace, b - rate * push
    np.testing.assert_allclose(aligned["kernel"][:, :seen], w, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(aligned["bias"][:seen], b, rtol=1e-3, atol=1e-4)


def test_a_slow_learner_remembers_the_features_that_each_task_left(setup):
    """The usual mistakes: Gaussians of the base's features, and those of old classes made anew by the moved model."""
    mode, (first, second) = mode_of(setup, "slca"), modules(setup, 2)
    tasks = setup.stream.tasks
    memory = mode.remember(mode.memory, tasks[0], 0, first, None, None)
    memory = mode.remember(memory, tasks[1], 2, second, None, None)
    for at, module, task in ((0, first, tasks[0]), (2, second, tasks[1])):
        z = features_of(setup, tree.add(setup.base, module), task.train)
        expected = [z[task.train.labels == label].mean(axis=0) for label in range(2)]
        np.testing.assert_allclose(memory["means"][at : at + 2], expected, atol=1e-5)
        assert np.abs(expected - features_of(setup, setup.base, task.train)[[0, 16]]).max() > 1e-2
    assert not np.any(memory["means"][4:]) and not np.any(memory["roots"][4:])


def test_the_backbone_learns_a_hundred_times_slower_than_the_head(setup):
    start, after = incremental.reference_stage(setup, [r"(qkv|proj|fc1|fc2)/kernel$"])
    reference, moved = after(start, 0), {}
    for way in ("sequential", "slca"):
        mode, train = incremental.task_trainer(setup, incremental.method(way, FULL, learning_rate=1e-3))
        module, head, _ = train(setup.stream.tasks[0], 0, reference, mode.memory)
        change = jax.tree.map(lambda h, r: h - np.asarray(r)[..., :2], head, reference.head)
        moved[way] = [max(np.abs(x).max() for x in jax.tree.leaves(part)) for part in (module, change)]
    (module, head), (slow_module, slow_head) = moved["sequential"], moved["slca"]
    assert 0.005 < slow_module / module < 0.02
    assert 0.5 < slow_head / head < 2


def test_each_alignment_begins_with_the_heads_as_they_were_trained(setup, run):
    (*_, last), logits = run
    pool, snapshot = last.learners["slca-lora"].pool, last.snapshots["slca-lora"]
    heads = [pool.load(name, "head") for name in pool.names()]
    trained = jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *heads)
    key = jax.random.fold_in(jax.random.key(0), 2)
    head = align_classes(key, trained, snapshot.memory["means"], snapshot.memory["roots"], 6)
    params = tree.add(setup.base, LORA.delta(pool.load(pool.names()[-1]), setup.base))
    expected = all_features(setup, params, "test") @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits["slca-lora"], expected, atol=1e-3)


# -- MagMax ------------------------------------------------------------------------------------------------------------


def test_the_largest_entries_of_the_vectors_from_the_base_are_merged(setup):
    """The usual mistakes are the vectors from task to task, and the largest with its sign, which no negative wins."""
    learned = modules(setup, 3)
    memory = remembered(setup, mode_of(setup, "magmax"), learned)
    for merged, *vectors in zip(*map(jax.tree.leaves, (memory["merged"], *learned)), strict=True):
        stack = np.stack(vectors)
        expected = np.take_along_axis(stack, np.abs(stack).argmax(axis=0)[None], axis=0)[0]
        np.testing.assert_array_equal(merged, expected)
        assert np.any(expected < 0)
    one = largest_magnitude({"a": jnp.array([1.0, -2.0, 3.0])}, {"a": jnp.array([-1.0, 1.0, -4.0])})
    np.testing.assert_array_equal(one["a"], [1, -2, -4])


def composed_logits(setup, last, name, merged, scale):
    pool = last.learners[name].pool
    head = incremental.pool_head(pool, pool.names(), last.reference.head)
    return all_features(setup, tree.add(setup.base, merged, scale), "test") @ head["kernel"] + head["bias"]


def test_what_is_tested_is_half_of_what_fine_tuning_left_merged(setup, run):
    (*_, last), logits = run
    pool = last.learners["magmax-lora"].pool
    deltas = [LORA.delta(pool.load(name), setup.base) for name in pool.names()]
    merged = jax.tree.map(lambda *x: np.take_along_axis(np.stack(x), np.abs(x).argmax(0)[None], 0)[0], *deltas)
    expected = composed_logits(setup, last, "magmax-lora", merged, 0.5)
    np.testing.assert_allclose(logits["magmax-lora"], expected, atol=1e-4)


# -- OPCM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (6, 4)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_a_projection_is_the_double_sum_over_singular_vectors(shape, alpha):
    random = np.random.default_rng(0)
    merged, delta = random.normal(size=(2, *shape)), random.normal(size=(2, *shape))
    found = projected(delta, merged, alpha)
    for layer in range(2):
        u, s, vt = np.linalg.svd(merged[layer])  # with the vectors that have no value
        first = next(r for r in range(len(s)) if s[: r + 1].sum() >= alpha * s.sum())
        expected = sum(
            (u[:, i] @ delta[layer] @ vt[j]) * np.outer(u[:, i], vt[j])
            for i in range(first, shape[0]) for j in range(first, shape[1]) if i != j
        )  # fmt: skip
        np.testing.assert_allclose(found[layer], expected, atol=1e-12)
        np.testing.assert_allclose(np.sum(found[layer] * merged[layer]), 0, atol=1e-12)
    np.testing.assert_array_equal(projected(delta, np.zeros_like(merged), alpha), delta)  # nothing is merged yet


def test_vectors_without_a_singular_value_take_nothing_away():
    """A LoRA module's merged vector has few; the others that an SVD returns are any, by the library and its version."""
    random = np.random.default_rng(0)
    a, b, delta = (random.normal(size=size) for size in ((6, 2), (2, 5), (6, 5)))
    found = projected(delta, a @ b, 0.0)
    u, _, vt = np.linalg.svd(a @ b)
    expected = delta - sum((u[:, i] @ delta @ vt[i]) * np.outer(u[:, i], vt[i]) for i in range(2))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_every_task_keeps_its_share_in_a_merged_model_as_long_as_the_mean_task_vector(setup):
    """The usual mistake is to forget that the merged vector was scaled already: the first tasks shrink with each merge.
    Here no two vectors have a direction in common, so that the projection leaves each as it is."""
    mode, leaf = mode_of(setup, "opcm"), "fc1"
    zero = jax.tree.map(np.zeros_like, FULL.init(jax.random.key(0), setup.base))
    learned, lengths = [], (3.0, 1.0, 2.0)
    for t, length in enumerate(lengths):
        module = jax.tree.map(np.copy, zero)
        (kernel,) = [x for name, x in tree.by_name(module).items() if leaf in name]
        kernel[..., t, t] = length
        learned.append(module)
    memory = remembered(setup, mode, learned)
    np.testing.assert_allclose(memory["length"] / memory["tasks"], 2)
    (total,) = [x for name, x in tree.by_name(memory["sum"]).items() if leaf in name]
    np.testing.assert_allclose([np.asarray(total)[..., t, t].item() for t in range(3)], lengths, rtol=1e-6)


def test_what_is_tested_is_the_projected_sum_at_the_mean_length(setup, run):
    (*_, last), logits = run
    pool = last.learners["opcm-lora"].pool
    deltas = [LORA.delta(pool.load(name), setup.base) for name in pool.names()]
    total = jax.tree.map(np.float64, deltas[0])
    for delta in deltas[1:]:
        total = jax.tree.map(lambda s, d: s + projected(np.float64(d), s, 0.5), total, delta)
    norm = lambda delta: np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(delta)))
    scale = np.mean([norm(delta) for delta in deltas]) / norm(total)
    merged = jax.tree.map(np.float32, total)
    expected = composed_logits(setup, last, "opcm-lora", merged, float(scale))
    np.testing.assert_allclose(logits["opcm-lora"], expected, atol=1e-3)
