"""Recipes: merges of files as YAML, as mergekit's users know it.

    base_model: base.safetensors           # files, indices or folders, from the recipe's folder on
    models:
      - model: signs.safetensors
        parameters:
          weight:                          # the first entry whose text is in a tensor's name; the last is for the rest
            - filter: attn
              value: 0.7
            - pattern: "blocks\\.([0-5])\\."  # or whose regular expression is found in it
              value: 0.1
            - value: 0.5
      - model: digits.safetensors
        parameters: {weight: 0.4, density: 0.5}
    merge_method: ties                     # of mergekit (`mergekit.METHODS`), tensor by tensor, with its parameters
    parameters: {lambda: 0.9}
    groups:                                # tensors that are merged in another way; the first that matches counts
      - filter: [head, norm]
        rule: average                      # of ours (`rules.RULES`), with its options as parameters
      - pattern: "mlp.*weight"
        rule: task_arithmetic
        parameters: {scale: 0.4}
        add_ons:                           # in this order, before or after the rule
          - breadcrumbs: {kept: 0.8}
          - lines: {beta: 0.5}
    dtype: bfloat16                        # or out_dtype: of the result; what is merged is not rounded before
    seed: 0                                # of methods that draw
    outputs_first: []                      # matrices that are (out, in), as of `merge_files`; default PyTorch's

A rule of ours merges all tensors of its group that have the same parameters together: TIES trims them as one vector.
`read_recipe` reads it, `merge_recipe` does it.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cattrs
import yaml

from compo_jax.compose.checkpoints import require_dtype, require_leafwise
from compo_jax.compose.mergekit import METHODS, OTHERS
from compo_jax.compose.rules import MADE_BY, RULES
from compo_jax.compose.turned import PYTORCH
from compo_jax.files import local_path

Value = float | int | bool | str | tuple


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose names have the text `filter` in them (`*`: all), or match `pattern`.

    Attributes:
      value: several numbers are a gradient over the layers, evenly spaced from the first to the last.
    """

    value: Value
    filter: str | None = None
    pattern: str | None = None


Parameters = dict[str, tuple[Condition, ...]]
Options = dict[str, Value]


@dataclass(frozen=True)
class Model:
    """A checkpoint, and its parameters."""

    model: str
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """How tensors are merged: by a method of mergekit's or a rule of ours."""

    merge_method: str | None = None
    rule: str | None = None
    parameters: Parameters = field(default_factory=dict)
    add_ons: tuple[dict[str, Options], ...] = ()

    @property
    def name(self) -> str | None:
        return self.merge_method or self.rule

    @property
    def ours(self) -> bool:
        return self.rule is not None or self.merge_method not in METHODS

    @property
    def behind(self) -> Value | None:
        """Of an add-on as a rule, the rule behind it where its parameter `rule` says it."""
        return next((condition.value for condition in self.parameters.get("rule", ())), None)


@dataclass(frozen=True)
class Group(Way):
    """The tensors whose names have a text of `filter` in them, or match a `pattern`, and how they are merged."""

    filter: tuple[str, ...] = ()
    pattern: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe(Way):
    """See the head of this file.

    Attributes:
      folder: what paths of checkpoints are relative to.
      text: as it was read, for the model card.
      file: that it was read from.
    """

    models: tuple[Model, ...] = ()
    base_model: str | None = None
    groups: tuple[Group, ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = 0
    outputs_first: tuple[str, ...] = (PYTORCH,)
    folder: Path = Path()
    text: str = ""
    file: Path | None = None

    def checkpoints(self) -> tuple[list[str], str | None]:
        """(the models' paths, the base's, which is one of them where both name the same file)."""
        files = [self.folder / local_path(model.model) for model in self.models]
        if self.base_model is None:
            return list(map(str, files)), None
        base = self.folder / local_path(self.base_model)
        same = next((file for file in files if file.resolve() == base.resolve()), base)
        return list(map(str, files)), str(same)


_HIDDEN = ("folder", "text", "file")
_LANGUAGE = "what belongs to a tokenizer isn't merged: leave it out, and copy the files from one of the models"
_REFUSED = {
    "slices": "layers of several models aren't stacked: say whole models under models:, and filters by layer",
    "modules": "say one recipe for each module's checkpoint",
    "tokenizer": _LANGUAGE, "tokenizer_source": _LANGUAGE, "chat_template": _LANGUAGE,
    "input_model_parameters": "say parameters: of each model under models:",
}  # fmt: skip


def read_recipe(path: str | os.PathLike) -> Recipe:
    """The recipe in a YAML file.

    FileNotFoundError where there is none; ValueError, with the places, for what is no YAML, for keys and values that a
    recipe doesn't have, for methods that aren't there and for keys of mergekit's that aren't served.
    """
    path = local_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}: check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start}): save it as such") from error
    try:
        raw = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    return dataclasses.replace(parse_recipe(raw, str(path), path.parent, text), file=path)


