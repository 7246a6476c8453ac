"""A new task and a domain without labels: what changes, what stays to the bit, and which source is nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from modular_cases import ONE_DEVICE, changed, identical, small, stream
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import NearestCentroid

from compo_jax import tree
from compo_jax.data import Task
from compo_jax.data.splits import ArraySplit
from compo_jax.modular import (
    PARTS,
    Network,
    Settings,
    adaptation,
    add_task,
    hard,
    information_maximisation,
    mean_source,
    nearest_source,
    new_task,
    one_source,
    plain,
    predictions,
    routes,
    soft,
    soup_of_sources,
    source_objectives,
    take_tasks,
    transfer,
)
from compo_jax.modular.parts import _centroid_accuracy, _features

PICTURES = stream()
SETTINGS = Settings(steps=20, batch=6, estimate=3)
NAMES = ("a", "b", "c")


# -- transfer ----------------------------------------------------------------------------------------------------------


def first_names(names):
    return {name.split("/")[0] for name in names}


def test_a_part_is_what_it_is_called():
    _, new = small((3,), gain=True)
    expected = {
        "head": {"head_0"}, "head+route": {"head_0", "route"}, "head+bn": {"head_0", "norm"},
        "head+gain": {"gain", "head_0"}, "head+route+gain": {"gain", "head_0", "route"},
        "head+bn+route": {"head_0", "norm", "route"}, "all": {"head_0", "norm", "route", "gain", "stem", "templates"},
    }  # fmt: skip
    for part, patterns in PARTS.items():
        assert first_names(tree.names(tree.partition(new["params"], patterns)[0])) == expected[part]


@pytest.mark.parametrize(("part", "bn", "statistics"), [("head", "layer", "stored"), ("head+route", "task", "batch")])
def test_only_the_part_that_learns_changes(part, bn, statistics):
    net, variables = small((3, 3), bn=bn)
    one, new = new_task(Network(net, variables), jax.random.key(1), 3)
    task = stream(3).tasks[2]
    settings = Settings(steps=4, batch=6, estimate=2, usage=0.5, statistics=statistics)
    done = transfer(one, PICTURES.prepare, settings, part, runner=ONE_DEVICE).train(new, [task.train], 0, every=1000)
    moved = first_names(changed(new["params"], done.variables["params"]))
    assert moved == {"head": {"head_0"}, "head+route": {"head_0", "route"}}[part]
    assert add_task(Network(net, variables), Network(one, done.variables)).net.classes == (3, 3, 3)


def test_the_nearest_source_is_told_by_two_images_of_each_class():
    network, split = small(), PICTURES.tasks[0].train
    assert nearest_source(network, PICTURES.prepare, split) in range(len(network.net.classes))
    one_each = ArraySplit(split.images(np.arange(3)), split.labels[:3])
    with pytest.raises(ValueError, match="a class has 1 images, .* two of each or more"):
        nearest_source(network, PICTURES.prepare, one_each)


def test_the_nearest_source_is_told_by_one_program_however_many_classes_tasks_have():
    network, split = small((2, 3, 4), bn="layer"), PICTURES.tasks[0].train
    before = _features._cache_size()
    nearest_source(network, PICTURES.prepare, split, 60)
    assert _features._cache_size() == before + 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("each", [2, 5])
def test_the_nearest_source_is_told_without_a_warning(each):
    """Of two images of each class a fold learns from one, and no feature varies within a class."""
    split = PICTURES.tasks[0].train
    rows = np.concatenate([np.flatnonzero(split.labels == c)[:each] for c in range(3)])
    assert nearest_source(small(), PICTURES.prepare, ArraySplit(split.images(rows), split.labels[rows])) in (0, 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("each", [2, 5])
def test_nearest_centroids_are_as_scikit_learn_has_them(each):
    labels = np.tile(np.arange(3), each)
    features = np.random.default_rng(0).normal(size=(3 * each, 4)).astype(np.float32) + labels[:, None] / 2
    features[:, 1] = 0  # a feature that is dead
    for x in (features, features[::-1].copy()):
        expected = cross_val_score(NearestCentroid(), x, labels, cv=each).mean()
        np.testing.assert_allclose(_centroid_accuracy(x, labels, each), expected)


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
    short = jnp.array(logits, jnp.bfloat16)
    assert information_maximisation(short) == information_maximisation(short.astype(jnp.float32))


def domains():
    return stream(2, names=NAMES), small((3, 3), shared_head=True)


@pytest.mark.parametrize(
    ("route", "bn"),
    [("convex", "source"), ("free", "affine"), ("fixed", "target")],
)
def test_adaptation_changes_the_route_and_of_bn_what_is_asked(route, bn):
    made, (net, variables) = domains()
    one, start = mean_source(Network(net, variables))
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
    one, start = mean_source(Network(net, variables))
    settings = Settings(steps=40, batch=72, learning_rate=0.02)
    adapt = adaptation(one, made.prepare, settings, NAMES, runner=ONE_DEVICE)
    target = made.tasks[1]
    value = lambda v: information_maximisation(jnp.asarray(predictions(one, made.prepare, soft)(v, [target.train])[0]))
    found = adapt(start, target, 0, every=1000)
    assert value(found) < value(start) - 1e-3
    assert changed(start, found) == {"params/route"}
    wrong = ArraySplit(target.train.pixels, np.zeros(len(target.train), np.int32))
    identical(found, adapt(start, target._replace(train=wrong), 0, every=1000))


def test_sources_are_told_apart_without_labels():
    made, (net, variables) = domains()
    found = source_objectives(Network(net, variables), made.prepare, made.tasks[0])
    for source in range(2):
        model, exported = plain(Network(net, variables), source)
        logits = jax.jit(model.apply)(exported, made.prepare(made.tasks[0].train.pixels))
        np.testing.assert_allclose(found[source], information_maximisation(logits), rtol=1e-4, atol=1e-6)
    one, start = one_source(Network(net, variables), 1)
    assert np.array_equal(routes.indices(start["params"]["route"])[0], routes.indices(variables["params"]["route"])[1])
    assert one.classes == (3,)


def three_sources(bn="task"):
    return stream(3, names=NAMES), Network(*small((3, 3, 3), shared_head=True, bn=bn))


def alone(network, source, images, method=None):
    """What a source's network of its own gives for images, in batch statistics of these alone."""
    net, variables = take_tasks(network, [source])
    return net.apply(variables, images[None], None, True, method=method, mutable=["batch_stats"])[0][0]


