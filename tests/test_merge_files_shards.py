"""Files of a merge: checkpoints in several files, in and out, other types, room on the disk, progress, a model card."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from test_merge_files import floats, refused, same_bits, written

from compo_jax.compose import merge, merge_files, task_vector

INDEX = "model.safetensors.index.json"


def cut(file, folder, parts=2):
    """The checkpoint in several files with an index."""
    arrays, places = load_file(file), {}
    folder.mkdir()
    for part in range(parts):
        mine = {name: x for i, (name, x) in enumerate(arrays.items()) if i % parts == part}
        save_file(mine, folder / f"model-{part}.safetensors", {"format": "pt", "heads": "3"})
        places |= dict.fromkeys(mine, f"model-{part}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def test_checkpoints_in_several_files_are_read_by_folder_or_index(tmp_path):
    base, models = written(tmp_path)
    merge_files("ties", models, tmp_path / "one.safetensors", base=base)
    (tmp_path / "whole").mkdir()
    shutil.copy(models[1], tmp_path / "whole" / "model.safetensors")
    several = [cut(models[0], tmp_path / "a"), tmp_path / "whole", cut(models[2], tmp_path / "c", 3) / INDEX]
    merge_files("ties", several, tmp_path / "two.safetensors", base=cut(base, tmp_path / "b"))
    same_bits(load_file(tmp_path / "two.safetensors"), load_file(tmp_path / "one.safetensors"))


def test_the_result_is_cut_in_files_of_at_most_a_size(tmp_path):
    base, models = written(tmp_path)
    merge_files("average", models, tmp_path / "one.safetensors", base=base)
    merge_files("average", models, tmp_path / "out", base=base, max_shard_size=5000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    whole, files = load_file(tmp_path / "one.safetensors"), sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values())) and len(files) == 3
    parts = [load_file(file) for file in files]
    assert all(sum(x.nbytes for x in part.values()) <= 5000 or len(part) == 1 for part in parts)
    same_bits({name: x for part in parts for name, x in part.items()}, whole)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    merge_files("average", [tmp_path / "out"], tmp_path / "again.safetensors", base=tmp_path / "out")
    same_bits(load_file(tmp_path / "again.safetensors"), whole)
    call = lambda: merge_files("average", models, tmp_path / "out", base=base, max_shard_size=5000)
    refused(tmp_path, "out is there already: .* a new folder", call)


@pytest.mark.parametrize("rule", ["average", "ties"])
@pytest.mark.parametrize("kind", [(jnp.bfloat16, "float32"), (np.float32, "float16"), (jnp.bfloat16, "float16")])
def test_another_type_is_computed_wide_and_rounded_once(kind, rule, tmp_path):
    stored, dtype = kind
    base, models = written(tmp_path, dtype=stored)
    merge_files(rule, models, tmp_path / "out", base=base, dtype=dtype)
    wide = lambda file: {name: x.astype(np.float32) for name, x in floats(file).items()}
    start = wide(base)
    expected = merge(rule, start, [task_vector(wide(m), start) for m in models])
    same_bits(floats(tmp_path / "out"), {n: np.asarray(x).astype(jnp.dtype(dtype)) for n, x in expected.items()})
    assert load_file(tmp_path / "out")["steps"].dtype == np.int64


def test_numbers_that_a_type_does_not_hold_are_told(tmp_path):
    save_file({"w": np.array([1.0, 1e6], np.float32)}, tmp_path / "a")
    call = lambda **options: merge_files("average", [tmp_path / "a"], tmp_path / "out", dtype="float16", **options)
    refused(tmp_path, "numbers too large for float16 come out in w: take a wider dtype", call)
    call(check_finite=False)
    assert np.isinf(load_file(tmp_path / "out")["w"][1])


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    base, models = written(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4000))
    calls = []
    call = lambda: merge_files("average", models, tmp_path / "out", base=base, progress=lambda *x: calls.append(x))
    refused(tmp_path, "it takes 0.00 GB, and its disk has 0.00 GB left", call, OSError)
    assert not calls


def test_an_error_within_leaves_no_folder(tmp_path):
    base, models = written(tmp_path)
    bad = load_file(models[2])
    bad["t"][0, 0, 0, 0] = np.nan
    save_file(bad, models[2])
    call = lambda: merge_files("average", models, tmp_path / "out", base=base, max_shard_size=100, card=tmp_path / "c")
    refused(tmp_path, "NaN or infinite numbers in t", call)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_index_without_its_files_is_told(tmp_path):
    _, models = written(tmp_path)
    folder = cut(models[0], tmp_path / "a")
    (folder / "model-1.safetensors").unlink()
    out = tmp_path / "out"
    refused(
        tmp_path, "lists model-1.safetensors, not beside it", lambda: merge_files("average", [folder], out), OSError
    )
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "holds neither model.safetensors nor", lambda: merge_files("average", [tmp_path / "empty"], out))


def test_progress_and_card(tmp_path):
    base, models = written(tmp_path)
    out, seen = tmp_path / "out.safetensors", []
    options = {"weights": [0.25, 0.5, 0.25], "rate": 0.5, "key": jax.random.key(3)}
    progress = lambda done, total: seen.append((done, total))
    merge_files("dare", models, out, base=base, progress=progress, card=tmp_path / "README.md", **options)
    size = sum(x.nbytes for x in load_file(out).values())
    assert seen[-1] == (size, size) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    head, body = (tmp_path / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    head = yaml.safe_load(head)
    assert head["library_name"] == "compo_jax" and "merge" in head["tags"]
    assert "base_model" not in head and str(tmp_path) not in head  # which are names on the hub
    assert "| dare | 6 | weights = [0.25, 0.5, 0.25], rate = 0.5, key = of [0, 3] |" in body
    for role, file, weight in (("base", base, ""), ("model 1", models[1], "0.5")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert f"| {role} | {file.name} | {weight} | `{digest}` |" in body


def test_a_card_of_models_from_the_hub_names_them(tmp_path):
    folder = tmp_path / "models--owner--a-vit" / "snapshots" / "0"
    folder.mkdir(parents=True)
    _, models = written(folder)
    merge_files("average", models, tmp_path / "out", card=tmp_path / "card.md")
    head = yaml.safe_load((tmp_path / "card.md").read_text().split("---\n")[1])
    assert head["base_model"] == ["owner/a-vit"]


def test_what_is_merged_is_never_written_over(tmp_path):
    base, models = written(tmp_path)
    folder = cut(models[1], tmp_path / "b")
    (tmp_path / "link").symlink_to(models[0])
    kept = {file: file.read_bytes() for file in (base, models[0], folder / "model-1.safetensors")}
    for out in (*kept, tmp_path / "link", tmp_path / "b" / ".." / models[0].name):
        with pytest.raises(ValueError, match="is a part of one of the checkpoints that are merged"):
            merge_files("ties", [models[0], folder], out, base=base)
    assert all(file.read_bytes() == content for file, content in kept.items())


def test_a_tensor_is_read_from_the_file_that_the_index_names(tmp_path):
    """As where a new shard was put beside older ones."""
    _, models = written(tmp_path)
    folder = cut(models[0], tmp_path / "a")
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    name, file = next((name, file) for name, file in index.items() if file == "model-1.safetensors" and name != "steps")
    other = next(folder / other for other in index.values() if other != file)
    right = load_file(folder / file)[name]
    save_file(load_file(other) | {name: right + 9}, other)
    merge_files("average", [folder, folder], tmp_path / "out")
    np.testing.assert_array_equal(load_file(tmp_path / "out")[name], right)

    rest = load_file(folder / file)
    del rest[name]
    save_file(rest, folder / file)
    again = lambda: merge_files("average", [folder], tmp_path / "again")
    refused(tmp_path, f"its index names files that lack {name}", again)


def test_bad_places_and_types_are_told(tmp_path):
    base, models = written(tmp_path)
    out = tmp_path / "out"
    for match, options, error in (
        ("dtype='int8' is none of float32, float16, bfloat16", {"dtype": "int8"}, ValueError),
        ("no folder .*nowhere", {"card": tmp_path / "nowhere" / "c"}, FileNotFoundError),
        ("is a folder: give the card's file", {"card": tmp_path}, ValueError),
        ("is the checkpoint: give the card's file", {"card": out}, ValueError),
        ("max_shard_size is the most bytes", {"max_shard_size": 0}, ValueError),
    ):
        refused(
            tmp_path, match, lambda options=options: merge_files("average", models, out, base=base, **options), error
        )
