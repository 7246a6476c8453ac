"""The modular network: its invariants, its routes and its parts, against networks written out."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modular_cases import changed, identical, images, moved, small

from compo_jax import tree
from compo_jax.models import IsometricNet
from compo_jax.modular import (
    ModularNet,
    Network,
    Settings,
    add_layer,
    add_task,
    add_templates,
    hard,
    macs,
    new_task,
    objective,
    optimizer,
    parameters,
    plain,
    remove_template,
    routes,
    set_route,
    soft,
    take_layers,
    take_tasks,
)
from compo_jax.modular.layout import take
from compo_jax.modular.net import FILLING, at_once
from compo_jax.train import init_state, make_step

X = images(2, 4, 4, 4, 3)


@cache
def compiled(net, route):
    return jax.jit(lambda v, x: net.apply(v, x, route))


def outputs(net, variables, x=X, route=soft):
    return compiled(net, route)(variables, x)


def trained_outputs(net, variables, route):
    """Logits by the batch's own statistics, and these."""
    return jax.jit(lambda v: net.apply(v, X, route, True, mutable=["batch_stats"]))(variables)


def close(a, b, tolerance=2e-6):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def route_of(*tasks):
    return routes.fixed(np.array(tasks), 3)


# -- the network against plain ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "bn", "mixing"),
    [("basic", "task", "weights"), ("basic", "layer", "weights"), ("bottleneck", "task", "weights"),
     ("inverted", "template", "weights"), ("inverted", "template", "outputs")],
)  # fmt: skip
def test_a_hard_network_is_the_plain_network_of_its_templates(block, bn, mixing):
    net, variables = small(block=block, bn=bn, mixing=mixing)
    logits = outputs(net, variables, route=hard)
    for task, count in enumerate(net.classes):
        model, exported = plain(Network(net, variables), task)
        assert isinstance(model, IsometricNet)
        close(logits[task, :, :count], jax.jit(model.apply)(exported, X[task]))
    assert np.all(np.isneginf(logits[1, :, 2]))


def test_a_plain_network_trains_as_the_modular_one_does():
    net, variables = small()
    logits, state = trained_outputs(net, variables, hard)
    model, exported = plain(Network(net, variables), 0)
    expected, _ = jax.jit(lambda v: model.apply(v, X[0], True, mutable=["batch_stats"]))(exported)
    close(logits[0], expected)
    # the statistics are the batch's own: the stem's, by hand
    stem = conv(X[1], variables["params"]["stem"], 2, "VALID")
    found = state["batch_stats"]["tasks"]["stem"]
    close(found["mean"][1], stem.mean((0, 1, 2)), 1e-5)
    close(found["var"][1], stem.var((0, 1, 2)), 1e-5)


def test_a_soft_mixture_of_weights_is_a_plain_network_too():
    net, variables = small(bn="template")
    route = partial(soft, temperature=3.0)
    model, exported = plain(Network(net, variables), 0, route)
    weights = np.asarray(route(variables["params"]["route"]))[0, 1]
    kernel = np.tensordot(weights, variables["params"]["templates"]["conv2"], 1)
    close(exported["params"]["block1"]["conv2"]["kernel"], kernel)
    close(outputs(net, variables, route=route)[0], jax.jit(model.apply)(exported, X[0]))


@pytest.mark.parametrize("bn", ["task", "layer", "template"])
def test_mixing_weights_is_mixing_outputs_on_a_one_hot_route(bn):
    net, variables = small(bn=bn)
    other = net.clone(mixing="outputs")
    weights, state = trained_outputs(net, variables, hard)
    mixed, other_state = trained_outputs(other, variables, hard)
    close(weights, mixed)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        close(a, b)  # the plain network's, in both: see above


