"""Paths that are no files of this machine, `~` wherever a path is taken, locks that end with their process, and files
and folders that are replaced whole."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from compo_jax import adapters, data, files, models
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints, Log, read_json, write_json

ADDRESSES = ["gs://bucket/x", "s3://bucket", "file:///tmp/x", "hdfs:/x", "gs:/bucket", Path("gs://bucket/x")]
TAKERS = {
    "pool": ModulePool,
    "checkpoints": Checkpoints,
    "load": models.load,
    "read_json": read_json,
    "load_peft": lambda path: adapters.load_peft(path, {"w": np.ones((2, 2))}),
    "data": lambda path: data.open_stream("mnist", 8, data_dir=path, tasks=2),
}


@pytest.mark.parametrize("address", ADDRESSES, ids=str)
def test_addresses_are_refused_and_no_folder_is_made(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    for take in (files.local_path, ModulePool, Checkpoints):
        with pytest.raises(ValueError, match="is an address and no path on this machine: .*Mount it"):
            take(address)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("taker", TAKERS)
def test_home_is_expanded_and_addresses_refused_by_all_that_take_a_path(tmp_path, monkeypatch, taker):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is an address"):
        TAKERS[taker]("gs://bucket/x")
    if taker in ("pool", "checkpoints"):
        assert TAKERS[taker]("~/none").path == tmp_path / "none"
    else:
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none"):
            TAKERS[taker]("~/none")
    assert os.listdir(tmp_path) == []


def test_what_is_written_lies_under_home_and_at_no_address(tmp_path, monkeypatch):
    events = []
    writer = types.SimpleNamespace(add_scalar=lambda *scalar: None, close=lambda: None)
    fake = types.SimpleNamespace(SummaryWriter=lambda folder, flush_secs: events.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for write in (Log, lambda path: Log("log.jsonl", tensorboard=path), lambda path: write_json(path, 1)):
        with pytest.raises(ValueError, match="is an address"):
            write("gs://bucket/x")
    assert os.listdir(tmp_path) == []
    (tmp_path / "home").mkdir()
    write_json("~/x.json", [1])
    log = Log("~/x.jsonl", tensorboard="~/events")
    log.write(step=1, loss=2.0)
    log.close()
    assert read_json("~/x.json") == [1]
    assert sorted(os.listdir(tmp_path / "home")) == ["x.json", "x.jsonl"]
    assert events == [str(tmp_path / "home" / "events")]
    assert os.listdir(tmp_path) == ["home"]


def test_paths_that_are_fine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("a/b:c/d", "a:", "C:/x", "/gs:/x", "x//y", "."):
        assert files.local_path(path) == Path(path)
    assert files.local_path("~/x") == tmp_path / "x"
    with pytest.raises(ValueError, match="the home folder in ~nobody-here/x is not known: write the path in full"):
        files.local_path("~nobody-here/x")


HOLDER = """
import os, sys, time, pathlib
from compo_jax import files
held = files.lock(pathlib.Path(sys.argv[1]))
if sys.argv[2] == "fork" and os.fork() == 0:
    files.unlock(held)  # nothing of a child's
    os.write(1, b"child\\n")  # at once: print may write in pieces, which mix
    time.sleep(60)
    os._exit(0)
os.write(1, b"held\\n")
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_lock_ends_with_its_process_and_no_forked_child_holds_it(tmp_path, how):
    file = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(file), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said = [process.stdout.readline() for _ in range(2 if how == "fork" else 1)]
        assert any(line.startswith("held") for line in said)
        with pytest.raises(BlockingIOError, match="another process holds"):
            files.lock(file, wait=False)
        process.kill()  # the child lives on
        process.wait()
        files.unlock(files.lock(file, wait=False))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_lock_is_of_the_file_that_is_there(tmp_path):
    """Removed and made anew while another waits: it gets the new one."""
    folder = tmp_path / "a"
    folder.mkdir()
    first = files.lock(folder / "lock")
    waiting = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder / "lock"), "alone"], stdout=subprocess.PIPE)
    try:
        time.sleep(0.1)
        os.rename(folder, tmp_path / "gone")
        folder.mkdir()
        files.unlock(first)
        assert waiting.stdout.readline().startswith(b"held")
        with pytest.raises(BlockingIOError):
            files.lock(folder / "lock", wait=False)
        files.unlock(files.lock(tmp_path / "gone" / "lock", wait=False))
    finally:
        waiting.kill()
        waiting.wait()
        waiting.stdout.close()
    with pytest.raises(FileNotFoundError):
        files.lock(tmp_path / "none" / "lock")
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError):
        files.lock(folder / "other", create=False)
    (folder / "link").symlink_to(folder / "lock")
    with pytest.raises(OSError, match="symbolic link"):
        files.lock(folder / "link")


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch):
    def none(descriptor, **options):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files.filelock, "lock_descriptor", none)
    with pytest.raises(OSError, match=r"the file system of .*lock has no locks \(Function not implemented\)"):
        files.lock(tmp_path / "lock")
    assert not files._held


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path):
    target = tmp_path / "out"

    def write(text):
        with files.replaced(target) as aside:
            aside.mkdir()
            (aside / "part").write_text(text)
            if text == "half":
                raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write("half")
    assert not list(tmp_path.iterdir())
    write("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (target / "part").read_text() == "whole"
