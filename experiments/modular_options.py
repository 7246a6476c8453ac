"""The options that the experiments on modular networks share; what is left open is as the data set wants it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import job
import options as line
from options import LocalPath, Name, OpenCount, OpenPath, Rate, Seeds, number, values

Options = TypeVar("Options")
Names = Annotated[tuple[str, ...], values(str, "NAME", "*")]
RENDERED = {"glyphs", "rendered"}
NEEDED = ("data", "seeds", "templates", "budgets")


@dataclass(frozen=True)
class Images:
    """What is learned"""

    data_dir: OpenPath = None
    """where TFDS has prepared the set"""
    images: OpenCount = None
    """training images of a class (default: all of a real set)"""
    size: OpenCount = None
    """side of the images, in pixels (default: the set's)"""


@dataclass(frozen=True)
class Tasks(Images):
    """What is learned"""

    data: Names = ("glyphs",)
    """glyphs, or names of TFDS image classification sets"""
    tasks: OpenCount = None
    """tasks that a divided set gives (default: all)"""


@dataclass(frozen=True)
class Net:
    """The network"""

    layers: OpenCount = None
    """layers (default: the set's)"""
    width: OpenCount = None
    """channels (default: the set's)"""
    patch: OpenCount = None
    """side of the stem's patches, in pixels (default: the set's)"""
    block: Literal["basic", "bottleneck", "inverted"] = "basic"
    """kind of its blocks"""


@dataclass(frozen=True)
class Templates(Net):
    """The network"""

    templates: OpenCount = None
    """modules (default: the set's)"""


@dataclass(frozen=True)
class Training:
    """How it is trained"""

    route: Literal["soft", "straight_through", "gumbel"] = "soft"
    """how routes are learned"""
    phases: Annotated[tuple[float, float], number(float, 0, 1, many=2)] = (0.1, 0.4)
    """parts of the steps after which routes begin to harden, and are fixed"""
    steps: OpenCount = None
    """of a training (default: the set's)"""
    batch: OpenCount = None
    """images of each task in a step (default: the set's)"""
    learning_rate: Rate = 3e-3
    """at its highest"""
    runner: Literal["jit", "pmap"] = "jit"
    """how a batch is divided among the devices"""


@dataclass(frozen=True)
class Place:
    """The run"""

    seeds: Seeds = (0, 1, 2)
    """a finished run may be given more: name the old ones too"""
    name: Name = None
    """folder of the run (default: made from the experiment and the data)"""
    runs: LocalPath = Path("runs")
    """folder of the runs"""
    tensorboard: bool = False
    """write its logs too"""


def completed(options: Options, experiment: str, presets: dict[str, dict[str, Any]], preset: dict[str, Any]) -> Options:
    """The options, each that the command line leaves open as this data set wants it; ValueError for what can't be."""
    data = options.stream.data
    name = data if isinstance(data, str) else "+".join(data)
    if set(name.split("+")) <= RENDERED:
        line.refuse(options.stream, f"with {name}, whose images are rendered", "data_dir")
    groups = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    if empty := [
        key for group in groups.values() for key, value in vars(group).items() if value == () and key in NEEDED
    ]:
        raise ValueError(f"{' and '.join(map(line.flag, empty))} must name one at least")
    wanted = {"size": 32, "patch": 4, "name": line.plain(f"{experiment}-{name}")} | preset | presets.get(name, {})
    options = dataclasses.replace(options, **{key: line.filled(group, wanted) for key, group in groups.items()})
    if options.stream.size % options.net.patch:
        raise ValueError(f"images of {options.stream.size} pixels can't be cut into patches of {options.net.patch}")
    if options.training.phases[0] > options.training.phases[1]:
        raise ValueError(
            f"--phases begin one after the other, the first not after the second: not {options.training.phases}"
        )
    for key, value in line.flat(options).items():
        if key.split("_")[-1] == "batch":
            job.divisible(value, line.flag(key))
    return options
