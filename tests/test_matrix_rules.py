"""Rules that go from matrix to matrix, and rules around other rules, held against loops in NumPy: one row a rule."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import close, normal

from compo_jax import tree
from compo_jax.compose import boost, compose, iso, merge, wudi

X64 = functools.partial(jax.enable_x64, True)
SHAPES = {"blocks/kernel": (2, 6, 5), "blocks/bias": (2, 5), "head": (4, 6), "conv": (2, 2, 3), "gain": (4,)}
RANK = {"smoothing": None, "density": None, "mask": False}


def nest(flat):
    blocks = {name.split("/")[1]: x for name, x in flat.items() if "/" in name}
    return {"blocks": blocks} | {name: x for name, x in flat.items() if "/" not in name}


def parameters(seed, scale=1.0):
    return nest({name: normal((seed, i), *shape, scale=scale) for i, (name, shape) in enumerate(SHAPES.items())})


def modules(count):
    return [parameters(t + 1, 0.3) for t in range(count)]


def polar(x):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    real = s > 1e-9 * s[0]
    return u[:, real] @ v[real]


def cut(x, count):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return u[:, :count], s[:count], v[:count]


def wudi_loop(xs):
    grams = [x @ x.T / np.sum(x**2) for x in xs]
    return np.linalg.pinv(sum(grams)) @ sum(g @ x for g, x in zip(grams, xs, strict=True))


def iso_cts_loop(xs, common=0.8):
    rank = min(xs[0].shape)
    alone = min(round((rank - int(common * rank)) / len(xs)), rank // len(xs))
    top = cut(sum(xs), rank - alone * len(xs))
    parts = [top, *[cut(x - x @ top[2].T @ top[2], alone) for x in xs]]
    left, values, right = (
        np.hstack([p[0] for p in parts]),
        np.hstack([p[1] for p in parts]),
        np.vstack([p[2] for p in parts]),
    )
    return values.mean() * polar(left) @ polar(right)


def cart_loop(xs, rank, scale):
    mean = np.mean(xs, axis=0)
    rest = [cut(x - mean, int(np.ceil(rank * min(mean.shape)))) for x in xs]
    return mean + scale * sum(u * s @ v for u, s, v in rest)


def dc_loop(xs, smoothing="mean", density=1e-3, mask=True):
    count = min(xs[0].shape) // len(xs)
    parts = [cut(x, count) for x in xs]
    left, right = polar(np.hstack([p[0] for p in parts])), polar(np.vstack([p[2] for p in parts]))
    cores = []
    for u, s, v in parts:
        shares = {"mean": np.ones(count), "linear": np.linspace(min(5.0, s[0] / s[-1]), 1, count)}.get(smoothing, s)
        cores.append(left.T @ (u * s.sum() * shares / shares.sum() @ v) @ right.T)
    if density is None:
        core = np.mean(cores, axis=0)
    else:
        kept = max(1, int(density * cores[0].size))
        cores = [np.where(np.abs(m) >= np.sort(np.abs(m).ravel())[-kept], m, 0) for m in cores]
        sign, core = np.sign(sum(cores)), np.zeros_like(cores[0])
        for place in np.ndindex(*core.shape):
            agreeing = [m[place] for m in cores if m[place] != 0 and np.sign(m[place]) == sign[place]]
            core[place] = np.mean(agreeing) if agreeing else 0
    if mask:
        for i, j in np.ndindex(*core.shape):
            core[i, j] *= i // count == j // count
    return left @ core @ right


def boosted_loop(xs, beta):
    u, s, v = np.linalg.svd(np.mean(xs, axis=0), full_matrices=False)
    first = np.argmax(np.cumsum(s) / s.sum() >= beta - 1e-12)
    return u * np.maximum(s, s[first]) @ v


class Row(NamedTuple):
    """A rule with options, and what it promises.

    Attributes:
      loop: the merged matrix of a list of matrices, in NumPy.
      one: whether one module alone is kept.
      same: whether equal modules are what one of them is.
    """

    rule: str
    options: dict[str, Any]
    loop: Callable
    one: bool = True
    same: bool = True

    def merge(self, *arguments, **options):
        return merge(self.rule, *arguments, **self.options, **options)


def mean(xs):
    return np.mean(xs, axis=0)


def even(xs):
    return np.linalg.svd(sum(xs), compute_uv=False).mean() * polar(sum(xs))


ROWS = [
    Row("wudi", {}, wudi_loop),
    Row("iso_cts", {"common": 0.3}, functools.partial(iso_cts_loop, common=0.3), one=False, same=False),
    Row("iso_cts", {"common": 1.0}, even, one=False, same=False),
    Row("cart", {"rank": 0.3, "scale": 0.7}, functools.partial(cart_loop, rank=0.3, scale=0.7)),
    Row("cart", {"rank": 1.0, "scale": 5.0}, mean),
    Row("dc_merge", {}, dc_loop, one=False, same=False),
    Row("dc_merge", {"smoothing": "linear", "density": 0.4, "mask": False},
        functools.partial(dc_loop, smoothing="linear", density=0.4, mask=False), one=False, same=False),
    Row("dc_merge", RANK, functools.partial(dc_loop, **RANK), same=False),
    Row("knots", {}, mean), Row("knots", {"shared": "in"}, mean),
    Row("knots", {"rule": "iso"}, even, one=False, same=False),
    Row("core_space", {}, mean), Row("core_space", {"rule": "iso"}, even, one=False, same=False),
    Row("subspace_boosting", {"beta": 0.6}, functools.partial(boosted_loop, beta=0.6), one=False, same=False),
    Row("subspace_boosting", {"beta": 1.0}, mean),
]  # fmt: skip
IDS = [f"{row.rule}-{'-'.join(map(str, row.options.values()))}" for row in ROWS]


def expected(loop, deltas):
    """The merged delta by the loop: each layer a matrix, a convolution folded, the mean of vectors."""

    def leaf(name, *xs):
        if name in ("gain", "blocks/bias"):
            return mean(xs)
        if name == "blocks/kernel":
            return np.stack([loop([x[layer] for x in xs]) for layer in range(2)])
        return loop([x.reshape(-1, x.shape[-1]) for x in xs]).reshape(xs[0].shape)

    return tree.map_with_name(leaf, *deltas)


def minus(params, base):
    return jax.tree.map(lambda p, b: np.asarray(p) - b, params, base)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_rule_is_its_loop_over_layers_in_any_order_of_the_modules(row):
    with X64():
        base, deltas = parameters(0), modules(2)
        run = jax.jit(lambda deltas: row.merge(base, deltas))
        found = run(deltas)
        assert jax.tree.structure(found) == jax.tree.structure(base)
        close(minus(found, base), expected(row.loop, deltas), rtol=1e-9)
        close(run(deltas[::-1]), found, rtol=1e-9)
        zero = jax.tree.map(np.zeros_like, base)
        close(run([zero, zero]), base)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(run([deltas[0], zero])))
        if row.same:
            close(run(deltas[:1] * 2), compose(base, deltas[:1]), rtol=1e-9)
        else:
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(run(deltas[:1] * 2)))


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_one_module_and_thirty_and_holes_and_16_bits(row):
    with X64():
        base = {"w": normal(0, 6, 5), "b": normal(1, 5), "n": np.arange(3)}
        one = {"w": normal(2, 6, 5), "b": None, "n": None}
        found = row.merge(base, [one])
        assert found["b"] is base["b"] and found["n"] is base["n"]
        if row.one:
            close(found["w"], base["w"] + one["w"], rtol=1e-9)
    small = {"w": normal(0, 6, 5), "b": normal(1, 5)}
    many = [{"w": normal((t, 0), 6, 5, scale=0.1), "b": None if t % 2 else normal((t, 1), 5)} for t in range(30)]
    narrow = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.bfloat16))
    merged = row.merge(narrow(small), narrow(many))
    assert all(x.dtype == jnp.bfloat16 and np.all(np.isfinite(x)) for x in jax.tree.leaves(merged))
    assert np.any(merged["w"] != narrow(small)["w"])
    total = sum(np.asarray(x["b"], np.float64) for x in narrow(many) if x["b"] is not None) / 30
    np.testing.assert_allclose(np.asarray(merged["b"], np.float64), narrow(small)["b"] + total, rtol=0.01, atol=0.01)


def low_rank(seed, ranks, size_in=8, size_out=7):
    """Tasks whose inputs' and outputs' directions are orthogonal to each other's."""
    left, right = (np.linalg.qr(normal((seed, i), n, n))[0] for i, n in enumerate((size_in, size_out)))
    ends = np.cumsum(ranks)
    return [
        {"w": left[:, end - r : end] * (1.0 + np.arange(r)) @ right[:, end - r : end].T}
        for r, end in zip(ranks, ends, strict=True)
    ]


