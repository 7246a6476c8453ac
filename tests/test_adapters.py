"""Adapters: deltas, fused forward passes, costs and what they refuse."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from compo_jax import adapters, tree
from compo_jax.models import ViT


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="out")(nn.relu(nn.Dense(7, name="inner")(x)))


class Scanned(nn.Module):
    """A model that forgets to carry the adapter through its scan."""

    @nn.compact
    def __call__(self, x):
        layer = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layer(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(x.shape[-1], name="dense")(x), None


def vit(**changes):
    settings = {"image_size": 8, "patch": 4, "width": 12, "depth": 2, "heads": 2, "classes": 3} | changes
    return ViT(**settings), jnp.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)


def randomised(shapes, seed=0):
    """Arrays of these shapes and types; NumPy's, which compile nothing."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), shapes)


def random_base(model, x, seed=0):
    return randomised(jax.eval_shape(model.init, jax.random.key(0), x)["params"], seed)


def random_module(adapter, base, seed=1):
    return randomised(jax.eval_shape(adapter.init, jax.random.key(0), base), seed)


enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
KINDS = {
    "lora": lambda targets: adapters.lora(2, targets),
    "full": adapters.full,
    "ia3": adapters.ia3,
    "ia3 with biases": lambda targets: adapters.ia3(targets, bias=True),
}
CASES = {
    "vit": (*vit(), adapters.VIT_TARGETS),
    "vit unrolled": (*vit(unroll=True, depth=1), adapters.VIT_TARGETS),
    "any Linen model": (MLP(), jnp.linspace(-1, 1, 12).reshape(4, 3), r"inner/kernel$"),
}


@pytest.mark.parametrize(
    "kind, name",
    [(kind, "any Linen model") for kind in KINDS] + [("lora", "vit"), ("ia3", "vit"), ("lora", "vit unrolled")],
)
def test_the_fast_path_equals_the_merged_forward_in_value_and_gradient(kind, name):
    with enable_x64(True):
        model, x, targets = CASES[name]
        x = x.astype(jnp.float64)
        base = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), random_base(model, x))
        adapter = KINDS[kind](targets)
        module = random_module(adapter, base)
        forward = adapters.adapted(model, adapter)

        def merged(module):
            return model.apply({"params": tree.add(base, adapter.delta(module, base))}, x)

        def value_and_gradient(function):
            def loss(module):
                output = function(module)
                return jnp.sum(output**2), output

            return jax.jit(jax.grad(loss, has_aux=True))(module)

        fast, value = value_and_gradient(lambda module: forward(base, module, x))
        slow, expected = value_and_gradient(merged)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
            largest = float(jnp.abs(b).max())
            assert largest > 1e-3
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * largest)


def test_ia3_scales_outputs():
    base = {"fc1": {"kernel": jnp.arange(12.0).reshape(2, 3, 2), "bias": jnp.arange(1.0, 5).reshape(2, 2)}}
    scales = np.array([[2.0, 0.5], [1.0, -1.0]])
    module = {"fc1": {"kernel": {"l": jnp.asarray(scales, jnp.float32)}, "bias": None}}
    assert jax.tree.map(
        jnp.shape, adapters.ia3("fc1/kernel", stacked="fc1").init(jax.random.key(0), base)
    ) == jax.tree.map(jnp.shape, module)
    for bias in (False, True):
        delta = adapters.ia3("fc1/kernel", bias=bias, stacked="fc1").delta(module, base)["fc1"]
        for layer in range(2):
            expected = np.asarray(base["fc1"]["kernel"][layer]) @ np.diag(scales[layer] - 1)
            np.testing.assert_array_equal(delta["kernel"][layer], expected)
        if bias:
            np.testing.assert_array_equal(delta["bias"], [[1.0, -1.0], [0.0, -8.0]])
        else:
            assert delta["bias"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_module_changes_nothing(kind):
    model, x = vit()
    base = random_base(model, x)
    adapter = KINDS[kind](adapters.VIT_TARGETS)
    delta = jax.jit(lambda base: adapter.delta(adapter.init(jax.random.key(1), base), base))(base)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(delta))
    assert {name.split("/")[-2] for name in tree.names(delta)} == {"qkv", "proj", "fc1", "fc2"}


