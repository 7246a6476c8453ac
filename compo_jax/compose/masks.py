"""One task vector for all tasks, and what each task takes of it: masks and scales; or the entries that several want."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.compose.entries import computed, entrywise, sum_sign, summed_sizes, total
from compo_jax.compose.leaves import add_delta, assembled
from compo_jax.compose.modules import with_zeros
from compo_jax.compose.numbers import Scalar, Weights, require_number, weigh
from compo_jax.tree import Tree


class Unified(NamedTuple):
    """A model for each of T tasks, kept as one task vector: `base + scales[t] * masks[t] * vector`.

    Attributes:
      vector: shaped as the base, None where nothing changes; in float32 at least.
      masks: T trees of booleans shaped as the vector.
      scales: (tasks,).
    """

    vector: Tree
    masks: list[Tree]
    scales: Float[Array, " tasks"]

    def delta(self, task: int) -> Tree:
        """The task vector of that task, from 0 on."""
        require_task(task, len(self.masks))
        scale = self.scales[task]
        return jax.tree.map(lambda x, m: jnp.where(m, scale.astype(x.dtype) * x, 0), self.vector, self.masks[task])

    def params(self, base: Tree, task: int) -> Tree:
        """The model of that task."""
        return add_delta(base, self.delta(task))


def require_task(task: Any, tasks: int) -> int:
    """The task's number; ValueError where there is none such."""
    if isinstance(task, bool) or not isinstance(task, int | np.integer) or not 0 <= task < tasks:
        raise ValueError(
            f"task is the number of a module, from 0 to {tasks - 1} (the rule makes a model for each), not {task}"
        )
    return int(task)


def _elected(numbers: Array, *rows: Array) -> Array:
    """The elected sign with the largest magnitude that agrees with it."""
    sign = sum_sign(rows)
    largest = 0
    for x in rows:
        largest = jnp.maximum(largest, jnp.where(x * sign > 0, jnp.abs(x), 0))
    return sign * largest


def _alike(x: Array, y: Array) -> Array:
    """Whether both have one sign, however small they are."""
    return jnp.sign(x) * jnp.sign(y) > 0


def _masked(mask: Array, x: Array) -> Array:
    return jnp.where(mask, x, 0 * x)  # nan where x isn't finite: no mask hides it


def _agreeing(numbers: Array, x: Array, *rows: Array) -> Array:
    unified = _elected(numbers, *rows)
    return _masked(_alike(x, unified), unified)


def _agrees(numbers: Array, x: Array, unified: Array) -> Array:
    return _alike(x, unified)


def _emr_moved(numbers: Array, b: Array, x: Array, *rows: Array) -> Array:
    return b + numbers[0] * _agreeing(numbers, x, *rows)


def _emr_scale(deltas: list[Tree], task: int) -> Any:
    """`Σ |delta_t| / Σ |m_t τ|`, over all leaves; 1 where there is nothing to scale."""
    leaves = list(zip(*map(jax.tree.leaves, deltas), strict=True))
    masked = summed_sizes([computed(_agreeing, [row[task], *row]) for row in leaves])
    sizes = summed_sizes([row[task] for row in leaves])
    return jnp.where(masked > 0, sizes / jnp.where(masked > 0, masked, 1), 1)


