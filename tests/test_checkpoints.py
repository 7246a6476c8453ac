"""Checkpoints: the older one is used where the newest is damaged, and a disk that is full leaves both as they were."""

import contextlib
import os
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from compo_jax import mesh
from compo_jax.train import Checkpoints


def tree(number, dtype=np.float32):
    draw = np.random.default_rng(number)
    return {"w": draw.normal(size=(40, 50)).astype(dtype), "n": np.array(number), "hole": None, "l": [jnp.ones(number)]}


LIKE = tree(3) | {"l": [jnp.zeros(3)]}


def state(number):
    return tree(number) | {"l": [jnp.full(3, number, jnp.float32)]}


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    for number in (5, 9):
        made.save(number, state(number))
    return made


def is_state(found, number):
    assert found["n"] == number
    jax.tree.map(np.testing.assert_array_equal, found, state(number))


def largest(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda file: file.stat().st_size)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def replace(file, old, new):
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new))


DAMAGE = {
    "a byte": lambda folder: flip(largest(folder)),
    "half a file": lambda folder: os.truncate(largest(folder), 100),
    "no metadata": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "description of the arrays": lambda folder: flip(folder / "state" / "_METADATA"),
    "another name": lambda folder: replace(folder / "state" / "_METADATA", b'"w"', b'"v"'),
    "no arrays": lambda folder: shutil.rmtree(folder / "state"),
    "another checkpoint": lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.with_name("5"), folder)),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_older_checkpoint_is_used_and_the_damaged_one_named(checkpoints, kind):
    DAMAGE[kind](checkpoints.path / "9")
    again = Checkpoints(checkpoints.path)
    with pytest.warns(
        UserWarning,
        match=r"checkpoint 9 in .*checkpoints is not used \(it is damaged: .*\); going on from checkpoint 5",
    ):
        is_state(again.load(LIKE), 5)
    assert again.latest == 5
    again.save(5, state(5))  # is there
    assert len(os.listdir(again.path)) == 2
    again.save(9, state(9))  # the run gets there again
    assert sorted(os.listdir(again.path)) == ["5", "9"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        is_state(Checkpoints(checkpoints.path).load(LIKE), 9)


@pytest.mark.parametrize("old, new", [(b"{", b"["), (b'"w"', b'"v"')])
def test_a_damaged_description_of_the_arrays_is_no_misfit_and_not_logged(checkpoints, caplog, old, new):
    for number in ("5", "9"):
        replace(checkpoints.path / number / "state" / "_METADATA", old, new)
    with pytest.raises(
        ValueError, match=r"is whole \(9: it is damaged: what describes its arrays .*; 5: it is damaged"
    ):
        checkpoints.load(LIKE)
    assert not caplog.records


def test_none_whole_is_an_error_that_names_all(checkpoints):
    for number in ("5", "9"):
        flip(largest(checkpoints.path / number))
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is whole \(9: it is damaged.*; 5: .*\)\. Remove the folder"
    ):
        checkpoints.load(LIKE)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole \(there is none\)"):
        Checkpoints(checkpoints.path / "none").load(LIKE)


def test_the_leaf_that_is_not_as_it_was_is_named(checkpoints):
    """Damage that orbax itself doesn't see: other arrays under the checksums of the first ones."""
    folder = checkpoints.path / "9"
    made = ocp.metadata(folder).custom_metadata
    ocp.save(folder, state(9) | {"w": state(8)["w"]}, overwrite=True, custom_metadata=made)
    with pytest.warns(UserWarning, match=r"checkpoint 9 .* is not used \(it is damaged: w is not as it was saved\)"):
        is_state(checkpoints.load(LIKE), 5)


def test_checkpoints_of_old_without_checksums_are_read(tmp_path):
    newest = ocp.training.preservation_policies.LatestN(2)
    with ocp.training.Checkpointer(tmp_path / "old", preservation_policy=newest) as old:
        for number in (3, 4):
            old.save(number, state(number))
    checkpoints = Checkpoints(tmp_path / "old")
    assert checkpoints.latest == 4
    is_state(checkpoints.load(LIKE), 4)
    checkpoints.save(6, state(6))
    assert sorted(os.listdir(tmp_path / "old")) == ["4", "6"]
    is_state(checkpoints.load(LIKE), 6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32", "uint8", "bool"])
def test_sharded_arrays_of_every_type_are_checked(tmp_path, dtype):
    spread = mesh.split(mesh.data_mesh(4))
    x = {"x": jax.device_put(jnp.arange(16).reshape(8, 2).astype(dtype), spread), "one": jnp.ones((), dtype)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoints.load(x)
    assert found["x"].sharding == spread
    jax.tree.map(np.testing.assert_array_equal, found, x)


# -- a full disk -------------------------------------------------------------------------------------------------------

FULL = """
import sys
import numpy as np
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints
more = dict(base="0" * 64, adapter="full")
small, large = ({"x": np.random.default_rng(0).normal(size=size)} for size in (10**4, 10**6))
pool, kept = ModulePool(sys.argv[1] + "/pool"), Checkpoints(sys.argv[1] + "/kept")
pool.add("m", small, **more)
kept.save(1, small)
for write in (lambda: pool.add("n", large, **more), lambda: pool.add("m", large, overwrite=True, **more),
              lambda: pool.attach("m", head=large), lambda: kept.save(2, large)):
    try:
        write()
    except OSError as error:
        print(error.errno, error, file=sys.stderr)
assert (pool.names(), pool.check(), list(pool.manifest("m").parts), kept.latest) == (["m"], {}, ["module"], 1)
assert (pool.load("m")["x"] == small["x"]).all() and (kept.load(small)["x"] == small["x"]).all()
kept.save(3, small)
pool.add("n", small, **more)
"""


@pytest.fixture
def small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can't be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_one_line_and_what_was_there_stays(small_disk):
    run = subprocess.run([sys.executable, "-c", FULL, str(small_disk)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 4, run.stderr
    assert all(line.startswith("28 ") and "(No space left on device)" in line for line in lines)
    assert "module 'n' of the pool" in lines[0] and "checkpoint 2 could not be written to" in lines[3]
    assert sorted(os.listdir(small_disk / "kept")) == ["1", "3"]
    assert sorted(os.listdir(small_disk / "pool")) == ["m", "n"]


def test_a_save_that_failed_leaves_nothing(checkpoints, monkeypatch):
    def full(path, state, custom_metadata):
        path.with_name(f"{path.name}.orbax-checkpoint-tmp").mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [source='file.cc']")

    monkeypatch.setattr(ocp, "save", full)
    with pytest.raises(
        OSError, match=r"checkpoint 12 could not be written to .* \(No space left on device\): is the disk"
    ):
        checkpoints.save(12, state(12))
    assert sorted(os.listdir(checkpoints.path)) == ["5", "9"]
    monkeypatch.undo()
    is_state(checkpoints.load(LIKE), 9)


def test_what_is_no_checkpoint_stays(checkpoints):
    (checkpoints.path / "notes.txt").write_text("x")
    (checkpoints.path / "007").mkdir()
    checkpoints.save(10, state(10))
    assert sorted(os.listdir(checkpoints.path)) == ["007", "10", "9", "notes.txt"]
    with contextlib.suppress(FileNotFoundError):
        is_state(Checkpoints(checkpoints.path).load(LIKE), 10)