def test_adapters_of_vit_b_16_have_the_parameters_of_the_paper():
    model = ViT()
    base = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))["params"]
    count = lambda adapter: sum(
        int(np.prod(leaf.shape))
        for leaf in jax.tree.leaves(jax.eval_shape(lambda b: adapter.init(jax.random.key(0), b), base))
    )
    assert count(adapters.lora(16)) == 3_538_944
    assert count(adapters.full()) == 84_934_656
    assert count(adapters.ia3()) == 82_944


def test_lora_starts_as_the_paper_does():
    base = {"fc1": {"kernel": jnp.zeros((400, 300))}}
    entry = adapters.lora(64, "fc1").init(jax.random.key(0), base)["fc1"]["kernel"]
    bound = 1 / np.sqrt(400)
    assert 0.98 * bound < np.abs(entry["a"]).max() <= bound
    np.testing.assert_allclose(np.std(entry["a"]), bound / np.sqrt(3), rtol=0.02)
    assert not entry["b"].any()


def test_ia3_can_be_built_again_from_its_name_and_settings():
    base = {"fc1": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    original = adapters.ia3("fc1/kernel", bias=True)
    again = adapters.build(original.name, original.settings)
    module = {"fc1": {"kernel": {"l": jnp.array([2.0, 3.0])}, "bias": None}}
    jax.tree.map(np.testing.assert_array_equal, original.delta(module, base), again.delta(module, base))
    assert again.settings == original.settings


def test_lora_can_be_built_again_from_its_name_and_settings():
    base = {"a": {"kernel": jnp.zeros((6, 4))}, "b": {"kernel": jnp.zeros((4, 6))}}
    original = adapters.lora(2, (("a/kernel", 2), "b/kernel"))
    again = adapters.build(original.name, original.settings)
    first, second = (x.init(jax.random.key(3), base) for x in (original, again))
    assert first["a"]["kernel"]["a"].shape == (6, 4)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("kind, limit", [("lora", 2.3), ("ia3", 2.05), ("ia3 with biases", 2.05)])
def test_no_gradient_of_a_frozen_kernel_is_formed(kind, limit):
    """FLOPs of a step at ViT-B/16, batch 8, in forward passes: 2 and the adapter's own; a full one costs 3."""
    model = ViT(unroll=True, classes=10)
    images = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
    base = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))["params"]
    adapter = adapters.lora(16) if kind == "lora" else KINDS[kind](adapters.VIT_TARGETS)
    module = jax.eval_shape(lambda b: adapter.init(jax.random.key(0), b), base)
    forward = adapters.adapted(model, adapter)

    def flops(function, *args):
        return jax.jit(function).lower(*args).cost_analysis()["flops"]

    plain = flops(lambda base, x: model.apply({"params": base}, x), base, images)
    step = flops(lambda m, base, x: jax.grad(lambda m: jnp.sum(forward(base, m, x) ** 2))(m), module, base, images)
    assert 1.9 < step / plain <= limit
    composed = flops(
        lambda base, x: model.apply({"params": base}, x), tree_like(tree.add, base, adapter, module), images
    )
    assert composed == plain


def tree_like(add, base, adapter, module):
    return jax.eval_shape(lambda b, m: add(b, adapter.delta(m, b)), base, module)


# What is stacked, and which bias is whose


@pytest.mark.parametrize(
    "name, stacked, expected",
    [
        ("blocks/attention/qkv/kernel", adapters.STACKED, True),
        ("params/blocks/norm1/scale", adapters.STACKED, True),
        ("blocks/0/attention/qkv/kernel", adapters.STACKED, False),
        ("head/kernel", adapters.STACKED, False),
        ("myblocks/kernel", adapters.STACKED, False),
        ("layers/dense/kernel", r"^layers/", True),
        ("blocks/attention/qkv/kernel", (), False),
    ],
)
def test_what_is_stacked_is_said_by_a_pattern(name, stacked, expected):
    assert adapters.is_stacked(name, stacked) is expected


