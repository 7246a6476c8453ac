"""Every rule by its name.

Which to take:
  `average` first: it costs nothing, and few rules beat it by much where all modules began at one base.
  Without data: `task_arithmetic`, whose scale is worth tuning; `ties` and `dare` for many modules that get in each
  other's way; `tsv` and `iso` for modules that matter unequally; `model_stock` for several trainings on one task;
  `slerp` and `karcher` to keep the norms. Newer ones on each layer's matrices: `iso_cts` for many tasks, `dc_merge` for
  LoRA, `cart`, `wudi`. Around another rule: `core_space` and `knots`, in whose coordinates LoRA modules are more alike,
  and `subspace_boosting`, for what merging has cancelled.
  With data, from the cheapest on: `best_weights` (T numbers, from the landscape), `fisher`, `regmean`, `kronecker`, and
  `ggn`, which leaves nothing out and takes a thousand times as long.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Key

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.arithmetic import compose, task_arithmetic
from compo_jax.compose.fisher import fisher_compose, fisher_merge
from compo_jax.compose.interference import wudi
from compo_jax.compose.kronecker import kronecker_merge, regmean
from compo_jax.compose.leaves import add_delta, add_weighted
from compo_jax.compose.modules import with_zeros
from compo_jax.compose.numbers import Scalar, Weights
from compo_jax.compose.solve import Solved, solve_merge
from compo_jax.compose.spaces import Space, at_zero, core_space, knots_space
from compo_jax.compose.sparse import drop_each, ties
from compo_jax.compose.spectral import iso, iso_cts, tsv
from compo_jax.compose.sphere import karcher_mean, karcher_weights, slerp_weights
from compo_jax.compose.stock import model_stock
from compo_jax.compose.directions import boost, cart, dc_merge
from compo_jax.curvature import Landscape
from compo_jax.tree import Tree


@runtime_checkable
class Run(Protocol):
    """A merge rule."""

    def __call__(self, base: Tree, deltas: Sequence[Tree], **options: Any) -> Tree | Solved:
        """The composed parameters; what the rule needs beside the deltas, and `weights`, are among the options."""
        ...


class Rule(NamedTuple):
    """One way to merge.

    Attributes:
      run: `(base, deltas, **options) -> params` or `Solved`.
      needs: names of the keyword arguments that it can't do without, of those that `MADE_BY` lists.
      takes: names of those that it can use.
      weighted: whether it takes weights.
      leafwise: whether it goes from leaf to leaf, and takes leaves that are `Deferred`.
      options_of: the function that gets the options that `run` has no name for.
      around: whether another rule, the option `rule`, merges behind this one and gets these.
    """

    run: Run
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    weighted: bool = True
    leafwise: bool = True
    options_of: Callable[..., Any] | None = None
    around: bool = False


#: What rules need beside the deltas, and how it is made.
MADE_BY = {
    "key": "a random key, jax.random.key(seed)",
    "fishers": "one Fisher diagonal a module, compo_jax.curvature.fisher_diagonal",
    "factors": "one set of Kronecker factors a module, compo_jax.curvature.kronecker",
    "matvecs": "one curvature product a module, compo_jax.curvature.ggn",
    "landscape": "the landscape of these modules, compo_jax.curvature.landscape",
}


def _dare(base, deltas, weights=None, *, key, rate=0.9, rule="average", check_finite=True, **options):
    return dare(key, base, deltas, weights, rate=rate, rule=rule, check_finite=check_finite, **options)


def _slerp(base, deltas, *, t=0.5, check_finite=True):
    deltas = with_zeros(base, deltas, least=2, check_finite=check_finite)
    if len(deltas) != 2:
        raise ValueError(f"slerp is of two modules, and {len(deltas)} were given: karcher is its mean of many")
    return add_weighted(base, deltas, slerp_weights(deltas, t, False), check_finite=check_finite)


def _karcher(base, deltas, weights=None, *, check_finite=True, **options):
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    return add_weighted(base, deltas, karcher_weights(deltas, weights, False, **options), check_finite=check_finite)


def _fisher(base, deltas, weights=None, *, fishers, check_finite=True, **options):
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    return fisher_compose(base, deltas, fishers, weights, check_finite=check_finite, **options)


def _full(base, deltas, weights=None, *, matvecs, fishers=None, **options):
    return solve_merge(base, deltas, matvecs, weights, **({"preconditioner": fishers} | options))


def _best_weights(base, deltas, *, landscape, check_finite=True, **options):
    if check_finite:
        tree.require_finite({"slope": landscape.slope, "gram": landscape.gram}, "the landscape")
    return compose(base, deltas, landscape.best_weights(**options), check_finite=check_finite)


def _inside(space: Space, rule, weights, stacked, check_finite, options) -> Tree:
    """The delta that another rule makes in the space."""
    if "stacked" in (options_of(rule) or [] if isinstance(rule, str) else ()):
        options = {"stacked": stacked} | options
    merged = merge_by(rule, space.base, space.deltas, weights, check_finite=check_finite, **options)
    return space.back(merged)


def _written(space: Space, base, rule, weights, stacked, check_finite, options):
    if isinstance(rule, str) and (foreign := [what for what in find_rule(rule).needs if what != "key"]):
        raise ValueError(
            f"the rule {rule!r} needs {', '.join(foreign)}, of the weights as they are, and can't merge in other "
            "coordinates: take one that needs none of these"
        )
    delta = _inside(space, rule, weights, stacked, check_finite, options)
    return add_delta(base, delta, check_finite=check_finite)


def _knots(base, deltas, weights=None, *, rule="average", shared="out", stacked=STACKED, check_finite=True, **options):
    space = knots_space(base, deltas, shared=shared, stacked=stacked, check_finite=check_finite)
    return _written(space, base, rule, weights, stacked, check_finite, options)


def _core_space(base, deltas, weights=None, *, rule="average", stacked=STACKED, check_finite=True, **options):
    space = core_space(base, deltas, stacked=stacked, check_finite=check_finite)
    return _written(space, base, rule, weights, stacked, check_finite, options)


def _boosted(base, deltas, weights=None, *, rule="average", beta=0.01, stacked=STACKED, check_finite=True, **options):
    space = at_zero(base, deltas, check_finite=check_finite)
    delta = _inside(space, rule, weights, stacked, check_finite, options)
    return add_delta(base, boost(delta, beta, stacked=stacked, check_finite=check_finite), check_finite=check_finite)


RULES = {
    "average": Rule(compose),
    "task_arithmetic": Rule(task_arithmetic),
    "ties": Rule(ties),
    "dare": Rule(_dare, needs=("key",), takes=("fishers", "factors", "matvecs", "landscape"), around=True),
    "slerp": Rule(_slerp, weighted=False),
    "karcher": Rule(_karcher, options_of=karcher_mean),
    "model_stock": Rule(model_stock, weighted=False),
    "tsv": Rule(tsv),
    "iso": Rule(iso),
    "fisher": Rule(_fisher, needs=("fishers",), options_of=fisher_merge),
    "regmean": Rule(regmean, needs=("factors",), leafwise=False),
    "kronecker": Rule(kronecker_merge, needs=("factors",), leafwise=False),
    "ggn": Rule(_full, needs=("matvecs",), takes=("fishers",), leafwise=False, options_of=solve_merge),
    "best_weights": Rule(_best_weights, needs=("landscape",), weighted=False, options_of=Landscape.best_weights),
    "wudi": Rule(wudi),
    "iso_cts": Rule(iso_cts),
    "dc_merge": Rule(dc_merge),
    "cart": Rule(cart),
    "knots": Rule(_knots, takes=("key",), leafwise=False, around=True),
    "core_space": Rule(_core_space, takes=("key",), leafwise=False, around=True),
    "subspace_boosting": Rule(_boosted, takes=tuple(MADE_BY), leafwise=False, around=True),
}


def find_rule(name: str) -> Rule:
    """The rule of that name; ValueError for an unknown one, which lists the known."""
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; known are {', '.join(RULES)}")
    return RULES[name]


#: Parameters of rules that `merge` has by these names, or gives.
_OTHERS = {"base", "deltas", "params", "trees", "self", "weights", "wide", "check_finite", *MADE_BY}


def options_of(name: str, behind: str = "average") -> list[str] | None:
    """The options of the rule of that name, for `merge`; None where it takes any.

    Args:
      behind: of a rule around another one (`dare`, `knots`, ...), the name of that one.
    """
    rule = find_rule(name)
    parameters = inspect.signature(rule.run).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if rule.around:
        further = options_of(behind)
    elif rule.options_of is not None:
        further = list(inspect.signature(rule.options_of).parameters)
    else:
        further = None if len(names) < len(parameters) else []
    return None if further is None else [x for x in dict.fromkeys(names + further) if x not in _OTHERS]


def require_options(name: str, options: dict[str, Any]) -> None:
    """ValueError, listing those that there are, where the rule of that name hasn't one of the options."""
    behind = options.get("rule", "average")
    if find_rule(name).around and not isinstance(behind, str):
        return  # a function's, which looks at them itself
    allowed = options_of(name, behind)
    if allowed is not None and (unknown := [option for option in options if option not in allowed]):
        raise ValueError(
            f"the rule {name!r} has no option {', '.join(unknown)}; its options are {', '.join(allowed) or 'none'}"
        )


