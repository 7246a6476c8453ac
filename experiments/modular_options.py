"""The options of the experiments on modular networks, in groups; what is left open is as the data set wants it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import job
import options as line
from adaptation_ways import ADAPTED
from options import OPEN, Count, LocalPath, Name, Names, OpenCount, OpenPath, OpenRate, Rate, Seeds, Text, names, number

RENDERED = {"glyphs", "rendered", "rendered-corrupted"}
NEEDED = ("data", "seeds", "templates", "budgets", "orders", "times")


@dataclass(frozen=True)
class Images:
    """What is learned"""

    data_dir: OpenPath = None
    """where TFDS has prepared the set"""
    images: OpenCount = None
    """training images of a class (default: all of a real set)"""
    validation: Annotated[float, number(float, 0, below=1)] = 0.0
    """part of the training images to test on in place of the test images, to choose settings by"""
    size: OpenCount = None
    """side of the images, in pixels (default: the set's)"""


@dataclass(frozen=True)
class Tasks(Images):
    """What is learned"""

    data: Names = ("glyphs",)
    """glyphs, folder:PATH, or names of TFDS image classification sets (default: glyphs)"""
    tasks: OpenCount = None
    """tasks that a divided set gives (default: all)"""
    train_split: Text = None
    """of a divided set, in TFDS's syntax: train+test has all of Omniglot's alphabets (default: the set's)"""


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
    route: Literal["linear", "soft", "hard"] = "linear"
    """what weighs them: coefficients; softmax; the largest logit"""
    start: Literal["shared", "one_hot", "distinct"] = "shared"
    """of routes: the same in all tasks; that, and a template a layer; others in each task"""
    groups: Count = 1
    """of channels, each with its coefficients"""


@dataclass(frozen=True)
class Training:
    """How it is trained"""

    steps: OpenCount = None
    """of a training (default: the set's)"""
    batch: OpenCount = None
    """images of each task in a step (default: the set's)"""
    learning_rate: Rate = 1e-2
    """at its highest"""
    route_rate: OpenRate = None
    """of routes, in multiples of that rate (default: 1 of coefficients, 3 of logits)"""
    relaxation: Literal["soft", "straight_through", "gumbel"] = "soft"
    """how hard routes are learned"""
    phases: Annotated[tuple[float, float], number(float, 0, 1, many=2)] = (0.1, 0.4)
    """parts of the steps after which hard routes begin to harden, and are fixed"""
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


def _refuse_kinds(options: Any) -> None:
    """ValueError for options of another kind of route than the network's."""
    net = options.net
    if net.route != "linear":
        line.refuse(net, f"with {net.route} routes", "groups")
    if net.route != "hard":
        line.refuse(options.training, f"with {net.route} routes", "relaxation", "phases")


class Experiment:
    """Groups of options.

    Attributes:
      experiment: what a run is named after.
      presets: what a data set wants where the command line leaves it open; "" is of any.
    """

    experiment: ClassVar[str]
    presets: ClassVar[dict[str, dict[str, Any]]]

    def check(self) -> None:
        """ValueError for options that play no part, or don't go together."""


# -- several tasks at once --------------------------------------------------------------------------------------------
ORDERS = ("linear", "soft", "hard")
BASELINES = (
    "single-task", "hard-sharing", "hard-sharing-bn", "hard-sharing-wide", "frozen", "random", "random-linear", "mmoe",
    "cgc", "dselect-k",
)  # fmt: skip
FEW = ("single-task", "hard-sharing-bn", "frozen", "random")


@dataclass(frozen=True)
class Nets(Net):
    """The networks"""

    templates: Annotated[tuple[int, ...] | None, number(int, 1, many="*"), OPEN] = None
    """modules; several numbers make several networks (default: the set's)"""
    bn: Literal["task", "layer", "template"] = "task"
    """whose batch norm, of all orders"""
    orders: Annotated[tuple[str, ...], names(ORDERS)] = ("linear",)
    """what is learned: coefficients; softmax; the largest logit"""
    start: Literal["shared", "one_hot", "distinct"] = "shared"
    """of orders: the same in all tasks; that, and a template a layer; others in each task"""
    groups: Count = 1
    """of channels, each with its coefficients"""
    baselines: Annotated[tuple[str, ...], names(BASELINES)] = FEW
    """what learned orders are held against"""
    harden_steps: Annotated[int, number(int, 0)] = 0
    """steps on the nearest one-hot order afterwards, for the gap"""
    analysis_images: Count = 50
    """test images of a task that modules are removed on"""


@dataclass(frozen=True)
class Multitask(Experiment):
    experiment = "modular-multitask"
    presets = {
        "": {"layers": 4, "width": 32, "templates": (8,), "steps": 2000, "batch": 8},
        "glyphs": {"tasks": 5, "layers": 4, "width": 16, "templates": (4,), "steps": 250, "batch": 16, "images": 50},
        "cifar100": {"steps": 750, "batch": 16, "width": 16},
    }
    stream: Tasks
    net: Nets
    training: Training
    place: Place

    def check(self) -> None:
        if (self.net.templates or (0,))[0] == 1:
            line.refuse(self.net, "with one template, which can't be removed", "analysis_images")
        if "linear" not in self.net.orders:
            line.refuse(self.net, "without linear orders", "groups", "harden_steps")
        if "hard" not in self.net.orders:
            line.refuse(self.training, "without hard orders", "relaxation", "phases")


# -- a new task --------------------------------------------------------------------------------------------------------
PARTS = ("head", "head+route", "head+gain", "head+route+gain", "head+bn", "head+bn+route", "all")  # of modular.PARTS
CONTROLS = ("head, random source", "head, random route", "head+route, random start", "head+route, untrained templates")
CLOSED = "head, closed-form route"
WAYS = (*PARTS, "scratch", CLOSED, *CONTROLS)


@dataclass(frozen=True)
class Sources(Templates):
    """The network"""

    bn: Literal["task", "layer", "template"] = "layer"
    """whose batch norm; with each task's there is less for an order to say"""


@dataclass(frozen=True)
class NewTask:
    """A new task"""

    held_out: Count = 1
    """tasks left out, drawn by the seed"""
    budgets: Annotated[tuple[int, ...] | None, number(int, 0, many="*"), OPEN] = None
    """labelled images of each class of a new task, 2 at least; 0 for all (default: the set's)"""
    methods: Annotated[tuple[str, ...], names(WAYS)] = WAYS
    """what of its network is trained, and from where; scratch and controls beside"""
    new_steps: OpenCount = None
    """of its training (default: the set's)"""
    new_batch: Count = 32
    """images in a step of its training"""
    new_learning_rate: Rate = 1e-2
    """of its training"""
    smoothing: Annotated[float, number(float, above=0, below=1)] = 0.3
    """of a source's hard route, where a new one starts from it"""


@dataclass(frozen=True)
class Transfer(Experiment):
    experiment = "modular-transfer"
    presets = {
        "": {"layers": 8, "width": 32, "templates": 8, "steps": 1000, "batch": 32, "budgets": (10, 100, 0),
             "new_steps": 150},
        "glyphs": {"tasks": 5, "layers": 4, "width": 16, "templates": 4, "steps": 250, "batch": 16, "budgets": (5, 0),
                   "new_steps": 80, "images": 50},
        "cifar100": {"width": 16, "steps": 750, "batch": 16},
    }  # fmt: skip
    stream: Tasks
    net: Sources
    training: Training
    new: NewTask
    place: Place

    def check(self) -> None:
        if "head" not in self.new.methods:
            raise ValueError("the other methods are held against head: name it among --methods, too")
        if self.net.route != "linear" and CLOSED in self.new.methods:
            raise ValueError(f"{CLOSED!r} is of linear routes: leave it out of --methods")
        if self.net.route != "hard" or not any("route" in name for name in self.new.methods):
            line.refuse(self.new, "where no method learns a source's hard route", "smoothing")
        _refuse_kinds(self)
        if 1 in (self.new.budgets or ()):
            raise ValueError(
                "--budgets are 2 or more, for the nearest source is told by two images of each class; 0 for all"
            )


# -- a domain without labels -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Domains(Images):
    """What is learned"""

    data: str = "rendered"
    """rendered; digits; a TFDS set whose splits are domains; rendered-corrupted; or a TFDS set and -corrupted"""
    label: Text = None
    """feature of a TFDS set that gives the classes (default: label; CIFAR-100's coarse_label)"""
    targets: Names = ()
    """domains left out in turn (default: those that are held out for it, or all)"""


@dataclass(frozen=True)
class Adapting:
    """A domain without labels"""

    methods: Annotated[tuple[str, ...], names(list(ADAPTED))] = tuple(ADAPTED)
    """where a route starts, and how it or batch norm is adapted"""
    adapt_steps: OpenCount = None
    """steps of an adaptation (default: the set's)"""
    adapt_batch: Annotated[int | None, number(int, 2), OPEN] = None
    """images in such a step, two or more (default: the set's)"""
    adapt_learning_rate: Rate = 1e-3
    """of batch norm"""
    adapt_route_rate: OpenRate = None
    """of a route, in multiples of that rate (default: 3 of free coefficients, 100 of logits and mixtures)"""


@dataclass(frozen=True)
class Adaptation(Experiment):
    experiment = "modular-adaptation"
    presets = {
        "": {"layers": 8, "width": 32, "templates": 8, "steps": 1000, "batch": 32, "adapt_steps": 100,
             "adapt_batch": 64, "label": "label"},
        "rendered": {"layers": 4, "width": 16, "templates": 4, "steps": 250, "batch": 16, "adapt_steps": 40,
                     "adapt_batch": 32, "images": 50},
        "rendered-corrupted": {"layers": 4, "width": 16, "steps": 1000, "batch": 16, "images": 50},
        "digits": {"steps": 500, "width": 16},
        "cifar100-corrupted": {"width": 16, "batch": 16, "label": "coarse_label"},
        "pacs64": {"size": 64, "patch": 8, "steps": 700},
    }  # fmt: skip
    stream: Domains
    net: Sources
    training: Training
    adapting: Adapting
    place: Place

    def check(self) -> None:
        if self.stream.data in {*RENDERED, "digits"}:
            line.refuse(self.stream, f"with {self.stream.data}, whose classes are digits", "label")
        ways, when = [ADAPTED[name] for name in self.adapting.methods], "with these --methods"
        if not ways:
            line.refuse(self.adapting, when, "adapt_batch")
        if not any(way.route != "fixed" or way.bn == "affine" for way in ways):
            line.refuse(self.adapting, when, "adapt_steps", "adapt_learning_rate")
        if not any(way.route != "fixed" for way in ways):
            line.refuse(self.adapting, when, "adapt_route_rate")
        _refuse_kinds(self)


# -- blocks used again -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OneTask(Images):
    """What is learned"""

    data: str = "glyphs"
    """glyphs, folder:PATH, or the name of a TFDS image classification set"""
    tasks: OpenCount = None
    """scripts whose characters are the classes, of rendered characters (default: all)"""


@dataclass(frozen=True)
class Blocks(Net):
    """The network"""

    bn: Literal["template", "task"] = "template"
    """whose scale and bias: the block's, the layer's"""
    route: Literal["linear", "soft", "hard"] = "linear"
    """what weighs blocks in a learned order: coefficients, from each block k times on; softmax; the largest logit"""
    times: Annotated[tuple[int, ...], number(int, 2, many="*")] = (2,)
    """how often each block is called"""


@dataclass(frozen=True)
class Reuse(Experiment):
    experiment = "modular-reuse"
    presets = {
        "": {"layers": 4, "width": 32, "steps": 2000, "batch": 128},
        "glyphs": {"layers": 2, "width": 16, "steps": 400, "batch": 64, "tasks": 4, "images": 50},
        "cifar100": {"layers": 3, "steps": 1600},
    }
    stream: OneTask
    net: Blocks
    training: Training
    place: Place

    def check(self) -> None:
        if self.net.route != "hard":
            line.refuse(self.training, f"with {self.net.route} routes", "relaxation", "phases")


Options = TypeVar("Options", bound=Experiment)


# -- the command line --------------------------------------------------------------------------------------------------
def parse(kind: type[Options], documentation: str | None, arguments: list[str] | None) -> Options:
    """The options, each that the command line leaves open as its data set wants it; ValueError for what can't be."""
    options = line.parse(kind, documentation, arguments)
    options.check()
    data = options.stream.data
    name = data if isinstance(data, str) else "+".join(data)
    if set(name.split("+")) <= RENDERED:
        given = ("data_dir", *["train_split"] * hasattr(options.stream, "train_split"))
        line.refuse(options.stream, f"with {name}, whose images are rendered", *given)
    groups = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    if empty := [line.flag(key) for key in NEEDED if any(getattr(group, key, None) == () for group in groups.values())]:
        raise ValueError(f"{' and '.join(empty)} needs one value at least")
    wanted = {"size": 32, "patch": 4, "name": line.plain(f"{kind.experiment}-{name}"), **kind.presets[""]}
    wanted |= kind.presets.get(name, {})
    options = dataclasses.replace(options, **{key: line.filled(group, wanted) for key, group in groups.items()})
    size, patch, phases = options.stream.size, options.net.patch, options.training.phases
    if size % patch:
        raise ValueError(f"images of {size} pixels can't be cut into patches of {patch}")
    if phases[0] > phases[1]:
        raise ValueError(f"--phases begin one after the other, the first not after the second: not {phases}")
    for key, value in line.flat(options).items():
        if key.split("_")[-1] == "batch":
            learns_apart = key == "adapt_batch" and options.training.runner == "pmap"
            job.divisible(value, line.flag(key), each=2 if learns_apart else 1)
    return options