def test_tasks_that_share_no_inputs_add_up_in_wudi():
    with X64():
        zero, parts = {"w": np.zeros((8, 7))}, low_rank(0, (2, 1, 3))
        close(wudi(zero, parts)["w"], sum(x["w"] for x in parts))
        # in orthogonal coordinates of the inputs alone, too
        shared = [{"w": normal(5, 8, 8)[:, :2] @ normal(t, 2, 7)} for t in range(2)]
        gram = wudi(zero, shared)["w"]
        np.testing.assert_allclose(gram, wudi_loop([x["w"] for x in shared]), atol=1e-9)


def disturbance(merged, deltas):
    return sum(np.sum((x["w"].T @ (merged - x["w"])) ** 2) / np.sum(x["w"] ** 2) for x in deltas)


def test_wudi_by_steps_goes_from_the_sum_towards_the_closed_form():
    with X64():
        zero, deltas = {"w": np.zeros((6, 5))}, [{"w": normal(t, 6, 5)} for t in range(3)]
        total = sum(x["w"] for x in deltas)
        close(wudi(zero, deltas, iterations=0)["w"], total)
        grams = [x["w"] @ x["w"].T / np.sum(x["w"] ** 2) for x in deltas]
        slope = sum(g @ (total - x["w"]) for g, x in zip(grams, deltas, strict=True))
        close(wudi(zero, deltas, iterations=1, learning_rate=1e-3)["w"], total - 1e-3 * np.sign(slope), rtol=1e-6)
        few, many = (wudi(zero, deltas, iterations=n, learning_rate=0.01)["w"] for n in (30, 3000))
        best = disturbance(wudi(zero, deltas)["w"], deltas)
        assert disturbance(total, deltas) > disturbance(few, deltas) > disturbance(many, deltas) >= best * (1 - 1e-9)
        assert disturbance(many, deltas) < 1.01 * best
        close(wudi(zero, deltas, damping=1e9)["w"], total, rtol=1e-6)
        damped = total - np.linalg.solve(sum(grams) + 0.3 * np.eye(6), slope)
        close(wudi(zero, deltas, damping=0.3)["w"], damped)


