"""Files of a pool and of checkpoints that are damaged in every way: nothing is loaded with other numbers in silence.

COMPO_JAX_DAMAGES=1000 damages 1000 files.
"""

import os
import random
import warnings
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pool import same

from compo_jax.curvature import FisherDiagonal, kronecker
from compo_jax.pool import ModulePool
from compo_jax.train import Checkpoints

DAMAGES = int(os.environ.get("COMPO_JAX_DAMAGES", "24"))
BASE = {"a": {"kernel": jnp.ones((16, 12))}, "b": {"kernel": jnp.ones((12, 8))}}
IMAGES = jax.random.normal(jax.random.key(0), (5, 16))
FOREIGN = (b"", b"years of work\n", b'{"a": 1}', b"[]", b"\x89PNG\r\n\x1a\n" + bytes(200), bytes(1000))


def values(seed, like=BASE):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), like)


def factors(seed):
    apply = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    return kronecker(apply, values(seed), IMAGES)


def parts(seed):
    """What is kept of a module, by the name that it is loaded by."""
    diagonal = FisherDiagonal(jax.tree.map(np.abs, values(seed + 1)), np.int32(seed), np.float32(1))
    return {"module": values(seed), "head": values(seed + 2), "diagonal": diagonal, "kronecker": factors(seed)}


def make(folder):
    pool = ModulePool(folder / "pool")
    for name, seed in (("m", 1), ("other", 11)):
        kept = parts(seed)
        pool.add(name, kept["module"], base=BASE, adapter="full", head=kept["head"], curvature=kept["diagonal"])
        pool.attach(name, curvature=kept["kronecker"])
    checkpoints = Checkpoints(folder / "checkpoints")
    for number in (5, 9):
        checkpoints.save(number, {"state": values(number), "position": np.array(number)})


def files(folder, pattern):
    return sorted(file for file in folder.glob(pattern) if file.is_file() and file.name != ".lock")


def load_module(folder, kept):
    """Whether damage was found; AssertionError where something else than what was stored is loaded."""
    pool, found = ModulePool(folder / "pool"), False
    if not (pool.path / "m" / "manifest.json").exists():  # then it is no module, and told so
        assert pool.names() == ["other"]
        with pytest.raises(KeyError):
            pool.load("m")
        assert "m" in pool.check()
        return True
    assert pool.names() == ["m", "other"]
    for name, value in kept.items():
        try:
            loaded = pool.curvature("m", name) if name in ("diagonal", "kronecker") else pool.load("m", name)
        except ValueError:
            found = True
            continue
        same(loaded, value)
    assert list(pool.check()) in (["m"], ["m"] if found else [])
    assert pool.check(["other"]) == {}
    return found


def load_checkpoint(folder, kept):
    like = {"state": values(0), "position": np.array(0)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = Checkpoints(folder / "checkpoints").load(like)  # an older one is whole
    told = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    number = 5 if told else 9
    assert not told or told[0].startswith("checkpoint 9 in ")
    assert loaded["position"] == number
    same(loaded["state"], values(number))
    return bool(told)


KINDS = ("truncated", "flipped", "swapped", "foreign", "removed")
# what is damaged: the files, those that one may be swapped with, how it is loaded
THINGS = {
    "module": ("pool/m/module.*/**/*", "pool/*/*/**/*", load_module),
    "curvature": ("pool/m/curvature.*/**/*", "pool/*/*/**/*", load_module),
    "manifest": ("pool/m/manifest.json", "pool/other/manifest.json", load_module),
    "checkpoint": ("checkpoints/9/**/*", "checkpoints/*/**/*", load_checkpoint),
}


def damaged(kind, data, other, choose):
    """The bytes of a damaged file; None where it is removed."""
    at = choose.randrange(max(len(data), 1))
    if kind == "truncated":
        return data[:at]
    if kind == "flipped":
        return data[:at] + bytes([data[at] ^ 1 << choose.randrange(8)]) + data[at + 1 :]
    return {"swapped": other, "foreign": choose.choice(FOREIGN), "removed": None}[kind]


def test_nothing_damaged_is_loaded_in_silence(tmp_path):
    make(tmp_path)
    kept, choose, counts = parts(1), random.Random(0), Counter()
    for i in range(DAMAGES):
        thing, kind = list(THINGS)[i % len(THINGS)], KINDS[i // len(THINGS) % len(KINDS)]
        mine, others, load = THINGS[thing]
        file = choose.choice([f for f in files(tmp_path, mine) if f.stat().st_size or kind in ("foreign", "removed")])
        other = choose.choice([f for f in files(tmp_path, others) if f != file])
        data = file.read_bytes()
        changed = damaged(kind, data, other.read_bytes(), choose)
        if changed is None:
            file.unlink()
        else:
            file.write_bytes(changed)
        try:
            found = load(tmp_path, kept)
        except Exception as error:
            pytest.fail(f"{kind} {file.relative_to(tmp_path)} (number {i}): {type(error).__name__}: {error}")
        counts[thing, kind, "found" if found else "harmless"] += 1
        file.write_bytes(data)
    for thing in THINGS:
        told = [f"{n} {kind} {how}" for (what, kind, how), n in sorted(counts.items()) if what == thing]
        print(f"{thing}: {', '.join(told)}; 0 silently wrong")
    assert not load_module(tmp_path, kept)
    assert not load_checkpoint(tmp_path, kept)
    assert sum(n for (*_, how), n in counts.items() if how == "found") > DAMAGES / 2