def conv(x, kernel, stride=1, padding="SAME"):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_mixing_outputs_is_the_weighted_sum_of_the_branches_of_each_template():
    net, variables = small(layers=1, mixing="outputs")
    weights = soft(variables["params"]["route"])[0, 0]

    def norm(x, p, s):
        return (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    @jax.jit
    def branch(exported):  # of one template: the plain network of the route through it has its weights
        p, s = exported["params"], exported["batch_stats"]
        x = jnp.maximum(norm(conv(X[0], p["stem"]["kernel"], 2, "VALID"), p["stem_norm"], s["stem_norm"]), 0)
        p, s = p["block0"], s["block0"]
        y = jnp.maximum(norm(conv(x, p["conv1"]["kernel"]), p["norm1"], s["norm1"]), 0)
        return x, norm(conv(y, p["conv2"]["kernel"]), p["norm2"], s["norm2"])

    through = [
        branch(plain(Network(net, set_route(variables, routes.fixed(np.full((2, 1), m), 3))))[1]) for m in range(3)
    ]
    x = through[0][0] + sum(a * y for a, (_, y) in zip(weights, through, strict=True))
    head = variables["params"]["head_0"]
    expected = jnp.maximum(x, 0).mean((1, 2)) @ head["kernel"] + head["bias"]
    close(outputs(net, variables)[0], expected, 1e-5)


@pytest.mark.parametrize(("bn", "mixing"), [("task", "weights"), ("template", "weights"), ("template", "outputs")])
def test_permuting_templates_and_the_route_s_columns_together_changes_nothing(bn, mixing):
    net, variables = small(bn=bn, mixing=mixing)
    permuted = take(Network(net, variables), "template", [2, 0, 1])
    assert changed(variables, permuted) >= {"params/route", "params/templates/conv1"}
    close(outputs(net, variables), outputs(net, permuted), 1e-5)


def test_unrolled_layers_are_the_scanned_ones():
    net, variables = small()
    close(outputs(net, variables), outputs(net.clone(unroll=True), variables))


def test_a_float64_network_is_computed_in_float64():
    net, variables = small()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
        found = jax.jit(lambda v, x: net.apply(v, x, soft))(wide, jnp.asarray(X, jnp.float64))
    assert found.dtype == jnp.float64
    close(found[0], outputs(net, variables)[0], 1e-5)


def test_a_compute_dtype_of_16_bits_is_kept_and_near():
    net, variables = small()
    found = outputs(net.clone(dtype=jnp.bfloat16), variables)
    assert found.dtype == jnp.bfloat16
    close(found[0].astype(jnp.float32), outputs(net, variables)[0], 0.1)


def test_templates_start_he_normal_and_routes_as_the_network_says():
    net = ModularNet((3, 3), layers=16, templates=8, width=16, patch=2)
    params = jax.jit(net.init)(jax.random.key(0), X)["params"]
    for template in params["templates"]["conv2"]:
        assert abs(float(template.std()) / np.sqrt(2 / (9 * 16)) - 1) < 0.06
    begun = lambda **options: jax.jit(net.clone(**options).init)(jax.random.key(0), X)["params"]["route"]
    for options, deviation in (({"route": "soft"}, 0.01), ({"start": "distinct"}, 8**-0.5), ({}, 8**-0.5)):
        route = begun(**options)
        assert abs(float(route.std()) / deviation - 1) < 0.2 and abs(float(route.mean())) < 0.3 * deviation
        assert np.array_equal(route[0], route[1]) == (not options)
    one_hot = np.broadcast_to(np.repeat(np.eye(8), 2, axis=0), (2, 16, 8))
    assert np.array_equal(begun(start="one_hot"), one_hot)
    close(jax.nn.softmax(begun(start="one_hot", route="soft")), 0.9 * one_hot + 0.1 / 8, 1e-5)
    assert abs(float(begun(start="distinct", route="hard").std()) - 1) < 0.1


# -- what it costs -----------------------------------------------------------------------------------------------------


def shapes(classes, channels, **options):
    net = ModularNet(classes, **options)
    x = jax.ShapeDtypeStruct((len(classes), 2, 8, 8, channels), jnp.float32)
    return net, jax.eval_shape(net.init, jax.random.key(0), x)["params"]


def count(params, pattern):
    return tree.size(jax.tree.map(lambda x: np.zeros(x.shape, bool), tree.partition(params, pattern)[0]))


def test_parameters_are_as_the_specification_counts_them():
    """Grey images, ten classes, the defaults C = 64, L = M = 8, p = 4."""
    _, one = shapes((10,), 1)
    assert count(one, "^(stem|templates)") == 4 * 4 * 1 * 64 + 8 * 2 * 9 * 64**2 == 590_848
    own = {"^norm/blocks": 8 * 2 * 2 * 64, "^norm/stem": 2 * 64, "^head": 64 * 10 + 10, "^route$": 8 * 8}
    assert {pattern: count(one, pattern) for pattern in own} == own
    assert sum(own.values()) == 2_890
    assert round(100 * 2_890 / 590_848, 2) == 0.49
    _, five = shapes((10,) * 5, 1)
    assert parameters(five) == 590_848 + 5 * 2_890 == 605_298
    # five separate nets have no route
    assert 5 * parameters(one, route=False) == 5 * (590_848 + 2_890 - 64) == 2_968_370
    model = IsometricNet(10)
    plain_one = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    assert parameters(plain_one["params"]) == 2_968_370 // 5


def test_images_of_three_channels_have_a_larger_stem_and_nothing_else():
    assert parameters(shapes((10,) * 5, 3)[1]) == 605_298 + 2 * 4 * 4 * 64


def test_depth_costs_logits_only_where_bn_belongs_to_the_templates():
    for bn, more in (("template", 5 * 4), ("layer", 5 * 4 + 5 * 2 * 2 * 8), ("task", 5 * 4 + 5 * 2 * 2 * 8)):
        short, long = (shapes((3,), 3, layers=n, templates=4, width=8, bn=bn)[1] for n in (3, 8))
        assert parameters(long) - parameters(short) == more
        grown = {name for name, x in zip(tree.names(long), jax.tree.leaves(long), strict=True)
                 if x.shape not in [y.shape for n, y in zip(tree.names(short), jax.tree.leaves(short), strict=True)
                                    if n == name]}  # fmt: skip
        assert ("route" in grown) and (bn != "template" or grown == {"route"})


def step_flops(templates):
    settings = Settings(steps=10)
    net, params = shapes((3,), 3, layers=1, templates=templates, width=8, patch=2, unroll=True)
    variables = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2, 16, 16, 3), jnp.float32))
    transform = optimizer(settings)
    step = make_step(objective(net, lambda x: x, settings), transform)
    batch = {
        "image": jax.ShapeDtypeStruct((32, 16, 16, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((32,), jnp.int32),
    }
    context = {
        "frozen": jax.tree.map(lambda _: None, params),
        "statistics": variables["batch_stats"],
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    state = jax.eval_shape(lambda p: init_state(p, transform), params)
    return jax.jit(step).lower(state, context, batch).cost_analysis()["flops"]


def test_a_step_with_32_templates_costs_what_one_with_4_does():
    few, many = step_flops(4), step_flops(32)
    assert 1 < many / few < 1.1


def test_multiply_adds_are_those_of_the_plain_network():
    net, variables = small((3,), block="bottleneck", width=16)
    assert macs(net, 16) == 64 * (2 * 2 * 3 * 16 + 3 * (2 * 16 * 4 + 9 * 4 * 4)) + 16 * 3
    net, variables = small((3,), width=32)
    model, exported = plain(Network(net, variables))
    flops = jax.jit(model.apply).lower(exported, jnp.zeros((1, 16, 16, 3))).compile().cost_analysis()["flops"]
    assert 0.8 < flops / (2 * macs(net, 16)) < 1.1  # XLA leaves out the taps outside of the image, and counts BN
    assert macs(net.clone(mixing="outputs"), 16) > 2 * macs(net, 16)


# -- tasks, layers and templates added and taken away ------------------------------------------------------------------


@pytest.mark.parametrize("bn", ["task", "layer"])
def test_adding_a_task_leaves_the_others_outputs_as_they_are_to_the_bit(bn):
    net, variables = small(bn=bn)
    one, new = new_task(Network(net, variables), jax.random.key(5), 4)
    joined, more = add_task(Network(net, variables), Network(one, new))
    assert joined.classes == (3, 2, 4)
    for task in range(2):
        before, after = take_tasks(Network(net, variables), [task]), take_tasks(Network(joined, more), [task])
        identical(before[1], after[1])
        assert before[0] == after[0]
    extended = jnp.concatenate([X, X[:1]])
    together = outputs(joined, more, extended)
    assert np.array_equal(together[:2, :, :3], outputs(net, variables))
    close(together[2:], outputs(one, new, X[:1]))


def test_a_new_task_starts_as_the_mean_of_the_others_or_as_one_of_them():
    net, variables = small()
    _, mean = new_task(Network(net, variables), jax.random.key(0), 2)
    for part in ("params/norm/blocks/norm1/scale", "batch_stats/tasks/stem/mean"):
        find = lambda v, part=part: dict(zip(tree.names(v), jax.tree.leaves(v), strict=True))[part]
        close(find(mean)[0], np.asarray(find(variables)).mean(0))
    assert np.abs(mean["params"]["route"]).max() < 0.05
    _, like = new_task(Network(net, variables), jax.random.key(0), 3, like=1)
    assert changed(take_tasks(Network(net, variables), [1])[1]["params"]["norm"], like["params"]["norm"]) == set()
    assert np.array_equal(like["params"]["route"], variables["params"]["route"][1:])
    assert like["params"]["head_0"]["kernel"].shape == (8, 3)


@pytest.mark.parametrize(
    ("bn", "order"),
    [("task", [2, 0, 1]), ("template", [0, 0, 1, 1]), ("layer", [0, 2])],
    ids=["reorder", "repeat", "remove"],
)
def test_blocks_are_reordered_repeated_and_removed(bn, order):
    net, variables = small(bn=bn)
    edited, taken = take_layers(Network(net, variables), order)
    model, exported = plain(Network(net, variables), 0)
    expected = {
        kind: {k: v for k, v in part.items() if not k.startswith("block")}
        | {f"block{i}": part[f"block{layer}"] for i, layer in enumerate(order)}
        for kind, part in exported.items()
    }
    found = outputs(edited, taken, route=hard)[0]
    close(found, jax.jit(model.clone(layers=len(order)).apply)(expected, X[0]))


def test_a_layer_is_added_with_its_template():
    net, variables = small()
    longer, more = add_layer(Network(net, variables), 1, 2)
    old = np.asarray(routes.indices(variables["params"]["route"]))
    assert np.array_equal(routes.indices(more["params"]["route"]), np.insert(old, 1, 2, axis=1))
    assert float(soft(more["params"]["route"])[:, 1, 2].min()) > 0.999
    assert longer.layers == 4 and jax.eval_shape(longer.apply, more, X).shape == (2, 4, 3)


def test_a_layer_is_added_beside_templates_that_a_route_can_t_take():
    net, variables = small()
    barred = set_route(variables, variables["params"]["route"].at[0, 1, 0].set(-jnp.inf))
    _, more = add_layer(Network(net, barred), 0, 2)
    route = np.asarray(more["params"]["route"])
    assert np.array_equal(route.argmax(-1)[:, 0], [2, 2]) and np.all(np.isfinite(route[:, 0]))
    assert np.array_equal(route[:, 1:], barred["params"]["route"])
    scale = more["params"]["norm"]["blocks"]["norm1"]["scale"]
    assert np.array_equal(scale[:, 0], scale[:, 1])  # its BN is that of the layer behind it


@pytest.mark.parametrize(("bn", "mixing"), [("task", "weights"), ("template", "outputs")])
def test_a_template_is_added_and_taken_away_again(bn, mixing):
    net, variables = small(bn=bn, mixing=mixing)
    kernels = jax.tree.map(lambda x: 2 * x[:2], variables["params"]["templates"])
    more_net, more = add_templates(Network(net, variables), kernels)
    assert more_net.templates == 5
    close(outputs(net, variables, route=hard), outputs(more_net, more, route=hard))
    assert np.array_equal(more["params"]["templates"]["conv1"][3:], kernels["conv1"])
    back_net, back = remove_template(Network(more_net, more), 4)
    back_net, back = remove_template(Network(back_net, back), 3)
    assert back_net == net
    identical(back, variables)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_told():
    net, variables = small()
    with pytest.raises(ValueError, match="task 1 has 1 class and needs two"):
        ModularNet((3, 1)).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="2 tasks need images of shape"):
        net.apply(variables, X[:1])
    with pytest.raises(ValueError, match="images of uint8 would have the kernels rounded .*`prepare`"):
        net._check(X.astype(jnp.uint8))  # the hook that checks signatures here would come first
    with pytest.raises(ValueError, match="a shared head is for tasks of the same classes"):
        ModularNet((3, 2), shared_head=True).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="bn='tasks' is not among task, layer, template"):
        ModularNet((3, 2), bn="tasks").init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"the route has shape \(2, 3, 4\) and the network's is \(2, 3, 3\)"):
        net.apply(variables, X, lambda _: jnp.ones((2, 3, 4)) / 4)
    with pytest.raises(ValueError, match=r"a route of shape \(2, 4, 3\) was given for one of \(2, 3, 3\)"):
        set_route(variables, jnp.zeros((2, 4, 3)))
    with pytest.raises(ValueError, match=r"layers \[0, 3\] were asked of a network that has 3"):
        take_layers(Network(net, variables), [0, 3])
    with pytest.raises(ValueError, match="layers are chosen by their numbers, not by bool"):
        take_layers(Network(net, variables), [True, False, True])
    with pytest.raises(ValueError, match="a layer can't be put at 5 of 3"):
        add_layer(Network(net, variables), 5, 0)
    with pytest.raises(ValueError, match="a soft mixture of outputs is no plain network"):
        plain(small(mixing="outputs"), 0, soft)
    with pytest.raises(ValueError, match="a new task needs two classes or more, not 1"):
        new_task(Network(net, variables), jax.random.key(0), 1)