def test_dc_merge_without_its_parts_is_the_average_of_modules_of_low_rank():
    with X64():
        zero = {"w": np.zeros((8, 7))}
        deltas = [{"w": normal((t, 0), 8, 2) @ normal((t, 1), 2, 7)} for t in range(3)]
        close(merge("dc_merge", zero, deltas, **RANK)["w"], mean([x["w"] for x in deltas]))
        # smoothing shares out the singular values of a task, and adds no direction to it
        one = merge("dc_merge", zero, deltas[:1], density=None)["w"]
        u, s, v = cut(deltas[0]["w"], 2)
        close(one, s.mean() * u @ v)


def test_iso_cts_of_low_rank_modules_has_their_directions_alone():
    with X64():
        zero = {"w": np.zeros((8, 7))}
        parts = [{"w": x["w"] * by} for x, by in zip(low_rank(0, (2, 1, 2)), (1, 1.3, 1.7), strict=True)]
        found = merge("iso_cts", zero, parts)["w"]
        assert np.sum(np.linalg.svd(found, compute_uv=False) > 1e-9) == 5
        close(found, iso(zero, parts)["w"])


def test_boosting_keeps_directions_and_lifts_the_weak_ones():
    with X64():
        delta = {"w": normal(0, 6, 5), "low": normal(1, 6, 2) @ normal(2, 2, 5), "bias": normal(3, 5), "hole": None}
        same, all_one = boost(delta, 1.0), boost(delta, 0.0)
        close(same, delta)
        for name, rank in (("w", 5), ("low", 2)):
            s = np.linalg.svd(delta[name], compute_uv=False)
            np.testing.assert_allclose(np.linalg.svd(all_one[name], compute_uv=False)[:rank], s[0])
            np.testing.assert_allclose(np.linalg.svd(all_one[name], compute_uv=False)[rank:], 0, atol=1e-9)
        close(all_one["bias"], delta["bias"])
        # behind it a rule with what it needs
        start, deltas = {"w": normal(4, 6, 5)}, [{"w": normal(t, 6, 5)} for t in (5, 6)]
        fishers = [{"w": normal(t, 6, 5) ** 2} for t in (7, 8)]
        found = merge("subspace_boosting", start, deltas, rule="fisher", fishers=fishers, beta=0.5)
        plain = merge("fisher", {"w": np.zeros((6, 5))}, deltas, fishers=fishers)
        close(found["w"] - start["w"], boost(plain, 0.5)["w"])


