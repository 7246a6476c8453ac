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


def randomised(key, module):
    leaves, structure = jax.tree.flatten(module)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


CASES = {
    "vit": (*vit(), adapters.VIT_TARGETS),
    "vit unrolled": (*vit(unroll=True), adapters.VIT_TARGETS),
    "any Linen model": (MLP(), jnp.linspace(-1, 1, 12).reshape(4, 3), r"inner/kernel$"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_fast_path_equals_the_merged_forward_in_value_and_gradient(name, kind):
    model, x, targets = CASES[name]
    base = jax.jit(model.init)(jax.random.key(0), x)["params"]
    adapter = adapters.lora(2, targets) if kind == "lora" else adapters.full(targets)
    module = randomised(jax.random.key(1), adapter.init(jax.random.key(2), base))
    forward = adapters.adapted(model, adapter)

    def merged(module):
        return model.apply({"params": tree.add(base, adapter.delta(module, base))}, x)

    np.testing.assert_allclose(jax.jit(forward)(base, module, x), jax.jit(merged)(module), atol=1e-5, rtol=1e-5)
    assert np.abs(jax.jit(merged)(module) - model.apply({"params": base}, x)).max() > 1e-2
    fast = jax.jit(jax.grad(lambda m: jnp.sum(forward(base, m, x) ** 2)))(module)
    slow = jax.jit(jax.grad(lambda m: jnp.sum(merged(m) ** 2)))(module)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_new_module_changes_nothing(kind):
    model, x = vit()
    base = jax.jit(model.init)(jax.random.key(0), x)["params"]
    adapter = adapters.build(kind, {}) if kind == "full" else adapters.lora(2)
    delta = adapter.delta(adapter.init(jax.random.key(1), base), base)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(delta))
    assert {name.split("/")[-2] for name in tree.names(delta)} == {"qkv", "proj", "fc1", "fc2"}


def test_lora_of_vit_b_16_has_the_parameters_of_the_paper():
    model = ViT()
    base = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))["params"]
    count = lambda adapter: sum(
        int(np.prod(leaf.shape))
        for leaf in jax.tree.leaves(jax.eval_shape(lambda b: adapter.init(jax.random.key(0), b), base))
    )
    assert count(adapters.lora(16)) == 3_538_944
    assert count(adapters.full()) == 84_934_656


def test_lora_starts_as_the_paper_does():
    base = {"fc1": {"kernel": jnp.zeros((400, 300))}}
    entry = adapters.lora(64, "fc1").init(jax.random.key(0), base)["fc1"]["kernel"]
    bound = 1 / np.sqrt(400)
    assert 0.98 * bound < np.abs(entry["a"]).max() <= bound
    np.testing.assert_allclose(np.std(entry["a"]), bound / np.sqrt(3), rtol=0.02)
    assert not entry["b"].any()


def test_an_adapter_can_be_built_again_from_its_name_and_settings():
    base = {"a": {"kernel": jnp.zeros((6, 4))}, "b": {"kernel": jnp.zeros((4, 6))}}
    original = adapters.lora(2, (("a/kernel", 2), "b/kernel"))
    again = adapters.build(original.name, original.settings)
    first, second = (x.init(jax.random.key(3), base) for x in (original, again))
    assert first["a"]["kernel"]["a"].shape == (6, 4)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_no_gradient_of_a_frozen_kernel_is_formed():
    """FLOPs of a LoRA step at ViT-B/16, batch 8, in forward passes: 2 and the adapter's own; a full one costs 3."""
    model = ViT(unroll=True, classes=10)
    images = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
    base = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))["params"]
    adapter = adapters.lora(16)
    module = jax.eval_shape(lambda b: adapter.init(jax.random.key(0), b), base)
    forward = adapters.adapted(model, adapter)

    def flops(function, *args):
        return jax.jit(function).lower(*args).cost_analysis()["flops"]

    plain = flops(lambda base, x: model.apply({"params": base}, x), base, images)
    step = flops(lambda m, base, x: jax.grad(lambda m: jnp.sum(forward(base, m, x) ** 2))(m), module, base, images)
    assert 2.0 < step / plain <= 2.3
    composed = flops(
        lambda base, x: model.apply({"params": base}, x), tree_like(tree.add, base, adapter, module), images
    )
    assert composed == plain


def tree_like(add, base, adapter, module):
    return jax.eval_shape(lambda b, m: add(b, adapter.delta(m, b)), base, module)


def test_bad_input():
    model, x = vit()
    base = jax.jit(model.init)(jax.random.key(0), x)["params"]
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'fc7' matches no parameter.*blocks/attention/qkv/kernel"):
        adapters.lora(2, ("qkv/kernel", "fc7")).init(key, base)
    with pytest.raises(ValueError, match="rank 13 is larger than the 12x12 matrix blocks/attention/proj/kernel"):
        adapters.lora(13).init(key, base)
    with pytest.raises(ValueError, match="patch/kernel is .*narrow the targets"):
        adapters.lora(1, "kernel").init(key, base)
    with pytest.raises(ValueError, match="at least 1"):
        adapters.lora(0)
    with pytest.raises(ValueError, match="unknown adapter 'prefix'; known are full, lora"):
        adapters.build("prefix", {})
    scanned = Scanned()
    x = jnp.ones((2, 4))
    base = scanned.init(key, x)["params"]
    adapter = adapters.lora(1, "dense/kernel")
    with pytest.raises(ValueError, match="did not reach .*layers/dense/kernel.*variable_axes"):
        adapters.adapted(scanned, adapter)(base, adapter.init(key, base), x)
