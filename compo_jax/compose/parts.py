"""Which tensors each way of a recipe merges, and with which parameters."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from compo_jax.compose.cards import Step
from compo_jax.compose.checkpoints import WITHOUT_BASE, Sources
from compo_jax.compose.depth import depths, ends
from compo_jax.compose.mergekit import METHODS, require_parameters
from compo_jax.compose.recipes import Condition, Group, Parameters, Recipe, Value, Way
from compo_jax.compose.rules import find_rule, options_of


class Part(NamedTuple):
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
        """What is told of it; a parameter with several values is told as such."""
        options: dict[str, Any] = {}
        for by_name in (self.each, self.overall):
            for what in next(iter(by_name.values()), {}):
                values = {by_name[name][what] for name in self.names}
                options[what] = values.pop() if len(values) == 1 else "by tensor"
        if "weight" in options:
            options = {"weights": options.pop("weight")} | options
        add_ons = [
            f"{name}({', '.join(f'{option}={value}' for option, value in chosen.items())})"
            for add_on in self.way.add_ons
            for name, chosen in add_on.items()
        ]
        rule = self.way.name if self.way.ours else f"{self.way.name} of each tensor"
        return Step(" with ".join([str(rule), *add_ons]), len(self.names), options)


def divided(recipe: Recipe, names: Sequence[str], layers: Mapping[str, float]) -> list[Part]:
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


def _parts_of(recipe: Recipe, way: Way, names: list[str], layers: Mapping[str, float]) -> list[Part]:
    chosen, base = _models(recipe, way)
    known, each, overall = _known(way), {}, {}
    method = None if way.ours else METHODS[way.name]
    whats = _of_each_model(way)
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
        return [Part(way, names, chosen, base, each, overall)]
    alike: dict[Any, list[str]] = {}
    for name in names:
        alike.setdefault((*each[name].items(), *overall[name].items()), []).append(name)
    return [
        Part(way, part, chosen, base, {n: each[n] for n in part}, {n: overall[n] for n in part})
        for part in alike.values()
    ]


def _models(recipe: Recipe, way: Way) -> tuple[list[int], bool]:
    """(numbers of the models that are merged, whether their differences from the base are)."""
    files, base = recipe.checkpoints()
    others, everything = [t for t, file in enumerate(files) if file != base], list(range(len(files)))
    kind = "either" if way.ours else METHODS[way.name].base
    if kind == "first":
        return [files.index(base) if base in files else len(files), *others], False
    if kind == "none" or base is None:
        return everything, False
    return others, True


def require_base(recipe: Recipe) -> None:
    """ValueError where a method wants a base and there is none, or where none of them has a use for it."""
    ways: list[Way] = [*recipe.groups, *([recipe] if recipe.name else [])]
    kinds = {
        way.name: ("either" if way.name in WITHOUT_BASE else "needed") if way.ours else METHODS[way.name].base
        for way in ways
    }
    if recipe.base_model is None and (needing := [n for n, kind in kinds.items() if kind in ("needed", "first")]):
        raise ValueError(f"{needing[0]} wants a base_model:, the checkpoint that the models were trained from")
    files, base = recipe.checkpoints()
    if base is not None and base not in files and all(kind == "none" for kind in kinds.values()):
        raise ValueError(f"{next(iter(kinds))} takes no base_model: leave it out, or put it among the models")


def _known(way: Way) -> set[str] | None:
    """The parameters that a way has; None for any."""
    if not way.ours:
        return {*METHODS[way.name].each, *METHODS[way.name].overall}
    options = options_of(way.name, way.behind)
    rule = find_rule(way.name)
    also = {"weight"} if rule.weighted else set()
    return None if options is None else {*options, *also, *({"task"} & set(rule.needs + rule.takes))}


def _of_each_model(way: Way) -> Mapping[str, Value | None]:
    """The parameters that each model has its own value of, with their defaults; None: without any."""
    if not way.ours:
        return METHODS[way.name].each
    return {"weight": None} if find_rule(way.name).weighted else {}


def _require_parameters_somewhere(recipe: Recipe, ways: Sequence[Way]) -> None:
    """ValueError for a parameter that no method of the recipe has; a group's, that its own hasn't."""
    everywhere, of_models = [_known(way) for way in ways], [set(_of_each_model(way)) for way in ways]
    places = [(f"models[{t}]", model.parameters, of_models) for t, model in enumerate(recipe.models)]
    places.append(("the recipe", recipe.parameters, everywhere))
    places += [(f"groups[{n}]", group.parameters, [_known(group)]) for n, group in enumerate(recipe.groups)]
    for where, parameters, known in places:
        if None in known:
            continue
        there = sorted(set().union(*known))
        if wrong := [what for what in parameters if what not in there]:
            of = ", ".join(dict.fromkeys(way.name for way in ways))
            one = " for one model" if known is of_models else ""
            raise ValueError(
                f"{where} has a parameter {', '.join(wrong)} that {of} doesn't take{one}: "
                f"there are {', '.join(there) or 'none'}"
                + "; those of the whole merge stand under the recipe's own parameters:"
                * (known is of_models)
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
    """ValueError for a condition that matches no name, or none that an earlier one hasn't taken."""
    for what, setting in parameters.items():
        left = list(names)
        for condition in setting:
            _require_match(condition, names, f"{where}, {what}")
            rest = [name for name in left if not _matches(condition, name)]
            if len(rest) == len(left) and (text := condition.pattern or condition.filter) not in (None, "*"):
                raise ValueError(
                    f"{where}, {what}: {text!r} comes too late, earlier values have taken all tensors that it matches: "
                    "say those for all tensors last"
                )
            left = rest


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
                return _at_depth(condition.value, name, layers)
    return None


def _at_depth(value: Value, name: str, layers: Mapping[str, float]) -> Value:
    """Of numbers, a gradient over the layers, the one at the tensor's; in no layer it is the first, as in mergekit."""
    if not isinstance(value, tuple) or any(isinstance(x, str | bool) for x in value):
        return value
    place = layers.get(name, 0.0) * (len(value) - 1)
    low = min(int(place), len(value) - 1)
    high = min(low + 1, len(value) - 1)
    return (1 - (place - low)) * value[low] + (place - low) * value[high]


def layer_places(sources: Sources, names: Sequence[str]) -> dict[str, float]:
    """By name, from 0 in the first layer to 1 in the last one, the only one say, as in mergekit; of tensors with a
    number in their paths."""
    origin = sources.origin(names, False)
    places = depths(origin, origin, ())
    network = ends(places.values())

    def place(stack, first, _):
        lowest, last = network[stack]
        return (first - lowest) / (last - lowest) if last > lowest else 1.0

    return {name: place(*where) for name, where in places.items()}
