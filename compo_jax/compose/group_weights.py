"""The best weights of T modules cut into groups of layers, from their landscape, expanded again where they are."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.groups import Grouping, Groups, grouped
from compo_jax.compose.leaves import Stacked
from compo_jax.compose.modules import with_holes
from compo_jax.compose.numbers import Scalar, require_iterations, require_not_negative, require_number
from compo_jax.curvature import Landscape, landscape
from compo_jax.curvature.batches import Batches, mean, stack
from compo_jax.curvature.quadratic import minimise
from compo_jax.tree import Tree

Weights = Float[Array, "tasks groups"] | Float[np.ndarray, "tasks groups"] | Sequence


class Weighed(NamedTuple):
    """A composition whose weights differ between groups of layers.

    Attributes:
      params: the composed parameters.
      weights: (tasks, groups).
      errors: standard errors of the weights over the batches, zero where a weight is at a bound; nan of one batch.
      groups: the names of the groups.
      forecast: of the loss, by the last landscape.
      forecast_error: its standard error over the batches.
      loss: the true loss, of the same batches.
      rounds: trials that were made, each of the best weights of a landscape.
      remainders: (rounds,), how far each one's forecast was off the true loss, relatively.
      converged: whether the last remainder is within the tolerance; always of one round.
    """

    params: Tree
    weights: Float[np.ndarray, "tasks groups"]
    errors: Float[np.ndarray, "tasks groups"]
    groups: tuple[str, ...]
    forecast: float
    forecast_error: float
    loss: float
    rounds: int
    remainders: Float[np.ndarray, " rounds"]
    converged: bool


class GroupLandscape(NamedTuple):
    """The landscape of T modules cut into groups: a function of (tasks, groups) weights.

    Attributes:
      landscape: of the tasks * groups parts, task after task.
      groups: see `Groups`.
    """

    landscape: Landscape
    groups: Groups

    @property
    def shape(self) -> tuple[int, int]:
        count = len(self.groups.names)
        return self.landscape.anchor.size // count, count

    def predict(self, weights: Weights) -> Float[Array, ""]:
        """The forecast of the loss at `weights` (tasks, groups)."""
        return self.landscape.predict(jnp.asarray(weights).reshape(-1))

    def standard_error(self, weights: Weights) -> Float[Array, ""]:
        """Of `predict`, see `Landscape.standard_error`."""
        return self.landscape.standard_error(jnp.asarray(weights).reshape(-1))

    def damped_gram(self, damping: Scalar | None) -> Float[np.ndarray, "parts parts"]:
        gram = np.asarray(self.landscape.gram, np.float64)
        if damping is None and np.all(np.isfinite(gram)):  # and a little more, so that rounding doesn't undo it
            damping = 1.001 * max(0.0, -float(np.linalg.eigvalsh(gram)[0]))
        return gram + (damping or 0.0) * np.eye(len(gram))

    def best_weights(
        self, lower: Any = 0.0, upper: Any = 1.0, damping: Scalar | None = None
    ) -> Float[np.ndarray, "tasks groups"]:
        """The weights of the lowest forecast in the box `lower <= w <= upper`; not under jit.

        Args:
          damping: λ of `½ λ |w - anchor|²`, added to the forecast; default the least that leaves no negative
            directions, for which the programme would take exponential time, and which no expansion holds far for.
        """
        flat = self.landscape
        low, high = (np.broadcast_to(np.asarray(x, np.float64), self.shape).ravel() for x in (lower, upper))
        gram, anchor = self.damped_gram(damping), np.asarray(flat.anchor, np.float64)
        return minimise(gram, np.asarray(flat.slope, np.float64) - gram @ anchor, low, high).reshape(self.shape)

    def weight_errors(
        self,
        weights: Float[np.ndarray, "tasks groups"],
        lower: Any = 0.0,
        upper: Any = 1.0,
        damping: Scalar | None = None,
    ) -> Float[np.ndarray, "tasks groups"]:
        """Standard errors of `best_weights` over the batches as independent draws, to first order: `H⁻¹ cov(g) H⁻¹` of
        the weights that are at no bound, g the slope at them and H the Gram matrix; nan where there is one batch."""
        w = np.asarray(weights, np.float64).ravel()
        low, high = (np.broadcast_to(np.asarray(x, np.float64), self.shape).ravel() for x in (lower, upper))
        free = (w > low) & (w < high)
        step = w - np.asarray(self.landscape.anchor, np.float64)
        covariance = np.zeros((free.sum(), free.sum()))
        for share, fractions, (_, slope, gram, *_) in self.landscape.strata:
            slopes = np.asarray(slope, np.float64) + np.asarray(gram, np.float64) @ step
            count, fractions = len(slopes), np.asarray(fractions, np.float64)
            spread = (slopes - fractions @ slopes)[:, free] * fractions[:, None] * float(share)
            covariance += spread.T @ spread * (count / (count - 1) if count > 1 else np.nan)
        errors = np.zeros(w.size)
        if not np.all(np.isfinite(covariance)):
            errors[free] = np.nan
            return errors.reshape(self.shape)
        inverse = np.linalg.pinv(self.damped_gram(damping)[np.ix_(free, free)], rcond=1e-10)
        errors[free] = np.sqrt(np.maximum(np.diagonal(inverse @ covariance @ inverse), 0))
        return errors.reshape(self.shape)


def group_landscape(
    loss: Callable[..., jax.Array],
    base: Tree,
    deltas: Sequence[Tree],
    batches: Iterable[tuple],
    *,
    groups: Grouping | Groups = "layers",
    anchor: Weights | None = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
    **options: Any,
) -> GroupLandscape:
    """The loss of `base + Σ w_{t,g} delta_t` for all weights: an exact Hessian product a module and group.

    The parts are never made: the landscape is one in the tasks * groups weights themselves.

    Args:
      loss, batches: see `curvature.landscape`.
      groups: see `groups.grouped`.
      anchor: (tasks, groups) weights to expand around; default the average, 1/T.
      options: of `curvature.landscape`: `check` (points, tasks * groups; default the anchor alone, where the forecast
        is exact, as other points cost a gradient each), `rematerialise`, `mesh`.
    """
    deltas = with_holes(base, deltas, check_finite=check_finite)
    if check_finite:
        tree.require_finite(base, "the base")
    groups = groups if isinstance(groups, Groups) else grouped(base, deltas, groups, stacked)
    shape = (len(deltas), len(groups.names))
    around = np.full(shape, 1 / shape[0]) if anchor is None else np.asarray(anchor)
    if around.shape != shape:
        raise ValueError(f"the anchor is of {shape[0]} modules and {shape[1]} groups, {shape}, and not {around.shape}")
    wide = tree.wide_type(*jax.tree.leaves(deltas))
    units = [{"weights": jnp.asarray(row.reshape(shape), wide)} for row in np.eye(shape[0] * shape[1])]

    def of_weights(point, *batch):
        return loss(tree.add(base, groups.combine(deltas, point["weights"])), *batch)

    options.setdefault("check", around.reshape(1, -1))
    flat = landscape(
        of_weights, {"weights": jnp.zeros(shape, wide)}, units, batches=batches, anchor=around.ravel(),
        check_finite=check_finite, **options,
    )  # fmt: skip
    return GroupLandscape(flat, groups)


class _Trial(NamedTuple):
    """Weights that a landscape takes for the best in its box, its forecast there, the true loss, and the landscape."""

    weights: Float[np.ndarray, "tasks groups"]
    forecast: float
    loss: float
    expansion: GroupLandscape

    @property
    def remainder(self) -> float:
        return abs(self.forecast - self.loss) / max(abs(self.loss), np.finfo(float).tiny)


def layer_weights(
    loss: Callable[..., jax.Array],
    base: Tree,
    deltas: Sequence[Tree],
    batches: Iterable[tuple],
    *,
    groups: Grouping = "layers",
    lower: Any = 0.0,
    upper: Any = 1.0,
    damping: Scalar | None = None,
    rounds: int = 1,
    tolerance: Scalar = 0.01,
    radius: Scalar = np.inf,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Weighed:
    """The composition with the best weights of each group of layers, from tasks * groups Hessian products a round.

    One round is the optimum of the forecast around the average. With more `rounds` the landscape is expanded again
    around its own optimum, until the forecast there is off by less than `tolerance`: where a step made the loss worse
    it isn't taken, and the next one is sought in a box half as wide.

    Args:
      loss: `(params, *batch) -> scalar`, the mean over a batch of the tasks' images.
      batches: tuples of what follows the parameters, gone through several times; more than one for standard errors.
      groups: see `groups.grouped`; `tasks` for one weight a module.
      lower, upper: of the weights, or (tasks, groups) of them.
      damping: see `GroupLandscape.best_weights`.
      radius: how far a weight may move in a round, to begin with.

    Not under jit. ValueError as `curvature.landscape`.
    """
    require_iterations(tolerance, rounds, "rounds")
    require_number("rounds", rounds, "a whole number from 1 on", lambda x: x >= 1)
    if damping is not None:
        require_not_negative(damping=damping)
    if not radius > 0:
        raise ValueError(f"radius is how far a weight may move in a round, a positive number, not {radius}")
    deltas = with_holes(base, deltas, check_finite=check_finite)
    groups, batches = grouped(base, deltas, groups, stacked), list(batches)
    start = np.clip(np.full((len(deltas), len(groups.names)), 1 / len(deltas)), lower, upper)
    data, mean_loss = stack(batches), jax.jit(functools.partial(_mean_loss, loss, groups))

    def expand(at):
        options = {"groups": groups, "anchor": at, "check_finite": check_finite}
        return group_landscape(loss, base, deltas, batches, **options)

    def attempt(expansion, lower, upper):
        w = expansion.best_weights(lower, upper, damping)
        true = mean_loss(base, deltas, jnp.asarray(w), data)
        return _Trial(w, float(expansion.predict(w)), float(true), expansion)

    best, remainders = _descent(expand, attempt, start, (lower, upper, radius), rounds, tolerance)
    return Weighed(
        params=groups.compose(base, deltas, best.weights, check_finite=check_finite),
        weights=best.weights,
        errors=best.expansion.weight_errors(best.weights, lower, upper, damping),
        groups=groups.names,
        forecast=best.forecast,
        forecast_error=float(best.expansion.standard_error(best.weights)),
        loss=best.loss,
        rounds=len(remainders),
        remainders=np.array(remainders),
        converged=rounds == 1 or remainders[-1] < tolerance,
    )


def _mean_loss(
    loss: Callable, groups: Groups, base: Tree, deltas: Sequence[Tree], weights: Array, data: Batches
) -> Array:
    params = tree.add(base, groups.combine(deltas, weights))
    return mean(lambda *batch: loss(params, *batch), data)


def _descent(
    expand: Callable[[np.ndarray], GroupLandscape],
    attempt: Callable[..., _Trial],
    at: Float[np.ndarray, "tasks groups"],
    bounds: tuple[Any, Any, Scalar],
    rounds: int,
    tolerance: Scalar,
) -> tuple[_Trial, list[float]]:
    """(the last trial that was taken, how far each one's forecast was off), see `layer_weights`; bounds are lower and
    upper, and the radius."""
    lower, upper, radius = bounds
    expansion, remainders = expand(at), []
    while True:
        trial = attempt(expansion, np.maximum(lower, at - radius), np.minimum(upper, at + radius))
        remainders.append(trial.remainder)
        before, moved = float(expansion.landscape.loss), np.max(np.abs(trial.weights - at))
        better = trial.loss <= before + 1e-6 * abs(before)
        last = len(remainders) == rounds
        if rounds == 1 or (better and (last or moved < radius) and (last or trial.remainder < tolerance)):
            return trial, remainders
        if last or moved == 0:
            return _Trial(at, before, before, expansion), remainders
        if better:
            radius = radius if moved < radius else 2 * radius
            at, expansion = trial.weights, expand(trial.weights)
        else:
            radius = moved / 2
