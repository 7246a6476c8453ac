"""An adapter of a user's own: registered by name, stored in a pool, loaded, summed and composed as ours are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax import adapters, compose, tree
from compo_jax.pool import ModulePool

BASE = {"fc": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, "out": {"kernel": jnp.ones((2, 4)), "bias": None}}


def shift(pattern: str, size: float = 1.0) -> adapters.Adapter:
    """Every chosen weight is moved by one learned number for each of its rows, times `size`."""

    def init(key, base):
        chosen, _ = tree.partition(base, pattern)
        return jax.tree.map(lambda x: {"rows": jnp.zeros(x.shape[0])}, chosen)

    def delta(module, base):
        def one(leaf, entry):
            return None if entry is None else size * jnp.broadcast_to(entry["rows"][:, None], leaf.shape)

        return jax.tree.map(one, base, module)

    def scale(module, base, factor):
        return jax.tree.map(lambda x: factor * x, module)

    def sum_(modules, base, weights, *, check_finite=True):
        return tree.weighted_sum(modules, weights)

    settings = {"pattern": pattern, "size": size}
    return adapters.Adapter(init, delta, scale=scale, sum=sum_, name="shift", settings=settings)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    adapters.register("shift", shift)


def module(adapter, seed):
    begun = adapter.init(jax.random.key(seed), BASE)
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(seed + len(x)), x.shape), begun)


def test_it_is_stored_loaded_summed_and_composed(tmp_path):
    adapter, pool = shift("kernel", 2.0), ModulePool(tmp_path)
    modules = {name: module(adapter, seed) for seed, name in enumerate("ab")}
    for name, trained in modules.items():
        pool.add(name, trained, base=BASE, adapter=adapter)
    manifest = pool.manifest("a")
    again = adapters.build(manifest.adapter, manifest.settings)
    assert again.settings == {"pattern": "kernel", "size": 2.0} and pool.find(adapter="shift") == ["a", "b"]
    total = again.sum([pool.load(name) for name in "ab"], BASE, [0.5, 0.5])
    composed = pool.compose(BASE)
    expected = compose.compose(BASE, [adapter.delta(trained, BASE) for trained in modules.values()])
    for params in (composed, tree.add(BASE, again.delta(total, BASE))):
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    twice = again.delta(again.scale(modules["a"], BASE, 2.0), BASE)
    np.testing.assert_allclose(twice["fc"]["kernel"], 2 * adapter.delta(modules["a"], BASE)["fc"]["kernel"], rtol=1e-6)


def test_its_forward_pass():
    adapter = shift("fc/kernel")
    forward = adapters.merged(lambda p, x: x @ p["fc"]["kernel"] + p["fc"]["bias"], adapter)
    trained, x = module(adapter, 1), jnp.ones((1, 3))
    np.testing.assert_allclose(forward(BASE, trained, x), 3 + trained["fc"]["kernel"]["rows"].sum() * jnp.ones((1, 2)))


def test_a_name_that_is_taken_and_one_that_is_not_known():
    adapters.register("shift", shift)  # again, as where a file is run twice
    with pytest.raises(ValueError, match="'lora' is another adapter's name already"):
        adapters.register("lora", shift)
    with pytest.raises(ValueError, match="unknown adapter 'twist'; known are .*shift.*adapters.register"):
        adapters.build("twist", {})
