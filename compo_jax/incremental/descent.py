"""Steps that a penalty can't make overshoot, whatever its weight and the scale of its curvature.

Each adapted weight, and each layer of a stacked one, is looked at by itself: one stiff layer doesn't hold the others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from compo_jax import adapters, tree
from compo_jax.tree import Tree

Penalty = Callable[[Tree], jax.Array]


def penalty_step(
    penalty: Penalty, params: Tree, rate: float | jax.Array, clip: float = 100.0
) -> tuple[Tree, dict[str, jax.Array]]:
    """(the update of one step down the penalty, metrics); the penalty after it is not larger than before.

    The update is `-rate` times the gradient g, every tensor of it (of stacked layers each one's) clipped to the L2 norm
    `clip` (Porrello et al., 2025). An update u is shortened where it would go beyond the lowest point on its way,
    `-gᵀu / uᵀHu` of it with the Hessian H. That point is exact where the penalty is quadratic in the parameters; where
    it is not (LoRA), the whole update is halved until the penalty doesn't grow.

    Metrics: `penalty`, its value before the step; `penalty_step`, the part of the step that was taken, the smallest of
    all weights and layers: 1 where none was shortened.
    """
    (value, gradient), push = jax.linearize(jax.value_and_grad(penalty), params)
    update = tree.map_with_name(lambda name, g: None if g is None else _clipped(name, -rate, g, clip), gradient)
    parts = _parts({k: -x for k, x in _products(gradient, update).items()}, _products(push(update)[1], update))
    update, share = _halved(penalty, params, _times(parts, update), value, jnp.zeros_like(value))
    return update, {"penalty": value, "penalty_step": share * jnp.min(jnp.stack([jnp.min(x) for x in parts.values()]))}


def limit_update(penalty: Penalty, params: Tree, update: Tree, gradient: Tree) -> Tree:
    """The update, shortened where the penalty would gain more by it than the rest of the loss can lose.

    For a penalty that is a part of the loss, whose optimiser (Adam) takes steps of a fixed length and so swings around
    the bottom of a steep one. With r the change of the rest of the loss to first order, taken as a gain, the update u
    is shortened to the lowest point of `r t + penalty(params + t u)`.

    Args:
      update: of the optimiser, to be added to the parameters.
      gradient: of the whole loss, the penalty's included.
    """
    (value, pull), push = jax.linearize(jax.value_and_grad(penalty), params)
    rest = {k: jnp.abs(x) for k, x in _products(jax.tree.map(jnp.subtract, gradient, pull), update).items()}
    falls = {k: rest[k] - x for k, x in _products(pull, update).items()}
    parts = _parts(falls, _products(push(update)[1], update))
    gain = sum((jnp.sum(rest[k] * parts[k]) for k in parts), start=jnp.zeros_like(value))
    return _halved(penalty, params, _times(parts, update), value, gain)[0]


def _parts(falls: dict[str, jax.Array], bends: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The t from 0 to 1 at which `-falls t + ½ bends t²` is lowest, for each weight; 1 where it bends down."""
    return {
        k: jnp.where(bends[k] > falls[k], jnp.maximum(falls[k], 0) / jnp.where(bends[k] > 0, bends[k], 1), 1.0)
        for k in falls
    }


def _halved(penalty: Penalty, params: Tree, update: Tree, value: jax.Array, gain: jax.Array) -> tuple[Tree, jax.Array]:
    """(the update times a share, the share), halved until the penalty is at most `value + share * gain`."""

    def excess(share):
        after = penalty(jax.tree.map(lambda p, u: p + (share * u).astype(p.dtype), params, update))
        return after - value - share * gain - 1e-5 * jnp.abs(value)  # which sums may differ by in rounding

    share, over = jax.lax.while_loop(
        lambda s: (s[1] > 0) & (s[0] > 1e-9),
        lambda s: (s[0] / 2, excess(s[0] / 2)),
        (jnp.full_like(value, 2), jnp.full_like(value, jnp.inf)),
    )
    share = jnp.where(over > 0, 0, share)
    return jax.tree.map(lambda u: (share * u).astype(u.dtype), update), share


def _clipped(name: str, rate: float | jax.Array, gradient: jax.Array, clip: float) -> jax.Array:
    """`rate` times the gradient, in its type, whose norm, of stacked layers each one's, is at most `clip`."""
    wide = gradient.astype(tree.wide_type(gradient))
    axes = tuple(range(1 if adapters.is_stacked(f"{_weight(name)}/") and wide.ndim else 0, wide.ndim))
    length = jnp.sqrt(jnp.sum(jnp.square(wide), axes, keepdims=True))
    return (rate * wide * jnp.minimum(1, clip / jnp.maximum(length, 1e-12))).astype(gradient.dtype)


def _weight(name: str) -> str:
    """The path of the adapted weight that a leaf of a module belongs to; a head is one."""
    return name.rpartition("/")[0]


def _products(a: Tree, b: Tree) -> dict[str, jax.Array]:
    """Inner products over the leaves of each weight: a number, or (layers,) where axis 0 of all counts layers."""
    parts: dict[str, list[jax.Array]] = {}
    for name, x, y in zip(tree.names(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        wide = tree.wide_type(x, y)
        parts.setdefault(_weight(name), []).append(x.astype(wide) * y.astype(wide))

    def total(name, products):
        layers = {x.shape[:1] for x in products} if adapters.is_stacked(f"{name}/") else set()
        kept = 1 if len(layers) == 1 and () not in layers else 0
        return sum(jnp.sum(x, tuple(range(kept, x.ndim))) for x in products)

    return {name: total(name, products) for name, products in parts.items()}


def _times(parts: dict[str, jax.Array], update: Tree) -> Tree:
    def one(name, u):
        if u is None:
            return None
        part = parts[_weight(name)]
        return (u * part.reshape(*part.shape, *[1] * (u.ndim - part.ndim))).astype(u.dtype)

    return tree.map_with_name(one, update)
