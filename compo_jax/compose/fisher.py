"""Averages weighted by a diagonal of each task's curvature."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.compose.modules import Scalar, Weights, leafwise, mean_delta, same, weigh
from compo_jax.curvature import FisherDiagonal

Tree = Any


def diagonals(fishers: Sequence[FisherDiagonal | Tree], like: Tree) -> list[Tree]:
    """The means of `FisherDiagonal`s (other trees as they are) at the leaves of `like`; None where there is none.

    A Fisher may cover more leaves than `like`, or fewer. ValueError where it covers none, or others than the first
    does, or has another shape, or an entry below zero.
    """
    found = []
    for t, fisher in enumerate(fishers):
        mean = fisher.mean if isinstance(fisher, FisherDiagonal) else fisher
        entries = dict(zip(tree.names(mean), jax.tree.leaves(mean), strict=True))
        picked = tree.map_with_name(lambda name, x, e=entries: None if x is None else e.get(name), like)
        tree.require_like(picked, like, f"Fisher {t}")
        covered = tree.names(picked)
        if not covered or (found and covered != tree.names(found[0])):
            raise ValueError(
                f"Fisher {t} covers {', '.join(covered) or 'none'} of the merged leaves, and all must cover the same: "
                f"take compo_jax.curvature.fisher_diagonal of the parameters {', '.join(tree.names(like))}"
            )
        for name, x in zip(covered, jax.tree.leaves(picked), strict=True):
            sound = jnp.all(x >= 0)
            if tree.concrete(sound) and not sound:
                raise ValueError(
                    f"Fisher {t} has an entry in {name} that is negative or not a number: no curvature has"
                )
        found.append(picked)
    return found


def fisher_merge(
    params: Sequence[Tree],
    fishers: Sequence[FisherDiagonal | Tree],
    weights: Weights | None = None,
    *,
    damping: Scalar = 0.0,
) -> Tree:
    """`Σ w_t F_t θ_t / Σ w_t F_t`, entry by entry (Matena and Raffel, 2022, arXiv 2111.09832).

    The minimum of `Σ w_t ‖θ - θ_t‖²_{F_t}`: the joint optimum where the tasks' losses are quadratics with these
    diagonals.

    Args:
      params: T models, or their deltas: the merged delta comes out.
      fishers: one a task, `FisherDiagonal` (its mean is taken) or a tree shaped as the parameters; may have holes.
      weights: (tasks,), of the tasks' mean losses, default 1/T; `counts / sum(counts)` for the mean over all images.
        Not negative.
      damping: added to every task's diagonal, pulls to the weighted average.

    Entries that no task's Fisher sees are averaged with the weights. ValueError where the trees or the numbers of them
    don't fit, or for a negative weight or Fisher.
    """
    params = same(params)
    if len(fishers) != len(params):
        raise ValueError(f"{len(fishers)} Fishers were given for {len(params)} models: one for each")
    weights = weigh(weights, len(params), sign=False)
    covered = diagonals(fishers, params[0])
    mean = mean_delta(params, weights)
    together = leafwise(lambda _, x: x, covered)
    curvature = dict(zip(tree.names(together), jax.tree.leaves(together), strict=True))

    def correction(name, x):
        if name not in curvature:
            return jnp.zeros_like(x[0])
        wide = jnp.promote_types(x.dtype, jnp.float32)
        w = jnp.stack([jnp.asarray(one, wide) for one in weights]).reshape(-1, *[1] * (x.ndim - 1))
        pull = w * (curvature[name].astype(wide) + damping)
        total = jnp.sum(pull, axis=0)
        # around the mean, so that where nothing pulls the mean is what is left
        apart = x.astype(wide) - jnp.sum(w * x.astype(wide), axis=0) / jnp.sum(w, axis=0)
        return (jnp.sum(pull * apart, axis=0) / jnp.where(total > 0, total, 1)).astype(x.dtype)

    return tree.add(mean, leafwise(correction, params))
