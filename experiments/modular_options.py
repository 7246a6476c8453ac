"""The options that the experiments on modular networks share."""

import argparse
import sys
from pathlib import Path

import job

PHASES = "parts of the steps after which routes begin to harden, and are fixed"


def modular_parser(documentation: str | None) -> job.Parser:
    """Options of all experiments on modular networks; those without a default have one for each data set."""
    parser = job.Parser(documentation)
    add = parser.add_argument
    add("--data-dir", type=job.path, help="where TFDS has prepared the set")
    add("--images", type=job.count, help="training images of a class; default: all of a real set")
    add("--size", type=job.count, help="side of the images, in pixels")
    add("--layers", type=job.count, help="layers of the network")
    add("--width", type=job.count, help="channels")
    add("--patch", type=job.count, default=4, help="side of the stem's patches, in pixels")
    add("--block", choices=["basic", "bottleneck", "inverted"], default="basic")
    add("--route", choices=["soft", "straight_through", "gumbel"], default="soft", help="how routes are learned")
    add("--phases", type=job.number(float, 0, 1), nargs=2, default=(0.1, 0.4), metavar=("A", "B"), help=PHASES)
    add("--steps", type=job.count, help="steps of a training")
    add("--batch", type=job.count, help="images of each task in a step")
    add("--learning-rate", type=job.rate, default=3e-3)
    add("--runner", choices=["jit", "pmap"], default="jit")
    add(
        "--seeds",
        type=job.seed,
        nargs="+",
        default=[0, 1, 2],
        help="a finished run may be given more: name the old ones too",
    )
    add("--name", type=job.name, help="name of the run; default: made from the experiment and the data")
    add("--runs", type=job.path, default=Path("runs"), help="folder of the runs")
    add("--tensorboard", action="store_true")
    return parser


def parsed(parser: job.Parser, arguments: list[str] | None, presets: dict, default: dict) -> argparse.Namespace:
    """The options, each that the command line leaves open as this data set wants it; ValueError for what can't be."""
    options = parser.parse_args(arguments)
    sets = [options.data] if isinstance(options.data, str) else options.data
    name = "+".join(sets)
    if set(sets) <= {"glyphs", "rendered"}:
        parser.refuse(f"with {name}, whose images are rendered", "data_dir")
    for key, value in (default | presets.get(name, {})).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    options.name = options.name or job.plain(f"{Path(sys.argv[0]).stem.replace('_', '-')}-{name}")
    if options.size % options.patch:
        raise ValueError(f"images of {options.size} pixels can't be cut into patches of {options.patch}")
    if options.phases[0] > options.phases[1]:
        raise ValueError(f"--phases begin one after the other, the first not after the second: not {options.phases}")
    for key in ("batch", "new_batch", "adapt_batch"):
        if hasattr(options, key):
            job.divisible(getattr(options, key), f"--{key.replace('_', '-')}")
    return options
