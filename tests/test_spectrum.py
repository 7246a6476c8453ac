"""Traces, spectra and eigenvalues by products alone, against dense matrices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from compo_jax.curvature.lanczos import density, diagonal, frobenius_norm, spectrum, top_eigenvalues, trace

X64 = jax.enable_x64
KEY = jax.random.key(0)
N = 30


def like(n=N):
    """A tree of n scalars, of which three leaves are odd: nested, a scalar, and one that is absent."""
    return {
        "a": (jax.ShapeDtypeStruct((2, 3), jnp.float64), None),
        "b": jnp.zeros((), jnp.float64),
        "c": np.zeros(n - 7),
    }


def dense(matrix, vector_like):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), vector_like)
    unravel = ravel_pytree(zeros)[1]
    return lambda v: unravel(jnp.asarray(matrix) @ ravel_pytree(v)[0])


def symmetric(eigenvalues):
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(len(eigenvalues), len(eigenvalues))))[0]
    return q @ np.diag(eigenvalues) @ q.T


def indefinite():
    return symmetric(np.concatenate([[-40.0, 25.0, 12.0], np.linspace(-1, 3, N - 3)]))


def flat(t):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])


TRUTHS = [(trace, np.trace), (diagonal, np.diag), (frobenius_norm, np.linalg.norm)]


@pytest.mark.parametrize("estimator, truth", TRUTHS)
def test_estimates_are_right_and_their_standard_errors_calibrated(estimator, truth):
    with X64(True):
        a = indefinite()
        runs = jax.jit(jax.vmap(lambda key: estimator(dense(a, like()), like(), key, 100)))(jax.random.split(KEY, 200))
        estimate, error = (np.stack([flat(jax.tree.map(lambda x: x[i], t)) for i in range(200)]) for t in runs)  # noqa: B023
        z = (estimate - truth(a)) / error
        assert np.abs(z[0]).max() < 4.5
        assert np.abs(z.mean()) < 4 / np.sqrt(200)
        # 1 within four deviations of a standard deviation of 200; the error of 100 samples adds one percent.
        assert 0.8 < z.std() < 1.22


def test_the_squared_standard_errors_of_two_samples_are_unbiased():
    with X64(True):
        a = indefinite()
        keys = jax.random.split(KEY, 4000)
        errors = jax.jit(jax.vmap(lambda key: trace(dense(a, like()), like(), key, 2).standard_error))(keys)
        expected = 2 * (np.sum(a**2) - np.sum(np.diag(a) ** 2)) / 2
        np.testing.assert_allclose(np.mean(errors**2), expected, rtol=0.2)
        errors = jax.jit(jax.vmap(lambda key: diagonal(dense(a, like()), like(), key, 2).standard_error))(keys)
        errors = np.concatenate([x.reshape(4000, -1) for x in jax.tree.leaves(errors)], axis=1)
        expected = (np.sum(a**2, axis=1) - np.diag(a) ** 2) / 2
        np.testing.assert_allclose(np.mean(errors**2, axis=0), expected, rtol=0.2)


@pytest.mark.parametrize("estimator, truth", TRUTHS)
def test_a_diagonal_operator_has_no_variance_and_the_zero_operator_no_nan(estimator, truth):
    with X64(True):
        run = jax.jit(lambda a: estimator(dense(a, like()), like(), KEY, 3))
        for a in (np.diag(np.linspace(-2, 5, N)), np.zeros((N, N))):
            estimate, error = run(a)
            np.testing.assert_allclose(flat(estimate), np.ravel(truth(a)), atol=1e-12)
            np.testing.assert_allclose(flat(error), 0, atol=1e-12)
            if estimator is diagonal:
                assert jax.tree.structure(estimate) == jax.tree.structure(like())
                assert estimate["a"][0].shape == (2, 3)


def test_one_sample_has_an_estimate_and_no_standard_error():
    estimate, error = trace(lambda v: 2 * v, jnp.zeros(5), KEY, 1)
    assert estimate == 10 and np.isnan(error)


def test_memory_does_not_grow_with_the_samples():
    big = jax.ShapeDtypeStruct((100_000,), jnp.float32)
    for estimator in (trace, diagonal, frobenius_norm):
        compiled = jax.jit(lambda key, f=estimator: f(lambda v: 2 * v, big, key, 1000)).lower(KEY).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 30 * big.size * 4


@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
def test_top_eigenvalues(which):
    with X64(True):
        a = indefinite()
        rank = {"magnitude": lambda x: -abs(x), "largest": lambda x: -x, "smallest": lambda x: x}[which]
        expected = sorted(np.linalg.eigvalsh(a), key=rank)[:3]
        found = jax.jit(lambda key: top_eigenvalues(dense(a, like()), like(), key, 3, which=which))(KEY)
        np.testing.assert_allclose(found.values, expected, atol=1e-10)
        assert np.all(found.error_bounds < 1e-8)
        for i in range(3):
            vector = flat(jax.tree.map(lambda x: x[i], found.vectors))  # noqa: B023
            np.testing.assert_allclose(a @ vector, found.values[i] * vector, atol=1e-9)
            np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-12)


def test_the_bounds_bound_the_error_and_are_the_norms_of_the_residuals():
    with X64(True):
        a = indefinite()
        true = np.linalg.eigvalsh(a)
        for order in (4, 12):
            run = jax.jit(jax.vmap(lambda key: top_eigenvalues(dense(a, like()), like(), key, 4, order)))  # noqa: B023
            values, vectors, bounds = map(np.asarray, jax.tree.map(np.asarray, run(jax.random.split(KEY, 20))))
            vectors = np.concatenate([x.reshape(20, 4, -1) for x in jax.tree.leaves(vectors.item())], axis=-1)
            assert np.all(np.abs(values[..., None] - true).min(-1) <= bounds)
            residual = np.linalg.norm(vectors @ a - values[..., None] * vectors, axis=-1)
            np.testing.assert_allclose(residual, bounds, rtol=1e-6, atol=1e-12)


OPERATORS = {
    "zero": np.zeros(N),
    "identity": np.ones(N),
    "rank 2": np.r_[7.0, -3.0, np.zeros(N - 2)],
    "three values": np.repeat([5.0, 2.0, -4.0], N // 3),
}


def test_a_krylov_space_that_ends_early_gives_multiple_eigenvalues_as_often_as_they_occur():
    with X64(True):
        top = jax.jit(lambda a: top_eigenvalues(dense(a, like()), like(), KEY, N, N, which="smallest"))
        quadrature = jax.jit(lambda a: spectrum(dense(a, like()), like(), KEY, 10, 2))
        for eigenvalues in OPERATORS.values():
            for a in (symmetric(eigenvalues), np.diag(eigenvalues)):
                values, _, bounds = top(a)
                np.testing.assert_allclose(values, np.sort(eigenvalues), atol=1e-12)
                np.testing.assert_allclose(bounds, 0, atol=1e-12)
                nodes, weights = map(np.asarray, quadrature(a))
                # The nodes past the end of the Krylov space have no weight.
                assert np.all(np.abs(nodes[weights > 1e-12][:, None] - eigenvalues).min(1) < 1e-12)
                np.testing.assert_allclose(weights.sum(1), 0.5, atol=1e-12)


def test_in_float32_and_bfloat16_the_basis_stays_orthogonal():
    a = indefinite()
    true = np.linalg.eigvalsh(a)
    found = jax.jit(lambda key: top_eigenvalues(lambda v: jnp.asarray(a, jnp.float32) @ v, jnp.zeros(N), key, N))(KEY)
    np.testing.assert_allclose(np.sort(found.values), true, atol=2e-4)
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(N), atol=1e-5)
    scaled = jax.jit(lambda key: top_eigenvalues(lambda v: 2 * v, jnp.zeros(8, jnp.bfloat16), key, 2))(KEY)
    np.testing.assert_allclose(scaled.values, 2, rtol=2e-2)
    estimate, _ = trace(lambda v: v / 3, jnp.zeros(5000, jnp.bfloat16), KEY, 4)
    assert estimate.dtype == jnp.float32
    np.testing.assert_allclose(estimate, 5000 / 3, rtol=4e-3)


def test_spectrum_of_full_order_is_the_spectrum():
    with X64(True):
        a = indefinite()
        nodes, weights = jax.jit(lambda key: spectrum(dense(a, like()), like(), key, N, 2))(KEY)
        assert nodes.shape == weights.shape == (2, N)
        np.testing.assert_allclose(nodes, np.stack([np.linalg.eigvalsh(a)] * 2), atol=1e-11)
        for k in range(5):
            moment = N * np.sum(weights * nodes**k)
            np.testing.assert_allclose(moment, np.trace(np.linalg.matrix_power(a, k)), rtol=1e-12)


def test_spectrum_is_the_gauss_quadrature_of_sign_vectors_and_unbiased():
    with X64(True):
        a = indefinite()
        nodes, weights = jax.jit(lambda key: spectrum(dense(a, like()), like(), key, 6, 400))(KEY)
        np.testing.assert_allclose(weights.sum(1), 1 / 400, rtol=1e-12)
        for k in range(1, 12):  # all moments that six nodes integrate
            rows = N * 400 * np.sum(weights * nodes**k, axis=1)
            error = rows.std(ddof=1) / np.sqrt(400)
            assert np.abs(rows.mean() - np.trace(np.linalg.matrix_power(a, k))) < 4 * error, k
        # The variance of the first moment is Hutchinson's.
        first = N * 400 * np.sum(weights * nodes, axis=1)
        expected = 2 * (np.sum(a**2) - np.sum(np.diag(a) ** 2))
        np.testing.assert_allclose(first.var(ddof=1), expected, rtol=0.3)


def test_cumulative_density_of_a_wigner_matrix():
    with X64(True):
        g = np.random.default_rng(3).normal(size=(150, 150))
        a = (g + g.T) / np.sqrt(300)
        true = np.linalg.eigvalsh(a)
        found = jax.jit(lambda key: spectrum(lambda v: jnp.asarray(a) @ v, jnp.zeros(150), key, 15, 40))(KEY)
        grid = np.linspace(-3, 3, 601)
        width = 0.15
        smooth = density(found, jnp.asarray(grid), width)
        np.testing.assert_allclose(np.sum(smooth) * 0.01, 1, atol=1e-6)
        expected = np.exp(-0.5 * ((grid[:, None] - true) / width) ** 2).mean(1) / (width * np.sqrt(2 * np.pi))
        # For random signs the fraction F below a point has the variance 2 F (1 - F) / (150 * 40): 0.0091² at most.
        np.testing.assert_allclose(np.cumsum(smooth) * 0.01, np.cumsum(expected) * 0.01, atol=4 * 0.0091)


def test_bad_input():
    x = {"w": jnp.zeros(3), "steps": [jnp.zeros(2)]}
    same = lambda v: v
    for f in (trace, diagonal, frobenius_norm):
        with pytest.raises(ValueError, match="samples must be at least 1, not 0"):
            f(same, x, KEY, 0)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        spectrum(same, x, KEY, 2, 0)
    with pytest.raises(ValueError, match="order must be at least 1, not 0"):
        spectrum(same, x, KEY, 0)
    with pytest.raises(ValueError, match="order 6 exceeds the dimension: order=5"):
        spectrum(same, x, KEY, 6)
    with pytest.raises(ValueError, match="count must be at least 1"):
        top_eigenvalues(same, x, KEY, 0)
    for count, order in ((6, None), (3, 2), (2, 6), (1, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"count={count}, .* and dimension 5: count <= order <= dimension"):
            top_eigenvalues(same, x, KEY, count, order)
    with pytest.raises(ValueError, match="unknown which='LM'; known are magnitude, largest, smallest"):
        top_eigenvalues(same, x, KEY, 1, which="LM")
    for f in (partial(trace, samples=2), partial(spectrum, order=2), partial(top_eigenvalues, count=1)):
        with pytest.raises(ValueError, match="'steps/0' in `like` is int32"):
            f(same, {"w": jnp.zeros(3), "steps": [jnp.zeros(2, int)]}, KEY)
        with pytest.raises(ValueError, match="'w' in `like` is complex64"):
            f(same, {"w": jnp.zeros(3, complex)}, KEY)
        for empty in ({}, {"w": None}, {"w": jnp.zeros((0, 3))}):
            with pytest.raises(ValueError, match="empty tree"):
                f(same, empty, KEY)
        with pytest.raises(ValueError, match="structure of `like`, and differs from it in: steps/0"):
            f(lambda v: {"w": v["w"]}, x, KEY)
        with pytest.raises(ValueError, match=r"structure of `like`, and differs from it in: .*\(\*, \*\)"):
            f(lambda v: tuple(v), [jnp.zeros(2), jnp.zeros(2)], KEY)
        with pytest.raises(ValueError, match=r"'w' with shape \(2,\), but it has shape \(3,\) in `like`"):
            f(lambda v: {**v, "w": v["w"][1:]}, x, KEY)


def test_more_bad_input():
    x, same = jnp.zeros(3), lambda v: v
    for samples in (True, -1):
        with pytest.raises(ValueError, match="samples must be at least 1, not .*: a whole number"):
            trace(same, x, KEY, samples)
    for key in (0, None, jax.random.split(KEY, 3)):
        with pytest.raises(ValueError, match="random vectors need a key: key=jax.random.key\\(0\\), not"):
            trace(same, x, key, 2)
    with pytest.raises(ValueError, match="matvec returns '' as complex64"):
        trace(lambda v: v * 1j, x, KEY, 2)
    for width in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="width of the Gaussians must be positive and finite"):
            density(spectrum(same, x, KEY, 2), jnp.zeros(2), width)
