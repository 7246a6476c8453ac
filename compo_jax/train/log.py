"""Metrics as JSON lines, and as TensorBoard events where asked for."""

import json
import os
from typing import Any

from compo_jax import files, mesh


def _whole(data: bytes) -> int:
    """Length of the lines in `data` that are whole."""
    return data.rfind(b"\n") + 1


class Log:
    """A file of JSON lines that a resumed run goes on with as if it had never stopped.

    `position` is where the next line goes: a checkpoint keeps it, a resumed run sets it back, and the next `write`
    drops what an interrupted run had written past it, half a line too. Of several processes only process 0 writes.
    """

    def __init__(self, path: str | os.PathLike, tensorboard: str | os.PathLike | None = None):
        self.path = files.local_path(path)
        events = None if tensorboard is None else files.local_path(tensorboard)
        self._writes = mesh.is_writer()
        self._writer = None
        if self._writes:
            self.path.touch()
        self.position = _whole(self.path.read_bytes()) if self.path.exists() else 0
        if events is not None and self._writes:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ValueError("TensorBoard events need tensorboardX: pip install tensorboardX") from error
            self._writer = SummaryWriter(os.fspath(events), flush_secs=10)

    def write(self, **record: Any) -> None:
        """Adds one line; numbers also go to TensorBoard, at the record's `step`, under its `run` and `task`.

        Raises TypeError for what is not JSON, and OSError where the line can't be written; the others are kept.
        """
        line = json.dumps(record).encode() + b"\n"
        if not self._writes:
            return
        try:
            with self.path.open("r+b") as file:
                at = self.position
                if file.seek(0, os.SEEK_END) < at:  # cut, or removed by hand
                    file.seek(0)
                    at = _whole(file.read())
                file.seek(at)
                file.truncate()
                file.write(line)
        except OSError as error:
            raise OSError(
                f"the log {self.path} can't be written ({error.strerror}): is the disk full or read-only? "
                "What was written before is kept"
            ) from error
        self.position = at + len(line)
        if self._writer is not None and "step" in record:
            prefix = "/".join(str(record[k]) for k in ("run", "task") if k in record)
            for name, value in record.items():
                if name not in ("run", "task", "step") and isinstance(value, int | float):
                    self._writer.add_scalar(f"{prefix}/{name}", value, record["step"])

    def records(self) -> list[dict[str, Any]]:
        """All lines up to `position`; ValueError for one that is damaged."""
        found = []
        for number, line in enumerate(self.path.read_bytes()[: self.position].splitlines(), 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"line {number} of {self.path} is damaged, by a full disk or by hand ({error}): remove the line, "
                    "or the run's folder to start over"
                ) from error
        return found

    def close(self) -> None:
        """Waits until TensorBoard's events are on disk; they are written by a thread."""
        if self._writer is not None:
            self._writer.close()
