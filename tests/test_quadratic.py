"""Minima of quadratics on a simplex and in a box, against brute force over their faces."""

import time
from itertools import product
from time import perf_counter

import numpy as np
import pytest

from compo_jax.curvature.quadratic import minimise

KINDS = {
    "convex": lambda a: a @ a.T,
    "indefinite": lambda a: a + a.T,
    "negative": lambda a: -a @ a.T,
    "rank one": lambda a: np.outer(a[0], a[0]),
    "diagonal": lambda a: np.diag(a[0]),
}


def value(gram, slope, w):
    return slope @ w + 0.5 * w @ gram @ w


def brute_force(gram, slope, lower, upper, total=None):
    """The lowest of the feasible stationary points of all faces: each weight at its lower bound, its upper, or free."""
    best = np.inf
    for face in product("lu-", repeat=len(slope)):
        free = np.array([x == "-" for x in face])
        w = np.where(np.array(face) == "l", lower, upper)
        if free.any():
            # From a point of the face, along a basis of its directions.
            basis = np.eye(free.sum())
            w[free] = 0
            if total is not None:
                basis = np.linalg.svd(np.ones((1, free.sum())))[2][1:].T
                w[free] = (total - w.sum()) / free.sum()
            inner = basis.T @ gram[np.ix_(free, free)] @ basis
            w[free] -= basis @ np.linalg.lstsq(inner, basis.T @ (slope + gram @ w)[free], rcond=1e-12)[0]
        if (
            np.all(w >= lower - 1e-13)
            and np.all(w <= upper + 1e-13)
            and (total is None or abs(w.sum() - total) < 1e-13)
        ):
            best = min(best, value(gram, slope, w))
    return best


def check(gram, slope, lower, upper, total=None):
    w = minimise(gram, slope, lower, upper, sum_to=total)
    assert w.shape == slope.shape and np.all(w >= lower) and np.all(w <= upper)
    assert total is None or abs(w.sum() - total) < 1e-14
    if total is not None:
        slope = slope - slope.mean()  # a constant on the feasible set, in which the excess would drown
    size = np.abs(gram).sum() + np.abs(slope).sum()
    assert value(gram, slope, w) - brute_force(gram, slope, lower, upper, total) <= 1e-12 * size
    return w


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_minimum_is_that_of_all_active_sets(kind, scale):
    rng = np.random.default_rng(0)
    for n, times in ((1, 3), (2, 5), (5, 3)):
        for _ in range(times):
            gram = scale * KINDS[kind](rng.normal(size=(n, n)))
            slope = scale * 10.0 ** rng.integers(-2, 2) * rng.normal(size=n)
            check(gram, slope, np.zeros(n), np.ones(n), 1.0)
            check(gram, slope, np.zeros(n), np.ones(n))
            check(gram, slope, -rng.uniform(size=n), 2 * rng.uniform(size=n))


@pytest.mark.parametrize("kind", KINDS)
def test_seven_weights(kind):
    rng = np.random.default_rng(1)
    gram, slope = KINDS[kind](rng.normal(size=(7, 7))), rng.normal(size=7)
    check(gram, slope, np.zeros(7), np.ones(7), 1.0)
    check(gram, slope, -np.ones(7), np.ones(7))


def test_a_weight_with_equal_bounds_stays_there():
    rng = np.random.default_rng(2)
    for kind in ("convex", "indefinite"):
        for total in (None, 1.0):
            gram, slope = KINDS[kind](rng.normal(size=(4, 4))), rng.normal(size=4)
            lower, upper = np.array([0.3, -1, 0, 0]), np.array([0.3, 1, 1, 0])
            w = check(gram, slope, lower, upper, total)
            assert w[0] == 0.3 and w[3] == 0


def test_all_bounds_equal_leave_one_point():
    w = np.array([0.25, 0.75])
    for gram in (np.eye(2), -np.eye(2)):
        np.testing.assert_array_equal(minimise(gram, np.ones(2), w, w, sum_to=1.0), w)
        np.testing.assert_array_equal(minimise(gram, np.ones(2), w, w), w)


def test_without_curvature_it_is_a_linear_programme():
    slope = np.array([3.0, -1.0, 0.5])
    np.testing.assert_array_equal(minimise(np.zeros((3, 3)), slope, np.zeros(3), np.ones(3), sum_to=1.0), [0, 1, 0])
    np.testing.assert_array_equal(minimise(np.zeros((3, 3)), slope, -np.ones(3), np.ones(3)), [-1, 1, -1])
    # Nothing to choose by: any feasible point will do.
    check(np.zeros((3, 3)), np.zeros(3), np.zeros(3), np.ones(3), 1.0)
    check(np.zeros((3, 3)), np.zeros(3), np.zeros(3), np.ones(3))


def test_ties_are_broken_somehow():
    for gram in (np.ones((4, 4)), -np.ones((4, 4)), -np.eye(4), np.kron(np.eye(2), [[1, -1], [-1, 1]])):
        for slope in (np.zeros(4), np.ones(4)):
            check(gram, slope, np.zeros(4), np.ones(4), 1.0)
            check(gram, slope, -np.ones(4), np.ones(4))


