"""A pool's files: every byte is under a checksum, damage is named and stays where it is, nothing is a pickle."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from test_pool import same

import compo_jax.pool
from compo_jax.curvature import FisherDiagonal
from compo_jax.pool import ModulePool, changes, manifest

BASE = "0" * 64
MODULE = {"w": np.random.default_rng(0).normal(size=(20, 30)), "n": None, "list": [np.arange(3), np.zeros((0, 2))]}
HEAD = {"kernel": np.random.default_rng(1).normal(size=5).astype(np.float32)}
FISHER = FisherDiagonal({"w": np.random.default_rng(2).random((20, 30))}, np.int32(7), np.float32(0.5))


def make(path):
    pool = ModulePool(path)
    for name in ("good", "m"):
        pool.add(name, MODULE, base=BASE, adapter="full", head=HEAD, curvature=FISHER)
    return pool


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return make(tmp_path_factory.mktemp("files") / "pool")


@pytest.fixture
def pool(tmp_path, stored):
    shutil.copytree(stored.path, tmp_path / "pool")
    return ModulePool(tmp_path / "pool")


def flip(at):
    def change(file):
        data = bytearray(file.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1 << int(8 * at) % 8
        file.write_bytes(data)

    return change


DAMAGE = {
    "first byte": flip(0),
    "byte in the middle": flip(0.5),
    "last byte": flip(1),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\n"),
    "deleted": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_every_file_in_turn_is_found_and_named(pool, kind):
    files = [file for file in (pool.path / "m").rglob("*") if file.is_file()]
    assert len(files) > 20
    for file in files:
        data = file.read_bytes()
        if not data and kind not in ("longer", "deleted", "a folder"):
            continue
        DAMAGE[kind](file)
        inside = file.relative_to(pool.path / "m").as_posix()
        if (kind, inside) == ("deleted", "manifest.json"):  # then it is no module
            file.write_bytes(data)
            continue
        assert list(pool.check()) == ["m"], file
        assert inside in pool.check()["m"]
        with pytest.raises(ValueError, match=r"pool.*other modules are unaffected") as caught:
            pool.load("m", "module" if file.name == "manifest.json" else inside.split("/")[0].rsplit(".", 1)[0])
        assert inside in str(caught.value)
        same(pool.load("good"), MODULE)
        assert pool.check(["good"]) == {}
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(data)
    assert pool.check() == {}
    same(pool.load("m"), MODULE)


def test_damage_of_large_files_never_changes_an_array(pool):
    """Load reads them once: their bytes are verified by the arrays' fingerprint, and those of no array by `check`."""
    large = {"w": np.random.default_rng(3).normal(size=(700, 700)).astype(np.float32)}  # does not compress
    pool.add("large", large, base=BASE, adapter="full")
    file = max((pool.path / "large").rglob("*"), key=lambda file: file.stat().st_size)
    data = file.read_bytes()
    assert len(data) > 1.5 * 2**20
    found = []
    for change in (*map(flip, np.linspace(0, 1, 21)), DAMAGE["truncated"], DAMAGE["one byte short"], DAMAGE["deleted"]):
        change(file)
        assert file.name in pool.check()["large"]
        try:
            same(pool.load("large"), large)
        except ValueError as error:
            found.append(str(error))
        file.write_bytes(data)
    assert len(found) >= 22
    assert all("part 'module' of module 'large' in" in message for message in found)
    same(pool.load("large"), large)


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts what Linux says was read")
def test_compose_reads_every_module_once(pool):
    large = {f"w{i}": np.random.default_rng(i).normal(size=(500, 700)).astype(np.float32) for i in range(3)}
    base = jax.tree.map(np.zeros_like, large)
    for t in range(3):
        pool.add(f"large{t}", jax.tree.map(lambda x, t=t: x + t, large), base=base, adapter="full")
    stored = sum(file.stat().st_size for t in range(3) for file in (pool.path / f"large{t}").rglob("*"))

    def read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = read()
    pool.compose(base, [f"large{t}" for t in range(3)])
    assert 0.9 * stored < read() - before < 1.2 * stored


