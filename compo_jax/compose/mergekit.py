"""The methods of mergekit by its names, each on one tensor at a time, as recipes of its users mean them.

They are its methods as its documentation and code describe them (github.com/arcee-ai/mergekit, docs/merge_methods.md).
The rules of the same names in `rules.RULES` follow the papers: TIES trims a whole model there, SLERP and the Karcher
mean turn whole models, and the norm goes linearly. Computed in float32 at least, and rounded once. What else differs:
draws are JAX's; of entries as large as the last one kept, all are kept, and one at least of each tensor;
task_arithmetic takes no density, with which mergekit does nothing there; `gamma: 0` removes no outlier; SCE and Model
Stock have no absolute thresholds, so that small task vectors count as large ones do, and in Model Stock a mean cosine
below zero is the base.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from compo_jax import tree
from compo_jax.compose.competition import sce
from compo_jax.compose.entries import Deferred, computed, entrywise, products, summed_sizes, total, whole
from compo_jax.compose.leaves import add_row
from compo_jax.compose.numbers import Scalar
from compo_jax.compose.selection import kth_largest
from compo_jax.compose.sparse import dropped
from compo_jax.compose.sphere import karcher_weights
from compo_jax.compose.stock import model_stock

_STRAIGHT, _ZERO = 0.9995, 1e-8  # where mergekit's SLERP goes straight, and what it takes for no vector


class Tensor(NamedTuple):
    """One tensor of all models, and the parameters for it.

    Attributes:
      base: the base's, or zeros where the method merges the models themselves.
      rows: the models' differences from it.
      each: by name, a parameter of each model.
      overall: parameters of the merge.
    """

    base: Any
    rows: Sequence[Any]
    each: Mapping[str, Sequence[float]]
    overall: Mapping[str, Any]
    key: Key[Array, ""]


@runtime_checkable
class Run(Protocol):
    """How a method merges one tensor."""

    def __call__(self, tensor: Tensor) -> Array:
        """The merged tensor, in the base's type."""
        ...


class Method(NamedTuple):
    """A method of mergekit.

    Attributes:
      each: parameters that models have, with their defaults; None where there is none.
      overall: parameters of the merge, with their defaults.
      base: `needed` where differences from a base are merged; `none` where there is none, `either`, or `first` where
        the base is the first of the two models.
      count: of models, the least and the most.
    """

    run: Run
    each: Mapping[str, float | None]
    overall: Mapping[str, Any]
    base: str = "needed"
    count: tuple[int, int | None] = (1, None)


# -- linear, and along great circles ----------------------------------------------------------------------------------
def _linear(tensor: Tensor) -> Array:
    weights = tensor.each["weight"]
    weights = [weight / sum(weights) for weight in weights] if tensor.overall["normalize"] else weights
    return entrywise(add_row, [tensor.base, *tensor.rows], weights)


def _angle(rows: Sequence[Any]) -> float:
    """The cosine between two tensors; 0 where one of them is zero."""
    dots = products(rows)
    norms = np.sqrt(np.diagonal(dots))
    return float(np.clip(dots[0, 1] / np.prod(norms), -1, 1)) if np.all(norms > _ZERO) else 0.0


def _between(tensor: Tensor, t: float, straight: float) -> Array:
    """From the first tensor (t = 0) to the second at constant angular speed, neither of them normed."""
    cosine = _angle(tensor.rows)
    weights = [1 - t, t]
    if abs(cosine) <= straight:
        weights = list(np.sin(np.arccos(cosine) * np.array(weights)) / np.sin(np.arccos(cosine)))
    return entrywise(add_row, [tensor.base, *tensor.rows], weights)


def _slerp(tensor: Tensor) -> Array:
    return _between(tensor, float(tensor.overall["t"]), _STRAIGHT)


def _nuslerp(tensor: Tensor) -> Array:
    first, second = tensor.each["weight"]
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    return _between(tensor, t, 1 - 1e-12)


def _karcher(tensor: Tensor) -> Array:
    """Of equal weights; tensors that are zero have no direction, and count in the norm."""
    there = [row for row, size in zip(tensor.rows, np.diagonal(products(tensor.rows)), strict=True) if size > 0]
    if not there:
        return entrywise(total, [tensor.base], [1.0])
    shares = karcher_weights(
        [{"": row} for row in there], None, False,
        tolerance=tensor.overall["tol"], max_iterations=tensor.overall["max_iter"],
    )  # fmt: skip
    return entrywise(add_row, [tensor.base, *there], [len(there) / len(tensor.rows) * share for share in shares])


# -- rules of ours that go from tensor to tensor ----------------------------------------------------------------------
def _stock(tensor: Tensor) -> Array:
    return model_stock({"": whole(tensor.base)}, [{"": row} for row in tensor.rows], stacked=(), check_finite=False)[""]


