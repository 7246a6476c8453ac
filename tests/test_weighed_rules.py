"""Weights of groups of layers: from the landscape, in a basis of task vectors, and by the entropy of test images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax.flatten_util import ravel_pytree

from compo_jax.compose import (
    Unlabelled,
    adamerging,
    compose,
    epimer,
    group_landscape,
    layer_weights,
    merge,
    solve_merge,
)
from compo_jax.compose.adaptive import entropy, summed_entropy
from compo_jax.compose.groups import grouped

X64 = functools.partial(jax.enable_x64, True)
BASE = {"blocks": {"w": normal(0, 2, 2, 3)}, "head": normal(1, 3)}
DELTAS = [
    {"blocks": {"w": normal(2, 2, 2, 3)}, "head": normal(3, 3)},
    {"blocks": {"w": normal(4, 2, 2, 3)}, "head": None},
]
PARTS = [(slice(0, 6), "blocks/0"), (slice(6, 12), "blocks/1"), (slice(12, 15), "head")]
SIZE = 15


def vector(delta):
    whole = jax.tree.map(lambda b, d: np.zeros_like(b) if d is None else d, BASE, delta, is_leaf=lambda x: x is None)
    return np.asarray(ravel_pytree(whole)[0])


def parts():
    """(15, tasks * groups): each task's part in each group, task after task."""
    columns = []
    for delta in DELTAS:
        for place, _ in PARTS:
            column = np.zeros(SIZE)
            column[place] = vector(delta)[place]
            columns.append(column)
    return np.stack(columns, axis=1)


def positive(seed):
    x = normal(seed, SIZE, SIZE + 3)
    return x @ x.T / SIZE


CURVATURE = positive(10)


def quadratic(params, x):
    """`½ (θ - θ₀ - c)ᵀ H (θ - θ₀ - c) + 1`, c the mean of the batch."""
    away = ravel_pytree(jax.tree.map(lambda p, b: p - b, params, BASE))[0] - jnp.mean(x, axis=0)
    return 0.5 * away @ CURVATURE @ away + 1


BATCHES = [(0.3 * normal(20 + i, 4, SIZE),) for i in range(5)]


def test_groups_of_layers_leaves_tasks_and_patterns():
    assert grouped(BASE, DELTAS).names == ("blocks/0", "blocks/1", "head")
    assert grouped(BASE, DELTAS, "tasks").names == ("all",)
    assert grouped(BASE, DELTAS, "leaves").names == ("blocks/w[0]", "blocks/w[1]", "head")
    assert grouped(BASE, DELTAS, ["^head"]).names == ("the rest", "^head")
    numbered = {"h.0.w": np.ones(2), "h.1.w": np.ones(2), "norm.w": np.ones(2)}
    assert grouped(numbered, [numbered]).names == ("h.0", "h.1", "norm")
    with pytest.raises(ValueError, match="the groups nowhere are of no leaf"):
        grouped(BASE, DELTAS, ["nowhere"])
    with pytest.raises(ValueError, match="groups are 'layers', 'leaves', 'tasks' or a list of patterns"):
        grouped(BASE, DELTAS, "layer")


def test_the_best_weights_of_layers_are_the_quadratics_minimum_with_its_errors():
    with X64():
        columns, centres = parts()[:, :5], np.stack([x.mean(0) for (x,) in BATCHES])  # the hole's weight is nowhere
        best = np.linalg.solve(columns.T @ CURVATURE @ columns, columns.T @ CURVATURE @ centres.T)  # (parts, batches)
        wide = {"lower": -9.0, "upper": 9.0}
        found = layer_weights(quadratic, BASE, DELTAS, BATCHES, **wide)
        assert found.groups == ("blocks/0", "blocks/1", "head") and found.converged and found.rounds == 1
        np.testing.assert_allclose(found.weights.ravel()[:5], best.mean(1), atol=1e-9)
        np.testing.assert_allclose(found.errors.ravel()[:5], best.std(1, ddof=1) / np.sqrt(5), rtol=1e-6)
        np.testing.assert_allclose(found.forecast, found.loss, rtol=1e-12)
        moved = vector(jax.tree.map(lambda p, b: p - b, found.params, BASE))
        np.testing.assert_allclose(moved, columns @ best.mean(1), atol=1e-9)
        # in a box: no worse than any of some weights there
        boxed = layer_weights(quadratic, BASE, DELTAS, BATCHES)
        assert np.all((boxed.weights >= 0) & (boxed.weights <= 1)) and boxed.loss >= found.loss
        expansion = group_landscape(quadratic, BASE, DELTAS, BATCHES)
        tries = np.random.default_rng(0).uniform(size=(50, 2, 3))
        assert all(float(expansion.predict(w)) >= boxed.forecast - 1e-12 for w in tries)
        np.testing.assert_allclose(boxed.forecast_error, expansion.standard_error(boxed.weights), rtol=1e-9)
        assert np.all(boxed.errors[(boxed.weights == 0) | (boxed.weights == 1)] == 0)
        # one group is the weights of whole modules; one batch has no errors
        whole = layer_weights(quadratic, BASE, DELTAS, BATCHES[:1], groups="tasks", **wide)
        both = np.stack([vector(d) for d in DELTAS], axis=1)
        expected = np.linalg.solve(both.T @ CURVATURE @ both, both.T @ CURVATURE @ centres[0])
        np.testing.assert_allclose(whole.weights[:, 0], expected, atol=1e-9)
        assert np.all(np.isnan(whole.errors))


