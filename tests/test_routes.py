"""Routes: soft, hard and between, their entropies and their null."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from compo_jax.modular import Settings, gumbel, hard, mix_templates, phase, routes, soft, straight_through

X64 = jax.enable_x64
LOGITS = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


def templates(count=4):
    random = np.random.default_rng(1)
    make = lambda *shape: jnp.array(random.normal(size=(count, *shape)), jnp.float32)
    return {"conv1": make(3, 3, 2, 2), "conv2": make(5)}


# -- routes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_soft_is_the_softmax_and_hard_its_limit(temperature):
    found = soft(jnp.array(LOGITS), temperature)
    np.testing.assert_allclose(found, scipy.special.softmax(LOGITS / temperature, -1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(soft(jnp.array(LOGITS), 1e-4), hard(jnp.array(LOGITS)), atol=1e-6)
    assert np.array_equal(hard(jnp.array(LOGITS)), np.eye(4)[LOGITS.argmax(-1)])


def test_a_tie_goes_to_the_first_template():
    assert np.array_equal(hard(jnp.array([1.0, 2.0, 2.0])), [0, 1, 0])


def test_an_order_may_be_written_in_whole_numbers():
    order = np.array([[1, 0], [0, 1]])
    for values in (order, jnp.asarray(order)):
        np.testing.assert_array_equal(hard(values), order)
        assert jnp.issubdtype(hard(values).dtype, jnp.floating)
        np.testing.assert_array_equal(routes.indices(values), [0, 1])
        np.testing.assert_allclose(soft(values), scipy.special.softmax(order, -1), rtol=1e-6)
    with X64(True):
        assert hard(jnp.asarray(LOGITS)).dtype == jnp.float32 and hard(jnp.zeros(2, jnp.bfloat16)).dtype == jnp.bfloat16


def test_straight_through_is_hard_forwards_and_soft_backwards():
    with X64(True):
        logits, cotangent, temperature = jnp.array(LOGITS[0, 0], jnp.float64), np.arange(4.0) ** 2, 0.5
        value, pull = jax.vjp(lambda x: straight_through(x, temperature), logits)
        np.testing.assert_allclose(value, hard(logits), atol=1e-15)
        a = scipy.special.softmax(np.asarray(logits) / temperature)
        jacobian = (np.diag(a) - np.outer(a, a)) / temperature
        np.testing.assert_allclose(pull(cotangent)[0], jacobian @ cotangent, rtol=1e-10)


def test_a_gumbel_route_draws_each_template_with_its_softmax_probability():
    logits, draws = jnp.array([0.0, 1.0, -1.0]), 4000
    drawn = jax.vmap(lambda key: gumbel(logits, key, 0.3))(jax.random.split(jax.random.key(0), draws))
    np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-5)
    p = scipy.special.softmax([0.0, 1.0, -1.0])
    frequency = np.bincount(np.asarray(drawn).argmax(-1), minlength=3) / draws
    assert np.all(np.abs(frequency - p) < 4 * np.sqrt(p * (1 - p) / draws))


def test_entropy_lies_between_zero_and_log_m_and_has_a_gradient_at_one_hot():
    weights = soft(jnp.array(LOGITS))
    np.testing.assert_allclose(routes.entropy(weights), scipy.stats.entropy(weights, axis=-1), rtol=1e-5)
    assert routes.entropy(jnp.eye(4)).tolist() == [0] * 4
    np.testing.assert_allclose(routes.entropy(jnp.full(4, 0.25)), np.log(4), rtol=1e-6)
    random = np.random.default_rng(2).dirichlet(np.full(5, 0.1), size=200).astype(np.float32)
    found = routes.entropy(jnp.array(random))
    assert np.all((found >= 0) & (found <= np.log(5) + 1e-6))
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda a: routes.entropy(a).sum()))(jnp.eye(4))))
    np.testing.assert_allclose(routes.scaled_entropy(weights), routes.entropy(weights).mean() / np.log(4), rtol=1e-6)


def test_unused_is_zero_where_all_modules_work_alike_and_one_where_one_does_it_all():
    assert abs(float(routes.unused(jnp.eye(4)[None]))) < 1e-6
    assert abs(float(routes.unused(jnp.tile(jnp.eye(4)[:1], (2, 3, 1)))) - 1) < 1e-6
    weights = soft(jnp.array(LOGITS))
    mean = np.asarray(weights).reshape(-1, 4).mean(0)
    np.testing.assert_allclose(routes.unused(weights), 1 - scipy.stats.entropy(mean) / np.log(4), rtol=1e-4)


def test_one_template_has_no_penalties():
    one = jnp.ones((2, 3, 1))
    assert (float(routes.scaled_entropy(one)), float(routes.unused(one))) == (0, 0)


def test_logits_of_weights_give_them_back_smoothed():
    weights = hard(jnp.array(LOGITS))
    np.testing.assert_allclose(soft(routes.to_logits(weights, 0.1)), 0.9 * weights + 0.025, rtol=1e-5)


def test_a_fixed_route_takes_the_templates_named_and_a_random_one_all_alike():
    assert routes.indices(routes.fixed(np.array([2, 0, 2]), 3)).tolist() == [2, 0, 2]
    drawn = routes.indices(routes.random(jax.random.key(0), (2000,), 4))
    assert scipy.stats.chisquare(np.bincount(drawn, minlength=4)).pvalue > 1e-3
    with pytest.raises(ValueError, match=r"through the templates \[0, 3\], and there are 3"):
        routes.fixed(np.array([0, 3]), 3)


# -- the course of training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "temperature", "entropy", "usage", "fixed"),
    [(0, 1, 0, 0.01, False), (20, 1, 0, 0.01, False), (45, 10**-0.5, 0.05, 0.01, False),
     (69, 0.1 ** (49 / 50), 0.098, 0.01, False), (70, 0.1, 0, 0, True), (99, 0.1, 0, 0, True)],
)  # fmt: skip
def test_the_three_phases(step, temperature, entropy, usage, fixed):
    found = phase(Settings(steps=100), step)
    np.testing.assert_allclose(found[:3], (temperature, entropy, usage), rtol=1e-5, atol=1e-7)
    assert bool(found.fixed) is fixed


def test_a_route_can_be_fixed_from_the_start_or_never():
    assert all(bool(phase(Settings(steps=10, phases=(0.0, 0.0)), step).fixed) for step in range(10))
    assert not any(bool(phase(Settings(steps=10, phases=(1.0, 1.0)), step).fixed) for step in range(10))


# -- mixing ------------------------------------------------------------------------------------------------------------


def test_mixing_is_the_weighted_sum_at_each_layer():
    stacked, weights = templates(), soft(jnp.array(LOGITS))
    mixed = mix_templates(stacked, weights)
    for name, leaf in stacked.items():
        assert mixed[name].shape == (2, 3, *leaf.shape[1:])
        for t, layer in itertools.product(range(2), range(3)):
            expected = sum(float(weights[t, layer, m]) * np.asarray(leaf[m]) for m in range(4))
            np.testing.assert_allclose(mixed[name][t, layer], expected, rtol=1e-4, atol=1e-5)


def test_a_one_hot_route_and_the_templates_numbers_read_the_templates_to_the_bit():
    stacked, logits = templates(), jnp.array(LOGITS)
    for route in (hard(logits), routes.indices(logits)):
        for name, leaf in mix_templates(stacked, route).items():
            assert np.array_equal(leaf, np.asarray(stacked[name])[LOGITS.argmax(-1)])


def test_permuting_templates_and_the_route_s_columns_together_changes_nothing():
    stacked, order = templates(), np.array([2, 0, 3, 1])
    permuted = jax.tree.map(lambda x: x[order], stacked)
    for route in (soft, hard, straight_through, partial(soft, temperature=0.2)):
        one = mix_templates(stacked, route(jnp.array(LOGITS)))
        other = mix_templates(permuted, route(jnp.array(LOGITS[..., order])))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_hard_route_by_numbers_costs_the_same_whatever_the_number_of_templates():
    def flops(count):
        compiled = jax.jit(mix_templates).lower(templates(count), jnp.zeros((2, 3), jnp.int32)).compile()
        return compiled.cost_analysis().get("flops", 0.0)

    assert flops(4) == flops(32)


def test_a_route_of_the_wrong_size_is_told():
    with pytest.raises(ValueError, match=r"a route of shape \(2, 3, 5\) was given for 4 templates"):
        mix_templates(templates(), jnp.ones((2, 3, 5)))
    with pytest.raises(ValueError, match="stacked on axis 0"):
        mix_templates({"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))}, jnp.ones((1, 2)))
