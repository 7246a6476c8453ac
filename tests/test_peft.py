"""PEFT's folders of models under timm's names: written out by hand as PEFT lays them out, and damaged."""

import json
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from compo_jax import adapters, tree
from compo_jax.models import ViT, to_timm

WIDTH, DEPTH, HIDDEN = 12, 2, 20
PREFIX = "base_model.model."
KERNELS = {  # (our path within blocks, in, out)
    "attn.qkv": (("attention", "qkv"), WIDTH, 3 * WIDTH),
    "attn.proj": (("attention", "proj"), WIDTH, WIDTH),
    "mlp.fc1": (("mlp", "fc1"), WIDTH, HIDDEN),
    "mlp.fc2": (("mlp", "fc2"), HIDDEN, WIDTH),
}
ADAPTERS = {"lora": adapters.lora(2), "ia3": adapters.ia3(bias=True)}


def randomised(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), shapes)


def vit(**changes):
    sizes = {"image_size": 8, "patch": 4, "width": WIDTH, "depth": DEPTH, "heads": 2, "mlp_ratio": HIDDEN / WIDTH}
    model = ViT(**(sizes | {"classes": 3} | changes))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    return model, randomised(shapes, 0)


BASE = vit()[1]


def trained(adapter, base=BASE):
    return randomised(jax.eval_shape(adapter.init, jax.random.key(0), base), 1)


def folder_of(path, config, arrays):
    """A PEFT folder with these settings over the usual ones."""
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["qkv", "fc1"], "task_type": None}
    usual |= {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16, "lora_dropout": 0.1}
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(usual | config))
    safetensors.numpy.save_file(arrays, path / "adapter_model.safetensors")
    return path


def lora_arrays(ranks, dtype=np.float32):
    """PEFT's arrays of layers with these ranks."""
    rng = np.random.default_rng(2)
    arrays = {}
    for layer, rank in ranks.items():
        _, fan_in, fan_out = KERNELS[layer.split(".", 2)[2]]
        arrays[f"{PREFIX}{layer}.lora_A.weight"] = rng.normal(size=(rank, fan_in)).astype(dtype)
        arrays[f"{PREFIX}{layer}.lora_B.weight"] = rng.normal(size=(fan_out, rank)).astype(dtype)
    return arrays


USUAL = {f"blocks.{block}.{layer}": 2 for block in range(DEPTH) for layer in ("attn.qkv", "mlp.fc1")}


def product(arrays, layer, scale=1.0):
    """The change of a kernel (in, out) by PEFT's definition: `scale (B A)ᵀ`."""
    a, b = (arrays[f"{PREFIX}{layer}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    return scale * (b @ a).T


# Writing


def test_lora_is_written_as_peft_does(tmp_path):
    module = trained(ADAPTERS["lora"])
    adapters.save_peft(tmp_path / "out", ADAPTERS["lora"], module, BASE, base_model="vit_tiny")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["adapter_config.json", "adapter_model.safetensors", "out"]
    arrays = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert len(arrays) == 2 * 4 * DEPTH
    delta = ADAPTERS["lora"].delta(module, BASE)
    for block in range(DEPTH):
        for layer, ((room, name), fan_in, fan_out) in KERNELS.items():
            rank = 6 if layer == "attn.qkv" else 2
            at = f"blocks.{block}.{layer}"
            assert arrays[f"{PREFIX}{at}.lora_A.weight"].shape == (rank, fan_in)
            assert arrays[f"{PREFIX}{at}.lora_B.weight"].shape == (fan_out, rank)
            expected = delta["blocks"][room][name]["kernel"][block]
            np.testing.assert_allclose(product(arrays, at), expected, rtol=1e-5, atol=1e-6)
            assert config["rank_pattern"].get(at, config["r"]) == rank == config["alpha_pattern"].get(at, 2)
            assert at in config["target_modules"]
    assert (config["peft_type"], config["lora_alpha"], config["bias"]) == ("LORA", 2, "none")
    assert (config["task_type"], config["base_model_name_or_path"]) == (None, "vit_tiny")


def test_ia3_is_written_as_peft_does(tmp_path):
    module = trained(ADAPTERS["ia3"])
    adapters.save_peft(tmp_path / "out", ADAPTERS["ia3"], module, BASE)
    arrays = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["peft_type"], config["feedforward_modules"]) == ("IA3", [])
    assert len(arrays) == 4 * DEPTH
    for layer, ((room, name), _, fan_out) in KERNELS.items():
        found = arrays[f"{PREFIX}blocks.1.{layer}.ia3_l"]
        assert found.shape == (fan_out, 1)
        np.testing.assert_array_equal(found[:, 0], module["blocks"][room][name]["kernel"]["l"][1])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_is_written_is_read(kind, tmp_path):
    module = trained(ADAPTERS[kind])
    adapters.save_peft(tmp_path / "new/out", ADAPTERS[kind], module, BASE)
    adapter, again = adapters.load_peft(tmp_path / "new/out", BASE)
    assert tree.fingerprint(again) == tree.fingerprint(module)
    same = adapters.build(adapter.name, adapter.settings)
    fresh = jax.eval_shape(same.init, jax.random.key(0), BASE)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, module)


