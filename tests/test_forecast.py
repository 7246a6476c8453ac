"""The forecast of one model's loss against closed forms, the landscape, and finite differences in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax import tree
from compo_jax.curvature import forecast, landscape


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def loss(params, inputs, targets):
    hidden = jnp.tanh(inputs @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - targets) ** 2)


def problem():
    anchor = {"in": normal(0, 3, 4), "bias": normal(1, 4), "out": normal(2, 4, 2)}
    params = jax.tree.map(lambda x: x + 0.3 * np.cos(7 * x), anchor)
    return anchor, params, [(normal(3 + n, n, 3), normal(9 + n, n, 2)) for n in (5, 5, 2)]


def test_a_quadratic_loss_is_forecast_exactly():
    hessian = normal(0, 6, 6)
    quadratic = lambda x, shift: jnp.sum(shift) + x @ (hessian + hessian.T) @ x + jnp.arange(6.0) @ x
    with jax.enable_x64(True):
        made = forecast(quadratic, normal(1, 6), normal(2, 6), np.ones(1))
    np.testing.assert_allclose(made.forecast, made.loss, rtol=1e-12)
    np.testing.assert_allclose(made.loss, quadratic(normal(2, 6), np.ones(1)), rtol=1e-6)


def test_it_is_the_taylor_expansion_of_the_mean_over_all_examples():
    anchor, params, batches = problem()
    rows = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    with jax.enable_x64(True):
        made = forecast(loss, anchor, params, batches=batches)
        along = lambda s: float(loss(jax.tree.map(lambda a, p: a + s * (p - a), anchor, params), *rows))
        h, at, true = 1e-4, along(0), along(1)
        slope, bend = (along(h) - along(-h)) / (2 * h), (along(h) - 2 * at + along(-h)) / h**2
    np.testing.assert_allclose(made.forecast, at + slope + bend / 2, rtol=1e-6)
    np.testing.assert_allclose(made.loss, true, rtol=1e-12)
    assert abs(made.forecast - made.loss) > 1e-3  # the loss is no quadratic


def test_a_composition_is_forecast_as_its_landscape_does_it():
    anchor, params, batches = problem()
    deltas = [tree.add(params, anchor, -1.0), jax.tree.map(np.sin, anchor)]
    weights = np.array([0.3, 0.9])
    land = landscape(loss, anchor, deltas, batches=batches, anchor=[0.5, 0.5], check=weights[None])
    around, there = (tree.add(anchor, tree.weighted_sum(deltas, w)) for w in (np.array([0.5, 0.5]), weights))
    made = jax.jit(partial(forecast, loss))(around, there, batches=batches)
    np.testing.assert_allclose(made.forecast, land.predict(weights), rtol=1e-4)
    np.testing.assert_allclose(made.loss, land.checked_loss[0], rtol=1e-5)


def test_a_loss_that_has_no_forward_mode_is_forecast_as_well():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    custom = lambda params, rows: jnp.mean(square(rows @ params) ** 2)
    plain = lambda params, rows: jnp.mean((rows @ params) ** 4)
    arguments = (normal(0, 3), normal(1, 3), normal(2, 4, 3))
    np.testing.assert_allclose(forecast(custom, *arguments), forecast(plain, *arguments), rtol=1e-5)


def test_an_anchor_of_16_bits_is_forecast_in_32():
    anchor, params, batches = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), problem())
    made = forecast(loss, anchor, params, batches=batches)
    assert made.forecast.dtype == made.loss.dtype == jnp.float32


def test_what_does_not_fit_is_told():
    anchor, params, batches = problem()
    with pytest.raises(ValueError, match="params doesn't fit the parameters: bias is missing"):
        forecast(loss, anchor, {name: params[name] for name in ("in", "out")}, batches=batches)
    with pytest.raises(ValueError, match="anchor"):
        forecast(loss, anchor | {"bias": np.arange(4)}, params, batches=batches)
    with pytest.raises(ValueError, match="the data were given twice"):
        forecast(loss, anchor, params, *batches[0], batches=batches)
