"""Curvature-weighted merges against dense solves, and against least squares on the tasks' pooled data."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close, flat, mlp, normal
from jax.flatten_util import ravel_pytree

from compo_jax import tree
from compo_jax.compose import (
    compose,
    conjugate_gradients,
    fisher_merge,
    kronecker_merge,
    merge,
    regmean,
    solve_merge,
)
from compo_jax.curvature import Kronecker, fisher_diagonal, ggn, kronecker
from compo_jax.curvature.layers import Dense

X64 = functools.partial(jax.enable_x64, True)
TASKS = 3


def positive(seed, n, *stack, rank=None):
    x = normal(seed, *stack, n, rank or n + 2)
    return x @ np.swapaxes(x, -1, -2) / n


def quadratics(rank=None):
    """(base, deltas with holes, one dense H a task, their products): `½ (θ - θ_t)ᵀ H_t (θ - θ_t)`."""
    base = {"a": [normal(0, 2, 3), None], "b": normal(1, 5)}
    deltas = [{"a": [normal(2 + t, 2, 3), None], "b": None if t == 1 else normal(7 + t, 5)} for t in range(TASKS)]
    h = [positive(20 + t, 11, rank=rank) for t in range(TASKS)]
    unravel = ravel_pytree(base)[1]

    def product(v, h):
        whole = tree.combine(v, jax.tree.map(np.zeros_like, base))
        return unravel(h @ ravel_pytree(whole)[0])

    matvecs = [functools.partial(product, h=h_t) for h_t in h]
    return base, deltas, h, matvecs


def vectors(deltas):
    return np.stack([np.concatenate([np.ravel(d["a"][0]), np.zeros(5) if d["b"] is None else d["b"]]) for d in deltas])


WEIGHTS = np.array([0.2, 0.5, 0.3])


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_full_solve_is_the_joint_optimum(weights, preconditioned):
    with X64():
        base, deltas, h, matvecs = quadratics()
        w = np.full(TASKS, 1 / TASKS) if weights is None else weights
        total = np.einsum("t,tij->ij", w, h)
        expected = np.linalg.solve(total, np.einsum("t,tij,tj->i", w, h, vectors(deltas)))
        unravel = ravel_pytree(base)[1]
        options = {"preconditioner": [unravel(jnp.diag(jnp.asarray(x))) for x in h]} if preconditioned else {}
        found = solve_merge(base, deltas, matvecs, weights, tolerance=1e-13, **options)
        np.testing.assert_allclose(ravel_pytree(task(found.params, base))[0], expected, atol=1e-10)
        assert found.converged and found.residual <= 1e-13 and 0 < found.iterations <= 20
        # Wherever damping pulls to, it does so by its own weight.
        anchor = np.array([0.5, 0.5, 0.0])
        centre = anchor @ vectors(deltas)
        damped = np.linalg.solve(
            total + 0.3 * np.eye(11), np.einsum("t,tij,tj->i", w, h, vectors(deltas)) + 0.3 * centre
        )
        found = solve_merge(base, deltas, matvecs, weights, 0.3, anchor=anchor, **options)
        np.testing.assert_allclose(ravel_pytree(task(found.params, base))[0], damped, atol=1e-9)


def task(params, base):
    return jax.tree.map(lambda p, b: p - b, params, base)


def test_a_module_that_moves_some_leaves_is_merged_in_these():
    with X64():
        base, deltas, h, matvecs = quadratics()
        some = [d | {"b": None} for d in deltas]
        total, x = np.mean(h, axis=0)[:6, :6], vectors(deltas)[:, :6]
        expected = np.linalg.solve(total, np.mean([g[:6, :6] @ y for g, y in zip(h, x, strict=True)], axis=0))
        found = solve_merge(base, some, matvecs, tolerance=1e-13)
        np.testing.assert_allclose(np.ravel(found.params["a"][0] - base["a"][0]), expected, atol=1e-10)
        assert found.params["b"] is base["b"]


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_module_coordinates_are_the_best_composition(damping):
    with X64():
        base, deltas, h, matvecs = quadratics()
        d, anchor = vectors(deltas), np.array([0.1, 0.2, 0.3])
        # Least squares in c of Σ w_t |D c - d_t|² in H_t, and of the damping.
        roots = [np.linalg.cholesky(w * g).T for w, g in zip(WEIGHTS, h, strict=True)]
        rows = np.concatenate([*(r @ d.T for r in roots), np.sqrt(damping) * d.T])
        right = np.concatenate([*(r @ x for r, x in zip(roots, d, strict=True)), np.sqrt(damping) * d.T @ anchor])
        expected = np.linalg.lstsq(rows, right)[0]
        found = solve_merge(base, deltas, matvecs, WEIGHTS, damping, coordinates="modules", anchor=anchor)
        np.testing.assert_allclose(found.weights, expected, atol=1e-10)
        close(found.params, compose(base, deltas, expected))
        assert found.converged and found.iterations == 0 and found.residual < 1e-12


def test_without_damping_a_singular_system_is_solved_nearest_to_the_anchor():
    with X64():
        base, deltas, h, matvecs = quadratics(rank=2)
        total, d = np.mean(h, axis=0), vectors(deltas)
        assert np.linalg.matrix_rank(total) == 6
        for anchor in (np.zeros(3), np.full(3, 1 / 3)):
            centre = anchor @ d
            b = np.mean([g @ (x - centre) for g, x in zip(h, d, strict=True)], axis=0)
            expected = centre + np.linalg.pinv(total, rcond=1e-10) @ b
            found = solve_merge(base, deltas, matvecs, anchor=anchor)
            np.testing.assert_allclose(ravel_pytree(task(found.params, base))[0], expected, atol=1e-8)


def test_a_solve_begins_at_its_anchor_and_the_average_has_a_name():
    with X64():
        base, deltas, _, matvecs = quadratics(rank=2)
        for anchor, weights in (("average", None), ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]), (None, [0, 0, 0])):
            with pytest.warns(UserWarning, match="after 0 iterations"):
                begun = solve_merge(base, deltas, matvecs, anchor=anchor, max_iterations=0)
            close(begun.params, compose(base, deltas, weights), 1e-12)
        named, told = (
            solve_merge(base, deltas, matvecs, damping=0.1, anchor=a) for a in ("average", np.full(3, 1 / 3))
        )
        close(named.params, told.params, 1e-12)
        layout = (("w", Dense((), (0,), (1,), (3, 2), 1)),)
        draw = lambda seed, n: {"w": jnp.asarray((lambda x: x @ x.T)(normal(seed, n, n)))}
        factors = [Kronecker(draw(t, 3), draw(t + 2, 2), jnp.array(3), layout) for t in range(2)]
        base, deltas = {"w": normal(4, 3, 2)}, [{"w": normal(5 + t, 3, 2)} for t in range(2)]
        for rule in (regmean, lambda *args, **options: kronecker_merge(*args, **options).params):
            drowned = rule(base, deltas, factors, damping=1e9, anchor="average")
            close(drowned, compose(base, deltas), 1e-6)
            with pytest.raises(ValueError, match="anchor='middle' is neither 'average' nor weights"):
                rule(base, deltas, factors, damping=1.0, anchor="middle")


def test_diagonal_and_isotropic_curvature():
    with X64():
        base, deltas, _, _ = quadratics()
        diagonal = [jax.tree.map(lambda b, t=t: normal(t, *b.shape) ** 2 + 0.1, base) for t in range(TASKS)]
        matvecs = [lambda v, f=f: jax.tree.map(jnp.multiply, f, v) for f in diagonal]
        deltas = [d | {"b": normal(9, 5) if d["b"] is None else d["b"]} for d in deltas]
        full = solve_merge(base, deltas, matvecs, WEIGHTS, tolerance=1e-13).params
        models = [tree.add(base, d) for d in deltas]
        close(fisher_merge(models, diagonal, WEIGHTS), full, 1e-10)
        close(merge("fisher", base, deltas, fishers=diagonal, weights=WEIGHTS), full, 1e-10)
        scaled = [lambda v: jax.tree.map(lambda x: 2.5 * x, v)] * TASKS
        close(solve_merge(base, deltas, scaled, WEIGHTS).params, compose(base, deltas, WEIGHTS))


def factor_sets(inputs, outputs, layout):
    return [Kronecker(dict(a), dict(b), jnp.array(5), layout) for a, b in zip(inputs, outputs, strict=True)]


def kronecker_case():
    """Two stacked layers and a transposed one with factors, and a bias with none."""
    layout = (("v", Dense((), (1,), (0,), (3, 4), 1)), ("w", Dense((2,), (0,), (1,), (3, 2), 1)))
    inputs = [{"v": positive(t, 4), "w": positive(10 + t, 3, 2)} for t in range(TASKS)]
    outputs = [{"v": positive(20 + t, 3), "w": positive(30 + t, 2, 2)} for t in range(TASKS)]
    base = {"b": normal(0, 3), "v": normal(1, 3, 4), "w": normal(2, 2, 3, 2)}
    deltas = [{"b": normal(3 + t, 3), "v": normal(6 + t, 3, 4), "w": normal(9 + t, 2, 3, 2)} for t in range(TASKS)]
    jnps = lambda parts: [jax.tree.map(jnp.asarray, p) for p in parts]
    return base, deltas, factor_sets(jnps(inputs), jnps(outputs), layout)


def test_kronecker_weights_find_the_optimum_of_kronecker_quadratics():
    with X64():
        base, deltas, factors = kronecker_case()
        found = kronecker_merge(base, deltas, factors, WEIGHTS, 0.01, tolerance=1e-13)
        assert found.converged and found.iterations < 40
        np.testing.assert_allclose(
            found.params["b"], base["b"] + np.einsum("t,ti->i", WEIGHTS, np.stack([d["b"] for d in deltas])), atol=1e-12
        )

        def dense(name, turn, pick):
            total, right = 0.01 * np.eye(len(np.ravel(turn(deltas[0][name])))), 0
            for w, f, d in zip(WEIGHTS, factors, deltas, strict=True):
                g = w * np.kron(pick(f.inputs[name]), pick(f.outputs[name]))
                total, right = total + g, right + g @ np.ravel(turn(d[name]))
            return np.linalg.solve(total, right)

        x = found.params["v"] - base["v"]
        np.testing.assert_allclose(np.ravel(x.T), dense("v", np.transpose, lambda a: a), atol=1e-10)
        for i in range(2):
            x = found.params["w"][i] - base["w"][i]
            np.testing.assert_allclose(np.ravel(x), dense("w", lambda d, i=i: d[i], lambda a, i=i: a[i]), atol=1e-10)


def regressions(counts=(9, 14)):
    """Two layers (stacked) of linear regressions, each fitted by its task alone, whose inputs differ."""
    shift = 1.5
    x = [normal(t, 2, n, 4) + shift * t for t, n in enumerate(counts)]
    y = [normal(10 + t, 2, n, 3) for t, n in enumerate(counts)]
    base = {"w": normal(20, 2, 4, 3)}
    fit = lambda x, y: np.stack([np.linalg.lstsq(a, b)[0] for a, b in zip(x, y, strict=True)])
    deltas = [{"w": fit(a, b) - base["w"]} for a, b in zip(x, y, strict=True)]
    layout = (("w", Dense((2,), (0,), (1,), (4, 3), 1)),)
    factors = [
        Kronecker({"w": jnp.asarray(np.swapaxes(a, 1, 2) @ a / n)}, {"w": jnp.ones((2, 3, 3))}, jnp.array(n), layout)
        for a, n in zip(x, counts, strict=True)
    ]
    return base, deltas, factors, fit(np.concatenate(x, axis=1), np.concatenate(y, axis=1))


def test_regmean_is_least_squares_on_the_pooled_data():
    with X64():
        base, deltas, factors, pooled = regressions()
        share = np.array([9, 14]) / 23
        np.testing.assert_allclose(regmean(base, deltas, factors, share)["w"], pooled, atol=1e-11)
        average = regmean(base, deltas, factors, share, scaling=0.0)["w"]  # the diagonal alone: Fisher's rule
        diagonal = [{"w": jnp.diagonal(f.inputs["w"], axis1=1, axis2=2)[:, :, None] * jnp.ones(3)} for f in factors]
        close(average, merge("fisher", base, deltas, fishers=diagonal, weights=share)["w"])
        # With a damping that drowns the data, wherever it pulls to.
        close(regmean(base, deltas, factors, damping=1e9, anchor=[0.5, 0.5]), compose(base, deltas), 1e-7)
        close(regmean(base, deltas, factors, damping=1e9), base, 1e-7)
        one = merge("regmean", base, deltas[:1], factors=factors[:1])
        close(one, compose(base, deltas[:1]))


def test_merged_with_the_curvature_of_a_model():
    with X64():
        case = mlp()
        base, apply = jax.tree.map(jnp.asarray, case.params), case.apply
        keys = jax.random.split(jax.random.key(0), 2)
        deltas = [jax.tree.map(lambda p, k=k: 0.1 * jax.random.normal(k, p.shape, p.dtype), base) for k in keys]
        data = [case.batches[:1], case.batches[1:2]]
        models = [tree.add(base, d) for d in deltas]
        matvecs = [jax.jit(ggn(apply, m, b)) for m, b in zip(models, data, strict=True)]
        found = jax.jit(lambda: solve_merge(base, deltas, matvecs, None, 1e-2))()
        assert found.converged
        # The dense Gauss-Newton matrices, from the Jacobian of the logits.
        total, right = 0, 0
        for model, batches, d in zip(models, data, deltas, strict=True):
            g, count = 0, sum(len(y) for _, y in batches)
            for x, _ in batches:
                logits, theta = flat(apply, model)
                jacobian, p = jax.jit(jax.jacrev(logits))(theta, x), jax.nn.softmax(apply(model, x))
                v = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
                g += jnp.einsum("nci,ncd,ndj->ij", jacobian, v, jacobian) / count
            total, right = total + g / 2, right + g @ ravel_pytree(d)[0] / 2
        expected = np.linalg.solve(total + 1e-2 * np.eye(len(total)), right)
        np.testing.assert_allclose(ravel_pytree(task(found.params, base))[0], expected, atol=1e-9)
        fisher = jax.jit(lambda m: fisher_diagonal(apply, m, case.whole[0]))
        fishers = [fisher(m) for m in models]
        faster = solve_merge(base, deltas, matvecs, None, 1e-2, preconditioner=fishers)
        close(faster.params, found.params, 1e-8)


def test_more_tasks_take_no_more_memory_than_their_arrays():
    """One product after another, though each is a program of its own."""
    base = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    apply = lambda p, x: functools.reduce(lambda x, _: jnp.tanh(x @ p["w"]), range(8), x)

    def temporary(tasks):
        def solved(base, deltas, images):
            matvecs = [ggn(apply, base, [(x,)], check=False) for x in images]
            return solve_merge(base, deltas, matvecs, damping=1e-2, max_iterations=5).params

        like = jax.ShapeDtypeStruct((512, 64), jnp.float32)
        compiled = jax.jit(solved).lower(base, [base] * tasks, [like] * tasks).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    deltas = 64 * 64 * 4
    assert temporary(8) < temporary(2) + 6 * 4 * deltas


def test_kronecker_factors_of_a_model():
    with X64():
        base = {"first": jnp.asarray(normal(0, 3, 5)), "second": jnp.asarray(normal(1, 5, 4))}
        apply = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]
        deltas = [jax.tree.map(lambda p, t=t: normal(5 + t, *p.shape), base) for t in range(2)]
        factors = [kronecker(apply, base, jnp.asarray(normal(8 + t, 4, 3))) for t in range(2)]
        solved = kronecker_merge(base, deltas, factors, damping=1e-4)
        plain = solve_merge(base, deltas, [f.matvec for f in factors], damping=1e-4, max_iterations=2000)
        close(solved.params, plain.params, 1e-7)
        assert solved.converged and solved.iterations < plain.iterations


def test_iterations_that_run_out_are_told():
    with X64():
        base, deltas, h, matvecs = quadratics()
        for most in (0, 1, 4):
            with pytest.warns(UserWarning, match=rf"stopped after {most} iterations with a relative residual of \d"):
                found = solve_merge(base, deltas, matvecs, max_iterations=most)
            assert not found.converged and found.iterations == most
            x = np.asarray(ravel_pytree(task(found.params, base))[0])
            b = np.mean([g @ d for g, d in zip(h, vectors(deltas), strict=True)], axis=0)
            residual = np.linalg.norm(b - np.mean(h, axis=0) @ x) / np.linalg.norm(b)
            np.testing.assert_allclose(found.residual, residual, rtol=1e-10)
            assert residual <= 1  # no worse than the start, whatever the iterations between
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = solve_merge(base, deltas, matvecs)
            # Nothing to do is done: one module, and the others where it is.
            again = solve_merge(base, deltas[:1], matvecs[:1], anchor=[1.0])
            assert again.converged and again.iterations == 0 and again.residual == 0
            close(again.params, compose(base, deltas[:1]))


def test_conjugate_gradients_keep_the_best_iterate():
    with X64():
        # Residuals rise before they fall where the spectrum is wide.
        a = np.diag(np.logspace(0, 6, 12))
        b = {"x": normal(0, 12)}
        run = lambda n: conjugate_gradients(lambda v: {"x": a @ v["x"]}, b, max_iterations=n)
        residuals = [float(run(n).residual) for n in (0, 1, 2, 4, 8, 12)]
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(residuals))
        assert residuals[1] == residuals[0] == 1


def test_bad_input():
    base, one, two = {"w": jnp.ones(3)}, {"w": jnp.arange(3.0)}, {"w": jnp.array([1.0, 0.0, 2.0])}
    plain, none = lambda v: v, lambda v: jax.tree.map(jnp.zeros_like, v)
    with pytest.raises(ValueError, match="1 curvature products were given for 2 modules"):
        solve_merge(base, [one, two], [plain])
    with pytest.raises(ValueError, match="can't be negative"):
        solve_merge(base, [one, two], [plain, plain], [2.0, -1.0])
    with pytest.raises(ValueError, match="damping is a finite number that isn't negative, not -1"):
        solve_merge(base, [one], [plain], damping=-1.0)
    with pytest.raises(ValueError, match="unknown coordinates 'rank'; known are full, modules"):
        solve_merge(base, [one], [plain], coordinates="rank")
    with pytest.raises(ValueError, match="the curvature is singular.*Give a damping"):
        solve_merge(base, [one, two], [none, none])
    with pytest.raises(ValueError, match="module coordinates is singular: modules depend.*Give a damping"):
        solve_merge(base, [one, one], [plain, plain], coordinates="modules")
    with pytest.raises(ValueError, match="module coordinates is singular"):
        solve_merge(base, [one, two], [none, none], coordinates="modules")
    found = solve_merge(base, [one, one], [plain, plain], damping=0.1, coordinates="modules")
    np.testing.assert_allclose(found.weights, 1 / 2.2, rtol=1e-5)
    with pytest.raises(ValueError, match="isn't positive.*Gauss-Newton"):
        solve_merge(base, [one], [lambda v: {"w": v["w"] * jnp.array([1.0, -1.0, -2.0])}])
    skew = lambda v: {"w": jnp.array([-v["w"][1], v["w"][0], 0.0])}
    with pytest.raises(ValueError, match="the curvature is singular"):
        solve_merge(base, [{"w": jnp.array([1.0, 2.0, 0.0])}], [skew])
    for coordinates in ("full", "modules"):
        bad = lambda v: {"w": v["w"] * jnp.nan}
        with pytest.raises(ValueError, match="the curvature product of module 1 holds NaN .* in w"):
            solve_merge(base, [one, two], [plain, bad], coordinates=coordinates)
        through = solve_merge(base, [one, two], [plain, bad], coordinates=coordinates, check_finite=False)
        assert not through.converged and not np.isfinite(through.residual)
    with pytest.raises(ValueError, match="1 Fishers were given to precondition with, for 2 modules"):
        solve_merge(base, [one, two], [plain, plain], preconditioner=[one])
    wide = {"w": jnp.ones(3), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="no entries for b"):
        solve_merge(wide, [wide], [plain], preconditioner=[one])
    with pytest.raises(ValueError, match="2 weights were given for 1 modules"):
        solve_merge(base, [one], [plain], anchor=[0.5, 0.5])

    layout = (("w", Dense((), (0,), (1,), (2, 2), 1)),)
    flat = Kronecker({"w": jnp.diag(jnp.array([1.0, 0.0]))}, {"w": jnp.eye(2)}, jnp.array(3), layout)
    base, delta = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, {"w": jnp.ones((2, 2)), "b": None}
    with pytest.raises(ValueError, match="inputs of w, summed over the tasks, is singular.*damping"):
        regmean(base, [delta, delta], [flat, flat])
    assert np.all(np.isfinite(regmean(base, [delta], [flat], damping=0.1)["w"]))
    for rule in (regmean, kronecker_merge):
        with pytest.raises(ValueError, match="1 tasks' Kronecker factors were given for 2 modules"):
            rule(base, [delta, delta], [flat])
        with pytest.raises(ValueError, match="of w, and the modules change none of these but b"):
            rule(base, [{"w": None, "b": jnp.ones(2)}], [flat])
        other = Kronecker(flat.inputs, flat.outputs, flat.count, (("w", layout[0][1]._replace(tokens=2)),))
        with pytest.raises(ValueError, match="different layers"):
            rule(base, [delta, delta], [flat, other])
        with pytest.raises(ValueError, match="can't be negative"):
            rule(base, [delta, delta], [flat, flat], [1.0, -1.0])
