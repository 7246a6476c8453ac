"""The command line of incremental.py."""

import dataclasses
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import options as line
from benchmarks import BENCHMARKS
from options import (
    OPEN,
    Count,
    LocalPath,
    Name,
    OpenCount,
    OpenPath,
    OpenWeight,
    Rate,
    Seed,
    Text,
    Weight,
    number,
    values,
)

FOLDER = "folder:"
FROZEN = ("ncm", "ranpac", "simplecil")  # on the base's features; the last two also WAY-KIND
# The options that each way to learn takes, `parallel` where no task needs what another left. A new way is a row here,
# and a file that registers it.
WAYS = {
    "ita": "alpha units penalty pull parallel",
    "tak": "tak_alpha units penalty pull parallel",
    "pull": "penalty pull parallel",
    "none": "parallel",
    "iel": "beta units penalty pull iel_pull",
    "iel_pull": "penalty pull iel_pull",
    "iel_none": "",
    "sequential": "",
    "ewc": "ewc units penalty",
    "lwf": "lwf",
    "inflora": "",
    "sdlora": "",
    "ease": "parallel",
    "tuna": "",
    "joint": "",
    "tmc": "tmc_learning_rate penalty pull parallel",
    "slca": "",
    "magmax": "",
    "opcm": "",
    **dict.fromkeys(FROZEN, ""),
}
KINDS = {"lora": "rank learning_rate", "ia3": "ia3_learning_rate", "full": "full_learning_rate"}  # and those of modules
ONLY = {"tmc": "full", "inflora": "lora", "sdlora": "lora", "tuna": "lora"}  # ways for modules of one kind
METHODS = (
    *(
        f"{way}-{kind}"
        for kind, way in itertools.product(KINDS, WAYS)
        if way != "ncm" and ONLY.get(way, kind) == kind
    ),
    *FROZEN,
)  # fmt: skip
COMPARED = (
    *(f"{way}-{kind}" for kind in KINDS for way in ("ita", "pull", "none", "iel", "iel_none")),
    "tak-lora", "tak-full", "tmc-full", "sequential-lora", "sequential-full", "ewc-full", "lwf-full", "joint-lora",
    "joint-full", "ncm", "ranpac",
)  # fmt: skip
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh")  # those of `models`, which loads JAX
Coupling = Literal["coupled", "decoupled"] | None
Pull = tuple[float, float]
Part = Annotated[float | None, number(float, above=0, below=1), OPEN]


def _hosts(text: str) -> tuple:
    """What `mesh.start_distributed` takes."""
    place = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", text)
    if text != "auto" and (place is None or int(place[3]) >= int(place[2])):
        raise ValueError(f"{text!r} is not auto or ADDRESS:PORT,N,I with I from 0 to N - 1")
    return () if place is None else (place[1], int(place[2]), int(place[3]))


@dataclass(frozen=True)
class Stream:
    """What is learned"""

    benchmark: Annotated[str | None, line.names(list(BENCHMARKS), None), OPEN] = None
    """of the paper: all that is left open here as it has it"""
    data: str = "glyphs"
    """glyphs, the name of a TFDS image classification set, or folder:PATH"""
    data_dir: OpenPath = None
    """where TFDS has prepared the set, or where PATH begins"""
    tasks: OpenCount = None
    """number of tasks (default: the set's)"""
    by: Text = None
    """label feature that divides the set into tasks (default: Omniglot's alphabets, else equal groups of classes)"""
    class_order: line.OpenSeed = None
    """seed of NumPy's older generator that the classes' order is drawn from, 1993 by habit (default: --seed's)"""
    train_split: Text = None
    """TFDS split or part of a folder to train on; without --test-split a part of it is held out"""
    test_split: Text = None
    """TFDS split or part of a folder to test on"""
    test_fraction: Part = None
    """what part of each class is held out then (default: 0.25)"""
    crop: Annotated[float | None, number(float, above=0, most=1), OPEN] = None
    """central part of a test image's shorter side (default: 0.875 of photographs: resize to 256, crop 224; else 1)"""
    augment: Literal["default", "original"] = "default"
    """crops and flips of the resized images, or of the stored ones while they are read, as the paper does"""
    classes: Annotated[int, number(int, 2)] = 16
    """characters of a script (glyphs)"""
    images: OpenCount = None
    """training images of a class, drawn by the seed (default: 100 glyphs, else all)"""


