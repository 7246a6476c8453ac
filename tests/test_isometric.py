"""The isometric ResNet: its blocks, its cost, and what it refuses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax.models import IsometricNet
from compo_jax.models.isometric import convolutions, convolve, patchify
from compo_jax.models.sizes import whole_patches

X64 = jax.enable_x64


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def reference(x, kernel, stride=1, padding="SAME", groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("block", "weights"),
    [("basic", 18 * 64**2), ("bottleneck", 2 * 64 * 16 + 9 * 16**2), ("inverted", 8 * 64**2 + 9 * 256)],
)
def test_the_kernels_of_a_block_have_the_scalars_of_its_closed_form(block, weights):
    assert sum(np.prod(c.shape) for c in convolutions(block, 64)) == weights


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (2, 1), (3, 1), (3, 6), (5, 1)])
def test_products_of_shifted_images_are_the_convolution_and_so_are_their_gradients(size, groups):
    with X64(True):
        x, kernel = jnp.array(normal(0, 2, 5, 7, 6)), jnp.array(normal(1, size, size, 6 // groups, 6))
        cotangent = normal(2, 2, 5, 7, 6)

        def with_gradients(function):
            value, pull = jax.vjp(lambda x, k: function(x, k, groups=groups), x, kernel)
            return value, *pull(cotangent)

        both = (jax.jit(lambda f=f: with_gradients(f))() for f in (convolve, reference))
        for a, b in zip(*both, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_stem_is_a_convolution_of_the_patch_s_stride():
    x, kernel = jnp.array(normal(0, 2, 8, 12, 3), jnp.float32), jnp.array(normal(1, 4, 4, 3, 5), jnp.float32)
    np.testing.assert_allclose(patchify(x, kernel), reference(x, kernel, 4, "VALID"), rtol=1e-5, atol=1e-5)


def norm(x, p, s, train):
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (s["mean"], s["var"])
    return (x - mean) / jnp.sqrt(var + 1e-5) * p["scale"] + p["bias"]


@pytest.mark.parametrize("block", ["basic", "bottleneck", "inverted"])
def test_the_plain_network_is_its_formula(block):
    net = IsometricNet(3, layers=2, width=8, patch=2, block=block)
    images = jnp.array(normal(0, 4, 8, 8, 3), jnp.float32)
    leaves, structure = jax.tree.flatten(jax.eval_shape(net.init, jax.random.key(0), images))
    noise = [jnp.array(0.3 * normal(i, *x.shape), jnp.float32) for i, x in enumerate(leaves)]
    variables = jax.tree.unflatten(structure, [x if x.ndim > 1 else 0.5 + jnp.abs(x) for x in noise])

    @partial(jax.jit, static_argnames="train")
    def formula(p, s, train):
        relu = lambda x: jnp.maximum(x, 0)
        x = reference(images, p["stem"]["kernel"], 2, "VALID")
        x = relu(norm(x, p["stem_norm"], s["stem_norm"], train))
        for layer in ("block0", "block1"):
            count, y = len(convolutions(block, 8)), x
            for i in range(1, count + 1):
                kernel = p[layer][f"conv{i}"]["kernel"]
                y = reference(y, kernel, groups=y.shape[-1] if (block, i) == ("inverted", 2) else 1)
                y = norm(y, p[layer][f"norm{i}"], s[layer][f"norm{i}"], train)
                y = relu(y) if i < count else y
            x = x + y if block == "inverted" else relu(x + y)
        return x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]

    for train in (False, True):
        expected = formula(variables["params"], variables["batch_stats"], train)
        found, _ = jax.jit(lambda v, train=train: net.apply(v, images, train, mutable=["batch_stats"]))(variables)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_bad_input_is_told():
    with pytest.raises(ValueError, match="no block is called 'dense'; there are basic"):
        convolutions("dense", 8)
    with pytest.raises(ValueError, match="10x10 pixels can't be cut into patches of 4"):
        patchify(jnp.zeros((1, 10, 10, 3)), jnp.zeros((4, 4, 3, 8)))
    for images in ((1, 3, 8, 8), (5, 1, 3, 8, 8)):
        with pytest.raises(ValueError, match="have their channels first"):
            whole_patches(images, 4)
    for side in (10, 3):
        with pytest.raises(ValueError, match=f"{side}x{side} pixels can't be cut into patches of 4"):
            jax.eval_shape(IsometricNet(3).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    for options in ({"layers": 0}, {"width": 0}, {"patch": 0}):
        with pytest.raises(ValueError, match="=0: a whole number, 1 or more, is needed"):
            IsometricNet(3, **options)
    with pytest.raises(ValueError, match="2 groups of 6 channels"):
        convolve(jnp.zeros((1, 4, 4, 6)), jnp.zeros((3, 3, 3, 6)), 2)