def test_any_model_of_dense_layers(tmp_path):
    base = {"inner": {"kernel": jnp.ones((3, 7)), "bias": jnp.ones(7)}, "out": {"kernel": jnp.ones((7, 5))}}
    adapter = adapters.lora(3, ("inner/kernel", "out/kernel"))
    module = trained(adapter, base)
    names = {"inner/kernel": "body.0", "out/kernel": "body.2"}
    adapters.save_peft(tmp_path / "out", adapter, module, base, modules=names)
    assert f"{PREFIX}body.0.lora_A.weight" in safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    again = adapters.load_peft(tmp_path / "out", base, modules=names)[1]
    assert tree.fingerprint(again) == tree.fingerprint(module)


def test_the_names_are_those_of_the_checkpoints():
    arrays = to_timm(BASE)
    modules = {path: name for path, name in adapters.TIMM_MODULES.items() if path in tree.names(BASE)}
    names = {name.format(block=0) for name in modules.values()}
    assert {name for name in arrays if name.removesuffix(".weight") in names} == {f"{name}.weight" for name in names}
    for path, name in modules.items():
        kernel = tree.partition(BASE, f"^{path}$")[0]
        assert set(to_timm(kernel)) == {f"{name.format(block=block)}.weight" for block in range(DEPTH)}


# Reading


def rank_and_scale(qkv, fc1, last):
    """(rank, scale) of both qkv, of the first block's fc1 and of the second's."""
    qkvs = {f"blocks.{block}.attn.qkv": qkv for block in range(DEPTH)}
    return qkvs | {"blocks.0.mlp.fc1": fc1, "blocks.1.mlp.fc1": last}


