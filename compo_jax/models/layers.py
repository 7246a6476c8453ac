"""The parts of a transformer block, with derivatives in closed form.

Each is the standard function (exact GELU, softmax, layer normalisation, attention) with the same values. Where JAX
would differentiate step by step, the closed form keeps fewer arrays for the gradient and runs fewer loops over them.
It can be differentiated again, forward and reverse, as often as one likes.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from compo_jax.tree import wide_type


@jax.custom_jvp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x·Φ(x) (Hendrycks and Gimpel, 2016, arXiv 1606.08415), Φ the standard normal's distribution function; exact."""
    return x * _normal_cdf(x)


def _normal_cdf(x):
    return 0.5 + 0.5 * lax.erf(x * jnp.asarray(0.5**0.5, x.dtype))


@gelu.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    below = _normal_cdf(x)
    density = jnp.exp(-0.5 * x * x) * jnp.asarray((2 * jnp.pi) ** -0.5, x.dtype)
    return x * below, (below + x * density) * dx


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x·σ(1.702 x), the approximation of `gelu` that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


@jax.custom_jvp
def softmax(x: Float[Array, "*shape n"]) -> Float[Array, "*shape n"]:
    """exp(x) / Σ exp(x) over the last axis."""
    x = jnp.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@softmax.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    p = softmax(x)
    slope = p * dx
    return p, slope - p * slope.sum(-1, keepdims=True)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardize(x: Float[Array, "*shape n"], epsilon: float) -> Float[Array, "*shape n"]:
    """x with mean 0 and variance 1 over the last axis; epsilon is added to the variance."""
    return _standardized(x, epsilon)[0]


def _standardized(x, epsilon):
    x = x - x.mean(-1, keepdims=True)
    inverse = lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return x * inverse, inverse


@standardize.defjvp
def _(epsilon, primals, tangents):
    (x,), (dx,) = primals, tangents
    y, inverse = _standardized(x, epsilon)
    return y, inverse * (dx - dx.mean(-1, keepdims=True) - y * (y * dx).mean(-1, keepdims=True))


def unit(features: Float[Array | np.ndarray, "*shape width"]) -> Float[Array, "*shape width"]:
    """The features at length 1, in float32 at least; zeros stay zeros."""
    features = jnp.asarray(features, wide_type(features))
    square = (features * features).sum(-1, keepdims=True)
    return features * lax.rsqrt(jnp.where(square > 0, square, 1))


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al., 2016, arXiv 1607.06450), in float32 at least."""

    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*shape n"]) -> Float[Array, "*shape n"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        dtype = self.dtype or jnp.result_type(x, scale, bias)
        y = standardize(x.astype(jnp.promote_types(dtype, jnp.float32)), self.epsilon)
        return (y * scale + bias).astype(dtype)


def attention(
    q: Float[Array, "batch heads asking size"],
    k: Float[Array, "batch heads tokens size"],
    v: Float[Array, "batch heads tokens size"],
    causal: bool = False,
) -> Float[Array, "batch heads asking size"]:
    """softmax(q·kᵀ / √size)·v of each head; `causal`: without the keys of later tokens."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    return softmax(scores) @ v


def _product_of_rows(x, kernel, dimensions, **options):
    (((_,), (axis,)), _) = dimensions
    y = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (axis,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], y.shape[-1])


# A dense layer that multiplies two matrices, whatever axes its input has: XLA's products on a CPU are faster so.
Dense = partial(nn.Dense, dot_general=_product_of_rows)
