"""What a recipe says, done: which tensors each of its ways takes, with which parameters, and their merge."""

import difflib
import inspect
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from compo_jax.compose.cards import Step, card_target, write_card
from compo_jax.compose.checkpoints import WITHOUT_BASE, Sources, open_sources, require_dtype
from compo_jax.compose.depth import depths, layer_scales, scaled_by_layer
from compo_jax.compose.leaves import assembled
from compo_jax.compose.mergekit import METHODS, Tensor, require_parameters
from compo_jax.compose.recipes import Condition, Group, Parameters, Recipe, Value, Way
from compo_jax.compose.rules import dare, find_rule, lines, merge, options_of
from compo_jax.compose.shards import Plan, Progress, target, write
from compo_jax.compose.sparse import drop_each
from compo_jax.compose.tails import breadcrumbs, della
from compo_jax.tree import Tree


def merge_recipe(
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    check_finite: bool = True,
    progress: Progress | None = None,
    card: str | os.PathLike | None = None,
    max_shard_size: int | None = None,
) -> list[Step]:
    """Merges the checkpoints of a recipe (`read_recipe`) into the safetensors file `out`, as `merge_files` does.

    What was done comes back: by which rule how many tensors were merged, with which options. The other arguments, the
    memory and the errors are those of `merge_files`; ValueError as well for a filter or pattern that is in no tensor's
    name, a tensor that nothing says how to merge, a parameter that a method doesn't have, and a weight that is missing.
    """
    out, kind = target(out, max_shard_size), require_dtype(recipe.out_dtype or recipe.dtype)
    card = card_target(card, out)
    files = [str(recipe.folder / model.model) for model in recipe.models]
    base = None if recipe.base_model is None else str(recipe.folder / recipe.base_model)
    _require_base(recipe)
    also = [base] if base is not None and base not in files else []  # SLERP's first model
    sources = open_sources([*files, *also], base, kind, check_finite)
    names = list(sources.like.floats())
    with sources.precision():
        parts = _parts(recipe, names, _layers(sources, names))
        params: dict[str, Any] = {}
        for number, part in enumerate(parts):
            key = jax.random.fold_in(jax.random.key(recipe.seed), number)
            params |= (_by_rule if part.way.ours else _by_method)(part, sources, key)
        steps = [part.step() for part in parts]
        with write_card(card, steps, sources.base, sources.models[: len(files)], recipe.text or None):
            write(out, Plan(sources.like, kind, check_finite, progress, max_shard_size), params)
    return steps


# -- which tensors, and which parameters ------------------------------------------------------------------------------
class _Part(NamedTuple):
    """Tensors that one way merges: together, with one set of parameters, or, by mergekit's methods, each by itself.

    Attributes:
      models: numbers of those that are merged.
      base: whether their differences from the base are.
      each, overall: by tensor, parameters of the models, one a model, and of the merge.
    """

    way: Way
    names: list[str]
    models: list[int]
    base: bool
    each: dict[str, dict[str, tuple]]
    overall: dict[str, dict[str, Value]]

    def step(self) -> Step:
        options: dict[str, Any] = {}
        for by_name in (self.each, self.overall):
            for what in next(iter(by_name.values()), {}):
                values = {by_name[name][what] for name in self.names}
                options[what] = values.pop() if len(values) == 1 else "by tensor"
        if "weight" in options:
            options = {"weights": options.pop("weight")} | options
        text = ["{} {}".format(*next(iter(add_on.items()))) for add_on in self.way.add_ons]
        rule = self.way.name if self.way.ours else f"{self.way.name} of each tensor"
        return Step(" with ".join([str(rule), *text]), len(self.names), options)


def _parts(recipe: Recipe, names: Sequence[str], layers: Mapping[str, float]) -> list[_Part]:
    """The tensors in parts that are merged alike, in the recipe's order."""
    ways: list[tuple[Way, list[str]]] = []
    left = list(names)
    for number, group in enumerate(recipe.groups):
        for text, pattern in [(t, None) for t in group.filter] + [(None, p) for p in group.pattern]:
            _require_match(Condition(0, text, pattern), names, f"groups[{number}]")
        mine = [name for name in left if _in_group(group, name)]
        if not mine:
            raise ValueError(f"groups[{number}] takes no tensor: those that it matches are in an earlier group")
        left = [name for name in left if name not in set(mine)]
        ways.append((group, mine))
    if left and recipe.name is None:
        raise ValueError(
            f"no group takes {', '.join(left[:5])}{' and others' * (len(left) > 5)}: say merge_method: or rule: for "
            "the rest"
        )
    if left:
        ways.append((recipe, left))
    _require_parameters_somewhere(recipe, [way for way, _ in ways])
    for number, model in enumerate(recipe.models):
        _require_matches(model.parameters, names, f"models[{number}]")
    for way, mine in ways:
        _require_matches(way.parameters, names if way is recipe else mine, "parameters" if way is recipe else "a group")
    return [part for way, mine in ways for part in _parts_of(recipe, way, mine, layers)]


