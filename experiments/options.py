"""Command lines made from dataclasses: their fields, defaults and docstrings are the options (tyro).

A dataclass is a group of options, and a dataclass of such groups a command line. Numbers have ranges, which the help
shows. Nothing here loads JAX: help and a wrong command line are told at once.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from compo_jax.files import local_path

Options = TypeVar("Options")
Repeat = Literal["*"] | int | None
_LARGEST = 2**31 - 1
OPEN = tyro.conf.arg(help_behavior_hint="")  # None, the default, means what the docstring says


# -- types ------------------------------------------------------------------------------------------------------------
def values(parse, metavar: str, many: Repeat = None) -> PrimitiveConstructorSpec:
    """The type of an option whose texts `parse` turns into values one by one; a tuple of them where there are many."""

    def from_texts(texts: Sequence[str]) -> Any:
        parsed = tuple(map(parse, texts))
        if len(set(parsed)) < len(parsed) and many == "*":
            raise ValueError(f"one of the values stands there twice: {' '.join(texts)}")
        return parsed[0] if many is None else parsed

    return PrimitiveConstructorSpec(
        nargs=many or 1,
        metavar=metavar,
        instance_from_str=from_texts,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(x) for x in (value if isinstance(value, tuple | list) else [value])],
    )


def number(kind: type, least=None, most=None, *, above=None, below=None, many: Repeat = None):
    """A finite number in a range, whose ends `least` and `most` belong to it, and `above` and `below` don't."""
    signs = {">=": least, ">": above, "<=": most, "<": below}
    metavar = "INT" if kind is int else "FLOAT"
    metavar += "".join(f"{sign}{end}" for sign, end in signs.items() if end is not None)

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (
            math.isfinite(value),
            least is None or value >= least,
            above is None or value > above,
            most is None or value <= most,
            below is None or value < below,
        )
        if not all(inside):
            raise ValueError(f"{text!r} is not {metavar}, a {'whole ' * (kind is int)}number")
        if kind is int and value > _LARGEST:
            raise ValueError(f"{text} is more than {_LARGEST}, the largest that a device counts to")
        return value

    return values(parse, metavar, many)


def names(choices: Collection[str], many: Repeat = "*") -> PrimitiveConstructorSpec:
    """Names out of these, each once."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return values(parse, "NAME", many)


def _folder_name(text: str) -> str:
    if not re.fullmatch(r"[^/\\\0]{1,200}", text) or text.strip(". ") == "":
        raise ValueError(f"{text!r} is not the name of a folder: leave out slashes; --runs says where")
    return text


def _path(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise ValueError(f"{text!r} is no path")
    return local_path(text)


Count = Annotated[int, number(int, 1)]
Counts = Annotated[tuple[int, ...], number(int, 1, many="*")]
OpenCount = Annotated[int | None, number(int, 1), OPEN]
Rate = Annotated[float, number(float, above=0)]
OpenRate = Annotated[float | None, number(float, above=0), OPEN]
Rates = Annotated[tuple[float, ...], number(float, above=0, many="*")]
Weight = Annotated[float, number(float, 0)]
OpenWeight = Annotated[float | None, number(float, 0), OPEN]
Seed = Annotated[int, number(int, 0)]
OpenSeed = Annotated[int | None, number(int, 0), OPEN]
Seeds = Annotated[tuple[int, ...], number(int, 0, many="*")]
Name = Annotated[str | None, values(_folder_name, "NAME"), OPEN]
Text = Annotated[str | None, values(str, "TEXT"), OPEN]
Names = Annotated[tuple[str, ...], values(str, "NAME", "*"), OPEN]
LocalPath = Annotated[Path, values(_path, "PATH")]
OpenPath = Annotated[Path | None, values(_path, "PATH"), OPEN]
Paths = Annotated[tuple[Path, ...], values(_path, "PATH", "*"), OPEN]


@dataclass(frozen=True)
class OnRuns:
    """Options of an experiment on the pools of finished runs."""

    run: Paths = ()
    """finished runs of incremental.py (default: make a small one)"""
    runs: LocalPath = Path("runs")
    """where a small run is made"""
    data_dir: OpenPath = None
    """where the runs' TFDS set is now (default: where it was)"""
    methods: Names = ()
    """pools of the runs (default: all that all runs have)"""


# -- the command line -------------------------------------------------------------------------------------------------
def parse(
    kind: type[Options], documentation: str | None, arguments: Sequence[str] | None = None,
    default: Options | None = None,
) -> Options:  # fmt: skip
    """The options that the command line names, the others as in `default`, or else at their defaults.

    Exits with 0 after `--help`, and with 2 after one line on what is wrong, as tyro does.
    """
    plain = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    others: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(kind, description=documentation, args=arguments, config=plain, **others)


def flag(field: str) -> str:
    """The option of a field, as the command line has it."""
    return f"--{field.replace('_', '-')}"


def refuse(group: Any, when: str, *fields: str) -> None:
    """ValueError where these options of a group are not at their defaults, for they play no part `when`."""
    defaults = {field.name: field.default for field in dataclasses.fields(group)}
    if named := [flag(name) for name in fields if getattr(group, name) != defaults[name]]:
        verb, what = ("play", "them") if len(named) > 1 else ("plays", "it")
        raise ValueError(f"{' and '.join(named)} {verb} no part {when}: leave {what} out")


def filled(group: Options, wanted: dict[str, Any]) -> Options:
    """The group with what is None as `wanted` has it, where it has."""
    open_fields = {field.name for field in dataclasses.fields(group) if getattr(group, field.name) is None}
    return dataclasses.replace(group, **{key: value for key, value in wanted.items() if key in open_fields})


def flat(options: Any) -> dict[str, Any]:
    """All options by name, out of their groups, as JSON has them."""
    pairs = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        pairs |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return {key: str(value) if isinstance(value, Path) else value for key, value in pairs.items()}


def plain(text: str) -> str:
    """A run's default name as that of one folder: a set's name may have a slash."""
    return re.sub(r"[^\w.+:-]+", "-", text)
