"""What Kronecker factors are worth in a solve with the full curvature, and what is refused."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax.flatten_util import ravel_pytree

from compo_jax import tree
from compo_jax.compose import merge, solve_merge
from compo_jax.compose.preconditioners import inverse, inverse_of_rows, leading_rows
from compo_jax.curvature import Kronecker, kronecker
from compo_jax.curvature.layers import Dense

X64 = functools.partial(jax.enable_x64, True)
SIZES = (12, 10, 5)


def apply(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def gauss_newton(jacobian, logits):
    """The dense matrix of the mean loss, from the outputs' Jacobian (n, classes, parameters)."""
    p = np.asarray(jax.nn.softmax(logits))
    h = p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None]
    return np.einsum("nci,ncd,ndj->ij", jacobian, h, jacobian, optimize=True) / len(p)


def trained_apart(count):
    """(base, deltas, dense Gauss-Newton matrices, Kronecker factors, inputs) of three tasks, whose inputs are thirty
    times larger in one direction than in another."""
    base = {"first": normal(0, *SIZES[:2]) / 3, "second": normal(1, *SIZES[1:]) / 3}
    turn = [np.linalg.qr(normal(40 + i, 12, 12))[0] for i in range(2)]
    inputs = [3 * normal(30 + t, count, 12) @ turn[0] * np.logspace(0, -1.5, 12) @ turn[1] for t in range(3)]
    deltas = [{k: 0.3 * normal(10 * (t + 1) + i, *x.shape) for i, (k, x) in enumerate(base.items())} for t in range(3)]
    unravel = ravel_pytree(base)[1]
    jacobian = jax.jit(jax.jacrev(lambda theta, x: apply(unravel(theta), x)))
    factors = jax.jit(lambda p, x: kronecker(apply, p, x))
    models = [tree.add(base, d) for d in deltas]
    dense = [
        gauss_newton(np.asarray(jacobian(ravel_pytree(p)[0], x)), apply(p, x))
        for p, x in zip(models, inputs, strict=True)
    ]
    return base, deltas, dense, [factors(p, x) for p, x in zip(models, inputs, strict=True)], inputs


def left(base, deltas, matvecs, preconditioner, iterations=30):
    """The relative residual after so many iterations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"preconditioner": preconditioner, "max_iterations": iterations, "tolerance": 1e-9}
        return float(solve_merge(base, deltas, matvecs, damping=1e-4, **options).residual)


def test_of_few_examples_rows_are_the_matrix_itself():
    with X64():
        base, deltas, dense, _, inputs = trained_apart(20)
        unravel = ravel_pytree(base)[1]
        matvecs = [lambda v, g=g: unravel(g @ ravel_pytree(v)[0]) for g in dense]
        rows = jax.jit(leading_rows, static_argnums=(0, 3))
        models = [tree.add(base, d) for d in deltas]
        some, every = (
            inverse_of_rows([rows(apply, p, x, rank) for p, x in zip(models, inputs, strict=True)], 1e-4)
            for rank in (2, 4)
        )
        residual = functools.partial(left, base, deltas, matvecs)
        assert residual(every, 3) < 1e-8 and residual(some) < residual(None) / 10
        with pytest.raises(ValueError, match="damping is a positive number: rows are fewer than parameters"):
            inverse_of_rows([base], 0.0)
        with pytest.raises(ValueError, match="rank is a whole number of rows an image"):
            leading_rows(apply, base, inputs[0], 0)
        with pytest.raises(ValueError, match=r"one prediction an image, and its logits are of shape \(5, 5\)"):
            leading_rows(lambda p, x: jnp.tile(apply(p, x)[:, None], (1, 5, 1)), base, inputs[0])


def test_kronecker_factors_solve_in_thirty_iterations_what_is_left_at_a_hundredth_without():
    with X64():
        base, deltas, dense, factors, _ = trained_apart(300)
        unravel = ravel_pytree(base)[1]
        matvecs = [lambda v, g=g: unravel(g @ ravel_pytree(v)[0]) for g in dense]
        fishers = [unravel(jnp.diag(jnp.asarray(g))) for g in dense]

        residual = functools.partial(left, base, deltas, matvecs)
        plain, diagonal, blocks = residual(None), residual(fishers), residual(factors)
        assert plain > 5e-3 and diagonal > 5e-3 and blocks < 1e-4
        # The rule takes them where they are there; the solution is that of the dense system.
        merged = merge("ggn", base, deltas, matvecs=matvecs, factors=factors, fishers=fishers, damping=1e-4)
        right = sum(g @ ravel_pytree(d)[0] for g, d in zip(dense, deltas, strict=True)) / 3
        expected = np.linalg.solve(sum(dense) / 3 + 1e-4 * np.eye(len(right)), right)
        moved = ravel_pytree(jax.tree.map(lambda p, b: p - b, merged, base))[0]
        np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_of_one_task_it_is_the_inverse_and_leaves_without_factors_are_scaled():
    with X64():
        layout = (("w", Dense((), (0,), (1,), (4, 3), 1)),)
        a, b = normal(0, 4, 6), normal(1, 3, 5)
        one = Kronecker({"w": jnp.asarray(a @ a.T)}, {"w": jnp.asarray(b @ b.T)}, jnp.array(6), layout)
        vector = {"b": jnp.ones(3), "w": jnp.asarray(normal(2, 4, 3))}
        found = inverse([one, one], [0.5, 0.5], 0.1, vector)(vector)
        dense = np.kron(a @ a.T, b @ b.T)
        expected = np.linalg.solve(dense + 0.1 * np.eye(12), np.ravel(vector["w"])).reshape(4, 3)
        np.testing.assert_allclose(found["w"], expected, rtol=1e-9)
        np.testing.assert_allclose(found["b"], 1 / (np.trace(dense) / 12 + 0.1), rtol=1e-9)
        with pytest.raises(ValueError, match="1 Kronecker factors were given to precondition with, for 2 modules"):
            inverse([one], [0.5, 0.5], 0.1, vector)
        with pytest.raises(ValueError, match="factors to precondition with are of w, and the modules change none of"):
            inverse([one, one], [0.5, 0.5], 0.1, {"b": jnp.ones(3)})