@dataclass(frozen=True)
class Backbone:
    """What it is learned with"""

    backbone: OpenPath = None
    """checkpoint of a ViT: a file, a folder with config.json, or hf:OWNER/NAME (default: the embedded one)"""
    heads: OpenCount = None
    """attention heads of the checkpoint (default: what it says, or the published architecture has)"""
    image_size: OpenCount = None
    """side of the images (default: the checkpoint's)"""
    activation: Annotated[str | None, line.names(ACTIVATIONS, None), OPEN] = None
    """of the checkpoint's MLPs, gelu for LAION's and DataComp's CLIPs in a file alone (default: what it says)"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype"""
    runner: Literal["jit", "pmap"] = "jit"
    """how a batch is divided among the devices"""


@dataclass(frozen=True)
class Training:
    """How it is learned"""

    methods: Annotated[tuple[str, ...], line.names(METHODS)] = ("ita-lora",)
    """WAY-KIND, or a classifier of frozen features: see README.md beside this file"""
    compare: bool = False
    """the methods that are usually compared"""
    parallel: bool = False
    """train the independent methods' tasks at once"""
    epochs: OpenCount = None
    """passes over a task's images (default: the set's)"""
    batch: OpenCount = None
    """images in a step (default: the set's)"""
    probe_epochs: Count = 3
    """passes of the linear probe over a task's features"""
    rank: Count = 8
    """of LoRA modules"""
    learning_rate: Rate = 3e-3
    """of LoRA modules"""
    ia3_learning_rate: Rate = 1e-2
    """of (IA)³ modules"""
    full_learning_rate: Rate = 1e-3
    """of full deltas"""
    tmc_learning_rate: Rate = 2e-5
    """of the tangent model"""


@dataclass(frozen=True)
class Penalties:
    """What keeps modules from harming one another"""

    alpha: OpenWeight = None
    """weight of ITA's penalty (default, in relative units: 0.1)"""
    tak_alpha: OpenWeight = None
    """weight of ITA's penalty by Kronecker factors, TAK (default, in relative units: 0.004)"""
    beta: OpenWeight = None
    """weight of IEL's penalty (default, in relative units: 0.1)"""
    ewc: OpenWeight = None
    """weight of elastic weight consolidation (default, in relative units: 0.1)"""
    lwf: Weight = 10.0
    """weight of learning without forgetting's distillation"""
    units: Annotated[Literal["relative", "paper"] | None, OPEN] = None
    """of the weights: relative to the curvature's mean, or of the curvature as it is (default: relative; with
    --benchmark, paper for --alpha and --beta)"""
    penalty: Annotated[Coupling, OPEN] = None
    """added to the loss, or a step of its own (default: coupled for full deltas, TAK and EWC)"""
    pull: Annotated[Pull | None, number(float, 0, many=2), OPEN] = None
    """of the heads towards the aligned classifier: λ_F and λ_I (default: 0.1 0.05)"""
    iel_pull: Annotated[Pull | None, number(float, 0, many=2), OPEN] = None
    """of IEL's heads (default: as --pull)"""
    fisher: Literal["exact", "low_rank", "monte_carlo"] = "monte_carlo"
    """how the Fisher is estimated"""
    fisher_images: Annotated[int, number(int, 0)] = 256
    """images of a task for its Fisher; 0 for all"""


@dataclass(frozen=True)
class Place:
    """The run"""

    seed: Seed = 0
    """of the data, the modules and the batches"""
    name: Name = None
    """folder of the run (default: made from the data and the seed)"""
    runs: LocalPath = Path("runs")
    """folder of the runs"""
    tensorboard: bool = False
    """write its logs too"""
    hosts: Annotated[tuple | None, values(_hosts, "auto|ADDRESS:PORT,N,I"), OPEN] = None
    """host 0's address, how many hosts, which of them this is"""


@dataclass(frozen=True)
class Options:
    stream: Stream = Stream()
    backbone: Backbone = Backbone()
    training: Training = Training()
    penalties: Penalties = Penalties()
    place: Place = Place()


RELATIVE = {"alpha": 0.1, "tak_alpha": 0.004, "beta": 0.1, "ewc": 0.1}  # the weights' defaults, in relative units

# What a data set wants where the command line leaves it open; "" is of any.
PRESETS = {
    "": {"tasks": 10, "epochs": 20, "batch": 128},
    "glyphs": {"tasks": 10, "epochs": 8, "batch": 64, "images": 100},
    "omniglot": {"tasks": 10, "epochs": 6, "batch": 64},
    "mnist": {"tasks": 5, "epochs": 1, "batch": 128},
}


