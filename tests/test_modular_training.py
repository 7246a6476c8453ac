import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from modular_cases import ONE_DEVICE, changed, identical, small, stream, tests, trains

from compo_jax import tree
from compo_jax.data import Task
from compo_jax.data.stream import ArraySplit
from compo_jax.modular import (
    PARTS,
    Settings,
    accuracies,
    adaptation,
    balanced_batches,
    balanced_eval,
    hard,
    information_maximisation,
    learner,
    mean_source,
    new_task,
    objective,
    one_source,
    optimizer,
    phase,
    plain,
    predictions,
    routes,
    soft,
    source_objectives,
    statistics,
    transfer,
)
from compo_jax.train import Checkpoints, fit, init_state

PICTURES = stream()
SETTINGS = Settings(steps=20, batch=6, estimate=3)
NAMES = ("a", "b", "c")


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_has_as_many_images_of_each_task_and_follows_from_its_step():
    batches = balanced_batches(trains(PICTURES), 4, 7)
    first = list(itertools.islice(batches(0), 25))
    assert first[0]["image"].shape == (8, 4, 4, 3)
    for step in (0, 20):
        again = next(batches(step))
        assert np.array_equal(again["image"], first[step]["image"])
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
    other = ArraySplit(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4))
    with pytest.raises(ValueError, match=r"images of one shape, and theirs are \(4, 4, 3\) \(task 0\), \(8, 8, 3\)"):
        balanced_batches([PICTURES.tasks[0].train, other], 4, 0)
    with pytest.raises(ValueError, match="task or domain 1 has no images"):
        balanced_batches([PICTURES.tasks[0].train, ArraySplit(np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0))], 4, 0)
    with pytest.raises(ValueError, match="there is no task"):
        balanced_batches([], 4, 0)


# -- the objective and its optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 9, 15])
def test_the_objective_is_its_formula(step):
    net, variables = small()
    batch = next(balanced_batches(trains(PICTURES), 6, 0)(0))
    batch["label"][1::2] %= 2  # the second task of this network has two classes
    context = {"frozen": None, "statistics": variables["batch_stats"], "key": jax.random.key(0)}
    value, _ = jax.jit(objective(net, PICTURES.prepare, SETTINGS))(variables["params"], context, batch, step)

    now, logits = phase(SETTINGS, step), np.asarray(variables["params"]["route"], np.float64)
    route = partial(soft, temperature=now.temperature) if step < 14 else hard
    expected = 0.0
    for task, count in enumerate(net.classes):
        model, exported = plain(net, variables, task, route)
        images = PICTURES.prepare(batch["image"][task::2])
        found, _ = jax.jit(lambda v, x, m=model: m.apply(v, x, True, mutable=["batch_stats"]))(exported, images)
        labels = batch["label"][task::2]
        expected -= scipy.special.log_softmax(found, -1)[np.arange(6), labels].mean() / 2
        assert found.shape[1] == count
    a = scipy.special.softmax(logits / float(now.temperature), -1)
    entropy = lambda p: -(p * np.log(p)).sum(-1)
    expected += float(now.entropy) * entropy(a).mean() / np.log(3)
    expected += float(now.usage) * (1 - entropy(a.mean((0, 1))) / np.log(3))
    np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_routes_learn_ten_times_faster_and_neither_they_nor_bn_decay():
    settings = Settings(steps=100, weight_decay=0.5, warmup=0.01, clip=1e9)
    params = {name: jnp.ones(2) for name in ("route", "stem")} | {"norm": {"scale": jnp.ones(2)}, "hole": None}
    transform = optimizer(settings)
    state = transform.init(params)
    gradient = jax.tree.map(lambda x: 0.3 * x, params)
    updates, state = transform.update(gradient, state, params)
    assert not np.any(updates["stem"])  # the first step of the warm-up
    updates, state = transform.update(gradient, state, params)
    # Adam's step is the rate itself where all gradients have been alike
    np.testing.assert_allclose(updates["stem"], -1e-3 * 1.5, rtol=1e-4)
    np.testing.assert_allclose(updates["norm"]["scale"], -1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["route"], -1e-2, rtol=1e-4)
    for step in range(2, 72):
        updates, state = transform.update(gradient, state, params)
        assert np.any(updates["route"]) == (step < 70)
    assert np.any(updates["stem"])


