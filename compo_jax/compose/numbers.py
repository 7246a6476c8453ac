"""The numbers that the rules take: one weight for each module, scales, dampings, tolerances."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from compo_jax import tree

Scalar = float | int | Array
Weights = Num[Array, " tasks"] | Num[np.ndarray, " tasks"] | Iterable


def require_number(name: str, value: Any, meaning: str, allowed: Callable[[float], bool] = np.isfinite) -> None:
    """ValueError where `value`, called `name`, is no single number or, unless it is traced, not an allowed one."""
    good = np.ndim(value) == 0
    if good and tree.concrete(value):
        try:
            good = bool(np.isfinite(float(value)) and allowed(float(value)))
        except (TypeError, ValueError):
            good = False
    if not good:
        raise ValueError(f"{name} is {meaning}, not {value}")


def require_not_negative(**numbers: Any) -> None:
    """ValueError where a number, named by its keyword, isn't finite or is below zero (`require_number`)."""
    for name, value in numbers.items():
        require_number(name, value, "a finite number that isn't negative", lambda x: x >= 0)


def require_part(name: str, value: Any, meaning: str, *, zero: bool = True) -> None:
    """ValueError where `value`, called `name`, is no number from 0 (itself where `zero`) to 1, or is traced, as shapes
    depend on it."""
    if not tree.concrete(value):
        raise ValueError(f"{name} is {meaning}, and has to be known when the rule is traced: leave it out of jit")
    require_number(name, value, meaning, lambda x: 0 < x <= 1 or (zero and x == 0))


def count_of(part: Scalar, size: int, *, up: bool = False) -> int:
    """`part * size` rounded down, or up; what is whole but for its rounding error is that number (0.07 of 100 is 7)."""
    exact = float(part) * size
    nearest = round(exact)
    if abs(exact - nearest) <= 4 * np.finfo(float).eps * size:
        return nearest
    return math.ceil(exact) if up else math.floor(exact)


def require_iterations(tolerance: Scalar | None, count: int, name: str = "max_iterations") -> None:
    """ValueError where an iteration can't be stopped by these; `name` is what the caller calls the count."""
    if tolerance is not None:
        require_not_negative(tolerance=tolerance)
    require_number(name, count, "a whole number from 0 on", lambda x: x >= 0 and x == int(x))


def wide_number(x: Scalar) -> float | Array:
    """A number of Python, or, where it is traced, one in float32 at least: no rule computes with a narrow one."""
    return float(x) if tree.concrete(x) else jnp.asarray(x, tree.wide_type(x))


def require_key(key: Any) -> None:
    """ValueError for what is no random key, a seed say."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ()
    if not typed and not (dtype == jnp.uint32 and key.ndim == 1):  # the raw keys of jax.random.PRNGKey
        raise ValueError(f"key is a random key, jax.random.key(seed), and not {key!r}")


def weigh(weights: Weights | None, tasks: int, default: Scalar | None = None, *, sign: bool = True) -> list:
    """One weight a module; without any, `default` for each, 1/T where that is None. Python's numbers, unless traced.

    ValueError for another number of weights, one that isn't finite, and, with `sign=False`, for a negative one or a sum
    of zero: such rules minimise weighted losses.
    """
    if weights is None:
        return [1 / tasks if default is None else default] * tasks
    if not np.iterable(weights):
        raise ValueError(f"weights are one number a module, a list of {tasks}, not {weights}")
    weights = weights if hasattr(weights, "__len__") else list(weights)
    if len(weights) != tasks:
        raise ValueError(f"{len(weights)} weights were given for {tasks} modules: one for each")
    if not tree.concrete(weights):
        return [wide_number(w) for w in weights]
    try:
        values = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        values = np.empty((tasks, 0))
    if values.ndim != 1:
        raise ValueError(f"weights are one number a module, a list of {tasks}, not {weights}")
    if not np.all(np.isfinite(values)):
        raise ValueError(f"the weights {values} aren't all finite")
    if not sign and (np.any(values < 0) or values.sum() <= 0):
        raise ValueError(
            f"the weights {values} can't be negative, nor all zero, in this rule: to subtract a module, negate its "
            "delta"
        )
    return values.tolist()


def anchored(anchor: Weights | str | None, tasks: int) -> list:
    """The weights of the composition that a solve begins at: zeros, the base, where there are none; 1/T for "average".

    Errors as `weigh`, and ValueError for another word.
    """
    if isinstance(anchor, str):
        if anchor != "average":
            raise ValueError(f"anchor={anchor!r} is neither 'average' nor weights, one number a module")
        return [1 / tasks] * tasks
    return weigh([0.0] * tasks if anchor is None else anchor, tasks)


def along(weights: Sequence, leaves: Num[Array, "tasks ..."]) -> Num[Array, "tasks ..."]:
    """The weights in the leaves' type, shaped to multiply them."""
    column = jnp.stack([jnp.asarray(w, leaves.dtype) for w in weights])
    return column.reshape(-1, *[1] * (leaves.ndim - 1))