class _Loader(yaml.SafeLoader):
    """Where a key is there twice, it is an error and not the last one's value."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {twice[0]} is there twice,{node.start_mark}")
        return super().construct_mapping(node, deep)


def parse_recipe(raw: Any, where: str = "the recipe", folder: Path = Path(), text: str = "") -> Recipe:
    """The recipe of dictionaries and lists; errors as of `read_recipe`."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where} has no keys such as merge_method and models: it is {type(raw).__name__}")
    if key := next((key for key in raw if key in _REFUSED), None):
        raise ValueError(f"{where} has {key}: {_REFUSED[key]}")
    if hidden := [key for key in _HIDDEN if key in raw]:
        raise ValueError(f"{where} has no key {hidden[0]}")
    try:
        recipe = _converter.structure(raw | {"folder": str(folder), "text": text}, Recipe)
    except Exception as error:
        wrong = cattrs.transform_error(error, path="", format_exception=_sentence)
        told = "; ".join(line.replace(" @ .", " at ").removesuffix(" @ ") for line in wrong)
        raise ValueError(f"{where} isn't a recipe: {told}") from error
    try:
        _check(recipe)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return recipe


# -- from YAML to types -----------------------------------------------------------------------------------------------
def _sentence(error: BaseException, kind: Any) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [name for name in error.cl.__dataclass_fields__ if name not in _HIDDEN]
        return f"no key {', '.join(sorted(map(str, error.extra_fields)))} is known (there are {', '.join(known)})"
    if isinstance(error, ValueError) and error.args:
        return str(error)
    if isinstance(error, AttributeError) and hasattr(
        kind, "__dataclass_fields__"
    ):  # cattrs looks for the keys of what has none
        return f"keys and values are wanted there, {', '.join(kind.__dataclass_fields__)} say"
    return cattrs.v.format_exception(error, kind)


def _value(raw: Any, _: Any = None) -> Value:
    if isinstance(raw, str):
        try:
            return float(raw)  # YAML's 1e-3 is a text
        except ValueError:
            return raw
    if isinstance(raw, list) and raw and not any(isinstance(x, list | dict) for x in raw):
        return tuple(_value(x) for x in raw)
    if not isinstance(raw, bool | int | float):
        raise ValueError(f"{raw!r} is no number, text, truth value or list of them")
    return raw


def _setting(raw: Any, _: Any) -> tuple[Condition, ...]:
    conditions = [raw] if isinstance(raw, dict) else raw
    if isinstance(conditions, list) and any(isinstance(x, dict) for x in conditions):
        return tuple(_converter.structure(conditions, list[Condition]))
    return (Condition(_value(raw)),)


def _text(raw: Any, _: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"{raw!r} is no text")
    return raw


def _texts(raw: Any, _: Any) -> tuple[str, ...]:
    return tuple(_text(x, None) for x in (raw if isinstance(raw, list) else [raw]))


def _whole(raw: Any, _: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise ValueError(f"{raw!r} is no whole number")
    return raw


_converter = cattrs.Converter(forbid_extra_keys=True)
_converter.register_structure_hook(str, _text)
_converter.register_structure_hook(int, _whole)
_converter.register_structure_hook_func(lambda kind: kind == Value, _value)
_converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], _texts)
_converter.register_structure_hook_func(lambda kind: kind == tuple[Condition, ...], _setting)


