"""What all experiments share: options with ranges, a console, an end in a line, a small run where none is given."""

import argparse
import errno
import logging
import math
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import options as line
from rich.console import Console
from rich.markup import escape

from compo_jax.files import local_path
from compo_jax.memory import keep_memory

if TYPE_CHECKING:
    from compo_jax.data import TaskStream

console = Console()
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE = "No space left on device"  # tensorstore raises a ValueError with it
_LARGEST = 2**31 - 1


# -- options ---------------------------------------------------------------------------------------------------------
class number:
    """The type of an option: a finite number in a range, which the help and the error tell.

    Args:
      kind: int or float.
      least, most: ends that belong to the range.
      above, below: ends that don't.
    """

    def __init__(self, kind: type, least=None, most=None, *, above=None, below=None):
        self.kind = kind
        self.ends = {"from": least, "above": above, "to": most, "below": below}

    def __str__(self) -> str:
        known = {word: end for word, end in self.ends.items() if end is not None}
        ends = f"{known['from']} or more" if list(known) == ["from"] else " ".join(f"{w} {e}" for w, e in known.items())
        return f"a {'whole ' * (self.kind is int)}number, {ends}"

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        least, above, most, below = self.ends.values()
        outside = (
            not math.isfinite(value),
            least is not None and value < least,
            above is not None and value <= above,
            most is not None and value > most,
            below is not None and value >= below,
        )
        if any(outside):
            raise argparse.ArgumentTypeError(f"{text!r} is not {self}")
        if self.kind is int and value > _LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is more than {_LARGEST}, the largest that a device counts to")
        return value


count = number(int, 1)
rate = number(float, above=0)
weight = number(float, 0)
seed = number(int, 0)


def name(text: str) -> str:
    """The type of an option: the name of one folder."""
    if not re.fullmatch(r"[^/\\\0]{1,200}", text) or text.strip(". ") == "":
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder: leave out slashes; --runs says where")
    return text


def path(text: str) -> Path:
    """The type of an option: a path, with ~ for the home."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    try:
        return local_path(text)
    except ValueError as error:  # whose text argparse would drop
        raise argparse.ArgumentTypeError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """Options whose help shows their ranges. What is wrong with a command line is a ValueError of one line.

    Attributes:
      given: the options that the last command line names, by their keys.
    """

    def __init__(self, documentation: str | None):
        super().__init__(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.given: set[str] = set()
        self._lists: set[str] = set()

    def add_argument(self, *names, **options):
        if isinstance(options.get("type"), number):
            options["help"] = "; ".join(filter(None, (options.get("help"), str(options["type"]))))
        action = super().add_argument(*names, **options)
        if options.get("nargs") in ("+", "*"):
            self._lists.add(action.dest)
        return action

    def error(self, message: str):
        raise ValueError(message.removeprefix("argument "))

    def parse_args(self, args=None, namespace=None):
        options = super().parse_args(args, namespace)
        named = super().parse_args(args, argparse.Namespace(**dict.fromkeys(vars(options))))
        self.given = {key for key, value in vars(named).items() if value is not None}
        for key in sorted(self.given & self._lists):
            values = getattr(options, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{_flag(key)} has one of its values twice: {' '.join(map(str, values))}")
        return options

    def refuse(self, when: str, *keys: str) -> None:
        """ValueError where the command line names one of these options, which play no part `when`."""
        if there := [_flag(key) for key in keys if key in self.given]:
            plural = len(there) > 1
            raise ValueError(
                f"{' and '.join(there)} {'play' if plural else 'plays'} no part {when}: leave "
                f"{'them' if plural else 'it'} out"
            )


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def plain(text: str) -> str:
    """A run's default name as that of one folder: a set's name may have a slash."""
    return re.sub(r"[^\w.+:-]+", "-", text)


def divisible(batch: int, option: str) -> None:
    """ValueError where the devices can't share a batch."""
    import jax

    if batch % (devices := jax.device_count()):
        raise ValueError(f"{option} {batch} can't be divided among {devices} devices: choose a multiple of {devices}")


def tell_images(stream: "TaskStream", images: int | None) -> None:
    """Prints where classes have fewer training images than were asked for."""
    import numpy as np

    fewer = {}
    for task in stream.tasks:
        counts = np.bincount(task.train.labels, minlength=len(task.classes))
        fewer |= {(task.name, name): count for name, count in zip(task.classes, counts, strict=True)}
    short = [count for count in fewer.values() if images is not None and count < images]
    if short:
        console.print(
            f"{len(short)} of {len(fewer)} classes have fewer than --images {images} training images ({min(short)} at "
            "least): all of theirs are used"
        )


# -- the end ---------------------------------------------------------------------------------------------------------
def closing(main: Callable[[], object], again: str = "the same command goes on where it was") -> None:
    """Runs `main`; what the user can mend is told in a line, and so is a stop by Ctrl-C, with how to go on."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs an error in every thread, and raises it
    keep_memory()
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _end("[bold]stopped:[/]", again, 130)
    except Exception as error:
        told = _told(error)
        if told is None:
            traceback.print_exc()
            sys.exit(1)
        _end("[bold red]error:[/]", told, 2)


def _end(kind: str, told: str, code: int) -> None:
    console.print(f"{kind} {escape(' '.join(told.split()))}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _told(error: Exception) -> str | None:
    """What is wrong in a sentence, None where only a traceback can tell it."""
    chain, text = [error], str(error)
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if full := next((e for e in chain if getattr(e, "errno", None) in _FULL or _NO_SPACE in str(e)), None):
        return f"the disk is full ({_cause(full)}): make room, then the same command goes on where it was"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"memory ran out ({_cause(error)}): lower the batch or the images"
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str) and " " in error.args[0]:
        return error.args[0]
    return text if text and isinstance(error, ValueError | FloatingPointError | OSError) else None


def _cause(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def finished_runs(options: line.OnRuns, small: str, tried: Sequence[str]) -> list[Path]:
    """The runs of incremental.py that `--run` names; without it a small one called `small`, with pools of the methods
    `tried`: made, a minute or two each, where it isn't finished."""
    if options.run:
        line.refuse(options, "with --run, for a small run would be made there", "runs")
        return list(options.run)
    line.refuse(options, "without --run, for the small run's characters are rendered", "data_dir")
    if unknown := [name for name in options.methods if name not in tried]:
        raise ValueError(f"the small run has no pool of {', '.join(unknown)}; it has {', '.join(tried)}")
    from incremental import main  # the script beside this one

    size = ["--tasks", "5", "--classes", "6", "--images", "50", "--epochs", "4"]
    main([*size, "--methods", *tried, "--runs", str(options.runs), "--name", small])
    return [options.runs / small]