def test_a_minimum_close_to_a_bound_is_not_put_on_it():
    for at in (3e-6, 3e-8):
        np.testing.assert_allclose(minimise(np.eye(2), np.array([-at, 1.0]), np.zeros(2), np.ones(2)), [at, 0])
        found = minimise(np.eye(2), np.array([1 - 2 * at, 0.0]), np.zeros(2), np.ones(2), sum_to=1.0)
        np.testing.assert_allclose(found, [at, 1 - at], rtol=1e-6)


def test_slopes_far_smaller_or_larger_than_the_curvature():
    # The first was lost by HiGHS's presolve; in the second what the slopes share says nothing under the sum.
    gram = np.diag([0.9999989529463325, -0.07302142451485785, -0.5362933245153763])
    slope = np.array([1.0470536675211087e-06, 7.215945729842533e-07, -6.751918738663354e-08])
    np.testing.assert_array_equal(minimise(gram, slope, np.zeros(3), np.ones(3)), [0, 1, 1])
    gram = np.array([[2.0, 0.5], [0.5, 1.0]])
    found = minimise(gram, 1e8 + np.zeros(2), np.zeros(2), np.ones(2), sum_to=1.0)
    np.testing.assert_allclose(found, [0.25, 0.75], atol=1e-12)


@pytest.mark.parametrize("kind", ["convex", "indefinite"])
def test_twenty_weights_on_the_simplex(kind):
    rng = np.random.default_rng(3)
    gram, slope = KINDS[kind](rng.normal(size=(20, 20))), rng.normal(size=20)
    start = perf_counter()
    w = minimise(gram, slope, np.zeros(20), np.ones(20), sum_to=1.0)
    assert perf_counter() - start < 10  # a tenth of a second on an idle core
    assert np.all(w >= 0) and abs(w.sum() - 1) < 1e-14
    # None of many feasible points is lower: corners, edges in steps of 0.01, and draws over the simplex.
    steps = np.linspace(0, 1, 101)[:, None]
    edges = [steps * a + (1 - steps) * b for a in np.eye(20) for b in np.eye(20)]
    points = np.concatenate([*edges, rng.dirichlet(np.full(20, 0.2), size=10_000)])
    values = points @ slope + 0.5 * np.einsum("ps,st,pt->p", points, gram, points)
    assert value(gram, slope, w) <= values.min()


def test_the_arguments_stay_as_they_are():
    given = np.array([[1.0, 2.0], [0.0, -1.0]]), np.array([1.0, -1.0]), np.zeros(2), np.ones(2)
    kept = [x.copy() for x in given]
    w = minimise(*given, sum_to=1.0)  # a Gram matrix that is not symmetric stands for its symmetric half
    np.testing.assert_array_equal(w, minimise((given[0] + given[0].T) / 2, *given[1:], sum_to=1.0))
    for a, b in zip(given, kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("gram", [np.eye(2), -np.eye(2)])
def test_bounds_that_nothing_satisfies(gram):
    with pytest.raises(ValueError, match=r"no weights satisfy the bounds \[0. 0.\] to \[0.4 0.4\] with the sum 1"):
        minimise(gram, np.zeros(2), np.zeros(2), np.full(2, 0.4), sum_to=1.0)
    with pytest.raises(ValueError, match=r"no weights satisfy the bounds \[0.6 0.6\]"):
        minimise(gram, np.zeros(2), np.full(2, 0.6), np.ones(2), sum_to=1.0)
    with pytest.raises(ValueError, match=r"no weights satisfy the bounds .*: widen the bounds"):
        minimise(gram, np.zeros(2), np.ones(2), np.zeros(2))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_numbers_that_are_not_finite(wrong):
    with pytest.raises(ValueError, match="numbers that aren't finite has no minimum"):
        minimise(np.diag([1.0, wrong]), np.zeros(2), np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match="numbers that aren't finite has no minimum"):
        minimise(np.eye(2), np.array([wrong, 0.0]), np.zeros(2), np.ones(2), sum_to=1.0)


def test_the_rounding_of_a_gram_matrix_in_single_precision_is_no_negative_curvature():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(40, 8)).astype(np.float32)
    gram, slope = (a @ a.T).astype(np.float64), rng.normal(size=40)
    assert np.linalg.eigvalsh(gram)[0] < 0
    began = time.perf_counter()
    w = minimise(gram, slope, np.zeros(40), np.ones(40), sum_to=1.0)
    assert time.perf_counter() - began < 5
    gradient = gram @ w + slope
    assert np.all(gradient >= gradient[w > 1e-9].mean() - 1e-4)  # no weight would gain by another's loss


def test_bounds_that_are_not_finite_and_shapes_that_do_not_fit():
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="bounds and sum must be finite"):
            minimise(np.eye(2), np.zeros(2), np.zeros(2), np.array([1.0, wrong]))
    with pytest.raises(ValueError, match="bounds and sum must be finite"):
        minimise(np.eye(2), np.zeros(2), np.zeros(2), np.ones(2), sum_to=np.nan)
    for gram, slope in ((np.eye(3), np.zeros(2)), (np.ones((2, 1)), np.zeros(2)), (np.zeros((0, 0)), np.zeros(0))):
        with pytest.raises(ValueError, match="a quadratic of n >= 1 weights has a gram"):
            minimise(gram, slope, np.zeros(len(slope)), np.ones(len(slope)))
