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