def merge(
    name: str,
    base: Tree,
    deltas: Sequence[Tree],
    *,
    weights: Weights | None = None,
    key: Key[Array, ""] | None = None,
    fishers: Sequence | None = None,
    factors: Sequence | None = None,
    matvecs: Sequence | None = None,
    landscape: Landscape | None = None,
    check_finite: bool = True,
    **options: Any,
) -> Tree:
    """The composed parameters by the rule `name` of `RULES`.

    Args:
      deltas: trees shaped as `base`, None where nothing changes; of `core_space` LoRA modules as they are.
      weights: one a module; each rule says what they mean, and its default.
      key, fishers, factors, matvecs, landscape: see `MADE_BY`. What the rule doesn't use is left aside, so that a loop
        over all rules may give everything to each.
      check_finite: ValueError, naming module and leaf, where a module, or what the rule needs beside them, holds NaN or
        an infinity; False lets them through.
      options: of the rule, such as `scale`, `density`, `rate`, `damping`; `slerp` takes `t`, and `dare`, `knots`,
        `core_space` and `subspace_boosting` the name of the `rule` behind them (or a function, see `dare`), with its
        options.

    The residual of a solve comes with `solve_merge` and `kronecker_merge` themselves. ValueError for an unknown rule
    or option (lists the known), for what the rule needs and didn't get (says what makes it), for weights that the
    rule doesn't take; what else the rule raises.
    """
    rule = find_rule(name)
    require_options(name, options)
    needed = {"key": key, "fishers": fishers, "factors": factors, "matvecs": matvecs, "landscape": landscape}
    needed = {what: value for what, value in needed.items() if value is not None and what in rule.needs + rule.takes}
    if missing := [f"{what} ({MADE_BY[what]})" for what in rule.needs if what not in needed]:
        raise ValueError(f"the rule {name!r} needs {', '.join(missing)}")
    if weights is not None:
        if not rule.weighted:
            raise ValueError(f"the rule {name!r} takes no weights")
        needed["weights"] = weights
    if not check_finite:
        options["check_finite"] = False
    merged = rule.run(base, deltas, **needed, **options)
    return merged.params if isinstance(merged, Solved) else merged


