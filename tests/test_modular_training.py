"""The training of modular networks: phases, batches, statistics and resumed runs."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax.traverse_util import flatten_dict, unflatten_dict
from modular_cases import ONE_DEVICE, changed, held_out, identical, small, start, stream, trains

from compo_jax import tree
from compo_jax.data.splits import ArraySplit
from compo_jax.mesh import data_mesh
from compo_jax.modular import (
    Network,
    Settings,
    accuracies,
    balanced_batches,
    balanced_eval,
    hard,
    learner,
    objective,
    optimizer,
    phase,
    plain,
    predictions,
    soft,
    statistics,
)
from compo_jax.modular.losses import relaxed
from compo_jax.modular.net import standardize
from compo_jax.train import Checkpoints, fit, init_state, jit_runner

PICTURES = stream()
SETTINGS = Settings(steps=20, batch=6, estimate=3)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_has_as_many_images_of_each_task_and_follows_from_its_step():
    batches = balanced_batches(trains(PICTURES), 4, 7)
    first = list(itertools.islice(batches(0), 25))
    assert first[0]["image"].shape == (8, 4, 4, 3)
    for step in (0, 20):
        again = next(batches(step))
        assert np.array_equal(again["image"], first[step]["image"])
    assert first[0]["task"].tolist() == [0, 1] * 4
    assert np.array_equal(next(balanced_batches(trains(PICTURES), 4, np.int64(7))(0))["image"], first[0]["image"])
    for t, split in enumerate(trains(PICTURES)):
        rows = np.concatenate([batch["image"][t::2] for batch in first[:18]])  # 18 batches of 4: one epoch of 72 images
        assert sorted(map(bytes, rows)) == sorted(map(bytes, split.pixels))


def test_every_image_is_evaluated_once_whatever_the_tasks_sizes():
    short = ArraySplit(PICTURES.tasks[0].test.pixels[:5], PICTURES.tasks[0].test.labels[:5])
    splits = [short, PICTURES.tasks[1].test]
    seen = [[], []]
    for rows, real in balanced_eval(splits, 4):
        for t in range(2):
            seen[t] += list(rows["image"][t::2][: real[t]])
    for images, split in zip(seen, splits, strict=True):
        assert np.array_equal(np.array(images), split.pixels)


def test_tasks_that_share_no_batch_are_told():
    other = ArraySplit(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32))
    with pytest.raises(ValueError, match=r"images of one shape, and theirs are \(4, 4, 3\) \(task 0\), \(8, 8, 3\)"):
        balanced_batches([PICTURES.tasks[0].train, other], 4, 0)
    with pytest.raises(ValueError, match="task or domain 1 has no images"):
        balanced_batches(
            [PICTURES.tasks[0].train, ArraySplit(np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, np.int32))], 4, 0
        )
    with pytest.raises(ValueError, match="there is no task"):
        balanced_batches([], 4, 0)


# -- the objective and its optimizer -----------------------------------------------------------------------------------


def test_the_objective_is_its_formula():
    net, variables = small()
    batch = next(balanced_batches(trains(PICTURES), 6, 0)(0))
    batch["label"][1::2] %= 2  # the second task of this network has two classes
    holes = jax.tree.map(lambda _: None, variables["params"])
    context = {"frozen": holes, "statistics": variables["batch_stats"], "key": jax.random.key(0)}
    value_at = jax.jit(objective(net, PICTURES.prepare, SETTINGS))
    logits = np.asarray(variables["params"]["route"], np.float64)
    models = [plain(Network(net, variables), task)[0] for task in range(2)]
    apply = [jax.jit(lambda v, x, m=model: m.apply(v, x, True, mutable=["batch_stats"])[0]) for model in models]
    for step in (0, 9, 15):
        now = phase(SETTINGS, step)
        route = partial(soft, temperature=now.temperature) if step < 14 else hard
        expected = 0.0
        for task, count in enumerate(net.classes):
            exported = plain(Network(net, variables), task, route)[1]
            found = apply[task](exported, PICTURES.prepare(batch["image"][task::2]))
            labels = batch["label"][task::2]
            expected -= scipy.special.log_softmax(found, -1)[np.arange(6), labels].mean() / 2
            assert found.shape[1] == count
        a = scipy.special.softmax(logits / float(now.temperature), -1)
        entropy = lambda p: -(p * np.log(p)).sum(-1)
        expected += float(now.entropy) * entropy(a).mean() / np.log(3)
        expected += float(now.usage) * (1 - entropy(a.mean((0, 1))) / np.log(3))
        value, _ = value_at(variables["params"], context, batch, step)
        np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_the_route_of_a_step_is_of_the_kind_asked_for_until_it_is_fixed():
    logits, key = small()[1]["params"]["route"], jax.random.key(3)
    now, slope = phase(SETTINGS, 9), np.arange(18.0).reshape(2, 3, 3) ** 2
    kinds = ("soft", "straight_through", "gumbel")

    @jax.jit
    def found_at(now):
        of = {kind: lambda x, k=kind: relaxed(SETTINGS._replace(relaxation=k), x, now, key) for kind in kinds}
        gradients = {kind: jax.grad(lambda x, f=f: jnp.sum(slope * f(x)))(logits) for kind, f in of.items()}
        return {kind: f(logits) for kind, f in of.items()}, gradients

    weights, gradients = found_at(now)
    one_hot = np.eye(3)[np.asarray(logits).argmax(-1)]
    tau = float(now.temperature)
    assert 0.1 < tau < 1
    np.testing.assert_allclose(weights["soft"], scipy.special.softmax(logits / tau, -1), rtol=1e-5, atol=1e-7)
    noisy = np.asarray(logits) + np.asarray(jax.random.gumbel(key, logits.shape))
    np.testing.assert_allclose(weights["gumbel"], scipy.special.softmax(noisy / tau, -1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(weights["straight_through"], one_hot, atol=1e-6)
    np.testing.assert_allclose(gradients["straight_through"], gradients["soft"], rtol=1e-4, atol=1e-4)
    weights, gradients = found_at(phase(SETTINGS, 15))
    assert all(np.array_equal(weights[kind], one_hot) and not np.any(gradients[kind]) for kind in kinds)


def test_routes_learn_ten_times_faster_and_neither_they_nor_gains_nor_bn_decay():
    settings = Settings(steps=100, weight_decay=0.5, warmup=0.01, clip=1e9, route_rate=10.0)
    params = {name: jnp.ones(2) for name in ("route", "gain", "stem")} | {"norm": {"scale": jnp.ones(2)}, "hole": None}
    transform = optimizer(settings, settings.freeze)
    state = transform.init(params)
    gradient = jax.tree.map(lambda x: 0.3 * x, params)
    updates, state = transform.update(gradient, state, params)
    assert not np.any(updates["stem"])  # the first step of the warm-up
    updates, state = transform.update(gradient, state, params)
    # Adam's step is the rate itself where all gradients have been alike
    np.testing.assert_allclose(updates["stem"], -1e-3 * 1.5, rtol=1e-4)
    np.testing.assert_allclose(updates["norm"]["scale"], -1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["gain"], -1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["route"], -1e-2, rtol=1e-4)
    for step in range(2, 72):
        updates, state = transform.update(gradient, state, params)
        assert np.any(updates["route"]) == (step < 70)
    assert np.any(updates["stem"])


def test_gradients_are_clipped_together():
    transform = optimizer(Settings(steps=100, warmup=0.01))
    params = {"norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)}}
    state, m, v = transform.init(params), np.zeros(4), np.zeros(4)
    for gradient in (np.array([0.1, 0, 0, -0.2]), np.array([30.0, 0, 0, 40.0])):
        tree_of = {"norm": {"scale": jnp.array(gradient[:2]), "bias": jnp.array(gradient[2:])}}
        updates, state = transform.update(tree_of, state, params)
        short = gradient / max(1, np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * short, 0.999 * v + 0.001 * short**2
    expected = -1e-3 * (m / (1 - 0.9**2)) / (np.sqrt(v / (1 - 0.999**2)) + 1e-8)
    np.testing.assert_allclose(updates["norm"]["scale"], expected[:2], rtol=1e-4)
    np.testing.assert_allclose(updates["norm"]["bias"], expected[2:], rtol=1e-4)


@pytest.mark.parametrize("across", [None, "tasks"])
def test_the_derivatives_of_normalisation_are_those_of_its_formula(across):
    """To the second order: of the values, means and variances."""
    with jax.enable_x64(True):
        x, dx, weights = jnp.array(np.random.default_rng(0).normal(size=(3, 2, 3, 2, 2, 4)))
        x *= jnp.array([1.0, 0.1, 3.0, 1e-3])  # of several scales, to the smallest which epsilon matters
        axes = (1, 2, 3) if across is None else (0, 1, 2, 3)

        def formula(x):
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            each = lambda moment: jnp.broadcast_to(moment, (2, 1, 1, 1, 4))[:, 0, 0, 0]
            return (x - mean) / jnp.sqrt(var + 1e-5), each(mean), each(var)

        def derivatives(normalize):
            value = lambda x: (
                sum(jnp.sum(y**3 * weights[:, 0, 0, 0]) for y in normalize(x)[1:])
                + jnp.sum(weights * normalize(x)[0] ** 3)
            )
            return normalize(x), jax.grad(value)(x), jax.jvp(jax.grad(value), (x,), (dx,))[1]

        ours = jax.vmap(lambda x: standardize(x, across), axis_name="tasks")
        found, expected = (jax.jit(partial(derivatives, f))() for f in (ours, formula))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


# -- training ----------------------------------------------------------------------------------------------------------


@cache
def trained(kind="soft"):
    """(network, start, settings, learner, what it trained, its compiled step) on the two tasks."""
    net, _ = small((3, 3))
    begin = start(net)
    # without penalties, so that it is the images that move the route
    settings = Settings(steps=60, batch=8, learning_rate=5e-3, estimate=2, relaxation=kind, entropy=0.0, usage=0.0)
    runs = []

    def runner(*args):
        runs.append(ONE_DEVICE(*args))
        return runs[0]

    both = learner(net, PICTURES.prepare, settings, runner=runner)
    return net, begin, settings, both, both.train(begin, trains(PICTURES), 0, every=1000), runs[0]


def begun():
    """(state, context) as `learner` has them at the first step."""
    _, begin, settings, *_ = trained()
    params, frozen = tree.partition(begin["params"], "")
    context = {"frozen": frozen, "statistics": begin["batch_stats"], "key": jax.random.fold_in(jax.random.key(0), 1)}
    return init_state(params, optimizer(settings)), context


@pytest.mark.parametrize("kind", ["soft", "gumbel"])
def test_tasks_are_learned_and_the_route_stands_still_in_the_third_phase(kind):
    net, begin, _, _, done, _ = trained(kind)
    assert np.abs(done.before["params"]["route"] - begin["params"]["route"]).max() > 0.05
    assert accuracies(net, PICTURES.prepare)(done.variables, held_out(PICTURES), 8).mean() > 0.8
    assert np.array_equal(done.variables["params"]["route"], done.before["params"]["route"])
    assert not np.array_equal(done.variables["params"]["stem"], done.before["params"]["stem"])


def test_the_gap_is_measured_at_its_four_points():
    net, _, settings, both, done, _ = trained()
    gap = both.gap(done, trains(PICTURES), 0, held_out(PICTURES))
    images = jnp.stack([PICTURES.prepare(split.pixels) for split in held_out(PICTURES)])
    labels = np.stack([split.labels for split in held_out(PICTURES)])
    made = list(itertools.islice(balanced_batches(trains(PICTURES), 8, 0)(0), 2))

    @jax.jit
    def of_batch(variables, weights, seen):
        return net.apply(variables, seen, lambda _: weights, True, mutable=["batch_stats"])[1]["batch_stats"]

    @jax.jit
    def logits_of(variables, weights):
        return net.apply(variables, images, lambda _: weights)

    def by_hand(variables, estimated_on, used):
        weights = estimated_on(variables["params"]["route"])
        seen = [jnp.stack([PICTURES.prepare(batch["image"][t::2]) for t in range(2)]) for batch in made]
        a, b = (flatten_dict(jax.tree.map(np.asarray, of_batch(variables, weights, x))) for x in seen)
        between = lambda path: 0 if path[-1] == "mean" else ((a[*path[:-1], "mean"] - b[*path[:-1], "mean"]) / 2) ** 2
        both = unflatten_dict({path: (a[path] + b[path]) / 2 + between(path) for path in a})
        logits = logits_of({"params": variables["params"], "batch_stats": both}, used(variables["params"]["route"]))
        return (np.asarray(logits).argmax(-1) == labels).mean(1)

    tau = partial(soft, temperature=0.1)
    np.testing.assert_allclose(gap.learned, by_hand(done.before, tau, tau))
    np.testing.assert_allclose(gap.hard, by_hand(done.before, tau, hard))
    np.testing.assert_allclose(gap.reestimated, by_hand(done.before, hard, hard))
    np.testing.assert_allclose(gap.finetuned, by_hand(done.variables, hard, hard))
    assert float(phase(settings, settings.freeze).temperature) == pytest.approx(0.1)


@pytest.mark.parametrize("killed_at", [5, 50])
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, killed_at):
    _, begin, settings, both, done, run = trained()
    # what a run killed then leaves: the checkpoints of the same steps taken by the common loop
    state, context = begun()
    batches = balanced_batches(trains(PICTURES), 8, 0)
    for name, steps in (("routing", settings.freeze), ("fixed", settings.steps)):
        if int(state.step) < killed_at:
            stop = min(steps, killed_at)
            state = fit(run, state, context, batches, stop, checkpoints=Checkpoints(tmp_path / name), every=1000)
    again = both.train(begin, trains(PICTURES), 0, tmp_path, every=1000)
    identical(again.variables, done.variables)
    identical(again.before, done.before)


@pytest.mark.parametrize(("route", "devices"), [("hard", 2), ("linear", 8)])
def test_several_devices_train_as_one_does(route, devices):
    hard, _, settings, *_ = trained()
    net = hard.clone(route=route)
    loss, transform = objective(net, PICTURES.prepare, settings), optimizer(settings)
    one, several = (jit_runner(loss, transform, mesh=data_mesh(count)) for count in (1, devices))
    batches = balanced_batches(trains(PICTURES), 8, 0)
    found = [fit(run, *begun(), batches, 4, every=1000).params for run in (one, several)]
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=2e-4)


def test_statistics_are_those_of_all_batches_together():
    net, variables = small((3, 3))
    made = list(itertools.islice(balanced_batches(trains(PICTURES), 6, 0)(0), 2))
    found = statistics(net, PICTURES.prepare)(variables, made)
    kernel = np.asarray(variables["params"]["stem"])
    seen = []
    for batch in made:
        images = np.asarray(PICTURES.prepare(batch["image"][1::2]))
        cut = images.reshape(6, 2, 2, 2, 2, 3)
        x = np.einsum("bipjqc,pqco->bijo", cut, kernel)
        seen.append(x)
    stem = found["batch_stats"]["tasks"]["stem"]
    np.testing.assert_allclose(stem["mean"][1], np.concatenate(seen).mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stem["var"][1], np.concatenate(seen).var((0, 1, 2)), rtol=1e-4, atol=1e-5)
    assert changed(variables["params"], found["params"]) == set()
    with pytest.raises(ValueError, match="batch statistics need one batch of images at least"):
        statistics(net, PICTURES.prepare)(variables, [])
    four = balanced_batches(trains(PICTURES) * 2, 6, 0)(0)
    with pytest.raises(ValueError, match="a network of 2 tasks was given batches of 4"):
        statistics(net, PICTURES.prepare)(variables, four)


def test_a_network_and_its_images_have_the_same_tasks():
    net, begin, _, both, *_ = trained()
    with pytest.raises(ValueError, match="a network of 2 tasks was given images of 1"):
        both.train(begin, trains(PICTURES)[:1], 0)
    for function in (predictions, accuracies):
        with pytest.raises(ValueError, match="a network of 2 tasks was given images of 3"):
            function(net, PICTURES.prepare)(begin, held_out(stream(3)))


def test_checkpoints_of_another_training_are_not_gone_on_with(tmp_path):
    net, variables = small((3, 3), layers=1, templates=1)
    settings = Settings(2, batch=2, estimate=1)
    one = lambda settings: learner(net, PICTURES.prepare, settings, runner=ONE_DEVICE)
    done = one(settings).train(variables, trains(PICTURES), 0, tmp_path)
    identical(one(settings).train(variables, trains(PICTURES), 0, tmp_path).variables, done.variables)
    others = stream(2, count=12)
    for changed_settings, splits, seed, told in (
        (settings, trains(PICTURES), 1, "seed: 0 there, 1 now"),
        (settings._replace(learning_rate=0.5), trains(PICTURES), 0, "settings.learning_rate: .* there, 0.5 now"),
        (settings, trains(others), 0, "images: .* there"),
    ):
        with pytest.raises(ValueError, match=f"what was learned with other settings .*{told}"):
            one(changed_settings).train(variables, splits, seed, tmp_path)
    identical(one(settings).train(variables, trains(PICTURES), 0, tmp_path).variables, done.variables)
