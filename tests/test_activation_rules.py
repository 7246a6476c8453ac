"""ESM and RegMean++, which look at what goes through the layers, against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close, normal
from test_matrix_rules import polar

from compo_jax import tree
from compo_jax.compose import Unlabelled, compose, esm, merge, regmean, regmean_plus
from compo_jax.curvature import Kronecker, kronecker
from compo_jax.curvature.layers import Dense

X64 = functools.partial(jax.enable_x64, True)
LAYOUT = (("blocks/w", Dense((2,), (0,), (1,), (4, 4), 1)), ("head", Dense((), (0,), (1,), (4, 6), 1)))
PLAIN = {"power": 0.0, "sharpness": 0.0, "even": False, "scale": 1.0}


def net(params, x):
    """Two layers in a scan, with biases, and a head."""
    step = lambda x, layer: (jnp.tanh(x @ layer["w"] + layer["b"]), None)
    x, _ = jax.lax.scan(step, x, params["blocks"])
    return x @ params["head"]


def parameters(seed, scale=1.0):
    blocks = {"w": normal((seed, 0), 2, 4, 4, scale=scale), "b": normal((seed, 1), 2, 4, scale=scale)}
    return {"blocks": blocks, "head": normal((seed, 2), 4, 6, scale=scale), "steps": None}


def kernels(seed):
    """A module that changes no bias."""
    made = parameters(seed, 0.3)
    return made | {"blocks": made["blocks"] | {"b": None}}


BASE = parameters(0) | {"steps": np.array(3)}
DELTAS = [parameters(t, 0.3) for t in (1, 2)]
IMAGES = [normal((9, t), 7, 4) for t in range(2)]


def grams(seed):
    square = lambda x: x @ np.swapaxes(x, -1, -2)
    inputs = {"blocks/w": square(normal((seed, 0), 2, 4, 9)), "head": square(normal((seed, 1), 4, 9))}
    return Kronecker(jax.tree.map(jnp.asarray, inputs), {}, jnp.array(5), LAYOUT)


def esm_loop(xs, squares, power=2.0, sharpness=0.15, even=True):
    count = xs[0].shape[1] // len(xs)
    norms = [np.linalg.norm(x) for x in xs]
    lefts, rights = [], []
    for x, square, norm in zip(xs, squares, norms, strict=True):
        _, s, v = np.linalg.svd(np.linalg.cholesky(square).T @ x)
        variance = np.pad(s**2, (0, len(v) - len(s)))[:count]
        shares = (variance / variance.mean()) ** sharpness
        shares = shares / shares.mean()
        lefts.append(x @ v[:count].T * (norm / np.mean(norms)) ** power * shares)
        rights.append(v[:count].T * shares)
    left, right = np.hstack(lefts), np.hstack(rights)
    rows = np.linalg.norm(left, axis=1, keepdims=True)
    left = left * (rows / rows.mean()) ** power
    if not even:
        return left @ polar(right).T
    mean = lambda x: np.linalg.svd(x, compute_uv=False).mean()
    return mean(left) * polar(left) @ (mean(right) * polar(right)).T


@pytest.mark.parametrize("options", [{}, {"power": 1.0, "sharpness": 0.5, "even": False}])
def test_esm_is_its_loop_over_layers(options):
    with X64():
        factors = [grams(t) for t in (3, 4)]
        found = merge("esm", BASE, DELTAS, factors=factors, **options)
        layers = [
            esm_loop([d["blocks"]["w"][i] for d in DELTAS], [f.inputs["blocks/w"][i] for f in factors], **options)
            for i in range(2)
        ]
        norms = np.array([np.linalg.norm(x) for x in layers])
        power = (norms / norms.mean()) ** options.get("power", 2.0)
        close(found["blocks"]["w"] - BASE["blocks"]["w"], 2 * power[:, None, None] * np.stack(layers), rtol=1e-8)
        head = esm_loop([d["head"] for d in DELTAS], [f.inputs["head"] for f in factors], **options)
        close(found["head"] - BASE["head"], 2 * head, rtol=1e-8)
        bias = np.mean([d["blocks"]["b"] for d in DELTAS], axis=0)
        close(found["blocks"]["b"] - BASE["blocks"]["b"], bias)
        assert found["steps"] is BASE["steps"]
        close(merge("esm", BASE, DELTAS[::-1], factors=factors[::-1], **options), found, rtol=1e-8)


def test_esm_keeps_one_task_and_directions_of_the_outputs_alone():
    with X64():
        zero, one = jax.tree.map(np.zeros_like, BASE), kernels(1)
        close(esm(BASE, [one], [grams(3)], **PLAIN), compose(BASE, [one]))
        half = esm(zero, [one], [grams(3)], rank=0.5, **PLAIN)["head"]
        assert np.linalg.matrix_rank(half) == 3
        # the projection that leaves least of the outputs' change
        root = np.linalg.cholesky(grams(3).inputs["head"]).T
        missing = np.linalg.norm(root @ (one["head"] - half)) ** 2
        np.testing.assert_allclose(missing, np.sum(np.linalg.svd(root @ one["head"], compute_uv=False)[3:] ** 2))
        nothing = jax.tree.map(np.zeros_like, one)
        close(esm(BASE, [nothing, nothing], [grams(3), grams(4)]), BASE)
    narrow = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.bfloat16))
    many = [narrow(kernels(t)) for t in range(30)]
    start = narrow({name: x for name, x in BASE.items() if name != "steps"})
    many = [{name: x for name, x in d.items() if name != "steps"} for d in many]
    merged = esm(start, many, [grams(t) for t in range(30)])
    assert all(x.dtype == jnp.bfloat16 and np.all(np.isfinite(x)) for x in jax.tree.leaves(merged))


def regmean_loop(images, models, scaling):
    """Layer after layer: (merged model), each bias averaged with its layer."""
    merged = {"w": [], "b": []}
    mean = lambda xs: np.mean(xs, axis=0)

    def solved(inputs, weights):
        squares = [x.T @ x * (scaling + (1 - scaling) * np.eye(4)) for x in inputs]
        return np.linalg.solve(sum(squares), sum(s @ w for s, w in zip(squares, weights, strict=True)))

    for layer in range(2):
        merged["w"].append(solved(images, [m["blocks"]["w"][layer] for m in models]))
        merged["b"].append(mean([m["blocks"]["b"][layer] for m in models]))
        images = [np.tanh(x @ merged["w"][-1] + merged["b"][-1]) for x in images]
    blocks = {name: np.stack(x) for name, x in merged.items()}
    return {"blocks": blocks, "head": solved(images, [m["head"] for m in models])}


def test_regmean_plus_is_its_loop_and_begins_as_regmean():
    with X64():
        tasks = [Unlabelled(net, [x[:4], x[4:]]) for x in IMAGES]
        models = [tree.add(BASE, d) for d in DELTAS]
        found = merge("regmean_plus", BASE, DELTAS, unlabelled=tasks, scaling=0.9)
        close({name: found[name] for name in ("blocks", "head")}, regmean_loop(IMAGES, models, 0.9), rtol=1e-9)
        assert found["steps"] is BASE["steps"]
        moved = [kernels(t) for t in (1, 2)]
        factors = []
        for delta, x in zip(moved, IMAGES, strict=True):
            weights, rest = tree.partition(tree.add(BASE, delta), ["w$", "head"])
            apply = lambda p, x, rest=rest: net(tree.combine(p, rest), x)
            factors.append(kronecker(apply, weights, x))
        plus, plain = regmean_plus(BASE, moved, tasks), regmean(BASE, moved, factors, scaling=0.95)
        close(plus["blocks"]["w"][0], plain["blocks"]["w"][0])
        assert np.abs(plus["blocks"]["w"][1] - plain["blocks"]["w"][1]).max() > 1e-4
        close(regmean_plus(BASE, moved[:1], tasks[:1]), compose(BASE, moved[:1]))
        close(regmean_plus(BASE, moved[:1] * 2, tasks), compose(BASE, moved[:1]))


def test_layers_that_are_no_stack_are_merged_one_after_another():
    def unrolled(params, x):
        for layer in ("0", "1"):
            x = jnp.tanh(x @ params["w"][layer])
        return x @ params["head"]

    with X64():
        moved = [kernels(t) for t in (1, 2)]
        flat = lambda p: {"w": {"0": p["blocks"]["w"][0], "1": p["blocks"]["w"][1]}, "head": p["head"]}
        silent = BASE | {"blocks": BASE["blocks"] | {"b": np.zeros((2, 4))}}
        stacked = regmean_plus(silent, moved, [Unlabelled(net, [x]) for x in IMAGES])
        found = regmean_plus(flat(silent), [flat(d) for d in moved], [Unlabelled(unrolled, [x]) for x in IMAGES])
        close(found, flat(stacked))


def test_bad_input():
    tasks = [Unlabelled(net, [x]) for x in IMAGES]
    with X64():
        for changes, told in (
            ({"unlabelled": tasks[:1]}, "1 tasks' unlabelled images were given for 2 modules"),
            ({"unlabelled": [tasks[0], Unlabelled(net, [])]}, "there are no unlabelled images of task 1"),
            ({"unlabelled": [Unlabelled(lambda p, x: x, [1.0])] * 2}, "the model of task 0 has no dense layer among"),
            ({"unlabelled": [tasks[0], Unlabelled(lambda p, x: x @ p["head"], [IMAGES[1]])]},
             "the models of tasks 1 have other dense layers than that of task 0, blocks/w, head"),
            ({"unlabelled": tasks, "scaling": 2.0}, "scaling is a part of the off-diagonal entries"),
            ({"unlabelled": tasks, "damping": -1.0}, "damping is a finite number that isn't negative"),
            ({"unlabelled": [Unlabelled(net, [x[:1]]) for x in IMAGES], "scaling": 1.0}, "blocks/w.* is singular"),
            ({}, r"the rule 'regmean_plus' needs unlabelled \("),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=told):
                merge("regmean_plus", BASE, DELTAS, **changes)
        factors = [grams(3), grams(4)]
        for options, told in (
            ({"rank": 0.0}, "rank is the part of the output directions that is kept"),
            ({"power": -1.0}, "power is a finite number that isn't negative"),
            ({"factors": factors[:1]}, "1 tasks' Kronecker factors were given for 2 modules"),
            ({"weights": [-1.0, 1.0]}, "can't be negative"),
        ):
            with pytest.raises(ValueError, match=told):
                merge("esm", BASE, DELTAS, **({"factors": factors} | options))
