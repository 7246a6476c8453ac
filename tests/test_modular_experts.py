"""Mixtures of experts: their gates by hand, whose statistics they use, and their training."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from modular_cases import ONE_DEVICE, changed, held_out, identical, images, moved, stream, trains

from compo_jax import tree
from compo_jax.modular import ExpertNet, ModularNet, Settings, expert_macs, experts, parameters
from compo_jax.modular.expert_net import selection_penalty, selectors, smooth_step
from compo_jax.train import jit_runner

PICTURES = stream()
CASES = {
    "mmoe": {},
    "cgc": {"gate": "cgc", "task_experts": 2},
    "dselect_k": {"gate": "dselect_k", "experts": 4},
    "static": {"gate": "dselect_k", "experts": 3, "static": True},
}
X = images(2, 5, 4, 4, 3)


@cache
def made(case="mmoe", **options):
    """A network and its variables, away from their start."""
    net = ExpertNet((3, 2), **{"experts": 2, "layers": 2, "width": 8, "patch": 2} | CASES[case] | options)
    return net, moved(jax.jit(net.init)(jax.random.key(0), X))


@partial(jax.jit, static_argnums=(0, 3))
def applied(net, variables, x, train=False):
    return net.apply(variables, x, train, mutable=["batch_stats", "intermediates"])


def logits_of(net, variables, x=X, train=True):
    return applied(net, variables, x, train)[0]


def gates_of(net, variables, x=X):
    return net.apply(variables, x, method="gates")


def linear(variables, name, x=X):
    layer, flat = variables["params"][name], np.asarray(x, np.float64).reshape(*x.shape[:2], -1)
    flat = flat if "bias" in layer else np.ones_like(flat[..., :1])
    bias = np.asarray(layer.get("bias", np.zeros(1)))
    shape = (len(x), 1, *layer["kernel"].shape[2:])
    return np.einsum("tbi,ti...->tb...", flat, layer["kernel"]) + (bias.reshape(shape) if bias.size > 1 else 0)


# -- gates -------------------------------------------------------------------------------------------------------------


def test_the_smooth_step_is_its_cubic_between_exact_ends():
    x = np.array([-9.0, -1.0, -0.5, 0.0, 0.7, 1.0, 9.0])
    expected = np.where(x <= -1, 0, np.where(x >= 1, 1, -2 / 8 * x**3 + 3 / 4 * x + 0.5))
    found = smooth_step(jnp.array(x), 2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] == found[1] == 0 and found[-1] == found[-2] == 1
    np.testing.assert_allclose(jax.vmap(jax.grad(smooth_step))(jnp.array([-0.5, 0.0, 0.5, 3.0])), [0, 1.5, 0, 0])


def test_a_selector_multiplies_the_bits_of_each_expert_s_number():
    logits = np.random.default_rng(0).uniform(-0.4, 0.4, (3, 2, 2))
    a, b = np.moveaxis(-2 * logits**3 + 1.5 * logits + 0.5, -1, 0)
    by_hand = np.stack([(1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b], -1)
    np.testing.assert_allclose(selectors(jnp.array(logits), 4), by_hand, rtol=1e-5)
    np.testing.assert_allclose(selectors(jnp.array(logits), 3), by_hand[..., :3], rtol=1e-5)


def test_saturated_selectors_leave_exactly_k_experts():
    net, variables = made("dselect_k")
    logits = jnp.array([[[0.6, 5.0], [-0.5, 0.5]], [[-3.0, -3.0], [0.5, -0.5]]])  # the experts 3 and 1, 0 and 2
    layer = variables["params"]["selector"]
    layer = {"kernel": jnp.zeros_like(layer["kernel"]), "bias": logits.reshape(layer["bias"].shape)}
    weights = gates_of(net, {"params": variables["params"] | {"selector": layer}})
    np.testing.assert_array_equal(weights != 0, np.array([[[0, 1, 0, 1]], [[1, 0, 1, 0]]]) * np.ones((2, 5, 1)))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gates_are_their_formula(case):
    net, variables = made(case)
    mixing = scipy.special.softmax(linear(variables, "gate"), -1)
    if net.gate == "dselect_k":
        x = np.clip(linear(variables, "selector"), -0.5, 0.5)
        ones = -2 * x**3 + 1.5 * x + 0.5
        bits = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])[: net.experts]
        selected = np.prod(bits * ones[..., None, :] + (1 - bits) * (1 - ones[..., None, :]), -1)
        mixing = np.einsum("tbk,tbke->tbe", mixing, selected)
    weights = gates_of(net, variables)
    assert weights.shape == (2, 5, net.experts + net.task_experts)
    np.testing.assert_allclose(weights, mixing, rtol=1e-4, atol=1e-6)
    if case != "static":  # whose three experts have four numbers
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert net.static == bool(np.all(weights == weights[:, :1]))


def test_the_penalty_is_entropy_and_what_keeps_selectors_at_experts_that_are_there():
    p = np.random.default_rng(0).dirichlet(np.ones(4), (2, 5, 3))
    entropy = -(p * np.log(p + 1e-6)).sum((-2, -1)).mean()
    np.testing.assert_allclose(selection_penalty(jnp.array(p), 0.3), 0.3 * entropy, rtol=1e-5)
    three = p[..., :3]
    expected = -0.3 * (three * np.log(three + 1e-6)).sum((-2, -1)).mean() + (1 / three.sum(-1)).sum(-1).mean()
    np.testing.assert_allclose(selection_penalty(jnp.array(three), 0.3), expected, rtol=1e-5)
    value, gradient = jax.value_and_grad(lambda x: selection_penalty(selectors(x, 3), 0.3))(jnp.full((1, 2), 9.0))
    assert value == 100 and not gradient.any()  # the number 3, which no expert has
    net, variables = made("static")
    kept = applied(net, variables, X)[1]["intermediates"]["penalty"]
    selected = selectors(jnp.array(linear(variables, "selector"), jnp.float32), 3)
    np.testing.assert_allclose(kept[0], selection_penalty(selected, net.entropy), rtol=1e-5)


# -- the networks ------------------------------------------------------------------------------------------------------


def test_one_expert_is_hard_sharing():
    net, variables = made(experts=1)
    params = variables["params"]
    shared = jax.tree.map(lambda x: x[0], params["shared"])
    for_tasks = lambda x: jnp.stack([x] * 2)
    modular = ModularNet(net.classes, layers=2, templates=2, width=8, patch=2)
    hard_sharing = {
        "stem": shared["stem"],
        "templates": shared["blocks"],
        "route": for_tasks(jnp.eye(2)),
        "norm": jax.tree.map(for_tasks, shared["norm"]),
        **{name: params[name] for name in ("head_0", "head_1")},
    }
    expected, _ = modular.apply({"params": hard_sharing}, X, lambda route: route, True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits_of(net, variables), expected, rtol=1e-4, atol=1e-5)
    assert np.isneginf(expected[1, :, 2]).all()


@pytest.mark.parametrize("block", ["bottleneck", "inverted"])
def test_other_blocks_and_narrow_types_work(block):
    net, variables = made(block=block)
    wide = logits_of(net, variables)
    narrow = logits_of(net.clone(dtype=jnp.bfloat16), variables)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow[0].astype(jnp.float32), wide[0], atol=0.2)


def test_cgc_without_experts_of_a_task_is_mmoe():
    net, variables = made("mmoe")
    identical(logits_of(net, variables), logits_of(net.clone(gate="cgc"), variables))


def test_the_order_of_experts_says_nothing():
    net, variables = made("cgc")
    params, swap = variables["params"], np.array([1, 0])
    swapped = {
        **params,
        "shared": jax.tree.map(lambda x: x[swap], params["shared"]),
        "tasks": jax.tree.map(lambda x: x[:, swap], params["tasks"]),
        "gate": jax.tree.map(lambda x: x[..., np.array([1, 0, 3, 2])], params["gate"]),
    }
    found = logits_of(net, {**variables, "params": swapped})
    np.testing.assert_allclose(found, logits_of(net, variables), rtol=1e-4, atol=1e-5)


def test_a_task_s_experts_speak_to_it_alone():
    net, variables = made("cgc")
    params = variables["params"]
    other = jax.tree.map(lambda x: x.at[0].multiply(1.5), params["tasks"])
    before, after = logits_of(net, variables), logits_of(net, {**variables, "params": {**params, "tasks": other}})
    assert not np.allclose(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


@pytest.mark.parametrize("case", ["mmoe", "cgc"])
def test_training_normalises_each_task_by_its_batch_and_otherwise_the_stored_statistics_are_used(case):
    net, variables = made(case)
    found, kept = applied(net, variables, X, True)
    stored = {**variables, "batch_stats": kept["batch_stats"]}
    assert changed(variables["batch_stats"], kept["batch_stats"]) == set(tree.names(variables["batch_stats"]))
    np.testing.assert_allclose(logits_of(net, stored, train=False), found, rtol=1e-4, atol=1e-5)
    one_image = logits_of(net, stored, X[:, :1], train=False)
    np.testing.assert_allclose(one_image, found[:, :1], rtol=1e-4, atol=1e-5)
    other = X.at[0].multiply(3.0).at[0, 0].add(1.0)
    again, others = applied(net, variables, other, True)
    np.testing.assert_allclose(again[1], found[1], rtol=1e-5, atol=1e-6)
    for before, after in zip(*map(jax.tree.leaves, (kept["batch_stats"], others["batch_stats"])), strict=True):
        assert not np.allclose(before[0], after[0])
        np.testing.assert_allclose(before[1], after[1], rtol=1e-5, atol=1e-6)
    by_hand = X.reshape(2, 5, 2, 2, 2, 2, 3).swapaxes(3, 4).reshape(2, -1, 12)
    kernels = variables["params"]["shared"]["stem"].reshape(2, 12, 8)
    mean = jnp.einsum("tri,eio->teo", by_hand, kernels) / by_hand.shape[1]
    np.testing.assert_allclose(kept["batch_stats"]["shared"]["stem"]["mean"], mean, rtol=1e-4, atol=1e-6)


def test_tasks_together_are_tasks_one_after_another(monkeypatch):
    net, variables = made("cgc")
    found = applied(net, variables, X, True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    together = net.apply(variables, X, True, mutable=["batch_stats"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, together)


def test_costs_count_every_expert_and_the_gate():
    plain = 4 * (12 * 8 + 2 * 2 * 9 * 64)  # of one expert on 4 patches: the stem, two blocks
    gates = {"mmoe": 48 * 2, "cgc": 48 * 4, "dselect_k": 48 * (2 * 2 + 2), "static": 0}
    for case, gate in gates.items():
        net, variables = made(case)
        count = net.experts + net.task_experts
        assert expert_macs(net, 4) == count * (plain + 8) + gate + 8 * 3
        expert = 12 * 8 + 2 * 2 * 9 * 64 + 2 * 8 * (1 + 2 * 2)
        logits = gate // 48 if gate else 6
        scalars = (net.experts + 2 * net.task_experts) * expert + 2 * logits * (49 if gate else 1) + 9 * (3 + 2)
        assert parameters(variables["params"]) == scalars


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_training_learns_what_two_tasks_show(case, tmp_path):
    net = made(case)[0].clone(classes=(3, 3))
    start = jax.jit(net.init)(jax.random.key(0), X)
    settings = Settings(steps=40, batch=6, estimate=3, learning_rate=0.01)
    learn = experts.learner(net, PICTURES.prepare, settings, runner=ONE_DEVICE)
    trained = learn(start, trains(PICTURES), 0, tmp_path / "run")
    measured = experts.accuracies(net, PICTURES.prepare)(trained, held_out(PICTURES), 5)
    assert measured.shape == (2,) and measured.mean() > 0.8
    identical(trained, learn(start, trains(PICTURES), 0, tmp_path / "run"))  # from its last checkpoint
    decided = trained["batch_stats"]["shared"]["stem"]
    assert changed(start, trained) == set(tree.names(start)) and (decided["var"] > 0).all()


def test_eight_devices_learn_what_one_learns():
    net, settings = made("dselect_k")[0].clone(classes=(3, 3)), Settings(steps=2, batch=8, estimate=2)
    start = jax.jit(net.init)(jax.random.key(0), X)
    one, eight = (
        experts.learner(net, PICTURES.prepare, settings, runner=runner)(start, trains(PICTURES), 0)
        for runner in (ONE_DEVICE, jit_runner)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, eight)


def test_statistics_are_those_of_all_batches_together():
    net, variables = made("cgc", layers=1)
    rows = [{"image": PICTURES.tasks[0].train.pixels[i * 6 : i * 6 + 6], "task": np.arange(6) % 2} for i in range(3)]
    whole = {name: np.concatenate([batch[name] for batch in rows]) for name in rows[0]}
    estimate = experts.statistics(net, PICTURES.prepare)
    found, together = (estimate(variables, batches)["batch_stats"] for batches in (rows, [whole]))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found["shared"]["stem"], together["shared"]["stem"])


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 0}, "experts=0: a whole number, 1 or more"),
        ({"task_experts": -1, "gate": "cgc"}, "task_experts=-1: a whole number, 0 or more"),
        ({"gate": "ple"}, "gate='ple' is not among mmoe, cgc, dselect_k"),
        ({"task_experts": 1}, "gate='mmoe' has no experts of one task"),
        ({"gate": "dselect_k", "k": 5}, "k=5 of 4 isn't that"),
        ({"gate": "dselect_k", "k": 1, "experts": 1}, "k of two or more experts"),
        ({"gate": "dselect_k", "gamma": 0.0}, "gamma=0.0"),
        ({"entropy": -1.0}, "entropy=-1.0"),
        ({"classes": (3, 1)}, "task 1 has 1 class"),
        ({"width": 0}, "width=0"),
        ({"block": "dense"}, "no block is called 'dense'"),
    ],
)
def test_a_network_that_can_t_be_is_refused_where_it_is_made(options, words):
    with pytest.raises(ValueError, match=words):
        ExpertNet(**{"classes": (3, 2)} | options)


def test_images_and_splits_that_don_t_fit_are_refused():
    net, variables = made()
    with pytest.raises(ValueError, match=r"2 tasks need images of shape \(tasks, batch, height, width, channels\)"):
        net.apply(variables, X[:1])
    with pytest.raises(ValueError, match="can't be cut into patches of 2"):
        net.apply(variables, images(2, 5, 4, 5, 3))
    learn = experts.learner(net, PICTURES.prepare, Settings(steps=2), runner=ONE_DEVICE)
    with pytest.raises(ValueError, match="a network of 2 tasks was given images of 1"):
        learn(variables, trains(PICTURES)[:1], 0)
    with pytest.raises(ValueError, match="task 1 has labels from 0 to 2 and a head of 2 classes"):
        experts.accuracies(net, PICTURES.prepare)(variables, held_out(PICTURES))