def test_a_landscape_expanded_again_forecasts_its_own_optimum():
    with X64():

        def bent(params, x):
            return quadratic(params, x) + 0.3 * jnp.sum(jnp.cosh(3 * params["head"]))

        once = layer_weights(bent, BASE, DELTAS, BATCHES[:2])
        again = layer_weights(bent, BASE, DELTAS, BATCHES[:2], rounds=12)
        assert once.remainders[0] > 0.01 and again.converged and again.remainders[-1] < 0.01
        assert again.rounds == len(again.remainders) > 1 and again.loss < once.loss
        columns = parts()[:, :5]
        slope = jax.grad(lambda w: np.mean([1.0]) * sum(bent(moved(columns @ w), x) for (x,) in BATCHES[:2]) / 2)
        at = again.weights.ravel()[:5]
        free = (at > 0) & (at < 1)
        assert np.abs(np.asarray(slope(jnp.asarray(at)))[free]).max(initial=0) < 0.1 * abs(again.loss)


def moved(flat):
    return jax.tree.map(jnp.add, BASE, ravel_pytree(BASE)[1](flat))


@pytest.mark.parametrize("groups", ["layers", "tasks"])
def test_epimer_is_the_joint_optimum_in_the_basis(groups):
    with X64():
        dense = [positive(30), positive(31)]
        unravel = ravel_pytree(BASE)[1]
        matvecs = [lambda v, h=h: unravel(h @ ravel_pytree(v)[0]) for h in dense]
        both = [DELTAS[0], {"blocks": DELTAS[1]["blocks"], "head": normal(9, 3)}]
        x = [vector(d) for d in both]
        whole = np.stack(x, axis=1)
        cut = [np.where(np.isin(np.arange(SIZE), np.r_[place])[:, None], whole, 0) for place, _ in PARTS]
        basis = np.concatenate(cut if groups == "layers" else [whole], axis=1)
        weights = np.array([0.3, 0.7])
        total = sum(w * h for w, h in zip(weights, dense, strict=True))
        right = sum(w * h @ (basis @ np.linalg.lstsq(basis, d)[0]) for w, h, d in zip(weights, dense, x, strict=True))
        expected = basis @ np.linalg.solve(basis.T @ total @ basis, basis.T @ right)
        found = epimer(BASE, both, matvecs, weights, groups=groups)
        delta = vector(jax.tree.map(lambda p, b: p - b, found.params, BASE))
        np.testing.assert_allclose(delta, expected, atol=1e-9)
        if groups == "tasks":
            solved = solve_merge(BASE, both, matvecs, weights, coordinates="modules")
            np.testing.assert_allclose(found.weights[:, 0], solved.weights, atol=1e-9)
            # one direction is the leading one; dependent modules have fewer directions, and one is itself
            leading = np.linalg.svd(whole, full_matrices=False)[0][:, 0]
            one = epimer(BASE, both, matvecs, weights, groups=groups, rank=1)
            delta = vector(jax.tree.map(lambda p, b: p - b, one.params, BASE))
            np.testing.assert_allclose(abs(delta @ leading), np.linalg.norm(delta), rtol=1e-9)
            same = epimer(BASE, [both[0]] * 2, [matvecs[0]] * 2, groups=groups).params
            alone = merge("epimer", BASE, both[:1], matvecs=matvecs[:1])
            for params in (same, alone):
                expected = compose(BASE, both[:1])
                jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-9), params, expected)


def logits(params, x, turn):
    hidden = jnp.tanh(x @ params["blocks"]["w"].reshape(4, 3))
    return hidden * params["head"] + turn * jnp.arange(3)


