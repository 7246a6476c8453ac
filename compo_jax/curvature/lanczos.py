"""Trace, diagonal, Frobenius norm, eigenvalues and spectral density of a symmetric operator that is only a matvec.

`matvec` maps a tree to one of its structure and shapes, `like` is such a tree (arrays or `jax.ShapeDtypeStruct`) with n
scalars. One vector is multiplied at a time, in the dtypes of `like`; results are float32 or wider. Nothing is jitted:
wrap a call in `jax.jit`, the matvec closed over. ValueError on an empty `like`, leaves in it that are not real floats,
a matvec that returns other leaves, and counts out of range.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from matfree import stochtrace

from compo_jax import tree
from compo_jax.curvature.batches import require_count, require_key
from compo_jax.tree import Tree

HIGHEST = jax.lax.Precision.HIGHEST  # products in TF32 or bfloat16 would cost Lanczos its orthogonality


class Estimate(NamedTuple):
    """A mean over independent samples and its standard error, `std(ddof=1) / sqrt(samples)`: nan for one sample."""

    estimate: Tree
    standard_error: Tree


class TopEigenvalues(NamedTuple):
    """Ritz values in the order asked for, their unit vectors (trees stacked on axis 0), and residual bounds.

    Some eigenvalue lies within `|beta * last component|` of a Ritz value (Golub & Meurant, 2010; the recurrence's
    rounding is added, not that of `matvec`); that none was missed is not said.
    """

    values: Float[Array, " count"]
    vectors: Tree
    error_bounds: Float[Array, " count"]


class Spectrum(NamedTuple):
    """A discrete density, one sample a row, all weights summing to 1: `n * sum(weights * f(nodes))` ~ `trace f(A)`."""

    nodes: Float[Array, "samples order"]
    weights: Float[Array, "samples order"]


class _Flat(NamedTuple):
    """An operator on vectors.

    Attributes:
      apply: `v -> A v`.
      zeros: such a vector.
      unravel: a vector as a tree.
    """

    apply: Callable[[Array], Array]
    zeros: Array
    unravel: Callable[[Array], Tree]


class _Ritz(NamedTuple):
    """What the Lanczos recurrence comes to.

    Attributes:
      values, vectors: eigenvalues and eigenvectors (in columns) of the tridiagonal matrix.
      basis: (order, n), orthonormal.
      beta: the norm of what is left.
      rounding: of the recurrence.
    """

    values: Array
    vectors: Array
    basis: Array
    beta: Array
    rounding: Array


def _operator(matvec: Callable, like: Tree, key: Any, **at_least_one: Any) -> _Flat:
    """The operator flattened, after the checks that all share."""
    require_key(key, "random vectors need a key")
    for name, value in at_least_one.items():
        require_count(value, f"{name} must be at least 1, not {value}: a whole number")
    like = jax.eval_shape(lambda t: t, like)
    if tree.size(like) == 0:
        raise ValueError("the operator acts on an empty tree: `like` must be shaped as a vector, e.g. the parameters")
    for name, leaf in zip(tree.names(like), jax.tree.leaves(like), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{name!r} in `like` is {leaf.dtype}; only real floats can be multiplied: leave it out")
    out = jax.eval_shape(matvec, like)
    if jax.tree.structure(out) != jax.tree.structure(like):
        differ = ", ".join(sorted(set(tree.names(out)) ^ set(tree.names(like)))) or jax.tree.structure(out)
        raise ValueError(f"matvec must return a tree of the structure of `like`, and differs from it in: {differ}")
    for name, a, b in zip(tree.names(like), jax.tree.leaves(like), jax.tree.leaves(out), strict=True):
        if a.shape != b.shape:
            raise ValueError(f"matvec returns {name!r} with shape {b.shape}, but it has shape {a.shape} in `like`")
        if not jnp.issubdtype(b.dtype, jnp.floating):
            raise ValueError(f"matvec returns {name!r} as {b.dtype}; a symmetric operator's products are real floats")
    wide = jax.tree.map(lambda x: jnp.zeros(x.shape, tree.wide_type(x)), like)
    zeros, unravel = ravel_pytree(wide)

    def apply(v):
        image = matvec(jax.tree.map(lambda x, d: x.astype(d.dtype), unravel(v), like))
        return ravel_pytree(image)[0].astype(v.dtype)

    return _Flat(apply, zeros, unravel)


def _mean(integrand: Callable, operator: _Flat, key: Array, samples: int) -> tuple[Array, Array]:
    """Mean and standard error of `integrand(apply, signs)` by Welford's recurrence: no memory per sample."""
    apply, zeros, _ = operator
    draw = stochtrace.sampler_signs(zeros, num=1)

    def add(carry, x):
        (mean, squares), (count, key) = carry, x
        value = integrand(apply, draw(key)[0])
        new = mean + (value - mean) / count
        return (new, squares + (value - mean) * (value - new)), None

    start = jnp.zeros_like(jax.eval_shape(lambda v: integrand(apply, v), zeros))
    xs = (jnp.arange(1, samples + 1), jax.random.split(key, samples))
    (mean, squares), _ = jax.lax.scan(add, (start, start), xs)
    return mean, jnp.sqrt(squares / (samples * (samples - 1)))