def test_gradients_are_clipped_together():
    clipped = optimizer(SETTINGS).init({"stem": jnp.ones(3)})
    assert isinstance(clipped[0], optax.EmptyState)
    tail = optax.chain(optax.clip_by_global_norm(SETTINGS.clip))
    found, _ = tail.update({"a": jnp.full(4, 3.0)}, tail.init({"a": jnp.ones(4)}))
    np.testing.assert_allclose(jnp.linalg.norm(found["a"]), 1, rtol=1e-6)


# -- training ----------------------------------------------------------------------------------------------------------


@cache
def trained(kind="soft"):
    """(network, start, settings, learner, what it trained) on the two tasks."""
    net, _ = small((3, 3))
    start = jax.jit(net.init)(jax.random.key(0), jnp.zeros((2, 2, 4, 4, 3)))
    settings = Settings(steps=60, batch=8, learning_rate=5e-3, estimate=4, route=kind)
    both = learner(net, PICTURES.prepare, settings, runner=ONE_DEVICE)
    return net, start, settings, both, both.train(start, trains(PICTURES), 0, every=1000)


@pytest.mark.parametrize("kind", ["soft", "straight_through", "gumbel"])
def test_tasks_are_learned_and_the_route_stands_still_in_the_third_phase(kind):
    net, _, _, _, done = trained(kind)
    assert accuracies(net, PICTURES.prepare)(done.variables, tests(PICTURES), 8).mean() > 0.8
    assert np.array_equal(done.variables["params"]["route"], done.before["params"]["route"])
    assert not np.array_equal(done.variables["params"]["stem"], done.before["params"]["stem"])


def test_the_gap_is_measured_at_its_four_points():
    net, _, settings, both, done = trained()
    gap = both.gap(done, trains(PICTURES), 0, tests(PICTURES))
    images = jnp.stack([PICTURES.prepare(split.pixels) for split in tests(PICTURES)])
    labels = np.stack([split.labels for split in tests(PICTURES)])
    made = list(itertools.islice(balanced_batches(trains(PICTURES), 8, 0)(0), 4))

    def by_hand(variables, estimated_on, used, estimate=True):
        found = [
            net.apply(
                variables,
                jnp.stack([PICTURES.prepare(b["image"][t::2]) for t in range(2)]),
                estimated_on,
                True,
                mutable=["batch_stats"],
            )[1]["batch_stats"]
            for b in made
        ]
        mean = jax.tree.map(lambda *x: sum(x) / 4, *found) if estimate else variables["batch_stats"]
        logits = net.apply({"params": variables["params"], "batch_stats": mean}, images, used)
        return (np.asarray(logits).argmax(-1) == labels).mean(1)

    tau = partial(soft, temperature=0.1)
    np.testing.assert_allclose(gap.soft, by_hand(done.before, tau, tau))
    np.testing.assert_allclose(gap.hard, by_hand(done.before, tau, hard))
    np.testing.assert_allclose(gap.reestimated, by_hand(done.before, hard, hard))
    np.testing.assert_allclose(gap.finetuned, by_hand(done.variables, hard, hard))
    assert float(phase(settings, settings.freeze).temperature) == pytest.approx(0.1)


