from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax.curvature import fisher_diagonal
from compo_jax.models import ViT

X64 = jax.enable_x64


def mlp(classes=5):
    key = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(key[0], (3, 6), jnp.float64),
        "b": [jax.random.normal(key[1], (6, classes), jnp.float64), jnp.zeros(classes, jnp.float64)],
    }
    apply = lambda p, x: jnp.tanh(x["left"] @ p["a"] + x["right"]) @ p["b"][0] + p["b"][1]
    inputs = {"left": jax.random.normal(key[2], (7, 3), jnp.float64), "right": jnp.ones((7, 6), jnp.float64)}
    return apply, params, inputs


def tiny_vit():
    model = ViT(image_size=8, patch=4, width=8, depth=2, heads=2, classes=4)
    images = jax.random.normal(jax.random.key(1), (5, 8, 8, 3), jnp.float64)
    params = jax.tree.map(lambda x: 3 * x.astype(jnp.float64), model.init(jax.random.key(2), images)["params"])
    return lambda p, x: model.apply({"params": p}, x), params, images


def brute_force(apply, params, inputs):
    """The definition, image by image and class by class, one reverse pass each."""
    log_p = jax.jit(lambda params, image: jax.nn.log_softmax(apply(params, image)[0]))
    gradient = jax.jit(jax.grad(lambda params, image, c: log_p(params, image)[c]))
    total = jax.tree.map(np.zeros_like, params)
    for n in range(jax.tree.leaves(inputs)[0].shape[0]):
        image = jax.tree.map(lambda x: x[n : n + 1], inputs)  # noqa: B023
        for c, value in enumerate(np.exp(log_p(params, image))):
            total = jax.tree.map(lambda t, g: t + value * np.square(g), total, gradient(params, image, c))  # noqa: B023
    return total


def close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(jnp.abs(y).max()))


@pytest.mark.parametrize("case", [mlp, tiny_vit])
@pytest.mark.parametrize("chunk", [None, 3])
def test_exact_equals_brute_force(case, chunk):
    with X64(True):
        apply, params, inputs = case()
        found = jax.jit(lambda p, x: fisher_diagonal(apply, p, x, chunk=chunk))(params, inputs)
        close(found.total, brute_force(apply, params, inputs), 1e-10)
        assert found.count == jax.tree.leaves(inputs)[0].shape[0]
        assert found.captured == 1


def test_low_rank_is_exact_without_tolerance_and_bounded_by_its_certificate_with_it():
    with X64(True):
        apply, params, inputs = mlp(classes=12)
        exact = brute_force(apply, params, inputs)
        close(fisher_diagonal(apply, params, inputs, method="low_rank", tolerance=0.0).total, exact, 1e-9)
        low_rank = partial(fisher_diagonal, apply, method="low_rank", chunk=2)
        for tolerance in (0.3, 0.05, 0.01):
            found = low_rank(params, inputs, tolerance=tolerance)
            assert 1 - tolerance <= found.captured <= 1
            for part, whole in zip(jax.tree.leaves(found.total), jax.tree.leaves(exact), strict=True):
                assert np.all(part <= whole * (1 + 1e-9) + 1e-12)
            # Of the last layer's bias the diagonal is that of diag(p) - p pᵀ itself: the certificate is sharp there.
            bias = found.total["b"][1].sum() / exact["b"][1].sum()
            assert bias >= 1 - tolerance


def test_the_closed_form_of_the_cholesky_columns_equals_numpys_pivoted_elimination():
    from compo_jax.curvature.softmax import cholesky as _cholesky

    with X64(True):
        p = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (9,), jnp.float64))
        column, left = _cholesky(p)
        rest = np.diag(p) - np.outer(p, p)
        for k in range(8):
            pivot = np.argmax(np.diag(rest))
            expected = rest[:, pivot] / np.sqrt(rest[pivot, pivot])
            np.testing.assert_allclose(column(k), expected, atol=1e-12)
            rest = rest - np.outer(expected, expected)
            np.testing.assert_allclose(left[k], np.trace(rest), atol=1e-12)


def test_monte_carlo_is_unbiased():
    with X64(True):
        apply, params, inputs = mlp()
        exact = jnp.concatenate([x.ravel() for x in jax.tree.leaves(brute_force(apply, params, inputs))])

        def one(key):
            found = fisher_diagonal(apply, params, inputs, method="monte_carlo", key=key)
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(found.total)])

        draws = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 20_000))
        error = draws.mean(0) - exact
        deviation = draws.std(0) / np.sqrt(20_000)
        z = np.asarray(error / jnp.where(deviation > 0, deviation, 1))
        assert np.abs(z).max() < 4.5  # of about 50 normals, correlated: all share the draws
        assert jnp.abs(error).sum() < 0.03 * exact.sum()


def test_empirical_uses_the_given_labels():
    with X64(True):
        apply, params, inputs = mlp()
        labels = jnp.array([0, 1, 2, 3, 4, 0, 1])
        expected = jax.tree.map(jnp.zeros_like, params)
        for n in range(7):
            image = jax.tree.map(lambda x: x[n : n + 1], inputs)  # noqa: B023
            gradient = jax.grad(lambda q: jax.nn.log_softmax(apply(q, image)[0])[labels[n]])(params)  # noqa: B023
            expected = jax.tree.map(lambda t, g: t + g**2, expected, gradient)
        found = fisher_diagonal(apply, params, inputs, method="empirical", labels=labels, chunk=4)
        close(found.total, expected, 1e-10)
        assert np.isnan(found.captured)


@pytest.mark.parametrize("method", ["exact", "low_rank"])
def test_a_class_with_logit_minus_infinity_takes_no_part(method):
    with X64(True):
        apply, params, inputs = mlp(classes=5)
        hidden = lambda p, x: jnp.where(jnp.arange(5) < 3, apply(p, x), -jnp.inf)
        shown = lambda p, x: apply(p, x)[:, :3]
        found = fisher_diagonal(hidden, params, inputs, method=method, tolerance=0.0)
        close(found.total, brute_force(shown, params, inputs), 1e-10)


def test_bad_input():
    apply, params, inputs = lambda p, x: x @ p, jnp.ones((3, 2)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match="unknown method 'diag'; known are exact"):
        fisher_diagonal(apply, params, inputs, method="diag")
    with pytest.raises(ValueError, match="needs a key"):
        fisher_diagonal(apply, params, inputs, method="monte_carlo")
    with pytest.raises(ValueError, match="needs the true labels"):
        fisher_diagonal(apply, params, inputs, method="empirical")
    with pytest.raises(ValueError, match="must be \\(4,\\)"):
        fisher_diagonal(apply, params, inputs, method="empirical", labels=jnp.zeros(3, int))
    with pytest.raises(ValueError, match="inputs are empty"):
        fisher_diagonal(apply, params, inputs[:0])
