"""Merging from file to file: bit by bit what the rule makes in memory, or nothing."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from cases import normal
from safetensors.numpy import load_file, save_file

from compo_jax.compose import RULES, entries, merge, merge_files, task_vector

SHAPES = {
    "blocks.0.w": (40, 50),
    "blocks.0.b": (50,),
    "head": (30, 7),
    "scalar": (),
    "empty": (0, 3),
    "t": (2, 3, 4, 5),
}
OPTIONS = {
    "average": {"weights": [0.2, 0.5, 0.3]},
    "ties": {"density": 0.3, "scale": 0.7},
    "dare": {"key": jax.random.key(3), "rate": 0.4, "rule": "ties"},
    "karcher": {"weights": [1.0, 2.0, 3.0]},
    "slerp": {"t": 0.3},
    "della": {"key": jax.random.key(4), "rule": "ties", "density": 0.8},
    "lines": {"beta": 0.5, "when": "before", "rule": "ties"},
}
SINGULAR = ("tsv", "iso", "wudi", "iso_cts", "dc_merge", "cart")
LEAFWISE = [name for name, rule in RULES.items() if rule.leafwise and set(rule.needs) <= {"key"}]


def checkpoint(seed, dtype=np.float32, start=None, names=tuple(SHAPES)):
    made = {n: np.asarray(normal((seed, i), *SHAPES[n])).astype(dtype) for i, n in enumerate(names)}
    made = made if start is None else {n: np.asarray(start[n] + made[n] / 8).astype(dtype) for n in made}
    return made | {"steps": np.arange(5)}


def written(folder, count=3, dtype=np.float32, names=tuple(SHAPES)):
    """(the base's file, the models' files)."""
    start = checkpoint(0, dtype, names=names)
    files = [folder / f"{name}.safetensors" for name in ("base", *range(count))]
    save_file(start, files[0], {"format": "pt", "heads": "3"})
    for t, file in enumerate(files[1:]):
        save_file(checkpoint(t + 1, dtype, start, names), file, {"format": "pt", "mine": str(t)})
    return files[0], files[1:]


def floats(file):
    """What is merged of a checkpoint."""
    return {name: x for name, x in load_file(file).items() if name != "steps"}


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        x = np.asarray(x)
        assert found[name].dtype == x.dtype and found[name].shape == x.shape
        assert found[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("rule", LEAFWISE)
def test_a_file_is_what_the_rule_makes_in_memory(rule, tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "PIECE", 256)  # so that leaves are of several pieces, the last one not whole
    # each shape of a matrix is a program of its own to those of singular vectors
    names = ("blocks.0.b", "head") if rule in SINGULAR else tuple(SHAPES)
    base, models = written(tmp_path, 2 if rule == "slerp" else 3, names=names)
    out, options = tmp_path / "out.safetensors", OPTIONS.get(rule, {})
    merge_files(rule, models, out, base=base, **options)
    start = floats(base)
    expected = merge(rule, start, [task_vector(floats(m), start) for m in models], **options)
    same_bits(load_file(out), expected | {"steps": np.arange(5)})
    with safetensors.safe_open(out, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "heads": "3"}
    assert len(os.listdir(tmp_path)) == len(models) + 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("rule", ["average", "ties", "model_stock"])
def test_types_stay(rule, dtype, tmp_path):
    base, models = written(tmp_path, dtype=dtype)
    merge_files(rule, map_to_text(models), str(tmp_path / "out.safetensors"), base=str(base))
    with jax.enable_x64(dtype == np.float64):
        start = floats(base)
        expected = merge(rule, start, [task_vector(floats(m), start) for m in models])
    assert all(x.dtype == dtype for x in jax.tree.leaves(expected))
    same_bits(floats(tmp_path / "out.safetensors"), expected)


def map_to_text(paths):
    return [str(path) for path in paths]


@pytest.mark.parametrize("rule", ["average", "slerp", "karcher"])
def test_without_a_base_the_parameters_are_merged(rule, tmp_path):
    _, models = written(tmp_path, 2)
    merge_files(rule, models, tmp_path / "out.safetensors")
    first, second = map(floats, models)
    zeros = jax.tree.map(np.zeros_like, first)
    same_bits(floats(tmp_path / "out.safetensors"), merge(rule, zeros, [first, second]))
    if rule == "average":
        for name, x in floats(tmp_path / "out.safetensors").items():
            np.testing.assert_allclose(x, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)


def test_a_leaf_of_several_pieces_is_read_piece_by_piece(tmp_path):
    """A leaf larger than a piece, in a file whose header puts it anywhere."""
    start = {"w": normal(0, 300, 301).astype(np.float32), "odd": np.ones(3, np.uint8)}
    models = [start | {"w": start["w"] + normal(t, 300, 301).astype(np.float32) / 9} for t in (1, 2)]
    for name, tree in zip(("base", "a", "b"), [start, *models], strict=True):
        save_file(tree, tmp_path / name)
    for rule, options in {"ties": {}, "dare": {"key": jax.random.key(1)}, "average": {}}.items():
        merge_files(rule, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", base=tmp_path / "base", **options)
        deltas = [{"w": model["w"] - start["w"]} for model in models]
        same_bits(load_file(tmp_path / "out"), start | merge(rule, {"w": start["w"]}, deltas, **options))


def refused(tmp_path, match, call, error=ValueError):
    """The error, and nothing is written: neither the file nor half of it."""
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(error, match=match):
        call()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_checkpoints_that_differ_are_told_with_all_differences(tmp_path):
    base, models = written(tmp_path)
    other = load_file(models[1])
    other |= {"more": other.pop("scalar"), "head": other["head"].T.copy(), "steps": np.arange(5) + 1}
    other["t"] = other["t"].astype(np.float16)
    save_file(other, models[1])
    lacks = load_file(models[2])
    del lacks["blocks.0.b"]
    save_file(lacks, models[2])
    with pytest.raises(ValueError, match="the checkpoints don't fit together") as told:
        merge_files("ties", models, tmp_path / "out.safetensors", base=base)
    for part in (
        r"1.safetensors lacks scalar",
        r"1.safetensors has more, and",
        "head is F32 (7, 30) in",
        "and F32 (30, 7) in",
        "t is F16 (2, 3, 4, 5) in",
        "steps, of type I64, isn't merged and differs in",
        "2.safetensors lacks blocks.0.b",
    ):
        assert part in str(told.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_that_was_cut_short_is_told(length, tmp_path):
    base, models = written(tmp_path)
    models[1].write_bytes(models[1].read_bytes()[:length])
    refused(
        tmp_path,
        "1.safetensors is no complete safetensors file",
        lambda: merge_files("average", models, tmp_path / "out", base=base),
    )


def test_a_bad_number_is_named_and_leaves_the_old_file(tmp_path):
    base, models = written(tmp_path)
    bad = load_file(models[1])
    bad["head"][3, 2] = np.nan
    save_file(bad, models[1])
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"of before")
    for rule in ("average", "ties", "karcher", "model_stock"):
        call = lambda rule=rule, **options: merge_files(rule, models, out, base=base, **options)
        refused(tmp_path, "1.safetensors holds NaN or infinite numbers in head: .*check_finite=False", call)
    merge_files("average", models, out, base=base, check_finite=False)
    assert np.isnan(load_file(out)["head"][3, 2]) and np.isfinite(load_file(out)["t"]).all()
    save_file({"w": np.full(3, 6e4, np.float16)}, models[0])
    save_file({"w": np.full(3, -6e4, np.float16)}, base)
    call = lambda: merge_files("average", models[:1], out, base=base)
    with pytest.raises(ValueError, match="holds NaN or infinite|too large for their type"):
        call()


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    base, models = written(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    refused(
        tmp_path,
        "out is not written .No space left",
        lambda: merge_files("average", models, tmp_path / "out", base=base),
        OSError,
    )


def test_bad_input_is_told(tmp_path):
    base, models = written(tmp_path)
    out = tmp_path / "out"
    table = [
        (
            "'ggn' takes all leaves at once, and needs matvecs .*average, task_",
            lambda: merge_files("ggn", models, out),
        ),
        ("unknown rule 'mean'", lambda: merge_files("mean", models, out)),
        ("'ggn' takes all", lambda: merge_files("dare", models, out, base=base, rule="ggn")),
        ("'ties' merges differences from a base: say base=", lambda: merge_files("ties", models, out)),
        ("paths are the checkpoints", lambda: merge_files("average", [], out)),
        ("paths are the checkpoints", lambda: merge_files("average", str(models[0]), out)),
        ("is a folder: give the name", lambda: merge_files("average", models, tmp_path)),
        ("needs key", lambda: merge_files("dare", models, out, base=base)),
        ("has no option color", lambda: merge_files("average", models, out, color=1)),
        ("1 weights were given for 3", lambda: merge_files("average", models, out, weights=[1.0])),
        ("slerp is of two", lambda: merge_files("slerp", models, out)),
        ("is an address", lambda: merge_files("average", models, "gs://there/out")),
    ]
    for match, call in table:
        refused(tmp_path, match, call)
    for match, call in [
        ("no checkpoint file .*none", lambda: merge_files("average", [tmp_path / "none"], out)),
        ("no folder .*nowhere", lambda: merge_files("average", models, tmp_path / "nowhere" / "out")),
    ]:
        refused(tmp_path, match, call, FileNotFoundError)


def test_the_header_is_one_that_the_library_writes(tmp_path):
    base, _ = written(tmp_path)
    merge_files("average", [base], tmp_path / "out")
    header = (tmp_path / "out").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert length % 8 == 0 and json.loads(header[8 : 8 + length])["steps"]["dtype"] == "I64"
    same_bits(load_file(tmp_path / "out"), load_file(base))


def test_a_pipe_is_not_replaced(tmp_path):
    base, models = written(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for out, card in ((tmp_path / "pipe", None), (tmp_path / "out.safetensors", tmp_path / "pipe")):
        with pytest.raises(ValueError, match="pipe is no ordinary file, and one would be put in its place"):
            merge_files("average", models, out, base=base, card=card)
    assert (tmp_path / "pipe").is_fifo() and not (tmp_path / "out.safetensors").exists()
