"""The module pool: bit-exact storage, whole modules whatever happens, composition against the direct formula."""

import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from compo_jax import adapters, tree
from compo_jax.pool import ModulePool

BASE = "0" * 64
LORA = adapters.lora(rank=2, targets="kernel$")


@pytest.fixture
def base():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "fc1": {"kernel": jax.random.normal(keys[0], (8, 6)), "bias": jnp.ones(6)},
        "fc2": {"kernel": jax.random.normal(keys[1], (6, 4)), "bias": jnp.zeros(4)},
    }


@pytest.fixture
def pool(tmp_path):
    return ModulePool(tmp_path / "pool")


def modules(base, count):
    """LoRA modules with b away from its zero start."""
    for t in range(count):
        module = LORA.init(jax.random.key(t), base)
        yield jax.tree.map(lambda x, t=t: x + 0.1 * (t + 1), module)


def fill(pool, base, count):
    made = list(modules(base, count))
    for t, module in enumerate(made):
        pool.add(f"task{t}", module, base=base, adapter=LORA)
    return made


def same(a, b):
    """Equal structure (lists, dictionaries, None), dtypes, shapes and bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


NAN = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
TREES = {
    "float32": {"a": {"w": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32), "b": None}},
    "special values": {"x": NAN},
    "float64": {"x": np.random.default_rng(1).normal(size=7)},
    "bfloat16": {"x": jnp.linspace(0, 1, 9, dtype=jnp.bfloat16), "y": np.asarray(jnp.ones(2, jnp.bfloat16))},
    "integers": {"x": np.arange(-3, 3, dtype=np.int32), "y": np.array([True, False]), "z": np.uint8([1, 2])},
    "scalars": {"x": np.float64(0.1), "y": jnp.float32(0.1), "z": np.array(3, np.int32)},
    "lists": {"layers": [{"w": np.ones(2)}, None, [np.zeros((2, 0, 3), np.float32), np.arange(2)]]},
    "empty": {"none": np.zeros((0, 3), np.float16), "nothing": {}, "some": np.ones(1)},
    "odd keys": {"x.y": {"z w": np.ones(2), "0": np.zeros(1)}, "ä": np.ones(3), "module": np.ones(1)},
    "one array": np.arange(4.0),
    "not contiguous": {"x": np.arange(12.0).reshape(3, 4).T[::2]},
}


@pytest.mark.parametrize("case", TREES)
def test_round_trip_keeps_every_bit(pool, case):
    pool.add("m", TREES[case], base=BASE, adapter="full", head=TREES["bfloat16"], check_finite=case != "special values")
    again = ModulePool(str(pool.path))
    same(again.load("m"), TREES[case])
    same(again.load("m", "head"), TREES["bfloat16"])
    assert not list(pool.path.rglob("*.pkl"))


def test_manifest_holds_what_was_given(pool, base):
    returned = pool.add(
        "lora-1",
        next(modules(base, 1)),
        base=tree.fingerprint(base),
        adapter="lora",
        settings={"rank": np.int64(2)},
        task="greek",
        classes=["α", "β"],
        metrics={"accuracy": jnp.float32(0.5)},
        seed=3,
        extra={"lr": (0.1, 0.2)},
        head={"kernel": jnp.zeros((4, 2), jnp.bfloat16)},
    )
    found = pool.manifest("lora-1")
    assert found == returned
    assert (found.base, found.classes, found.task) == (tree.fingerprint(base), ["α", "β"], "greek")
    assert (found.settings, found.metrics, found.seed) == ({"rank": 2}, {"accuracy": 0.5}, 3)
    assert found.extra == {"lr": [0.1, 0.2]}
    assert found.versions["jax"] == jax.__version__
    assert set(found.versions) == {"compo_jax", "jax", "flax", "orbax-checkpoint"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found.created)
    assert found.parts["head"]["leaves"] == {"kernel": [[4, 2], "bfloat16"]}
    assert found.parts["module"]["leaves"]["fc1/kernel/a"] == [[8, 2], "float32"]


def test_names_read_no_arrays(pool, base, monkeypatch):
    assert (pool.names(), len(pool), "task0" in pool, pool.path.exists()) == ([], 0, False, False)
    fill(pool, base, 3)
    (pool.path / "notes.txt").write_text("not a module")
    monkeypatch.setattr(ocp, "load_checkpointables", None)
    assert (pool.names(), len(pool)) == (["task0", "task1", "task2"], 3)
    assert [name in pool for name in ("task1", "task9", "../pool", 3)] == [True, False, False, False]
    assert pool.manifest("task2").name == "task2"


def test_add_keeps_what_is_there_unless_told(pool, base):
    first, second = modules(base, 2)
    pool.add("m", first, base=base, adapter=LORA)
    with pytest.raises(FileExistsError, match=r"has a module 'm'.*overwrite=True"):
        pool.add("m", second, base=base, adapter=LORA)
    same(pool.load("m"), first)
    pool.add("m", second, base=base, adapter=LORA, overwrite=True)
    same(pool.load("m"), second)
    assert os.listdir(pool.path) == ["m"]


def test_name_taken_while_writing(pool, base, monkeypatch):
    first, second = modules(base, 2)
    save, other = ocp.save_checkpointables, ModulePool(pool.path)

    def slow(*args):
        monkeypatch.setattr(ocp, "save_checkpointables", save)
        other.add("m", first, base=base, adapter=LORA)
        save(*args)

    monkeypatch.setattr(ocp, "save_checkpointables", slow)
    with pytest.raises(FileExistsError, match="has a module 'm'"):
        pool.add("m", second, base=base, adapter=LORA)
    same(pool.load("m"), first)
    assert os.listdir(pool.path) == ["m"]


def test_remove(pool, base):
    made = fill(pool, base, 2)
    pool.remove("task0")
    assert os.listdir(pool.path) == ["task1"]
    same(pool.load("task1"), made[1])
    with pytest.raises(KeyError, match="no module 'task0'; its modules: task1"):
        pool.remove("task0")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a b", "a\n", "-a", "ä", "a\0", "a\\b", "~", "a" * 129],
)
def test_bad_names(pool, base, name):
    with pytest.raises(ValueError, match="cannot name a module"):
        pool.add(name, next(modules(base, 1)), base=base, adapter=LORA)
    with pytest.raises(KeyError, match="no module"):
        pool.load(name)
    with pytest.raises(KeyError, match="no module"):
        pool.remove(name)
    with pytest.raises(ValueError, match="cannot name a part"):
        pool.add("m", next(modules(base, 1)), base=base, adapter=LORA, **{name: np.ones(1)})
    assert not pool.path.exists()


def test_unknown_names_list_the_known(pool, base):
    fill(pool, base, 2)
    for call in (pool.load, pool.manifest, lambda name: pool.compose(base, [name])):
        with pytest.raises(KeyError, match=f"{pool.path} has no module 'task7'; its modules: task0, task1"):
            call("task7")
    with pytest.raises(KeyError, match="has no part 'head'; its parts: module"):
        pool.load("task0", "head")


@pytest.mark.parametrize(
    ("module", "settings", "match"),
    [
        ({"x": "text"}, {}, "a str .* at /x"),
        ({"x": jax.random.key(0)}, {}, "jax.random.key_data"),
        ({"x": np.array([object()])}, {}, "object.* at /x"),
        (adapters.lora(), {}, "tree.nested"),
        ({}, {}, "no array in part 'module'"),
        ({"a": None}, {}, "no array"),
        (None, {}, "no array"),
        ({"x": np.ones(1)}, {"f": lambda: 0}, "no plain value"),
    ],
)
def test_what_cannot_be_stored_is_refused(pool, base, module, settings, match):
    with pytest.raises((ValueError, TypeError), match=match):
        pool.add("m", module, base=BASE, adapter="full", settings=settings)
    assert not pool.path.exists()


def test_bad_base_and_path(pool, base, tmp_path):
    with pytest.raises(ValueError, match="is no fingerprint"):
        pool.add("m", {"x": np.ones(1)}, base="vit-base", adapter="full")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a pool is a folder"):
        ModulePool(tmp_path / "file")
    with pytest.raises(OSError, match=r"could not be changed .*Not a directory"):
        ModulePool(tmp_path / "file" / "pool").add("m", {"x": np.ones(1)}, base=BASE, adapter="full")


def test_failed_writes_leave_nothing(pool, base, monkeypatch):
    first, second = modules(base, 2)
    pool.add("m", first, base=base, adapter=LORA)

    def full(path, parts):
        path.mkdir()
        (path / "half").write_text("x")
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [source='file.cc']")

    monkeypatch.setattr(ocp, "save_checkpointables", full)
    for name in ("m", "new"):
        with pytest.raises(OSError, match=rf"module '{name}' of the pool .*No space left.* as it was: check that the"):
            pool.add(name, second, base=base, adapter=LORA, overwrite=True)
    monkeypatch.undo()

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "x")

    monkeypatch.setattr(os, "mkdir", read_only)
    for call in (lambda: pool.add("new", second, base=base, adapter=LORA), lambda: pool.remove("m")):
        with pytest.raises(OSError, match=r"Read-only file system.* writable") as caught:
            call()
        assert caught.value.errno == errno.EROFS
    assert os.listdir(pool.path) == ["m"]
    same(pool.load("m"), first)


def test_full_disk_for_real(tmp_path):
    """A limit on the size of a file stands in for the full disk: orbax itself fails in the middle of its write."""
    run = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "pool")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "could not be changed" in run.stdout
    assert os.listdir(tmp_path / "pool") == []


LIMITED = """
import resource, sys
import numpy as np
from compo_jax.pool import ModulePool
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    ModulePool(sys.argv[1]).add("m", {"x": np.random.default_rng(0).normal(size=10**5)}, base="0" * 64, adapter="full")
except OSError as error:
    print(error)
