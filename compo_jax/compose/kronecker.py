"""Averages weighted by what goes into each dense layer, and by the curvature that comes back out of it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.compose.leaves import add_delta, mean_delta, require_sound
from compo_jax.compose.modules import with_zeros
from compo_jax.compose.numbers import (
    Scalar,
    Weights,
    along,
    anchored,
    require_iterations,
    require_not_negative,
    require_number,
    weigh,
)
from compo_jax.compose.solve import Solved, solve_merge, symmetric_solve
from compo_jax.curvature import Kronecker
from compo_jax.tree import Tree


def split_layers(
    deltas: list[Tree], factors: Sequence[Kronecker], weights: list, finite: Sequence[str]
) -> tuple[list[Tree], list[Kronecker], Tree]:
    """(the deltas of the layers with factors, the factors in float32 at least, the weighted mean of the others).

    `finite`: the sides of the factors, inputs and outputs, that NaN and infinities are looked for in.
    """
    if len(factors) != len(deltas):
        raise ValueError(
            f"{len(factors)} tasks' Kronecker factors were given for {len(deltas)} modules: one for each "
            "(compo_jax.curvature.kronecker)"
        )
    if any(other.layout != factors[0].layout for other in factors):
        raise ValueError("the tasks' Kronecker factors are of different layers, and can't be weighed together")
    layers = dict(factors[0].layout)
    shapes = {name: jnp.shape(leaf) for name, leaf in tree.by_name(deltas[0]).items()}
    if not set(shapes) & set(layers):
        raise ValueError(
            f"the Kronecker factors are of {', '.join(layers)}, and the modules change none of these but "
            f"{', '.join(shapes)}"
        )
    for name, layer in layers.items():
        if shapes.get(name, seen := (*layer.stack, *layer.shape)) != seen:
            raise ValueError(f"{name} is {shapes[name]} in the modules and {seen} in the layer that the factors are of")
    for t, factor in enumerate(factors):
        for side in finite:
            tree.require_finite(getattr(factor, side), f"task {t}'s Kronecker factor of the {side}")
    parts = [tree.partition(delta, lambda name: name in layers) for delta in deltas]
    rest = [other for _, other in parts]
    return (
        [covered for covered, _ in parts],
        [dataclasses.replace(f, inputs=_wide(f.inputs), outputs=_wide(f.outputs)) for f in factors],
        mean_delta(rest, weights) if jax.tree.leaves(rest) else rest[0],
    )


def _wide(arrays: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.asarray(x, tree.wide_type(x)), arrays)


def regmean(
    base: Tree,
    deltas: Sequence[Tree],
    factors: Sequence[Kronecker],
    weights: Weights | None = None,
    *,
    scaling: Scalar = 1.0,
    damping: Scalar = 0.0,
    anchor: Weights | str | None = None,
    check_finite: bool = True,
) -> Tree:
    """RegMean (Jin et al., 2023, arXiv 2212.09849): `(Σ w_t A_t)⁻¹ Σ w_t A_t W_t` in each dense layer.

    A_t is the mean Gram matrix of the layer's inputs: the merged layer's outputs are nearest to the tasks' in the
    weighted mean square. Leaves without factors are averaged.

    Args:
      factors: one `curvature.kronecker` a task; only the inputs' side is used.
      weights: (tasks,), default 1/T; with each task's `count / N` the Grams are summed over all images, as in the
        paper. Not negative.
      scaling: of the Gram matrices' off-diagonal entries; the paper's is 0.9, and makes them regular.
      damping: added to the summed Gram's diagonal.
      anchor: what damping pulls to, see `solve_merge`.

    ValueError where a summed Gram matrix is singular (dead inputs, or more inputs than examples), naming the layer, and
    where a module or a Gram matrix isn't finite.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    require_number("scaling", scaling, "a part of the off-diagonal entries, from 0 to 1", lambda x: 0 <= x <= 1)
    require_not_negative(damping=damping)
    weights = weigh(weights, len(deltas), sign=False)
    anchor = anchored(anchor, len(deltas))
    covered, factors, rest = split_layers(deltas, factors, weights, ["inputs"] if check_finite else [])
    layers = dict(factors[0].layout)

    def layer(name, *changes):
        if changes[0] is None:
            return None
        lay = layers[name]
        wide = tree.wide_type(*changes, *[f.inputs[name] for f in factors])
        x = jnp.stack([lay.matrix(jnp.asarray(change, wide)) for change in changes])
        grams = jnp.stack([f.inputs[name].astype(wide) for f in factors])
        eye = jnp.eye(grams.shape[-1], dtype=wide)
        grams = along(weights, grams) * grams * (scaling + (1 - scaling) * eye)
        centre = jnp.sum(along(anchor, x) * x, axis=0)
        b = jnp.einsum("t...ik,t...kj->...ij", grams, x - centre, precision="highest")
        total = jnp.sum(grams, axis=0) + damping * eye
        # one layer at a time, see lapack.py
        systems = tuple(a.reshape(-1, *a.shape[len(lay.stack) :]) for a in (total, b))
        step, singular = jax.lax.map(lambda system: symmetric_solve(*system), systems)
        step = step.reshape(b.shape)
        if tree.concrete(singular) and jnp.any(singular):
            raise ValueError(
                f"the Gram matrix of the inputs of {name}, summed over the tasks, is singular: some inputs are dead or "
                "depend on others, or there are too few examples. Give a scaling below 1 (0.9) or a damping above 0"
            )
        return lay.leaf(centre + step)

    merged = tree.combine(tree.map_with_name(layer, *covered), rest)
    return add_delta(base, merged, check_finite=check_finite)


def kronecker_merge(
    base: Tree,
    deltas: Sequence[Tree],
    factors: Sequence[Kronecker],
    weights: Weights | None = None,
    damping: Scalar = 0.0,
    *,
    anchor: Weights | str | None = None,
    tolerance: Scalar | None = None,
    max_iterations: int = 200,
    check_finite: bool = True,
) -> Solved:
    """`(Σ w_t A_t ⊗ B_t + λ I) x = Σ w_t (A_t ⊗ B_t) delta_t` in each dense layer: `solve_merge` by K-FAC.

    The sum has no Kronecker form, so it is solved by conjugate gradients on exact products, all layers at once,
    preconditioned in the eigenbasis of `merge_kronecker`, which has. Leaves without factors are averaged.

    Args:
      factors: one `curvature.kronecker` a task. The other arguments, warnings and errors are those of `solve_merge`.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    require_not_negative(damping=damping)
    require_iterations(tolerance, max_iterations)
    weights = weigh(weights, len(deltas), sign=False)
    anchor = anchored(anchor, len(deltas))
    covered, factors, rest = split_layers(deltas, factors, weights, ["inputs", "outputs"] if check_finite else [])
    options = {"anchor": anchor, "tolerance": tolerance, "max_iterations": max_iterations}
    solved = solve_merge(
        base,
        covered,
        [f.matvec for f in factors],
        weights,
        damping,
        preconditioner=factors,
        check_finite=check_finite,
        **options,
    )
    if not jax.tree.leaves(rest):
        return solved
    params = tree.add(solved.params, rest)  # whose leaves are others
    if check_finite:
        require_sound(params, base)
    return solved._replace(params=params)
