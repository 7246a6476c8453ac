import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    assert jax.tree.map(jnp.shape, adapters.ia3("fc1/kernel", stacked="fc1").init(jax.random.key(0), base)) == jax.tree.map(
        jnp.shape, module
    )
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
