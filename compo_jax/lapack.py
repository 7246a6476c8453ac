"""Factorisations of one matrix, which numbers that aren't finite can't stop.

LAPACK's SVD of a matrix with an infinity may never return, and XLA's batched calls of LAPACK can wait for each other
for ever on few cores (jax 0.10): map over matrices with `jax.lax.map`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _guarded(factors: Callable[[Array], Any], x: Array) -> Any:
    sound = jnp.all(jnp.isfinite(x))
    return jax.tree.map(lambda y: jnp.where(sound, y, jnp.nan), tuple(factors(jnp.where(sound, x, 0))))


def svd(x: Float[Array, "in out"]) -> tuple[Float[Array, "in k"], Float[Array, " k"], Float[Array, "k out"]]:
    """(U, σ, Vᵀ), NaN where an entry isn't finite."""
    return _guarded(lambda m: jnp.linalg.svd(m, full_matrices=False), x)


def eigh(x: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """(eigenvalues, eigenvectors in columns), NaN where an entry isn't finite."""
    return _guarded(jnp.linalg.eigh, x)
