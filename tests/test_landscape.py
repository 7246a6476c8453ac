"""The landscape of compositions against the true loss, its derivatives and brute force over the simplex."""

from functools import cache, reduce
from itertools import combinations
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from compo_jax import adapters, tree
from compo_jax.curvature import landscape, mix
from compo_jax.mesh import data_mesh
from compo_jax.models import ViT

X64 = jax.enable_x64
ANCHOR = np.array([0.2, 0.3, 0.4])
CHECK = np.random.default_rng(5).normal(size=(4, 3))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def dense(delta, base):
    """The delta as one vector, None holes as zeros."""
    return ravel_pytree(tree.add(jax.tree.map(jnp.zeros_like, base), delta))[0]


def quadratic(tasks, definite=False):
    """A quadratic loss of 10 numbers in a tree, the modules' dense deltas, and its dense Hessian."""
    base = {"a": normal(0, 3), "b": [normal(1, 2, 2), normal(2, 2)], "c": normal(3)}
    full = [jax.tree.map(lambda x, t=t: normal(10 + t, *np.shape(x)), base) for t in range(tasks)]
    deltas = [
        {**delta, "b": None}
        if t % 3 == 0
        else {**delta, "a": None, "b": [delta["b"][0], None]}
        if t % 3 == 1
        else delta
        for t, delta in enumerate(full)
    ]
    hessian = normal(4, 10, 10)
    hessian = hessian @ hessian.T if definite else hessian + hessian.T
    gradient = normal(5, 10)

    def loss(params):
        x = ravel_pytree(params)[0]
        return 2.0 + gradient @ x + 0.5 * x @ hessian @ x

    return SimpleNamespace(
        loss=loss, base=base, deltas=deltas, hessian=hessian, flat=np.stack([dense(d, base) for d in deltas])
    )


def truth(loss, base, deltas, *args):
    """`w -> loss(base + sum of w_t deltas_t)`, compiled once."""
    composed = lambda w: reduce(lambda params, t: tree.add(params, deltas[t], w[t]), range(len(deltas)), base)
    return jax.jit(lambda w: loss(composed(w), *args))


def mlp(tasks=3, scale=1.0):
    """A softmax classifier with a hidden layer, 21 examples, and random modules."""
    base = {"in": 0.5 * normal(0, 4, 5), "out": {"kernel": normal(1, 5, 3), "bias": normal(2, 3)}}
    deltas = [jax.tree.map(lambda x, t=t: scale * normal(20 + t, *x.shape), base) for t in range(tasks)]
    deltas[0]["in"] = None
    deltas[1]["out"]["bias"] = None
    x, y = normal(3, 21, 4), np.random.default_rng(4).integers(3, size=21)

    def loss(params, x, y):
        logits = jnp.tanh(x @ params["in"]) @ params["out"]["kernel"] + params["out"]["bias"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()

    return loss, base, deltas, x, y


def poisson():
    """A regression on counts, quick to compile: 21 examples, three random modules."""
    base = {"kernel": 0.3 * normal(0, 4), "bias": normal(1)}
    deltas = [jax.tree.map(lambda x, t=t: 0.5 * normal(20 + t, *np.shape(x)), base) for t in range(3)]
    deltas[0]["bias"] = None
    x, y = normal(3, 21, 4), np.random.default_rng(4).poisson(2.0, size=21)

    def loss(params, x, y):
        rate = x @ params["kernel"] + params["bias"]
        return jnp.mean(jnp.exp(rate) - y * rate)

    return loss, base, deltas, x, y


def cut(x, y, *sizes):
    ends = np.cumsum(sizes)
    return [(x[e - n : e], y[e - n : e]) for n, e in zip(sizes, ends, strict=True)]


def close(a, b, rtol=1e-10):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())


@cache
def whole():
    """The landscape of all examples of `poisson` as one batch, around weights and with checks of no symmetry."""
    loss, base, deltas, x, y = poisson()
    return landscape(loss, base, deltas, x, y, anchor=ANCHOR, check=CHECK)


