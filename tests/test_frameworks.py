"""Models of Equinox and Flax NNX through the whole way: LoRA, Fisher, Hessian products, a pool, a composition."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from compo_jax import adapters, compose, curvature, incremental, tree
from compo_jax.pool import ModulePool

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
LABELS = np.array([0, 1, 0, 1, 1, 0])


class Model(NamedTuple):
    """A network of two layers, 3 to 5 to 2, in some framework.

    Attributes:
      apply: `(params, x) -> logits`.
      params: in the framework's containers.
      pattern: of the paths of the weights.
      weights: these paths.
    """

    apply: Callable
    params: Any
    pattern: str
    weights: list[str]


def equinox() -> Model:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, 5, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    weights = ["layers/0/weight", "layers/1/weight"]
    return Model(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, r"weight$", weights)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.out = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.inner(x)))


def flax_nnx() -> Model:
    graph, params = nnx.split(Network(nnx.Rngs(0)))
    weights = [name for name in tree.names(params) if "kernel" in name]
    return Model(lambda p, x: nnx.merge(graph, p)(x), params, "kernel", weights)


def frozen_linen() -> Model:
    model = nn.Sequential([nn.Dense(5), jnp.tanh, nn.Dense(2)])
    params = freeze(model.init(jax.random.key(0), X)["params"])
    weights = [name for name in tree.names(params) if "kernel" in name]
    return Model(lambda p, x: model.apply({"params": p}, x), params, "kernel$", weights)


@pytest.fixture(params=[equinox, flax_nnx, frozen_linen], scope="module")
def model(request):
    return request.param()


def trained(model, adapter, seed):
    """A module as it might be after training."""
    module = adapter.init(jax.random.key(seed), model.params)
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed + x.size), x.shape), module)


def test_lora_on_the_model_s_own_weights(model):
    adapter = adapters.lora(1, model.pattern, stacked=())
    module = trained(model, adapter, 1)
    delta = adapter.delta(module, model.params)
    assert tree.names(delta) == model.weights
    assert jax.tree.structure(tree.add(model.params, delta)) == jax.tree.structure(model.params)
    forward = adapters.merged(model.apply, adapter)
    logits = jax.jit(forward)(model.params, module, X)
    np.testing.assert_allclose(logits, model.apply(tree.add(model.params, delta), X), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda m: forward(model.params, m, X).sum())(module)
    assert all(np.any(g) for g in jax.tree.leaves(gradient))


def test_curvature_of_the_model(model):
    def loss(p, x, y):
        return -jnp.mean(jax.nn.log_softmax(model.apply(p, x))[jnp.arange(len(y)), y])

    vector = jax.tree.map(jnp.ones_like, model.params)
    product = curvature.hvp(loss, model.params, vector, X, LABELS)
    assert jax.tree.structure(product) == jax.tree.structure(model.params)
    fisher = curvature.fisher_diagonal(model.apply, model.params, X)
    ggn = curvature.ggn(model.apply, model.params, [(X, LABELS)])
    for one, other in zip(*map(jax.tree.leaves, (fisher.mean, ggn.diagonal())), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(fisher.trace(), ggn.trace(), rtol=1e-5)


def test_a_pool_of_its_modules_is_composed_and_merged(model, tmp_path):
    adapter, pool = adapters.lora(1, model.pattern, stacked=()), ModulePool(tmp_path)
    modules = [trained(model, adapter, seed) for seed in (1, 2)]
    for name, module in zip("ab", modules, strict=True):
        pool.add(name, module, base=model.params, adapter=adapter)
    fisher = curvature.fisher_diagonal(model.apply, model.params, X)
    pool.attach("a", curvature=fisher)
    again = pool.load("a")
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(tree.nested(modules[0])), strict=True):
        np.testing.assert_array_equal(one, other)
    deltas = [adapter.delta(module, model.params) for module in modules]
    expected = compose.compose(model.params, deltas)
    logits = model.apply(pool.compose(model.params), X)
    np.testing.assert_allclose(logits, model.apply(expected, X), rtol=1e-5, atol=1e-6)
    summed = adapter.sum([pool.load(name) for name in "ab"], model.params, [0.5, 0.5])
    np.testing.assert_allclose(
        adapters.merged(model.apply, adapter)(model.params, summed, X), logits, rtol=1e-5, atol=1e-6
    )
    kept = pool.curvature("a")
    merged = compose.fisher_merge(list(pool.deltas(model.params)), [kept, fisher])
    np.testing.assert_allclose(
        jax.tree.leaves(merged)[0], jax.tree.leaves(compose.fisher_merge(deltas, [fisher, fisher]))[0], rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_pool_keeps_its_modules_and_their_curvature_as_dictionaries(model, kind, tmp_path):
    """The same bytes as of what was made dictionaries by hand, and the same merge."""
    adapter = adapters.lora(1, model.pattern, stacked=()) if kind == "lora" else adapters.full(model.pattern)
    pool, by_hand = ModulePool(tmp_path / "a"), ModulePool(tmp_path / "b")
    deltas, fishers = [], []
    for seed, name in enumerate("ab"):
        module = trained(model, adapter, seed)
        deltas.append(adapter.delta(module, model.params))
        fishers.append(curvature.fisher_diagonal(model.apply, tree.add(model.params, deltas[-1]), X))
        plain = fishers[-1]._replace(total=tree.nested(fishers[-1].total))
        made = pool.add(name, module, base=model.params, adapter=adapter, curvature=fishers[-1])
        other = by_hand.add(name, tree.nested(module), base=model.params, adapter=adapter, curvature=plain)
        assert (made.parts, made.base_leaves) == (other.parts, other.base_leaves)
    assert pool.attach("b", curvature=fishers[1]).parts == made.parts and not pool.check()
    assert tree.names(pool.curvature("a").total) == sorted(tree.names(model.params))
    merged = incremental.merge_pool("fisher", pool, model.params)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    expected = compose.merge("fisher", model.params, deltas, fishers=fishers)
    for one, other in zip(*map(jax.tree.leaves, (merged, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_pool_keeps_modules_by_their_paths_and_refuses_what_no_base_would_bring_back(model, tmp_path):
    """Whatever containers a module lies in; parts that aren't of the base's parameters have none to go back to."""
    adapter, pool = adapters.full(model.pattern), ModulePool(tmp_path)
    module = trained(model, adapter, 1)
    for name, odd in (("tuple", (module,)), ("within", {"x": module})):
        pool.add(name, odd, base="0" * 64, adapter="full")
        jax.tree.map(np.testing.assert_array_equal, pool.load(name), tree.nested(odd))
    with pytest.raises(ValueError, match="part 'module' has a str "):
        pool.add("m", Model(*"abcd"), base="0" * 64, adapter="full")
    with pytest.raises(ValueError, match=f"part 'head' has a {type(module).__name__} "):
        pool.add("m", module, base=model.params, adapter=adapter, head=module)
    assert pool.names() == ["tuple", "within"]


@pytest.mark.parametrize("rule", ["average", "wudi", "core_space", "emr", "tsv", "ties"])
def test_a_rule_makes_of_its_trees_what_it_makes_of_dictionaries(model, rule):
    base = model.params
    near = lambda seed: jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed), x.shape), base)
    options = {"task": 1} if rule == "emr" else {}
    deltas = [compose.task_vector(near(seed), base) for seed in range(3)]
    merged = compose.merge(rule, base, deltas, **options)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    plain = compose.merge(rule, tree.nested(base), list(map(tree.nested, deltas)), **options)
    jax.tree.map(np.testing.assert_array_equal, tree.nested(merged), plain)
    assert np.all(np.isfinite(model.apply(merged, X)))


def test_core_space_takes_its_lora_modules(model):
    adapter = adapters.lora(1, model.pattern, stacked=())
    modules = [trained(model, adapter, seed) for seed in (1, 2)]
    merged = compose.merge("core_space", model.params, modules)
    expected = compose.compose(model.params, [adapter.delta(module, model.params) for module in modules])
    for one, other in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_model_s_object_is_refused_with_what_takes_its_parameters():
    eqx = pytest.importorskip("equinox")
    mlp = eqx.nn.MLP(3, 2, 5, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"leaf activation of type .*by eqx\.filter\(model, eqx\.is_inexact_array\)"):
        compose.task_vector(mlp, mlp)


def test_what_isn_t_the_model_s_is_refused(model):
    adapter = adapters.lora(1, model.pattern, stacked=())
    module = tree.nested(trained(model, adapter, 1))
    with pytest.raises(ValueError, match="there is no elsewhere among|isn't the base's"):
        adapter.delta(module | {"elsewhere": {"a": jnp.ones(2), "b": jnp.ones(2)}}, model.params)