@pytest.mark.parametrize("make", [lambda **k: adapters.lora(2, "kernel", **k), lambda **k: adapters.ia3("kernel", **k)])
def test_a_kernel_with_an_axis_of_heads_is_no_stack_of_matrices(make):
    attention = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12)
    base = jax.eval_shape(attention.init, jax.random.key(0), jnp.zeros((1, 4, 6)))["params"]
    with pytest.raises(ValueError, match=r"is \(6, 3, 4\): .*stacked=; .*\(in, heads \* head_dim\), so reshape it"):
        jax.eval_shape(make().init, jax.random.key(0), {"query": base["query"]})
    with pytest.raises(ValueError, match=r"out/kernel is \(3, 4, 6\)"):
        jax.eval_shape(make().init, jax.random.key(0), {"out": base["out"]})
    with pytest.raises(ValueError, match=r"blocks/kernel is \(2, 12\) with a vector for each layer"):
        make().init(jax.random.key(0), {"blocks": {"kernel": jnp.zeros((2, 12))}})
    module = make(stacked="^a/").init(jax.random.key(0), {"a": {"kernel": jnp.zeros((2, 3, 4))}})
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(module))


@pytest.mark.parametrize("kernel, bias", [("kernel", "bias"), ("weight", "bias"), ("w", "b"), ("W", "b"), ("w1", "b1"),
                                          ("q_kernel", "q_bias"), ("weight", "b")])  # fmt: skip
@pytest.mark.parametrize("depth", [0, 1])
def test_ia3_finds_the_bias_of_a_layer(kernel, bias, depth):
    inner = {kernel: jnp.ones((3, 2)), bias: jnp.array([1.0, 2.0]), "other": jnp.ones(5)}
    base = {"fc": inner} if depth else inner
    adapter = adapters.ia3(f"{kernel}$", bias=True)
    module = tree.map_with_name(lambda name, x: {"l": jnp.array([2.0, 3.0])} if name.endswith(kernel) else None, base)
    delta = adapter.delta(module, base)
    np.testing.assert_array_equal((delta["fc"] if depth else delta)[bias], [1.0, 4.0])
    assert len(jax.tree.leaves(delta)) == 2


def test_ia3_scales_the_bias_of_an_nnx_layer():
    base = nnx.state(nnx.Linear(3, 2, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0)))
    adapter = adapters.ia3("kernel", bias=True)
    module = jax.tree.map(lambda x: 2 * x, adapter.init(jax.random.key(0), base))
    bias, kernel = jax.tree.leaves(adapter.delta(module, base))
    np.testing.assert_array_equal(bias, [1.0, 1.0])
    np.testing.assert_allclose(kernel, jax.tree.leaves(base)[1])


def test_ia3_that_may_miss_a_bias_says_so_and_takes_explicit_names():
    base = {"fc": {"matrix": jnp.ones((3, 2)), "offset": jnp.ones(2)}}
    module = {"fc": {"matrix": {"l": jnp.array([2.0, 3.0])}, "offset": None}}
    unclear = adapters.ia3("matrix", bias=True)
    for act in (lambda: unclear.init(jax.random.key(0), base), lambda: unclear.delta(module, base)):
        with pytest.raises(ValueError, match="finds no bias beside fc/matrix by its name, and fc/offset may be it"):
            act()
    told = adapters.ia3("matrix", bias=[("matrix", "offset")])
    again = adapters.build(told.name, told.settings)
    np.testing.assert_array_equal(again.delta(module, base)["fc"]["offset"], [1.0, 2.0])
    alone = {"fc": {"kernel": jnp.ones((3, 2))}}
    assert tree.names(adapters.ia3("kernel", bias=True).init(jax.random.key(0), alone)) == ["fc/kernel/l"]
    with pytest.raises(ValueError, match=r"bias \(3,\) is no bias of .*kernel \(3, 2\): it should be \(2,\)"):
        adapters.ia3("kernel", bias=True).init(jax.random.key(0), {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)})


@pytest.mark.parametrize("entry", [lambda s: s, lambda s: (s, s), lambda s: [s], lambda s: {"a": s}])
def test_an_adapter_of_ones_own_has_entries_of_any_kind(entry):
    scaled = lambda e: jax.tree.leaves(e)[0] - 1

    def init(key, base):
        return tree.map_with_name(lambda n, x: entry(jnp.ones(x.shape[-1:])) if n.endswith("kernel") else None, base)

    def delta(module, base):
        return jax.tree.map(lambda x, e: None if e is None else x * scaled(e), base, module)

    def dense(x, y, e, bias):
        return y + (y - bias) * scaled(e)

    x = jax.random.normal(jax.random.key(0), (4, 3))
    base = MLP().init(jax.random.key(1), x)["params"]
    module = jax.tree.map(lambda s: s * jnp.linspace(0.5, 2, s.size), init(None, base))
    own, summed = (adapters.adapted(MLP(), adapters.Adapter(init, delta, d)) for d in (dense, None))
    np.testing.assert_allclose(own(base, module, x), summed(base, module, x), atol=1e-5)


