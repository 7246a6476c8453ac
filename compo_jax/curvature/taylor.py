"""The loss of every composition of T modules, forecast from T Hessian-vector products."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num

from compo_jax import tree
from compo_jax.curvature.batches import Batches, each, require_deterministic, require_examples, require_scalar, stack
from compo_jax.curvature.forward import linearise
from compo_jax.curvature.quadratic import minimise
from compo_jax.mesh import replicated
from compo_jax.tree import Tree

Weights = Num[Array, "*batch tasks"] | Num[np.ndarray, "*batch tasks"] | Sequence


class Measured(NamedTuple):
    """The loss and its derivatives in the weights, at the anchor and at the points of the check; `*batch` is a leading
    axis of batches, or nothing."""

    loss: Float[Array, "*batch"]
    slope: Float[Array, "*batch tasks"]
    gram: Float[Array, "*batch tasks tasks"]
    checked_loss: Float[Array, "*batch points"]
    checked_slope: Float[Array, "*batch points tasks"]


class Stratum(NamedTuple):
    """The batches of one data set, from which standard errors come.

    Attributes:
      share: its weight in the landscape.
      weights: (batches,), each batch's fraction of the examples.
      batches: what was measured on each batch.
    """

    share: Float[Array, ""]
    weights: Float[Array, " batches"]
    batches: Measured


class Remainder(NamedTuple):
    """How far the forecast is off where the truth was looked at.

    Attributes:
      weights: the compositions looked at.
      loss: `|forecast - true| / |true|` of the loss.
      slope: the same of the gradient in the weights, in the Euclidean norm.
    """

    weights: Float[Array, "points tasks"]
    loss: Float[Array, " points"]
    slope: Float[Array, " points"]


class Landscape(NamedTuple):
    """The second-order Taylor expansion of the loss of `base + Σ w_t delta_t` in the weights w, around `anchor`.

    Attributes:
      loss: at the anchor.
      slope: `g·delta_t`, with g the gradient at the anchor.
      gram: `delta_sᵀ H delta_t`, with H the Hessian at the anchor: the curvature Gram matrix.
      anchor: the weights it is expanded around; zeros are the base.
      checked: weights at which the true loss and slope were taken, too.
      checked_loss, checked_slope: these.
      strata: what each batch contributed.
    """

    loss: Float[Array, ""]
    slope: Float[Array, " tasks"]
    gram: Float[Array, "tasks tasks"]
    anchor: Float[Array, " tasks"]
    checked: Float[Array, "points tasks"]
    checked_loss: Float[Array, " points"]
    checked_slope: Float[Array, "points tasks"]
    strata: tuple[Stratum, ...]

    def predict(self, weights: Weights) -> Float[Array, "*batch"]:
        """The forecast of the loss at `weights` (..., tasks), which need not sum to one."""
        return _expansion(self.loss, self.slope, self.gram, self._weights(weights) - self.anchor)

    def standard_error(self, weights: Weights) -> Float[Array, "*batch"]:
        """Of `predict`, over the batches as independent draws of the data; nan where there is but one batch.

        It says what other data would change, not what the expansion leaves out: that is `remainder`.
        """
        step = self._weights(weights) - self.anchor
        variance = jnp.zeros(step.shape[:-1], self.loss.dtype)
        for share, fractions, (loss, slope, gram, *_) in self.strata:
            forecasts = jax.vmap(lambda *parts: _expansion(*parts, step))(loss, slope, gram)
            count = fractions.shape[0]
            spread = forecasts - jnp.average(forecasts, axis=0, weights=fractions)
            scatter = jnp.sum(fractions.reshape(-1, *[1] * (spread.ndim - 1)) ** 2 * spread**2, axis=0)
            variance += share**2 * scatter * (count / (count - 1) if count > 1 else jnp.nan)
        positive = variance != 0  # the root has no derivative at zero
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)

    def gap(self, weights: Weights) -> Float[Array, "*batch"]:
        """Ω = `½ Σ_{s<t} w_s w_t ‖delta_s - delta_t‖²_H` (Porrello et al., 2025, Theorem 1).

        The forecast at `weights`, which must sum to one, is the weighted mean of the forecasts of the single modules
        less Ω; where H is positive, Ω is, and the composition is forecast to be no worse than that mean.
        """
        w = self._weights(weights)
        sums = None if isinstance(w, jax.core.Tracer) else np.asarray(w).sum(axis=-1)
        if sums is not None and not np.allclose(sums, 1, atol=1e-4):
            raise ValueError(f"Ω is defined for weights that sum to one, and these sum to {sums}")
        return 0.5 * (jnp.sum(w * jnp.diag(self.gram), axis=-1) - _quadratic(self.gram, w))

    def best_weights(
        self,
        simplex: bool = True,
        lower: float | Sequence | np.ndarray = 0.0,
        upper: float | Sequence | np.ndarray = 1.0,
    ) -> Float[np.ndarray, " tasks"]:
        """The weights of the lowest forecast, a global minimum (`quadratic.minimise`); not under jit.

        Over the box `lower <= w <= upper`, with `simplex` those in it that sum to one.
        """
        tasks = len(self.anchor)
        gram, anchor = np.asarray(self.gram, np.float64), np.asarray(self.anchor, np.float64)
        slope = np.asarray(self.slope, np.float64) - gram @ anchor
        low, high = (np.broadcast_to(np.asarray(x, np.float64), (tasks,)) for x in (lower, upper))
        if not (np.all(np.isfinite(low) & np.isfinite(high)) and np.all(low <= high)):
            raise ValueError(f"the box needs finite bounds with lower <= upper, not {lower} to {upper}")
        return minimise(gram, slope, low, high, sum_to=1.0 if simplex else None)

    def remainder(self) -> Remainder:
        """How far to trust it: forecast against truth at the points of `check`."""
        step = self.checked - self.anchor
        loss = self.predict(self.checked)
        slope = self.slope + jnp.einsum("st,pt->ps", self.gram, step, precision=jax.lax.Precision.HIGHEST)
        difference, true = (jnp.linalg.norm(x, axis=-1) for x in (slope - self.checked_slope, self.checked_slope))

        def relative(error, size):  # nothing is nothing of anything
            return jnp.where(error == 0, 0, error / jnp.where(error == 0, 1, size))

        off = relative(jnp.abs(loss - self.checked_loss), jnp.abs(self.checked_loss))
        return Remainder(self.checked, off, relative(difference, true))

    def _weights(self, weights: Weights) -> Float[Array, "*batch tasks"]:
        w = jnp.asarray(weights, self.gram.dtype)
        if w.shape[-1:] != self.anchor.shape:
            raise ValueError(f"weights of shape {w.shape} were given for {len(self.anchor)} modules: one for each")
        if tree.concrete(w) and not np.all(np.isfinite(w)):
            raise ValueError(f"weights must be finite, not {w}")
        return w


def _checked_delta(delta: Tree, base: Tree, t: int, check_finite: bool) -> Tree:
    """The delta with None for each leaf of a branch that is None, so that deltas with other holes can be added."""
    tree.require_like(delta, base, f"delta {t}")
    tree.require_float(delta, f"delta {t}")
    if check_finite:
        tree.require_finite(delta, f"delta {t}")
    delta = jax.tree.map(jnp.asarray, tree.spread(delta, base))
    moved = jax.tree.map(lambda b, d: None if d is None else b, base, delta)
    tree.require_float(moved, f"what delta {t} is added to")
    return delta


def _quadratic(gram, w):
    return jnp.einsum("...s,st,...t->...", w, gram, w, precision=jax.lax.Precision.HIGHEST)


def _expansion(loss, slope, gram, step):
    return (
        loss + jnp.einsum("...t,t->...", step, slope, precision=jax.lax.Precision.HIGHEST) + _quadratic(gram, step) / 2
    )


def batches_of(args: tuple, batches: Iterable[tuple] | None, mesh: Mesh | None) -> Batches:
    """The data of a function that takes one batch as its arguments, or several."""
    if args and batches is not None:
        raise ValueError("the data were given twice, as arguments and as batches: give one of them")
    if batches is not None:
        return stack(batches, mesh)
    require_examples(args)  # one batch, of whatever the loss takes; nothing is said of its examples
    try:
        return Batches((jax.tree.map(lambda x: jnp.asarray(x)[None], args),), (1,))
    except TypeError as error:
        raise ValueError(f"a batch holds what is no array: close over it, partial(loss, ...) say ({error})") from error


def _points(anchor: Any, check: Any, tasks: int, dtype: Any) -> tuple[Array, Array]:
    """The anchor (tasks,) and the points to check (points, tasks), or their defaults."""
    if anchor is None:
        anchor = np.zeros(tasks)
    if check is None:
        half = np.arange(tasks) < (tasks + 1) // 2
        points = np.stack([np.full(tasks, 1 / tasks), half / half.sum(), ~half / (~half).sum()])
        known = tree.concrete(anchor) and np.shape(anchor) == (tasks,)
        # at the anchor the forecast is exact, which says nothing; of one that is traced the uniform one is likeliest
        there = np.all(np.abs(points - np.asarray(anchor)) < 1e-6, axis=1) if known else np.arange(3) == 0
        check = points[~there][:2]
    around, points = jnp.asarray(anchor, dtype), jnp.asarray(check, dtype)
    if around.shape != (tasks,) or points.ndim != 2 or points.shape[1] != tasks:
        raise ValueError(
            f"{tasks} modules need an anchor of shape ({tasks},) and points to check of shape (points, {tasks}), not "
            f"{around.shape} and {points.shape}"
        )
    if tree.concrete(around, points) and not all(np.all(np.isfinite(x)) for x in (around, points)):
        raise ValueError(f"the anchor and the points to check must be finite weights, not {around} and {points}")
    return around, points


def landscape(
    loss: Callable[..., jax.Array],
    base: Tree,
    deltas: Sequence[Tree],
    *args: Any,
    batches: Iterable[tuple] | None = None,
    anchor: Num[Array, " tasks"] | Num[np.ndarray, " tasks"] | Sequence | None = None,
    check: Num[Array, "points tasks"] | Num[np.ndarray, "points tasks"] | Sequence | None = None,
    rematerialise: bool = False,
    mesh: Mesh | None = None,
    check_finite: bool = True,
) -> Landscape:
    """The loss of `base + Σ w_t deltas[t]` for all w at once: one linearised gradient and T exact products per batch.

    `l(w) = l + s·(w - a) + ½ (w - a)ᵀ G (w - a)` (Porrello et al., 2025, section 2, of which only the Gram matrix is
    needed). The expansion is exact at its anchor and good near it: see `remainder`. Modules that have gone far are
    forecast far better around their uniform composition, `anchor=[1/T] * T`, than around the base.

    Args:
      loss: `(params, *batch) -> scalar`, the mean over the batch.
      deltas: T >= 2 trees shaped as `base`, None where nothing changes (`adapter.delta` of LoRA, (IA)³, full modules).
      args: the one batch, or with `batches` nothing.
      batches: tuples of what follows the parameters; scanned over, the sizes may differ. Gives standard errors.
      anchor: weights to expand around; default zeros, the base.
      check: compositions (points, T) at which the true loss and gradient are taken as well, for `remainder`; default:
        the first two, but for the anchor itself, of the uniform composition and those of the first and of the second
        half of the modules; of a traced anchor the halves.
      rematerialise, mesh: as for `hessian`.
      check_finite: ValueError where base, a delta, or what was measured holds a number that isn't finite; False lets it
        through. Under a trace it does.

    ValueError where a delta doesn't fit the base (with the path) or moves an integer leaf; for one module only; for a
    loss that isn't deterministic, or more than one number.
    """
    base, deltas = jax.tree.map(jnp.asarray, base), list(deltas)
    tasks = len(deltas)
    if tasks < 2:
        raise ValueError(f"a landscape is of two modules or more, and {tasks} was given: of one, use hvp")
    if check_finite:
        tree.require_finite(base, "base")
    deltas = [_checked_delta(delta, base, t, check_finite) for t, delta in enumerate(deltas)]
    # Weights and gram are not for 16 bits, nor is the sum of the deltas.
    dtype = jnp.result_type(*(x.dtype for x in jax.tree.leaves(deltas)), jnp.float32)
    deltas = jax.tree.map(lambda x: x.astype(dtype), deltas)
    if not args and batches is None:
        plain, args = loss, (np.zeros(1),)
        loss = lambda params, _: plain(params)
    data = batches_of(args, batches, mesh)
    require_deterministic(loss, base, *data.first)
    around, points = _points(anchor, check, tasks, dtype)
    if mesh is not None:
        base, deltas = jax.device_put((base, deltas), replicated(mesh))
    function = jax.checkpoint(loss) if rematerialise else loss

    def measure(*batch):
        def composed(w):
            params = tree.add(base, tree.weighted_sum(deltas, w))
            return require_scalar(function(params, *batch)).astype(dtype)

        (value, slope), push, _ = linearise(jax.value_and_grad(composed), around)
        gram = jax.lax.map(lambda direction: push(direction)[1], jnp.eye(tasks, dtype=dtype))
        return Measured(value, slope, (gram + gram.T) / 2, *jax.lax.map(jax.value_and_grad(composed), points))

    measured, fractions = each(measure, data)
    fractions = fractions.astype(dtype)
    mean = jax.tree.map(lambda x: jnp.average(x, axis=0, weights=fractions), measured)
    if check_finite:
        tree.require_finite({"loss": mean.loss, "slope": mean.slope, "gram": mean.gram}, "the landscape at its anchor")
    stratum = Stratum(jnp.ones((), dtype), fractions, measured)
    return Landscape(*mean[:3], around, points, *mean[3:], (stratum,))


def mix(landscapes: Sequence[Landscape], weights: Sequence[float | int] | Array) -> Landscape:
    """The landscape of the weighted sum of losses, such as of the tasks' with the tasks' weights: everything is linear.

    Standard errors take the landscapes' data for independent: of other images each.

    ValueError where the landscapes have other anchors or points of check: they are of other modules, or elsewhere.
    """
    if len(landscapes) != len(weights) or not landscapes:
        raise ValueError(f"{len(landscapes)} landscapes were given {len(weights)} weights")
    if tree.concrete(weights) and not np.all(np.isfinite(np.asarray(weights))):
        raise ValueError(f"the weights of landscapes must be finite, not {weights}")
    head = landscapes[0]
    for other in landscapes[1:]:
        for name in ("anchor", "checked"):
            a, b = getattr(head, name), getattr(other, name)
            if a.shape != b.shape or not (isinstance(a, jax.core.Tracer) or np.array_equal(a, b)):
                raise ValueError(f"landscapes with different {name} can't be added: {a} and {b}")
    summed = tree.weighted_sum([land._replace(anchor=None, checked=None, strata=()) for land in landscapes], weights)
    strata = tuple(
        s._replace(share=w * s.share) for w, land in zip(weights, landscapes, strict=True) for s in land.strata
    )
    return summed._replace(anchor=head.anchor, checked=head.checked, strata=strata)
