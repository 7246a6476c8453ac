"""A run's folder: whose it is, what a failed start leaves, what is damaged; its log."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from compo_jax.train import Log, once, open_run, read_json, write_json


def test_the_log_goes_on_from_its_position(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write(step=1)
    position = log.position
    log.write(step=2, note="dropped")
    log.write(step=3)
    again = Log(tmp_path / "log.jsonl")
    assert again.position == (tmp_path / "log.jsonl").stat().st_size
    assert [r["step"] for r in again.records()] == [1, 2, 3]
    again.position = position
    assert again.records() == [{"step": 1}]
    again.write(step=9)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 9}\n'
    (tmp_path / "log.jsonl").write_text("")  # removed by hand: no hole of zeros
    again.write(step=10)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 10}\n'


def test_a_folder_belongs_to_one_process_and_one_configuration(tmp_path):
    settings = {"rate": 0.1, "tasks": (1, 2), "name": "x"}
    with open_run(tmp_path / "a" / "b", settings) as run:
        assert not run.resumed
        assert json.loads((run.folder / "config.json").read_text()) == {"rate": 0.1, "tasks": [1, 2], "name": "x"}
        with pytest.raises(ValueError, match=r"another process is writing .*b: wait for it"):
            open_run(run.folder, settings).__enter__()
        run.log.write(step=1)
    with open_run(tmp_path / "a" / "b", settings) as run:
        assert run.resumed
        assert run.log.records() == [{"step": 1}]
    changed = {"rate": 0.2, "tasks": [1, 2], "new": True}
    told = "name: 'x' there, None now; new: None there, True now; rate: 0.1 there, 0.2 now"
    with pytest.raises(ValueError, match=rf"other settings \({told}\): choose another name"):
        open_run(tmp_path / "a" / "b", changed).__enter__()
    assert not list((tmp_path / "a" / "b").glob(".config*"))


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)  # rights alone don't stop root
    with pytest.raises(OSError, match=r"can't be written \(Read-only file system\).*Choose another place"):
        open_run(tmp_path / "runs", {}).__enter__()


@pytest.mark.parametrize("error", [ValueError("no such data"), KeyboardInterrupt(), SystemExit(2)])
def test_a_start_that_fails_leaves_nothing_and_the_corrected_one_works(tmp_path, error):
    folder = tmp_path / "runs" / "a"
    with pytest.raises(type(error)), open_run(folder, {"data": "wrong"}, tensorboard=tensorboard()):
        raise error
    assert list(tmp_path.iterdir()) == []
    with open_run(folder, {"data": "right"}) as run:
        run.log.write(step=1)
    with pytest.raises(type(error)), open_run(folder, {"data": "right"}):
        raise error
    assert Log(folder / "metrics.jsonl").records() == [{"step": 1}]


def tensorboard():
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        return False
    return True


def test_what_a_killed_start_left_is_taken_over(tmp_path):
    """Only empty files of ours: the settings may have been wrong."""
    with open_run(tmp_path / "killed", {"data": "wrong"}) as run:
        shutil.copytree(run.folder, tmp_path / "a")
    with open_run(tmp_path / "a", {"data": "right"}) as run:
        assert not run.resumed
        write_json(run.folder / "kept.json", 1)
    with pytest.raises(ValueError, match="data: 'right' there, 'other' now"):
        open_run(tmp_path / "a", {"data": "other"}).__enter__()


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "tensorboard/events"])
def test_a_folder_of_something_else_is_not_taken_over(tmp_path, name):
    path = tmp_path / "a" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"hidden_size": 768}')
    for _ in range(2):
        with pytest.raises(ValueError, match="is no run's|other settings"):
            open_run(tmp_path / "a", {"rate": 0.1}).__enter__()
    assert path.read_text() == '{"hidden_size": 768}'


def test_what_is_damaged_in_a_run_is_named(tmp_path):
    with open_run(tmp_path, {"rate": 0.1}) as run:
        for step in range(3):
            run.log.write(step=step)
        assert once(run, "first", lambda: {"made": 1}) == {"made": 1}
        (tmp_path / "parts" / "first.json").write_text('{"made"')
        with pytest.raises(ValueError, match=r"parts/first\.json is damaged.*makes this part again"):
            once(run, "first", lambda: {"made": 2})
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n{"st\n{"step": 2}\n')
        with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is damaged"):
            Log(tmp_path / "metrics.jsonl").records()
    (tmp_path / "config.json").write_text('{"steps"')
    with pytest.raises(ValueError, match=r"config\.json is damaged.*or remove the folder"):
        open_run(tmp_path, {"rate": 0.1}).__enter__()
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json holds no settings"):
        open_run(tmp_path, {"rate": 0.1}).__enter__()


def test_half_a_line_that_a_kill_left_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    log = Log(path)
    assert log.records() == [{"step": 1}]
    log.write(step=2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b'{"step": 1}\n{"st')  # cut within what a checkpoint had counted
    log.write(step=3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("where", ["write_text", "replace"])
def test_on_a_full_disk_files_stay_whole(tmp_path, monkeypatch, where):
    with open_run(tmp_path / "a", {"rate": 0.1}) as run:
        run.log.write(step=1)
        once(run, "first", lambda: 1)
        write_json(run.folder / "metrics.json", {"old": 1})
        before = sorted(run.folder.rglob("*"))

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(*((Path, "write_text") if where == "write_text" else (os, "replace")), full)
            with pytest.raises(OSError, match=r"metrics\.json can't be written \(No space left on device\).*as it was"):
                write_json(run.folder / "metrics.json", {"new": 2})
            with pytest.raises(OSError, match=r"second\.json can't be written"):
                once(run, "second", lambda: 2)
            patch.setattr(Path, "open", full)
            with pytest.raises(
                OSError, match=r"the log .*metrics\.jsonl can't be written .*was written before is kept"
            ):
                run.log.write(step=2)
        assert sorted(run.folder.rglob("*")) == before
        assert read_json(run.folder / "metrics.json") == {"old": 1}
        run.log.write(step=2)
        assert [r["step"] for r in run.log.records()] == [1, 2]
        with pytest.raises(TypeError):  # refused before the file is touched
            run.log.write(step=np.float32(3))
        assert [r["step"] for r in run.log.records()] == [1, 2]


def test_tensorboard_events_hold_the_numbers_of_the_log(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with open_run(tmp_path, {}, tensorboard=True) as run:
        run.log.write(run="ita", task=2, step=7, loss=0.25, note="text")
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, values = path.read_bytes(), []
    while data:  # records: length (8 bytes), its checksum (4), an event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        values += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    assert values == [("ita/2/loss", 7, 0.25)]


def test_tensorboard_that_is_not_installed_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="TensorBoard events need tensorboardX: pip install tensorboardX"):
        open_run(tmp_path, {}, tensorboard=True).__enter__()
