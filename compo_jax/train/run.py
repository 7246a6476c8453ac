"""The folder of one run: one job at a time, one configuration, a log."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compo_jax import files, mesh
from compo_jax.train.log import Log

_CONFIG, _LOG, _LOCK, _EVENTS = "config.json", "metrics.jsonl", ".lock", "tensorboard"


class Run(NamedTuple):
    """An open run folder; `resumed` says that an earlier run with the same settings left something in it."""

    folder: Path
    log: Log
    resumed: bool


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all; of several processes, process 0 does.

    OSError where it can't be written; then the file is as it was.
    """
    path, text = files.local_path(path), json.dumps(value, indent=2) + "\n"
    if not mesh.is_writer():
        return
    try:
        with files.replaced(path) as aside:
            aside.write_text(text)
    except OSError as error:
        raise OSError(
            f"{path} can't be written ({error.strerror}) and is as it was: is the disk full or read-only?"
        ) from error


def read_json(path: str | os.PathLike, mend: str = "remove it, and start again") -> Any:
    """The value in a JSON file; ValueError, with what mends it, for one that is damaged."""
    path = files.local_path(path)
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, by a full disk or by hand ({error}): {mend}") from error


@contextlib.contextmanager
def open_run(folder: str | os.PathLike, config: dict[str, Any], *, tensorboard: bool = False) -> Iterator[Run]:
    """Opens (and makes, where needed) the folder of a run with these settings, and holds it until the block ends.

    Writes `config.json` and opens `metrics.jsonl`. A block that fails before anything else was kept leaves no folder,
    and what a start that was killed so early left is taken over whatever its settings were. Of several processes, which
    all open it, process 0 writes.

    Raises ValueError where the folder holds a run with other settings, a damaged one or something else, or is in use,
    and OSError where it can't be written.
    """
    folder = files.local_path(folder)
    config = json.loads(json.dumps(config))
    with contextlib.ExitStack() as stack:
        refused, resumed = None, False
        if mesh.is_writer():
            try:
                resumed = stack.enter_context(_held(folder, config))
            except (OSError, ValueError) as error:
                refused = error
        fails, resumed = (bool(value) for value in mesh.agreed((refused is not None, resumed)))
        if fails:
            raise refused or ValueError(f"process 0 can't open the run folder {folder}: see what it says")
        if not mesh.is_writer():
            _compare(folder, config)
        log = Log(folder / _LOG, folder / _EVENTS if tensorboard else None)
        try:
            yield Run(folder, log, resumed)
        finally:
            log.close()
        mesh.barrier("the run's end")  # a process that ends early takes those with it that are still busy


@contextlib.contextmanager
def _held(folder: Path, config: dict[str, Any]) -> Iterator[bool]:
    """Holds the folder, with these settings in it, until the block ends; whether a run had left something there."""
    if not (folder / _CONFIG).exists():
        files.writable_path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if not made and not (folder / _CONFIG).exists() and not _unused(folder):
            raise ValueError(
                f"{folder} has no {_CONFIG}, and so is no run's, but there is something in it: choose another name "
                "with --name, or another place with --runs"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = files.lock(folder / _LOCK, wait=False)
    except BlockingIOError:
        raise ValueError(
            f"another process is writing {folder}: wait for it, or choose another name with --name"
        ) from None
    except OSError as error:
        _remove(made)
        raise OSError(
            f"the run folder {folder} can't be written ({error.strerror}): is the disk full or read-only? "
            "Choose another place with --runs"
        ) from error
    try:
        resumed = not _unused(folder)
        if resumed:
            _compare(folder, config)
        else:
            (folder / _LOG).touch()
            write_json(folder / _CONFIG, config)
        yield resumed
    except BaseException:
        with contextlib.suppress(OSError):
            if _unused(folder):
                shutil.rmtree(folder / _EVENTS, ignore_errors=True)
                for name in (_CONFIG, _LOG, _LOCK):
                    (folder / name).unlink(missing_ok=True)
        _remove(made)
        raise
    finally:
        files.unlock(lock)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _unused(folder: Path) -> bool:
    """Whether there is nothing in the folder but what a start writes before anything is kept."""
    names = {name for name in os.listdir(folder) if not name.startswith(f".{_CONFIG}.")}
    if _LOG in names and (folder / _LOG).stat().st_size:
        return False
    return names <= {_LOG, _LOCK} or ({_LOG, _CONFIG} <= names <= {_LOG, _CONFIG, _LOCK, _EVENTS})


def differences(there: Mapping[str, Any], now: Mapping[str, Any], shown: Callable[[Any], str] = repr) -> str:
    """The settings that aren't the same, as text; empty where all are."""
    changed = sorted(name for name in {**there, **now} if there.get(name) != now.get(name))
    return "; ".join(f"{name}: {shown(there.get(name))} there, {shown(now.get(name))} now" for name in changed)


def _compare(folder: Path, config: dict[str, Any]) -> None:
    old = read_json(folder / _CONFIG, "choose another name with --name, or remove the folder to start over")
    if not isinstance(old, dict):
        raise ValueError(f"{folder / _CONFIG} holds no settings of a run: choose another name with --name")
    if told := differences(old, config):
        raise ValueError(
            f"{folder} holds a run with other settings ({told}): choose another name with --name, or remove the folder "
            "to start over"
        )


def once(run: Run, name: str, make: Callable[[], Any]) -> Any:
    """What `make()` gives, a JSON value: made and kept in the run's folder the first time, read from there later.

    A run that is started again goes on behind the last part that it finished. ValueError for a part that is damaged.
    """
    path = run.folder / "parts" / f"{name}.json"
    if not mesh.agreed(path.exists()):
        made = make()
        if mesh.is_writer():
            path.parent.mkdir(exist_ok=True)
        write_json(path, made)
        mesh.barrier(f"part {name}")
    return read_json(path, "remove it, and the same command makes this part again")