def dare(
    key: Key[Array, ""],
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    rate: Scalar = 0.9,
    rule: str | Callable[..., Any] = "average",
    check_finite: bool = True,
    **options: Any,
) -> Any:
    """DARE (Yu et al., 2024, arXiv 2311.03099): drop entries by chance, rescale the rest, and merge by another rule.

    Args:
      key: each module's draw is independent of the others'.
      rate: probability that an entry is dropped.
      rule: the name of one of `RULES`, or `(base, deltas, weights, **options) -> params`, such as `compose`, `ties` or
        one of your own; it gets the rescaled deltas unrounded, in float32 at least.
      options: of that rule.
    """
    name = _name_of(rule)
    leafwise = name is not None and find_rule(name).leafwise
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    deltas = drop_each(key, deltas, rate, deferred=leafwise)
    if name is not None:
        options["key"] = key
    return merge_by(rule, base, deltas, weights, check_finite=check_finite, **options)


def _name_of(rule: str | Callable[..., Any]) -> str | None:
    """The name of a rule that has one."""
    return rule if isinstance(rule, str) else {other.run: name for name, other in RULES.items()}.get(rule)


def merge_by(
    rule: str | Callable[..., Any], base: Tree, deltas: Sequence[Tree], weights: Weights | None, *, check_finite: bool,
    **options: Any,
) -> Any:  # fmt: skip
    """`merge` by the name of a rule or by a function, `(base, deltas, weights, **options) -> params`."""
    if (name := _name_of(rule)) is not None:
        return merge(name, base, deltas, weights=weights, check_finite=check_finite, **options)
    if not check_finite and "check_finite" in inspect.signature(rule).parameters:
        options["check_finite"] = False
    return rule(base, deltas, weights, **options)