def emr(base: Tree, deltas: Sequence[Tree], *, check_finite: bool = True) -> Unified:
    """EMR-Merging (Huang et al., 2024, arXiv 2405.17461): elect, mask, rescale.

    The unified vector τ has in each entry the sign of the modules' sum and the largest magnitude among those that
    agree; task t's mask is `delta_t τ > 0`, its scale `Σ |delta_t| / Σ |m_t τ|` over all leaves. One task is itself.
    The authors' code takes sums of each tensor's mean in the scales, so that small tensors count as large ones do, and
    a minus where a sum is zero; here scales are the paper's, and such an entry is zero, as in TIES.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)

    def one(function, *rows, dtype=None):
        return entrywise(function, list(rows), (), dtype or tree.wide_type(*rows))

    vector = jax.tree.map(lambda *rows: one(_elected, *rows), *deltas)
    wide = tree.wide_type(*jax.tree.leaves(vector))
    masks = [jax.tree.map(lambda x, v: one(_agrees, x, v, dtype=bool), delta, vector) for delta in deltas]
    scales = jnp.stack([jnp.asarray(_emr_scale(deltas, t), wide) for t in range(len(deltas))])
    return Unified(vector, masks, scales)


def emr_params(base: Tree, deltas: Sequence[Tree], *, task: int, check_finite: bool = True) -> Tree:
    """The model of one task by `emr`, rounded once, leaf by leaf."""
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    scale = _emr_scale(deltas, require_task(task, len(deltas)))

    def leaf(_, b, rows, __):
        return entrywise(_emr_moved, [b, rows[task], *rows], [scale])

    return assembled(base, deltas, leaf, check_finite=check_finite)


def _wanted(ratio: Any, x: Array, merged: Array) -> Array:
    return jnp.abs(x) >= ratio * jnp.abs(merged - x)


def _tall_mask(numbers: Array, x: Array, merged: Array) -> Array:
    return _wanted(numbers[0], x, merged)


def _total(numbers: Array, *rows: Array) -> Array:
    return total(numbers, *rows)


def _tall_moved(numbers: Array, b: Array, x: Array, *rows: Array) -> Array:
    merged = total(numbers[1:], *rows)
    return b + _masked(_wanted(numbers[0], x, merged), merged)


def _ratios(ratio: Any, tasks: int) -> list:
    """λ of each task; ValueError where one is negative."""
    ratios = weigh([ratio] * tasks if np.ndim(ratio) == 0 else ratio, tasks)
    if tree.concrete(ratios) and min(ratios) < 0:
        raise ValueError(f"ratio is one number, or one a module, none of them negative, not {ratio}")
    return ratios


def tall(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    ratio: Scalar | Sequence = 0.4,
    check_finite: bool = True,
) -> Unified:
    """TALL masks (Wang et al., 2024, arXiv 2405.07813): `m_t = 1{|delta_t| >= λ |τ - delta_t|}`, τ = Σ w_t delta_t.

    Where the base is nearer to task t's model than the sum is, by λ, task t doesn't take the entry.

    Args:
      weights: (tasks,), default 1: the authors' multi-task vector is the plain sum.
      ratio: λ, one number or one a module; the authors choose each task's of 0.2 to 0.6 by its validation accuracy.

    One task is itself.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    weights, ratios = weigh(weights, len(deltas), 1.0), _ratios(ratio, len(deltas))
    vector = jax.tree.map(lambda *rows: entrywise(_total, rows, weights, tree.wide_type(*rows)), *deltas)
    masks = [
        jax.tree.map(lambda x, v, r=r: entrywise(_tall_mask, [x, v], [r], bool), delta, vector)
        for r, delta in zip(ratios, deltas, strict=True)
    ]
    return Unified(vector, masks, jnp.ones(len(deltas)))


def tall_params(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    task: int,
    ratio: Scalar | Sequence = 0.4,
    check_finite: bool = True,
) -> Tree:
    """The model of one task by `tall`, rounded once, leaf by leaf."""
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    weights, ratios = weigh(weights, len(deltas), 1.0), _ratios(ratio, len(deltas))
    task = require_task(task, len(deltas))

    def leaf(_, b, rows, __):
        return entrywise(_tall_moved, [b, rows[task], *rows], [ratios[task], *weights])

    return assembled(base, deltas, leaf, check_finite=check_finite)


def _agreed(numbers: Array, b: Array, *rows: Array) -> Array:
    """Of T leaves; numbers are the scale, the least number of tasks, T ratios and T weights."""
    scale, least, ratios, weights = numbers[0], numbers[1], *jnp.split(numbers[2:], 2)
    merged = total(weights, *rows)
    votes = sum(_wanted(r, x, merged).astype(b.dtype) for r, x in zip(ratios, rows, strict=True))
    return b + _masked(votes >= least, scale * merged)


def consensus(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    least: Scalar = 2,
    ratio: Scalar | Sequence = 0.4,
    scale: Scalar = 0.3,
    check_finite: bool = True,
) -> Tree:
    """Consensus merging (Wang et al., 2024, arXiv 2405.07813): the sum's entries that at least `least` tasks want.

    `base + scale * 1{Σ_t m_t >= least} * Σ w_t delta_t`, with the masks of `tall`, which are of the unscaled sum.

    Args:
      least: tasks; 0 is `task_arithmetic`, 1 leaves out what no task wants, 2 (the authors') what only one does, and
        more than there are gives the base. Of one task, 1 is enough.
      ratio: λ of the masks, see `tall`.
      scale: of the sum; the authors choose it by the validation accuracy.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    require_number("scale", scale, "a finite number")
    require_number("least", least, "a whole number of tasks, from 0 on", lambda x: x >= 0 and x == int(x))
    weights, ratios = weigh(weights, len(deltas), 1.0), _ratios(ratio, len(deltas))

    def leaf(_, b, rows, __):
        return entrywise(_agreed, [b, *rows], [scale, least, *ratios, *weights])

    return assembled(base, deltas, leaf, check_finite=check_finite)
