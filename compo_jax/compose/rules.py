"""Every rule by its name.

Which to take:
  `average` first: it costs nothing, and few rules beat it by much where all modules began at one base.
  Without data: `task_arithmetic`, whose scale is worth tuning; `ties` and `dare` for many modules that get in each
  other's way; `tsv` and `iso` for modules that matter unequally; `model_stock` for several trainings on one task;
  `slerp` and `karcher` to keep the norms. Newer ones on each layer's matrices: `iso_cts` for many tasks, `dc_merge` for
  LoRA, `cart`, `wudi`. Around another rule: `core_space` and `knots`, in whose coordinates LoRA modules are more alike,
  and `subspace_boosting`, for what merging has cancelled.
  With data, from the cheapest on: `best_weights` (T numbers, from the landscape), `fisher`, `regmean`, `kronecker`, and
  `ggn`, which leaves nothing out and takes a thousand times as long (begin the last two at the average,
  `anchor="average"`); between them `layer_weights` and `epimer`, T numbers a layer. With images but no labels: `esm`,
  `regmean_plus`, and on the test's `adamerging`.
  Where it is known which task an image is of: `emr` and `tall`, one vector for all tasks and a mask for each.
  Before or after another rule: `lines`, deeper layers more; `dare`, `della`, `breadcrumbs`, fewer entries.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Key

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.activations import esm, regmean_plus
from compo_jax.compose.adaptive import Adapted, Unlabelled, adamerging
from compo_jax.compose.arithmetic import compose, task_arithmetic
from compo_jax.compose.around import boosted, in_core_space, knots
from compo_jax.compose.competition import pcb, sce
from compo_jax.compose.depth import layer_scales, moved_by_layer, scaled_by_layer, widened
from compo_jax.compose.directions import cart, dc_merge
from compo_jax.compose.entries import whole
from compo_jax.compose.fisher import fisher_compose, fisher_merge
from compo_jax.compose.group_weights import Weighed, layer_weights
from compo_jax.compose.interference import wudi
from compo_jax.compose.kronecker import kronecker_merge, regmean
from compo_jax.compose.leaves import Stacked, add_weighted
from compo_jax.compose.masks import consensus, emr_params, tall_params
from compo_jax.compose.matrices import require_paths, rounding
from compo_jax.compose.modules import listed, with_holes, with_zeros
from compo_jax.compose.numbers import Scalar, Weights, require_key
from compo_jax.compose.solve import Solved, solve_merge
from compo_jax.compose.spaces import fitted
from compo_jax.compose.sparse import drop_each, ties
from compo_jax.compose.spectral import iso, iso_cts, tsv
from compo_jax.compose.sphere import karcher_mean, karcher_weights, slerp_weights
from compo_jax.compose.stock import model_stock
from compo_jax.compose.subspace import Projected, epimer
from compo_jax.compose.tails import breadcrumbs, della
from compo_jax.compose.turned import turned
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
      run: `(base, deltas, **options) -> params`, or a result that has them and more.
      needs: names of the keyword arguments that it can't do without, of those that `MADE_BY` lists.
      takes: names of those that it can use.
      weighted: whether it takes weights.
      leafwise: whether it goes from leaf to leaf, and takes leaves that are `Deferred`.
      options_of: the function that gets the options that `run` has no name for.
      behind: of an add-on, the rule that merges what it leaves where none is said by its option `rule`.
    """

    run: Run
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    weighted: bool = True
    leafwise: bool = True
    options_of: Callable[..., Any] | None = None
    behind: str | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        """The options that `run` of an add-on can't do without."""
        return {} if self.behind is None else {"rule": self.behind}


#: What rules need beside the deltas, and how it is made.
MADE_BY = {
    "key": "a random key, jax.random.key(seed)",
    "fishers": "one Fisher diagonal a module, compo_jax.curvature.fisher_diagonal",
    "factors": "one set of Kronecker factors a module, compo_jax.curvature.kronecker",
    "matvecs": "one curvature product a module, compo_jax.curvature.ggn",
    "landscape": "the landscape of these modules, compo_jax.curvature.landscape",
    "task": "the number of the module for whose task the model is, from 0 on: the rule makes one a task (compo_jax."
    "compose.emr, compo_jax.compose.tall)",
    "unlabelled": "images of the tasks without labels, and their models, one compo_jax.compose.Unlabelled a module",
    "loss": "the mean loss of a batch of all tasks' images, (params, *batch) -> scalar, as for "
    "compo_jax.curvature.landscape",
    "batches": "the batches of that loss, a list of tuples, as for compo_jax.curvature.landscape",
}