@pytest.mark.parametrize("rule", ["layer_weights", "adamerging", "regmean_plus"])
def test_boosting_refuses_rules_that_try_weights_on_images(rule):
    """They would be tried without the base."""
    base, delta = {"w": jnp.ones((3, 4))}, {"w": normal(0, 3, 4)}
    given = {"loss": lambda params: 0.0, "batches": [], "unlabelled": []}
    with pytest.raises(ValueError, match=f"the rule {rule!r} needs .*, to try the weights on"):
        merge("subspace_boosting", base, [delta, delta], rule=rule, **given)


def test_bad_input():
    start, one = {"w": jnp.ones((4, 3))}, {"w": jnp.arange(12.0).reshape(4, 3)}
    fishers = [one] * 2
    for rule, options, told in (
        ("iso_cts", {"common": 1.5}, "common is the part of the directions that the tasks share, from 0 to 1"),
        ("cart", {"rank": 0.0}, "rank is the part of the components that is kept, above 0"),
        ("dc_merge", {"smoothing": "flat"}, "smoothing='flat' is not among mean, linear, None"),
        ("dc_merge", {"ratio": 0.5}, "ratio is of the largest singular value to the smallest, 1 or more"),
        ("dc_merge", {"density": 0.0}, "density is the fraction of entries"),
        ("wudi", {"iterations": -1}, "iterations is a whole number"),
        ("wudi", {"learning_rate": 0.0}, "learning_rate is a positive number"),
        ("subspace_boosting", {"beta": 2.0}, "beta is the part of the singular values' sum"),
        ("knots", {"shared": "both"}, "shared='both' is not among out, in"),
        ("knots", {"rule": "fisher"}, "the rule 'fisher' needs fishers, of the weights as they are"),
        ("knots", {"rule": "none"}, "unknown rule 'none'"),
        ("core_space", {"rule": "regmean"}, "the rule 'regmean' needs factors, of the weights as they are"),
        ("core_space", {"rule": "dare"}, r"the rule 'dare' needs key \(a random key"),
        ("subspace_boosting", {"rule": "fisher"}, r"the rule 'fisher' needs fishers \(one Fisher diagonal a module"),
        ("subspace_boosting", {"rule": "slerp", "weights": [1, 1]}, "the rule 'slerp' takes no weights"),
        ("knots", {"densty": 1}, "the rule 'knots' has no option densty; its options are rule, shared, eps, stacked"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            merge(rule, start, [one, one], **options)
    merge("subspace_boosting", start, [one, one], rule="fisher", fishers=fishers)
    with pytest.raises(ValueError, match="common is .* has to be known when the rule is traced"):
        jax.jit(lambda c: merge("iso_cts", start, [one, one], common=c))(0.5)
    pair = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"delta 1 doesn't fit .* w is \(4, 3\) and its factors \(4, 2\) and \(2, 5\)"):
        merge("core_space", start, [{"w": pair}, {"w": pair | {"b": jnp.ones((2, 5))}}])
    with pytest.raises(ValueError, match="delta 0 holds NaN or infinite numbers in w/b"):
        merge("core_space", start, [{"w": pair | {"b": pair["b"].at[0, 0].set(jnp.nan)}}])
    stack = {"a": jnp.ones((2, 4, 2)), "b": jnp.ones((2, 2, 3))}
    with pytest.raises(ValueError, match=r"Core Space adapts kernels .*; w is \(2, 4, 3\)"):
        merge("core_space", {"w": jnp.ones((2, 4, 3))}, [{"w": stack}])
    with pytest.raises(ValueError, match="delta 0 doesn't fit the parameters: .*w/a is unknown"):
        merge("knots", start, [{"w": pair}])


def test_boosting_takes_no_rounding_of_narrow_modules_for_directions():
    random = np.random.default_rng(0)
    exact = [random.normal(size=(24, 3)) @ random.normal(size=(3, 16)) for _ in range(2)]
    base = {"w": jnp.zeros((24, 16), jnp.float32)}
    narrow = [{"w": jnp.asarray(x, jnp.bfloat16)} for x in exact]
    boosted = np.asarray(merge("subspace_boosting", base, narrow)["w"], np.float64)
    assert (np.linalg.svd(boosted)[1] > 0.1).sum() == 6  # and not 16