"""


def arrays(folder):
    """The folder of the module's arrays, which is named anew each time."""
    return next(folder.glob("module.*"))


def truncate(folder):
    for file in folder.rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


def swap(folder):
    name = arrays(folder).name
    shutil.rmtree(folder / name)
    shutil.copytree(arrays(folder.parent / "task0"), folder / name)


def edit(folder, change):
    file = folder / "manifest.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def link(path):
    """Moves it elsewhere, and leaves a link to there."""
    there = path.parents[[parent.name for parent in path.parents].index("pool") + 1] / path.name
    path.rename(there)
    path.symlink_to(there)


REPLACEABLE = ("no arrays", "no tree", "truncated arrays", "a link for a file")
DAMAGE = {
    "no arrays": lambda f: shutil.rmtree(arrays(f)),
    "no tree": lambda f: shutil.rmtree(arrays(f) / "tree"),
    "truncated arrays": truncate,
    "another's arrays": swap,
    "other shapes": lambda f: edit(f, lambda fields: fields["parts"]["module"].update(leaves={})),
    "a link for the manifest": lambda f: link(f / "manifest.json"),
    "a link for the arrays": lambda f: link(arrays(f)),
    "a link for a file": lambda f: link(next(f.rglob("d/*"))),
    "truncated manifest": lambda f: os.truncate(f / "manifest.json", 100),
    "binary manifest": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\0"),
    "foreign manifest": lambda f: (f / "manifest.json").write_text('{"a": 1}'),
    "a list": lambda f: (f / "manifest.json").write_text("[]"),
    "missing field": lambda f: edit(f, lambda fields: fields.pop("base")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_stays_in_its_module(pool, base, kind):
    made = fill(pool, base, 2)
    DAMAGE[kind](pool.path / "task1")
    with pytest.raises(ValueError, match=r"task1.*other modules are unaffected"):
        pool.load("task1")
    with pytest.raises(ValueError, match="task1"):
        pool.compose(base)
    assert pool.names() == ["task0", "task1"]
    assert list(pool.check()) == ["task1"]
    same(pool.load("task0"), made[0])
    pool.compose(base, ["task0"])
    if kind in REPLACEABLE:
        pool.add("task1", made[1], base=base, adapter=LORA, overwrite=True)
    else:  # nobody knows what of the folder is the module's own
        changes = (lambda: pool.remove("task1"),
                   lambda: pool.add("task1", made[1], base=base, adapter=LORA, overwrite=True))  # fmt: skip
        for change in changes:
            with pytest.raises(ValueError, match=r"task1.*remove\('task1', force=True\)"):
                change()
        assert pool.names() == ["task0", "task1"]
        pool.remove("task1", force=True)
        pool.add("task1", made[1], base=base, adapter=LORA)
    same(pool.load("task1"), made[1])
    assert pool.check() == {}
    pool.remove("task1")


def dense(base, made, weights):
    """The formula in float64 NumPy."""
    total = {layer: {k: np.asarray(v, np.float64) for k, v in leaves.items()} for layer, leaves in base.items()}
    for module, weight in zip(made, weights, strict=True):
        for layer in total:
            a, b = (np.asarray(module[layer]["kernel"][factor], np.float64) for factor in "ab")
            total[layer]["kernel"] += weight * a @ b
    return total


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (None, None),
        (None, [0.5, -1.0, 2.0]),
        (["task2", "task0"], None),
        (["task2", "task0"], jnp.array([0.1, 0.9])),
        (["task1"], [1.0]),
        (["task1", "task1"], [0.5, 0.25]),
    ],
)
def test_compose_is_the_direct_formula(pool, base, names, weights):
    made = fill(pool, base, 3)
    used = [made[int(name[-1])] for name in names or pool.names()]
    expected = dense(base, used, [1 / len(used)] * len(used) if weights is None else weights)
    params = pool.compose(base, names, weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6), params, expected)
    assert params["fc1"]["bias"] is base["fc1"]["bias"]