RANKS = {"attn.qkv": 6, r"blocks\.1\.mlp\.fc1": 1}
FOLDED = {
    "alpha": ({"lora_alpha": 8}, rank_and_scale((2, 4.0), (2, 4.0), (2, 4.0))),
    "rslora": ({"lora_alpha": 8, "use_rslora": True}, rank_and_scale(*[(2, 8 / math.sqrt(2))] * 3)),
    "ranks": ({"lora_alpha": 3.0, "rank_pattern": RANKS}, rank_and_scale((6, 0.5), (2, 1.5), (1, 3.0))),
    "alphas": (
        {"use_rslora": True, "rank_pattern": {"0.mlp.fc1": 5}, "alpha_pattern": {"fc1": 10}},
        rank_and_scale((2, 2 / math.sqrt(2)), (5, 10 / math.sqrt(5)), (2, 10 / math.sqrt(2))),
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_ranks_and_scales_are_folded_in(name, tmp_path):
    settings, layers = FOLDED[name]
    arrays = lora_arrays({layer: rank for layer, (rank, _) in layers.items()})
    adapter, module = adapters.load_peft(folder_of(tmp_path, settings, arrays), BASE)
    delta = adapter.delta(module, BASE)
    for layer, (_, scale) in layers.items():
        (room, part), _, _ = KERNELS[layer.split(".", 2)[2]]
        found = delta["blocks"][room][part]["kernel"][int(layer.split(".")[1])]
        np.testing.assert_allclose(found, product(arrays, layer, scale), rtol=1e-5, atol=1e-5)
    assert tree.names(delta) == ["blocks/attention/qkv/kernel", "blocks/mlp/fc1/kernel"]
    fresh = jax.eval_shape(adapter.init, jax.random.key(0), BASE)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, module)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.(qkv|fc1)", "layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "blocks"},
        {"target_modules": ["blocks.1.attn.qkv", "blocks.1.mlp.fc1"]},
        {"target_modules": "all-linear", "exclude_modules": r"blocks\.0\..*|.*\.(proj|fc2)|head"},
        {"exclude_modules": ["blocks.0.attn.qkv", "0.mlp.fc1"]},
    ],
)
def test_layers_that_are_not_adapted_do_not_change(settings, tmp_path):
    ranks = {name: rank for name, rank in USUAL.items() if name.startswith("blocks.1")}
    arrays = lora_arrays(ranks)
    adapter, module = adapters.load_peft(folder_of(tmp_path, settings, arrays), BASE)
    qkv = adapter.delta(module, BASE)["blocks"]["attention"]["qkv"]["kernel"]
    assert not qkv[0].any()
    np.testing.assert_allclose(qkv[1], product(arrays, "blocks.1.attn.qkv"), rtol=1e-5, atol=1e-6)