def trace(matvec: Callable, like: Tree, key: Any, samples: int) -> Estimate:
    """The trace from `samples` matvecs with random signs (Hutchinson, 1989): unbiased, exact for a diagonal operator.

    Variance: `2 (‖A‖_F² - ‖diag A‖²) / samples`. XTrace (Epperly, Tropp & Webber, 2024; in matfree) has much less where
    eigenvalues decay fast, but holds all samples at once, and its leave-one-out error is too small.
    """
    return Estimate(*_mean(stochtrace.monte_carlo_trace(), _operator(matvec, like, key, samples=samples), key, samples))


def diagonal(matvec: Callable, like: Tree, key: Any, samples: int) -> Estimate:
    """The diagonal, two trees shaped as `like`: the mean of `v * (A v)` over sign vectors v (Bekas et al., 2007).

    Unbiased; the variance of entry i is `(‖A[i]‖² - A[i, i]²) / samples`.
    """
    operator = _operator(matvec, like, key, samples=samples)
    return Estimate(*map(operator.unravel, _mean(stochtrace.monte_carlo_diagonal(), operator, key, samples)))


def frobenius_norm(matvec: Callable, like: Tree, key: Any, samples: int) -> Estimate:
    """`‖A‖_F`, the root of the mean of `‖A v‖²` over sign vectors v, its standard error by the delta method.

    The square is unbiased; the root is low by about `standard_error² / (2 ‖A‖_F)`.
    """
    integrand = stochtrace.monte_carlo_frobeniusnorm_squared()
    square, error = _mean(integrand, _operator(matvec, like, key, samples=samples), key, samples)
    norm = jnp.sqrt(square)
    return Estimate(norm, error / (2 * jnp.where(norm > 0, norm, 1)))


def _lanczos(apply: Callable, draw: Callable, key: Array, order: int) -> _Ritz:
    """`order` steps, fully orthogonal. Where the Krylov space ends, it goes on from a random orthogonal vector
    with beta = 0, to find multiple eigenvalues.

    matfree 0.6's divides by the vanished residual there: nan for the zero operator, -9 to 11 for the identity.
    """
    keys = jax.random.split(key, order + 1)
    start = draw(keys[0])[0]
    rounding = 10 * jnp.finfo(start.dtype).eps

    def orthogonal(v, basis):  # twice is enough (Kahan); rows not yet written are zero
        for _ in range(2):
            v = v - jnp.dot(jnp.dot(basis, v, precision=HIGHEST), basis, precision=HIGHEST)
        return v

    def step(carry, x):
        (basis, v, scale), (i, key) = carry, x
        basis = basis.at[i].set(v)
        image = apply(v)
        rest = orthogonal(image, basis)
        scale, beta = jnp.maximum(scale, jnp.linalg.norm(image)), jnp.linalg.norm(rest)
        ended = beta <= rounding * scale
        rest = jax.lax.cond(ended, lambda: orthogonal(jax.random.normal(key, v.shape, v.dtype), basis), lambda: rest)
        alpha = jnp.vdot(v, image, precision=HIGHEST)
        return (basis, rest / jnp.linalg.norm(rest), scale), (alpha, jnp.where(ended, 0, beta))

    init = (jnp.zeros((order, start.size), start.dtype), start / jnp.linalg.norm(start), jnp.zeros((), start.dtype))
    (basis, _, scale), (alpha, beta) = jax.lax.scan(step, init, (jnp.arange(order), keys[1:]))
    values, vectors = jnp.linalg.eigh(jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1))
    return _Ritz(values, vectors, basis, beta[-1], rounding * scale)