def _dare(base, deltas, weights=None, *, key, rate=0.9, rule="average", check_finite=True, **options):
    return dare(key, base, deltas, weights, rate=rate, rule=rule, check_finite=check_finite, **options)


def lines(
    base: Tree,
    deltas: Sequence[Tree],
    weights: Weights | None = None,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 1.0,
    when: str = "after",
    rule: str = "average",
    stacked: Stacked = STACKED,
    check_finite: bool = True,
    **options: Any,
) -> Tree:
    """LiNeS (Wang et al., 2025, arXiv 2410.17146): layer l of L scaled by `α + β (l - 1) / (L - 1)`, for any rule.

    Args:
      alpha, beta: the first layer's scale, and what the last one's is above it. The authors' for a rule whose merged
        task vector is τ: α is `‖Σ delta_t‖₁ / ‖τ‖₁ / T`, which of the average is 1, and β is chosen by the validation
        accuracy, for the average of T from 0.1 T to T. For one model alone β is `1 - α`. `beta=0` is a plain scale.
      when: `after` the rule, its merged task vector is scaled; `before` it, each module's.
      rule: behind it or before it, by name; it and its options as in `merge`.
      stacked: patterns of the paths of leaves whose axis 0 counts layers; of others, the first number in the path is
        their layer. Leaves in no layer are scaled by α, as in the authors' code.

    ValueError where no leaf is in a layer.
    """
    if when not in ("before", "after"):
        raise ValueError(f"when is 'before' the rule or 'after' it, not {when!r}")
    holed = with_holes(base, deltas, check_finite=check_finite)
    present = jax.tree.map(lambda _, *d: next((x for x in d if x is not None), None), base, *holed)
    factors = layer_scales(base, present, alpha, beta, stacked)
    if "stacked" in (options_of(rule) or ()):
        options["stacked"] = stacked
    behind = functools.partial(merge, rule, weights=weights, check_finite=check_finite, **options)
    if when == "before":
        behind = functools.partial(behind, **_rounded(rule, base, holed, options))
        deltas = scaled_by_layer(holed, factors)
        return behind(base, deltas if find_rule(rule).leafwise else jax.tree.map(whole, deltas))
    merged = behind(widened(base), holed)  # unrounded
    moved = jax.tree.map(lambda _, x, d: None if d is None else x, base, merged, present)
    return moved_by_layer(base, moved, factors, check_finite=check_finite)


def _rounded(rule: str, base: Tree, deltas: Sequence[Tree], options: dict[str, Any]) -> dict[str, Any]:
    """The option `eps` for a rule that has it, behind an add-on that widens the deltas."""
    if "eps" not in (options_of(rule, options.get("rule")) or ()):
        return {}
    require_paths(options.get("eps"), base)
    return {"eps": rounding(deltas, options.get("eps"))}


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


def _full(base, deltas, weights=None, *, matvecs, factors=None, fishers=None, **options):
    preconditioner = fishers if factors is None else factors
    return solve_merge(base, deltas, matvecs, weights, **({"preconditioner": preconditioner} | options))


def _layer_weights(base, deltas, *, loss, batches, **options):
    return layer_weights(loss, base, deltas, batches, **options)


def _before(change):
    """The rule of an add-on: what `change(base, deltas, ...)` leaves is merged by the rule behind it."""
    names = list(inspect.signature(change).parameters)

    def run(base, deltas, weights=None, *, rule, check_finite=True, **options):
        chosen = find_rule(rule)
        theirs = chosen.needs + chosen.takes + tuple(options_of(rule) or ())
        deltas = with_zeros(base, deltas, check_finite=check_finite)
        mine = {name: options[name] for name in names if name in options}
        options |= _rounded(rule, base, deltas, options)
        deltas = change(base, deltas, deferred=chosen.leafwise, **mine)
        options = {name: x for name, x in options.items() if name not in mine or name in theirs}
        if "key" in options:
            options["key"] = jax.random.fold_in(options["key"], 1)  # its draws are others
        return merge(rule, base, deltas, weights=weights, check_finite=check_finite, **options)

    return run