def _parts_of(recipe: Recipe, way: Way, names: list[str], layers: Mapping[str, float]) -> list[_Part]:
    chosen, base = _models(recipe, way)
    known, each, overall = _known(way), {}, {}
    method = None if way.ours else METHODS[way.name]
    whats = method.each if method else {"weight": None} if find_rule(way.name).weighted else {}
    common = [way.parameters] + [recipe.parameters] * (way is not recipe)
    for name in names:
        each[name] = {}
        for what, default in whats.items():
            row = [
                _picked([recipe.models[t].parameters if t < len(recipe.models) else {}, *common], what, name, layers)
                for t in chosen
            ]
            row = [default if value is None else value for value in row]
            if None in row and (method or any(value is not None for value in row)):
                model = recipe.models[chosen[row.index(None)]].model
                raise ValueError(f"the model {model} has no {what} for {name}: say one without filter: for the rest")
            if None not in row:
                each[name][what] = tuple(row)
        overall[name] = dict(method.overall) if method else {}
        for what in dict.fromkeys(what for parameters in common for what in parameters):
            value = _picked(common, what, name, layers)
            if (known is None or what in known) and what not in whats and value is not None:
                overall[name][what] = value
        if method:
            require_parameters(way.name, len(chosen), each[name], overall[name], name)
    if method:
        return [_Part(way, names, chosen, base, each, overall)]
    alike: dict[Any, list[str]] = {}
    for name in names:
        alike.setdefault((*each[name].items(), *overall[name].items()), []).append(name)
    return [
        _Part(way, part, chosen, base, {n: each[n] for n in part}, {n: overall[n] for n in part})
        for part in alike.values()
    ]


def _models(recipe: Recipe, way: Way) -> tuple[list[int], bool]:
    """(numbers of the models that are merged, whether their differences from the base are)."""
    files, base = [model.model for model in recipe.models], recipe.base_model
    others, everything = [t for t, file in enumerate(files) if file != base], list(range(len(files)))
    kind = "either" if way.ours else METHODS[way.name].base
    if kind == "first":
        return [files.index(base) if base in files else len(files), *others], False
    if kind == "none" or base is None:
        return everything, False
    return others, True


def _require_base(recipe: Recipe) -> None:
    ways: list[Way] = [*recipe.groups, *([recipe] if recipe.name else [])]
    kinds = {
        way.name: ("either" if way.name in WITHOUT_BASE else "needed") if way.ours else METHODS[way.name].base
        for way in ways
    }
    if recipe.base_model is None and (needing := [n for n, kind in kinds.items() if kind in ("needed", "first")]):
        raise ValueError(f"{needing[0]} wants a base_model:, the checkpoint that the models were trained from")
    files = [None, *(model.model for model in recipe.models)]
    if recipe.base_model not in files and all(kind == "none" for kind in kinds.values()):
        raise ValueError(f"{next(iter(kinds))} takes no base_model: leave it out, or put it among the models")


def _known(way: Way) -> set[str] | None:
    """The parameters that a way has; None for any."""
    if not way.ours:
        return {*METHODS[way.name].each, *METHODS[way.name].overall}
    options = options_of(way.name, way.behind)
    rule = find_rule(way.name)
    also = {"weight"} if rule.weighted else set()
    return None if options is None else {*options, *also, *({"task"} & set(rule.needs + rule.takes))}


def _require_parameters_somewhere(recipe: Recipe, ways: Sequence[Way]) -> None:
    """ValueError for a parameter that no method of the recipe has; a group's, that its own hasn't."""
    everywhere = [_known(way) for way in ways]
    places = [(f"models[{t}]", model.parameters, everywhere) for t, model in enumerate(recipe.models)]
    places.append(("the recipe", recipe.parameters, everywhere))
    places += [(f"groups[{n}]", group.parameters, [_known(group)]) for n, group in enumerate(recipe.groups)]
    for where, parameters, known in places:
        if None in known:
            continue
        there = sorted(set().union(*known))
        if wrong := [what for what in parameters if what not in there]:
            of = ", ".join(dict.fromkeys(way.name for way in ways))
            raise ValueError(
                f"{where} has a parameter {', '.join(wrong)} that {of} doesn't take: "
                f"there are {', '.join(there) or 'none'}"
            )


def _matches(condition: Condition, name: str) -> bool:
    if condition.pattern is not None:
        try:
            return re.search(condition.pattern, name) is not None
        except re.error as error:
            raise ValueError(f"pattern {condition.pattern!r} is no regular expression ({error})") from error
    return condition.filter in (None, "*") or condition.filter in name