def _sce(tensor: Tensor) -> Array:
    deltas = [{"": whole(row)} for row in tensor.rows]
    density = tensor.overall["select_topk"]
    return sce({"": whole(tensor.base)}, deltas, density=density, stacked=(), check_finite=False)[""]


# -- generalised task arithmetic: thinned out, weighed, elected, summed -----------------------------------------------
class _Thinned(NamedTuple):
    """A task vector of which entries are zero: those of `row` whose magnitudes aren't from `low` to `high`."""

    row: Any
    low: Any = 0.0
    high: Any = np.inf


@runtime_checkable
class _Thin(Protocol):
    def __call__(self, row: Any, parameters: Mapping[str, float], key: Key[Array, ""]) -> _Thinned:
        """What is left of a task vector."""
        ...


def _all(row, parameters, key):
    return _Thinned(row)


def _largest(row, parameters, key):
    kept = max(1, int(parameters["density"] * np.size(row)))
    return _Thinned(row, kth_largest([row], kept) if kept < np.size(row) else 0.0)


def _middle(row, parameters, key):
    """Without the fraction `gamma` of the largest, and without so many of the smallest that `density` are left."""
    size = np.size(row)
    kept = max(1, int(parameters["density"] * size))
    top = min(int(parameters["gamma"] * size), size - kept)
    if kept == size:
        return _Thinned(row)
    return _Thinned(row, kth_largest([row], top + kept), kth_largest([row], top + 1))


def _by_chance(row, parameters, key):
    density = parameters["density"]
    if density >= 1:
        return _Thinned(row)
    (thinned,) = dropped(key, [row], 1 - density, deferred=True)
    return _Thinned(computed(total, [thinned], [density]))


@jax.jit
def _kept_by_rank(key: Key[Array, ""], density: Scalar, window: Scalar, x: Array) -> Array:
    rows = x if x.ndim > 1 else x.reshape(1, -1)
    rank = jnp.argsort(jnp.argsort(jnp.abs(rows), axis=1), axis=1) / max(rows.shape[1] - 1, 1)
    kept = jax.random.bernoulli(key, density - window + 2 * window * rank, rows.shape)
    return jnp.where(kept, rows, 0).reshape(x.shape)


def _by_rank(row, parameters, key):
    density, window = parameters["density"], parameters["epsilon"]
    if density >= 1:
        return _Thinned(row)
    make = lambda: np.asarray(_kept_by_rank(key, density, window, jnp.asarray(whole(row), tree.wide_type(row))))
    return _Thinned(Deferred(np.shape(row), tree.wide_type(row), lambda: make().reshape(-1)))


def _inside(numbers: Array, x: Array) -> Array:
    return jnp.where((jnp.abs(x) >= numbers[0]) & (jnp.abs(x) <= numbers[1]), x, 0)


def _numbered(numbers: Array, tasks: int) -> tuple[list, list, Any, Any]:
    """(weights of the models, what their rows are scaled by, λ, whether the sum is divided by the weights)."""
    return list(numbers[:tasks]), list(numbers[tasks : 2 * tasks]), numbers[-2], numbers[-1]


def _summed(numbers: Array, b: Array, *rows: Array) -> Array:
    weights, factors, scale, normalise = _numbered(numbers, len(rows))
    weight = sum(weights)
    mixed = sum(w * (f * x) for w, f, x in zip(weights, factors, rows, strict=True))
    return b + scale * (mixed / jnp.where((normalise > 0) & (jnp.abs(weight) >= 1e-8), weight, 1))


def _elected(numbers: Array, b: Array, *rows: Array) -> Array:
    """As `_summed`, of those whose sign is that of the sum, a sum of zero counting as positive."""
    weights, factors, scale, normalise = _numbered(numbers, len(rows))
    weighed = [w * (f * x) for w, f, x in zip(weights, factors, rows, strict=True)]
    sign = jnp.where(sum(weighed) >= 0, 1, -1)
    agree = [jnp.sign(x) == sign for x in weighed]
    mixed = sum(jnp.where(a, x, 0) for a, x in zip(agree, weighed, strict=True))
    weight = sum(jnp.where(a, w, 0) for a, w in zip(agree, weights, strict=True))
    return b + scale * (mixed / jnp.where((normalise > 0) & (weight != 0), weight, 1))


