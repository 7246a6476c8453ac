"""The ways to learn by their names: a file registers one or more, and nothing else knows them.

    def fine_tuning(setup: Setup, method: Method) -> Mode:
        return task_arithmetic(setup, method)._replace(...)  # what differs from modules trained alone: see `Mode`

    register("sequential", fine_tuning, "one module trained on and on")

What lies in `baselines/` is imported with the room, and so registered; a file of your own registers its way when you
import it. A way is written out whole in tests/test_ways.py.
"""

from typing import Any, NamedTuple

from compo_jax.adapters import Adapter
from compo_jax.incremental.modes import MakeMode, Method


class Way(NamedTuple):
    """A registered name: a mode, and the options of `Method` that make it what the name says.

    Attributes:
      name: the first word of its methods' names: `ita` of `ita-lora`.
      mode: its constructor.
      source: what it is and the paper, in a line.
      averages: whether a pool of it holds a module a task whose deltas are averaged, so that any of them can be left
        out or merged by another rule.
      options: of `Method`, where they differ from its defaults.
    """

    name: str
    mode: MakeMode
    source: str
    averages: bool
    options: dict[str, Any]


WAYS: dict[str, Way] = {}  #: all that are registered, in that order


def register(name: str, mode: MakeMode, source: str, *, averages: bool = False, **options: Any) -> Way:
    """Makes a way to learn known by its name; see `Way`. ValueError for a name that is taken and an unknown option."""
    if name in WAYS:
        raise ValueError(f"there is a way to learn called {name!r} already ({WAYS[name].source}): choose another name")
    if unknown := options.keys() - set(Method._fields[2:]):
        raise ValueError(
            f"a method has no {', '.join(sorted(unknown))}; its options are {', '.join(Method._fields[2:])}"
        )
    WAYS[name] = Way(name, mode, source, averages, options)
    return WAYS[name]


def method(way: str, adapter: Adapter | None = None, **options: Any) -> Method:
    """The method `way-adapter` (`ita-lora`), or `way` where it trains no module.

    Args:
      options: of `Method`, before those of the way. ValueError, with the names that there are, for an unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"unknown way to learn {way!r}; known are {', '.join(WAYS)}: register(...) adds another")
    name = way if adapter is None else f"{way}-{adapter.name}"
    return Method(**{"name": name, "mode": WAYS[way].mode, "adapter": adapter} | WAYS[way].options | options)