def _in_group(group: Group, name: str) -> bool:
    conditions = [Condition(0, text) for text in group.filter] + [Condition(0, None, p) for p in group.pattern]
    return any(_matches(condition, name) for condition in conditions)


def _require_matches(parameters: Parameters, names: Sequence[str], where: str) -> None:
    for what, setting in parameters.items():
        for condition in setting:
            _require_match(condition, names, f"{where}, {what}")


def _require_match(condition: Condition, names: Sequence[str], where: str) -> None:
    """ValueError for a filter or pattern that no name has, with names that are near."""
    if any(_matches(condition, name) for name in names):
        return
    kind, text = ("pattern", condition.pattern) if condition.pattern is not None else ("filter", condition.filter)
    words = dict.fromkeys(word for name in names for word in (*re.split(r"[./]", name), name))
    near = difflib.get_close_matches(text, list(words), 3, 0.5)
    told = f"near are {', '.join(near)}" if near else f"names are {', '.join(names[:3])}"
    raise ValueError(f"{where}: the {kind} {text!r} matches no tensor that is merged there; {told}")


def _picked(chain: Sequence[Parameters], what: str, name: str, layers: Mapping[str, float]) -> Value | None:
    """The parameter's value for the tensor `name`, of the first in the chain that has one."""
    for parameters in chain:
        for condition in parameters.get(what, ()):
            if _matches(condition, name):
                return _at_depth(condition.value, what, name, layers)
    return None


def _at_depth(value: Value, what: str, name: str, layers: Mapping[str, float]) -> Value:
    """Of numbers, a gradient over the layers, the one at the tensor's."""
    if not isinstance(value, tuple) or any(isinstance(x, str | bool) for x in value):
        return value
    if name not in layers:
        raise ValueError(
            f"{what} is a gradient over the layers, {list(value)}, and {name} is in none: put filter: on it, and a "
            "value for the rest"
        )
    place = layers[name] * (len(value) - 1)
    low = min(int(place), len(value) - 1)
    high = min(low + 1, len(value) - 1)
    return (1 - (place - low)) * value[low] + (place - low) * value[high]


def _layers(sources: Sources, names: Sequence[str]) -> dict[str, float]:
    """By name, from 0 in the first layer to 1 in the last one; of tensors with a number in their paths."""
    origin = sources.origin(names, False)
    places, last = depths(origin, origin, ()), {}
    for place in places.values():
        last[place.stack] = max(last.get(place.stack, 0), place.first)
    return {name: place.first / max(last[place.stack], 1) for name, place in places.items()}


# -- the merge --------------------------------------------------------------------------------------------------------
def _by_method(part: _Part, sources: Sources, key: Key[Array, ""]) -> Tree:
    base = sources.origin(part.names, part.base)
    deltas = sources.deltas(part.names, part.base, part.models)
    method = METHODS[part.way.name]

    def leaf(name, b, rows, _):
        draws = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return method.run(Tensor(b, rows, part.each[name], part.overall[name], draws))

    return assembled(base, deltas, leaf, check_finite=sources.check_finite)


def _by_rule(part: _Part, sources: Sources, key: Key[Array, ""]) -> Tree:
    base = sources.origin(part.names, part.base)
    deltas = sources.deltas(part.names, part.base, part.models)
    name, options = part.way.name, dict(part.overall[part.names[0]])
    options |= {"weights": part.each[part.names[0]].get("weight"), "check_finite": sources.check_finite}
    for add_on in part.way.add_ons:
        ((what, chosen),) = add_on.items()
        if what == "lines" and chosen.get("when", "after") == "after":
            name, options = "lines", options | chosen | {"rule": part.way.name}
        else:
            deltas = _changed(what, base, deltas, key, chosen)
            key = jax.random.fold_in(key, 1)
    return merge(name, base, deltas, key=key, **options)


def _changed(what: str, base: Tree, deltas: list, key: Key[Array, ""], options: Mapping[str, Any]) -> list:
    """The deltas after an add-on that goes before the rule."""
    options = {name: value for name, value in options.items() if name != "when"}
    if what == "dare":
        rate = options.get("rate", inspect.signature(dare).parameters["rate"].default)
        return drop_each(key, deltas, rate, deferred=True)
    if what == "della":
        return della(base, deltas, key=key, deferred=True, **options)
    if what == "breadcrumbs":
        return breadcrumbs(base, deltas, deferred=True, **options)
    defaults = {name: p.default for name, p in inspect.signature(lines).parameters.items()}
    scales = [options.get(name, defaults[name]) for name in ("alpha", "beta", "stacked")]
    return scaled_by_layer(deltas, layer_scales(base, deltas[0], *scales))
