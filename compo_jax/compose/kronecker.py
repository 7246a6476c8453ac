"""Averages weighted by what goes into each dense layer, and by the curvature that comes back out of it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.compose.modules import Scalar, Weights, aligned, mean_delta, weigh
from compo_jax.compose.solve import Solved, solve_merge, symmetric_solve
from compo_jax.curvature import Kronecker, merge_kronecker

Tree = Any


def _split(base: Tree, deltas: list[Tree], factors: Sequence[Kronecker], weights) -> tuple[list[Tree], Tree]:
    """(the deltas of the layers with factors, the weighted mean of the others)."""
    if len(factors) != len(deltas):
        raise ValueError(
            f"{len(factors)} tasks' Kronecker factors were given for {len(deltas)} modules: one for each "
            "(compo_jax.curvature.kronecker)"
        )
    if any(other.layout != factors[0].layout for other in factors):
        raise ValueError("the tasks' Kronecker factors are of different layers, and can't be weighed together")
    layers = dict(factors[0].layout)
    if not set(tree.names(deltas[0])) & set(layers):
        raise ValueError(
            f"the Kronecker factors are of {', '.join(layers)}, and the modules change none of these but "
            f"{', '.join(tree.names(deltas[0]))}"
        )
    parts = [tree.partition(delta, lambda name: name in layers) for delta in deltas]
    rest = [other for _, other in parts]
    return [covered for covered, _ in parts], mean_delta(rest, weights) if jax.tree.leaves(rest) else rest[0]


def regmean(
    base: Tree,
    deltas: Sequence[Tree],
    factors: Sequence[Kronecker],
    weights: Weights | None = None,
    *,
    scaling: Scalar = 1.0,
    damping: Scalar = 0.0,
    anchor: Weights | None = None,
) -> Tree:
    """RegMean (Jin et al., 2023, arXiv 2212.09849): `(Σ w_t A_t)⁻¹ Σ w_t A_t W_t` in each dense layer.

    A_t is the mean Gram matrix of the layer's inputs: the merged layer's outputs are nearest to the tasks' own in the
    weighted mean square. Leaves without factors are averaged.

    Args:
      factors: one `curvature.kronecker` a task; only the inputs' side is used.
      weights: (tasks,), default 1/T; with each task's `count / N` the Grams are summed over all images, as in the
        paper. Not negative.
      scaling: of the Gram matrices' off-diagonal entries; the paper's is 0.9, and makes them regular.
      damping: added to the summed Gram's diagonal.
      anchor: (tasks,), weights of the composition that damping pulls to; default zeros, the base.

    ValueError where a summed Gram matrix is singular (dead inputs, or more inputs than examples), naming the layer.
    """
    deltas = aligned(base, deltas)
    weights = weigh(weights, len(deltas), sign=False)
    anchor = weigh([0.0] * len(deltas) if anchor is None else anchor, len(deltas))
    covered, rest = _split(base, deltas, factors, weights)
    layers = dict(factors[0].layout)

    def layer(name, *changes):
        if changes[0] is None:
            return None
        lay = layers[name]
        x = jnp.stack([lay.matrix(jnp.asarray(change)) for change in changes])
        grams = jnp.stack([f.inputs[name] for f in factors])
        dtype = jnp.promote_types(x.dtype, grams.dtype)
        w, at = (jnp.stack([jnp.asarray(v, dtype) for v in values]) for values in (weights, anchor))
        eye = jnp.eye(grams.shape[-1], dtype=dtype)
        grams = jnp.einsum("t,t...->t...", w, grams.astype(dtype) * (scaling + (1 - scaling) * eye))
        centre = jnp.einsum("t,t...->...", at, x.astype(dtype))
        b = jnp.einsum("t...ik,t...kj->...ij", grams, x.astype(dtype) - centre, precision="highest")
        total = jnp.sum(grams, axis=0) + damping * eye
        # one layer at a time: XLA's batched LAPACK calls can wait for each other for ever on few cores (jax 0.10)
        systems = tuple(a.reshape(-1, *a.shape[len(lay.stack) :]) for a in (total, b))
        step, singular = jax.lax.map(lambda system: symmetric_solve(*system), systems)
        step = step.reshape(b.shape)
        if tree.concrete(singular) and jnp.any(singular):
            raise ValueError(
                f"the Gram matrix of the inputs of {name}, summed over the tasks, is singular: some inputs are dead or "
                "depend on others, or there are too few examples. Give a scaling below 1 (0.9) or a damping above 0"
            )
        return lay.leaf(centre + step).astype(changes[0].dtype)

    return tree.add(base, tree.combine(tree.map_with_name(layer, *covered), rest))


def kronecker_merge(
    base: Tree,
    deltas: Sequence[Tree],
    factors: Sequence[Kronecker],
    weights: Weights | None = None,
    damping: Scalar = 0.0,
    *,
    anchor: Weights | None = None,
    tolerance: Scalar | None = None,
    max_iterations: int = 200,
) -> Solved:
    """`(Σ w_t A_t ⊗ B_t + λ I) x = Σ w_t (A_t ⊗ B_t) delta_t` in each dense layer: `solve_merge` by K-FAC.

    The sum has no Kronecker form, so it is solved by conjugate gradients on exact products, all layers at once,
    preconditioned with the exact inverse of `merge_kronecker`, which has. Leaves without factors are averaged.

    Args:
      factors: one `curvature.kronecker` a task. The other arguments, warnings and errors are those of `solve_merge`.
    """
    deltas = aligned(base, deltas)
    weights = weigh(weights, len(deltas), sign=False)
    covered, rest = _split(base, deltas, factors, weights)
    eigen = merge_kronecker(factors, weights).eigen()
    highest = jnp.stack([jnp.max(values) for values in eigen.values.values()]).max()
    # the inverse of the rounding of eigenvalues that are zero would drown the others
    floor = damping + jnp.where(highest > 0, highest * jnp.finfo(highest.dtype).eps, 1)
    options = {"anchor": anchor, "tolerance": tolerance, "max_iterations": max_iterations}
    solved = solve_merge(
        base,
        covered,
        [f.matvec for f in factors],
        weights,
        damping,
        preconditioner=lambda v: eigen.solve(v, floor),
        **options,
    )
    return solved._replace(params=tree.add(solved.params, rest))
