"""Every kind of curvature is asked the same questions, and answers as its dense matrix does, in float64: a new kind is
one more row of the table."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from compo_jax import compose, curvature, tree
from compo_jax.curvature import Curvature, Solvable, as_curvature, as_lineax

X64 = jax.enable_x64
PARAMS = {"first": cases.normal(0, 3, 5), "second": cases.normal(1, 5, 4)}
INPUTS, LABELS = cases.normal(2, 6, 3), cases.labels(3, 6, 4)


def apply(p, x):
    return jnp.tanh(x @ p["first"]) @ p["second"]


Part = tuple[int, int]  # the first and the last but one of some examples


def examples(part: Part):
    return INPUTS[slice(*part)], LABELS[slice(*part)]


def batches(part: Part):
    x, y = examples(part)
    return [(x[:1], y[:1]), (x[1:], y[1:])]


class Row(NamedTuple):
    """A kind of curvature.

    Attributes:
      make: of some examples.
      dense: the same matrix (parameters, parameters) by other means.
      solvable: whether its inverse is known.
    """

    make: Callable[[Part], Curvature]
    dense: Callable[[Part], np.ndarray]
    solvable: bool


@functools.cache
def gauss_newton(part):
    x, _ = examples(part)
    p, j = np.asarray(jax.nn.softmax(apply(PARAMS, x))), cases.dense_jacobian(apply, PARAMS, x)
    hessians = np.stack([np.diag(q) - np.outer(q, q) for q in p])
    return np.einsum("nci,ncd,ndj->ij", j, hessians, j) / len(p)


@functools.cache
def kronecker(part):
    return curvature.kronecker(apply, PARAMS, examples(part)[0])


@functools.cache
def fisher(part):
    return curvature.fisher_diagonal(apply, PARAMS, examples(part)[0])


def block_diagonal(*blocks):
    ends = np.cumsum([0, *map(len, blocks)])
    whole = np.zeros((ends[-1], ends[-1]))
    for block, start, end in zip(blocks, ends, ends[1:], strict=False):
        whole[start:end, start:end] = block
    return whole


def factors_multiplied(part):
    factors = kronecker(part)
    return block_diagonal(*[np.kron(factors.inputs[name], factors.outputs[name]) for name in PARAMS])


@functools.cache
def corrected(part):
    return curvature.eigenvalue_corrected(kronecker(part), apply, PARAMS, examples(part)[0])


def corrected_dense(part):
    """The Gauss-Newton matrix's blocks with all but the diagonal left out in the factors' eigenbasis."""
    exact, start, blocks = gauss_newton(part), 0, []
    for name, x in PARAMS.items():
        basis = np.kron(*kronecker(part).eigen().basis[name])
        block = exact[start : start + x.size, start : start + x.size]
        blocks.append(basis @ np.diag(np.diag(basis.T @ block @ basis)) @ basis.T)
        start += x.size
    return block_diagonal(*blocks)


ROWS = {
    "diagonal": Row(
        fisher,
        lambda part: np.diag(np.diag(gauss_newton(part))),
        True,
    ),
    "kronecker": Row(kronecker, factors_multiplied, True),
    "corrected": Row(corrected, corrected_dense, True),
    "ggn": Row(lambda part: curvature.ggn(apply, PARAMS, batches(part)), gauss_newton, False),
    "hessian": Row(
        lambda part: curvature.hessian(cases.cross_entropy(apply), PARAMS, batches(part)),
        lambda part: cases.dense_hessian(cases.cross_entropy(apply), PARAMS, *examples(part)),
        False,
    ),
    "sum": Row(
        lambda part: (
            curvature.ggn(apply, PARAMS, batches(part)).scale(2.0) + curvature.ggn(apply, PARAMS, batches(part))
        ),
        lambda part: 1.5 * gauss_newton(part),
        False,
    ),
}
EVERY, FIRST, SECOND = (0, 6), (0, 4), (4, 6)


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.fixture(scope="module")
def asked(row):
    """(the curvature, its dense matrix)."""
    with X64(True):
        return row.make(EVERY), row.dense(EVERY)


@jax.jit
def times(found, vector):
    """The product, compiled once for each curvature."""
    return found(vector)


def vector(seed):
    return {name: jnp.asarray(cases.normal(seed + x.size, *x.shape)) for name, x in PARAMS.items()}


def flat(values):
    """A tree, or a dictionary of leaves by their paths, as one vector in the parameters' order."""
    return np.asarray(ravel_pytree(tree.place(tree.by_name(values), PARAMS))[0])