def test_compose_full_deltas_with_other_holes(pool, base):
    pool.add("k", {**base, "fc2": {"kernel": None, "bias": None}}, base=base, adapter="full")
    pool.add("b", jax.tree.map(lambda x: None if x.ndim == 2 else x, base), base=base, adapter="full")
    params = pool.compose(base, ["k", "b"], [2.0, 3.0])
    factors = {"fc1": {"kernel": 3.0, "bias": 6.0}, "fc2": {"kernel": 1.0, "bias": 4.0}}
    expected = jax.tree.map(lambda x, f: f * x, base, factors)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), params, expected)


def test_compose_holds_one_module_at_a_time(pool, base, monkeypatch):
    full = jax.tree.map(np.asarray, base)
    for t in range(4):
        pool.add(f"task{t}", full, base=base, adapter="full")
    alive, most, load = [], [], ModulePool.load

    def watched(self, name, part="module"):
        for _ in range(100):  # JAX lets go of an array that it reads in place a little later
            if any(ref() is not None for ref in alive):
                gc.collect()
                time.sleep(0.01)
        module = load(self, name, part)
        alive.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(module))
        most.append(sum(ref() is not None for ref in alive))
        return module

    monkeypatch.setattr(ModulePool, "load", watched)
    pool.compose(base)
    assert most == [len(jax.tree.leaves(base))] * 4


