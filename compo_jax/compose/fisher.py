"""Averages weighted by a diagonal of each task's curvature."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.compose.leaves import leafwise, mean_delta, rounded
from compo_jax.compose.modules import same
from compo_jax.compose.numbers import Scalar, Weights, along, require_not_negative, weigh
from compo_jax.curvature import FisherDiagonal
from compo_jax.tree import Tree


def _mean(fisher: FisherDiagonal | Tree) -> Tree:
    if not isinstance(fisher, FisherDiagonal):
        return fisher
    wide = jax.tree.map(lambda x: jnp.asarray(x, tree.wide_type(x)), fisher.total)
    return fisher._replace(total=wide).mean


def diagonals(fishers: Sequence[FisherDiagonal | Tree], like: Tree, *, check_finite: bool = True) -> list[Tree]:
    """The means of `FisherDiagonal`s (other trees as they are) at the leaves of `like`; None where there is none.

    A Fisher may cover more leaves than `like`, or fewer. ValueError where it covers none, or others than the first
    does, or has another shape, or an entry that is below zero or, with `check_finite`, not finite.
    """
    found = []
    for t, fisher in enumerate(fishers):
        mean = _mean(fisher)
        entries = dict(zip(tree.names(mean), jax.tree.leaves(mean), strict=True))
        picked = tree.map_with_name(lambda name, x, e=entries: None if x is None else e.get(name), like)
        tree.require_like(picked, like, f"Fisher {t}")
        covered = tree.names(picked)
        if not covered or (found and covered != tree.names(found[0])):
            raise ValueError(
                f"Fisher {t} covers {', '.join(covered) or 'none'} of the merged leaves, and all must cover the same: "
                f"take compo_jax.curvature.fisher_diagonal of the parameters {', '.join(tree.names(like))}"
            )
        if check_finite:
            tree.require_finite(picked, f"Fisher {t}")
        for name, x in zip(covered, jax.tree.leaves(picked), strict=True):
            below = jnp.any(jnp.asarray(x) < 0)
            if tree.concrete(below) and below:
                raise ValueError(f"Fisher {t} has an entry in {name} that is negative: no curvature has")
        found.append(picked)
    return found


def fisher_merge(
    params: Sequence[Tree],
    fishers: Sequence[FisherDiagonal | Tree],
    weights: Weights | None = None,
    *,
    damping: Scalar = 0.0,
    wide: bool = False,
    check_finite: bool = True,
) -> Tree:
    """`Σ w_t F_t θ_t / Σ w_t F_t`, entry by entry (Matena and Raffel, 2022, arXiv 2111.09832).

    The minimum of `Σ w_t ‖θ - θ_t‖²_{F_t}`: the joint optimum where the tasks' losses are quadratics with these
    diagonals.

    Args:
      params: T models, or their deltas: the merged delta comes out.
      fishers: one a task, `FisherDiagonal` (its mean is taken) or a tree shaped as the parameters; may have holes.
      weights: (tasks,), of the tasks' mean losses, default 1/T; `counts / sum(counts)` for the mean over all images.
        Not negative.
      damping: added to every task's diagonal, pulls to the weighted average. Not negative.
      wide: what comes out isn't rounded to the models' types: for a delta that is added to something.

    Entries that no task's Fisher sees are averaged with the weights. ValueError where the trees or the numbers of them
    don't fit, for a negative weight or Fisher, and where a model or a Fisher isn't finite, naming its leaves.
    """
    params = same(params, check_finite=check_finite)
    if len(fishers) != len(params):
        raise ValueError(f"{len(fishers)} Fishers were given for {len(params)} models: one for each")
    require_not_negative(damping=damping)
    weights = weigh(weights, len(params), sign=False)
    covered = diagonals(fishers, params[0], check_finite=check_finite)
    mean = mean_delta(params, weights)
    together = leafwise(lambda _, x: x, covered)
    curvature = dict(zip(tree.names(together), jax.tree.leaves(together), strict=True))

    def correction(name, x):
        if name not in curvature:
            return jnp.zeros_like(x[0])
        f = curvature[name]
        f = f.astype(jnp.promote_types(f.dtype, x.dtype)) + damping
        highest = jnp.max(f, axis=0)
        w = along(weights, f)
        pull = (
            w * f / jnp.where(highest > 0, highest, 1)
        )  # neither too large nor too small, whatever the Fishers' scale
        total = jnp.sum(pull, axis=0)
        # around the mean, so that where nothing pulls the mean is what is left
        apart = x - jnp.sum(w * x, axis=0) / jnp.sum(w, axis=0)
        return jnp.sum(pull * apart, axis=0) / jnp.where(total > 0, total, 1)

    merged = tree.add(mean, leafwise(correction, params))
    return merged if wide else rounded(merged, params)
