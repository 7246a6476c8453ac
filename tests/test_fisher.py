"""Fisher diagonals against the dense Fisher in float64: every method, ragged batches, every kind of tree."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax.curvature import fisher_diagonal
from compo_jax.curvature.fisher import squares
from compo_jax.curvature.layers import tap
from compo_jax.models import ViT

X64 = jax.enable_x64


def mlp(classes=5):
    key = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(key[0], (3, 6), jnp.float64),
        "b": [jax.random.normal(key[1], (6, classes), jnp.float64), jnp.zeros(classes, jnp.float64)],
    }
    apply = lambda p, x: jnp.tanh(x["left"] @ p["a"] + x["right"]) @ p["b"][0] + p["b"][1]
    inputs = {"left": jax.random.normal(key[2], (7, 3), jnp.float64), "right": jnp.ones((7, 6), jnp.float64)}
    return apply, params, inputs


def tiny_vit():
    model = ViT(image_size=8, patch=4, width=8, depth=2, heads=2, classes=4)
    images = jax.random.normal(jax.random.key(1), (5, 8, 8, 3), jnp.float64)
    params = jax.tree.map(lambda x: 3 * x.astype(jnp.float64), model.init(jax.random.key(2), images)["params"])
    return lambda p, x: model.apply({"params": p}, x), params, images


def brute_force(apply, params, inputs):
    """The definition, image by image and class by class, one reverse pass each."""
    log_p = jax.jit(lambda params, image: jax.nn.log_softmax(apply(params, image)[0]))
    gradient = jax.jit(jax.grad(lambda params, image, c: log_p(params, image)[c]))
    total = jax.tree.map(np.zeros_like, params)
    for n in range(jax.tree.leaves(inputs)[0].shape[0]):
        image = jax.tree.map(lambda x: x[n : n + 1], inputs)  # noqa: B023
        for c, value in enumerate(np.exp(log_p(params, image))):
            total = jax.tree.map(lambda t, g: t + value * np.square(g), total, gradient(params, image, c))  # noqa: B023
    return total


def close(a, b, rtol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(jnp.abs(y).max()))


@pytest.mark.parametrize("case", [mlp, tiny_vit])
@pytest.mark.parametrize("chunk", [None, 3])
def test_exact_equals_brute_force(case, chunk):
    with X64(True):
        apply, params, inputs = case()
        found = jax.jit(lambda p, x: fisher_diagonal(apply, p, x, chunk=chunk))(params, inputs)
        close(found.total, brute_force(apply, params, inputs), 1e-10)
        assert found.count == jax.tree.leaves(inputs)[0].shape[0]
        assert found.captured == 1


def test_low_rank_is_exact_without_tolerance_and_bounded_by_its_certificate_with_it():
    with X64(True):
        apply, params, inputs = mlp(classes=12)
        exact = brute_force(apply, params, inputs)
        close(fisher_diagonal(apply, params, inputs, method="low_rank", tolerance=0.0).total, exact, 1e-9)
        low_rank = partial(fisher_diagonal, apply, method="low_rank", chunk=2)
        for tolerance in (0.3, 0.05, 0.01):
            found = low_rank(params, inputs, tolerance=tolerance)
            assert 1 - tolerance <= found.captured <= 1
            for part, whole in zip(jax.tree.leaves(found.total), jax.tree.leaves(exact), strict=True):
                assert np.all(part <= whole * (1 + 1e-9) + 1e-12)
            # Of the last layer's bias the diagonal is that of diag(p) - p pᵀ itself: the certificate is sharp there.
            bias = found.total["b"][1].sum() / exact["b"][1].sum()
            assert bias >= 1 - tolerance


def test_the_closed_form_of_the_cholesky_columns_equals_numpys_pivoted_elimination():
    from compo_jax.curvature.output_loss import cholesky as _cholesky

    with X64(True):
        p = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (9,), jnp.float64))
        column, left = _cholesky(p)
        rest = np.diag(p) - np.outer(p, p)
        for k in range(8):
            pivot = np.argmax(np.diag(rest))
            expected = rest[:, pivot] / np.sqrt(rest[pivot, pivot])
            np.testing.assert_allclose(column(k), expected, atol=1e-12)
            rest = rest - np.outer(expected, expected)
            np.testing.assert_allclose(left[k + 1], np.trace(rest), atol=1e-12)


def test_monte_carlo_is_unbiased():
    with X64(True):
        apply, params, inputs = mlp()
        exact = jnp.concatenate([x.ravel() for x in jax.tree.leaves(brute_force(apply, params, inputs))])

        def one(key):
            found = fisher_diagonal(apply, params, inputs, method="monte_carlo", key=key)
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(found.total)])

        draws = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 20_000))
        error = draws.mean(0) - exact
        deviation = draws.std(0) / np.sqrt(20_000)
        z = np.asarray(error / jnp.where(deviation > 0, deviation, 1))
        assert np.abs(z).max() < 4.5  # of about 50 normals, correlated: all share the draws
        assert jnp.abs(error).sum() < 0.03 * exact.sum()


def test_empirical_uses_the_given_labels():
    with X64(True):
        apply, params, inputs = mlp()
        labels = jnp.array([0, 1, 2, 3, 4, 0, 1])
        expected = jax.tree.map(jnp.zeros_like, params)
        for n in range(7):
            image = jax.tree.map(lambda x: x[n : n + 1], inputs)  # noqa: B023
            gradient = jax.grad(lambda q: jax.nn.log_softmax(apply(q, image)[0])[labels[n]])(params)  # noqa: B023
            expected = jax.tree.map(lambda t, g: t + g**2, expected, gradient)
        found = fisher_diagonal(apply, params, inputs, method="empirical", labels=labels, chunk=4)
        close(found.total, expected, 1e-10)
        assert np.isnan(found.captured)


@pytest.mark.parametrize("method", ["exact", "low_rank"])
def test_a_class_with_logit_minus_infinity_takes_no_part(method):
    with X64(True):
        apply, params, inputs = mlp(classes=5)
        hidden = lambda p, x: jnp.where(jnp.arange(5) < 3, apply(p, x), -jnp.inf)
        shown = lambda p, x: apply(p, x)[:, :3]
        found = fisher_diagonal(hidden, params, inputs, method=method, tolerance=0.0)
        close(found.total, brute_force(shown, params, inputs), 1e-10)


def test_bad_input():
    apply, params, inputs = lambda p, x: x @ p, jnp.ones((3, 2)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match="unknown method 'diag'; known are exact"):
        fisher_diagonal(apply, params, inputs, method="diag")
    with pytest.raises(ValueError, match="needs a key"):
        fisher_diagonal(apply, params, inputs, method="monte_carlo")
    with pytest.raises(ValueError, match="needs the true labels"):
        fisher_diagonal(apply, params, inputs, method="empirical")
    with pytest.raises(ValueError, match="must be \\(4,\\)"):
        fisher_diagonal(apply, params, inputs, method="empirical", labels=jnp.zeros(3, int))
    with pytest.raises(ValueError, match="inputs are empty"):
        fisher_diagonal(apply, params, inputs[:0])


# --------------------------------------------------------------------------- which weights are found
#
# Functions of one image: parameters and (tokens, 3) in, (4,) logits out. The diagonal must be right whichever weights
# are found to be dense layers, and the table names those that must be.


def tanh_mean(y):
    return jnp.tanh(y).mean(0)


def shared(p, x):
    return tanh_mean(jnp.tanh(x @ p["in"]) @ p["square"] @ p["square"]) @ p["head"]


def shared_through_one_jitted_function(p, x):
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))
    return tanh_mean(layer(layer(x @ p["in"], p["square"]), p["square"])) @ p["head"]


def shared_through_einsum(p, x):
    x = jnp.tanh(x @ p["in"])
    for _ in range(2):
        x = jnp.tanh(jnp.einsum("ti,io->to", x, p["square"]))
    return tanh_mean(x) @ p["head"]


def transposed(p, x):
    return p["out"].T @ tanh_mean(x @ p["wide"].T)


def transposed_in_a_scan(p, x):
    step = lambda x, w: (jnp.tanh(x @ w.T), None)
    turned = jnp.swapaxes(p["turned"], 0, 1)  # its first axis counts no layers
    return tanh_mean(jax.lax.scan(step, jax.lax.scan(step, x @ p["in"], p["blocks"])[0], turned)[0]) @ p["head"]


def transposed_and_shared(p, x):
    return tanh_mean(jnp.tanh(x @ p["in"] @ p["square"].T) @ p["square"]) @ p["head"]


def transposed_twice_with_many_axes(p, x):
    split, join = p["split"].transpose(2, 0, 1), p["join"].transpose(1, 2, 0)
    heads = jnp.tanh(jnp.einsum("td,dhk->thk", x, split))
    return tanh_mean(jnp.einsum("thk,kdh->td", heads, join.T.T)) @ p["head"]


def from_the_left(p, x):  # as in Equinox, a function of one token under vmap
    return p["out"] @ tanh_mean(jax.vmap(lambda token: p["wide"] @ token + p["bias"])(x))


def many_axes(p, x):  # as in Flax's DenseGeneral: (in, heads, features) and (heads, features, out)
    heads = jnp.tanh(jnp.einsum("td,dhk->thk", x, p["split"]))
    return tanh_mean(jnp.einsum("thk,hkd->td", heads, p["join"])) @ p["head"]


def axes_in_another_order(p, x):
    heads = jnp.tanh(jnp.einsum("td,hkd->kth", x, p["split"]))
    return tanh_mean(jnp.einsum("kth,dkh->td", heads, p["join"])) @ p["head"]


def a_vector_for_a_weight(p, x):
    return jnp.tanh(x @ p["vector"]) @ p["tokens"]


def inside_jit_and_checkpoint(p, x):
    inner = jax.checkpoint(lambda x, w, b: jnp.tanh(jax.jit(jnp.matmul)(x, w) + b))
    return tanh_mean(jax.jit(inner)(x, p["in"], p["bias"])) @ p["head"]


def scanned(p, x):
    step = lambda x, w: (jnp.tanh(x @ w["kernel"] + w["bias"]), None)
    return jax.lax.scan(step, x @ p["in"], p["blocks"], reverse=True)[0].mean(0) @ p["head"]


def scanned_with_checkpoint(p, x):
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w["kernel"] + w["bias"]), None))
    return jax.lax.scan(step, x @ p["in"], p["blocks"], unroll=2)[0].mean(0) @ p["head"]


def scanned_over_two_axes(p, x):
    inner = lambda x, w: (jnp.tanh(x @ w), None)
    outer = lambda x, ws: (jax.lax.scan(inner, x, ws)[0] + 1, None)
    return jax.lax.scan(outer, x @ p["in"], p["blocks"])[0].mean(0) @ p["head"]


def scanned_twice(p, x):
    step = lambda x, w: (jnp.tanh(x @ w), None)
    x = jax.lax.scan(step, x @ p["in"], p["blocks"])[0]
    return jax.lax.scan(step, x, p["blocks"])[0].mean(0) @ p["head"]


def recurrent(p, x):  # one weight in every step
    step = lambda h, token: (jnp.tanh(token @ p["in"] + h @ p["square"]), None)
    return jax.lax.scan(step, jnp.zeros(4, x.dtype), x)[0] @ p["head"]


def scanned_with_a_weight_in_every_step(p, x):
    step = lambda x, w: (jnp.tanh(x @ w @ p["square"]), None)
    return jax.lax.scan(step, x @ p["in"], p["blocks"])[0].mean(0) @ p["head"]


def in_the_carry(p, x):
    step = lambda carry, _: ((jnp.tanh(carry[0] @ carry[1]), carry[1]), None)
    return jax.lax.scan(step, (x @ p["in"], p["square"]), length=2)[0][0].mean(0) @ p["head"]


def in_a_branch_and_a_loop(p, x):
    x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ p["in"], lambda x: jnp.sin(x @ p["in"]), x)
    x = jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["square"]), x)
    return x.mean(0) @ p["head"]


@jax.custom_vjp
def multiply(x, w):
    return jnp.tanh(x @ w)


multiply.defvjp(lambda x, w: (multiply(x, w), (x, w)), lambda xw, g: jax.vjp(lambda x, w: jnp.tanh(x @ w), *xw)[1](g))


@jax.custom_jvp
def project(x, w):
    return x @ w


project.defjvp(lambda primals, tangents: jax.jvp(lambda x, w: x @ w, primals, tangents))


def in_custom_derivatives(p, x):
    return project(multiply(x, p["in"]).mean(0), p["head"])


def a_sum_of_weights(p, x):
    return tanh_mean(x @ (p["in"] + 1)) @ p["head"] + jnp.tanh(p["head"]).sum()


def sliced(p, x):
    return tanh_mean(x @ p["wide"][:3]) @ p["wide"][3:7]


def weight_times_weight(p, x):
    return tanh_mean(x @ (p["in"] @ p["square"])) @ p["head"]


def in_groups(p, x):
    return jnp.einsum("tgi,gio->tgo", jnp.tanh(x @ p["in"]).reshape(-1, 2, 2), p["groups"]).mean(0).ravel() @ p["head"]


def weights_of_zero_use(p, x):
    return tanh_mean(x @ p["in"]) @ p["head"] + 0 * p["bias"]


def convolved(p, x):
    images = x.reshape(1, 5, 3)
    y = jnp.tanh(
        jax.lax.conv_general_dilated(images, p["kernel"], (2,), "SAME", dimension_numbers=("NTC", "TIO", "NTC"))
    )
    return tanh_mean(y[0]) @ p["head"]


def convolved_by_groups(p, x):
    y = jax.lax.conv_general_dilated(x.T[None], p["kernel"], (1,), [(1, 0)], feature_group_count=3)
    return tanh_mean(y[0].T) @ p["head"]


def convolved_twice(p, x):
    x = x.T[None]
    for _ in range(2):
        x = jnp.tanh(jax.lax.conv_general_dilated(x, p["kernel"], (1,), [(1, 1)], rhs_dilation=(2,)))
    return x.mean((0, 2)) @ p["head"]


IN, SQUARE, HEAD, BIAS = (3, 4), (4, 4), (4, 4), (4,)
STRUCTURES = [
    (shared, {"in": IN, "square": SQUARE, "head": HEAD}, "head in"),
    (shared_through_one_jitted_function, {"in": IN, "square": SQUARE, "head": HEAD}, "head in"),
    (shared_through_einsum, {"in": IN, "square": SQUARE, "head": HEAD}, "head in"),
    (transposed, {"wide": (6, 3), "out": (6, 4)}, "out wide"),
    (transposed_in_a_scan, {"in": IN, "blocks": (3, 4, 4), "turned": (4, 3, 4), "head": HEAD}, "blocks head in"),
    (transposed_and_shared, {"in": IN, "square": SQUARE, "head": HEAD}, "head in"),
    (transposed_twice_with_many_axes, {"split": (2, 5, 3), "join": (2, 5, 4), "head": HEAD}, "head join split"),
    (from_the_left, {"wide": (6, 3), "bias": (6,), "out": (4, 6)}, "out wide"),
    (many_axes, {"split": (3, 2, 5), "join": (2, 5, 4), "head": HEAD}, "head join split"),
    (axes_in_another_order, {"split": (2, 5, 3), "join": (4, 5, 2), "head": HEAD}, "head join split"),
    (a_vector_for_a_weight, {"vector": (3,), "tokens": (5, 4)}, "tokens vector"),
    (inside_jit_and_checkpoint, {"in": IN, "bias": BIAS, "head": HEAD}, "head in"),
    (scanned, {"in": IN, "blocks": {"kernel": (3, 4, 4), "bias": (3, 4)}, "head": HEAD}, "blocks/kernel head in"),
    (
        scanned_with_checkpoint,
        {"in": IN, "blocks": {"kernel": (4, 4, 4), "bias": (4, 4)}, "head": HEAD},
        "blocks/kernel head in",
    ),
    (scanned_over_two_axes, {"in": IN, "blocks": (2, 3, 4, 4), "head": HEAD}, "blocks head in"),
    (scanned_twice, {"in": IN, "blocks": (3, 4, 4), "head": HEAD}, "head in"),
    (recurrent, {"in": IN, "square": SQUARE, "head": HEAD}, "head"),
    (
        scanned_with_a_weight_in_every_step,
        {"in": IN, "blocks": (3, 4, 4), "square": SQUARE, "head": HEAD},
        "blocks head in",
    ),
    (in_the_carry, {"in": IN, "square": SQUARE, "head": HEAD}, "head in"),
    (in_a_branch_and_a_loop, {"in": IN, "square": SQUARE, "head": HEAD}, "head"),
    (in_custom_derivatives, {"in": IN, "head": HEAD}, ""),
    (a_sum_of_weights, {"in": IN, "head": HEAD}, ""),
    (sliced, {"wide": (7, 4)}, ""),
    (weight_times_weight, {"in": IN, "square": SQUARE, "head": HEAD}, "head"),
    (in_groups, {"in": IN, "groups": (2, 2, 2), "head": HEAD}, "head in"),
    (weights_of_zero_use, {"in": IN, "bias": BIAS, "head": HEAD}, "head in"),
    (convolved, {"kernel": (3, 3, 4), "head": HEAD}, "head kernel"),
    (convolved_by_groups, {"kernel": (6, 1, 2), "head": (6, 4)}, "head"),
    (convolved_twice, {"kernel": (3, 3, 2), "head": (3, 4)}, "head"),
]


def built(shapes, count=3):
    """(parameters of these shapes, images (count, 5, 3)), normal."""
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(structure, [rng.normal(size=shape) for shape in leaves]), rng.normal(size=(count, 5, 3))


def definition(function, params, images):
    """As `brute_force`, all images and classes in one program."""

    def of_image(image):
        log_p = lambda p: jax.nn.log_softmax(function(p, image))
        p = jnp.exp(log_p(params))
        return jax.tree.map(lambda g: jnp.einsum("c,c...->...", p, g**2), jax.jacrev(log_p)(params))

    return jax.jit(lambda x: jax.tree.map(lambda s: s.sum(0), jax.vmap(of_image)(x)))(images)


@pytest.mark.parametrize("function, shapes, layers", STRUCTURES, ids=[row[0].__name__ for row in STRUCTURES])
def test_the_diagonal_is_right_with_the_dense_layers_that_are_found(function, shapes, layers):
    with X64(True):
        params, images = built(shapes)
        assert sorted(tap(function, params, images[0]).layers) == layers.split()
        found = jax.jit(lambda p, x: fisher_diagonal(jax.vmap(function, (None, 0)), p, x, chunk=2))(params, images)
        close(found.total, definition(function, params, images), 1e-10)


def test_weights_in_a_narrower_dtype_are_found_and_their_squares_summed_in_a_wider_one():
    with X64(True):
        params, images = built({"in": IN, "head": HEAD}, count=2000)  # a sum in bfloat16 stops at some hundred terms
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
        function = lambda p, x: jnp.tanh(x @ p["in"].astype(x.dtype)).mean(0) @ p["head"].astype(x.dtype)
        assert sorted(tap(function, params, images[0]).layers) == ["head", "in"]
        found = jax.jit(lambda p, x: fisher_diagonal(jax.vmap(function, (None, 0)), p, x, chunk=100))(params, images)
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        close(found.total, definition(function, wide, images), 1e-4)


@pytest.mark.parametrize("stack", [(), (2,), (2, 3)])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_squares_are_the_same_on_every_platform(stack, tokens, platform, monkeypatch):
    if platform == "default":  # what a GPU runs
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    with X64(True):
        rng = np.random.default_rng(0)
        x, d = rng.normal(size=(4, *stack, tokens, 3)), rng.normal(size=(4, *stack, tokens, 2))
        start = rng.normal(size=(*stack, 3, 2))
        expected = start + ((np.swapaxes(x, -1, -2) @ d) ** 2).sum(0)
        close(jax.jit(squares)(x, d, start), expected, 1e-12)


@pytest.mark.parametrize("row", [row for row in STRUCTURES if row[0] in (scanned_over_two_axes, a_vector_for_a_weight)])
def test_the_diagonal_is_the_same_by_the_code_of_another_platform(row, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    with X64(True):
        function, shapes, _ = row
        params, images = built(shapes)
        found = jax.jit(lambda p, x: fisher_diagonal(jax.vmap(function, (None, 0)), p, x, chunk=2))(params, images)
        close(found.total, definition(function, params, images), 1e-10)


@pytest.mark.parametrize("method", ["exact", "low_rank"])
def test_logits_that_are_nan_are_not_passed_over(method):
    params = jnp.array([[jnp.nan, 1.0], [1.0, 2.0]])
    found = fisher_diagonal(lambda p, x: x @ p, params, jnp.ones((3, 2)), method=method)
    assert np.isnan(found.total).any()
    assert np.isnan(found.captured)


def test_the_certificate_of_16_bit_logits_is_taken_in_32():
    logits = np.random.default_rng(0).normal(size=(1, 500)).astype(np.float32)
    apply = lambda p, x: x.astype(jnp.bfloat16) @ p
    params = jnp.asarray(logits, jnp.bfloat16)
    found = fisher_diagonal(apply, params, jnp.ones((1, 1)), method="low_rank", tolerance=0.01)
    p = np.asarray(jax.nn.softmax(params[0].astype(jnp.float32)), np.float64)
    order = np.sort(p)[::-1]
    trace = 1 - np.sum(p**2)
    left = np.array([order[k:].sum() - (order[k:] ** 2).sum() / order[k:].sum() for k in range(1, 500)])
    count = np.flatnonzero(left <= 0.01 * trace)[0]
    np.testing.assert_allclose(found.captured, 1 - left[count] / trace, atol=1e-4)


def test_weights_that_pass_through_integers_have_no_gradient():
    params = {"w": 2 * jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
    apply = lambda p, x: x @ jnp.round(p["w"]).astype(jnp.int32).astype(jnp.float32) @ p["v"]
    found = fisher_diagonal(apply, params, jax.random.normal(jax.random.key(0), (5, 3)))
    assert np.all(np.asarray(found.total["w"]) == 0)
    assert np.any(np.asarray(found.total["v"]) > 0)


def test_more_bad_input():
    apply, params, x = lambda p, x: x @ p, jnp.ones((3, 2)), jnp.ones((4, 3))
    with pytest.raises(ValueError, match="a chunk holds at least one image, not 0"):
        fisher_diagonal(apply, params, x, chunk=0)
    with pytest.raises(ValueError, match="tolerance, the fraction of the trace .* is -1"):
        fisher_diagonal(apply, params, x, method="low_rank", tolerance=-1.0)
    with pytest.raises(ValueError, match="no arrays in a batch"):
        fisher_diagonal(apply, params, {})
    with pytest.raises(ValueError, match="must share the length of axis 0"):
        fisher_diagonal(lambda p, x: x[0] @ p, params, (x, jnp.ones(3)))
