"""The folder of one run: one process at a time, one configuration, a log."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from compo_jax.train.log import Log


class Run(NamedTuple):
    """An open run folder; `resumed` says that an earlier run with the same settings left something in it."""

    folder: Path
    log: Log
    resumed: bool


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)


@contextlib.contextmanager
def open_run(folder: str | os.PathLike, config: dict[str, Any], *, tensorboard: bool = False) -> Iterator[Run]:
    """Opens (and makes, where needed) the folder of a run with these settings, and holds it until the block ends.

    Writes `config.json` and opens `metrics.jsonl`. Raises ValueError where the folder holds a run with other settings
    or is in use, and OSError where it can't be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise OSError(
            f"the run folder {folder} can't be written ({error.strerror}): is the disk full or read-only? "
            "Choose another place with --runs"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is writing {folder}: wait for it, or choose another name with --name"
            ) from None
        path = folder / "config.json"
        config = json.loads(json.dumps(config))
        resumed = path.exists()
        if resumed:
            old = json.loads(path.read_text())
            if changed := [k for k in {**old, **config} if old.get(k) != config.get(k)]:
                told = "; ".join(f"{k}: {old.get(k)!r} there, {config.get(k)!r} now" for k in sorted(changed))
                raise ValueError(
                    f"{folder} holds a run with other settings ({told}): choose another name with --name, or remove "
                    "the folder to start over"
                )
        else:
            write_json(path, config)
        events = folder / "tensorboard" if tensorboard else None
        log = Log(folder / "metrics.jsonl", events)
        try:
            yield Run(folder, log, resumed)
        finally:
            log.close()


def once(run: Run, name: str, make: Callable[[], Any]) -> Any:
    """What `make()` gives, a JSON value: made and kept in the run's folder the first time, read from there later.

    A run that is started again goes on behind the last part that it finished.
    """
    path = run.folder / "parts" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text())
