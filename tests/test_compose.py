"""Merge rules against closed forms and loops in NumPy."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close
from flax.core import freeze
from jax.flatten_util import ravel_pytree

from compo_jax import adapters, tree
from compo_jax.compose import (
    RULES,
    Unlabelled,
    compose,
    dare,
    drop,
    fisher_merge,
    iso,
    karcher_mean,
    merge,
    model_stock,
    slerp,
    solve_merge,
    task_arithmetic,
    task_vector,
    ties,
    trim,
    tsv,
)
from compo_jax.curvature import FisherDiagonal, Kronecker, landscape
from compo_jax.curvature.layers import Dense

X64 = functools.partial(jax.enable_x64, True)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def base():
    """Layers stacked on axis 0 with their biases, a matrix, and an integer that nothing changes."""
    return {
        "blocks": {"kernel": normal(0, 2, 4, 3), "bias": normal(1, 2, 3)},
        "head": normal(2, 3, 5),
        "steps": np.array(3),
    }


def delta(seed, holes=()):
    made = {"kernel": normal(seed, 2, 4, 3), "bias": normal(seed + 1, 2, 3)}
    whole = {"blocks": made, "head": normal(seed + 2, 3, 5), "steps": None}
    return tree.map_with_name(lambda name, x: None if name in holes else x, whole)


def vector(x):
    return np.asarray(ravel_pytree(x)[0])


def changed(params):
    """The task vector of merged parameters, as one vector."""
    return vector(task_vector(tree.partition(params, ["blocks", "head"])[0], base()))


def filled(deltas):
    """Every delta as one vector, holes zero: (tasks, n)."""
    like = delta(0)
    return np.stack([vector(jax.tree.map(lambda _, b: b * 0, like, like))] * len(deltas)) + np.stack(
        [vector(tree.combine(d, jax.tree.map(np.zeros_like, like))) for d in deltas]
    )


THREE = [delta(10), delta(20, holes=["head"]), delta(30, holes=["blocks/bias"])]


def test_task_vector_and_sums():
    with X64():
        params = compose(base(), THREE, [1.0, -2.0, 0.5])
        np.testing.assert_allclose(changed(params), np.array([1, -2, 0.5]) @ filled(THREE), atol=1e-12)
        assert params["steps"] is not None and params["steps"] == 3
        np.testing.assert_allclose(changed(compose(base(), THREE)), filled(THREE).mean(axis=0), atol=1e-12)
        found = task_arithmetic(base(), THREE, scale=0.7)
        np.testing.assert_allclose(changed(found), 0.7 * filled(THREE).sum(axis=0), atol=1e-12)
        assert task_vector({"blocks": None, "head": base()["head"], "steps": None}, base())["blocks"]["bias"] is None


def test_a_leaf_that_no_module_changes_is_the_bases_own():
    narrow = functools.partial(jax.tree.map, lambda x: x.astype(np.float32) if x.dtype == np.float64 else x)
    start = narrow(base())
    holes = ["blocks/bias", "blocks/kernel"]
    for rule in (compose, ties, tsv, iso, model_stock):
        params = rule(start, narrow([delta(1, holes), {"blocks": None, "head": delta(1)["head"], "steps": None}]))
        assert params["blocks"]["kernel"] is start["blocks"]["kernel"]
        assert params["steps"] is start["steps"]
        assert np.any(np.asarray(params["head"]) != start["head"])


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]])
def test_ties_is_the_loop_over_entries(weights):
    with X64():
        x, w, kept = filled(THREE), weights or [1, 1, 1], round(0.4 * 45)
        for row, given in zip(x, THREE, strict=True):  # of the entries there are: zeros for holes are never kept
            row[np.argsort(-np.abs(row))[kept:]] = 0
            assert np.count_nonzero(vector(given)) >= kept
        expected = np.zeros(45)
        for i in range(45):
            sign = np.sign(sum(w[t] * x[t, i] for t in range(3)))
            agreeing = [t for t in range(3) if x[t, i] != 0 and np.sign(x[t, i]) == sign]
            if agreeing:
                expected[i] = sum(w[t] * x[t, i] for t in agreeing) / sum(w[t] for t in agreeing)
        found = ties(base(), THREE, weights, density=0.4, scale=1.5)
        np.testing.assert_allclose(changed(found), 1.5 * expected, atol=1e-12)
        np.testing.assert_allclose(changed(ties(base(), THREE[:1], density=1.0)), filled(THREE[:1])[0], atol=1e-12)


def test_dare_drops_rescales_and_is_unbiased():
    with X64():
        one = delta(5)
        dropped = vector(drop(jax.random.key(0), one, 0.75))
        kept = dropped != 0
        np.testing.assert_allclose(dropped[kept], 4 * vector(one)[kept])
        draws = jax.jit(jax.vmap(lambda k: ravel_pytree(drop(k, one, 0.75))[0]))(
            jax.random.split(jax.random.key(1), 4000)
        )
        z = (draws.mean(0) - vector(one)) / (draws.std(0) / np.sqrt(4000))
        assert np.abs(z).max() < 4.5
        assert abs(np.mean(draws != 0) - 0.25) < 0.01
        # Nothing dropped is the rule behind; two modules draw apart.
        close(dare(jax.random.key(0), base(), THREE, rate=0.0, rule=ties), ties(base(), THREE))
        same = changed(dare(jax.random.key(0), base(), [one, one], [1.0, -1.0], rate=0.5))
        assert np.count_nonzero(np.abs(same) > 1e-12) > 5


def test_slerp_runs_along_the_great_circle():
    with X64():
        a, b = delta(1), jax.tree.map(lambda x: 3 * x, delta(40))
        u, v = vector(a), vector(b)
        np.testing.assert_allclose(vector(slerp(a, b, 0.0)), u, atol=1e-12)
        np.testing.assert_allclose(vector(slerp(a, b, 1.0)), v, atol=1e-12)
        points = [vector(slerp(a, b, t)) for t in np.linspace(0, 1, 6)]
        norms = [np.linalg.norm(p) for p in points]
        np.testing.assert_allclose(norms, np.linspace(norms[0], norms[-1], 6), rtol=1e-12)
        steps = [np.arccos(p @ q / np.linalg.norm(p) / np.linalg.norm(q)) for p, q in itertools.pairwise(points)]
        whole = np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
        np.testing.assert_allclose(steps, whole / 5, rtol=1e-9)
        near = jax.tree.map(lambda x: 2 * x, a)
        np.testing.assert_allclose(vector(slerp(a, near, 0.25)), 1.25 * u, rtol=1e-12)
        assert np.isfinite(jax.grad(lambda t: tree.dot(slerp(a, near, t), a))(0.5))


def test_the_karcher_mean():
    with X64():
        a, b, c = delta(1), delta(40), jax.tree.map(lambda x: 2 * x, delta(50))
        close(karcher_mean([a, c]), slerp(a, c, 0.5))
        close(karcher_mean([a, c], [1.0, 3.0]), slerp(a, c, 0.75))
        close(karcher_mean([a]), a)
        # Its defining property: the tangents to the points cancel.
        points, weights = [vector(x) / np.linalg.norm(vector(x)) for x in (a, b, c)], [0.5, 0.2, 0.3]
        found = vector(karcher_mean([a, b, c], weights))
        norms = [np.linalg.norm(vector(x)) for x in (a, b, c)]
        np.testing.assert_allclose(np.linalg.norm(found), np.dot(weights, norms), rtol=1e-12)
        mean = found / np.linalg.norm(found)
        pull = sum(
            w * np.arccos(mean @ p) * (p - (mean @ p) * mean) / np.linalg.norm(p - (mean @ p) * mean)
            for w, p in zip(weights, points, strict=True)
        )
        assert np.linalg.norm(pull) < 1e-12


def test_model_stock_is_the_point_nearest_to_the_centre():
    with X64():
        # Models scattered at right angles around a centre, the base at a right angle, too: the merged one is the point
        # of their affine hull nearest to the centre. Two layers with radii of their own, each its own hull.
        basis = np.linalg.qr(normal(3, 20, 20))[0]
        start, models = np.zeros((2, 4, 5)), np.zeros((3, 2, 4, 5))
        expected = np.zeros((2, 4, 5))
        for layer, (far, radius) in enumerate([(1.0, 2.0), (3.0, 0.5)]):
            points = np.stack([far * basis[0], *(radius * basis[1:4])])
            start[layer], models[:, layer] = points[0].reshape(4, 5), points[1:].reshape(3, 4, 5)
            hull = (points[1:] - points[0]).T
            expected[layer] = (points[0] - hull @ np.linalg.lstsq(hull, points[0])[0]).reshape(4, 5)
        found = model_stock({"blocks": {"w": start}}, [{"blocks": {"w": m - start}} for m in models])
        close(found, {"blocks": {"w": expected}})
        # Orthogonal task vectors agree on nothing: the base. Equal ones: the model.
        frames = [{"w": basis[i].reshape(2, 10)} for i in range(3)]
        close(model_stock({"w": np.ones((2, 10))}, frames), {"w": np.ones((2, 10))})
        close(model_stock({"w": np.ones((2, 10))}, [frames[0]] * 3), {"w": 1 + frames[0]["w"]})
        opposite = [frames[0], {"w": -frames[0]["w"]}]
        close(model_stock({"w": np.ones((2, 10))}, opposite), {"w": np.ones((2, 10))})
        # Rows that are layers.
        rows = [{"w": np.stack([basis[0, :10], basis[i, :10]])} for i in (1, 1)]
        rows[1]["w"] = np.stack([rows[0]["w"][0], -rows[0]["w"][1]])
        found = model_stock({"w": np.zeros((2, 10))}, rows, stacked="w")
        close(found, {"w": np.stack([rows[0]["w"][0], np.zeros(10)])})


def test_tsv_of_one_and_of_orthogonal_tasks():
    with X64():
        close(tsv(base(), [delta(7)]), compose(base(), [delta(7)]))
        # Tasks whose row and column spaces are orthogonal don't interfere: their sum.
        left, right = np.linalg.qr(normal(0, 2, 6, 6))[0], np.linalg.qr(normal(1, 2, 4, 4))[0]
        first = left[:, :, :2] * [3.0, 2.0] @ right[:, :2]
        second = left[:, :, 2:4] * [5.0, 1.0] @ right[:, 2:]
        zero = {"w": np.zeros((2, 6, 4))}
        close(tsv(zero, [{"w": first}, {"w": second}], [1.0, 0.5], scale=2.0, stacked="w"), {"w": 2 * first + second})
        # A task of rank one leaves the other's directions alone.
        thin = left[:, :, 2:3] * 4.0 @ right[:, 2:3]
        close(tsv(zero, [{"w": first}, {"w": thin}], stacked="w"), {"w": first + thin})


def test_tsv_and_iso_are_the_loop_over_layers():
    with X64():
        deltas = [delta(s) for s in (1, 4)]
        found, even = tsv(base(), deltas, scale=0.8), iso(base(), deltas, [1.0, 2.0], scale=0.8)
        for layer in range(2):
            u, s, v = zip(
                *(np.linalg.svd(d["blocks"]["kernel"][layer], full_matrices=False) for d in deltas), strict=True
            )
            columns, rows = np.concatenate([x[:, :1] for x in u], 1), np.concatenate([x[:1] for x in v])

            def polar(x):
                values, vectors = np.linalg.eigh(x.T @ x)
                return x @ vectors @ np.diag(values**-0.5) @ vectors.T

            merged = polar(columns) @ np.diag([x[0] for x in s]) @ polar(rows.T).T
            kernel = base()["blocks"]["kernel"][layer]
            np.testing.assert_allclose(found["blocks"]["kernel"][layer], kernel + 0.8 * merged, atol=1e-12)
            total = deltas[0]["blocks"]["kernel"][layer] + 2 * deltas[1]["blocks"]["kernel"][layer]
            flat = np.linalg.svd(total, compute_uv=False).mean() * polar(total)
            np.testing.assert_allclose(even["blocks"]["kernel"][layer], kernel + 0.8 * flat, atol=1e-12)
        np.testing.assert_allclose(
            tsv(base(), deltas, stacked="blocks")["blocks"]["bias"],
            base()["blocks"]["bias"] + np.mean([d["blocks"]["bias"] for d in deltas], axis=0),
            atol=1e-12,
        )
        # Of a low-rank sum only its own directions are evened out.
        a, b = np.linalg.qr(normal(0, 6, 2))[0], np.linalg.qr(normal(1, 5, 2))[0]
        close(iso({"w": np.zeros((6, 5))}, [{"w": a * [3.0, 1.0] @ b.T}]), {"w": 2 * a @ b.T})


def test_fisher_weights_find_the_optimum_of_diagonal_quadratics():
    with X64():
        fishers = [jax.tree.map(lambda x: x**2, delta(s)) for s in (60, 70, 80)]
        models = [delta(s) for s in (1, 4, 7)]
        w = np.array([0.2, 0.5, 0.3])
        f, x = (np.stack([vector(a) for a in trees]) for trees in (fishers, models))
        expected = (w[:, None] * f * x).sum(0) / (w[:, None] * f).sum(0)
        np.testing.assert_allclose(vector(fisher_merge(models, fishers, w)), expected, rtol=1e-9)
        counted = [FisherDiagonal(jax.tree.map(lambda y: 7 * y, g), jnp.array(7), jnp.array(1.0)) for g in fishers]
        np.testing.assert_allclose(vector(fisher_merge(models, counted, w)), expected, rtol=1e-9)
        damped = (w[:, None] * (f + 0.3) * x).sum(0) / (w[:, None] * (f + 0.3)).sum(0)
        np.testing.assert_allclose(vector(fisher_merge(models, fishers, w, damping=0.3)), damped, rtol=1e-9)
        # Equal isotropic curvature, and none: the average.
        for value in (2.0, 0.0):
            flat = [jax.tree.map(lambda y, v=value: np.full_like(y, v), delta(1))] * 3
            np.testing.assert_allclose(vector(fisher_merge(models, flat)), x.mean(0), rtol=1e-9, atol=1e-12)
        partly = [{"head": g["head"], "more": np.ones(3)} for g in fishers]
        found = fisher_merge(models, partly)
        np.testing.assert_allclose(found["blocks"]["bias"], np.mean([m["blocks"]["bias"] for m in models], 0))
        assert np.abs(found["head"] - np.mean([m["head"] for m in models], 0)).max() > 0.01


def linear_model():
    """A classifier with a bias that has no factors, two modules, and one of each thing that rules need."""
    start = {"w": normal(0, 4, 3), "b": normal(1, 3)}
    deltas = [{"w": 0.3 * normal(2, 4, 3), "b": None}, {"w": 0.3 * normal(3, 4, 3), "b": 0.3 * normal(4, 3)}]
    x = normal(5, 9, 4)

    def loss(p, x):
        return -jnp.mean(jax.nn.log_softmax(x @ p["w"] + p["b"])[:, 0])

    layout = (("w", Dense((), (0,), (1,), (4, 3), 1)),)
    given = {
        "key": jax.random.key(0),
        "fishers": [{"w": normal(s, 4, 3) ** 2, "b": normal(s, 3) ** 2} for s in (6, 7)],
        "factors": [
            Kronecker({"w": jnp.asarray(x.T @ x / 9)}, {"w": jnp.eye(3) * s}, jnp.array(9), layout) for s in (1, 2)
        ],
        "matvecs": [lambda v, s=s: jax.tree.map(lambda leaf: s * leaf, v) for s in (1, 2)],
        "landscape": landscape(loss, start, deltas, x),
        "task": 1,
        "unlabelled": [Unlabelled(lambda p, x: x @ p["w"] + p["b"], [x])] * 2,
        "loss": loss,
        "batches": [(x,)],
    }
    return start, deltas, given


def test_every_rule_runs_by_its_name_with_holes_and_without_what_it_does_not_need():
    with X64():
        start, deltas, given = linear_model()
        for name, rule in RULES.items():
            options = {"damping": 1e-3} if name in ("kronecker", "regmean", "ggn") else {}
            options |= {"stacked": "w"} if name == "lines" else {"steps": 2} if name == "adamerging" else {}
            merged = merge(name, start, deltas, **given, **options)
            assert jax.tree.structure(merged) == jax.tree.structure(start)
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(merged)), name
            if name in ("average", "dare", "fisher", "regmean"):  # the others take a while to compile
                close(merge(name, start, deltas, **{k: given[k] for k in rule.needs}, **options), merged, rtol=1e-9)
            for what in rule.needs:
                rest = {k: v for k, v in given.items() if k != what}
                with pytest.raises(ValueError, match=f"the rule '{name}' needs {what} .*(compo_jax|jax.random)"):
                    merge(name, start, deltas, **rest)
        best = given["landscape"].best_weights(simplex=False)
        close(merge("best_weights", start, deltas, **given, simplex=False), compose(start, deltas, best))
        close(merge("average", start, deltas, weights=[1.0, 2.0]), compose(start, deltas, [1.0, 2.0]))
        close(merge("slerp", start, deltas, t=1.0), compose(start, deltas, [0.0, 1.0]), rtol=1e-9)
        solved = solve_merge(start, deltas, given["matvecs"], [0.3, 0.7], 0.1)
        close(merge("ggn", start, deltas, **given, weights=[0.3, 0.7], damping=0.1), solved.params, rtol=1e-9)
        behind = merge("dare", start, deltas, **given, rate=0.0, rule="fisher")
        close(behind, merge("fisher", start, deltas, **given))


def test_the_rules_may_be_jitted():
    start = {"w": jnp.asarray(normal(0, 2, 4, 3), jnp.float32), "b": jnp.ones(3)}
    deltas = [{"w": jnp.asarray(normal(s, 2, 4, 3), jnp.float32), "b": None} for s in (1, 2)]
    flat = [jax.tree.map(jnp.ones_like, start)] * 2
    given = {"key": jax.random.key(0), "fishers": flat, "matvecs": [lambda v: v, lambda v: v]}
    for name in ("ties", "dare", "karcher", "model_stock", "iso", "ggn"):
        function = functools.partial(merge, name, **given)
        for found, expected in zip(
            jax.tree.leaves(jax.jit(function)(start, deltas)), jax.tree.leaves(function(start, deltas)), strict=True
        ):
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_stacked_is_said_by_a_pattern():
    with X64():
        deltas = [
            {"blocks": {"w": normal(s, 3, 4, 2), "b": normal(s + 1, 3, 4)}, "qkv": normal(s + 2, 3, 4, 2)}
            for s in (1, 4)
        ]
        start = jax.tree.map(np.zeros_like, deltas[0])
        for rule in (tsv, iso, model_stock):
            merged = rule(start, deltas)
            for layer in range(3):  # each layer of a stack, biases too, as if it were alone
                alone = lambda x, at=layer: {"w": x["blocks"]["w"][at], "b": x["blocks"]["b"][at]}
                close(alone(merged), rule(alone(start), [alone(d) for d in deltas]))
            # An attention kernel (in, heads, head_dim) is no stack, but one matrix against its last axis.
            folded = lambda x: {"qkv": x["qkv"].reshape(12, 2)}
            close(folded(merged), rule(folded(start), [folded(d) for d in deltas]))
            listed = rule([start["qkv"]], [[d["qkv"]] for d in deltas], stacked="^0$")
            close(listed[0][1], rule([start["qkv"][1]], [[d["qkv"][1]] for d in deltas])[0])
            for stacked, told in (("(", "no regular expression"), ("nowhere", "'nowhere' matches no parameter")):
                with pytest.raises(ValueError, match=told):
                    rule(start, deltas, stacked=stacked)
            uneven = {"blocks": {"w": np.ones((4, 2)), "b": np.ones(2)}}
            with pytest.raises(
                ValueError, match=r"under blocks/ would be stacks of different numbers of layers \(blocks/b 2"
            ):
                rule(uneven, [uneven, uneven])


def test_full_parameters_for_a_delta_are_told():
    start = {"w": jnp.asarray(normal(0, 40, 30)), "b": jnp.zeros(30)}
    tuned = jax.tree.map(lambda x: x + 0.3 * normal(1, *x.shape).astype(np.float32), start)
    for rule in (compose, ties, model_stock):
        with pytest.warns(UserWarning, match=r"delta 1 is as large as the base and points where .*task_vector"):
            rule(start, [delta_of(5, start), tuned])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for large in (delta_of(2, start, 30.0), jax.tree.map(jnp.negative, start), task_vector(tuned, start)):
            compose(start, [large])
        jax.jit(compose)(start, [tuned])
        compose({"w": jnp.ones(2)}, [{"w": 0.6 * jnp.ones(2)}])  # too few numbers to tell


def delta_of(seed, like, scale=1.0):
    return jax.tree.map(lambda x: jnp.asarray(scale * normal(seed, *x.shape), jnp.float32), like)


def test_a_lora_delta_in_16_bits_keeps_its_rank():
    low = normal(0, 48, 3) @ normal(1, 3, 32) / 10
    rounded = {"w": jnp.asarray(low, jnp.bfloat16)}
    exact = iso({"w": jnp.zeros((48, 32))}, [{"w": jnp.asarray(low, jnp.float32)}])["w"]
    found = iso({"w": jnp.zeros((48, 32))}, [rounded])["w"]
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)


def test_constants_of_a_traced_function_are_looked_at():
    start, bad = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, np.nan, 0.0])}
    with pytest.raises(ValueError, match="delta 0 holds NaN or infinite numbers in w"):
        jax.jit(lambda scale: ties(start, [bad], scale=scale))(1.0)


def test_constants_of_a_traced_function_are_merged():
    start, deltas = {"w": jnp.ones(30)}, [{"w": jnp.asarray(normal(s, 30), jnp.float32)} for s in (1, 2)]
    for rule, options in {"average": {}, "ties": {}, "dare": {"key": jax.random.key(0)}, "karcher": {}}.items():
        call = functools.partial(merge, rule, start, deltas, **options)
        found = jax.jit(lambda x, call=call: x + call()["w"])(jnp.zeros(30))
        np.testing.assert_allclose(found, call()["w"], rtol=1e-6)


def test_what_is_spread_over_devices_is_merged_where_it_is():
    devices = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("x"))
    start, *deltas = [{"w": jnp.asarray(normal(s, 4, 3), jnp.float32)} for s in range(4)]
    for rule, options in {"average": {}, "ties": {}, "dare": {"key": jax.random.key(0)}, "model_stock": {}}.items():
        found = merge(rule, jax.device_put(start, place), jax.device_put(deltas, place), **options)["w"]
        assert found.sharding.is_equivalent_to(place, 2)
        np.testing.assert_allclose(found, merge(rule, start, deltas, **options)["w"], rtol=1e-5)


def test_bad_input():
    start, one = {"w": jnp.ones((2, 3)), "n": jnp.array(1)}, {"w": jnp.ones((2, 3)), "n": None}
    with pytest.raises(ValueError, match="unknown rule 'mean'; known are average, task_arithmetic, ties"):
        merge("mean", start, [one])
    with pytest.raises(ValueError, match="unknown rule 'mean'; known are"):
        merge("dare", start, [one], key=jax.random.key(0), rule="mean")
    with pytest.raises(ValueError, match="'slerp' takes no weights"):
        merge("slerp", start, [one, one], weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="slerp is of two modules, and 3 were given"):
        merge("slerp", start, [one] * 3)
    with pytest.raises(ValueError, match="1 modules were given, and this rule composes 2 or more"):
        model_stock(start, [one])
    with pytest.raises(ValueError, match="0 modules were given"):
        compose(start, [])
    with pytest.raises(ValueError, match=r"delta 1 doesn't fit the parameters: w is \(3,\) and should be \(2, 3\)"):
        ties(start, [one, {"w": jnp.ones(3), "n": None}])
    with pytest.raises(ValueError, match="what the deltas are added to has a leaf n of type int32"):
        compose(start, [{"w": None, "n": jnp.array(1.0)}])
    with pytest.raises(ValueError, match="1 weights were given for 2 modules"):
        compose(start, [one, one], [1.0])
    with pytest.raises(ValueError, match="can't be negative, nor all zero"):
        ties(start, [one, one], [1.0, -1.0])
    with pytest.raises(ValueError, match="can't be negative, nor all zero"):
        fisher_merge([one, one], [one, one], [0.0, 0.0])
    with pytest.raises(ValueError, match="aren't all finite"):
        compose(start, [one], [np.nan])
    with pytest.raises(ValueError, match="density is the fraction"):
        trim(one, 0.0)
    with pytest.raises(ValueError, match="rate is the probability"):
        drop(jax.random.key(0), one, 1.0)
    minus, zero = jax.tree.map(jnp.negative, one), jax.tree.map(jnp.zeros_like, one)
    with pytest.raises(ValueError, match="opposite directions"):
        slerp(one, minus, 0.5)
    with pytest.raises(ValueError, match="cancel"):
        karcher_mean([one, minus])
    with pytest.raises(ValueError, match="neither zero nor infinite"):
        slerp(one, zero, 0.5)
    with pytest.raises(ValueError, match="tree 1 has another structure than tree 0"):
        slerp({"w": jnp.ones(3), "b": jnp.ones(3)}, {"w": jnp.ones(3), "b": None}, 0.5)
    with pytest.raises(ValueError, match="1 Fishers were given for 2 models"):
        fisher_merge([one, one], [one])
    with pytest.raises(ValueError, match="Fisher 0 covers none of the merged leaves"):
        fisher_merge([one, one], [{"v": jnp.ones(3)}] * 2)
    with pytest.raises(ValueError, match="entry in w that is negative"):
        fisher_merge([one, one], [minus, one])
    with pytest.raises(ValueError, match="has a leaf n of type"):
        task_vector(start, start)


@pytest.mark.parametrize("tasks", [2, 5, 10])
def test_composing_moves_each_module_once_and_the_base_twice(tasks):
    """In XLA's count: T full deltas and the base in, the composition out; LoRA modules by their exact sum."""
    weights = {"kernel": jnp.zeros((2, 256, 256)), "bias": jnp.zeros(256)}
    size = sum(x.nbytes for x in weights.values())

    def moved(function, modules):
        return jax.jit(function).lower(weights, modules).compile().cost_analysis()["bytes accessed"] / size

    deltas = [{"kernel": jnp.ones((2, 256, 256)), "bias": None}] * tasks
    assert moved(compose, deltas) <= tasks + 2
    adapter = adapters.lora(4, targets="kernel", stacked="kernel")
    modules = [adapter.init(jax.random.key(t), weights) for t in range(tasks)]

    def summed(base, modules):
        return tree.add(base, adapter.delta(adapter.sum(modules, base, [1 / tasks] * tasks), base))

    if tasks > 2:  # the product of the factors is written once and read once, whatever their number
        assert moved(summed, modules) <= tasks + 2