# Other containers, types and bases


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_plain_dictionaries_are_one(kind):
    base = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    adapter = KINDS[kind]("kernel")
    module = random_module(adapter, base)
    expected = adapter.delta(module, base)
    for other, made in ((freeze(base), module), (base, freeze(module)), (freeze(base), freeze(module))):
        delta = adapter.delta(made, other)
        assert type(delta) is type(other)
        for x, y in zip(jax.tree.leaves(delta), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(x, y)
        fused = adapters.fuse(other, expected)
        np.testing.assert_array_equal(fused["a"]["kernel"], base["a"]["kernel"] + expected["a"]["kernel"])
    within = adapter.delta({"p": module}, {"p": freeze(base)})
    assert type(within["p"]) is type(freeze(base))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(within), jax.tree.leaves(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_of_another_base_is_refused_by_name(kind):
    base = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    adapter = KINDS[kind]("kernel")
    module = random_module(adapter, {"a": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}, 1)
    act = [lambda: adapter.delta(module, base)]
    if kind != "full":
        act.append(lambda: adapters.adapted(nn.Dense(4), adapter)(base["a"], module["a"], jnp.ones((2, 3))))
        act.append(lambda: adapter.sum([module], base, [1.0]))
    for one in act:
        with pytest.raises(ValueError, match=r"the module doesn't fit .*kernel is \(3, "):
            one()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_deltas_of_16_bit_weights_are_rounded_once(kind, dtype):
    base = randomised({"w": {"kernel": jax.ShapeDtypeStruct((500, 40), dtype),
                             "bias": jax.ShapeDtypeStruct((40,), dtype)}})  # fmt: skip
    adapter = (lambda t: adapters.lora(40, t))("kernel") if kind == "lora" else KINDS[kind]("kernel")
    module = random_module(adapter, base)
    delta = adapter.delta(module, base)
    wide = lambda t: jax.tree.map(lambda x: np.asarray(x, np.float64), t)
    w, entry = wide(base)["w"], wide(module)["w"]["kernel"]
    expected = {"kernel": {"lora": lambda: entry["a"] @ entry["b"], "full": lambda: entry}.get(
        kind, lambda: w["kernel"] * (entry["l"] - 1))()}  # fmt: skip
    expected |= {"bias": w["bias"] * (entry["l"] - 1)} if kind == "ia3 with biases" else {}
    for name, exact in expected.items():
        assert delta["w"][name].dtype == dtype
        found, limit = np.asarray(delta["w"][name], np.float64), float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(found, exact, rtol=limit * 1.01, atol=1e-5)


def test_settings_stored_before_there_were_stacks_are_read():
    for name, settings in (("lora", {"rank": 2, "targets": [["kernel", 1]], "init_scale": 1.0}),
                           ("ia3", {"targets": [["kernel", 1]], "bias": True})):  # fmt: skip
        assert adapters.build(name, settings).settings["stacked"] == list(adapters.STACKED)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: inspect.unwrap(adapters.lora)(2.5), "is a whole number and at least 1, not 2.5"),
        (lambda: adapters.lora(-1), "at least 1, not -1"),
        (lambda: adapters.lora(2, (("kernel", 0),)), "multiple of the rank for 'kernel' .* not 0"),
        (lambda: adapters.lora(2, (("kernel", 1.5),)), "multiple of the rank for 'kernel' .* not 1.5"),
        (lambda: adapters.lora(2, (("kernel", 1, 2),)), r"not \('kernel', 1, 2\)"),
        (lambda: adapters.lora(2, "kernel)"), r"'kernel\)' is no regular expression"),
        (lambda: adapters.full("*"), r"'\*' is no regular expression"),
        (lambda: adapters.ia3("kernel", stacked="["), r"'\[' is no regular expression"),
        (lambda: adapters.ia3("kernel", bias=[("(", "b")]), r"'\(' is no regular expression"),
        (lambda: adapters.ia3("kernel", bias=[("b",)]), "pairs, not"),
        *((lambda x=x: adapters.lora(2, init_scale=x), "init_scale=.*positive")
          for x in (float("nan"), float("inf"), 0.0, -1.0)),
        (lambda: adapters.lora(1, "n").init(jax.random.key(0), {"n": jnp.zeros((3, 3), int)}), "n is of type int32"),
        (lambda: adapters.full("n").init(jax.random.key(0), {"n": jnp.zeros(3, int)}), "n is of type int32"),
    ],
)  # fmt: skip
def test_bad_settings_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_input():
    model, x = vit()
    base = random_base(model, x)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'fc7' matches no parameter.*blocks/attention/qkv/kernel"):
        adapters.lora(2, ("qkv/kernel", "fc7")).init(key, base)
    with pytest.raises(ValueError, match="rank 13 is larger than the 12x12 matrix blocks/attention/proj/kernel"):
        adapters.lora(13).init(key, base)
    with pytest.raises(ValueError, match="patch/kernel is .*narrow the targets"):
        adapters.lora(1, "kernel").init(key, base)
    with pytest.raises(ValueError, match=r"\(IA\)³ adapts .*patch/kernel is .*narrow the targets"):
        adapters.ia3("kernel").init(key, base)
    with pytest.raises(ValueError, match="'fc7' matches no parameter"):
        adapters.ia3("fc7").init(key, base)
    with pytest.raises(ValueError, match="the module's tree isn't the base's"):
        adapters.ia3().delta({"kernel": None}, base)
    with pytest.raises(ValueError, match="at least 1"):
        adapters.lora(0)
    with pytest.raises(ValueError, match="unknown adapter 'prefix'; known are full, ia3, lora"):
        adapters.build("prefix", {})
    scanned = Scanned()
    x = jnp.ones((2, 4))
    base = scanned.init(key, x)["params"]
    adapter = adapters.lora(1, "dense/kernel", stacked="layers/")
    with pytest.raises(ValueError, match="did not reach .*layers/dense/kernel.*variable_axes"):
        adapters.adapted(scanned, adapter)(base, adapter.init(key, base), x)


