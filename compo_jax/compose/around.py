"""Rules around another one, which merges in other coordinates, or whose result is changed."""

from collections.abc import Sequence
from typing import Any

from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.directions import boost
from compo_jax.compose.leaves import Stacked, add_delta
from compo_jax.compose.matrices import Eps
from compo_jax.compose.numbers import Scalar, Weights
from compo_jax.compose.spaces import Space, at_zero, core_space, knots_space
from compo_jax.compose.turned import turned
from compo_jax.tree import Tree


def _inside(space: Space, rule: str, weights: Weights | None, stacked: Stacked, options: dict[str, Any]) -> Tree:
    """The delta that a rule makes in the space; `options` are those of `merge`."""
    from compo_jax.compose.rules import merge, options_of  # whose table these rules are in

    theirs = options_of(rule) or ()
    options = {name: x for name, x in {"stacked": stacked, "eps": space.eps}.items() if name in theirs} | options
    return space.back(merge(rule, space.base, space.deltas, weights=weights, **options))


def _require_of_deltas(rule: str) -> None:
    """ValueError for a rule that tries the weights themselves on images."""
    from compo_jax.compose.rules import find_rule

    if tried := [what for what in find_rule(rule).needs if what in ("loss", "batches", "unlabelled")]:
        raise ValueError(
            f"the rule {rule!r} needs {', '.join(tried)}, to try the weights on, and here the task vector alone is "
            f"merged: merge by {rule!r} first, then boost task_vector(merged, base) by compo_jax.compose.boost"
        )


def _require_free(rule: str) -> None:
    """ValueError for a rule that needs something of the weights as they are."""
    from compo_jax.compose.rules import find_rule

    if foreign := [what for what in find_rule(rule).needs if what != "key"]:
        raise ValueError(
            f"the rule {rule!r} needs {', '.join(foreign)}, of the weights as they are, and can't merge in other "
            "coordinates: take one that needs none of these"
        )


def knots(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    rule: str = "average",
    shared: str = "out",
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
    **options: Any,
) -> Tree:
    """Another rule in the coordinates of KnOTS, see `knots_space`."""
    _require_free(rule)
    space = knots_space(base, deltas, shared=shared, eps=eps, stacked=stacked, check_finite=check_finite)
    delta = _inside(space, rule, weights, stacked, options | {"check_finite": check_finite})
    return add_delta(base, delta, check_finite=check_finite)


def in_core_space(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    rule: str = "average",
    eps: Eps = None,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
    **options: Any,
) -> Tree:
    """Another rule in Core Space, of LoRA modules as they are, see `core_space`."""
    _require_free(rule)
    space = core_space(base, deltas, eps=eps, stacked=stacked, check_finite=check_finite)
    delta = _inside(space, rule, weights, stacked, options | {"check_finite": check_finite})
    return add_delta(base, delta, check_finite=check_finite)


def boosted(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    rule: str = "average",
    beta: Scalar = 0.01,
    eps: Eps = None,
    stacked: Stacked = STACKED,
    outputs_first: str | Sequence[str] = (),
    check_finite: bool = True,
    **options: Any,
) -> Tree:
    """Another rule's task vector by Subspace Boosting, see `boost`; `outputs_first` as in `merge`."""
    _require_of_deltas(rule)
    space = at_zero(base, deltas, eps=eps, check_finite=check_finite)
    options |= {"outputs_first": outputs_first, "check_finite": check_finite}
    turn = turned(base, outputs_first, stacked)
    delta = turn.inputs_first(_inside(space, rule, weights, stacked, options))
    delta = turn.outputs_first(boost(delta, beta, eps=space.eps, stacked=stacked, check_finite=check_finite))
    return add_delta(base, delta, check_finite=check_finite)