def _arithmetic(thin: _Thin, mix: Callable[..., Array]) -> Run:
    def run(tensor: Tensor) -> Array:
        rows, factors = [], []
        for t, row in enumerate(tensor.rows):
            parameters = {name: values[t] for name, values in tensor.each.items()}
            left = thin(row, parameters, jax.random.fold_in(tensor.key, t))
            bounds = left.low > 0 or left.high < np.inf
            rows.append(computed(_inside, [left.row], [left.low, left.high]) if bounds else left.row)
            factors.append(1.0)
            if tensor.overall["rescale"]:  # to the sum of magnitudes that it had
                before, after = float(summed_sizes([row])), float(summed_sizes([rows[-1]]))
                factors[-1] = before / after if min(before, after) >= 1e-7 else 1.0
        numbers = [*tensor.each["weight"], *factors, tensor.overall["lambda"], float(tensor.overall["normalize"])]
        return entrywise(mix, [tensor.base, *rows], numbers)

    return run


def _task_vectors(thin: _Thin, mix: Callable[..., Array], normalize: bool, rescale: bool, **each: float) -> Method:
    overall = {"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False}
    density = {} if thin is _all else {"density": 1.0}  # mergekit takes it there, too, and thins nothing
    return Method(_arithmetic(thin, mix), {"weight": None} | density | each, overall)


METHODS = {
    "linear": Method(_linear, {"weight": None}, {"normalize": True}, "none"),
    "slerp": Method(_slerp, {}, {"t": None}, "first", (2, 2)),
    "nuslerp": Method(
        _nuslerp, {"weight": None}, {"nuslerp_flatten": True, "nuslerp_row_wise": False}, "either", (2, 2)
    ),
    "karcher": Method(_karcher, {}, {"max_iter": 10, "tol": 1e-5}, "none"),
    "model_stock": Method(_stock, {}, {"filter_wise": False}, count=(2, None)),
    "sce": Method(_sce, {}, {"select_topk": 1.0, "int8_mask": False}),
    "task_arithmetic": _task_vectors(_all, _summed, False, False),
    "ties": _task_vectors(_largest, _elected, True, False),
    "dare_linear": _task_vectors(_by_chance, _summed, False, True),
    "dare_ties": _task_vectors(_by_chance, _elected, False, True),
    "breadcrumbs": _task_vectors(_middle, _summed, False, False, gamma=0.01),
    "breadcrumbs_ties": _task_vectors(_middle, _elected, False, False, gamma=0.01),
    "della": _task_vectors(_by_rank, _elected, True, True, epsilon=0.15),
    "della_linear": _task_vectors(_by_rank, _summed, False, True, epsilon=0.15),
}
#: What mergekit has beside these, and recipes here don't.
OTHERS = ("multislerp", "nearswap", "arcee_fusion", "passthrough", "ram", "ramplus_tl")


def require_parameters(
    name: str, count: int, each: Mapping[str, Sequence[Any]], overall: Mapping[str, Any], tensor: str
) -> None:
    """ValueError for another number of models than the method merges, and for what its parameters can't be."""
    least, most = METHODS[name].count
    if count < least or (most is not None and count > most):
        wanted = f"{least} models" if least == most else f"{least} models or more"
        raise ValueError(f"{name} merges {wanted}, and there are {count} beside the base")
    for what, default in METHODS[name].overall.items():
        kinds = (bool,) if isinstance(default, bool) else (int, float)
        value = overall[what]
        if value is None:
            raise ValueError(f"{name} wants parameters: {what}")
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(f"{what} of {tensor} is {value!r}, where {name} wants {kinds[-1].__name__}")
    for what, values in each.items():
        if wrong := [x for x in values if isinstance(x, bool | str | tuple) or not np.isfinite(x)]:
            raise ValueError(f"{what} of {tensor} is {wrong[0]!r}, where {name} wants a number")
    for density in [*each.get("density", ()), overall.get("select_topk", 1)]:
        if not 0 < density <= 1:
            raise ValueError(f"density of {tensor} is the fraction that is kept, above 0 and at most 1, not {density}")
    for density, window in zip(each.get("density", ()), each.get("epsilon", ()), strict=False):
        if density < 1 and not window < density < 1 - window:
            raise ValueError(f"density - epsilon and density + epsilon are between 0 and 1, not {density} ∓ {window}")
    if any(not 0 <= gamma < 1 for gamma in each.get("gamma", ())):
        raise ValueError(f"gamma of {tensor} is the fraction of outliers, from 0 to below 1, not {each['gamma']}")
    if name == "linear" and overall["normalize"] and not sum(each["weight"]):
        raise ValueError(f"the weights of {tensor} sum to zero: say normalize: false, or other weights")
    if overall.get("filter_wise") or overall.get("nuslerp_row_wise") or not overall.get("nuslerp_flatten", True):
        raise ValueError(
            f"{name} takes whole tensors here: no filter_wise, no nuslerp_row_wise, no nuslerp_flatten: false"
        )
