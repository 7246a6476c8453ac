"""Parts that come later, curvature kept beside a module, and parts that are restored onto a mesh."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from test_pool import same

from compo_jax import mesh, tree
from compo_jax.curvature import FisherDiagonal, Kronecker, fisher_diagonal, kronecker
from compo_jax.pool import ModulePool, storage

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"a": {"kernel": jax.random.normal(KEYS[0], (4, 6))}, "b": {"kernel": jax.random.normal(KEYS[1], (6, 3))}}
IMAGES = jax.random.normal(KEYS[2], (5, 4))
BASE = tree.fingerprint(PARAMS)
MODULE = {"a": {"kernel": np.arange(24.0).reshape(4, 6)}, "b": {"kernel": None}}


def apply(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


@pytest.fixture
def pool(tmp_path):
    pool = ModulePool(tmp_path / "pool")
    pool.add("m", MODULE, base=BASE, adapter="full", extra={"k": 1}, head={"h": np.ones(3)})
    return pool


def everything(folder):
    return {
        str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith((".", "manifest.json"))
    }


# -- attach ------------------------------------------------------------------------------------------------------------


def test_attach_adds_and_replaces_and_touches_nothing_else(pool):
    folder = pool.path / "m"
    before, first = everything(folder), pool.manifest("m")
    returned = pool.attach("m", start={"s": np.zeros(2)}, other={"o": np.ones(1)})
    assert pool.manifest("m") == returned
    after = everything(folder)
    assert before.items() < after.items()
    assert (returned.extra, returned.created, returned.parts["module"]) == (
        first.extra,
        first.created,
        first.parts["module"],
    )
    same(pool.load("m", "start"), {"s": np.zeros(2)})
    pool.attach("m", start={"t": np.full(2, 7.0)})
    same(pool.load("m", "start"), {"t": np.full(2, 7.0)})
    same(pool.load("m"), MODULE)
    same(pool.load("m", "other"), {"o": np.ones(1)})
    assert sorted(e.split(".")[0] for e in os.listdir(folder) if e[0] != ".") == [
        *("head", "manifest", "module", "other", "start")
    ]
    assert (pool.check(), pool.clean(), os.listdir(pool.path)) == ({}, [], ["m"])


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({}, "nothing to attach"),
        ({"module": {"w": np.ones(2)}}, r"overwrite=True\)` replaces"),
        ({"curvature.diagonal": {"w": np.ones(2)}}, "give it as `curvature=`"),
        ({"x": {"y": "text"}}, "a str .* at /y"),
        ({"x": {}}, "no array in part 'x'"),
        ({"../x": {"y": np.ones(1)}}, "cannot name a part"),
    ],
)
def test_attach_refuses(pool, parts, match):
    before = everything(pool.path)
    with pytest.raises(ValueError, match=match):
        pool.attach("m", **parts)
    assert everything(pool.path) == before
    with pytest.raises(KeyError, match="no module 'n'; its modules: m"):
        pool.attach("n", x={"y": np.ones(1)})


def test_attach_after_the_module_was_removed_or_changed(pool, monkeypatch):
    """What another process does while the arrays are written is not undone."""
    save, other = ocp.save_checkpointables, ModulePool(pool.path)

    def meanwhile(change):
        def slow(*args):
            monkeypatch.setattr(ocp, "save_checkpointables", save)
            change()
            save(*args)

        monkeypatch.setattr(ocp, "save_checkpointables", slow)

    meanwhile(lambda: other.attach("m", one={"x": np.ones(1)}))
    assert set(pool.attach("m", two={"x": np.ones(2)}).parts) == {"module", "head", "one", "two"}
    meanwhile(lambda: other.add("m", {"w": np.ones(9)}, base=BASE, adapter="full", overwrite=True))
    assert set(pool.attach("m", two={"x": np.ones(2)}).parts) == {"module", "two"}
    same(pool.load("m"), {"w": np.ones(9)})
    meanwhile(lambda: other.remove("m"))
    with pytest.raises(KeyError, match="no module 'm'"):
        pool.attach("m", two={"x": np.ones(2)})
    assert os.listdir(pool.path) == []


def test_a_reader_gets_the_new_part_where_the_old_one_went_away(pool, monkeypatch):
    load, other = ocp.load_checkpointables, ModulePool(pool.path)

    def slow(*args):
        monkeypatch.setattr(ocp, "load_checkpointables", load)
        other.add("m", {"w": np.ones(9)}, base=BASE, adapter="full", overwrite=True)
        return load(*args)

    monkeypatch.setattr(ocp, "load_checkpointables", slow)
    same(pool.load("m"), {"w": np.ones(9)})
    verify = storage.verify

    def gone(*args):
        monkeypatch.setattr(storage, "verify", verify)
        other.remove("m")
        verify(*args)

    monkeypatch.setattr(storage, "verify", gone)
    with pytest.raises(KeyError, match="no module 'm'"):
        pool.load("m")


def test_compose_says_that_a_module_was_replaced_by_one_of_another_base(pool, monkeypatch):
    base = {"w": np.zeros(6, np.float32)}
    pool.add("n", base, base=base, adapter="full")
    load = ModulePool.load

    def slow(self, name, part="module"):
        pool.add("n", base, base=BASE, adapter="full", overwrite=True)
        return load(self, name, part)

    monkeypatch.setattr(ModulePool, "load", slow)
    with pytest.raises(ValueError, match="'n' was replaced while it was read: read it again"):
        pool.compose(base, ["n"])


# -- curvature ---------------------------------------------------------------------------------------------------------


def test_curvature_comes_back_bit_for_bit(pool):
    diagonal, factors = fisher_diagonal(apply, PARAMS, IMAGES), kronecker(apply, PARAMS, IMAGES, tokens="reduce")
    with pytest.raises(KeyError, match=r"keeps no curvature: make it with `curvature.fisher_diagonal`.*attach\('m'"):
        pool.curvature("m")
    with pytest.raises(KeyError, match="keeps no curvature: make it"):
        pool.curvature("m", "kronecker")
    assert pool.attach("m", curvature=diagonal).curvature == {"diagonal": {"count": 5}}
    found = pool.curvature("m")
    assert isinstance(found, FisherDiagonal)
    same(found, diagonal)
    same(found.mean, diagonal.mean)
    with pytest.raises(KeyError, match="keeps no curvature 'kronecker': make it"):
        pool.curvature("m", "kronecker")
    pool.attach("m", curvature=factors)
    with pytest.raises(ValueError, match="of the kinds diagonal, kronecker: choose with `kind=`"):
        pool.curvature("m")
    with pytest.raises(ValueError, match="unknown kind of curvature 'hessian'; known are diagonal, kronecker"):
        pool.curvature("m", "hessian")
    again = ModulePool(pool.path).curvature("m", "kronecker")
    assert isinstance(again, Kronecker)
    same(again, factors)
    assert (again.layout, again.tokens) == (factors.layout, "reduce")
    same(again.solve(PARAMS, 0.1), factors.solve(PARAMS, 0.1))
    same(pool.curvature("m", kind="diagonal"), diagonal)
    assert pool.manifest("m").curvature["kronecker"]["count"] == 5
    same(pool.load("m"), MODULE)
    pool.add("m", MODULE, base=BASE, adapter="full", curvature=factors, overwrite=True)
    same(pool.curvature("m"), factors)
    assert pool.check() == {}


def test_curvature_of_other_dtypes_holes_and_certificates(pool):
    with jax.enable_x64(True):
        wide = FisherDiagonal(
            {"a": jnp.linspace(0, 1, 7, dtype=jnp.float64), "b": None, "c": [jnp.ones(2, jnp.bfloat16)]},
            jnp.array(2**40, jnp.int64),
            jnp.array(jnp.nan),
        )
    pool.add("m", {"a": np.ones(7), "c": [np.ones(2)]}, base=BASE, adapter="full", overwrite=True)
    pool.attach("m", curvature=wide)
    same(pool.curvature("m"), wide)
    assert pool.manifest("m").curvature == {"diagonal": {"count": 2**40}}


def test_curvature_of_stacked_layers_keeps_its_layout(pool):
    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    factors = kronecker(scanned, {"w": jax.random.normal(KEYS[0], (3, 4, 4))}, IMAGES)
    pool.add("m", {"w": np.ones((3, 4, 4))}, base=BASE, adapter="full", curvature=factors, overwrite=True)
    found = pool.curvature("m")
    same(found, factors)
    assert (hash(found.layout), found.layout[0][1].stack) == (hash(factors.layout), (3,))


def test_what_is_no_curvature_is_refused(pool):
    factors = kronecker(apply, PARAMS, IMAGES)
    with pytest.raises(TypeError):
        pool.attach("m", curvature=factors.eigen())
    odd = Kronecker(factors.inputs, {}, factors.count, factors.layout)
    with pytest.raises(ValueError, match="other layers than their layout, which is a/kernel, b/kernel"):
        pool.attach("m", curvature=odd)
    assert pool.manifest("m").curvature == {}


# -- sharding ----------------------------------------------------------------------------------------------------------

LARGE = {
    "layers": [{"w": np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)}, None],
    "half": np.asarray(jnp.linspace(0, 1, 64, dtype=jnp.bfloat16).reshape(8, 8)),
    "counts": np.arange(8, dtype=np.int32),
    "none": np.zeros((0, 8), np.float32),
}


def rows(path):
    devices = mesh.data_mesh()
    return mesh.split(devices, 1) if path == "layers/0/w" else mesh.replicated(devices)


SHARDINGS = {
    "one": lambda: mesh.replicated(mesh.data_mesh()),
    "four devices": lambda: mesh.split(mesh.data_mesh(4)),
    "function": lambda: rows,
    "tree": lambda: {
        "layers": [{"w": rows("layers/0/w")}, None],
        **dict.fromkeys(("half", "counts", "none"), rows("")),
    },
}


@pytest.mark.parametrize("kind", SHARDINGS)
def test_restored_onto_a_mesh(pool, kind):
    pool.add("large", LARGE, base=BASE, adapter="full", copy=LARGE)
    given = SHARDINGS[kind]()
    for part in ("module", "copy"):
        loaded = pool.load("large", part, sharding=given)
        same(loaded, LARGE)
        expected = rows if kind in ("function", "tree") else lambda path: given
        leaves = {"layers/0/w": loaded["layers"][0]["w"], "half": loaded["half"], "none": loaded["none"]}
        for path, leaf in leaves.items():
            assert isinstance(leaf, jax.Array)
            assert leaf.sharding == expected(path)


def test_no_device_gets_a_whole_array(pool):
    whole = {"w": np.random.default_rng(0).normal(size=(64, 31)).astype(np.float32)}
    pool.add("large", whole, base=BASE, adapter="full")
    before = {id(x) for x in jax.live_arrays()}
    loaded = pool.load("large", sharding=mesh.split(mesh.data_mesh()))["w"]
    assert [s.data.shape for s in loaded.addressable_shards] == [(8, 31)] * 8
    assert len({s.device for s in loaded.addressable_shards}) == 8
    for array in jax.live_arrays():
        if id(array) not in before:
            assert all(shard.data.size <= whole["w"].size // 8 for shard in array.addressable_shards)
    same({"w": loaded}, whole)


def test_sharded_arrays_are_verified(pool):
    pool.add("large", {"w": np.random.default_rng(0).normal(size=(512, 700)).astype("f")}, base=BASE, adapter="full")
    file = max((pool.path / "large").rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"module 'large' .*{file.name} is not as it was written"):
        pool.load("large", sharding=mesh.split(mesh.data_mesh()))


@pytest.mark.parametrize(
    ("sharding", "match"),
    [
        (lambda: mesh.split(mesh.data_mesh()), r"sharding of x/odd does not fit its shape \(9,\)"),
        (lambda: lambda path: None, "sharding of x/even is None: make one with `compo_jax.mesh`"),
        (lambda: {"x": {"even": rows("")}}, "there is no sharding for x/odd"),
    ],
)
def test_shardings_that_do_not_fit(pool, sharding, match):
    pool.add("n", {"x": {"odd": np.ones(9, np.float32), "even": np.ones(8, np.float32)}}, base=BASE, adapter="full")
    with pytest.raises(ValueError, match=match):
        pool.load("n", sharding=sharding())


def test_64_bits_are_not_rounded_in_silence(pool):
    for context in (False, True):
        with (
            jax.enable_x64(context),
            pytest.raises(ValueError, match=r"a/kernel is float64, which JAX rounded to float32: call `jax.config"),
        ):
            pool.load("m", sharding=rows(""))
    jax.config.update("jax_enable_x64", True)
    try:
        same(pool.load("m", sharding=rows("")), MODULE)
    finally:
        jax.config.update("jax_enable_x64", False)
