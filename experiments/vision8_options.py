"""The command line of vision8.py."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import options as line
from incremental_options import Backbone
from merge_rules import BY_STEPS, RULES
from options import OPEN, Count, Counts, LocalPath, Name, Names, OpenPath, Rate, Rates, Seeds, Weight, names

EIGHT = ("mnist", "gtsrb32", "eurosat64", "resisc64", "dtd64", "cars64", "scenes64", "letters64")
LINEAR = ("linear", "tak")  # full deltas of the linearised model, without TAK's penalty and with it
HELD = ("tak", "delta")  # by the penalty; delta's are of the network itself, and learn from linear ones
ADDED = (*LINEAR, "delta")  # made to be added
MERGED = ("lora", "full")  # by every rule
KINDS = (*MERGED, *ADDED)
COMPARED = tuple(rule for rule in RULES if rule != "slerp")
QUICK = tuple(rule for rule in COMPARED if rule not in BY_STEPS)


@dataclass(frozen=True)
class Stream:
    """What is learned"""

    data: Names = ()
    """TFDS sets, a task each, or glyphs (default: eight small sets with --data-dir, else glyphs)"""
    data_dir: OpenPath = None
    """where TFDS has prepared the sets"""
    images: Count = 3000
    """training images of a task at most, drawn by the seed"""
    test_images: Count = 1000
    """test images of a task at most, drawn once"""


@dataclass(frozen=True)
class Texts:
    """What tells its classes apart"""

    zero_shot: OpenPath = None
    """CLIP, in a folder, a file or as hf:OWNER/NAME, whose texts make the heads; the base if --backbone names none"""
    token_ids: OpenPath = None
    """folder of the tasks' token ids, TASK.npz or TASK.json (default: made by the tokenizer.json beside that CLIP)"""


@dataclass(frozen=True)
class Training:
    """How it is learned"""

    kinds: Annotated[tuple[str, ...], names(KINDS)] = ("lora",)
    """of modules"""
    steps: Count = 100
    """of a module's training; the joint one gets as many for each task"""
    batch: Count = 32
    """images in a step"""
    rank: Count = 8
    """of LoRA modules"""
    learning_rate: Rate = 3e-3
    """of LoRA modules, at its highest"""
    full_learning_rate: Rate = 3e-4
    """of full deltas, at its highest, and of DELTA's linear teachers"""
    linear_learning_rate: Rate = 3e-4
    """of deltas of the linearised model, at its highest"""
    strengths: Rates = (500.0,)
    """of the penalty of tak and delta; of several, the best on training images left out"""
    distillation: Weight = 1.0
    """of what draws DELTA's modules to their linear teachers"""
    factor_images: Count = 256
    """training images of a task at most, for the factors that it shares (tak and delta)"""


@dataclass(frozen=True)
class Merging:
    """How it is merged"""

    rules: Annotated[tuple[str, ...], names(COMPARED)] = QUICK
    """rules to compare (default: those that go by no steps)"""
    curvature_images: Count = 64
    """training images of a task for its module's curvature"""
    together: Annotated[Counts, OPEN] = ()
    """also merge so many tasks at once, the first ones, the next and so on, on pages of their own, tasks-... (default:
    none)"""


@dataclass(frozen=True)
class Place:
    """The run"""

    seeds: Seeds = (0,)
    """of the images, the modules and the batches"""
    name: Name = None
    """folder of the run (default: vision8-DATA)"""
    runs: LocalPath = Path("runs")
    """folder of the runs"""


@dataclass(frozen=True)
class Options:
    stream: Stream
    backbone: Backbone
    texts: Texts
    training: Training
    merging: Merging
    place: Place


def parse(arguments: Sequence[str] | None = None, documentation: str | None = None) -> Options:
    """The options, each that the command line leaves open as its data want it; ValueError for what can't be."""
    options = line.parse(Options, documentation, arguments)
    data = options.stream.data or (("glyphs",) if options.stream.data_dir is None else EIGHT)
    if not options.training.kinds or not options.merging.rules or not options.place.seeds:
        raise ValueError("--kinds, --rules and --seeds need one value at least")
    for kinds, *fields in (
        (("lora",), "rank", "learning_rate"),
        (("full", "delta"), "full_learning_rate"),
        (LINEAR, "linear_learning_rate"),
        (HELD, "strengths", "factor_images"),
        (("delta",), "distillation"),
    ):
        if not set(options.training.kinds) & set(kinds):
            line.refuse(options.training, f"without {' or '.join(kinds)} among --kinds", *fields)
    if not set(options.training.kinds) & set(MERGED):
        line.refuse(options.merging, f"without {' or '.join(MERGED)} among --kinds", "rules", "together")
    if not options.training.strengths:
        raise ValueError("--strengths needs one value at least")
    if options.texts.zero_shot is None:
        line.refuse(options.texts, "without --zero-shot", "token_ids")
    if data == ("glyphs",):
        line.refuse(options.stream, "with glyphs, which are rendered", "data_dir")
    name = options.place.name or line.plain("vision8-" + ("sets" if data == EIGHT else "+".join(data)))
    return dataclasses.replace(
        options,
        stream=dataclasses.replace(options.stream, data=data),
        place=dataclasses.replace(options.place, name=name),
    )