def _best_weights(base, deltas, *, landscape, check_finite=True, **options):
    if check_finite:
        tree.require_finite({"slope": landscape.slope, "gram": landscape.gram}, "the landscape")
    return compose(base, deltas, landscape.best_weights(**options), check_finite=check_finite)


RULES = {
    "average": Rule(compose),
    "task_arithmetic": Rule(task_arithmetic),
    "ties": Rule(ties),
    "dare": Rule(_dare, needs=("key",), takes=tuple(MADE_BY), behind="average"),
    "slerp": Rule(_slerp, weighted=False),
    "karcher": Rule(_karcher, options_of=karcher_mean),
    "model_stock": Rule(model_stock, weighted=False),
    "tsv": Rule(tsv),
    "iso": Rule(iso),
    "fisher": Rule(_fisher, needs=("fishers",), options_of=fisher_merge),
    "regmean": Rule(regmean, needs=("factors",), leafwise=False),
    "kronecker": Rule(kronecker_merge, needs=("factors",), leafwise=False),
    "ggn": Rule(_full, needs=("matvecs",), takes=("factors", "fishers"), leafwise=False, options_of=solve_merge),
    "best_weights": Rule(_best_weights, needs=("landscape",), weighted=False, options_of=Landscape.best_weights),
    # layers, masks, competition and tails; weights of groups of layers
    "lines": Rule(lines, takes=tuple(MADE_BY), behind="average"),
    "della": Rule(_before(della), needs=("key",), takes=tuple(MADE_BY), options_of=della, behind="average"),
    "breadcrumbs": Rule(_before(breadcrumbs), takes=tuple(MADE_BY), options_of=breadcrumbs, behind="task_arithmetic"),
    "consensus": Rule(consensus),
    "tall": Rule(tall_params, needs=("task",)),
    "emr": Rule(emr_params, needs=("task",), weighted=False),
    "pcb": Rule(pcb, weighted=False),
    "sce": Rule(sce, weighted=False),
    "adamerging": Rule(adamerging, needs=("unlabelled",), weighted=False, leafwise=False),
    "epimer": Rule(epimer, needs=("matvecs",), leafwise=False),
    "layer_weights": Rule(
        _layer_weights, ("loss", "batches"), weighted=False, leafwise=False, options_of=layer_weights
    ),
    # matrices; coordinates for another rule, and what comes after it
    "wudi": Rule(wudi),
    "iso_cts": Rule(iso_cts),
    "dc_merge": Rule(dc_merge),
    "cart": Rule(cart),
    "knots": Rule(knots, takes=("key",), leafwise=False, behind="average"),
    "core_space": Rule(in_core_space, takes=("key",), leafwise=False, behind="average"),
    "esm": Rule(esm, needs=("factors",), leafwise=False),
    "regmean_plus": Rule(regmean_plus, needs=("unlabelled",), leafwise=False),
    "subspace_boosting": Rule(boosted, takes=tuple(MADE_BY), leafwise=False, behind="average"),
}


def find_rule(name: str) -> Rule:
    """The rule of that name; ValueError for an unknown one, which lists the known."""
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; known are {', '.join(RULES)}")
    return RULES[name]


#: Parameters of rules that `merge` has by these names, or gives.
_OTHERS = {"base", "deltas", "params", "trees", "self", "weights", "wide", "deferred", "check_finite", *MADE_BY}


def options_of(name: str, behind: str | None = None) -> list[str] | None:
    """The options of the rule of that name, for `merge`; None where it takes any.

    Args:
      behind: of an add-on, the rule that merges what is left; default its own.
    """
    rule = find_rule(name)
    parameters = inspect.signature(rule.run).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    further = None if len(names) < len(parameters) else []
    if rule.options_of is not None:
        further = list(inspect.signature(rule.options_of).parameters)
    if rule.behind is not None:
        last = options_of(behind or rule.behind)
        further = None if last is None else [*(further or ()), *last]
    return None if further is None else [x for x in dict.fromkeys(names + further) if x not in _OTHERS]


