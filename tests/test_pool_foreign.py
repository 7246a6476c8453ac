"""What lies in a pool's folder and is no module: never listed, followed, locked or removed, and the rest works on."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from test_pool import same

from compo_jax.pool import ModulePool

BASE = {"w": np.zeros((2, 3), np.float32)}
MODULE = {"w": np.ones((2, 3), np.float32)}


@pytest.fixture
def pool(tmp_path):
    pool = ModulePool(tmp_path / "pool")
    for name in "ab":
        pool.add(name, MODULE, base=BASE, adapter="full")
    return pool


def folder(path):
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def another_programs_arrays(path):
    folder(path)
    (path / "arrays").mkdir()
    (path / "arrays" / "_CHECKPOINT_METADATA").write_text("{}")


def module_without_manifest(path):
    shutil.copytree(path.with_name("a"), path)
    (path / "manifest.json").unlink()


def with_manifest(text):
    def make(path):
        folder(path)
        (path / "manifest.json").write_text(text)

    return make


def other_pool(path):
    """A whole module, but elsewhere."""
    ModulePool(path.parents[1] / "other").add("m", MODULE, base=BASE, adapter="full")
    path.symlink_to(path.parents[1] / "other" / "m")


FOREIGN = {
    "folder": folder,
    "empty folder": lambda path: path.mkdir(),
    "file": lambda path: path.write_text("years of work"),
    "another program's arrays": another_programs_arrays,
    "a module that lost its manifest": module_without_manifest,
    "another program's manifest": with_manifest('{"name": "app", "version": "1"}'),
    "a manifest that is no JSON": with_manifest("{"),
    "an empty manifest": with_manifest(""),
    "link to a module": other_pool,
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
    "pipe": os.mkfifo,
    "folder with a pipe for a manifest": lambda path: (path.mkdir(), os.mkfifo(path / "manifest.json")),
    "folder with a folder for a manifest": lambda path: (path / "manifest.json").mkdir(parents=True),
}


def everything(path):
    """All that lies below, links not followed, with content and times."""
    found = {}
    for at, folders, names in os.walk(path):
        for name in folders + names:
            file = os.path.join(at, name)
            status = os.lstat(file)
            found[os.path.relpath(file, path)] = status.st_ino, status.st_mtime_ns, status.st_size
    return found


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_things_stay_and_the_rest_works(pool, kind):
    foreign = pool.path / "foreign"
    FOREIGN[kind](foreign)
    before, status = everything(pool.path.parent), os.lstat(foreign)
    assert (pool.names(), len(pool), "foreign" in pool) == (["a", "b"], 2, False)
    assert list(pool.manifests()) == pool.find(base=BASE) == ["a", "b"]
    same(pool.compose(BASE), MODULE)
    assert list(pool.check()) == ["foreign"]
    assert "is no module" in pool.check()["foreign"] and "remove" not in pool.check()["foreign"]
    for call in (
        pool.manifest,
        pool.load,
        pool.remove,
        lambda n: pool.remove(n, force=True),
        lambda n: pool.check([n]),
    ):
        with pytest.raises(KeyError, match="has no module 'foreign'; its modules: a, b"):
            call("foreign")
    with pytest.raises(KeyError):
        pool.attach("foreign", head=MODULE)
    for overwrite in (False, True):
        with pytest.raises(
            FileExistsError, match="foreign is no module of this pool and is not touched: choose another"
        ):
            pool.add("foreign", MODULE, base=BASE, adapter="full", overwrite=overwrite)
    assert pool.clean() == []
    assert everything(pool.path.parent) == before
    assert os.lstat(foreign).st_ino == status.st_ino
    assert sorted(os.listdir(pool.path)) == ["a", "b", "foreign"]


@pytest.mark.parametrize(
    "where", ["a/notes.txt", "a/.notes", "a/.DS_Store", "a/backup.20260101/x", "a/module/tree/notes.txt"]
)
def test_what_lies_in_a_modules_folder_is_removed_on_purpose_only(pool, where):
    module = next((pool.path / "a").glob("module.*"))
    file = pool.path / where.replace("module", module.name)
    file.parent.mkdir(exist_ok=True)
    file.write_text("years of work")
    same(pool.load("a"), MODULE)
    same(pool.compose(BASE), MODULE)
    assert list(pool.check()) == ["a"]
    for change in (
        lambda: pool.remove("a"),
        lambda: pool.add("a", MODULE, base=BASE, adapter="full", overwrite=True),
    ):
        with pytest.raises(ValueError, match=r"lies what is none of the module's \(.*: move it elsewhere, or remove"):
            change()
    pool.attach("a", head=MODULE)
    assert pool.clean() == []
    assert file.read_text() == "years of work"
    kept = pool.path.parent / "kept"
    file.rename(kept)
    if "backup" in where:
        file.parent.rmdir()
    pool.add("a", MODULE, base=BASE, adapter="full", overwrite=True)
    assert pool.check() == {}
    kept.rename(pool.path / "a" / "notes.txt")
    pool.remove("a", force=True)
    assert os.listdir(pool.path) == ["b"]


def test_a_part_is_not_replaced_with_what_lies_in_it(pool):
    pool.attach("a", head=MODULE)
    file = next((pool.path / "a").glob("head.*")) / "notes.txt"
    file.write_text("years of work")
    with pytest.raises(ValueError, match="notes.txt.*: move it elsewhere"):
        pool.attach("a", head=MODULE)
    pool.attach("a", other=MODULE)
    assert file.read_text() == "years of work"


def test_links_are_neither_followed_nor_is_what_they_lead_to_removed(pool):
    outside = pool.path.parent / "outside"
    shutil.copytree(pool.path / "b", outside)
    part = next((pool.path / "a").glob("module.*"))
    shutil.rmtree(part)
    part.symlink_to(outside / next(outside.glob("module.*")).name)
    before = everything(outside)
    with pytest.raises(ValueError, match=f"{part.name} is a link, which is not followed"):
        pool.load("a")
    assert list(pool.check()) == ["a"]
    with pytest.raises(ValueError, match="none of the module's"):
        pool.remove("a")
    pool.remove("a", force=True)
    (pool.path / ".x.abcdefgh").symlink_to(outside)
    os.utime(outside, (time.time() - 4000,) * 2)
    assert pool.clean() == []
    assert everything(outside) == before


def test_another_programs_hidden_folder_is_not_cleaned_away(pool):
    hidden = pool.path / ".cache.abcdefgh"
    folder(hidden)
    settings = pool.path / ".vscode.settings"
    for inside in ("old", "new"):
        (settings / inside).mkdir(parents=True)
        (settings / inside / "thesis.txt").touch()
    for path in (hidden, settings):
        os.utime(path, (time.time() - 4000,) * 2)
    (pool.path / ".cache.12345678").mkdir()
    (pool.path / ".cache.12345678" / ".lock").touch()
    (pool.path / ".cache.12345678" / "thesis.txt").touch()
    assert pool.clean() == []
    assert (hidden / "thesis.txt").read_text() == "years of work"
    assert (pool.path / ".cache.12345678" / "thesis.txt").exists()
    assert (settings / "old" / "thesis.txt").exists() and (settings / "new" / "thesis.txt").exists()


def test_an_empty_folder_that_is_made_meanwhile_is_no_module_either(pool, monkeypatch):
    made = []
    rename = os.rename

    def late(source, target):
        if target != pool.path / "new":
            return rename(source, target)
        monkeypatch.setattr(os, "rename", rename)
        folder(Path(target))
        made.append(Path(target))
        return rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(FileExistsError, match="new is no module of this pool"):
        pool.add("new", MODULE, base=BASE, adapter="full", overwrite=True)
    assert (made[0] / "thesis.txt").read_text() == "years of work"