def measured(land):
    return land._replace(strata=())


@pytest.mark.parametrize("tasks", [2, 4])
def test_of_a_quadratic_the_forecast_is_exact_at_any_weights_around_any_anchor(tasks):
    with X64(True):
        case = quadratic(tasks)
        loss = truth(case.loss, case.base, case.deltas)
        points = np.concatenate([normal(6, 10, tasks), np.eye(tasks), np.zeros((1, tasks))])
        around = jax.jit(lambda anchor: landscape(case.loss, case.base, case.deltas, anchor=anchor))
        for anchor in (np.zeros(tasks), np.full(tasks, 1 / tasks), 3 * normal(7, tasks)):
            land = around(anchor)
            close(land.predict(points), np.array([loss(w) for w in points]))
            close(land.gram, case.flat @ case.hessian @ case.flat.T)
            assert np.all(land.remainder().loss < 1e-12) and np.all(land.remainder().slope < 1e-12)
        assert land.predict(points[0]).shape == ()
        assert land.predict(points[None]).shape == (1, len(points))


@pytest.mark.parametrize("definite", [False, True])
@pytest.mark.parametrize("anchor", [None, [0.5, -2.0, 1.0, 0.0]])
def test_theorem_1(definite, anchor):
    with X64(True):
        case = quadratic(4, definite)
        land = landscape(case.loss, case.base, case.deltas, anchor=anchor)
        w = normal(8, 20, 4)
        w[:10] = np.random.default_rng(9).dirichlet(np.ones(4), size=10)
        w[10:] += ((1 - w[10:].sum(1)) / 4)[:, None]
        close(land.predict(w), w @ land.predict(np.eye(4)) - land.gap(w))
        pairs = 0
        for s, t in combinations(range(4), 2):
            apart = case.flat[s] - case.flat[t]
            pairs += 0.5 * w[:, s] * w[:, t] * (apart @ case.hessian @ apart)
        close(land.gap(w), pairs)
        assert not definite or np.all(land.gap(w[:10]) > 0)


def test_slope_and_gram_of_a_softmax_classifier_are_those_of_its_dense_derivatives():
    with X64(True):
        loss, base, deltas, x, y = mlp()
        flat = np.stack([dense(d, base) for d in deltas])
        start, restore = ravel_pytree(base)
        of = jax.jit(lambda v: loss(restore(v), x, y))
        gradient, hessian = jax.jit(jax.grad(of)), jax.jit(jax.hessian(of))
        around = jax.jit(lambda anchor: landscape(loss, base, deltas, x, y, anchor=anchor))
        for anchor in (np.zeros(3), np.array([0.5, 0.2, -0.3])):
            land, v = around(anchor), start + anchor @ flat
            close(land.loss, of(v))
            close(land.slope, flat @ gradient(v))
            close(land.gram, flat @ hessian(v) @ flat.T)