def test_ia3_of_some_layers_is_filled_up_with_ones(tmp_path):
    scales = np.linspace(0.5, 2, WIDTH, dtype=np.float32)[:, None]
    settings = {"peft_type": "IA3", "target_modules": ["blocks.1.attn.proj"], "feedforward_modules": []}
    folder_of(tmp_path, settings, {f"{PREFIX}blocks.1.attn.proj.ia3_l": scales})
    adapter, module = adapters.load_peft(tmp_path, BASE)
    found = module["blocks"]["attention"]["proj"]["kernel"]["l"]
    np.testing.assert_array_equal(found, [np.ones(WIDTH), scales[:, 0]])
    assert adapter.name == "ia3" and adapter.settings["bias"]
    delta = adapter.delta(module, BASE)
    assert tree.names(delta) == ["blocks/attention/proj/bias", "blocks/attention/proj/kernel"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_arrays_take_the_bases_type(dtype, tmp_path):
    arrays = lora_arrays(USUAL, dtype)
    adapter, module = adapters.load_peft(folder_of(tmp_path, {"lora_alpha": 0.2}, arrays), BASE)
    assert {leaf.dtype for leaf in jax.tree.leaves(module)} == {jnp.dtype("float32")}
    found = adapter.delta(module, BASE)["blocks"]["mlp"]["fc1"]["kernel"][1]
    np.testing.assert_allclose(found, product(arrays, "blocks.1.mlp.fc1", 0.1), rtol=1e-5, atol=1e-6)


# What can't be read or written


def test_all_mismatches_are_listed_at_once(tmp_path):
    arrays = lora_arrays(USUAL | {"blocks.2.attn.qkv": 2})
    del arrays[f"{PREFIX}blocks.0.mlp.fc1.lora_A.weight"]
    arrays[f"{PREFIX}blocks.1.attn.qkv.lora_B.weight"] = np.zeros((30, 2), np.float32)
    arrays[f"{PREFIX}head.weight"] = np.zeros((3, WIDTH), np.float32)
    with pytest.raises(ValueError) as error:
        adapters.load_peft(folder_of(tmp_path, {}, arrays), BASE)
    first, missing, unexpected, misshaped = str(error.value).splitlines()
    assert str(tmp_path) in first
    assert missing == f"missing (1): {PREFIX}blocks.0.mlp.fc1.lora_A.weight"
    assert unexpected.startswith("unexpected (3): ") and f"{PREFIX}head.weight (3, 12)" in unexpected
    assert f"{PREFIX}blocks.2.attn.qkv.lora_A.weight (2, 12)" in unexpected
    assert misshaped == f"mis-shaped (1): {PREFIX}blocks.1.attn.qkv.lora_B.weight (30, 2) instead of (36, 2)"


def test_another_architecture(tmp_path):
    adapters.save_peft(tmp_path / "out", ADAPTERS["lora"], trained(ADAPTERS["lora"]), BASE)
    with pytest.raises(ValueError, match=rf"unexpected \(8\): {PREFIX}blocks\.1\.") as error:
        adapters.load_peft(tmp_path / "out", vit(depth=1)[1])
    assert "missing" not in str(error.value)
    with pytest.raises(ValueError, match=r"mis-shaped \(12\)"):  # all but the hidden sides of fc1 and fc2
        adapters.load_peft(tmp_path / "out", vit(width=8, mlp_ratio=HIDDEN / 8)[1])
    names = {"attn.qkv": "attention.attention.query"}
    arrays = {name.replace("attn.qkv", names["attn.qkv"]): x for name, x in lora_arrays(USUAL).items()}
    with pytest.raises(ValueError, match=r"unexpected \(8\)(.|\n)*no layer of the base is adapted: give modules="):
        adapters.load_peft(folder_of(tmp_path, {"target_modules": ["query"]}, arrays), BASE)
    deeper = lora_arrays(USUAL)
    with pytest.raises(ValueError, match=r"missing \(4\): .*blocks\.2\."):
        adapters.load_peft(folder_of(tmp_path, {}, deeper), vit(depth=3)[1])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layer_replication": [[0, 1]]}, r"layer_replication="),
        (
            {"a_feature_of_tomorrow": {"x": 1}, "lora_bias": True},
            "isn't supported: a_feature_of_tomorrow=.*lora_bias=True",
        ),
        ({"bias": "boft_only"}, "isn't supported: bias='boft_only'"),
        ({"bias": True}, "bias is True and should be none, all or lora_only"),
        ({"use_dora": "yes"}, "use_dora is 'yes' and should be true or false"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head' and should be a list of names"),
        ({"modules_to_save": [""]}, "'' in modules_to_save is no name"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changes the base"),
        ({"peft_type": "ADALORA"}, "of the type 'ADALORA': only LORA and IA3 .*merge_and_unload"),
        ({"peft_type": None}, "of the type None"),
        ({"r": None}, "doesn't say r: "),
        ({"target_modules": None, "lora_alpha": None}, "doesn't say target_modules, lora_alpha"),
        ({"r": "8"}, "r is '8' and should be a whole number"),
        ({"r": 0}, "0 is no rank"),
        ({"rank_pattern": {"qkv": 1.5}}, "1.5 is no rank"),
        ({"alpha_pattern": {"qkv": math.nan}}, "nan is no scale"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\] and should be an object"),
        ({"target_modules": "(qkv"}, r"'\(qkv' is no regular expression"),
        ({"rank_pattern": {"*": 4}}, "is no regular expression"),
    ],
)
def test_settings_that_cannot_be_read(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        adapters.load_peft(folder_of(tmp_path, settings, lora_arrays(USUAL)), BASE)
    assert "adapter_config.json" in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json in .*nowhere"):
        adapters.load_peft(tmp_path / "nowhere", BASE)
    path = folder_of(tmp_path / "x", {}, lora_arrays(USUAL))
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    whole = weights.read_bytes()
    for content in (whole[:-3], whole[:40], b"", b"version https://git-lfs.github.com/spec/v1"):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is no complete safetensors file .*again"):
            adapters.load_peft(path, BASE)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors in .*the whole folder"):
        adapters.load_peft(path, BASE)
    (path / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(
        ValueError, match=r"adapter_model\.bin is a PyTorch pickle.*safe_serialization=True.*weights_only=True"
    ):
        adapters.load_peft(path, BASE)
    for content, message in ((b"{", "no JSON"), (b"\xff\xfe", "no JSON"), (b"[1]", "no JSON object")):
        config.write_bytes(content)
        with pytest.raises(ValueError, match=rf"adapter_config\.json .*{message}"):
            adapters.load_peft(path, BASE)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    lora, module = ADAPTERS["lora"], trained(ADAPTERS["lora"])
    target = tmp_path / "out"
    with pytest.raises(ValueError, match="only lora and ia3 .*not 'full': approximate a full delta with adapters.rec"):
        adapters.save_peft(target, adapters.full(), trained(adapters.full()), BASE)
    plain = adapters.ia3("qkv/kernel")
    with pytest.raises(
        ValueError, match=r"leaves out blocks/attention/qkv/bias: train it with adapters.ia3\(bias=True"
    ):
        adapters.save_peft(target, plain, trained(plain), BASE)
    with pytest.raises(ValueError, match="entries for blocks/attention/qkv/kernel aren't those of lora"):
        adapters.save_peft(target, lora, trained(plain), BASE)
    head = adapters.lora(1, "head/kernel")
    modules = {path: name for path, name in adapters.TIMM_MODULES.items() if path != "head/kernel"}
    with pytest.raises(ValueError, match="names of head/kernel are not known: give them in modules="):
        adapters.save_peft(target, head, trained(head), BASE, modules=modules)
    with pytest.raises(ValueError, match=r"head/kernel is \(12, 3\) and not \(layers, in, out\)"):
        adapters.save_peft(target, head, trained(head), BASE, modules={"head/kernel": "head.{block}"})
    with pytest.raises(ValueError, match="the module doesn't fit the base: .*qkv/kernel is"):
        adapters.save_peft(target, lora, module, vit(width=8, mlp_ratio=HIDDEN / 8)[1])

    def half_written(arrays, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", half_written)
        with pytest.raises(OSError, match="disk full"):
            adapters.save_peft(target, lora, module, BASE)
    assert list(tmp_path.iterdir()) == []
    adapters.save_peft(target, lora, module, BASE)
    before = (target / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="there is something at .*out: remove it"):
        adapters.save_peft(target, lora, jax.tree.map(lambda x: 2 * x, module), BASE)
    assert (target / "adapter_model.safetensors").read_bytes() == before
    without_bias = jax.tree.map(lambda x: x * 0 if x.ndim == 2 else x, BASE)
    adapters.save_peft(tmp_path / "no bias", plain, trained(plain), without_bias)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_told_and_passes_on_purpose_only(tmp_path, value):
    arrays = lora_arrays(USUAL)
    name = f"{PREFIX}blocks.1.mlp.fc1.lora_B.weight"
    arrays[name][2, 1] = value
    folder = folder_of(tmp_path / "in", {}, arrays)
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors holds NaN .* in {re.escape(name)}: "):
        adapters.load_peft(folder, BASE)
    adapter, module = adapters.load_peft(folder, BASE, check_finite=False)
    with pytest.raises(ValueError, match="the module holds NaN or infinite numbers in blocks/mlp/fc1/kernel/b: "):
        adapters.save_peft(tmp_path / "out", adapter, module, BASE)
    assert not (tmp_path / "out").exists()
    adapters.save_peft(tmp_path / "out", adapter, module, BASE, check_finite=False)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(arrays, file, metadata):
        file.write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=r"out is not written .*No space left.*the space left on its disk"):
        adapters.save_peft(tmp_path / "out", ADAPTERS["lora"], trained(ADAPTERS["lora"]), BASE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_scale_of_a_16_bit_module_is_folded_wide(tmp_path, dtype):
    base = jax.tree.map(lambda x: x.astype(dtype), BASE)
    arrays = lora_arrays(USUAL, dtype)
    folder = folder_of(tmp_path / "in", {"lora_alpha": 7, "r": 2, "use_rslora": True}, arrays)
    found = adapters.load_peft(folder, base)[1]["blocks"]["mlp"]["fc1"]["kernel"]["b"][1]
    exact = arrays[f"{PREFIX}blocks.1.mlp.fc1.lora_B.weight"].T.astype(np.float64) * 7 / np.sqrt(2)
    np.testing.assert_array_equal(found, exact.astype(np.float32).astype(dtype))
