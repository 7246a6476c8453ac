"""WUDI: of all merged matrices the one that disturbs each task least, where a task vector stands for the inputs that
it was trained on."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax import lapack
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.leaves import Stacked
from compo_jax.compose.matrices import Eps, Matrices, Rounded, above_rounding, by_matrix, product
from compo_jax.compose.numbers import Scalar, Weights, require_iterations, require_not_negative, require_number
from compo_jax.tree import Tree


def wudi(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    damping: Scalar = 0.0,
    iterations: int | None = None,
    learning_rate: Scalar = 1e-5,
    scale: Scalar = 1.0,
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """WUDI (Cheng et al., 2025, arXiv 2503.08099): `min_τ Σ_t ‖Δ_tᵀ (τ - Δ_t)‖² / ‖Δ_t‖²` in each layer.

    A gradient is a sum of inputs, so that the columns of Δ_t (in, out) are such sums: the merged layer's outputs are
    nearest to each task's on what these tell of its inputs. It is RegMean whose Gram matrices are
    `G_t = Δ_t Δ_tᵀ / ‖Δ_t‖²`. In closed form, the default, `τ = (Σ G_t)⁺ Σ G_t Δ_t`, computed as the minimum nearest to
    the sum of the deltas, where the iterations begin; directions below the rounding error keep the sum's part.

    Args:
      weights: (tasks,), multiply the deltas; default 1.
      damping: added to the diagonal of `Σ G_t`, whose trace is T; it pulls to the sum. The closed form has large
        numbers where the tasks' matrices are small in all and disagree, and a damping (1e-3, say) takes these away.
      iterations: steps of Adam from the sum instead; the authors' code takes 300, which in weak directions stays near
        the sum.
      learning_rate: of these steps, in the weights' units; the authors' is 1e-5.
      scale: of the merged task vector.
      eps, stacked: see `tsv`. What a matrix is, that it is (in, out), and what becomes of other leaves: see `matrices`.
        The authors' code merges the dense kernels of the blocks alone; give deltas with None elsewhere for that.

    One task alone is kept, and tasks whose columns are orthogonal to each other's add up.
    """
    if iterations is not None:
        require_iterations(None, iterations, "iterations")
    require_not_negative(damping=damping)
    require_number("learning_rate", learning_rate, "a positive number", lambda x: x > 0)

    def merged(x, errors):
        squares = jnp.sum(x**2, axis=(1, 2))
        norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        if iterations is None:
            return _nearest(x, norms, errors, damping)
        return _descended(x, norms, iterations, learning_rate)

    how = {"scale": scale, "eps": eps, "stacked": stacked, "check_finite": check_finite}
    return by_matrix(merged, base, deltas, weights, unit=iterations is None, **how)


def _nearest(x: Matrices, norms: Float[Array, " tasks"], errors: Rounded, damping: Scalar) -> jax.Array:
    """The minimum nearest to the sum. Factors, not Gram matrices, which would square the condition number."""
    tasks, size_in, size_out = x.shape
    total = jnp.sum(x, axis=0)
    rows = (x / norms[:, None, None]).swapaxes(1, 2).reshape(-1, size_in)  # (tasks out, in)
    q, r = jnp.linalg.qr(rows)
    p, s, u = lapack.svd(r)
    real = above_rounding(s, rows.shape, errors._replace(floor=errors.floor / jnp.min(norms)))

    def pulled(so_far, part):
        block, norm, one = part
        return so_far + product(product(block, p).T, one.T / norm, one - total), None

    none = jnp.zeros((len(s), size_out), x.dtype)
    pulls, _ = jax.lax.scan(pulled, none, (q.reshape(tasks, size_out, -1), norms, x))
    shares = real * s / (jnp.where(real > 0, s, 1) ** 2 + jnp.asarray(damping, s.dtype))
    return total + product(u.T * shares, pulls)


def _descended(x: Matrices, norms: Float[Array, " tasks"], iterations: int, rate: Scalar) -> jax.Array:
    import optax  # takes a while to load, and is needed here alone

    directions = x / norms[:, None, None]
    gram = jnp.sum(jax.lax.map(lambda d: product(d, d.T), directions), axis=0)
    aim = jnp.sum(jax.lax.map(lambda p: product(p[0], p[0].T, p[1]), (directions, x)), axis=0)
    adam = optax.adam(rate)

    def step(_, state):
        merged, moments = state
        change, moments = adam.update(2 * (product(gram, merged) - aim), moments)
        return optax.apply_updates(merged, change), moments

    start = jnp.sum(x, axis=0)
    return jax.lax.fori_loop(0, iterations, step, (start, adam.init(start)))[0]