# -- what a type doesn't say ------------------------------------------------------------------------------------------
#: What goes before a rule, or after it: the only ones that go from leaf to leaf.
ADD_ONS = {
    "dare": ("rate",),
    "della": ("rate", "window"),
    "breadcrumbs": ("kept", "largest", "stacked"),
    "lines": ("alpha", "beta", "when", "stacked"),
}


def _check(recipe: Recipe) -> None:
    if not recipe.models:
        raise ValueError("there are no models: say models:, a list of {model: FILE}")
    for dtype in (recipe.dtype, recipe.out_dtype):
        require_dtype(dtype)
    if recipe.name is None and not recipe.groups:
        raise ValueError("merge_method: or rule: says how to merge, and neither is there")
    if recipe.name is not None:
        _check_way(recipe, "")
    for number, group in enumerate(recipe.groups):
        if bool(group.filter) == bool(group.pattern):
            raise ValueError(f"groups[{number}] wants filter: or pattern:, and one of them")
        _check_way(group, f"groups[{number}]: ")
    for number, model in enumerate(recipe.models):
        for condition in (c for setting in model.parameters.values() for c in setting):
            _check_condition(condition, f"models[{number}]: ")


def _check_condition(condition: Condition, where: str) -> None:
    if condition.filter is not None and condition.pattern is not None:
        raise ValueError(f"{where}a value has filter: and pattern:, where one of them says which tensors it is for")


def _check_way(way: Way, where: str) -> None:
    if way.name is None or (way.merge_method and way.rule):
        raise ValueError(f"{where}one of merge_method: and rule: says how to merge")
    if way.name in OTHERS and way.rule is None:
        raise ValueError(f"{where}mergekit's {way.name} is not there; these are: {', '.join(METHODS)}")
    if way.ours and way.name not in RULES:
        known = f"mergekit's {', '.join(METHODS)}" if way.rule is None else "ours are"
        raise ValueError(f"{where}no method is called {way.name!r}: {known}; by rule: {', '.join(RULES)}")
    for condition in (c for setting in way.parameters.values() for c in setting):
        _check_condition(condition, where)
    if not way.ours:
        if way.add_ons:
            raise ValueError(f"{where}add_ons: go with a rule:, and {way.name} is a method of mergekit's")
        return
    require_leafwise(way.name, way.behind)
    needs = [what for what in RULES[way.name].needs if what not in ("key", "task")]
    if needs:
        made = " and ".join(f"{what} ({MADE_BY[what]})" for what in needs)
        raise ValueError(
            f"{where}the rule {way.name!r} needs {made}, which checkpoints don't hold: load them, and call merge"
        )
    _check_add_ons(way.add_ons, where)
    if way.behind is not None and any(map(_lines_after, way.add_ons)):
        raise ValueError(
            f"{where}lines goes after a rule, and {way.name} has {way.behind} behind it by its parameter rule: take "
            f"rule: {way.behind}, and {way.name} as an add-on before it"
        )


def _lines_after(add_on: Mapping[str, Options]) -> bool:
    return "lines" in add_on and add_on["lines"].get("when", "after") == "after"


def _check_add_ons(add_ons: Sequence[Mapping[str, Options]], where: str) -> None:
    for number, add_on in enumerate(add_ons):
        name = next(iter(add_on), None)
        if len(add_on) != 1 or name not in ADD_ONS:
            raise ValueError(
                f"{where}add_ons[{number}] is one of {', '.join(ADD_ONS)} with its options, such as "
                f"{{lines: {{beta: 0.5}}}}, not {', '.join(map(str, add_on)) or 'nothing'}"
            )
        if wrong := [option for option in add_on[name] if option not in ADD_ONS[name]]:
            raise ValueError(f"{where}{name} has no option {', '.join(wrong)}, but {', '.join(ADD_ONS[name])}")
    if sum(map(_lines_after, add_ons)) > 1:
        raise ValueError(f"{where}lines goes after the rule twice")