def parse(arguments: list[str] | None = None, documentation: str | None = None) -> Options:
    """The options, each that the command line leaves open as the data set wants it; ValueError for what can't be."""
    named = options = line.parse(Options, documentation, arguments)
    if named.stream.benchmark:
        options = line.parse(Options, documentation, arguments, _default(named))
    _refuse(named, options.stream.data)
    methods = COMPARED if options.training.compare else options.training.methods
    methods = tuple(sorted(methods, key=lambda name: name in FROZEN))  # in order, those last
    if set(methods) <= set(FROZEN):
        raise ValueError(f"{', '.join(methods)} train nothing: name a method before them, ita-lora say")
    taken = set().union(*map(_taken, methods))
    others = set().union(*map(_taken, METHODS)) - taken
    for group in (named.training, named.penalties):
        line.refuse(group, f"with {', '.join(methods)}", *sorted(others & vars(group).keys()))
    open_weights = [name for name in RELATIVE if name in taken and getattr(options.penalties, name) is None]
    if options.penalties.units == "paper" and open_weights:
        flags = " and ".join(map(line.flag, open_weights))
        raise ValueError(f"--units paper has no default for {flags}: name {'them' if open_weights[1:] else 'it'} too")
    data, seed = options.stream.data, options.place.seed
    label = "compare" if options.training.compare else "-".join(methods)
    folder = Path(data.removeprefix(FOLDER)).name if data.startswith(FOLDER) else ""
    what = options.stream.benchmark or folder or data
    name = options.place.name or line.plain(f"incremental-{what}-{seed}" + f"-{label}" * (label != "ita-lora"))
    wanted = PRESETS[""] | PRESETS.get(data, {})
    weighed = RELATIVE | {"pull": (0.1, 0.05)} | ({} if options.stream.benchmark else {"units": "relative"})
    return dataclasses.replace(
        options,
        stream=line.filled(options.stream, wanted),
        training=line.filled(dataclasses.replace(options.training, methods=methods), wanted),
        penalties=line.filled(options.penalties, weighed),
        place=dataclasses.replace(options.place, name=name),
    )


def _default(named: Options) -> Options:
    """The benchmark's options, which stand where the command line leaves them open."""
    groups = BENCHMARKS[named.stream.benchmark].wanted()
    if named.penalties.pull is not None:  # which is IEL's too, then
        del groups["penalties"]["iel_pull"]
    if named.penalties.units == "relative":  # which the paper's weights are not
        del groups["penalties"]["alpha"], groups["penalties"]["beta"]
    if named.stream.data not in (Stream.data, groups["stream"]["data"]):  # which may have other parts
        del groups["stream"]["train_split"]
    plain = Options()
    return dataclasses.replace(
        plain, **{key: dataclasses.replace(getattr(plain, key), **values) for key, values in groups.items()}
    )


def at_once(methods: tuple[str, ...]) -> bool:
    """Whether none of these methods' tasks needs what another left."""
    return all("parallel" in _taken(method) for method in methods)


def _taken(method: str) -> set[str]:
    """The options that a method takes."""
    way, _, kind = method.partition("-")
    return {*WAYS[way].split(), *(KINDS.get(kind, "").split() if way != "tmc" else ())}


def _refuse(options: Options, data: str) -> None:
    """ValueError for what the command line names and what plays no part with this data and the rest."""
    if options.training.compare:
        line.refuse(options.training, "with --compare, which names its own", "methods")
    if data == "glyphs":
        rendered = ("data_dir", "by", "class_order", "train_split", "test_split", "test_fraction", "crop", "augment")
        line.refuse(options.stream, "with glyphs, which are rendered", *rendered)
    else:
        line.refuse(options.stream, f"with {data}, for they are of a script of glyphs", "classes")
    if data.startswith(FOLDER):
        line.refuse(options.stream, "with folders, which are divided by class order", "by")
    elif options.stream.by is not None:
        line.refuse(options.stream, "with --by, whose values are the tasks", "class_order")
    if options.backbone.backbone is None:
        of_file = ("heads", "image_size", "activation")
        line.refuse(options.backbone, "without --backbone, for the embedded one has its own", *of_file)
    if options.training.parallel and options.backbone.runner == "pmap":
        raise ValueError("--parallel divides the tasks among the devices and pmap the batch: name one of the two")
