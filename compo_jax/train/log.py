"""Metrics as JSON lines, and as TensorBoard events where asked for."""

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """A file of JSON lines that a resumed run goes on with as if it had never stopped.

    `position` is where the next line goes: a checkpoint keeps it, a resumed run sets it back, and the next `write`
    drops what an interrupted run had written past it.
    """

    def __init__(self, path: str | os.PathLike, tensorboard: str | os.PathLike | None = None):
        self.path = Path(path)
        self.path.touch()
        self.position = self.path.stat().st_size
        self._writer = None
        if tensorboard is not None:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ValueError("TensorBoard events need tensorboardX: pip install tensorboardX") from error
            self._writer = SummaryWriter(os.fspath(tensorboard), flush_secs=10)

    def write(self, **record: Any) -> None:
        """Adds one line; numbers also go to TensorBoard, at the record's `step`, under its `run` and `task`."""
        with self.path.open("r+b") as file:
            file.seek(min(self.position, file.seek(0, os.SEEK_END)))  # the end, where the file was cut or removed
            file.truncate()
            file.write(json.dumps(record).encode() + b"\n")
            self.position = file.tell()
        if self._writer is not None and "step" in record:
            prefix = "/".join(str(record[k]) for k in ("run", "task") if k in record)
            for name, value in record.items():
                if name not in ("run", "task", "step") and isinstance(value, int | float):
                    self._writer.add_scalar(f"{prefix}/{name}", value, record["step"])

    def records(self) -> list[dict[str, Any]]:
        """All lines up to `position`."""
        return [json.loads(line) for line in self.path.read_bytes()[: self.position].splitlines()]

    def close(self) -> None:
        """Waits until TensorBoard's events are on disk; they are written by a thread."""
        if self._writer is not None:
            self._writer.close()