def test_adamerging_lowers_the_entropy_by_its_true_gradient():
    with X64():
        tasks = [Unlabelled(functools.partial(logits, turn=t), [normal(40 + t, 6, 4)]) for t in (0, 1)]
        groups = grouped(BASE, DELTAS, "leaves")
        rest = BASE, DELTAS, groups, [task.apply for task in tasks], [task.batches[0] for task in tasks]
        weights = jnp.full((2, 3), 0.3) + 0.1 * normal(50, 2, 3)

        def by_hand(w):
            columns = parts() @ np.asarray(w).ravel()
            params = moved(columns)
            total = 0.0
            for task in tasks:
                z = np.asarray(task.apply(params, task.batches[0]))
                p = np.exp(z - z.max(1, keepdims=True))
                p /= p.sum(1, keepdims=True)
                total -= (p * np.log(p)).sum(1).mean()
            return total

        np.testing.assert_allclose(summed_entropy(weights, *rest), by_hand(weights), rtol=1e-12)
        slope, step = jax.grad(summed_entropy)(weights, *rest), 1e-6
        for at in ((0, 0), (1, 1), (0, 2)):
            to = np.zeros((2, 3))
            to[at] = step
            difference = (by_hand(weights + to) - by_hand(weights - to)) / 2 / step
            np.testing.assert_allclose(slope[at], difference, rtol=1e-5, atol=1e-9)
        found = adamerging(BASE, DELTAS, tasks, steps=40, learning_rate=0.02)
        assert found.entropies[-1] < found.entropies[0] - 0.01 and found.groups == groups.names
        assert np.all((found.weights >= 0) & (found.weights <= 1)) and found.weights.shape == (2, 3)
        np.testing.assert_allclose(found.entropies[0], by_hand(np.full((2, 3), 0.3)), rtol=1e-9)
        np.testing.assert_allclose(entropy(jnp.array([[0.0, 0.0, -jnp.inf]])), np.log(2), rtol=1e-9)


def test_thirty_tasks_in_16_bits_and_bad_input():
    narrow = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.bfloat16))
    base, many = narrow({"head": BASE["head"]}), [narrow({"head": DELTAS[0]["head"]})] * 30
    scaled = [lambda v, s=s: jax.tree.map(lambda x: s * x, v) for s in range(1, 31)]
    task = Unlabelled(lambda params, x: x * params["head"], [normal(40, 6, 3).astype(np.float32)])
    made = {
        "epimer": merge("epimer", base, many, matvecs=scaled),
        "adamerging": merge("adamerging", base, many, unlabelled=[task] * 30, steps=2, groups="tasks"),
    }
    for name, params in made.items():
        assert all(x.dtype == jnp.bfloat16 and np.all(np.isfinite(x)) for x in jax.tree.leaves(params)), name
    equal = jax.tree.map(lambda b, d: b + d, base, many[0])
    close = functools.partial(np.testing.assert_allclose, rtol=2**-7, atol=2**-7)
    jax.tree.map(lambda x, y: close(np.float32(x), np.float32(y)), made["epimer"], equal)
    none = lambda v: jax.tree.map(jnp.zeros_like, v)
    table = [
        ("epimer", {"matvecs": scaled[:1]}, "1 curvature products were given for 2 modules"),
        ("epimer", {"matvecs": [none] * 2}, "singular in the basis of the task vectors.*Give a damping above 0"),
        ("epimer", {"matvecs": scaled[:2], "rank": 0}, "rank is a whole number of directions"),
        ("adamerging", {"unlabelled": [task]}, "1 tasks' unlabelled images were given for 2 modules"),
        ("adamerging", {"unlabelled": [task, task._replace(batches=[])]}, "there are no unlabelled images of task 1"),
        ("adamerging", {"unlabelled": [task] * 2, "start": 2.0}, "start is a weight from 0 to 1"),
        ("adamerging", {}, "needs unlabelled .images of the tasks without labels"),
        ("layer_weights", {"loss": quadratic}, "needs batches .the batches of that loss"),
        ("layer_weights", {"loss": quadratic, "batches": []}, "there are no batches"),
        (
            "layer_weights",
            {"loss": quadratic, "batches": BATCHES, "radius": 0.0},
            "radius is how far a weight may move",
        ),
        ("layer_weights", {"loss": quadratic, "batches": BATCHES, "rounds": 0}, "rounds is a whole number from 1 on"),
    ]
    for name, options, match in table:
        with pytest.raises(ValueError, match=match):
            merge(name, BASE, DELTAS, **options)
