"""What all experiments share: a console, an end in a line, a small run where none is given."""

import errno
import itertools
import json
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import options as line
from rich.console import Console
from rich.markup import escape

from compo_jax.memory import keep_memory

if TYPE_CHECKING:
    from compo_jax.data import Task, TaskStream

console = Console()
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE = "No space left on device"  # tensorstore raises a ValueError with it


# -- what options can't know ---------------------------------------------------------------------------------------
def divisible(batch: int, option: str, each: int = 1) -> None:
    """ValueError where the devices can't share a batch, or one gets fewer images than `each`."""
    import jax

    if batch % (devices := jax.device_count()):
        raise ValueError(f"{option} {batch} can't be divided among {devices} devices: choose a multiple of {devices}")
    if batch < each * devices:
        raise ValueError(f"{option} {batch} is less than {each} for each of {devices} devices: choose more")


def enough_images(tasks: Iterable["Task"], wanted: int, option: str) -> None:
    """ValueError where a task has fewer training images than are wanted of each."""
    task = min(tasks, key=lambda task: len(task.train))
    if wanted > (count := len(task.train)):
        raise ValueError(f"{option} {wanted} is more than the {count} training images of {task.name!r}: name fewer")


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


def put_aside(folder: Path, options: Any) -> None:
    """Makes room in the folder for the results of these options: those of a command with others go to a folder of
    their own, `earlier-1` and so on."""
    now, kept = {name: str(value) for name, value in line.flat(options).items()}, folder / "options.json"
    files = [folder / name for name in ("metrics.json", "report.html", kept.name)]
    try:
        same = json.loads(kept.read_text()) == now
    except (FileNotFoundError, ValueError):
        same = False
    if files[0].exists() and not same:
        aside = next(path for n in itertools.count(1) if not (path := folder / f"earlier-{n}").exists())
        aside.mkdir()
        for file in files:
            if file.exists():
                file.replace(aside / file.name)
        console.print(f"results of an earlier command with other options are kept in {aside}", soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(now, indent=1))


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