@pytest.mark.parametrize("bn", ["task", "layer", "template"])
def test_each_source_is_judged_as_a_network_of_its_own(bn):
    made, network = three_sources(bn)
    target = made.tasks[2]
    images = made.prepare(target.train.pixels)
    expected = [information_maximisation(alone(network, source, images)) for source in range(3)]
    found = source_objectives(network, made.prepare, target, len(images), bn="target")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bn", ["task", "layer", "template"])
def test_the_nearest_source_is_the_one_that_is_nearest_alone(bn):
    split = PICTURES.tasks[0].train
    differing = []
    for seed in range(4):
        net, variables = small((3, 3, 3), bn=bn, layers=4)
        drawn = jax.random.normal(jax.random.key(seed), variables["params"]["route"].shape)
        network = Network(net, {**variables, "params": variables["params"] | {"route": 3 * drawn}})
        features = [alone(network, source, PICTURES.prepare(split.pixels), "features") for source in range(3)]
        scores = [_centroid_accuracy(np.asarray(z), split.labels, 5) for z in features]
        assert scores[nearest_source(network, PICTURES.prepare, split, len(split))] == max(scores)
        differing.append(max(scores) > min(scores))
    assert any(differing)


@pytest.mark.parametrize("bn", ["task", "layer", "template"])
def test_a_soup_of_sources_begins_with_the_best_and_is_no_worse_by_the_objective(bn):
    made, network = three_sources(bn)
    soup = soup_of_sources(network, made.prepare, made.tasks[2])
    singles = source_objectives(network, made.prepare, made.tasks[2], bn="target")
    assert soup[0] == np.argmin(singles)
    mean = mean_source(take_tasks(network, soup), 1e-6)
    assert source_objectives(mean, made.prepare, made.tasks[2], bn="target")[0] <= min(singles) + 1e-6
    wrong = ArraySplit(made.tasks[2].train.pixels, np.zeros(len(made.tasks[2].train), np.int32))
    assert soup == soup_of_sources(network, made.prepare, made.tasks[2]._replace(train=wrong))  # reads no label


def test_a_source_that_would_raise_the_objective_is_left_out(monkeypatch):
    made, network = three_sources()
    of = {(0,): 0.3, (1,): 0.2, (2,): 0.25, (1, 2): 0.1, (1, 2, 0): 0.15}
    monkeypatch.setattr("compo_jax.modular.unlabelled.take_tasks", lambda _, tasks: tuple(tasks))
    monkeypatch.setattr("compo_jax.modular.unlabelled.mean_source", lambda some, _: some)
    monkeypatch.setattr(
        "compo_jax.modular.unlabelled.source_objectives",
        lambda one, *_, bn: np.array([of[(0,)], of[(1,)], of[(2,)]] if one is network else [of[one]]),
    )
    assert soup_of_sources(network, made.prepare, made.tasks[2]) == [1, 2]


def test_of_one_image_nothing_is_learned():
    one, _ = mean_source(domains()[1])
    for options in ({}, {"route": "fixed", "bn": "affine"}):
        with pytest.raises(ValueError, match="of one image information maximisation is zero"):
            adaptation(one, PICTURES.prepare, Settings(1, batch=1), NAMES, **options)
    adaptation(one, PICTURES.prepare, Settings(1, batch=1), NAMES, route="fixed", bn="target")
    adaptation(one, PICTURES.prepare, Settings(1, batch=1), NAMES, prior=0.1)


def test_bad_targets_are_told():
    made, (net, variables) = domains()
    one, start = mean_source(Network(net, variables))
    adapt = adaptation(one, made.prepare, SETTINGS, NAMES)
    with pytest.raises(ValueError, match="the target 'task-0' has the classes 00, 01, 02 and the sources a, b, c"):
        adapt(start, PICTURES.tasks[0], 0)
    nothing = ArraySplit(np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="has no images"):
        adapt(start, Task("empty", NAMES, nothing, nothing), 0)
    with pytest.raises(ValueError, match="the sources' routes are for a mixture"):
        adapt(start, made.tasks[0], 0, hard(variables["params"]["route"]))
    convex = adaptation(one, made.prepare, SETTINGS, NAMES, route="convex")
    with pytest.raises(ValueError, match="none negative and of sum 1 .*where they are logits"):
        convex(start, made.tasks[0], 0, variables["params"]["route"])
    with pytest.raises(ValueError, match="nothing to adapt"):
        adaptation(one, made.prepare, SETTINGS, NAMES, route="fixed")
    with pytest.raises(ValueError, match="train the sources with shared_head=True"):
        adaptation(small()[0], made.prepare, SETTINGS, NAMES)
    with pytest.raises(ValueError, match="'all' is not among convex, layers, free, fixed"):
        adaptation(one, made.prepare, SETTINGS, NAMES, route="all")