@pytest.mark.parametrize("killed_at", [5, 50])
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, killed_at):
    net, start, settings, both, done = trained()
    # what a run killed then leaves: the checkpoints of the same steps taken by the common loop
    run = ONE_DEVICE(objective(net, PICTURES.prepare, settings), optimizer(settings))
    params, frozen = tree.partition(start["params"], "")
    context = {"frozen": frozen, "statistics": start["batch_stats"], "key": jax.random.fold_in(jax.random.key(0), 1)}
    state = init_state(params, optimizer(settings))
    batches = balanced_batches(trains(PICTURES), 8, 0)
    for name, steps in (("routing", settings.freeze), ("fixed", settings.steps)):
        if int(state.step) < killed_at:
            stop = min(steps, killed_at)
            state = fit(run, state, context, batches, stop, checkpoints=Checkpoints(tmp_path / name), every=1000)
    again = both.train(start, trains(PICTURES), 0, tmp_path, every=1000)
    identical(again.variables, done.variables)
    identical(again.before, done.before)


def test_statistics_are_the_means_of_the_batches_own():
    net, variables = small((3, 3))
    made = list(itertools.islice(balanced_batches(trains(PICTURES), 6, 0)(0), 2))
    found = statistics(net, PICTURES.prepare)(variables, made)
    kernel = np.asarray(variables["params"]["stem"])
    means, variances = [], []
    for batch in made:
        images = np.asarray(PICTURES.prepare(batch["image"][1::2]))
        cut = images.reshape(6, 2, 2, 2, 2, 3)
        x = np.einsum("bipjqc,pqco->bijo", cut, kernel)
        means.append(x.mean((0, 1, 2)))
        variances.append(x.var((0, 1, 2)))
    stem = found["batch_stats"]["tasks"]["stem"]
    np.testing.assert_allclose(stem["mean"][1], np.mean(means, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stem["var"][1], np.mean(variances, 0), rtol=1e-4, atol=1e-5)
    assert changed(variables["params"], found["params"]) == set()
    with pytest.raises(ValueError, match="batch statistics need one batch of images at least"):
        statistics(net, PICTURES.prepare)(variables, [])


def test_a_network_and_its_images_have_the_same_tasks():
    _, start, _, both, _ = trained()
    with pytest.raises(ValueError, match="a network of 2 tasks was given images of 1"):
        both.train(start, trains(PICTURES)[:1], 0)
    with pytest.raises(ValueError, match="no route is learned as 'mean'"):
        net = small((3, 3))[0]
        learner(net, PICTURES.prepare, SETTINGS._replace(route="mean"), runner=ONE_DEVICE).train(
            start, trains(PICTURES), 0
        )


# -- transfer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_only_the_part_that_learns_changes(part):
    net, variables = small((3, 3))
    one, new = new_task(net, variables, jax.random.key(1), 3)
    task = stream(3).tasks[2]
    settings = Settings(steps=4, batch=6, estimate=2, usage=0.5)
    done = transfer(one, PICTURES.prepare, settings, part, runner=ONE_DEVICE).train(new, [task.train], 0, every=1000)
    moved = {name.split("/")[0] for name in changed(new["params"], done.variables["params"])}
    expected = {
        "head": {"head_0"}, "head+route": {"head_0", "route"}, "head+bn": {"head_0", "norm"},
        "head+bn+route": {"head_0", "norm", "route"}, "all": {"head_0", "norm", "route", "stem", "templates"},
    }[part]  # fmt: skip
    assert moved == expected


def test_an_unknown_part_is_told():
    with pytest.raises(ValueError, match="no part of a network is called 'heads'; there are head, head\\+route"):
        transfer(small()[0], PICTURES.prepare, SETTINGS, "heads")


# -- adaptation --------------------------------------------------------------------------------------------------------


def test_information_maximisation_is_the_entropies_difference():
    logits = np.random.default_rng(0).normal(size=(7, 3))
    p = scipy.special.softmax(logits, -1)
    entropy = lambda p: -(p * np.log(p)).sum(-1)
    expected = entropy(p).mean() - entropy(p.mean(0))
    np.testing.assert_allclose(information_maximisation(jnp.array(logits)), expected, rtol=1e-5)
    sure = 100.0 * jnp.eye(3)
    np.testing.assert_allclose(information_maximisation(sure), -np.log(3), rtol=1e-5)


def domains():
    return stream(2, names=NAMES), small((3, 3), shared_head=True)


@pytest.mark.parametrize(
    ("route", "bn"),
    [("free", "source"), ("free", "target"), ("convex", "source"), ("free", "affine"), ("fixed", "target")],
)
def test_adaptation_changes_the_route_and_of_bn_what_is_asked(route, bn):
    made, (net, variables) = domains()
    one, start = mean_source(net, variables)
    settings = Settings(steps=6, batch=12, learning_rate=0.01, estimate=2)
    adapt = adaptation(one, made.prepare, settings, NAMES, route=route, bn=bn, runner=ONE_DEVICE)
    sources = hard(variables["params"]["route"])
    found = adapt(start, made.tasks[1], 0, sources if route == "convex" else None, every=1000)
    moved = {name.split("/")[0] for name in changed(start["params"], found["params"])}
    assert moved == ({"route"} if route != "fixed" else set()) | ({"norm"} if bn == "affine" else set())
    assert (changed(start["batch_stats"], found["batch_stats"]) == set()) == (bn == "source")
    if route == "convex":  # a convex mixture of the sources' routes, and not the equal one
        weights = np.asarray(soft(found["params"]["route"]))[0].reshape(-1)
        a, b = np.asarray(sources).reshape(2, -1)
        share = (weights - b) @ (a - b) / ((a - b) @ (a - b))
        np.testing.assert_allclose(weights, share * a + (1 - share) * b, atol=1e-4)
        assert 0 < share < 1 and abs(share - 0.5) > 1e-3


def test_adaptation_lowers_its_objective_and_reads_no_label():
    made, (net, variables) = domains()
    one, start = mean_source(net, variables)
    settings = Settings(steps=40, batch=72, learning_rate=0.02)
    adapt = adaptation(one, made.prepare, settings, NAMES, runner=ONE_DEVICE)
    target = made.tasks[1]
    value = lambda v: information_maximisation(jnp.asarray(predictions(one, made.prepare, soft)(v, [target.train])[0]))
    found = adapt(start, target, 0, every=1000)
    assert value(found) < value(start) - 1e-3
    wrong = ArraySplit(target.train.pixels, np.zeros(len(target.train)))
    identical(found, adapt(start, target._replace(train=wrong), 0, every=1000))


def test_sources_are_told_apart_without_labels():
    made, (net, variables) = domains()
    found = source_objectives(net, made.prepare, variables, made.tasks[0])
    for source in range(2):
        model, exported = plain(net, variables, source)
        logits = model.apply(exported, made.prepare(made.tasks[0].train.pixels))
        np.testing.assert_allclose(found[source], information_maximisation(logits), rtol=1e-4, atol=1e-6)
    one, start = one_source(net, variables, 1)
    assert np.array_equal(routes.indices(start["params"]["route"])[0], routes.indices(variables["params"]["route"])[1])
    assert one.classes == (3,)


def test_bad_targets_are_told():
    made, (net, variables) = domains()
    one, start = mean_source(net, variables)
    adapt = adaptation(one, made.prepare, SETTINGS, NAMES)
    with pytest.raises(ValueError, match="the target 'task-0' has the classes 00, 01, 02 and the sources a, b, c"):
        adapt(start, PICTURES.tasks[0], 0)
    nothing = ArraySplit(np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0))
    with pytest.raises(ValueError, match="has no images"):
        adapt(start, Task("empty", NAMES, nothing, nothing), 0)
    with pytest.raises(ValueError, match="the sources' routes are for route='convex'"):
        adapt(start, made.tasks[0], 0, hard(variables["params"]["route"]))
    with pytest.raises(ValueError, match="nothing to adapt"):
        adaptation(one, made.prepare, SETTINGS, NAMES, route="fixed")
    with pytest.raises(ValueError, match="train the sources with shared_head=True"):
        adaptation(small()[0], made.prepare, SETTINGS, NAMES)
    with pytest.raises(ValueError, match="'all' is not among free, convex, fixed"):
        adaptation(one, made.prepare, SETTINGS, NAMES, route="all")