def test_a_removed_module_that_a_hard_route_still_uses_is_told_with_its_places():
    net, variables = small()
    used = set_route(variables, route_of([0, 2, 0], [2, 0, 0]))
    with pytest.raises(ValueError, match="template 2 is still used, in layer 1 of task 0, layer 0 of task 1"):
        remove_template(Network(net, used), 2)
    assert remove_template(Network(net, used), 1)[0].templates == 2


def test_a_task_trained_on_other_templates_is_not_added():
    net, variables = small()
    one, new = new_task(Network(net, variables), jax.random.key(5), 4)
    new["params"]["templates"] = jax.tree.map(lambda x: x + 1e-6, new["params"]["templates"])
    with pytest.raises(ValueError, match="other shared weights .*params/templates/conv1.*keep these frozen"):
        add_task(Network(net, variables), Network(one, new))
    with pytest.raises(ValueError, match="a network with other settings"):
        add_task(Network(net, variables), take_tasks(small(bn="layer"), [0]))
    net, variables = small(bn="layer")
    one, new = new_task(Network(net, variables), jax.random.key(5), 4)
    new["batch_stats"] = jax.tree.map(lambda x: x + 1e-6, new["batch_stats"])
    with pytest.raises(ValueError, match='other batch statistics .*tasks/stem/mean.*statistics="stored"'):
        add_task(Network(net, variables), Network(one, new))


