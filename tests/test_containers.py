"""Modules of bases in any containers, through a pool and back; paths that orbax can't serve."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compo_jax import adapters, curvature, modular, tree
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints, open_run


class Layer(NamedTuple):
    w: Any


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear, self.dropout = nnx.Linear(3, 5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)


BASES = {
    "named tuple in a dictionary": {"l": Layer(jnp.ones((3, 3)))},
    "tuple in a list": {"l": [Layer(jnp.ones((3, 3))), (jnp.ones((2, 2)), {"w": jnp.ones((4, 4))})]},
    "Haiku's names": {"mlp/~/linear_0": {"w": jnp.ones((3, 4))}},
    "numbers for keys": {0: {"w": jnp.ones((3, 4))}},
    "a tuple": (Layer(jnp.ones((3, 3))),),
    "a random key": {"key": jax.random.key(0), "w": jnp.ones((3, 4))},
    "a State with dropout's key": nnx.split(Net())[1],
    "a State in a dictionary": {"encoder": nnx.split(Net(), nnx.Param, ...)[1], "w": jnp.ones((3, 4))},
}


@pytest.mark.parametrize("name", BASES)
def test_modules_of_any_base_are_kept_and_composed(tmp_path, name):
    base, adapter = BASES[name], adapters.lora(1, r"(w|kernel)(/value)?$", stacked=())
    pool = ModulePool(tmp_path / "pool")
    noise = lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape)
    module = jax.tree.map(noise, adapter.init(jax.random.key(0), base))
    pool.add("m", module, base=base, adapter=adapter)
    made, expected = pool.compose(base, ["m"], [1.0]), tree.add(base, adapter.delta(module, base))
    assert jax.tree.structure(made) == jax.tree.structure(base)
    for one, other in zip(*map(jax.tree.leaves, (made, expected)), strict=True):
        if jnp.issubdtype(one.dtype, jnp.floating):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    delta = adapter.delta(tree.regrown(pool.load("m"), base), base)
    jax.tree.map(np.testing.assert_array_equal, delta, adapter.delta(module, base))
    fisher = curvature.FisherDiagonal(jax.tree.map(jnp.square, delta), 3, None)
    pool.attach("m", curvature=fisher)
    assert pool.find(curvature="diagonal") == ["m"]


@pytest.mark.parametrize(
    "head, told",
    [
        ({"x": {"y": (np.ones(1),)}}, "a tuple .* at /x/y"),
        ({"a/b": np.ones(1)}, "key 'a/b'"),
        ({0: np.ones(1)}, "key 0 in /"),
    ],
)
def test_other_parts_which_no_base_gives_their_containers_back_are_plain(tmp_path, head, told):
    base, adapter = {"w": jnp.ones((3, 4))}, adapters.lora(1, "w", stacked=())
    module = adapter.init(jax.random.key(0), base)
    with pytest.raises(ValueError, match=told):
        ModulePool(tmp_path).add("m", module, base=base, adapter=adapter, head=head)


def test_two_leaves_of_one_path_are_not_kept():
    with pytest.raises(ValueError, match="two leaves have the path a/b"):
        tree.nested({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    for x in (jnp.ones(2), None):
        with pytest.raises(ValueError, match="two leaves have the path a/b/c"):
            tree.nested({"a": x, "a/b/c": jnp.ones(2)})


def test_fingerprints_tell_keys_apart():
    one, other = ({"key": jax.random.key(i)} for i in (0, 1))
    assert tree.fingerprint(one) == tree.fingerprint({"key": jax.random.key(0)}) != tree.fingerprint(other)


def test_paths_that_orbax_takes_for_patterns_are_refused_before_anything_is_made(tmp_path):
    base, adapter = {"w": jnp.ones((3, 4))}, adapters.lora(1, "w", stacked=())
    module = adapter.init(jax.random.key(0), base)
    with pytest.raises(ValueError, match="has a bracket"):
        ModulePool(tmp_path / "exp[1]" / "pool").add("m", module, base=base, adapter=adapter)
    with pytest.raises(ValueError, match="has a bracket"), open_run(tmp_path / "exp[1]", {}):
        pass
    assert not list(tmp_path.iterdir())
    ModulePool(tmp_path / "pool").add("m", module, base=base, adapter=adapter)
    (tmp_path / "pool").rename(tmp_path / "pool[1]")  # what is there is read wherever it is
    jax.tree.map(np.testing.assert_array_equal, ModulePool(tmp_path / "pool[1]").load("m"), module)
    with open_run(tmp_path / "run", {"a": 1}) as run:
        Checkpoints(run.folder / "kept").save(1, module)
    (tmp_path / "run").rename(tmp_path / "run[1]")
    with open_run(tmp_path / "run[1]", {"a": 1}) as run:
        Checkpoints(run.folder / "kept").load(module)
        with pytest.raises(ValueError, match="has a bracket"):
            Checkpoints(run.folder / "kept").save(2, module)


# -- arguments of the functional API -----------------------------------------------------------------------------------
def test_what_a_loss_or_a_batch_may_not_be_is_told():
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="the loss returns a tuple: return the number alone, without aux"):
        curvature.hvp(lambda p, x: (jnp.sum(p * x), {"a": x}), x, x, x)
    with pytest.raises(ValueError, match=r"a batch holds what is no array: close over it"):
        curvature.landscape(lambda p, x, _: jnp.sum((p * x) ** 2), x, [x, x], x, "mean")
    apply = lambda p, x: {"z": p * x, "i": jnp.argmax(x)}
    with pytest.raises(ValueError, match="what the model returns for a loss of yours has a leaf i of type int32"):
        curvature.ggnvp(apply, x, x, x[None], output_loss=lambda z: jnp.sum(z["z"] ** 2))


def test_none_in_a_forecast_is_no_change():
    loss = lambda p, x: jnp.sum((p["a"] * x) ** 2) + jnp.sum(p["b"]["c"] ** 2)
    anchor = {"a": jnp.ones(3), "b": {"c": jnp.ones(2)}}
    for hole in ({"c": None}, None):
        made = curvature.forecast(loss, anchor, {"a": 2 * jnp.ones(3), "b": hole}, jnp.ones(3))
        np.testing.assert_allclose([made.forecast, made.loss], 14, rtol=1e-6)


def test_routes_below_zero_are_no_places_from_the_end():
    templates = {"k": jnp.arange(3.0)[:, None]}
    for route in (-1, 3):
        assert np.isnan(jax.jit(modular.mix_templates)(templates, jnp.array([route]))["k"]).all()
    with pytest.raises(ValueError, match="a route through the templates"):
        modular.mix_templates(templates, jnp.array([-1]))
