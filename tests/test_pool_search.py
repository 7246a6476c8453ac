"""A pool is searched by its manifests: what is found, how fast, and whatever lies beside."""

import json
import re
import time
import warnings

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from compo_jax import tree
from compo_jax.curvature import FisherDiagonal
from compo_jax.pool import ModulePool, search

BASE = {"w": np.ones(3, np.float32)}
FISHER = FisherDiagonal({"w": np.ones(3, np.float32)}, np.int32(9), np.float32(1))


@pytest.fixture
def pool(tmp_path, monkeypatch):
    pool = ModulePool(tmp_path / "pool")
    module = {"w": np.ones(3, np.float32)}
    pool.add("a", module, base=BASE, adapter="full", task="greek", classes=["α", "β"], metrics={"accuracy": 0.9})
    pool.add(
        "b", module, base=BASE, adapter="lora", check_adapter=False, task="greek+", classes=["β", "γ"], curvature=FISHER
    )
    pool.add("c", module, base="1" * 64, adapter="lora", task="latin", classes=["a", 7], metrics={"accuracy": 0.4})
    monkeypatch.setattr(ocp, "load_checkpointables", None)  # no array is read
    return pool


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({}, "abc"),
        ({"base": BASE}, "ab"),
        ({"base": tree.fingerprint(BASE)}, "ab"),
        ({"base": "1" * 64, "adapter": "lora"}, "c"),
        ({"adapter": "full"}, "a"),
        ({"task": "greek"}, "a"),
        ({"task": "gree."}, ""),
        ({"classes": ["α", "a"]}, "ac"),
        ({"classes": "β"}, "ab"),
        ({"classes": []}, ""),
        ({"classes": [7]}, "c"),
        ({"curvature": "diagonal"}, "b"),
        ({"curvature": "kronecker"}, ""),
        ({"where": lambda m: m.metrics.get("accuracy", 0) > 0.5}, "a"),
        ({"where": lambda m: re.search("ee", m.task) is not None, "adapter": "lora"}, "b"),
        ({"where": lambda m: m.curvature.get("diagonal", {"count": 0})["count"] > 8}, "b"),
    ],
)
def test_find(pool, wanted, names):
    assert pool.find(**wanted) == list(names)


def test_find_refuses_what_is_no_fingerprint_and_no_kind(pool):
    with pytest.raises(ValueError, match="'vit' is no fingerprint"):
        pool.find(base="vit")
    with pytest.raises(ValueError, match="unknown kind of curvature 'fisher'; known are diagonal, kronecker"):
        pool.find(curvature="fisher")
    assert (ModulePool(pool.path / "none").find(), ModulePool(pool.path / "none").manifests()) == ([], {})


def test_manifests_are_what_each_module_says(pool):
    (pool.path / "notes.txt").write_text("x")
    (pool.path / ".hidden").mkdir()
    assert pool.manifests() == {name: pool.manifest(name) for name in "abc"}


def test_damaged_modules_are_named_and_the_rest_found(pool):
    (pool.path / "b" / "manifest.json").write_text("{")
    (pool.path / "c" / "manifest.json").write_text("[]")
    (pool.path / "empty").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert pool.find(base=BASE) == ["a"]
    assert [w.category for w in caught] == [UserWarning] * 2
    for name, warning in zip("bc", caught, strict=True):
        assert re.search(f"manifest.json of .*pool/{name} is damaged", str(warning.message))
    assert pool.names() == ["a", "b", "c"]


def test_modules_that_are_removed_meanwhile_are_no_damage(pool, monkeypatch):
    visible = search.visible(pool.path)
    pool.remove("b")
    monkeypatch.setattr(search, "visible", lambda path: visible)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(pool.manifests()) == ["a", "c"]


def test_a_thousand_modules_are_listed_at_once(pool):
    text = (pool.path / "b" / "manifest.json").read_bytes()
    assert len(json.loads(text)["files"]) == 2
    for i in range(1000):
        (pool.path / f"m{i}").mkdir()
        (pool.path / f"m{i}" / "manifest.json").write_bytes(text)
    began = time.perf_counter()
    assert len(pool.manifests()) == 1003
    assert len(pool.find(curvature="diagonal")) == 1001
    assert time.perf_counter() - began < 2  # 0.2 s, and much for a machine that is busy