def test_a_task_is_added_whatever_it_was_computed_in():
    net, variables = small()
    net = net.clone(dtype=jnp.bfloat16)
    one, new = take_tasks(Network(net, variables), [1])
    joined, _ = add_task(Network(net, variables), Network(one.clone(dtype=None, unroll=True), new))
    assert joined == net.clone(classes=(3, 2, 2))


def test_a_network_can_be_moved_from_any_start():
    _, variables = small()
    assert len(changed(variables, moved(variables, 1))) == len(jax.tree.leaves(variables))


# -- one network after another, or at once -----------------------------------------------------------------------------


def test_networks_computed_at_once_are_those_computed_one_after_another(monkeypatch):
    net, variables = small(gain=True, layers=2)

    def step(together):
        monkeypatch.setattr("compo_jax.modular.net.at_once", lambda *_: together)

        def loss(params):
            logits, kept = net.apply({**variables, "params": params}, X, soft, True, mutable=["batch_stats"])
            return -jax.nn.log_softmax(logits)[:, :, 0].mean(), (logits, kept)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    one_by_one, at_a_time = step(False), step(True)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), one_by_one, at_a_time)


def test_the_work_of_a_layer_chooses_on_an_accelerator(monkeypatch):
    net = ModularNet((3, 2), width=64)
    few, many = jnp.zeros((2, 32, 16, 16, 3)), jnp.zeros((2, 64, 64, 64, 3))
    assert not at_once(few, net) and not at_once(many, net)  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    operations = 2 * 64 * 16 * 16 * 2 * 9 * 64 * 64  # two convolutions of 64 images, at 16 x 16 places
    assert operations > FILLING / 2 and at_once(few, net) and not at_once(many, net)
    assert not at_once(few, net, 100)
