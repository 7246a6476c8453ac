"""Trees whose matrices are (out, in), of Equinox say: merged as the same trees turned by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

from compo_jax import tree
from compo_jax.compose import merge
from compo_jax.compose.turned import turned
from compo_jax.curvature import kronecker

SHAPES = {  # paths, and the axis that counts outputs
    "conv/weight": ((6, 3, 2, 2), 0),
    "blocks/qkv/weight": ((2, 9, 5), 1),
    "blocks/norm/weight": ((2, 5), None),
    "head/weight": ((4, 9), 0),
    "head/kernel": ((9, 4), None),
    "head/bias": ((4,), None),
}
LIKE = {"conv": {"weight": 0}, "blocks": {"qkv": {"weight": 0}, "norm": {"weight": 0}},
        "head": {"weight": 0, "kernel": 0, "bias": 0}}  # fmt: skip


def drawn(seed, scale=1.0):
    return tree.place({n: scale * normal((seed, i), *shape) for i, (n, (shape, _)) in enumerate(SHAPES.items())}, LIKE)


def by_hand(params):
    moved = {
        n: x if SHAPES[n][1] is None else np.moveaxis(x, SHAPES[n][1], -1) for n, x in tree.by_name(params).items()
    }
    return tree.place(moved, params)


OPTIONS = [
    *((name, {}) for name in ("tsv", "iso", "iso_cts", "wudi", "dc_merge", "cart", "average", "ties", "knots")),
    ("knots", {"rule": "ties"}),
    ("subspace_boosting", {"rule": "iso_cts"}),
    ("lines", {"rule": "wudi", "beta": 0.5}),
    ("dare", {"rule": "wudi", "key": jax.random.key(0), "rate": 0.0}),
    ("breadcrumbs", {"rule": "wudi", "kept": 0.6}),
]


@pytest.mark.parametrize("name, options", OPTIONS, ids=[f"{n}-{o.get('rule', '')}" for n, o in OPTIONS])
def test_matrices_whose_outputs_come_first_are_merged_as_if_they_came_last(name, options):
    base, deltas = drawn(0), [drawn(t, 0.1) for t in (1, 2, 3)]
    deltas[1]["blocks"] = None  # a module that changes nothing there
    found = merge(name, base, deltas, outputs_first="weight", **options)
    expected = merge(name, by_hand(base), [by_hand(delta) for delta in deltas], **options)
    assert tree.names(found) == tree.names(base)
    for leaf, x in tree.by_name(by_hand(found)).items():
        np.testing.assert_allclose(x, tree.by_name(expected)[leaf], rtol=1e-4, atol=1e-5, err_msg=leaf)


def test_a_rule_that_tells_inputs_from_outputs_needs_it():
    """Tasks that hear other inputs add up, in WUDI, which otherwise takes these for outputs."""
    one, other = np.zeros((4, 6)), np.zeros((4, 6))
    one[:, :3], other[:, 3:] = normal(0, 4, 3), normal(1, 4, 3)
    base, deltas = {"weight": np.zeros((4, 6))}, [{"weight": one}, {"weight": other}]
    with jax.enable_x64(True):
        told = merge("wudi", base, deltas, outputs_first="weight")["weight"]
        assert not np.allclose(merge("wudi", base, deltas)["weight"], one + other, atol=0.1)
    np.testing.assert_allclose(told, one + other, atol=1e-9)


def test_modules_of_low_rank_are_turned_in_core_space():
    """The rule inside tells inputs from outputs."""
    base = {"blocks": {"weight": np.zeros((2, 9, 5))}, "weight": np.zeros((4, 9))}
    pair = lambda t, stack, n, m: {"a": normal((t, n), *stack, n, 2), "b": normal((t, n, m), *stack, 2, m)}
    modules = [{"blocks": {"weight": pair(t, (2,), 9, 5)}, "weight": pair(t, (), 4, 9)} for t in range(2)]
    flip = lambda m: {"a": np.swapaxes(m["b"], -1, -2), "b": np.swapaxes(m["a"], -1, -2)}
    flipped = [{"blocks": {"weight": flip(m["blocks"]["weight"])}, "weight": flip(m["weight"])} for m in modules]
    other = {"blocks": {"weight": np.zeros((2, 5, 9))}, "weight": np.zeros((9, 4))}
    with jax.enable_x64(True):
        found = merge("core_space", base, modules, rule="wudi", outputs_first="weight")
        expected = merge("core_space", other, flipped, rule="wudi")
        without = merge("core_space", base, modules, rule="wudi")
    for a, b, c in zip(*map(jax.tree.leaves, (found, expected, without)), strict=True):
        np.testing.assert_allclose(np.swapaxes(a, -1, -2), b, atol=1e-9)
        assert not np.allclose(a, c, atol=1e-2)


def test_what_is_turned_comes_back_and_a_pattern_of_nothing_is_told():
    base = drawn(0)
    turn = turned(base, "weight$", ("blocks",))
    assert turn.axes == {name: axis for name, (_, axis) in SHAPES.items() if axis is not None}
    there = turn.inputs_first(base)
    jax.tree.map(np.testing.assert_array_equal, there, by_hand(base))
    jax.tree.map(np.testing.assert_array_equal, turn.outputs_first(there), base)
    with pytest.raises(ValueError, match=r"outputs_first='bias' matches no matrix; these are blocks/qkv/weight, conv"):
        merge("wudi", base, [base], outputs_first=("weight", "bias"))
    with pytest.raises(ValueError, match="no regular expression"):
        merge("wudi", base, [base], outputs_first="(")


def test_a_module_that_does_not_fit_is_told_with_the_shapes_that_it_has():
    base, delta = {"w": normal(0, 4, 6)}, {"w": normal(1, 4, 6)}
    for told, other in ((r"\(6, 4\)", normal(1, 6, 4)), (r"\(\)", np.float32(1))):
        with pytest.raises(ValueError, match=rf"w is {told} and should be \(4, 6\)"):
            merge("wudi", base, [delta, {"w": other}], outputs_first="w")
    with pytest.raises(ValueError, match="w is missing; w/a is unknown"):
        merge("core_space", base, [{"w": {"a": normal(0, 4, 2)}}] * 2, outputs_first="w")


def test_curvature_of_the_rule_inside_lies_as_the_parameters_do():
    """Subspace Boosting turns the task vector, and not the modules that another rule merges by their curvature."""
    for shape in ((4, 4), (4, 6)):
        base, deltas = {"w": normal(0, *shape)}, [{"w": normal(1 + t, *shape)} for t in range(2)]
        fishers = [{"w": normal(3 + t, *shape) ** 2} for t in range(2)]
        options = {"rule": "fisher", "beta": 0.3}
        found = merge("subspace_boosting", base, deltas, fishers=fishers, outputs_first="w", **options)["w"]
        flipped = [jax.tree.map(np.transpose, x) for x in (base, *deltas, *fishers)]
        expected = merge("subspace_boosting", flipped[0], flipped[1:3], fishers=flipped[3:], **options)["w"]
        np.testing.assert_allclose(found.T, expected, rtol=1e-5)
        curved = [lambda v, f=f: jax.tree.map(jnp.multiply, v, f) for f in fishers]
        plain = merge("epimer", base, deltas, matvecs=curved, groups="tasks")["w"]
        np.testing.assert_array_equal(
            merge("epimer", base, deltas, matvecs=curved, groups="tasks", outputs_first="w")["w"], plain
        )


def test_curvature_finds_the_inputs_by_itself():
    """Factors are found in the forward pass, and say how a weight lies."""
    with jax.enable_x64(True):
        images, base = normal(0, 40, 6), {"weight": normal(1, 4, 6)}
        deltas = [{"weight": normal(2 + t, 4, 6)} for t in range(2)]
        factors = [kronecker(lambda p, x: x @ p["weight"].T, base, images[t::2]) for t in range(2)]
        other = [
            kronecker(lambda p, x: x @ p["weight"], jax.tree.map(np.transpose, base), images[t::2]) for t in range(2)
        ]
        flipped = [jax.tree.map(np.transpose, x) for x in (base, *deltas)]
        for name, options in (("esm", {}), ("regmean", {}), ("kronecker", {"damping": 1e-2})):
            found = merge(name, base, deltas, factors=factors, outputs_first="weight", **options)["weight"]
            expected = merge(name, flipped[0], flipped[1:], factors=other, **options)["weight"]
            np.testing.assert_allclose(found.T, expected, rtol=1e-6, err_msg=name)