class Tied(nn.Module):
    """An encoder whose decoder is its transpose."""

    @nn.compact
    def __call__(self, x):
        encoder = nn.Dense(5, name="encoder")
        return jnp.tanh(nn.Dense(4)(encoder(x))) @ encoder.variables["params"]["kernel"][:4, :4]


class Embedded(nn.Module):
    """A kernel that is read as a table before it is read as a layer, behind another layer."""

    @nn.compact
    def __call__(self, x):
        table = nn.Dense(6, name="table")
        first = nn.Dense(3, name="first")(x)
        _ = table(jnp.zeros((1, 3)))
        return table(first + table.variables["params"]["kernel"].sum(-1))


class Scaled(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x) / 10


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Scaled(4)(nn.Dense(5)(x))


def test_a_module_that_changes_nothing_leaves_the_model_as_it_is():
    adapter, model, x = adapters.lora(1, "kernel$"), nn.Dense(3), jnp.ones((2, 6))
    base = model.init(jax.random.key(0), x)["params"]
    found = adapters.adapted(model, adapter)(base, {"kernel": None, "bias": None}, x)
    np.testing.assert_array_equal(found, model.apply({"params": base}, x))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(5))(x)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Normed(), "a wrapper such as nn.WeightNorm takes the module's entries for parameters"),
        (Tied(), "reads encoder/kernel outside of nn.Dense layers, too"),
        (Embedded(), "reads table/kernel outside of nn.Dense layers, too"),
        (Plain(), "did not reach the module's entries for Scaled_0/kernel"),
    ],
)
def test_what_the_short_cut_would_get_wrong_is_refused_and_merged_takes_it(model, told, kind):
    adapter, x = {"lora": adapters.lora(1, "kernel$"), "ia3": adapters.ia3("kernel$")}[kind], jnp.ones((2, 6))
    base = model.init(jax.random.key(0), x)["params"]
    module = jax.tree.map(jnp.ones_like, adapter.init(jax.random.key(1), base))
    for wrapped in (lambda f: f, jax.jit):
        with pytest.raises(ValueError, match=told):
            wrapped(adapters.adapted(model, adapter))(base, module, x)
    found = adapters.merged(lambda p, x: model.apply({"params": p}, x), adapter)(base, module, x)
    np.testing.assert_allclose(
        found, model.apply({"params": tree.add(base, adapter.delta(module, base))}, x), rtol=1e-5
    )