def vit_modules():
    """A small ViT, and LoRA and full modules of different kernels."""
    model = ViT(image_size=8, patch=4, width=8, depth=2, heads=2, classes=4)
    images = jnp.asarray(normal(0, 5, 8, 8, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(2), images)["params"]
    base = jax.tree.map(lambda x: 0.5 * normal(1, *x.shape), shapes)
    kinds = [
        adapters.lora(rank=2, targets=r"(proj|fc1)/kernel$"),
        adapters.ia3(targets=r"(qkv|fc1)/kernel$"),
        adapters.full(targets=r"fc2/kernel$|head|norm"),
    ]
    deltas = []
    for t, kind in enumerate(kinds):
        shapes = jax.eval_shape(kind.init, jax.random.key(t), base)
        module = jax.tree.map(lambda x, t=t: 0.15 * normal(40 + t, *x.shape), shapes)
        deltas.append(kind.delta(module, base))
    assert len({str(jax.tree.structure(d)) for d in deltas}) == 3

    def loss(params, images, labels):
        logits = model.apply({"params": params}, images)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    return loss, base, deltas, (images, np.arange(5) % 4)


def test_the_error_falls_as_the_third_power_of_the_modules_size():
    with X64(True):
        loss, base, deltas, data = vit_modules()
        points = np.concatenate([np.random.default_rng(6).dirichlet(np.ones(3), size=10), np.eye(3), np.ones((1, 3))])

        @jax.jit
        def error(scale, anchor):
            scaled = jax.tree.map(lambda x: scale * x, deltas)
            land = landscape(loss, base, scaled, *data, anchor=anchor, check=points)
            return jnp.abs(land.predict(points) - land.checked_loss).sum()

        for anchor in (np.zeros(3), np.full(3, 1 / 3)):
            coarse, fine = error(0.004, anchor), error(0.002, anchor)
            assert coarse > 1e-9  # above rounding
            np.testing.assert_allclose(coarse / fine, 8, rtol=0.1)


def test_batches_of_any_sizes_are_one_batch_of_all():
    with X64(True):
        loss, base, deltas, x, y = poisson()
        for options in (
            {"batches": iter(cut(x, y, 8, 8, 5)), "rematerialise": True},
            {"batches": cut(x, y, 8, 5, 8), "mesh": data_mesh(8)},
        ):
            land = landscape(loss, base, deltas, anchor=ANCHOR, check=CHECK, **options)
            close(measured(land), measured(whole()))


def test_under_jit_with_batches_it_is_the_same_as_outside():
    with X64(True):
        loss, base, deltas, x, y = poisson()
        make = lambda deltas, batches: landscape(loss, base, deltas, batches=batches)
        batches = cut(x, y, 8, 8, 5)
        outside, inside = make(deltas, batches), jax.jit(make)(deltas, batches)
        close(inside, outside)
        w = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
        for method in ("predict", "gap", "standard_error"):
            close(jax.jit(lambda land, w, m=method: getattr(land, m)(w))(outside, w), getattr(outside, method)(w))
        # Of traced weights no one knows the sum; nor of traced deltas whether they are finite.
        close(jax.jit(outside.gap)(2 * w), 0.5 * (2 * w @ np.diag(outside.gram) - 4 * np.diag(w @ outside.gram @ w.T)))
        holed = jax.tree.map(lambda x: x * np.nan, deltas)
        assert np.isnan(jax.jit(make)(holed, batches).gram).all()


def test_arguments_that_share_no_axis_are_one_batch():
    with X64(True):
        loss, base, deltas, x, y = poisson()
        with_head = lambda params, data, head, scale: loss({"kernel": scale * params, "bias": head["bias"]}, *data)
        moved = [delta["kernel"] for delta in deltas]
        head = {"bias": 0.5, "unused": np.zeros(3)}
        land = landscape(with_head, base["kernel"], moved, (x, y), head, 1.5)
        plain = landscape(lambda params: with_head(params, (x, y), head, 1.5), base["kernel"], moved)
        close(measured(land), measured(plain))
        close(land.loss, loss({"kernel": 1.5 * base["kernel"], "bias": 0.5}, x, y))
        assert np.isnan(land.standard_error(ANCHOR))


def test_standard_errors_are_the_spread_over_other_data():
    """The loss of a linear model over data drawn anew many times: how far forecasts scatter, and what was said."""
    with X64(True):
        base, deltas, sigma = normal(0, 3), [normal(1, 3), normal(2, 3)], 0.7
        w = np.array([[0.5, 0.5], [0.9, -0.4], [0.0, 0.0]])
        loss = lambda p, x, y: jnp.mean((x @ p - y) ** 2)

        def draw(key, sizes):
            inputs, noise = (
                jax.random.normal(k, (sum(sizes), n), jnp.float64) for k, n in zip(key, (3, 1), strict=True)
            )
            land = landscape(loss, base, deltas, batches=cut(inputs, sigma * noise[:, 0], *sizes), anchor=[1.0, 0.0])
            return land.predict(w), land.standard_error(w)

        expected = np.square(base + w @ np.stack(deltas)).sum(1) + sigma**2  # over standard normal inputs
        keys = jax.random.split(jax.random.key(3), (2000, 2))
        forecast, error = jax.jit(jax.vmap(lambda key: draw(key, [4] * 20 + [2] * 8)))(keys)
        z = (forecast.mean(0) - expected) / (forecast.std(0) / np.sqrt(len(keys)))
        assert np.abs(z).max() < 4
        # A variance of 2000 draws is known to some 4 % (the losses' tails are heavier than normal).
        np.testing.assert_allclose(np.mean(error**2, axis=0) / forecast.var(0), 1, atol=0.12)
        deviation = np.std((forecast - expected) / error, axis=0)
        assert np.all((deviation > 0.95) & (deviation < 1.2))


def test_standard_error_is_the_weighted_scatter_of_the_batches():
    with X64(True):
        base, deltas, x, y = normal(0, 3), [normal(1, 3), normal(2, 3)], normal(3, 21, 3), normal(4, 21)
        loss = lambda p, x, y: jnp.mean((x @ p - y) ** 2)  # quadratic, so that forecasts are true losses
        w = np.array([[0.3, 0.7], [1.0, -1.0]])
        land = landscape(loss, base, deltas, batches=cut(x, y, 8, 8, 5), anchor=[0.5, 0.5])
        points = base + w @ np.stack(deltas)
        alone = np.array([[np.mean((x @ p - y) ** 2) for p in points] for x, y in cut(x, y, 8, 8, 5)])
        share = np.array([8, 8, 5]) / 21
        variance = share**2 @ np.square(alone - share @ alone) * 3 / 2
        close(land.standard_error(w), np.sqrt(variance))


def test_the_tasks_landscapes_mixed_are_the_landscape_of_all_data():
    with X64(True):
        loss, base, deltas, x, y = poisson()
        tasks = [cut(x[:9], y[:9], 3, 3, 3), cut(x[9:], y[9:], 4, 4, 4)]
        make = lambda batches: landscape(loss, base, deltas, batches=batches, anchor=ANCHOR, check=CHECK)
        apart = [make(batches) for batches in tasks]
        both = mix(apart, [9 / 21, 12 / 21])
        close(measured(both), measured(whole()))
        w = np.array([[0.3, 0.3, 0.4], [0, 1, 0]])
        strata = [(n / 21) ** 2 * np.square(a.standard_error(w)) for n, a in zip((9, 12), apart, strict=True)]
        close(both.standard_error(w), np.sqrt(sum(strata)))
        close(
            mix([both, apart[0]], [0.5, 0.25]).standard_error(w) ** 2, sum(strata) / 4 + strata[0] / (9 / 21) ** 2 / 16
        )
        close(jax.jit(mix)(apart, jnp.array([9 / 21, 12 / 21])), both)


def test_the_remainder_is_forecast_against_truth_where_it_was_checked():
    with X64(True):
        loss, base, deltas, x, y = mlp(scale=0.5)
        at = truth(loss, base, deltas, x, y)
        true_slope = jax.jit(jax.grad(at))
        of = jax.jit(lambda scale: landscape(loss, base, jax.tree.map(lambda d: scale * d, deltas), x, y))
        land = of(1.0)
        np.testing.assert_allclose(land.checked, [[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]])
        off = land.remainder()
        np.testing.assert_array_equal(off.weights, land.checked)
        for n, w in enumerate(land.checked):
            close(land.checked_loss[n], at(w))
            close(off.loss[n], abs(land.predict(w) - at(w)) / at(w), 1e-8)
            slope, true = land.slope + land.gram @ w, true_slope(w)
            close(off.slope[n], jnp.linalg.norm(slope - true) / jnp.linalg.norm(true), 1e-8)
        small, large = of(0.01).remainder(), of(50.0).remainder()
        assert np.all(small.loss < 1e-4) and np.all(small.slope < 1e-2)
        assert np.all(large.loss > 0.5) and np.all(large.slope > 1)


def test_the_remainder_at_the_anchor_is_zero_though_the_slope_vanishes():
    with X64(True):
        loss = lambda p: 1.0 + jnp.sum(p**2)
        land = landscape(loss, np.zeros(2), [np.ones(2), -np.ones(2)], anchor=[0.5, 0.5], check=[[0.5, 0.5]])
        assert land.remainder().slope == 0 and land.remainder().loss == 0


@pytest.mark.parametrize("definite", [False, True])
def test_best_weights_are_the_lowest_point_of_a_dense_grid(definite):
    with X64(True):
        for tasks, anchor in ((2, None), (3, [0.5, 0.5, 0.5])):
            case = quadratic(tasks, definite)
            land = landscape(case.loss, case.base, case.deltas, anchor=anchor)
            steps = np.stack(np.meshgrid(*[np.linspace(-1, 2, 61)] * tasks), axis=-1).reshape(-1, tasks)
            for box in ((0.0, 1.0), ([-1.0, 0.5, -0.25][:tasks], [2.0, 0.75, 0.5][:tasks])):
                best = land.best_weights(simplex=False, lower=box[0], upper=box[1])
                inside = steps[np.all((steps >= np.array(box[0])) & (steps <= np.array(box[1])), axis=1)]
                assert np.all(best >= box[0]) and np.all(best <= box[1])
                # Never above the grid, whose nearest point is within 0.025 in each weight: not far below either.
                excess = land.predict(best) - land.predict(inside).min()
                assert -0.1 * np.abs(land.gram).sum() <= excess <= 1e-9
            best = land.best_weights()
            assert np.all(best >= 0) and abs(best.sum() - 1) < 1e-12
            corners = np.random.default_rng(0).dirichlet(np.ones(tasks) / 2, size=20_000)
            excess = land.predict(best) - land.predict(np.concatenate([corners, np.eye(tasks)])).min()
            assert -1e-2 * np.abs(land.gram).sum() <= excess <= 1e-9


def test_best_weights_of_trained_modules_lower_the_true_loss():
    with X64(True):
        loss, base, _, _, _ = mlp()
        x = normal(50, 120, 4)
        y = np.argmax(x[:, :3] + 0.3 * normal(51, 120, 3), axis=1)
        parts = [(x[:40], y[:40]), (x[40:70], y[40:70]), (x[70:80], 2 - y[70:80])]  # the last learns nonsense

        @jax.jit
        def train(x, y):
            step = lambda params, _: (tree.add(params, jax.grad(loss)(params, x, y), -0.2), None)
            return tree.add(jax.lax.scan(step, base, None, length=40)[0], base, -1.0)

        deltas = [train(*part) for part in parts]
        at = truth(loss, base, deltas, x, y)
        land = landscape(loss, base, deltas, x, y, anchor=np.full(3, 1 / 3))
        best = land.best_weights()
        assert best[2] < 0.05  # the forecast sees through the module that learned nonsense
        assert at(best) < at(np.full(3, 1 / 3)) - 0.01
        assert abs(land.predict(best) - at(best)) < 0.1 * at(best)


def test_float32_is_close_to_float64():
    with X64(True):
        loss, base, deltas, x, y = poisson()
        exact, gap = whole(), whole().gap(np.array([0.1, 0.2, 0.7]))
    base, deltas, x = jax.tree.map(lambda v: np.asarray(v, np.float32), (base, deltas, x))
    single = landscape(loss, base, deltas, x, y, anchor=ANCHOR, check=CHECK)
    assert single.gram.dtype == single.loss.dtype == jnp.float32
    for name in ("loss", "slope", "gram", "checked_loss", "checked_slope"):
        close(getattr(single, name), np.asarray(getattr(exact, name)), 2e-5)
    close(single.gap([0.1, 0.2, 0.7]), np.asarray(gap), 2e-5)  # the sum of the weights is one but for rounding


def test_half_precision_modules_are_measured_in_single_precision():
    loss, base, deltas, x, y = poisson()
    halved = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), deltas)
    land = landscape(loss, jax.tree.map(lambda v: np.asarray(v, np.float32), base), halved, x.astype(np.float32), y)
    assert land.gram.dtype == land.loss.dtype == jnp.float32
    widened = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), halved)
    single = landscape(loss, jax.tree.map(lambda v: np.asarray(v, np.float32), base), widened, x.astype(np.float32), y)
    np.testing.assert_allclose(land.slope, single.slope, rtol=1e-6)
    np.testing.assert_allclose(land.gram, single.gram, rtol=1e-6)


