"""A step down a penalty can't overshoot: neither alone, for any weight and curvature, nor in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax import adapters, incremental
from compo_jax.incremental import penalty_step
from compo_jax.incremental.descent import limit_update
from compo_jax.train import init_state, make_step

X64 = jax.enable_x64
KINDS = {
    "lora": adapters.lora(2, targets="kernel"),
    "ia3": adapters.ia3(targets="kernel"),
    "full": adapters.full(targets="kernel"),
}


def quadratic(seed, size=6):
    root = np.random.default_rng(seed).standard_normal((size, size))
    return jnp.asarray(root @ root.T)


@pytest.mark.parametrize("alpha", [1e-4, 1e-2, 1.0, 1e4, 1e8])
def test_a_step_down_a_quadratic_ends_at_its_lowest_point_on_the_way_or_before(alpha):
    with X64(True):
        h = alpha * quadratic(0)
        x = {"w": {"kernel": jnp.arange(1.0, 7.0)}}
        step, metrics = penalty_step(lambda x: 0.5 * x["w"]["kernel"] @ h @ x["w"]["kernel"], x, 1.0, clip=np.inf)
        g = h @ x["w"]["kernel"]
        part = min(1.0, float(g @ g / (g @ h @ g)))
        np.testing.assert_allclose(step["w"]["kernel"], -part * g, rtol=1e-9)
        np.testing.assert_allclose([metrics["penalty_step"], metrics["penalty"]], [part, 0.5 * x["w"]["kernel"] @ g])
        assert (part == 1) == (alpha < 1e-1)


def test_each_weight_and_each_layer_is_shortened_by_itself():
    with X64(True):
        stiff = jnp.array([1e-3, 1e3])  # of the two layers
        x = {"blocks": {"fc1": {"kernel": jnp.ones((2, 3, 4))}}, "head": {"kernel": jnp.ones(5)}}
        penalty = lambda x: (
            0.5 * jnp.sum(stiff[:, None, None] * x["blocks"]["fc1"]["kernel"] ** 2) + 0.05 * x["head"]["kernel"].sum()
        )
        step, metrics = penalty_step(penalty, x, 1.0, clip=np.inf)
        np.testing.assert_allclose(step["blocks"]["fc1"]["kernel"][0], -1e-3)  # the whole gradient
        np.testing.assert_allclose(step["blocks"]["fc1"]["kernel"][1], -1.0)  # to zero, and not beyond
        np.testing.assert_allclose(step["head"]["kernel"], -0.05)
        np.testing.assert_allclose(metrics["penalty_step"], 1e-3)


def problem(kind, seed=0, scale=1.0):
    """(adapter, base, a module away from its start, a diagonal with heavy tails)."""
    random = np.random.default_rng(seed)
    base = {"blocks": {n: {"kernel": jnp.asarray(random.normal(size=(2, 12, 10)), jnp.float32)} for n in ("a", "b")}}
    adapter = KINDS[kind]
    start = adapter.init(jax.random.key(seed), base)
    module = jax.tree.map(lambda x: x + jnp.asarray(random.normal(size=x.shape), x.dtype), start)
    fisher = jax.tree.map(lambda x: jnp.asarray(scale * random.lognormal(0, 3, x.shape), x.dtype), base)
    return adapter, base, module, fisher


@pytest.mark.parametrize("scale", [1e-10, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_and_no_curvature_lets_a_penalty_grow(kind, scale):
    adapter, base, start, fisher = problem(kind, scale=scale)

    @jax.jit
    def steps(alpha, past, tasks):
        def penalty(module):
            delta = adapter.delta(module, base)
            return incremental.iel_penalty(delta, past, fisher, alpha, tasks)

        def body(module, _):
            step, metrics = penalty_step(penalty, module, 1.0)
            return jax.tree.map(jnp.add, module, step), metrics["penalty"]

        return jax.lax.scan(body, start, None, length=30)[1]

    nothing = jax.tree.map(jnp.zeros_like, base)
    past = adapter.delta(problem(kind, seed=1)[2], base)
    for alpha in (1e-4, 1.0, 1e4, 1e8):
        for sum_of_past, tasks in ((nothing, 1.0), (past, 3.0)):
            values = np.asarray(steps(alpha, sum_of_past, tasks), np.float64)
            assert np.all(np.isfinite(values))
            assert np.all(np.diff(values) <= 2e-5 * np.abs(values[:-1]))
            if alpha * scale > 1:
                assert values[-1] < 0.9 * values[0]


def test_a_short_step_is_the_gradient_itself():
    """The golden case: where nothing overshoots, the step is that of the paper, each layer's tensors clipped one by
    one."""
    adapter, base, module, fisher = problem("lora", scale=1e-5)
    penalty = lambda m: incremental.ita_penalty(adapter.delta(m, base), fisher, 0.3)
    gradient = jax.grad(penalty)(module)
    norms = [np.linalg.norm(g.reshape(2, -1), axis=1)[:, None, None] for g in jax.tree.leaves(gradient)]  # two layers
    clip = float(np.median(np.concatenate(norms)))
    step, metrics = penalty_step(penalty, module, 0.5, clip)
    assert metrics["penalty_step"] == 1
    for s, g, norm in zip(jax.tree.leaves(step), jax.tree.leaves(gradient), norms, strict=True):
        np.testing.assert_allclose(s, -0.5 * g * np.minimum(1, clip / norm), rtol=1e-5)
    still, metrics = penalty_step(penalty, adapter.init(jax.random.key(0), base), 1.0)
    assert not any(np.any(x) for x in jax.tree.leaves(still)) and metrics["penalty"] == 0


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_coupled_penalty_never_gains_more_than_the_rest_can_lose(kind, scale):
    adapter, base, module, fisher = problem(kind, scale=scale)
    random = np.random.default_rng(3)
    draw = lambda size: jax.tree.map(lambda x: jnp.asarray(size * random.normal(size=x.shape), x.dtype), module)
    rest, update = draw(1.0), draw(1e-2)
    for alpha in (1e-4, 1.0, 1e8):
        penalty = lambda m, alpha=alpha: incremental.ita_penalty(adapter.delta(m, base), fisher, alpha)
        whole = jax.tree.map(jnp.add, rest, jax.grad(penalty)(module))
        limited = limit_update(penalty, module, update, whole)
        gain = sum(float(jnp.sum(jnp.abs(r * u))) for r, u in zip(*map(jax.tree.leaves, (rest, limited)), strict=True))
        before, after = (float(penalty(m)) for m in (module, jax.tree.map(jnp.add, module, limited)))
        assert after <= before * (1 + 2e-5) + gain
        if alpha * scale < 1e-8:  # the penalty plays no part, and neither does the limit
            jax.tree.map(np.testing.assert_array_equal, limited, update)


def test_a_coupled_update_is_shortened_to_the_lowest_point_of_the_sum():
    with X64(True):
        h, x, slope = 1e3 * quadratic(1), jnp.arange(1.0, 7.0) / 1e4, jnp.ones(6)
        penalty = lambda p: 0.5 * p["w"]["kernel"] @ h @ p["w"]["kernel"]
        update = -jnp.ones(6)
        limited = limit_update(
            penalty, {"w": {"kernel": x}}, {"w": {"kernel": update}}, {"w": {"kernel": slope + h @ x}}
        )["w"]["kernel"]
        along = lambda t: slope @ (t * update) + 0.5 * (x + t * update) @ h @ (x + t * update)
        part = float((limited / update)[0])
        np.testing.assert_allclose(limited, part * update, rtol=1e-12)
        assert 0 < part < 1
        np.testing.assert_allclose(jax.grad(along)(part), 0, atol=1e-9 * float(update @ h @ update))


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_16_bits_are_trained_in_their_own_type(kind, coupled):
    adapter, base, module, fisher = problem(kind)
    module = jax.tree.map(lambda x: x.astype(jnp.bfloat16), module)
    penalty = lambda m: incremental.ita_penalty(adapter.delta(m, base), fisher, 10.0)

    def extras(params, context, step):
        if coupled:
            return {"rate": 1.0, "penalty": penalty}, {}
        update, metrics = penalty_step(penalty, params, 1.0)
        return {"rate": 1.0, "penalty_step": update}, metrics

    def loss(params, context, batch, step):
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(params)), {}

    optimizer = (incremental.coupled_adamw if coupled else incremental.decoupled_adamw)(1e-2)
    state, metrics = jax.jit(make_step(loss, optimizer, extras=extras))(init_state(module, optimizer), {}, {})
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert metrics["not_finite"] == 0
    assert float(penalty(state.params)) < float(penalty(module))


def test_a_weight_that_is_no_stack_under_a_stacks_name_is_one_weight():
    adapter = adapters.lora(2, r"kernel$", stacked=())
    base = {"blocks": {"qkv": {"kernel": jnp.ones((6, 8))}}}
    module = jax.tree.map(lambda x: x + 1, adapter.init(jax.random.key(0), base))
    step, metrics = penalty_step(lambda m: incremental.ita_penalty(adapter.delta(m, base), base, 1e3), module, 1.0)
    assert 0 < metrics["penalty_step"] < 1
    parts = [np.ravel(s) for s in jax.tree.leaves(step)]
    assert all(np.all(part < 0) for part in parts)


def test_a_stacked_leaf_is_clipped_layer_by_layer_as_separate_leaves_are():
    stiffness = jnp.array([1e4, 1e-1])
    stacked = {"module": {"blocks": {"fc1": {"kernel": {"a": jnp.ones((2, 1, 1))}}}}}
    apart = {"module": {"layer0": {"kernel": jnp.ones((1, 1))}, "layer1": {"kernel": jnp.ones((1, 1))}}}
    of_stack = lambda p: 0.5 * jnp.sum(stiffness * p["module"]["blocks"]["fc1"]["kernel"]["a"][:, 0, 0] ** 2)
    of_layers = lambda p: (
        0.5 * sum(s * jnp.sum(p["module"][f"layer{i}"]["kernel"] ** 2) for i, s in enumerate(stiffness))
    )
    one, two = penalty_step(of_stack, stacked, 1.0)[0], penalty_step(of_layers, apart, 1.0)[0]
    expected = np.ravel(jax.tree.leaves(two))
    np.testing.assert_allclose(np.ravel(jax.tree.leaves(one)), expected, rtol=1e-5)
    np.testing.assert_allclose(expected, [-1, -0.1], rtol=1e-3)  # the first at its bottom, the second whole
