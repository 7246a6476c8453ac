"""Exact curvature of any function of any pytree of arrays."""

from compo_jax.curvature.fisher import FisherDiagonal as FisherDiagonal
from compo_jax.curvature.fisher import fisher_diagonal as fisher_diagonal
