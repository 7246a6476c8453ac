"""Checkpoints as files and folders: what is written and read, and what is told of those that can't be."""

import importlib
import json
import sys

import jax
import jax.numpy as jnp
import jobs
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from vit_arrays import HEADS, random_arrays, random_images

from compo_jax import tree
from compo_jax.models import Pixels, ViT, backbone, from_timm, load, save, to_augreg, to_openai_clip
from compo_jax.models.transformer import ACTIVATIONS


def test_save_and_load(tmp_path):
    path = tmp_path / "vit.safetensors"
    params = from_timm(random_arrays(), heads=HEADS)[1]
    save(path, params, {"heads": HEADS, "note": "tiny"}, dtype=np.float32)
    model, loaded = load(path)
    assert model.heads == HEADS
    assert tree.fingerprint(loaded) == tree.fingerprint(params)
    assert load(path, heads=4)[0].heads == 4
    assert load(path, image_size=20)[0].image_size == 20
    assert load(path, dtype=jnp.bfloat16)[0].dtype == jnp.bfloat16
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"heads": "3", "note": "tiny"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["vit.safetensors"]


KINDS = {  # what no array tells
    "of OpenAI's CLIP": {"activation": "quick_gelu", "epsilon": 1e-5, "pre_norm": True, "projection": 7},
    "of LAION's CLIP": {"activation": "gelu", "epsilon": 1e-5, "pre_norm": True},
    "tanh and the mean": {"activation": "gelu_tanh", "epsilon": 1e-12, "pool": "mean"},
    "class token and mean, no head": {"epsilon": 3e-7, "pool": "class_and_mean"},
    "mean of no class token": {"class_token": False, "pool": "mean", "activation": "quick_gelu"},
    "a norm of the mean": {"pool": "mean_then_norm", "epsilon": 1e-3},
    "an attention pool": {"class_token": False, "pool": "attention", "activation": "gelu_tanh"},
    "DeiT III with a head": {"class_position": False, "layer_scale": True, "classes": 3, "registers": 2},
    "CLIP, its patches' mean": {"pre_norm": True, "projection": 5, "pool": "mean", "epsilon": 1e-4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_with_what_no_array_tells(tmp_path, kind):
    model = ViT(12, 4, 24, 2, HEADS, 2.0, **KINDS[kind])
    images = jnp.asarray(random_images())
    params = model.init(jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: x + 0.3 * np.random.default_rng(1).normal(size=x.shape).astype(x.dtype), params)
    save(tmp_path / "vit.safetensors", params, {"note": "tiny"}, np.float32, model=model)
    again, loaded = load(tmp_path / "vit.safetensors")
    assert again == model
    assert tree.fingerprint(loaded) == tree.fingerprint(params)
    np.testing.assert_array_equal(again.apply({"params": loaded}, images), model.apply({"params": params}, images))


def test_what_a_file_says_stands_before_its_folder_and_behind_what_is_asked_for(tmp_path):
    model = ViT(12, 4, 24, 2, HEADS, 2.0, activation="quick_gelu", epsilon=1e-5)
    params = model.init(jax.random.key(0), jnp.asarray(random_images()))["params"]
    path = tmp_path / "model.safetensors"
    save(path, params, dtype=np.float32, model=model)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert load(tmp_path)[0] == load(path)[0] == backbone(path).model == model
    assert load(tmp_path, activation="gelu_tanh")[0].activation == "gelu_tanh"
    assert backbone(path, activation="gelu").model.activation == "gelu"
    for key, value in (("activation", "relu"), ("epsilon", "small"), ("pool", "max")):
        save(path, params, {key: value}, np.float32, model=model)
        with pytest.raises(ValueError, match=rf"s: the metadata's {key} is '{value}', .*write the file again"):
            load(path)


def test_a_clip_in_a_file_alone_has_the_activation_that_is_asked_for(tmp_path):
    model = ViT(12, 4, 24, 2, HEADS, 2.0, pre_norm=True, projection=7, epsilon=1e-5)
    params = model.init(jax.random.key(0), jnp.asarray(random_images()))["params"]
    path = tmp_path / "open_clip_model.safetensors"
    safetensors.numpy.save_file({k: np.ascontiguousarray(x) for k, x in to_openai_clip(params).items()}, path)
    assert backbone(path, heads=HEADS).model.activation == "quick_gelu"
    made = backbone(path, heads=HEADS, activation="gelu")
    assert made.model == model
    with pytest.raises(
        ValueError, match=r"model\.safetensors: no activation is called 'relu'; there are gelu, quick_gelu, gelu_tanh"
    ):
        backbone(path, heads=HEADS, activation="relu")


@pytest.mark.parametrize("dtype, error", [(np.float16, 2**-11), (ml_dtypes.bfloat16, 2**-8)])
def test_save_rounds_to_16_bits(tmp_path, dtype, error):
    params = from_timm(random_arrays(), heads=HEADS)[1]
    save(tmp_path / "vit.safetensors", params, dtype=dtype)
    stored = safetensors.numpy.load_file(tmp_path / "vit.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(dtype)}
    _, loaded = load(tmp_path / "vit.safetensors", heads=HEADS)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=error, atol=1e-7)


def test_what_no_layout_holds_is_told(tmp_path):
    model = ViT(image_size=8, patch=4, width=16, depth=1, heads=2, classes=3, pre_norm=True, projection=8, unit=True)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    with pytest.raises(ValueError, match="no layout of files has both a projection and a head"):
        save(tmp_path / "clip.safetensors", params, model=model)


def test_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "vit.safetensors"
    params = from_timm(random_arrays(), heads=HEADS)[1]
    save(path, params, {"heads": HEADS})
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"^norm\.bias: values beyond the range of float16; save with dtype=np.float32"
    ):
        save(path, params | {"norm": {"bias": np.full(24, 1e6, np.float32)}})

    def half_written(arrays, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        save(path, params)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_load_says_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*nowhere\.safetensors"):
        load(tmp_path / "nowhere.safetensors")
    whole = safetensors.numpy.save(random_arrays())
    path = tmp_path / "vit.safetensors"
    for content in (
        whole[:-3],
        whole[:100],
        whole[:4],
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"vit\.safetensors is no complete safetensors file .*download it again"):
            load(path)
    pickled = tmp_path / "pytorch_model.bin"
    pickled.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"PyTorch pickle.*torch\.load\('pytorch_model\.bin', weights_only=True\)"):
        load(pickled)


def folder(path, shards=1, **config):
    """A checkpoint's folder as timm's hub has it; the arrays that it holds."""
    arrays = random_arrays()
    path.mkdir()
    if config:
        (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(arrays, path / "model.safetensors")
        return arrays
    names, index = list(arrays), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        safetensors.numpy.save_file({name: arrays[name] for name in names[i::shards]}, path / file)
        index |= dict.fromkeys(names[i::shards], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return arrays


TINY = {"architecture": "vit_tiny_patch4_12", "model_args": {"num_heads": 3}}


def test_a_tensor_is_read_from_the_file_that_the_index_names(tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "parts"
    for place, shards in ((whole, 1), (path, 3)):
        folder(place, shards, **TINY)
    weights = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    name, file = next((name, file) for name, file in weights.items() if file.startswith("model-00001"))
    other = path / next(other for other in weights.values() if other != file and other > file)
    arrays = safetensors.numpy.load_file(other)
    stale = safetensors.numpy.load_file(path / file)[name] + 1
    safetensors.numpy.save_file(arrays | {name: stale}, other)
    jax.tree.map(np.testing.assert_array_equal, load(path)[1], load(whole)[1])
    mine = safetensors.numpy.load_file(path / file)
    del mine[name]
    safetensors.numpy.save_file(mine, path / file)
    with pytest.raises(ValueError, match=f"says that {file} holds {name}, which it lacks"):
        load(path)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_says_heads_and_pixels(tmp_path, shards):
    described = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    arrays = folder(tmp_path / "tiny", shards, **TINY, **described)
    made = backbone(tmp_path / "tiny", image_size=20)
    assert (made.model.heads, made.model.image_size, made.model.classes) == (3, 20, 0)
    assert made.description == "tiny"
    assert made.pixels == Pixels((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    np.testing.assert_array_equal(made.params["cls"], arrays["cls_token"])
    assert "head" not in made.params


def test_pixels_are_of_the_preprocessor_or_not_known(tmp_path):
    folder(tmp_path / "tiny", **TINY)
    assert backbone(tmp_path / "tiny").pixels is None
    preprocessor = tmp_path / "tiny" / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.4], "image_std": [0.3, 0.2, 0.2]}))
    assert backbone(tmp_path / "tiny").pixels == Pixels((0.5, 0.5, 0.4), (0.3, 0.2, 0.2))
    preprocessor.write_text(json.dumps({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.3] * 3}))
    assert backbone(tmp_path / "tiny").pixels == Pixels((0, 0, 0), (1, 1, 1))
    assert backbone().pixels is None


def test_an_experiment_prepares_images_as_the_backbone_was_trained(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(jobs.ROOT / "experiments")
    experiment = importlib.import_module("incremental")
    sizes = ["--tasks", "2", "--classes", "2", "--images", "2", "--batch", "2"]
    assert experiment.setup(experiment.parse(sizes))[0].stream.mean == (0.5, 0.5, 0.5)
    folder(tmp_path / "tiny", **TINY, pretrained_cfg={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    learned, described = experiment.setup(experiment.parse([*sizes, "--backbone", str(tmp_path / "tiny")]))
    assert (learned.stream.mean, learned.stream.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (learned.stream.size, described) == (12, "tiny")


def test_a_command_line_names_the_activation_of_a_file(monkeypatch, capsys):
    monkeypatch.syspath_prepend(jobs.ROOT / "experiments")
    options, experiment = (importlib.import_module(name) for name in ("incremental_options", "incremental"))
    assert tuple(ACTIVATIONS) == options.ACTIVATIONS
    asked = experiment.parse(["--backbone", "clip.safetensors", "--activation", "gelu"])
    assert asked.backbone.activation == "gelu"
    with pytest.raises(ValueError, match="--activation plays no part without --backbone"):
        experiment.parse(["--activation", "gelu"])
    with pytest.raises(SystemExit):
        experiment.parse(["--backbone", "clip.safetensors", "--activation", "relu"])
    assert "'relu' is none of gelu, quick_gelu," in " ".join(capsys.readouterr().err.split())


def test_an_index_of_several_files_is_a_checkpoint(tmp_path):
    arrays = folder(tmp_path / "tiny", 3)
    index = tmp_path / "tiny" / "model.safetensors.index.json"
    assert tree.fingerprint(load(index, heads=HEADS)[1]) == tree.fingerprint(from_timm(arrays, heads=HEADS)[1])
    one = tmp_path / "tiny" / "model-00001-of-00003.safetensors"
    with pytest.raises(
        ValueError, match=r"00001-of-00003\.safetensors is one of a checkpoint's several files: give the"
    ):
        load(one, heads=HEADS)
    one.unlink()
    with pytest.raises(FileNotFoundError, match=r"lists model-00001-of-00003\.safetensors, not beside it: bring all"):
        load(index)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match=r"index\.json lists no files"):
        load(index)


def test_folders_that_are_no_checkpoints_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(tmp_path)
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin"):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(
            ValueError, match=r"pytorch_model\*\.bin is a PyTorch pickle.*safetensors\.torch\.save_file"
        ):
            load(tmp_path)
        (tmp_path / name).unlink()
    folder(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare has no config\.json, .*give the \.safetensors file itself"):
        load(tmp_path / "bare")
    for config, told in (
        ({"model_type": "beit"}, "its model_type is 'beit', which isn't read: vit, dinov2, "),
        ({"model_type": "vit", "hidden_act": "relu"}, "its activation is 'relu', which ViT hasn't: gelu, "),
        ({"name": "mine"}, r"names neither a model_type \(Hugging Face\) nor an architecture"),
        ({"model_type": "vit"}, "no name is of the layout 'vit'"),
    ):
        (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"bare: (.|\n)*{told}"):
            load(tmp_path / "bare")
    resnet = {name: np.ones(2, np.float32) for name in ("conv1.weight", "bn1.bias", "fc.bias")}
    safetensors.numpy.save_file(resnet, tmp_path / "bare" / "model.safetensors")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(
        ValueError, match=r"^\S*bare: none of the 3 arrays \(\S+, \S+, \S+\) is called as those of a ViT"
    ):
        load(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON .*: bring it again"):
        load(tmp_path / "bare")


def test_an_npz_file_of_augreg_tells_its_heads(tmp_path):
    params = from_timm(random_arrays(), heads=HEADS)[1]
    arrays = to_augreg(params, heads=HEADS)
    np.savez(tmp_path / "S_4.npz", **arrays)
    model, loaded = load(tmp_path / "S_4.npz")
    assert model.heads == HEADS
    assert tree.fingerprint(loaded) == tree.fingerprint(params)
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}  # stored as bytes of no type
    np.savez(tmp_path / "half.npz", **half)
    np.testing.assert_array_equal(load(tmp_path / "half.npz")[1]["cls"], half["cls"].astype(np.float32))
    for content in ((tmp_path / "S_4.npz").read_bytes()[:5000], b"", b"PK"):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"cut\.npz is no whole \.npz file .*: download it again"):
            load(tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file"):
        load(tmp_path / "nowhere.npz")


def test_names_of_the_hub_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="'hf:dinov2' is no repository of the hub: hf:owner/name"):
        load("hf:dinov2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r"hf:facebook/dinov2-small needs huggingface_hub: pip install compo-jax\[hub\]"
    ):
        load("hf:facebook/dinov2-small")


def test_arrays_that_are_not_finite_are_told(tmp_path):
    arrays = random_arrays()
    arrays["blocks.1.mlp.fc1.weight"][3, 2] = np.nan
    safetensors.numpy.save_file(arrays, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"vit\.safetensors: the checkpoint holds NaN .* blocks/mlp/fc1/kernel: "):
        load(tmp_path / "vit.safetensors", heads=HEADS)
    params = load(tmp_path / "vit.safetensors", heads=HEADS, check_finite=False)[1]
    assert np.isnan(params["blocks"]["mlp"]["fc1"]["kernel"][1, 2, 3])


def test_a_full_disk_and_types_without_fractions_are_told(tmp_path, monkeypatch):
    params = from_timm(random_arrays(), heads=HEADS)[1]
    with pytest.raises(ValueError, match="dtype=int8 holds no fractions"):
        save(tmp_path / "vit.safetensors", params, dtype=np.int8)
    for dtype in ("int32", "floating"):
        with pytest.raises(ValueError, match=f"dtype='{dtype}' "):
            backbone(dtype=dtype)

    def full(arrays, file, metadata):
        raise safetensors.SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=r"vit\.safetensors is not written .*the space left on its disk"):
        save(tmp_path / "vit.safetensors", params)
    assert list(tmp_path.iterdir()) == []


def test_load_names_the_file_whose_contents_are_wrong(tmp_path):
    path = tmp_path / "vit.safetensors"
    arrays = random_arrays()
    safetensors.numpy.save_file(arrays, path, {"heads": "three"})
    with pytest.raises(ValueError, match=r"vit\.safetensors: the metadata's heads is 'three'"):
        load(path)
    del arrays["cls_token"]
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(ValueError, match=r"vit\.safetensors: (.|\n)*missing \(1\): cls_token"):
        load(path, heads=HEADS)


def test_the_heads_of_a_files_metadata_count_in_its_folder_and_its_index_has_the_config_beside_it(tmp_path):
    _, params = from_timm(random_arrays(), heads=HEADS)
    save(tmp_path / "model.safetensors", params, {"heads": HEADS}, np.float32)
    config = {"architecture": "vit_tiny", "model_args": {"act_layer": "quick_gelu"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path)[0].heads == HEADS
    index = {"weight_map": dict.fromkeys(random_arrays(), "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model, _ = load(tmp_path / "model.safetensors.index.json", heads=HEADS)
    assert model.activation == "quick_gelu"