@pytest.mark.parametrize("frozen_base", [True, False])
def test_frozen_and_plain_dictionaries_are_one(frozen_base):
    start = {"a": {"w": jnp.asarray(normal(0, 4, 3), jnp.float32)}}
    deltas = [delta_of(seed, start) for seed in (1, 2)]
    fishers = [jax.tree.map(jnp.square, d) for d in deltas]
    mixed, others = (freeze(start), deltas) if frozen_base else (start, [freeze(deltas[0]), deltas[1]])
    for rule in ("average", "ties", "karcher", "slerp", "tsv", "fisher"):
        found = merge(rule, mixed, others, fishers=fishers)
        assert type(found) is type(mixed)
        close(found["a"]["w"], merge(rule, start, deltas, fishers=fishers)["a"]["w"])
    vector = task_vector(others[1], mixed)
    assert type(vector) is type(mixed)
    close(vector["a"]["w"], deltas[1]["a"]["w"] - start["a"]["w"])
    assert type(slerp(mixed, others[1], 0.5)) is type(mixed)


def test_an_infinity_of_the_base_that_stays_is_no_fault_of_the_merge():
    start = {"w": jnp.ones((3, 2)), "b": jnp.array([1.0, -jnp.inf])}
    deltas = [{"w": jnp.full((3, 2), 0.1 * t), "b": jnp.array([0.2, 0.0])} for t in (1, 2)]
    for rule in ("average", "ties", "tsv", "model_stock"):
        merged = merge(rule, start, deltas)
        assert merged["b"][1] == -jnp.inf and np.isfinite(merged["b"][0]) and np.all(np.isfinite(merged["w"]))
    half = jax.tree.map(lambda x: x.astype(jnp.float16), start)
    large = {"w": None, "b": jnp.array([6e4, 0.0])}
    with pytest.raises(ValueError, match=r"numbers too large for their type come out in b \(float16\)"):
        task_arithmetic(half, [large], scale=2.0)
    with pytest.raises(ValueError, match="the base holds NaN or infinite numbers in w:"):
        compose(start | {"w": start["w"].at[0, 0].set(jnp.nan)}, deltas)


def test_weights_may_come_from_a_generator():
    start = {"w": jnp.zeros(3)}
    deltas = [{"w": jnp.full(3, float(t))} for t in (1, 2)]
    for rule in (compose, task_arithmetic, ties, fisher_of(deltas)):
        close(rule(start, deltas, (w for w in (0.25, 0.75)))["w"], rule(start, deltas, [0.25, 0.75])["w"])
    with pytest.raises(ValueError, match="1 weights were given for 2"):
        compose(start, deltas, iter([1.0]))


def fisher_of(deltas):
    fishers = [FisherDiagonal(d, jnp.array(2), jnp.array(1.0)) for d in deltas]
    return lambda start, deltas, weights: merge("fisher", start, deltas, weights=weights, fishers=fishers)


def test_a_fisher_of_no_images_is_told():
    models = [{"w": jnp.ones(3)}] * 2
    with pytest.raises(ValueError, match="the mean of a Fisher over 0 images"):
        fisher_merge(models, [FisherDiagonal({"w": jnp.ones(3)}, jnp.array(0), jnp.array(1.0))] * 2)