def require_options(name: str, options: dict[str, Any]) -> None:
    """ValueError, listing those that there are, where the rule of that name hasn't one of the options."""
    allowed = options_of(name, options.get("rule"))
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
    task: int | None = None,
    unlabelled: Sequence[Unlabelled] | None = None,
    loss: Callable[..., Any] | None = None,
    batches: Sequence[tuple] | None = None,
    outputs_first: str | Sequence[str] = (),
    check_finite: bool = True,
    **options: Any,
) -> Tree:
    """The composed parameters by the rule `name` of `RULES`.

    Args:
      deltas: trees shaped as `base`, None where nothing changes; of `core_space` LoRA modules as they are.
      weights: one a module; each rule says what they mean, and its default.
      key, fishers, factors, matvecs, landscape, task, unlabelled, loss, batches: see `MADE_BY`. What the rule doesn't
        use is left aside, so that a loop over all rules may give everything to each.
      outputs_first: patterns of the paths of matrices that are (out, in, ...), as PyTorch and Equinox have them,
        `weight$` say: rules that go by matrices see them turned to (in, ..., out). Where there are curvature or images,
        these tell, and nothing is turned.
      check_finite: ValueError, naming module and leaf, where a module, or what the rule needs beside them, holds NaN or
        an infinity; False lets them through.
      options: of the rule, such as `scale`, `density`, `rate`, `damping`; `slerp` takes `t`, and the add-ons (`dare`,
        `della`, `breadcrumbs`, `lines`, `knots`, `core_space`, `subspace_boosting`) the name of the `rule` behind them,
        and its options.

    The residual of a solve comes with `solve_merge` and `kronecker_merge` themselves. ValueError for an unknown rule
    or option (lists the known), for what the rule needs and didn't get (says what makes it), for weights that the
    rule doesn't take; what else the rule raises.
    """
    rule = find_rule(name)
    require_options(name, options)
    needed = {"key": key, "fishers": fishers, "factors": factors, "matvecs": matvecs, "landscape": landscape}
    needed |= {"task": task, "unlabelled": unlabelled, "loss": loss, "batches": batches}
    needed = {what: value for what, value in needed.items() if value is not None and what in rule.needs + rule.takes}
    if missing := [f"{what} ({MADE_BY[what]})" for what in rule.needs if what not in needed]:
        raise ValueError(f"the rule {name!r} needs {', '.join(missing)}")
    if "key" in needed:
        require_key(key)
    if weights is not None:
        if not rule.weighted:
            raise ValueError(f"the rule {name!r} takes no weights")
        needed["weights"] = weights
    if not check_finite:
        options["check_finite"] = False
    run = functools.partial(rule.run, **needed, **rule.defaults | options)
    beside = set(rule.needs + rule.takes) - {"key", "task"}  # of the weights as they lie
    if outputs_first and rule.behind is not None and beside:
        return run(base, deltas, outputs_first=outputs_first)  # it is for the rule behind
    if not outputs_first or beside or "stacked" not in (options_of(name, options.get("rule")) or ()):
        return params_of(run(base, deltas))
    turn, deltas = turned(base, outputs_first, options.get("stacked", STACKED)), listed(deltas, 1, "modules")
    fitted(base, deltas)  # an error tells shapes as they are
    return turn.outputs_first(params_of(run(turn.inputs_first(base), [turn.inputs_first(d) for d in deltas])))


def params_of(merged: Any) -> Tree:
    """The composed parameters of what a rule's `run` returns."""
    return merged.params if isinstance(merged, Solved | Adapted | Projected | Weighed) else merged


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
    name = rule if isinstance(rule, str) else {other.run: name for name, other in RULES.items()}.get(rule)
    leafwise = name is not None and find_rule(name).leafwise
    require_key(key)
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    options |= {} if name is None else _rounded(name, base, deltas, options)
    deltas = drop_each(key, deltas, rate, deferred=leafwise)
    if name is not None:
        inner = jax.random.fold_in(key, 1)  # whose draws are others
        return merge(name, base, deltas, weights=weights, key=inner, check_finite=check_finite, **options)
    if not check_finite and "check_finite" in inspect.signature(rule).parameters:
        options["check_finite"] = False
    return rule(base, deltas, weights, **options)