def equal(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_products_and_quadratic_forms(asked):
    with X64(True):
        found, dense = asked
        assert isinstance(found, Curvature)
        v, u = vector(10), vector(20)
        equal(flat(found.matvec(v)), dense @ flat(v))
        equal(flat(times(found, v)), dense @ flat(v))
        equal(found.quadratic(v), flat(v) @ dense @ flat(v))
        equal(found.quadratic(v, u), flat(v) @ dense @ flat(u))


def test_diagonal_and_trace(asked):
    with X64(True):
        found, dense = asked
        equal(flat(found.diagonal()), np.diag(dense))
        equal(found.trace(), np.trace(dense))


def test_a_multiple_is_of_as_many_examples(asked):
    with X64(True):
        found, dense = asked
        halved = found.scale(0.5)
        equal(flat(times(halved, vector(10))), 0.5 * dense @ flat(vector(10)))
        assert int(halved.count) == int(found.count)


def test_a_sum_is_the_mean_over_the_examples_of_both(row):
    with X64(True):
        first, second = row.make(FIRST), row.make(SECOND)
        whole = first + second
        assert int(whole.count) == int(first.count) + int(second.count)
        if isinstance(whole, curvature.Kronecker):  # whose factors are averaged each by itself
            expected = ROWS["kronecker"].dense(EVERY)
        else:
            share = int(first.count) / int(whole.count)
            expected = share * row.dense(FIRST) + (1 - share) * row.dense(SECOND)
        equal(flat(times(whole, vector(10))), expected @ flat(vector(10)))
        equal(flat(whole.diagonal()), np.diag(expected))
        equal(whole.trace(), np.trace(expected))
        equal(whole.quadratic(vector(10)), flat(vector(10)) @ expected @ flat(vector(10)))


def test_a_solve_where_the_inverse_is_known(row, asked):
    with X64(True):
        found, dense = asked
        assert isinstance(found, Solvable) == row.solvable
        if not row.solvable:
            return
        expected = np.linalg.solve(dense + 0.3 * np.eye(len(dense)), flat(vector(10)))
        equal(flat(found.solve(vector(10), 0.3)), expected)
        with pytest.raises(ValueError, match="damping must be positive, not 0"):
            found.solve(vector(10), 0.0)


def test_a_hole_in_a_vector_is_zero(asked):
    with X64(True):
        found, dense = asked
        holed = vector(10) | {"second": None}
        zeros = jax.tree.map(jnp.zeros_like, PARAMS)
        image = tree.combine(times(found, holed), zeros)
        equal(flat(image), dense @ flat(tree.combine(holed, zeros)))


@pytest.mark.parametrize("name", ["corrected", "ggn"])
def test_kinds_that_differ_add_up(name):
    with X64(True):
        found, dense = ROWS[name].make(EVERY), ROWS[name].dense(EVERY)
        other = ROWS["diagonal"].make(FIRST)
        share = int(found.count) / (int(found.count) + 4)
        expected = share * dense + (1 - share) * ROWS["diagonal"].dense(FIRST)
        for both in (found + other, other + found):
            equal(flat(times(both, vector(10))), expected @ flat(vector(10)))
            equal(flat(both.diagonal()), np.diag(expected))


def test_lineax_solves_with_it(asked):
    lineax = pytest.importorskip("lineax")
    with X64(True):
        found, dense = asked
        damped = as_lineax(found, PARAMS) + lineax.IdentityLinearOperator(jax.eval_shape(lambda: vector(0))) * 5.0
        solution = lineax.linear_solve(damped, vector(10), lineax.AutoLinearSolver(well_posed=True)).value
        equal(flat(solution), np.linalg.solve(dense + 5 * np.eye(len(dense)), flat(vector(10))))


def test_a_tree_is_the_diagonal_that_it_is_and_a_hole_in_it_is_zero():
    with X64(True):
        holed = as_curvature({"first": jnp.square(PARAMS["first"]), "second": None})
        v = vector(10)
        equal(holed.matvec(v)["first"], PARAMS["first"] ** 2 * v["first"])
        assert not np.any(holed.matvec(v)["second"])
        equal(holed.solve(v, 0.5)["second"], 2 * v["second"])
        equal(holed.quadratic(v), np.sum(PARAMS["first"] ** 2 * v["first"] ** 2))
        assert as_curvature(holed) is holed


def test_rules_ask_any_kind_for_its_diagonal_or_its_products(asked):
    with X64(True):
        found, dense = asked
        models = [vector(10), vector(20)]
        weights = np.stack([np.diag(dense), np.ones(len(dense))])
        merged = compose.fisher_merge(models, [abs_of(found), jax.tree.map(jnp.ones_like, vector(0))])
        values = np.stack([flat(m) for m in models])
        equal(flat(merged), (np.abs(weights) * values).sum(0) / np.abs(weights).sum(0))
        base = jax.tree.map(jnp.zeros_like, models[0])
        solved = compose.solve_merge(base, models, [found, as_curvature(base)], damping=20.0, tolerance=1e-12)
        expected = np.linalg.solve(0.5 * dense + 20 * np.eye(len(dense)), 0.5 * dense @ values[0])
        np.testing.assert_allclose(flat(solved.params), expected, rtol=1e-7, atol=1e-9)


def abs_of(found):
    """The curvature, or where it has negative entries on its diagonal those turned around."""
    diagonal = found.diagonal()
    signs = jax.tree.map(lambda x: jnp.where(x < 0, -1.0, 1.0), diagonal)
    if all(np.all(s > 0) for s in jax.tree.leaves(signs)):
        return found
    return jax.tree.map(jnp.multiply, diagonal, signs)


def test_an_operator_is_an_argument_of_a_compiled_function():
    with X64(True):
        traced = jax.jit(lambda c: functools.reduce(jnp.add, [c.trace(), c.count]))
        equal(traced(curvature.ggn(apply, PARAMS, batches(EVERY))), np.trace(gauss_newton(EVERY)) + 6)


def test_a_hole_for_a_whole_branch_counts_as_zero_in_every_kind_and_in_sums():
    with X64(True):
        params = {"a": {"w": cases.normal(0, 3, 5)}, "c": {"w": cases.normal(1, 5, 4)}}
        model = lambda p, x: jnp.tanh(x @ p["a"]["w"]) @ p["c"]["w"]
        diagonal = curvature.fisher_diagonal(model, params, INPUTS)
        kinds = [diagonal, curvature.ggn(model, params, [(INPUTS,)]), curvature.kronecker(model, params, INPUTS)]
        kinds += [diagonal + kinds[1], kinds[1] + diagonal, diagonal + kinds[2]]
        for branch, other in (("a", "c"), ("c", "a")):
            ones = {"w": jnp.ones_like(params[other]["w"])}
            hole, zero = {branch: None, other: ones}, {branch: {"w": jnp.zeros_like(params[branch]["w"])}, other: ones}
            for kind in kinds:
                np.testing.assert_allclose(kind.quadratic(hole), kind.quadratic(zero), rtol=1e-5)
                np.testing.assert_allclose(kind.quadratic(hole, params), kind.quadratic(zero, params), rtol=1e-5)
                np.testing.assert_allclose(kind.quadratic(params, hole), kind.quadratic(params, zero), rtol=1e-5)
                image = tree.by_name(kind.matvec(hole))
                for name, x in tree.by_name(kind.matvec(zero)).items():
                    np.testing.assert_allclose(image.get(name, 0), x, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(tree.dot(zero, hole), tree.dot(zero, zero))
            np.testing.assert_allclose(tree.dot(hole, params), tree.dot(zero, params))


@pytest.mark.parametrize("method", ["exact", "low_rank"])
def test_inputs_may_be_numpys_arrays_under_jit_and_vmap(method):
    with X64(True):
        images = np.asarray(INPUTS)
        of = lambda params: curvature.fisher_diagonal(apply, params, images, method=method).mean
        expected = of(PARAMS)
        stacked = jax.tree.map(lambda x: x[None], PARAMS)
        for found in (jax.jit(of)(PARAMS), jax.tree.map(lambda x: x[0], jax.vmap(of)(stacked))):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_a_weight_of_no_inputs_has_a_diagonal_of_no_entries():
    with X64(True):
        params = {"w": cases.normal(0, 3, 2), "none": np.zeros((0, 2))}
        found = curvature.fisher_diagonal(lambda p, x: x @ p["w"] + x[:, :0] @ p["none"], params, INPUTS)
        expected = curvature.fisher_diagonal(lambda p, x: x @ p["w"], {"w": params["w"]}, INPUTS)
        assert found.mean["none"].shape == (0, 2)
        np.testing.assert_allclose(found.mean["w"], expected.mean["w"], rtol=1e-6)