def top_eigenvalues(
    matvec: Callable, like: Tree, key: Any, count: int, order: int | None = None, which: str = "magnitude"
) -> TopEigenvalues:
    """`count` extreme eigenvalues by `order` steps of Lanczos, one matvec each, from a Gaussian vector.

    Raise `order` (default `2 count + 30`, at most n, where all is exact) where `error_bounds` are too large; so many
    vectors are held. `which`: `magnitude`, `largest` (the sharpness first) or `smallest` (the most negative first).
    """
    apply, zeros, unravel = _operator(matvec, like, key, count=count)
    order = min(zeros.size, 2 * count + 30) if order is None else order
    if not isinstance(order, int | np.integer):
        raise ValueError(f"order must be a whole number, not {order}")
    ranks = {"magnitude": lambda x: -jnp.abs(x), "largest": lambda x: -x, "smallest": lambda x: x}
    if which not in ranks:
        raise ValueError(f"unknown which={which!r}; known are {', '.join(ranks)}")
    if not count <= order <= zeros.size:
        raise ValueError(f"{count=}, {order=} and dimension {zeros.size}: count <= order <= dimension is needed")
    draw = stochtrace.sampler_normal(zeros, num=1)  # signs are orthogonal to (1, -1) with probability 1/2
    ritz = _lanczos(apply, draw, key, order)
    chosen = jnp.argsort(ranks[which](ritz.values))[:count]
    lifted = jax.vmap(unravel)(jnp.dot(ritz.vectors[:, chosen].T, ritz.basis, precision=HIGHEST))
    return TopEigenvalues(ritz.values[chosen], lifted, ritz.beta * jnp.abs(ritz.vectors[-1, chosen]) + ritz.rounding)


def spectrum(matvec: Callable, like: Tree, key: Any, order: int, samples: int = 1) -> Spectrum:
    """The density of the eigenvalues by stochastic Lanczos quadrature (Golub & Meurant, 2010; Ghorbani et al., 2019).

    Each sample is the Gauss quadrature of a random sign vector v, exact for `vᵀ A^k v / n` up to k = 2 order - 1, from
    `order` matvecs, holding `order` vectors. With order = n the nodes are the eigenvalues, each of weight 1/n.
    """
    apply, zeros, _ = _operator(matvec, like, key, order=order, samples=samples)
    if order > (n := zeros.size):
        raise ValueError(f"order {order} exceeds the dimension: order={n} already gives all {n} eigenvalues")
    draw = stochtrace.sampler_signs(zeros, num=1)

    def one(key):
        ritz = _lanczos(apply, draw, key, order)
        return ritz.values, ritz.vectors[0] ** 2 if order < n else jnp.full_like(ritz.values, 1 / n)

    nodes, weights = jax.lax.map(one, jax.random.split(key, samples))
    return Spectrum(nodes, weights / samples)


def density(spectrum: Spectrum, grid: Float[Array, " points"], width: float | Array) -> Float[Array, " points"]:
    """The spectrum smoothed by Gaussians of standard deviation `width`, at the points of `grid`; its integral is 1."""
    if tree.concrete(width) and not 0 < width < jnp.inf:
        raise ValueError(f"the width of the Gaussians must be positive and finite, not {width}")
    return jax.scipy.stats.norm.pdf(grid[:, None], spectrum.nodes.ravel(), width) @ spectrum.weights.ravel()