def test_check_names_what_is_foreign(pool):
    assert pool.check() == {}
    (pool.path / "notes.txt").write_text("x")
    (pool.path / "my module").mkdir()
    (pool.path / "empty").mkdir()
    (pool.path / "dangling").symlink_to("nowhere")
    (pool.path / ".hidden").mkdir()
    (pool.path / "good" / "more").write_text("x")
    next((pool.path / "m").glob("head.*/tree")).joinpath("more").write_text("x")
    wrong = pool.check()
    assert sorted(wrong) == ["dangling", "empty", "good", "m", "my module", "notes.txt"]
    for name in ("notes.txt", "my module", "dangling", "empty"):
        assert "is no module: no pool wrote a manifest into it. It is not touched" in wrong[name]
    assert "'more' was put into its folder" in wrong["good"]
    assert re.search("head.*tree/more was put there", wrong["m"])
    same(pool.load("m", "head"), HEAD)
    assert list(pool.check(["m"])) == ["m"]
    with pytest.raises(KeyError, match="no module 'm9'; its modules: good, m"):
        pool.check(["m9"])
    with pytest.raises(FileExistsError, match=r"notes.txt is no module of this pool .*move it"):
        pool.add("notes.txt", MODULE, base=BASE, adapter="full", overwrite=True)
    assert (pool.path / "notes.txt").read_text() == "x"
    assert ModulePool(pool.path / "none").check() == {}


def test_a_manifest_edited_by_hand_is_named(pool):
    file = pool.path / "m" / "manifest.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match="checksum is not that of its text: it was damaged, or edited by hand"):
        pool.manifest("m")


def test_a_manifest_leads_nowhere_else(pool):
    file = pool.path / "m" / "manifest.json"
    fields = json.loads(file.read_text())
    del fields["checksum"]
    fields["files"]["module"]["folder"] = "../good/" + next((pool.path / "good").glob("module.*")).name
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="which no pool makes"):
        pool.load("m")
    assert list(pool.check()) == ["m"]


def test_a_renamed_folder_is_a_renamed_module(pool):
    os.rename(pool.path / "m", pool.path / "renamed")
    assert pool.manifest("renamed").name == "renamed"
    same(pool.load("renamed"), MODULE)
    assert pool.check() == {}


def as_of_old(pool, name):
    """Puts the module into the layout of the first version: one checkpoint, and a manifest of fewer entries."""
    folder = pool.path / name
    parts = {part: pool.load(name, part) for part in ("module", "head")}
    fields = json.loads((folder / "manifest.json").read_text())
    shutil.rmtree(folder)
    kept = jax.tree.map(lambda x: x if x.size else None, parts)
    ocp.save_checkpointables(folder / "arrays", kept)
    for new in ("checksum", "curvature", "files"):
        del fields[new]
    fields["parts"] = {part: fields["parts"][part] for part in parts}
    (folder / "manifest.json").write_text(json.dumps(fields, indent=1))


def test_modules_of_old_are_read_checked_and_changed(pool):
    as_of_old(pool, "m")
    same(pool.load("m"), MODULE)
    same(pool.load("m", "head"), HEAD)
    assert pool.manifest("m").curvature == {}
    assert (pool.find(base=BASE), pool.check()) == (["good", "m"], {})
    pool.attach("m", curvature=FISHER)
    same(pool.load("m"), MODULE)
    same(jax.tree.map(np.asarray, pool.curvature("m")), FISHER)
    assert pool.check() == {}
    for file in (pool.path / "m" / "arrays" / "module").rglob("d/*"):
        flip(0.5)(file)
    assert list(pool.check()) == ["m"]
    with pytest.raises(ValueError, match="part 'module' of module 'm' .* cannot be restored"):
        pool.load("m")
    same(pool.load("m", "head"), HEAD)
    pool.add("m", MODULE, base=BASE, adapter="full", overwrite=True)
    assert (pool.check(), (pool.path / "m" / "arrays").exists()) == ({}, False)