def test_compose_refuses_before_reading(pool, base, monkeypatch):
    fill(pool, base, 2)
    other = jax.tree.map(lambda x: x + 1, base)
    pool.add("stray", next(modules(base, 1)), base=other, adapter=LORA)
    monkeypatch.setattr(ModulePool, "load", None)
    own, foreign = tree.fingerprint(base)[:12], tree.fingerprint(other)[:12]
    with pytest.raises(ValueError, match=rf"another base than this one \({own}\): stray \(on {foreign}\)\. Load"):
        pool.compose(base)
    with pytest.raises(ValueError, match=r"task0 \(on .*\), task1 \(on"):
        pool.compose(other)
    with pytest.raises(ValueError, match="1 weights were given for 2 modules: task0, task1"):
        pool.compose(base, ["task0", "task1"], [1.0])
    with pytest.raises(ValueError, match="no module to compose"):
        pool.compose(base, [])
    with pytest.raises(ValueError, match="no module to compose"):
        ModulePool(pool.path / "none").compose(base)
    pool.add("odd", next(modules(base, 1)), base=base, adapter="unheard", check_adapter=False)
    with pytest.raises(ValueError, match=r"adapter of module 'odd' .*unknown adapter 'unheard'"):
        pool.compose(base, ["task0", "odd"])
