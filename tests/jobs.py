"""Experiments as their users start them: a command line, a run folder, lines of a log."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The runs here are many and small, and compile the same programs.
ENVIRONMENT = {
    **os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "1000",
    "JAX_COMPILATION_CACHE_DIR": os.environ["COMPO_JAX_TESTS_CACHE"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}  # fmt: skip


def command(*arguments, script="incremental.py"):
    return [sys.executable, str(ROOT / "experiments" / script), *map(str, arguments)]


def run(*arguments, script="incremental.py"):
    line = command(*arguments, script=script)
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300)


def main(*arguments, script="incremental.py"):
    """In this process: quicker, and errors are raised, a wrong command line's as a ValueError with what is printed."""
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        with wrong_line_as_value_error():
            importlib.import_module(script.removesuffix(".py")).main([str(argument) for argument in arguments])
    finally:
        sys.path.pop(0)


@contextlib.contextmanager
def wrong_line_as_value_error():
    """What tyro prints of a wrong command line before it exits with 2, as a ValueError in one line."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            yield
        except SystemExit as end:
            if end.code != 2:
                raise
            raise ValueError(" ".join(printed.getvalue().replace("│", " ").split())) from end


def killed(sign, *arguments, script="incremental.py"):
    """Starts the experiment and kills it as soon as the file `sign` is there; whether that was before its end."""
    line = command(*arguments, script=script)
    process = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not sign.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    before = sign.exists() and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return before


def comparable(folder):
    """The log without what time alone decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
