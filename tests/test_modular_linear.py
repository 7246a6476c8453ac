"""Linear routes: free coefficients of templates, by groups of channels, with a gain; against networks written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modular_cases import ONE_DEVICE, changed, held_out, identical, images, small, start, stream, trains

from compo_jax.modular import (
    FIXED_ORDER,
    ExpertNet,
    ModularNet,
    Network,
    Settings,
    accuracies,
    adaptation,
    add_layer,
    add_task,
    add_templates,
    analysis,
    balanced_batches,
    beside_random,
    harden,
    learner,
    load_task,
    load_templates,
    mean_source,
    mix_templates,
    new_task,
    newton_route,
    objective,
    one_source,
    plain,
    remove_template,
    rerouting,
    route_landscape,
    routes,
    save_task,
    save_templates,
    statistics,
    storage,
    take_tasks,
    transfer,
)
from compo_jax.pool import ModulePool

PICTURES, X = stream(), images(2, 4, 4, 4, 3)
SETTINGS = Settings(steps=6, batch=6, estimate=2, learning_rate=0.01)


def linear(classes=(3, 2), **options):
    return small(classes, **{"route": "linear"} | options)


def outputs(network, x=X):
    return jax.jit(network.net.apply)(network.variables, x)


def close(a, b, tolerance=1e-5):
    finite = np.asarray(b)[np.isfinite(b)]
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(finite).max())


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"gain": True, "bn": "layer"}, {"groups": 4, "bn": "template", "gain": True}, {"groups": 2}]
)
def test_a_linear_network_is_the_plain_one_of_its_sums(options):
    network = linear(**options)
    logits = outputs(network)
    params = network.variables["params"]
    for task, count in enumerate(network.net.classes):
        model, exported = plain(network, task)
        close(logits[task, :, :count], jax.jit(model.apply)(exported, X[task]))
    # a kernel of its second layer, and the scale of its last BN, by hand
    kernel, groups = np.zeros((3, 3, 8, 8)), network.net.groups
    c = np.asarray(params["route"]).reshape(2, 3, groups, 3)[1, 1]
    for channel, m in itertools.product(range(8), range(3)):
        weight = c[channel * groups // 8, m]
        kernel[..., channel] += weight * np.asarray(params["templates"]["conv2"])[m, ..., channel]
    close(exported["params"]["block1"]["conv2"]["kernel"], kernel)
    if network.net.bn == "layer":
        scale = params["norm"]["blocks"]["norm2"]["scale"][1] * params["gain"][1, 1]
        close(exported["params"]["block1"]["norm2"]["scale"], scale)


def test_groups_of_equal_coefficients_are_one_group():
    whole = linear()
    route = whole.variables["params"]["route"]
    parted = set_route_of(whole, jnp.repeat(route[:, :, None], 4, axis=2))
    close(outputs(Network(whole.net.clone(groups=4), parted)), outputs(whole))


def set_route_of(network, route):
    return {**network.variables, "params": {**network.variables["params"], "route": route}}


def test_a_gain_of_one_is_none_and_of_zero_leaves_out_the_layer():
    plain_net, ones = linear(), jnp.ones((2, 3))
    with_gain = lambda gain: Network(
        plain_net.net.clone(gain=True),
        {**plain_net.variables, "params": {**plain_net.variables["params"], "gain": gain}},
    )
    close(outputs(with_gain(ones)), outputs(plain_net))
    without = with_gain(ones.at[:, 1].set(0.0))
    shorter = Network(
        plain_net.net.clone(layers=2),
        jax.tree.map(lambda x: x, plain_net.variables),
    )
    kept = np.array([0, 2])
    variables = {
        "params": {
            **shorter.variables["params"],
            "route": shorter.variables["params"]["route"][:, kept],
            "norm": {
                **shorter.variables["params"]["norm"],
                "blocks": jax.tree.map(lambda x: x[:, kept], shorter.variables["params"]["norm"]["blocks"]),
            },
        },
        "batch_stats": {
            "tasks": {
                **shorter.variables["batch_stats"]["tasks"],
                "layers": jax.tree.map(lambda x: x[:, kept], shorter.variables["batch_stats"]["tasks"]["layers"]),
            }
        },
    }
    close(outputs(without), outputs(Network(shorter.net, variables)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mixing": "outputs"}, "outputs are mixed by weights of sum 1"),
        ({"groups": 3}, "8 output channels can't be cut into 3 groups"),
        ({"groups": 2, "route": "hard"}, "groups=2 is of linear routes"),
        ({"groups": 0}, "groups"),
        ({"route": "straight"}, "route='straight' is not among linear, soft, hard"),
        ({"start": "random"}, "start='random' is not among shared, one_hot, distinct"),
    ],
)
def test_a_network_that_can_t_be_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        ModularNet((2,), width=8, **options)


def test_coefficients_that_are_no_numbers_are_told():
    network = linear()
    bad = set_route_of(network, network.variables["params"]["route"].at[0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="a linear route holds NaN"):
        plain(Network(network.net, bad))


def test_shares_are_of_the_squares():
    shares = routes.shares(jnp.array([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0]]))
    close(shares, [[9 / 25, 16 / 25, 0], [1 / 3] * 3])


def test_mixing_by_groups_is_the_sum_of_each_group():
    templates = {"kernel": images(3, 2, 6), "bias": images(3, 6, seed=1)}
    weights = images(5, 2, 3, seed=2)
    found = mix_templates(templates, weights, 2)
    by_hand = np.einsum("lgm,mago->lago", weights, np.reshape(templates["kernel"], (3, 2, 2, 3))).reshape(5, 2, 6)
    close(found["kernel"], by_hand)
    assert found["bias"].shape == (5, 6)


# -- its training ------------------------------------------------------------------------------------------------------


def test_the_objective_is_the_cross_entropy_alone_and_coefficients_learn_to_the_end():
    net = linear((3, 3)).net
    begun = start(net)
    both = learner(net, PICTURES.prepare, SETTINGS, runner=ONE_DEVICE)
    done = both.train(begun, trains(PICTURES), 0)
    identical(done.variables["params"], done.before["params"])
    batch = next(balanced_batches(trains(PICTURES), 6, 0)(0))
    holes = jax.tree.map(lambda _: None, begun["params"])
    context = {"frozen": holes, "statistics": begun["batch_stats"], "key": jax.random.key(0)}
    value, metrics = jax.jit(objective(net, PICTURES.prepare, SETTINGS._replace(usage=5.0)))(
        begun["params"], context, batch, 0
    )
    assert value == metrics["cross_entropy"] and set(metrics) == {"cross_entropy", "accuracy", "entropy", "unused"}
    last = learner(net, PICTURES.prepare, SETTINGS._replace(steps=3), runner=ONE_DEVICE)
    assert np.any(last.train(begun, trains(PICTURES), 0).variables["params"]["route"] != begun["params"]["route"])


def test_a_fixed_order_trains_all_but_the_route():
    net = linear((3, 3)).net
    begun = start(net)
    fixed = learner(net, PICTURES.prepare, SETTINGS, trained=FIXED_ORDER, runner=ONE_DEVICE)
    done = fixed.train(begun, trains(PICTURES), 0).variables
    moved = changed(begun["params"], done["params"])
    assert not any("route" in name for name in moved) and {"stem", "templates/conv1"} <= moved


def test_what_a_soft_network_loses_by_hardening_is_measured_at_its_own_temperature():
    soft = small((3, 3), route="soft", start="distinct")
    hardened = harden(soft)
    gaps = []
    for temperature in ((1.0, 0.1), (50.0, 0.1)):
        settings = Settings(1, batch=8, estimate=2, temperature=temperature)
        one = learner(hardened.net, PICTURES.prepare, settings, trained=FIXED_ORDER, runner=ONE_DEVICE)
        trained = one.train(hardened.variables, trains(PICTURES), 0)._replace(before=soft.variables)
        gaps.append(one.gap(trained, trains(PICTURES), 0, held_out(PICTURES)).learned)
    np.testing.assert_array_equal(*gaps)


def test_classes_may_be_a_list():
    assert ModularNet([3, 2], layers=1) == ModularNet((3, 2), layers=1)
    assert hash(ModularNet([3, 2], layers=1)) == hash(ModularNet((3, 2), layers=1))
    assert hash(ExpertNet([3, 2])) == hash(ExpertNet((3, 2)))


def test_a_hardened_network_takes_the_template_of_the_largest_coefficient():
    network = linear((3, 3))
    hard = harden(network)
    order = np.asarray(network.variables["params"]["route"]).argmax(-1)
    assert np.array_equal(hard.variables["params"]["route"], np.eye(3)[order])
    assert harden(small((3, 3), route="soft")).net.route == "hard"
    # the gap of a linear network: as learned, hard, statistics again, trained on in this order
    both = learner(network.net, PICTURES.prepare, SETTINGS, trained=FIXED_ORDER, runner=ONE_DEVICE)
    done = both.train(hard.variables, trains(PICTURES), 0)
    gap = both.gap(done._replace(before=network.variables), trains(PICTURES), 0, held_out(PICTURES))
    made = list(itertools.islice(balanced_batches(trains(PICTURES), 6, 0)(0), 2))
    again = statistics(network.net, PICTURES.prepare)
    measure = accuracies(network.net, PICTURES.prepare)
    close(gap.learned, measure(again(network.variables, made), held_out(PICTURES)))
    close(gap.reestimated, measure(again(hard.variables, made), held_out(PICTURES)))
    close(gap.finetuned, measure(done.variables, held_out(PICTURES)))


def test_a_gain_that_isn_t_there_can_t_be_learned():
    with pytest.raises(ValueError, match=r"'head\+gain' learns a gain, and this network has none"):
        transfer(linear((3,)).net, PICTURES.prepare, SETTINGS, "head+gain")
    transfer(linear((3,), gain=True).net, PICTURES.prepare, SETTINGS, "head+gain")


# -- edits, and the pool -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"groups": 2, "gain": True}])
def test_templates_layers_and_tasks_are_added_and_removed(options):
    network = linear((3, 3), **options)
    more = add_templates(network, jax.tree.map(lambda x: 2 * x[:1], network.variables["params"]["templates"]))
    close(outputs(more), outputs(network))
    close(outputs(remove_template(more, 3)), outputs(network))
    with pytest.raises(ValueError, match="template 0 is still used, in layer 0 of task 0"):
        remove_template(more, 0)
    deeper = add_layer(network, 1, 2)
    route = np.asarray(deeper.variables["params"]["route"])
    assert np.array_equal(route[:, 1], np.broadcast_to(np.eye(3)[2], route[:, 1].shape))
    one = new_task(network, jax.random.key(0), 4)
    close(one.variables["params"]["route"][0], np.mean(network.variables["params"]["route"], axis=0))
    joined = add_task(network, one)
    x = images(3, 4, 4, 4, 3)
    assert np.array_equal(outputs(joined, x)[:2, :, :3], outputs(network, x[:2]))


def test_a_linear_network_comes_back_from_a_pool(tmp_path):
    network = linear(groups=2, gain=True, start="distinct")
    pool = ModulePool(tmp_path)
    save_templates(pool, "shared", network)
    manifest = save_task(pool, "task", network, 1)
    again = load_task(pool, "task", load_templates(pool, "shared"))
    assert again.net == take_tasks(network, [1]).net
    identical(again.variables, take_tasks(network, [1]).variables)
    assert manifest.settings["route"] == "linear"


def test_a_pool_of_before_linear_routes_is_of_a_hard_network(tmp_path, monkeypatch):
    older = small()
    names = ("layers", "templates", "width", "patch", "block", "bn", "mixing", "shared_head")
    monkeypatch.setattr(storage, "_settings", lambda net: {name: getattr(net, name) for name in names})
    pool = ModulePool(tmp_path)
    save_templates(pool, "shared", older)
    save_task(pool, "task", older, 0)
    again = load_task(pool, "task", load_templates(pool, "shared"))
    assert again.net == take_tasks(older, [0]).net and again.net.route == "hard"
    identical(outputs(again, X[:1]), outputs(take_tasks(older, [0]), X[:1]))


# -- what coefficients say ---------------------------------------------------------------------------------------------


def test_angles_between_coefficients_are_by_hand():
    c = np.array([[[1.0, 0]], [[0, 2.0]], [[-3.0, 0]], [[1.0, 1.0]]])
    found = analysis.task_distances(c, linear=True)
    close(found, [[0, 0.5, 1, 0.25], [0.5, 0, 0.5, 0.25], [1, 0.5, 0, 0.75], [0.25, 0.25, 0.75, 0]])
    assert analysis.dead(c, linear=True).size == 0
    close(analysis.usage(c, linear=True), [(1 + 0 + 1 + 0.5) / 4, (0 + 1 + 0 + 0.5) / 4])
    close(analysis.layer_similarity(c.reshape(2, 2, 2), linear=True)[0], np.eye(2))


def test_the_null_of_coefficients_has_their_norms_and_any_direction():
    c = np.random.default_rng(0).normal(size=(3, 4, 5))
    norms = analysis.against_random(lambda a: np.linalg.norm(a, axis=-1), c, jax.random.key(0), 20, linear=True)
    close(norms.mean, norms.value)
    beside = beside_random(c, jax.random.key(0), 300, linear=True)
    # the mean angle of random directions is a right one
    assert abs(beside.mean.distance - 0.5) < 4 * beside.deviation.distance / np.sqrt(300)
    assert 0.01 < beside.above.distance < 0.99


def test_kinship_is_a_permutation_test_of_groups():
    distances = np.array([[0, 1, 5, 5], [1, 0, 5, 5], [5, 5, 0, 3], [5, 5, 3, 0.0]])
    found = analysis.kinship(distances, ["a", "a", "b", "b"], jax.random.key(0), 3000)
    assert found.value == 5 - 2  # of 3 ways to make two pairs one is as good: (5 + 5 + 1 + 3) / 4 - 5 = -1.5 else
    assert abs(found.mean - 0) < 0.2 and abs(found.above - 1 / 3) < 0.04
    with pytest.raises(ValueError, match="two tasks of one group"):
        analysis.kinship(distances, [0, 1, 2, 3], jax.random.key(0))
    with pytest.raises(ValueError, match="3 tasks have a group"):
        analysis.kinship(distances, [0, 0, 1], jax.random.key(0))


def test_tasks_that_began_alike_are_no_finding():
    c = np.broadcast_to(np.random.default_rng(1).normal(size=(1, 8, 8)), (20, 8, 8))
    beside = beside_random(c, jax.random.key(0), 200, linear=True)
    pairs = np.triu_indices(8, 1)
    assert (beside.above.similarity[pairs] <= 0.05).sum() <= 4  # 1.4 of 28 by chance
    assert beside.value.distance < 1e-6 and beside.mean.distance > 0.4
    assert np.all(np.abs(beside.value.usage - beside.mean.usage) < 4 * beside.deviation.usage)


def test_removing_a_template_drops_its_coefficients():
    c = jnp.array(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    score = lambda a: np.asarray((a != 0).mean((1, 2)))
    found = analysis.removal(score, c, jax.random.key(0), 3, route="linear")
    close(found.drop, np.full((4, 2), 0.25))
    close(found.null, np.full((4, 2), 0.25))


# -- the bridge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_the_landscape_has_the_slope_and_curvature_in_the_coefficients(groups):
    network = linear((3, 3), groups=groups)
    net = network.net
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), network.variables)
        x, labels = jnp.asarray(X[0], jnp.float64), jnp.arange(4) % 3
        land = route_landscape(Network(net, variables), 0, 1, x, labels)
        route = variables["params"]["route"]

        @jax.jit
        def loss(flat):
            whole = route.at[0, 1].set(flat.reshape(route.shape[2:]))
            logits = net.apply(variables, jnp.stack([x, x]), lambda _: whole)[0]
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

        here = route[0, 1].ravel()
        np.testing.assert_allclose(land.loss, loss(here), rtol=1e-8)
        np.testing.assert_allclose(land.slope, jax.grad(loss)(here), rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(land.gram, jax.hessian(loss)(here), rtol=1e-6, atol=1e-8)


def test_a_layer_is_led_to_single_templates():
    network = linear((3, 3))
    found = rerouting(network, PICTURES.prepare, PICTURES.tasks[0].test, 0, 1)
    assert found.template == int(np.argmax(network.variables["params"]["route"][0, 1]))
    near = np.abs(found.forecast - found.true)[:, 0]
    assert np.all(near < 0.3 * np.abs(found.true[:, 0] - found.loss) + 1e-5)


def test_a_newton_step_is_the_damped_one_of_the_true_derivatives():
    network = take_tasks(linear((3, 3), bn="layer"), [0])
    split = PICTURES.tasks[0].train
    found = newton_route(network, PICTURES.prepare, split, images=24, dampings=(0.3,))
    batch = next(balanced_batches([split], 24, 0)(0))
    rows, route = PICTURES.prepare(batch["image"])[None], network.variables["params"]["route"]

    @jax.jit
    def loss(flat):
        weights = flat.reshape(route.shape)
        logits, _ = network.net.apply(network.variables, rows, lambda _: weights, True, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[0]), batch["label"][:, None], 1).mean()

    here = route.ravel()
    g, (values, vectors) = jax.grad(loss)(here), np.linalg.eigh(jax.hessian(loss)(here))
    step = -vectors @ ((vectors.T @ g) / (np.abs(values) + 0.3 * np.abs(values).max()))
    assert found.damping == 0.3 and found.true < found.loss
    moved = found.network.variables["params"]["route"].ravel() - here
    np.testing.assert_allclose(moved, step, rtol=1e-2, atol=1e-3 * np.abs(step).max())
    np.testing.assert_allclose(found.true, loss(here + step), rtol=1e-3)
    assert changed(network.variables, found.network.variables) == {"params/route"}
    unmoved = newton_route(network, PICTURES.prepare, split, images=24, dampings=())
    assert unmoved.damping == np.inf and unmoved.true == unmoved.loss
    with pytest.raises(ValueError, match="this network has linear routes of 2"):
        newton_route(linear((3, 3)), PICTURES.prepare, split)


# -- a domain without labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["free", "convex", "layers"])
def test_coefficients_adapt_to_a_target(route):
    pictures = stream(3, names=("a", "b", "c"))
    network = linear((3, 3), shared_head=True, bn="layer")
    one, begun = mean_source(network)
    coefficients = network.variables["params"]["route"]
    assert one.route == "linear"
    close(begun["params"]["route"][0], np.mean(coefficients, axis=0))
    close(one_source(network, 1).variables["params"]["route"][0], coefficients[1])
    adapt = adaptation(one, pictures.prepare, SETTINGS, pictures.tasks[0].classes, route=route, runner=ONE_DEVICE)
    done = adapt(begun, pictures.tasks[2], 0, None if route == "free" else coefficients)
    assert changed(begun["params"], done["params"]) == {"route"}
    if route != "free":  # between the two sources, at all layers alike or not
        moved, (a, b) = np.asarray(done["params"]["route"][0]), np.asarray(coefficients)
        part = ((moved - b) * (a - b)).sum(-1, keepdims=True) / ((a - b) ** 2).sum(-1, keepdims=True)
        assert np.all((part > 0) & (part < 1))
        assert (np.ptp(part) < 1e-4) == (route == "convex")
        close(moved, part * a + (1 - part) * b)