def test_it_can_be_differentiated_in_what_the_loss_closes_over():
    base, deltas = {"w": jnp.ones(2)}, [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
    forecast = lambda s: landscape(lambda p: s * jnp.sum(p["w"] ** 2), base, deltas).predict([0.5, 0.25])
    np.testing.assert_allclose(jax.grad(forecast)(3.0), 1.5**2 + 1.5**2, rtol=1e-6)
    land = landscape(lambda p: jnp.sum(p["w"] ** 2), base, deltas)
    w = jnp.array([0.5, 0.5])
    np.testing.assert_allclose(jax.jit(lambda s: s * land.gap(w))(1.0), land.gap(w), rtol=1e-6)


def test_bad_modules():
    base = {"a": {"kernel": np.ones((2, 3)), "count": 3}, "b": np.zeros(2)}
    good = {"a": {"kernel": np.ones((2, 3)), "count": None}, "b": None}
    loss = lambda p: jnp.sum(p["a"]["kernel"] ** 2) + jnp.sum(p["b"])
    wrong = {
        r"delta 1 doesn't fit .*: a/kernel is \(3, 2\) and should be \(2, 3\)": {
            "a": {"kernel": np.ones((3, 2)), "count": None},
            "b": None,
        },
        r"delta 1 doesn't fit .*: a/kernel is missing": {"a": {"count": None}, "b": None},
        r"delta 1 doesn't fit .*: a/other is unknown": {"a": {**good["a"], "other": np.ones(2)}, "b": None},
        r"delta 1 has a leaf b of type int": {**good, "b": np.ones(2, int)},
        r"what delta 1 is added to has a leaf a/count of type int": {"a": {"kernel": None, "count": 1.0}, "b": None},
        r"delta 1 has no leaves": {"a": None, "b": None},
        r"delta 1 holds NaN or infinite numbers in a/kernel: a training that diverged": {
            "a": {"kernel": np.full((2, 3), np.nan), "count": None},
            "b": None,
        },
        r"delta 1 holds NaN or infinite numbers in b": {**good, "b": np.array([1.0, np.inf])},
    }
    for message, delta in wrong.items():
        with pytest.raises(ValueError, match=message):
            landscape(loss, base, [good, delta])
    with pytest.raises(ValueError, match="of two modules or more, and 1 was given: of one, use hvp"):
        landscape(loss, base, [good])


def test_bad_data():
    with X64(True):
        loss, base, deltas, x, y = poisson()
        with pytest.raises(ValueError, match="the data were given twice"):
            landscape(loss, base, deltas, x, y, batches=[(x, y)])
        with pytest.raises(ValueError, match="there are no batches: an iterator that has been used up"):
            landscape(loss, base, deltas, batches=[])
        with pytest.raises(ValueError, match="a batch without examples"):
            landscape(loss, base, deltas, batches=[(x[:0], y[:0])])
        random = np.random.default_rng(0)
        with pytest.raises(ValueError, match="two values at the same parameters.* Turn dropout off"):
            landscape(lambda p, x, y: loss(p, x, y) * random.uniform(1, 2), base, deltas, x, y)
        for wrong in ({"anchor": [0.5, 0.5]}, {"check": np.ones((2, 4))}):
            with pytest.raises(ValueError, match=r"3 modules need an anchor of shape \(3,\) and points"):
                landscape(loss, base, deltas, x, y, **wrong)


def test_bad_weights():
    with X64(True):
        land = whole()
        for method in (land.predict, land.gap, land.standard_error):
            with pytest.raises(ValueError, match=r"weights of shape \(2,\) were given for 3 modules: one for each"):
                method([0.5, 0.5])
        with pytest.raises(ValueError, match="Ω is defined for weights that sum to one, and these sum to 1.5"):
            land.gap([0.5, 0.5, 0.5])
        with pytest.raises(ValueError, match="sum to one"):
            land.gap(np.eye(3)[:2] + np.array([[0, 0, 0], [0, 0, 0.1]]))
        for lower, upper in ((0.0, np.inf), (np.nan, 1.0), (1.0, 0.0), ([0, -np.inf, 0], 1.0)):
            with pytest.raises(ValueError, match="the box needs finite bounds with lower <= upper"):
                land.best_weights(simplex=False, lower=lower, upper=upper)
        with pytest.raises(ValueError, match="numbers that aren't finite has no minimum"):
            land._replace(gram=land.gram * jnp.nan).best_weights()


def test_bad_mixtures():
    with X64(True):
        land = whole()
        for name, other in (
            ("anchor", land._replace(anchor=land.anchor + 0.1)),
            ("anchor", land._replace(anchor=land.anchor[:2])),
            ("checked", land._replace(checked=land.checked[:1])),
        ):
            with pytest.raises(ValueError, match=f"landscapes with different {name} can't be added"):
                mix([land, other], [0.5, 0.5])
        with pytest.raises(ValueError, match="2 landscapes were given 3 weights"):
            mix([land, land], [1.0, 1.0, 1.0])
        with pytest.raises(ValueError, match="0 landscapes"):
            mix([], [])


def test_numbers_that_are_not_finite_are_refused_unless_let_through():
    base, deltas = {"w": np.ones(2)}, [{"w": np.array([1.0, 0.0])}, {"w": np.array([0.0, 1.0])}]
    with pytest.raises(ValueError, match="the landscape at its anchor holds NaN .* in loss, slope"):
        landscape(lambda p: jnp.sum(p["w"]) * jnp.nan, base, deltas)
    assert np.isnan(landscape(lambda p: jnp.sum(p["w"]) * jnp.nan, base, deltas, check_finite=False).loss)
    with pytest.raises(ValueError, match="base holds NaN .* in w"):
        landscape(lambda p: jnp.sum(p["w"] ** 2), {"w": np.array([1.0, np.nan])}, deltas)
    for options in ({"anchor": [np.nan, 0.5]}, {"check": [[np.inf, 0.5]]}):
        with pytest.raises(ValueError, match="the anchor and the points to check must be finite"):
            landscape(lambda p: jnp.sum(p["w"] ** 2), base, deltas, **options)
    land = landscape(lambda p: jnp.sum(p["w"] ** 2), base, deltas)
    with pytest.raises(ValueError, match="weights must be finite"):
        land.predict([np.nan, 0.5])
    with pytest.raises(ValueError, match="weights of landscapes must be finite"):
        mix([land, land], [np.nan, 1.0])
    with pytest.raises(ValueError, match=r"the loss is an array of shape \(2,\)"):
        landscape(lambda p: p["w"] ** 2, base, deltas)


def test_a_custom_reverse_derivative_changes_no_landscape():
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (sine(x), x), lambda x, g: (g * jnp.cos(x),))
    with X64(True):
        base, deltas = normal(0, 3), [normal(1, 3), normal(2, 3)]
        custom, plain = (landscape(lambda p, f=f: jnp.sum(f(p) ** 2), base, deltas) for f in (sine, jnp.sin))
        close(measured(custom), measured(plain))
