"""Pytree algebra: holes, paths, sums, other containers, and what is wrong with a tree."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax import tree

PARAMS = {"block": {"qkv": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}, "head": [jnp.arange(4.0)]}


def test_partition_and_combine_are_inverse_and_disjoint():
    kept, rest = tree.partition(PARAMS, [r"kernel$", r"^head"])
    assert tree.names(kept) == ["block/qkv/kernel", "head/0"]
    assert tree.names(rest) == ["block/qkv/bias"]
    back = tree.combine(rest, kept)
    assert jax.tree.structure(back) == jax.tree.structure(PARAMS)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(PARAMS), strict=True))


def test_partition_that_keeps_nothing_lists_the_parameters():
    with pytest.raises(ValueError, match="block/qkv/bias, block/qkv/kernel, head/0"):
        tree.partition(PARAMS, "fc1")


def test_first_match_wins():
    assert tree.first_match("a/qkv/kernel", [("qkv", 3), ("kernel", 1)]) == 3
    assert tree.first_match("a/proj/kernel", [("qkv", 3), ("kernel", 1)]) == 1
    assert tree.first_match("a/bias", [("qkv", 3)], default=7) == 7


def test_add_leaves_holes_untouched():
    delta = {"block": {"qkv": {"kernel": jnp.full((2, 3), 2.0), "bias": None}}, "head": [None]}
    out = tree.add(PARAMS, delta, 0.5)
    np.testing.assert_array_equal(out["block"]["qkv"]["kernel"], 2 * np.ones((2, 3)))
    assert out["block"]["qkv"]["bias"] is PARAMS["block"]["qkv"]["bias"]


def test_weighted_sum_counts_none_as_zero():
    a, b = {"x": jnp.ones(2), "y": None}, {"x": jnp.full(2, 3.0), "y": jnp.ones(1)}
    out = tree.weighted_sum([a, b], [2.0, 0.5])
    np.testing.assert_array_equal(out["x"], [3.5, 3.5])
    np.testing.assert_array_equal(out["y"], [0.5])
    with pytest.raises(ValueError, match="at least one"):
        tree.weighted_sum([], [])


def test_dot_is_the_inner_product_over_common_leaves():
    a, b = {"x": jnp.arange(3.0), "y": jnp.ones(2)}, {"x": jnp.arange(3.0) + 1, "y": None}
    assert float(tree.dot(a, b)) == 0 * 1 + 1 * 2 + 2 * 3


def test_fingerprint_sees_values_names_shapes_and_dtypes_and_not_where_they_live():
    original = tree.fingerprint(PARAMS)
    assert original == tree.fingerprint(jax.tree.map(np.asarray, PARAMS))
    changed = [
        {**PARAMS, "head": [PARAMS["head"][0].at[1].add(1e-6)]},
        {**PARAMS, "head": [PARAMS["head"][0].reshape(2, 2)]},
        {**PARAMS, "head": [PARAMS["head"][0].astype(jnp.bfloat16)]},
        {"block": PARAMS["block"], "tail": PARAMS["head"]},
    ]
    assert len({original, *map(tree.fingerprint, changed)}) == 5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("terms", [1, 64, 1000])
def test_a_weighted_sum_of_many_is_right_to_one_rounding(dtype, terms):
    term = {"w": jnp.full(64, 0.01, dtype)}
    exact = float(np.float64(term["w"][0]))
    total = tree.weighted_sum([term] * terms, [1 / terms] * terms)["w"]
    assert total.dtype == dtype
    np.testing.assert_allclose(np.asarray(total, np.float64), exact, rtol=max(float(jnp.finfo(dtype).eps), 3e-5))


def test_a_weighted_sum_in_float64_is_summed_in_float64():
    with jax.enable_x64(True):
        values = np.random.default_rng(0).standard_normal((50, 7))
        total = tree.weighted_sum([{"w": jnp.asarray(v)} for v in values], [0.02] * 50)["w"]
        np.testing.assert_allclose(np.asarray(total), values.mean(axis=0), rtol=1e-13, atol=1e-15)


def test_a_wide_sum_is_not_rounded_before_it_is_added():
    deltas = [{"w": jnp.full(8, 0.01, jnp.bfloat16)}] * 64
    out = tree.add({"w": jnp.ones(8, jnp.bfloat16)}, tree.weighted_sum(deltas, [1.0] * 64, wide=True))["w"]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out), np.asarray(1 + 64 * np.float32(deltas[0]["w"][0]), out.dtype))


def test_counts_add_up_and_are_averaged():
    a, b = {"count": jnp.int32(10)}, {"count": jnp.int32(20)}
    assert float(tree.weighted_sum([a, b], [0.5, 0.5])["count"]) == 15
    added = tree.weighted_sum([a, b], [1, 1])["count"]
    assert int(added) == 30 and jnp.issubdtype(added.dtype, jnp.integer)
    assert int(tree.add(a, b)["count"]) == 30
    with pytest.raises(ValueError, match="count is of type int32"):
        tree.add(a, b, 0.5)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0]])
def test_a_weighted_sum_needs_one_weight_for_each_tree(weights):
    with pytest.raises(ValueError, match="one weight for each tree"):
        tree.weighted_sum([{"x": jnp.ones(2)}] * 2, weights)


def test_a_weighted_sum_reads_one_tree_at_a_time():
    alive = []
    most = 0

    class Leaf(np.ndarray):
        pass

    def made():
        nonlocal most
        for _ in range(5):
            leaf = np.ones(3).view(Leaf)
            alive.append(weakref.ref(leaf))
            most = max(most, sum(ref() is not None for ref in alive))
            yield {"x": leaf}
            del leaf

    tree.weighted_sum(made(), [1.0] * 5)
    assert most == 1


def test_adding_keeps_the_bases_types_and_refuses_other_shapes():
    base = {"w": jnp.ones(3, jnp.bfloat16)}
    assert tree.add(base, {"w": jnp.ones(3, jnp.float32)})["w"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"w is \(3,\) and what is added to it \(1,\)"):
        tree.add(base, {"w": jnp.ones(1)})


def test_dot_does_not_overflow_in_half_precision_and_refuses_other_shapes():
    twos = {"x": jnp.full(90_000, 2, jnp.float16)}
    assert float(tree.dot(twos, twos)) == 360_000
    with pytest.raises(ValueError, match=r"x is \(2, 3\) in the one tree and \(3, 2\)"):
        tree.dot({"x": jnp.ones((2, 3))}, {"x": jnp.ones((3, 2))})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad):
    good = {"a": jnp.ones(2), "b": {"c": jnp.ones(2), "count": jnp.int32(3)}, "d": None}
    tree.require_finite(good, "module x")
    with pytest.raises(ValueError, match="module x holds NaN or infinite numbers in b/c: .*check_finite=False"):
        tree.require_finite({**good, "b": {"c": jnp.array([1, bad], jnp.bfloat16), "count": jnp.int32(3)}}, "module x")
    jax.jit(lambda x: [tree.require_finite({"x": x}, "traced"), x][1])(jnp.float32(bad))


@pytest.mark.parametrize("large", [1e300, np.float64(1e300), np.array([1e300])])
def test_large_numbers_of_64_bits_are_finite(large):
    tree.require_finite({"x": large}, "module x")


def test_integers_move_by_whole_traced_scales_and_by_no_nan():
    counts = {"n": jnp.int32(3)}
    assert int(jax.jit(lambda s: tree.add(counts, counts, s))(2)["n"]) == 9
    for scale in (np.nan, np.inf, 0.5, jnp.float32(0.5)):
        with pytest.raises(ValueError, match="n is of type int32 and can't move by a fraction"):
            tree.add(counts, counts, scale)


def test_leaves_by_name_are_placed_again():
    holed = {"block": {"qkv": {"kernel": jnp.ones((2, 3)), "bias": None}}, "head": [jnp.arange(4.0)]}
    values = tree.by_name(holed)
    assert list(values) == ["block/qkv/kernel", "head/0"]
    back = tree.place(values, PARAMS)
    assert jax.tree.structure(back) == jax.tree.structure(holed)
    assert back["head"][0] is holed["head"][0]


def test_other_containers_go_into_dictionaries_and_come_back():
    tracked = [(jnp.ones(2), {"bias": None}), jnp.zeros(3)]
    plain = tree.nested(tracked)
    assert plain.keys() == {"0", "1"} and plain["0"]["1"] == {"bias": None}
    like = [(jnp.ones(2), {"bias": jnp.ones(1)}), jnp.zeros(3)]
    assert jax.tree.structure(tree.regrown(plain, like)) == jax.tree.structure(tracked)
    entries = {"0": {"0": {"a": jnp.ones(1)}}}  # in the place of a leaf, whatever there is
    assert tree.regrown(entries, like)[0][0] == entries["0"]["0"]
    with pytest.raises(ValueError, match="there is no 0/2, x among 0/0, 0/1/bias, 1"):
        tree.regrown({"x": jnp.ones(1), "0": {"2": jnp.ones(1)}}, like)


def test_mismatches_are_listed_by_kind():
    lines = tree.mismatches({"a": (2,), "b": (3,), "d": (1,)}, {"a": (2,), "b": (4,), "c": (5,)})
    assert lines == ["missing (1): c", "unexpected (1): d (1,)", "mis-shaped (1): b (3,) instead of (4,)"]
    assert not tree.mismatches({"a": (2,)}, {"a": (2,)})