def test_nothing_is_a_pickle(pool):
    files = [file for file in pool.path.rglob("*") if file.is_file()]
    assert not any(re.match(rb"\x80[\x02-\x05]", file.read_bytes()) for file in files)  # as pickles begin
    for file in Path(compo_jax.pool.__file__).parent.glob("*.py"):
        assert not re.search(r"pickle|marshal|shelve|joblib|np\.load|numpy\.load", file.read_text()), file


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i4", ">u2"])
def test_another_byte_order_comes_back_as_the_machines_own(tmp_path, dtype):
    pool, x = ModulePool(tmp_path), np.arange(6).reshape(2, 3).astype(dtype)
    pool.add("m", {"w": x}, base=BASE, adapter="full")
    loaded = pool.load("m")["w"]
    assert loaded.dtype == x.dtype.newbyteorder("=")
    np.testing.assert_array_equal(loaded, x)


@pytest.mark.parametrize("inner", [{"b": np.ones(2)}, [np.ones(2)]])
def test_paths_that_are_one_file_on_the_disk_are_refused(pool, inner):
    dotted = "a.b" if isinstance(inner, dict) else "a.0"
    with pytest.raises(ValueError, match=f"has the paths .*{dotted}.*, one file on the disk"):
        pool.add("m", {"a": inner, dotted: np.zeros(2)}, base=BASE, adapter="full", overwrite=True)
    same(pool.load("m"), MODULE)


def looped(file):
    file.unlink()
    file.symlink_to(file)


def of_other_types(file):
    fields = json.loads(file.read_text())
    del fields["checksum"]
    file.write_text(json.dumps(fields | {"parts": None, "classes": None}))


@pytest.mark.parametrize("damage", [looped, of_other_types, lambda file: file.write_text("[" * 100_000)])
def test_one_foreign_manifest_is_named_and_the_rest_works(pool, damage):
    damage(pool.path / "m" / "manifest.json")
    with pytest.warns(UserWarning, match="manifest.json of .*/m is damaged"):
        assert list(pool.manifests()) == ["good"]
    with pytest.warns(UserWarning, match="manifest.json of .*/m is damaged"):
        assert pool.find(classes="x", base=BASE) == []
    assert list(pool.check()) == ["m"]
    same(pool.load("good"), MODULE)


def test_what_a_kill_left_of_an_old_module_is_cleaned_away(pool):
    as_of_old(pool, "m")
    old = pool.path / "m" / "arrays"
    shutil.copytree(old, pool.path / "arrays.kept")
    pool.add("m", MODULE, base=BASE, adapter="full", overwrite=True)
    os.rename(pool.path / "arrays.kept", old)  # as if the writer had been killed before it took this away
    assert pool.check() == {}
    assert pool.clean() == ["m/arrays"]
    assert not old.exists()
    same(pool.load("m"), MODULE)


def test_an_old_module_with_anothers_arrays_is_named(pool):
    as_of_old(pool, "m")
    as_of_old(pool, "good")
    shutil.rmtree(pool.path / "m" / "arrays")
    ocp.save_checkpointables(pool.path / "m" / "arrays", {"module": {"w": np.ones(3), "v": np.ones(2)}, "head": HEAD})
    with pytest.raises(ValueError, match="part 'module' of module 'm' .* cannot be restored"):
        pool.load("m")
    assert list(pool.check()) == ["m"]


def test_a_copy_of_a_descriptor_does_not_keep_the_lock(pool, monkeypatch):
    """A process that another thread forks while a module is written has one until it ends."""
    copies, plain = [], os.open
    monkeypatch.setattr(os, "open", lambda *args: copies.append(os.dup(made := plain(*args))) or made)
    with changes.locked(pool.path / "m"):
        assert copies
    monkeypatch.undo()
    other = plain(pool.path / "m" / manifest.LOCK, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where it is kept
    for descriptor in (other, *copies):
        os.close(descriptor)
