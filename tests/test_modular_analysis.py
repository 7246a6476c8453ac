"""What a network's routes say, against closed forms and hand-made routes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
from modular_cases import identical, images, moved, small, stream

from compo_jax import tree
from compo_jax.modular import (
    Network,
    accuracies,
    add_task,
    analysis,
    hard,
    load_task,
    load_templates,
    new_task,
    plain,
    route_landscape,
    routes,
    save_task,
    save_templates,
    set_route,
    soft,
    take_tasks,
)
from compo_jax.pool import ModulePool

LOGITS = jnp.array(np.random.default_rng(0).normal(size=(4, 5, 3)), jnp.float32)
PICTURES = stream()

# -- what routes say ---------------------------------------------------------------------------------------------------


def test_the_distance_of_tasks_is_scipy_s_jensen_shannon_distance():
    weights = np.asarray(soft(LOGITS))
    found = analysis.task_distances(weights)
    for s in range(4):
        for t in range(4):
            layers = [0.0 if s == t else scipy.spatial.distance.jensenshannon(a, b, base=2)
                      for a, b in zip(weights[s], weights[t], strict=True)]  # fmt: skip
            np.testing.assert_allclose(found[s, t], np.mean(layers), atol=1e-6)


def test_disjoint_routes_are_at_distance_one_and_tasks_alike_are_merged_first():
    weights = hard(routes.fixed(np.array([[0, 0], [1, 1], [0, 0], [1, 2]]), 3))
    found = analysis.task_distances(weights)
    assert found[0].tolist() == [0, 1, 0, 1] and found[1, 3] == 0.5
    merges = analysis.dendrogram(found)
    with pytest.raises(ValueError, match="merges two tasks or more, and there is 1"):
        analysis.dendrogram(found[:1, :1])
    assert merges[0, :3].tolist() == [0, 2, 0] and merges[1, :3].tolist() == [1, 3, 0.5] and merges[2, 2] == 1


def test_a_loop_shows_as_layers_that_are_alike():
    found = analysis.layer_similarity(hard(routes.fixed(np.array([[0, 1, 0, 1]]), 3)))[0]
    assert np.array_equal(found, np.tile(np.eye(2), (2, 2)))
    weights = np.asarray(soft(LOGITS))[1]
    cosine = 1 - scipy.spatial.distance.cdist(weights, weights, "cosine")
    np.testing.assert_allclose(analysis.layer_similarity(soft(LOGITS))[1], cosine, rtol=1e-5)


def test_usage_entropies_and_dead_modules():
    weights = hard(routes.fixed(np.array([[0, 0, 2], [2, 2, 2]]), 4))
    np.testing.assert_allclose(analysis.usage(weights), [1 / 3, 0, 2 / 3, 0])
    assert analysis.dead(weights).tolist() == [1, 3]
    assert np.all(analysis.entropies(weights) == 0)
    np.testing.assert_allclose(analysis.entropies(jnp.full((1, 2, 4), 0.25)), np.log(4), rtol=1e-6)


def test_removing_a_module_sends_its_layers_to_their_next_best_beside_as_many_random_ones():
    """Accuracy that is the share of layers on the template of highest logit at first: all drops in closed form."""
    first = routes.indices(LOGITS)
    score = lambda logits: np.asarray((routes.indices(logits) == first).mean(1))
    found = analysis.removal(score, LOGITS, jax.random.key(0), draws=40)
    for m in range(3):
        np.testing.assert_allclose(found.drop[m], np.asarray(first == m).mean(1), atol=1e-6)
        # the places that lose their module are as many, spread over the tasks
        np.testing.assert_allclose(found.null[m].mean(), found.drop[m].mean(), atol=1e-6)
        spread = 4 * found.deviation[m] / np.sqrt(40) + 1e-6
        assert np.all(np.abs(found.null[m] - np.asarray(first == m).mean()) < spread)
    rest = np.where(np.eye(3, dtype=bool)[np.asarray(first)], -np.inf, LOGITS).argmax(-1)
    assert np.array_equal(routes.indices(analysis.rerouted(LOGITS, first)), rest)
    assert np.array_equal(analysis.rerouted(LOGITS, jnp.full((4, 5), -1)), LOGITS)
    with pytest.raises(ValueError, match="one module can't be removed"):
        analysis.removal(score, LOGITS[..., :1], jax.random.key(0))


def test_a_number_stands_beside_that_of_random_routes():
    same = hard(routes.fixed(np.zeros((2, 6), int), 4))
    found = analysis.against_random(lambda a: analysis.task_distances(a)[0, 1], same, jax.random.key(0), 60)
    # two random layers differ with probability 3/4
    assert found.value == 0 and found.above == 1
    deviation = np.sqrt(0.75 * 0.25 / 6)
    assert abs(found.mean - 0.75) < 4 * deviation / np.sqrt(60)
    assert abs(found.deviation / deviation - 1) < 0.25
    entropy = analysis.against_random(lambda a: analysis.entropies(a).mean(), soft(LOGITS), jax.random.key(1), 20)
    assert entropy.mean == 0 and entropy.above == 0


# -- the pool ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", ["task", "layer", "template"])
def test_templates_and_tasks_come_back_from_a_pool(tmp_path, bn):
    net, variables = small(bn=bn)
    pool = ModulePool(tmp_path)
    save_templates(pool, "shared", Network(net, variables))
    for t in range(2):
        manifest = save_task(
            pool, f"task{t}", Network(net, variables), t, task=f"t{t}", classes=["x", "y", "z"][: 3 - t]
        )
        assert manifest.settings["classes"] == net.classes[t] and manifest.extra == {}
    assert "params/templates/conv1" in manifest_leaves(pool, "shared")
    assert not any("templates" in name for name in manifest_leaves(pool, "task0"))
    shared = load_templates(pool, "shared")
    first = load_task(pool, "task0", shared)
    identical(first.variables, take_tasks(Network(net, variables), [0])[1])
    found, back = add_task(first, load_task(pool, "task1", shared))
    assert found == net
    identical(back, variables)


def manifest_leaves(pool, name):
    return pool.manifest(name).parts["module"]["leaves"]


def test_a_task_of_other_templates_and_modules_of_another_kind_are_refused(tmp_path):
    net, variables = small()
    pool = ModulePool(tmp_path)
    save_task(pool, "task", Network(net, variables), 0)
    save_templates(pool, "other", Network(net, moved(variables, 3)))
    with pytest.raises(ValueError, match="task 'task' of .* was stored against other templates"):
        load_task(pool, "task", load_templates(pool, "other"))
    with pytest.raises(
        ValueError, match="'task' of .* is of the kind 'modular-task', and 'modular-templates' is wanted"
    ):
        load_templates(pool, "task")


# -- the bridge --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bridge():
    """A network on soft routes, and the loss of its first task with other weights at layer 1, by mixing."""
    net, variables = small((3, 3))
    split = PICTURES.tasks[0].train
    x, labels = PICTURES.prepare(split.pixels[:24]), jnp.array(split.labels[:24])

    @jax.jit
    def truth(variables, weights, x=x):
        route = lambda logits: soft(logits).at[0, 1].set(weights)
        logits = net.apply(variables, jnp.stack([x, x]), route)[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    mixed = np.asarray(soft(variables["params"]["route"]))[0, 1]
    return SimpleNamespace(net=net, variables=variables, data=(x, labels), truth=truth, mixed=mixed)


def test_curvature_forecasts_the_loss_of_routes_near_the_trained_one(bridge):
    land = route_landscape(Network(bridge.net, bridge.variables), 0, 1, *bridge.data, route=soft)
    here = float(bridge.truth(bridge.variables, bridge.mixed))
    np.testing.assert_allclose(land.loss, here, rtol=1e-5)
    for template in range(3):
        step = 0.02 * (np.eye(3)[template] - bridge.mixed)
        change = float(bridge.truth(bridge.variables, bridge.mixed + step)) - here
        # the ReLUs' kinks are in no Hessian: they are what the forecast is off by
        assert abs(float(land.predict(step)) - here - change) < 0.15 * abs(change) + 2e-5


def test_slope_and_curvature_are_the_true_ones_by_differences_of_the_mixed_network(bridge):
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), bridge.variables)
        x, labels = jnp.asarray(bridge.data[0], jnp.float64), bridge.data[1]
        land = route_landscape(Network(bridge.net, variables), 0, 1, x, labels, route=soft)
        mixed = soft(variables["params"]["route"])[0, 1]
        for template in range(3):
            # so short a step that no ReLU turns over within it
            away, h = np.eye(3)[template] - np.asarray(mixed), 1e-5
            back, here, ahead = (float(bridge.truth(variables, mixed + s * h * away, x)) for s in (-1, 0, 1))
            np.testing.assert_allclose(land.slope @ away, (ahead - back) / (2 * h), rtol=1e-5)
            curvature = away @ land.gram @ away
            np.testing.assert_allclose(curvature, (ahead - 2 * here + back) / h**2, rtol=1e-2, atol=1e-4)


def test_the_landscape_takes_batches_and_bn_that_belongs_to_templates(bridge):
    net, variables = small((3, 3), bn="template")
    x, labels = bridge.data
    corners = np.eye(3) - np.asarray(soft(variables["params"]["route"]))[1, 0]
    land = route_landscape(
        Network(net, variables),
        1,
        0,
        batches=[(x[:12], labels[:12]), (x[12:], labels[12:])],
        route=soft,
        check=corners,
    )
    assert np.all(np.isfinite(land.standard_error(corners)))
    apply = jax.jit(plain(Network(net, variables), 1, soft)[0].apply)
    for template in range(3):  # the corners are the true losses of the templates, their BN with them
        route = lambda logits, m=template: soft(logits).at[1, 0].set(jnp.eye(3)[m])
        logits = apply(plain(Network(net, variables), 1, route)[1], x)
        true = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()
        np.testing.assert_allclose(land.checked_loss[template], true, rtol=1e-4)


def test_a_landscape_without_a_layer_or_with_mixed_outputs_is_told(bridge):
    with pytest.raises(ValueError, match="there is no layer 7 among 3"):
        route_landscape(Network(bridge.net, bridge.variables), 0, 7, *bridge.data)
    with pytest.raises(ValueError, match="a composition of weights where these are mixed"):
        route_landscape(Network(bridge.net.clone(mixing="outputs"), bridge.variables), 0, 0, *bridge.data)


def test_removal_works_on_a_network():
    net, variables = small((3, 3))
    score_of = accuracies(net, PICTURES.prepare)
    score = lambda logits: score_of(set_route(variables, logits), [task.test for task in PICTURES.tasks], 24)
    found = analysis.removal(score, variables["params"]["route"], jax.random.key(0), draws=1)
    assert found.drop.shape == found.null.shape == (3, 2) and np.all(np.isnan(found.deviation))
    without = {m for m in range(3) if m in analysis.dead(hard(variables["params"]["route"]))}
    assert all(not np.any(found.drop[m]) for m in without)


def test_a_task_added_later_leaves_the_stored_ones_valid(tmp_path):
    net, variables = small()
    pool = ModulePool(tmp_path)
    save_templates(pool, "shared", Network(net, variables))
    save_task(
        pool, "new", add_task(Network(net, variables), new_task(Network(net, variables), jax.random.key(0), 3)), 2
    )
    one, back = load_task(pool, "new", load_templates(pool, "shared"))
    assert jax.eval_shape(one.apply, back, images(1, 2, 4, 4, 3)).shape == (1, 2, 3)
    assert tree.fingerprint(back["params"]["templates"]) == tree.fingerprint(variables["params"]["templates"])
