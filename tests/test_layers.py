"""The layers with derivatives in closed form, against Flax's and JAX's own and against finite differences."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from compo_jax.models import layers

X = np.random.default_rng(0).normal(size=(3, 4, 5)) * 3
CASES = {
    "gelu": (layers.gelu, lambda x: nn.gelu(x, approximate=False)),
    "softmax": (layers.softmax, jax.nn.softmax),
    "standardize": (
        lambda x: layers.standardize(x, 1e-6),
        lambda x: nn.LayerNorm(use_bias=False, use_scale=False, use_fast_variance=False).apply({}, x),
    ),
    "attention": (
        lambda x: layers.attention(x[:, None], jnp.cos(x)[:, None], jnp.sin(x)[:, None])[:, 0],
        lambda x: nn.dot_product_attention(x[:, :, None], jnp.cos(x)[:, :, None], jnp.sin(x)[:, :, None])[:, :, 0],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_values_and_derivatives_are_those_of_flax(case, dtype):
    ours, theirs = CASES[case]
    with jax.enable_x64(True):
        x, v = jnp.asarray(X, dtype), jnp.cos(jnp.asarray(X, dtype))
        tolerance = {"float64": 1e-12, "float32": 2e-5}[dtype]

        def derivatives(f):
            gradient = jax.grad(lambda x: jnp.vdot(jnp.sin(3 * f(x)), v))
            return (f(x), jax.jvp(f, (x,), (v,))[1], *jax.jvp(gradient, (x,), (v,)))

        for mine, other in zip(derivatives(ours), derivatives(theirs), strict=True):
            assert mine.dtype == dtype
            np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance * float(jnp.abs(other).max()))


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_second_order_are_those_of_finite_differences(case):
    with jax.enable_x64(True):
        check_grads(lambda x: CASES[case][0](jnp.asarray(x)), (X,), order=2, rtol=1e-5)


def test_gelu_has_no_nan_far_from_zero_and_softmax_takes_large_numbers():
    x = jnp.asarray([-1e30, -50.0, 0.0, 50.0, 1e30])
    np.testing.assert_allclose(layers.gelu(x), [0, 0, 0, 50, 1e30])
    np.testing.assert_allclose(jax.vmap(jax.grad(layers.gelu))(x), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(layers.softmax(jnp.asarray([1e4, 1e4, -1e4])), [0.5, 0.5, 0])


def test_layer_normalisation_and_dense_layers_are_flaxes_with_the_same_parameters():
    x = jnp.asarray(X, jnp.float32)
    for mine, other in ((layers.LayerNorm(), nn.LayerNorm(epsilon=1e-6)), (layers.Dense(7), nn.Dense(7))):
        params = other.init(jax.random.key(0), x)
        params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
        assert jax.tree.map(jnp.shape, mine.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, params)
        np.testing.assert_allclose(mine.apply(params, x), other.apply(params, x), rtol=1e-5, atol=1e-5)
        half = mine.copy(dtype=jnp.bfloat16).apply(params, x)
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype(jnp.float32), other.apply(params, x), rtol=0.05, atol=0.05)
