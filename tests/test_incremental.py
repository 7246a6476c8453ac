"""The parts of incremental learning: mixtures, alignment, penalties and metrics, against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax import adapters, incremental, tree
from compo_jax.curvature import fisher_diagonal
from compo_jax.incremental import Mixtures

X64 = jax.enable_x64


def arrays(seed, *shapes, scale=1.0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(scale * random.normal(size=shape)) for shape in shapes]


def all_of(split):
    """The images and labels of a split."""
    return split.images(np.arange(len(split))), split.labels


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def cross_entropy(values, labels):
    return -np.mean(np.log(softmax(np.asarray(values, np.float64))[np.arange(len(labels)), labels]))


# -- the penalties -----------------------------------------------------------------------------------------------------


def deltas(count):
    """`count` task vectors over two weights, with a None hole, and a positive diagonal."""
    fisher = jax.tree.map(jnp.square, dict(zip("wv", arrays(0, (4, 3), (2, 3, 2)), strict=True))) | {"hole": None}
    return fisher, [
        dict(zip("wv", arrays(1 + t, (4, 3), (2, 3, 2)), strict=True)) | {"hole": None} for t in range(count)
    ]


def close(a, b, rtol=1e-12):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max(initial=0))


def test_the_gradient_of_the_ita_penalty_is_alpha_times_fisher_times_delta():
    with X64(True):
        fisher, (delta,) = deltas(1)
        close(
            jax.grad(incremental.ita_penalty)(delta, fisher, 0.3), jax.tree.map(lambda f, d: 0.3 * f * d, fisher, delta)
        )


def test_a_hole_on_either_side_counts_as_zero():
    with X64(True):
        fisher, (delta, past) = deltas(2)
        more = {**fisher, "hole": jnp.ones(3)}
        less = {**fisher, "v": None}
        value = incremental.ita_penalty(delta, fisher, 2.0)
        np.testing.assert_allclose(value, sum(np.sum(fisher[k] * delta[k] ** 2) for k in "wv"), rtol=1e-12)
        assert incremental.ita_penalty(delta, more, 2.0) == value
        gradient = jax.grad(incremental.iel_penalty)(delta, past, less, 1.0, 2)
        np.testing.assert_allclose(gradient["w"], less["w"] * (delta["w"] - past["w"]) / 2, rtol=1e-12)
        assert not np.any(gradient["v"])


def test_the_ita_penalty_is_independent_of_the_number_of_tasks():
    """Ten other tasks like this one pull as hard as one; only IEL sees how many there are."""
    with X64(True):
        fisher, (delta, past) = deltas(2)
        one = jax.grad(incremental.ita_penalty)(delta, fisher, 0.3)
        for tasks in (3, 11):
            mean = tree.weighted_sum([fisher] * (tasks - 1), [1 / (tasks - 1)] * (tasks - 1))
            close(jax.grad(incremental.ita_penalty)(delta, mean, 0.3), one)
        several = [jax.grad(incremental.iel_penalty)(delta, past, fisher, 0.3, tasks)["w"] for tasks in (3, 11)]
        assert not np.allclose(*several, rtol=0.1)


def test_lora_gets_the_chain_rule():
    with X64(True):
        w, other = arrays(0, (2, 5, 4), (5, 4))
        base = {"w": w, "other": other}
        fisher = {"w": jnp.square(arrays(1, w.shape)[0]), "other": None}
        adapter = adapters.lora(2, targets="^w$", stacked="^w$")
        module = adapter.init(jax.random.key(0), base)
        a, b = module["w"]["a"], arrays(2, module["w"]["b"].shape)[0]
        assert a.dtype == jnp.float64
        found = jax.grad(lambda m: incremental.ita_penalty(adapter.delta(m, base), fisher, 0.7))(
            {**module, "w": {"a": a, "b": b}}
        )
        for layer in range(2):
            g = 0.7 * fisher["w"][layer] * (np.asarray(a[layer]) @ np.asarray(b[layer]))
            np.testing.assert_allclose(found["w"]["a"][layer], g @ b[layer].T, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(found["w"]["b"][layer], a[layer].T @ g, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tasks", [2, 5])
def test_the_gradient_of_the_iel_penalty_is_that_of_the_ensembles_gap(tasks):
    with X64(True):
        fisher, vectors = deltas(tasks)
        beta, w = 1.7, 1 / tasks

        def gap(last):
            every = [*vectors[:-1], last]
            pairs = [(every[s], every[t]) for t in range(tasks) for s in range(t)]
            return 0.5 * sum(w * w * jnp.sum(fisher[k] * (s[k] - t[k]) ** 2) for s, t in pairs for k in "wv")

        past = tree.weighted_sum(vectors[:-1], [1.0] * (tasks - 1))
        found = jax.grad(incremental.iel_penalty)(vectors[-1], past, fisher, beta, tasks)
        close(found, jax.tree.map(lambda g: beta * tasks * g, jax.grad(gap)(vectors[-1])))
        # The past is frozen, even where it is differentiated through.
        through = jax.grad(lambda p: incremental.iel_penalty(vectors[-1], p, fisher, beta, tasks))(past)
        assert not any(np.any(x) for x in jax.tree.leaves(through))


def test_the_iel_penalty_of_the_first_task():
    with X64(True):
        fisher, (delta,) = deltas(1)
        found = jax.grad(incremental.iel_penalty)(delta, None, fisher, 3.0, 1)
        close(found, jax.tree.map(lambda f, d: 1.5 * f * d, fisher, delta))


def test_the_pull_of_the_head_is_its_sum():
    with X64(True):
        names = ("kernel", "bias")
        head, reference, fisher = (dict(zip(names, arrays(s, (3, 4), (4,)), strict=True)) for s in (0, 1, 2))
        expected = 0.0
        for name in names:
            for index in np.ndindex(head[name].shape):
                difference = float(head[name][index] - reference[name][index])
                expected += 0.4 * float(fisher[name][index]) * difference**2 + 0.01 * difference**2
        np.testing.assert_allclose(incremental.head_penalty(head, reference, fisher, 0.4, 0.01), expected, rtol=1e-12)


# -- the classifier ----------------------------------------------------------------------------------------------------


def test_the_heads_fisher_is_that_of_its_definition():
    with X64(True):
        kernel, bias, z = arrays(0, (5, 6), (6,), (9, 5))
        head, mask = {"kernel": kernel, "bias": bias}, jnp.arange(6) != 4
        apply = lambda h, z: jnp.where(mask, z @ h["kernel"] + h["bias"], -jnp.inf)
        exact = jax.jit(lambda head, z: fisher_diagonal(apply, head, z).mean)(head, z)
        close(jax.jit(incremental.head_fisher)(head, z, mask), exact)


def test_the_alignment_loss_in_numpy():
    with X64(True):
        (values,) = arrays(0, (7, 5))
        labels, mask = np.array([0, 1, 3, 0, 1, 3, 3]), np.array([True, True, False, True, False])
        present = np.asarray(values)[:, mask]
        scaled = present / (0.1 * (np.linalg.norm(present, axis=1, keepdims=True) + 1e-7))
        expected = cross_entropy(scaled, np.array([0, 1, 2])[np.searchsorted([0, 1, 3], labels)])
        align = partial(incremental.alignment_loss, labels=jnp.array(labels), mask=jnp.array(mask))
        align = jax.jit(jax.value_and_grad(align))
        loss, gradient = align(values)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        np.testing.assert_allclose(align(50 * values)[0], expected, rtol=1e-5)  # what 1e-7 beside the norm leaves
        assert not np.any(np.asarray(gradient)[:, ~mask])
        assert np.all(np.isfinite(align(jnp.zeros_like(values))[1]))


def test_the_probe_learns_its_columns_and_no_others():
    z, head = arrays(3, (60, 6))[0], incremental.new_head(jax.random.key(0), 6, 5)
    labels = jnp.asarray(2 + (z[:, 0] > 0).astype(jnp.int32))
    mask = jnp.isin(jnp.arange(5), jnp.array([2, 3]))
    found = incremental.probe(jax.random.key(1), head, z, labels, mask, steps=50, learning_rate=0.5)
    head, found, z, mask = jax.tree.map(np.asarray, (head, found, z, mask))
    for name in head:
        np.testing.assert_array_equal(found[name][..., ~mask], head[name][..., ~mask])
    values = z @ found["kernel"] + found["bias"]
    assert np.mean(values[:, 2:4].argmax(1) + 2 == labels) > 0.9


# -- the mixtures ------------------------------------------------------------------------------------------------------


def drawn_mixtures():
    """Three classes of two components, far apart, in six dimensions; the third and fourth rows of five are empty."""
    random = np.random.default_rng(5)
    weights = np.zeros((5, 3), np.float32)
    weights[[0, 1, 2], :2] = [[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]]
    means, variances = 3 * random.normal(size=(5, 3, 6)), random.uniform(0.05, 0.5, size=(5, 3, 6))
    means[weights == 0], variances[weights == 0] = np.nan, np.nan  # whoever draws from these is found out
    return Mixtures(jnp.array(weights), jnp.array(means, jnp.float32), jnp.array(variances, jnp.float32))


def test_fitting_finds_the_components_again():
    random = np.random.default_rng(0)
    count = 2000
    means, variances = np.array([[0.0, 0, 0], [20, -20, 10]]), np.array([[1.0, 4, 0.25], [2, 1, 9]])
    component = np.sort(random.integers(2, size=count))
    z = (means[component] + np.sqrt(variances[component]) * random.normal(size=(count, 3))).astype(np.float32)
    labels = np.full(count, 2)
    z, labels = np.concatenate([z, z[:3] + 100]), np.concatenate([labels, [1, 1, 1]])
    empty = incremental.empty_mixtures(4, 2, 3)
    assert not np.any(empty.weights)
    found = incremental.fit_mixtures(empty, z, labels, seed=0)
    order = np.argsort(found.means[2, :, 0])
    own = np.bincount(component)
    # Each within five standard errors, and reg_covar: 1e-3 of the mean variance over all features.
    np.testing.assert_allclose(found.weights[2][order], own / count, atol=1e-4)
    assert np.all(np.abs(found.means[2][order] - means) < 5 * np.sqrt(variances / own[:, None]))
    floor = 1e-3 * z.var(axis=0).mean()
    error = np.abs(np.asarray(found.variances[2][order]) - floor - variances)
    assert np.all(error < 5 * variances * np.sqrt(2 / own[:, None]))
    for row in (0, 3):
        assert not np.any(found.weights[row])


def test_a_class_of_fewer_images_than_components_gets_one_each():
    z = np.array([[0.0, 0], [4, 4], [8, 0]], np.float32)
    found = incremental.fit_mixtures(incremental.empty_mixtures(2, 5, 2), z, np.array([1, 1, 1]), seed=0)
    np.testing.assert_allclose(found.weights[1], [1 / 3] * 3 + [0] * 2, atol=1e-6)
    np.testing.assert_allclose(sorted(found.means[1, :3].tolist()), sorted(z.tolist()), atol=1e-5)
    assert np.all(found.variances[1] > 0)
    for label in (-1, 2):
        with pytest.raises(ValueError, match=f"labels from {label} to {label} .* mixtures of 2 classes, from 0 on"):
            incremental.fit_mixtures(found, z, np.full(3, label), seed=0)
    again = incremental.fit_mixtures(found, z[:1], np.array([1]), seed=0)  # nothing of the old fit is left
    np.testing.assert_allclose(again.weights[1], [1, 0, 0, 0, 0])
    np.testing.assert_allclose(again.means[1, 0], z[0])
    assert np.all(again.variances[1, 0] > 0)


def test_samples_have_the_mixtures_moments():
    mixtures, n, sample = drawn_mixtures(), 20_000, jax.jit(incremental.sample)
    for label in range(3):
        z = np.asarray(sample(jax.random.key(label), mixtures, np.full(n, label)), np.float64)
        assert np.all(np.isfinite(z))
        w, m, v = (np.asarray(x)[label, :2] for x in mixtures)
        w = w[:, None]
        mean = (w * m).sum(0)
        variance = (w * (v + m**2)).sum(0) - mean**2
        assert np.all(np.abs(z.mean(0) - mean) < 5 * np.sqrt(variance / n))
        fourth = ((z - z.mean(0)) ** 4).mean(0)  # of the sample, for the variance's standard error
        assert np.all(np.abs(z.var(0) - variance) < 5 * np.sqrt((fourth - variance**2) / n))


def test_alignment_learns_the_classes_seen_and_touches_no_others():
    mixtures = drawn_mixtures()
    head = incremental.new_head(jax.random.key(0), 6, 5)
    align = jax.jit(partial(incremental.align))  # another function: others' compilations don't count
    found = align(jax.random.key(1), head, mixtures, 3, steps=300)
    two = align(jax.random.key(1), head, mixtures, 2, steps=3)
    labels = np.arange(900) % 3
    z = np.asarray(jax.jit(incremental.sample)(jax.random.key(2), mixtures, labels))
    head, found, two = jax.tree.map(np.asarray, (head, found, two))

    def accuracy(head):
        return np.mean((z @ head["kernel"] + head["bias"])[:, :3].argmax(1) == labels)

    assert accuracy(found) > 0.95 > 0.8 > accuracy(head)
    for name in head:  # rows 3 and 4 hold NaN: had one been drawn, everything would be NaN
        assert np.all(np.isfinite(found[name]))
        np.testing.assert_array_equal(found[name][..., 3:], head[name][..., 3:])
    np.testing.assert_array_equal(two["kernel"][:, 2:], head["kernel"][:, 2:])
    assert align._cache_size() == 1  # one compilation for every task


# -- the optimizer -----------------------------------------------------------------------------------------------------


def test_the_schedule():
    np.testing.assert_allclose(incremental.rates(1), [1])
    found = incremental.rates(5)
    np.testing.assert_allclose(found[0], 1)
    np.testing.assert_allclose(found[2], np.cos(np.radians(44.55)), rtol=1e-6)
    np.testing.assert_allclose(found[4], np.cos(np.radians(89.1)), rtol=1e-4)
    assert len(found) == 5


def adam(gradients, learning_rates):
    """Updates of Adam (Kingma and Ba, 2015, algorithm 1)."""
    m = v = 0
    for t, (g, rate) in enumerate(zip(gradients, learning_rates, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        yield -rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def test_the_decoupled_step_by_hand():
    with X64(True):
        first, second = ({"w": w, "b": b, "hole": None} for w, b in (arrays(0, (4, 3), (3,)), arrays(1, (4, 3), (3,))))
        pull = {"w": 1e3 * first["w"], "b": first["b"] + 1, "hole": None}  # one above the clip, one below
        norm = np.linalg.norm(pull["w"])
        assert norm > 100 > np.linalg.norm(pull["b"])

        def down(rate, pull=pull):  # of a penalty whose gradient is `pull` everywhere
            return incremental.penalty_step(lambda params: tree.dot(pull, params), first, rate)[0]

        optimizer = incremental.decoupled_adamw(3e-4)
        state = optimizer.init(first)
        one, state = optimizer.update(first, state, first, rate=1.0, penalty_step=down(1.0))
        two, state = optimizer.update(second, state, first, rate=0.5, penalty_step=down(0.5))
        for name, clipped in (("w", pull["w"] * 100 / norm), ("b", pull["b"])):
            by_hand = adam([np.asarray(first[name]), np.asarray(second[name])], [3e-4, 1.5e-4])
            np.testing.assert_allclose(one[name], next(by_hand) - clipped, rtol=1e-10)
            np.testing.assert_allclose(two[name], next(by_hand) - 0.5 * clipped, rtol=1e-10)
        still = incremental.decoupled_adamw(0.0)
        alone, _ = still.update(first, still.init(first), first, rate=0.5, penalty_step=down(0.5))
        np.testing.assert_allclose(alone["b"], -0.5 * pull["b"], rtol=1e-12)
        zero = down(0.5, jax.tree.map(jnp.zeros_like, pull))
        none, _ = still.update(first, still.init(first), first, rate=0.5, penalty_step=zero)
        assert not any(np.any(x) for x in jax.tree.leaves(none))


def test_the_coupled_step_clips_the_sum_by_its_global_norm():
    with X64(True):
        first = dict(zip("wb", arrays(0, (4, 3), (3,), scale=300), strict=True))
        second = dict(zip("wb", arrays(1, (4, 3), (3,)), strict=True))
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in first.values()))
        optimizer = incremental.coupled_adamw(3e-4)
        state = optimizer.init(first)
        one, state = optimizer.update(first, state, first, rate=1.0)
        two, state = optimizer.update(second, state, first, rate=0.5)
        for name in "wb":
            by_hand = adam([np.asarray(first[name]) * 100 / norm, np.asarray(second[name])], [3e-4, 1.5e-4])
            np.testing.assert_allclose(one[name], next(by_hand), rtol=1e-10)
            np.testing.assert_allclose(two[name], next(by_hand), rtol=1e-10)


# -- metrics and evaluation --------------------------------------------------------------------------------------------


def test_the_metrics_by_hand():
    nan = np.nan
    matrix = np.array([[0.9, nan, nan], [0.7, 0.8, nan], [0.6, 0.85, 0.95]])
    np.testing.assert_allclose(incremental.final_accuracy(matrix), 0.8)
    np.testing.assert_allclose(incremental.final_forgetting(matrix), (0.3 - 0.05) / 2)
    np.testing.assert_allclose(incremental.accuracy_so_far(matrix), [0.9, 0.75, 0.8])
    again = np.array([[0.5, nan, nan], [0.7, 0.8, nan], [0.6, 0.9, 1.0]])  # best after the second task
    np.testing.assert_allclose(incremental.final_forgetting(again), (0.1 - 0.1) / 2, atol=1e-12)
    assert incremental.final_forgetting(np.array([[0.9]])) == 0


def test_the_metrics_over_all_test_images_by_hand():
    nan = np.nan
    matrix = np.array([[0.9, nan, nan], [0.7, 0.8, nan], [0.6, 0.85, 0.95]])
    tested = [10, 30, 60]  # right: 9 of 10, then 7 + 24 of 40, then 6 + 25.5 + 57 of 100
    np.testing.assert_allclose(incremental.image_accuracy(matrix, tested), [0.9, 0.775, 0.885])
    np.testing.assert_allclose(incremental.last_accuracy(matrix, tested), 0.885)
    np.testing.assert_allclose(incremental.average_accuracy(matrix, tested), (0.9 + 0.775 + 0.885) / 3)
    np.testing.assert_allclose(incremental.last_accuracy(matrix, [5, 5, 5]), incremental.final_accuracy(matrix))

    rows = np.stack([matrix, matrix], axis=-1)
    reached = incremental.outcomes.outcome(rows, 2, 1.0, tested)
    np.testing.assert_allclose(
        [reached.final_accuracy, reached.last_accuracy, reached.average_accuracy], [0.8, 0.885, 2.56 / 3]
    )
    assert incremental.outcomes.outcome(rows, 1, 1.0, tested).average_accuracy == pytest.approx((0.9 + 0.775) / 2)
    rows[:2] = nan  # a method that learns all tasks at the end
    reached = incremental.outcomes.outcome(rows, 2, 1.0, tested)
    assert reached.last_accuracy == pytest.approx(0.885) and reached.average_accuracy is None
    assert reached.final_forgetting is None


def test_the_streams_head_adds_each_tasks_change_to_the_newest_reference():
    reference = {"kernel": np.arange(12.0).reshape(2, 6), "bias": np.arange(6.0)}
    started = [{"kernel": np.full((2, n), 9.0), "bias": np.full(n, 7.0)} for n in (2, 3)]
    trained = [{"kernel": h["kernel"] + k, "bias": h["bias"] - k} for k, h in enumerate(started)]
    found = incremental.stream_head(trained, started, reference)
    change = np.array([0, 0, 1, 1, 1])
    np.testing.assert_allclose(found["kernel"], reference["kernel"][:, :5] + change)
    np.testing.assert_allclose(found["bias"], reference["bias"][:5] - change)


def test_predictions_among_all_classes_and_among_the_tasks_own():
    head = {"kernel": np.eye(4, dtype=np.float32), "bias": np.array([0, 0, 0, 0.5], np.float32)}
    z = np.array([[3, 0, 2, 1], [0, 0, 1, 0.6], [0, 1, 2, 0]], np.float32)
    every, own = incremental.predictions(z @ head["kernel"] + head["bias"], 2, 2)
    assert every.tolist() == [0, 3, 2]
    assert own.tolist() == [0, 1, 0]


# -- what can't be classified ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "classify", [incremental.nearest_class_mean, partial(incremental.random_projection, jax.random.key(0), width=8)]
)
@pytest.mark.parametrize(
    ("labels", "bad", "message"),
    [
        ([0, 1, 3, 3], None, "the classes 2 of 4 have no image"),
        ([1, 1, 2, 2], None, "the classes 0 of 3 have no image"),
        ([0, 1, 1, -1], None, "labels from -1 on"),
        ([0, 1, 1, 0], 2, "features of 1 images hold NaN or infinite numbers, image 2 the first"),
    ],
)
def test_classes_without_images_and_features_that_are_not_finite_are_named(classify, labels, bad, message):
    features = np.random.default_rng(0).normal(size=(4, 3))
    if bad is not None:
        features[bad, 1] = np.inf
    with pytest.raises(ValueError, match=message):
        classify(features, np.array(labels))
