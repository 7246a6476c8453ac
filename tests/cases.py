"""The table of models that every curvature operator is held against its dense matrix on: a new operator or model is one
more row. Arrays are NumPy's, in float64; few parameters, so that dense matrices are quick."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from compo_jax import tree
from compo_jax.models import ViT
from compo_jax.tree import Tree


class Case(NamedTuple):
    """A model with a data set: `apply(params, inputs) -> logits (batch, classes)`, batches of (inputs, labels)."""

    name: str
    apply: Callable
    params: Tree
    batches: list[tuple]

    @property
    def whole(self) -> tuple:
        """The data set as one batch."""
        return jax.tree.map(lambda *x: np.concatenate(x), *self.batches)

    def cast(self, dtype) -> "Case":
        """The case with all its floating-point arrays in another dtype."""
        floating = lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x
        return self._replace(params=jax.tree.map(floating, self.params), batches=jax.tree.map(floating, self.batches))


class Filters(NamedTuple):
    first: Any
    second: Any
    head: Any


def normal(seed, *shape, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def batches(inputs, labels, sizes):
    """Cut from one array of examples, of the sizes given: the last is uneven."""
    cuts = np.cumsum(sizes)[:-1]
    parts = [np.split(x, cuts) for x in jax.tree.leaves((inputs, labels))]
    return [jax.tree.unflatten(jax.tree.structure((inputs, labels)), part) for part in zip(*parts, strict=True)]


def labels(seed, count, classes):
    return np.random.default_rng(seed).integers(classes, size=count)


def mlp(sizes=(4, 4, 3)) -> Case:
    """Parameters in a dictionary with a list in it, inputs in a dictionary."""
    n = sum(sizes)
    params = {"in": normal(0, 3, 6), "out": [normal(1, 6, 5), normal(2, 5)]}

    def apply(p, x):
        return jnp.tanh(x["left"] @ p["in"] + x["right"]) @ p["out"][0] + p["out"][1]

    inputs = {"left": normal(3, n, 3), "right": normal(4, n, 6)}
    return Case("mlp", apply, params, batches(inputs, labels(5, n, 5), sizes))


def deep() -> Case:
    """Parameters in a list of tuples, and a small batch between two others."""
    sizes, widths = (5, 2, 5), (4, 5, 5, 3)
    pairs = list(itertools.pairwise(widths))
    params = [(normal(10 + i, a, b), normal(20 + i, b, scale=0.3)) for i, (a, b) in enumerate(pairs)]

    def apply(p, x):
        for weight, bias in p[:-1]:
            x = jax.nn.gelu(x @ weight + bias, approximate=False)
        return x @ p[-1][0] + p[-1][1]

    return Case("deep", apply, params, batches(normal(30, 12, 4), labels(31, 12, 3), sizes))


def convolutional() -> Case:
    """Parameters in a NamedTuple, inputs in a tuple (images, offsets)."""
    sizes = (4, 4, 3)
    params = Filters(normal(40, 3, 3, 2, 3, scale=0.5), normal(41, 2, 2, 3, 4, scale=0.5), normal(42, 4, 4))

    def apply(p, x):
        images, offsets = x
        for kernel, stride in ((p.first, 2), (p.second, 1)):
            layout = ("NHWC", "HWIO", "NHWC")
            images = jax.lax.conv_general_dilated(images, kernel, (stride, stride), "SAME", dimension_numbers=layout)
            images = jnp.tanh(images)
        return (images.mean((1, 2)) + offsets) @ p.head

    return Case(
        "convolutional", apply, params, batches((normal(43, 11, 6, 6, 2), normal(44, 11, 4)), labels(45, 11, 4), sizes)
    )


def attention() -> Case:
    """A Vision Transformer of which some leaves move: the others are None holes."""
    sizes = (5, 5)  # even, for one program that has to be compiled is enough here
    model = ViT(image_size=8, patch=4, width=4, depth=2, heads=2, classes=3)
    images = normal(50, 10, 8, 8, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(images[:1], jnp.float32))["params"]
    everything = jax.tree.map(lambda x: normal(x.size, *x.shape, scale=0.6), shapes)
    params, frozen = tree.partition(everything, ["attention", "norm2", "head"])

    def apply(p, x):
        return model.apply({"params": tree.combine(p, jax.tree.map(lambda f: f.astype(x.dtype), frozen))}, x)

    return Case("attention", apply, params, batches(images, labels(51, 10, 3), sizes))


CASES = [mlp(), deep(), convolutional(), attention()]


def cross_entropy(apply):
    """`loss(params, inputs, labels)`, the mean over the batch."""
    return lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(apply(p, x), y).mean()


def flat(function, params):
    """(`function` of the parameters as one vector and what follows them, the vector)."""
    vector, unravel = ravel_pytree(params)
    return lambda theta, *args: function(unravel(theta), *args), vector


def matrix(operator, params):
    """The dense matrix of `operator: tree -> tree`, column by column."""
    vector, unravel = ravel_pytree(params)
    columns = jax.jit(jax.vmap(lambda v: ravel_pytree(operator(unravel(v)))[0]))(
        jnp.eye(vector.size, dtype=vector.dtype)
    )
    return np.asarray(columns).T


def dense_hessian(loss, params, *args):
    """Reverse over reverse, which shares no rule of differentiation with forward over reverse but the first."""
    function, theta = flat(loss, params)
    return np.asarray(jax.jit(jax.jacrev(jax.grad(function)))(theta, *args))


def dense_jacobian(apply, params, inputs):
    """(*outputs, parameters), one reverse pass for each output."""
    function, theta = flat(apply, params)
    return np.asarray(jax.jit(jax.jacrev(function))(theta, inputs))


def close(found, expected, rtol=1e-10):
    """Equal up to `rtol` of the largest entry of each leaf."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(float(np.abs(y).max()), 1e-300))
