"""Kronecker factors against dense matrices: where they are exact, and by their definitions where they are not."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from compo_jax import tree
from compo_jax.curvature import fisher_diagonal, ggnvp
from compo_jax.curvature.kfac import eigenvalue_corrected, kronecker, merge_kronecker
from compo_jax.curvature.layers import tap
from compo_jax.models import ViT

X64 = jax.enable_x64


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def dense(product, like):
    """The matrix of a product with trees."""
    flat, unravel = ravel_pytree(like)
    return jax.jit(jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0]))(jnp.eye(flat.size)).T


def mlp():
    params = {"first": normal(0, 3, 5), "second": normal(1, 5, 4)}
    return lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"], params, normal(2, 6, 3)


def token_mixer():
    """Two weights that meet several tokens of an image."""
    params = {"first": normal(3, 3, 4), "second": normal(4, 4, 3)}
    return lambda p, x: jnp.tanh(jnp.tanh(x @ p["first"]) @ p["second"]).sum(axis=1), params, normal(5, 5, 7, 3)


def tiny_vit():
    model = ViT(image_size=8, patch=4, width=8, depth=2, heads=2, classes=4)
    images = normal(6, 5, 8, 8, 3)
    whole = jax.jit(model.init)(jax.random.key(2), images)["params"]
    whole = jax.tree.map(lambda x: 3 * x.astype(jnp.float64), whole)
    params, rest = tree.partition(whole, r"(proj|head)/kernel")
    return lambda p, x: model.apply({"params": tree.combine(p, rest)}, x), params, images


def gradients(apply, params, inputs):
    """(images, classes): every image's gradient of every class's log-probability times √p, as trees."""

    def of_one(image):
        def scaled(p):
            log_p = jax.nn.log_softmax(apply(p, image[None])[0])
            return jnp.sqrt(jax.lax.stop_gradient(jnp.exp(log_p))) * log_p

        return jax.jacrev(scaled)(params)

    return jax.jit(jax.vmap(of_one))(inputs)


@pytest.mark.parametrize("tokens", ["expand", "reduce"])
def test_one_linear_layer_and_one_example_are_exact(tokens):
    with X64(True):
        w, x = {"w": normal(0, 4, 3)}, normal(1, 1, 4)
        apply = lambda p, x: x @ p["w"] + jnp.arange(3.0)
        exact = dense(lambda v: ggnvp(apply, w, v, x), w)
        found = kronecker(apply, w, x, tokens=tokens)
        np.testing.assert_allclose(dense(found.matvec, w), exact, atol=1e-12)
        np.testing.assert_allclose(dense(found.eigen().matvec, w), exact, atol=1e-12)
        np.testing.assert_allclose(found.trace(), np.trace(exact), rtol=1e-12)
        np.testing.assert_allclose(found.diagonal()["w"].ravel(), np.diag(exact), atol=1e-12)


def test_reduce_is_exact_for_one_image_where_the_model_averages_its_tokens():
    with X64(True):
        w, x = {"w": normal(0, 4, 3)}, normal(1, 1, 6, 4)
        apply = lambda p, x: jnp.mean(x @ p["w"], axis=1)
        exact = dense(lambda v: ggnvp(apply, w, v, x), w)
        np.testing.assert_allclose(dense(kronecker(apply, w, x, tokens="reduce").matvec, w), exact, atol=1e-12)
        assert np.abs(dense(kronecker(apply, w, x).matvec, w) - exact).max() > 0.01 * np.abs(exact).max()


@pytest.mark.parametrize("tokens", ["expand", "reduce"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_factors_are_the_means_that_define_them(tokens, chunk):
    with X64(True):
        apply, params, x = token_mixer()
        found = jax.jit(lambda p, x: kronecker(apply, p, x, tokens=tokens, chunk=chunk))(params, x)
        hidden = jnp.tanh(x @ params["first"])

        def from_second(y, labels):  # the second layer's outputs (tokens, 3) to √p log p
            log_p = jax.nn.log_softmax(jnp.tanh(y).sum(axis=0))
            return jnp.sqrt(jax.lax.stop_gradient(jnp.exp(log_p))) * log_p

        a, b = np.zeros((4, 4)), np.zeros((3, 3))
        for n in range(5):
            back = np.asarray(jax.jacrev(from_second)(hidden[n] @ params["second"], None))  # classes, tokens, 3
            if tokens == "expand":
                a += sum(np.outer(h, h) for h in np.asarray(hidden[n])) / 7
                b += sum(np.outer(d, d) for column in back for d in column)
            else:
                mean = np.asarray(hidden[n]).mean(axis=0)
                a += np.outer(mean, mean)
                b += sum(np.outer(d, d) for d in back.sum(axis=1))
        np.testing.assert_allclose(found.inputs["second"], a / 5, atol=1e-12)
        np.testing.assert_allclose(found.outputs["second"], b / 5, atol=1e-12)
        assert found.count == 5


@pytest.mark.parametrize("case", [mlp, token_mixer, tiny_vit])
def test_the_corrected_eigenvalues_are_the_best_ones_and_keep_the_trace(case):
    with X64(True):
        apply, params, x = case()
        factors = kronecker(apply, params, x)
        corrected = jax.jit(lambda f, p, x: eigenvalue_corrected(f, apply, p, x, chunk=2))(factors, params, x)
        diagonal = fisher_diagonal(apply, params, x).mean
        np.testing.assert_allclose(corrected.trace(), sum(map(jnp.sum, jax.tree.leaves(diagonal))), rtol=1e-10)
        each = {n: g for n, g in zip(tree.names(params), jax.tree.leaves(gradients(apply, params, x)), strict=True)}
        for name, layer in factors.layout:
            a, b = corrected.basis[name]
            g = jax.vmap(jax.vmap(layer.matrix))(each[name])
            moments = jnp.einsum("...ik,nc...ij,...jl->nc...kl", a, g, b) ** 2
            np.testing.assert_allclose(corrected.values[name], moments.sum(axis=(0, 1)) / x.shape[0], atol=1e-10)
            # Nearest in the Frobenius norm among what is diagonal in the basis, the factors' own product included.
            flat = g.reshape(-1, np.prod(g.shape[2:]))
            exact = flat.T @ flat / x.shape[0]
            if layer.stack == ():
                product = np.kron(factors.inputs[name], factors.outputs[name])
                both = np.kron(a, b)
                nearest = both @ np.diag(np.ravel(corrected.values[name])) @ both.T
                assert np.linalg.norm(nearest - exact) < np.linalg.norm(product - exact)


@pytest.mark.parametrize("case", [mlp, tiny_vit])
def test_product_inverse_quadratic_form_and_diagonal_agree(case):
    with X64(True):
        apply, params, x = case()
        factors = kronecker(apply, params, x)
        vector = jax.tree.map(lambda p: normal(9, *p.shape), params)
        for found in (factors, eigenvalue_corrected(factors, apply, params, x)):
            image = found.matvec(vector)
            np.testing.assert_allclose(found.quadratic(vector), tree.dot(vector, image), rtol=1e-12)
            back = found.solve(tree.add(image, vector, 0.3), 0.3)
            for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(vector), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-9)
            matrix = dense(found.matvec, params)
            flat = np.concatenate([np.ravel(found.diagonal()[name]) for name in tree.names(params)])
            np.testing.assert_allclose(np.diag(matrix), flat, atol=1e-11)
            np.testing.assert_allclose(found.trace(), np.trace(matrix), rtol=1e-11)
            hole = tree.map_with_name(lambda name, v: None if name == tree.names(params)[0] else v, vector)
            kept = jax.tree.leaves(found.matvec(hole))
            np.testing.assert_allclose(kept[0], jax.tree.leaves(image)[1], rtol=1e-12)


def test_estimates_of_the_output_factor():
    with X64(True):
        apply, params, x = mlp()
        exact = kronecker(apply, params, x)
        low_rank = kronecker(apply, params, x, method="low_rank", tolerance=0.0)
        np.testing.assert_allclose(low_rank.outputs["first"], exact.outputs["first"], atol=1e-12)
        draw = lambda key: kronecker(apply, params, x, method="monte_carlo", key=key).outputs["first"]
        draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
        z = (draws.mean(0) - exact.outputs["first"]) / (draws.std(0) / np.sqrt(4000))
        assert np.abs(z).max() < 4.5


def test_merging_tasks():
    with X64(True):
        apply, params, x = mlp()
        first, second = kronecker(apply, params, x[:2]), kronecker(apply, params, x[2:])
        merged = merge_kronecker([first, second])
        whole = kronecker(apply, params, x)
        for name in params:  # each factor of the pooled images is the mean of the tasks'
            np.testing.assert_allclose(merged.inputs[name], whole.inputs[name], atol=1e-12)
            np.testing.assert_allclose(merged.outputs[name], whole.outputs[name], atol=1e-12)
        assert merged.count == 6
        # TAK: the tasks' curvatures summed, exactly where their inputs are alike.
        twice = merge_kronecker([first, first], weights=[1.0, 1.0])
        np.testing.assert_allclose(dense(twice.matvec, params), 2 * dense(first.matvec, params), atol=1e-12)


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 2), strides=(2, 1), padding="SAME", name="conv", param_dtype=jnp.float64)(x))
        return nn.Dense(3, name="head", param_dtype=jnp.float64)(x.reshape(x.shape[0], -1))


def layouts():
    """Models whose weights lie otherwise than (in, out), and the layers to be found in them."""
    x = normal(0, 4, 5)
    yield "transposed", lambda p, x: jax.vmap(lambda v: p["w"] @ v)(x), {"w": normal(1, 3, 5)}, x, ["w"]
    heads = lambda p, x: jnp.einsum("nhk,hko->no", jnp.tanh(jnp.einsum("nd,dhk->nhk", x, p["up"])), p["down"])
    yield "many axes", heads, {"up": normal(1, 5, 2, 3), "down": normal(2, 2, 3, 4)}, x, ["down", "up"]
    model = Convolutional()
    images = normal(3, 4, 4, 4, 2)
    whole = jax.jit(model.init)(jax.random.key(0), images)["params"]
    kernels, biases = tree.partition(whole, "kernel")
    convolve = lambda p, x: model.apply({"params": tree.combine(p, biases)}, x)
    yield "convolution", convolve, kernels, images, ["conv/kernel", "head/kernel"]


@pytest.mark.parametrize("index", range(3), ids=["transposed", "many axes", "convolution"])
def test_weights_are_laid_out_as_in_the_model(index):
    with X64(True):
        _, apply, params, x, expected = list(layouts())[index]
        taps = tap(lambda p, image: apply(p, image[None])[0], params, x[0])
        assert sorted(taps.layers) == expected
        each = gradients(apply, params, x)
        brute = jax.tree.map(lambda g: jnp.sum(g**2, axis=(0, 1)), each)
        for a, b in zip(jax.tree.leaves(fisher_diagonal(apply, params, x).total), jax.tree.leaves(brute), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        # In the eigenbasis of the factors the product of task vectors keeps the trace, whatever the layout.
        corrected = eigenvalue_corrected(kronecker(apply, params, x), apply, params, x)
        np.testing.assert_allclose(corrected.trace(), sum(map(jnp.sum, jax.tree.leaves(brute))) / 4, rtol=1e-10)
        for name, layer in corrected.layout:
            leaf = dict(zip(tree.names(params), jax.tree.leaves(params), strict=True))[name]
            np.testing.assert_array_equal(layer.leaf(layer.matrix(leaf)), leaf)


def test_bad_input():
    apply, params, x = lambda p, x: x @ p["w"] + p["b"], {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((4, 3))
    with pytest.raises(ValueError, match="used once, which these are not: b"):
        kronecker(apply, params, x)
    with pytest.raises(ValueError, match="unknown tokens='mean'"):
        kronecker(apply, params, x, tokens="mean")
    with pytest.raises(ValueError, match="needs a key"):
        kronecker(apply, params, x, method="monte_carlo")
    bias = params["b"]
    found = kronecker(lambda p, x: x @ p["w"] + bias, {"w": params["w"]}, x)
    with pytest.raises(ValueError, match="no Kronecker factors for b, only for w"):
        found.matvec(params)
    with pytest.raises(ValueError, match="no Kronecker factors were given"):
        merge_kronecker([])
    with pytest.raises(ValueError, match="2 tasks' factors were given 1 weights"):
        merge_kronecker([found, found], weights=[1.0])
    with pytest.raises(ValueError, match=r"w is \(2, 3\) in the vector and \(3, 2\) in the layer"):
        found.matvec({"w": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="damping must be positive, not 0"):
        found.solve({"w": params["w"]}, 0.0)
    with pytest.raises(ValueError, match="whose tokens were seen differently"):
        merge_kronecker([found, kronecker(lambda p, x: x @ p["w"] + bias, {"w": params["w"]}, x, tokens="reduce")])
    with pytest.raises(ValueError, match="the factors are of w, and params are v"):
        eigenvalue_corrected(found, lambda p, x: x @ p["v"], {"v": params["w"]}, x)
    other = kronecker(lambda p, x: x @ p["v"], {"v": params["w"]}, x)
    with pytest.raises(ValueError, match="of different layers"):
        merge_kronecker([found, other])


def test_factors_that_are_not_finite_have_an_eigenbasis_of_nan_and_no_wait_for_ever():
    with X64(True):
        apply, params, inputs = mlp()
        factors = kronecker(apply, params, inputs)
        spoilt = {name: x.at[0, 1].set(jnp.inf) for name, x in factors.inputs.items()}
        eigen = dataclasses.replace(factors, inputs=spoilt).eigen()
    for name in params:
        assert np.all(np.isnan(eigen.values[name])) and np.all(np.isfinite(eigen.basis[name][1]))


def test_factors_of_sequences_of_other_lengths_are_of_the_same_layers():
    with X64(True):
        params, apply = {"w": normal(0, 4, 3)}, lambda p, x: jnp.tanh(x @ p["w"]).sum(1)
        short, long = kronecker(apply, params, normal(1, 5, 7, 4)), kronecker(apply, params, normal(2, 10, 9, 4))
        merged = merge_kronecker([short, long])
        for name in ("inputs", "outputs"):
            expected = (getattr(short, name)["w"] + 2 * getattr(long, name)["w"]) / 3
            np.testing.assert_allclose(getattr(merged, name)["w"], expected, rtol=1e-12)
            np.testing.assert_allclose(getattr(short + long, name)["w"], expected, rtol=1e-12)
