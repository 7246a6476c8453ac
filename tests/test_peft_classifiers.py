"""PEFT's folders of Hugging Face's image classifiers, written out by hand under the names that its libraries give:
query, key and value as columns of our joint weight, DoRA, trained biases, and heads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_peft import BASE, DEPTH, HIDDEN, PREFIX, WIDTH, folder_of, randomised, trained, vit

from compo_jax import adapters, tree

BODY = {part: leaf for part, leaf in BASE.items() if part != "head"}
RANK, SCALE = 2, 1.5
NOW = "vit.layers.{}.attention.{}_proj"
COLUMNS = {part: slice(i * WIDTH, (i + 1) * WIDTH) for i, part in enumerate("qkv")}
LATE = "attention.q_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2"
EARLY = "attention.attention.query attention.attention.value attention.output.dense"
CLIP = "self_attn.q_proj self_attn.v_proj self_attn.out_proj mlp.fc1 mlp.fc2"
#: Names in the first block of real folders: of query and value, the layer behind them, and the MLP's two.
REAL = {
    "vit": ("vit.layers.0.", LATE),
    "vit-v4": ("vit.encoder.layer.0.", f"{EARLY} intermediate.dense output.dense"),
    "ViTModel": ("layers.0.", LATE),
    "ViTModel-v4": ("encoder.layer.0.", f"{EARLY} intermediate.dense output.dense"),
    "deit": ("deit.layers.0.", LATE),
    "dinov2": ("dinov2.encoder.layer.0.", LATE),
    "dinov2-v4": ("dinov2.encoder.layer.0.", f"{EARLY} mlp.fc1 mlp.fc2"),
    "Dinov2Model": ("encoder.layer.0.", LATE),
    "dinov2_with_registers": ("dinov2_with_registers.encoder.layer.0.", LATE),
    "clip, siglip": ("vision_model.encoder.layers.0.", CLIP),
    "CLIPVisionModel": ("encoder.layers.0.", CLIP),
}


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def factors(name, rank=RANK, fan_in=WIDTH, fan_out=WIDTH):
    """PEFT's arrays of one layer, other ones for each name."""
    rng = np.random.default_rng(list(name.encode()))
    a, b = rng.normal(size=(rank, fan_in)), rng.normal(size=(fan_out, rank))
    arrays = {"lora_A.weight": a, "lora_B.weight": b}
    return {f"{PREFIX}{name}.{key}": array.astype(np.float32) for key, array in arrays.items()}


def product(arrays, name, scale=SCALE):
    a, b = (arrays[f"{PREFIX}{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    return scale * (b @ a).T


def query_and_value(parts="qv", name=NOW):
    """Arrays of some of query, key and value in every block, and settings with the scale."""
    names = [name.format(block, part) for block in range(DEPTH) for part in parts]
    arrays = {key: array for name in names for key, array in factors(name).items()}
    return arrays, {"r": RANK, "lora_alpha": RANK * SCALE, "target_modules": [f"{part}_proj" for part in parts]}


def qkv_kernel(delta):
    return delta["blocks"]["attention"]["qkv"]["kernel"]


def close(found, expected, atol=1e-5):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)


# Which layers


@pytest.mark.parametrize("model", REAL)
def test_every_model_s_names_are_recognised(model, tmp_path):
    prefix, names = REAL[model]
    first = [prefix + name for name in names.split()]
    sizes = [(WIDTH, WIDTH)] * 3 + [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    arrays, settings = {}, {"lora_alpha": RANK * SCALE, "target_modules": []}
    for at_first, (fan_in, fan_out) in zip(first, sizes, strict=True):
        for block in range(DEPTH):
            name = at_first.replace(".0.", f".{block}.")
            arrays |= factors(name, RANK, fan_in, fan_out)
            settings["target_modules"].append(name)
    adapter, module = adapters.load_peft(folder_of(tmp_path, settings, arrays), BASE)
    blocks = adapter.delta(module, BASE)["blocks"]
    query, value, proj, fc1, fc2 = (name.replace(".0.", ".1.") for name in first)
    close(blocks["attention"]["qkv"]["kernel"][1][:, COLUMNS["q"]], product(arrays, query))
    close(blocks["attention"]["qkv"]["kernel"][1][:, COLUMNS["v"]], product(arrays, value))
    assert not blocks["attention"]["qkv"]["kernel"][:, :, COLUMNS["k"]].any()
    close(blocks["attention"]["proj"]["kernel"][1], product(arrays, proj))
    close(blocks["mlp"]["fc1"]["kernel"][1], product(arrays, fc1))
    close(blocks["mlp"]["fc2"]["kernel"][1], product(arrays, fc2))


def test_query_and_value_are_columns_with_factors_of_their_own(tmp_path):
    arrays, settings = query_and_value()
    arrays |= factors(NOW.format(1, "v"), 3)
    settings["rank_pattern"], settings["alpha_pattern"] = {"1.attention.v_proj": 3}, {"1.attention.v_proj": 3 * SCALE}
    adapter, module = adapters.load_peft(folder_of(tmp_path, settings, arrays), BODY)
    entry = qkv_kernel(module)
    assert entry["a"].shape == (DEPTH, WIDTH, 5) and entry["b"].shape == (DEPTH, 5, 3 * WIDTH)
    assert not entry["b"][0, RANK : 2 * RANK, : 2 * WIDTH].any() and not entry["b"][0, :RANK, WIDTH:].any()
    assert not entry["a"][0, :, 2 * RANK :].any()
    for block in range(DEPTH):
        found = qkv_kernel(adapter.delta(module, BODY))[block]
        close(found[:, COLUMNS["q"]], product(arrays, NOW.format(block, "q")))
        close(found[:, COLUMNS["v"]], product(arrays, NOW.format(block, "v")))
        assert not found[:, COLUMNS["k"]].any()
    fresh = jax.eval_shape(adapters.build(adapter.name, adapter.settings).init, jax.random.key(0), BODY)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, module)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"vit\.layers\.\d+\.attention\.[qv]_proj"},
        {
            "target_modules": "all-linear",
            "modules_to_save": ["classifier"],
            "exclude_modules": r".*(k_proj|o_proj|fc\d)",
        },
        {"use_rslora": True, "lora_alpha": SCALE * RANK**0.5},
        {"fan_in_fan_out": True},
    ],
)
def test_settings_that_say_the_same(settings, tmp_path):
    arrays, usual = query_and_value()
    head = {f"{PREFIX}classifier.weight": normal(3, WIDTH), f"{PREFIX}classifier.bias": normal(3)}
    saved = head if "modules_to_save" in settings else {}
    adapter, module = adapters.load_peft(folder_of(tmp_path, usual | settings, arrays | saved), BODY)
    close(qkv_kernel(adapter.delta(module, BODY))[1][:, COLUMNS["v"]], product(arrays, NOW.format(1, "v")))


def test_ia3_on_query_leaves_the_other_columns(tmp_path):
    scales = {f"{PREFIX}{NOW.format(block, 'q')}.ia3_l": 1 + normal(WIDTH, 1) for block in range(DEPTH)}
    settings = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    adapter, module = adapters.load_peft(folder_of(tmp_path, settings, scales), BASE)
    found = qkv_kernel(module)["l"]
    np.testing.assert_array_equal(found[:, :WIDTH], np.tile(1 + normal(WIDTH, 1)[:, 0], (DEPTH, 1)))
    assert (found[:, WIDTH:] == 1).all()
    assert (adapter.name, adapter.settings["bias"]) == ("ia3", True)


def test_ia3_on_inputs_is_a_full_delta(tmp_path):
    names = {f"vit.layers.{block}.{layer}": shape for block in range(DEPTH)
             for layer, shape in (("attention.v_proj", (WIDTH, 1)), ("mlp.fc2", (1, HIDDEN)))}  # fmt: skip
    arrays = {f"{PREFIX}{name}.ia3_l": 1 + normal(*shape) for name, shape in names.items()}
    settings = {"peft_type": "IA3", "target_modules": ["v_proj", "fc2"], "feedforward_modules": ["fc2"]}
    adapter, module = adapters.load_peft(folder_of(tmp_path, settings, arrays), BASE)
    assert adapter.name == "full"
    fc2, qkv = BASE["blocks"]["mlp"]["fc2"], BASE["blocks"]["attention"]["qkv"]
    close(module["blocks"]["mlp"]["fc2"]["kernel"], fc2["kernel"] * normal(1, HIDDEN).T)
    assert module["blocks"]["mlp"]["fc2"]["bias"] is None
    close(
        module["blocks"]["attention"]["qkv"]["bias"][:, COLUMNS["v"]],
        qkv["bias"][:, COLUMNS["v"]] * normal(WIDTH, 1)[:, 0],
    )


# DoRA


def test_dora_is_a_full_delta_of_this_base(tmp_path):
    arrays, settings = query_and_value()
    lengths = {name: np.abs(normal(WIDTH)) + 0.5 for name in (NOW.format(b, p) for b in range(DEPTH) for p in "qv")}
    arrays |= {f"{PREFIX}{name}.lora_magnitude_vector": x for name, x in lengths.items()}
    folder = folder_of(tmp_path, settings | {"use_dora": True}, arrays)
    adapter, module = adapters.load_peft(folder, BASE)
    assert adapter.name == "full" and tree.names(module) == ["blocks/attention/qkv/kernel"]
    weight = np.asarray(qkv_kernel(BASE), np.float64)[1][:, COLUMNS["v"]]
    moved = weight + product(arrays, NOW.format(1, "v"))
    expected = moved / np.sqrt((moved**2).sum(0)) * lengths[NOW.format(1, "v")] - weight
    close(qkv_kernel(module)[1][:, COLUMNS["v"]], expected)
    assert not qkv_kernel(module)[:, :, COLUMNS["k"]].any()
    assert adapters.build(adapter.name, adapter.settings).delta(module, BASE) is not None
    empty = jax.tree.map(jnp.zeros_like, BASE)
    still = {name: x * (0 if "lora_B" in name else 1) for name, x in arrays.items()}
    folder = folder_of(tmp_path / "still", settings | {"use_dora": True}, still)
    with pytest.raises(ValueError, match="the module of .*still holds NaN or infinite numbers in blocks/attention/qkv"):
        adapters.load_peft(folder, empty)
    del arrays[f"{PREFIX}{NOW.format(0, 'q')}.lora_magnitude_vector"]
    with pytest.raises(ValueError, match=r"missing \(1\): .*layers\.0\.attention\.q_proj\.lora_magnitude_vector"):
        adapters.load_peft(folder_of(tmp_path / "half", settings | {"use_dora": True}, arrays), BASE)


# Trained biases and whole modules


def biases_of(parts="qv", inside=".base_layer"):
    names = [(block, part) for block in range(DEPTH) for part in parts]
    return {f"{PREFIX}{NOW.format(*name)}{inside}.bias": normal(WIDTH) + i for i, name in enumerate(names)}


def test_trained_biases_are_full_deltas_beside_the_factors(tmp_path):
    arrays, settings = query_and_value()
    folder = folder_of(tmp_path / "in", settings | {"bias": "lora_only"}, arrays | biases_of())
    adapter, module = adapters.load_peft(folder, BASE)
    assert adapter.name == "lora"
    bias = BASE["blocks"]["attention"]["qkv"]["bias"]
    found = module["blocks"]["attention"]["qkv"]["bias"]
    close(found[1, COLUMNS["v"]], normal(WIDTH) + 3 - bias[1, COLUMNS["v"]])
    assert not found[:, COLUMNS["k"]].any()
    assert tree.names(adapter.delta(module, BASE)) == ["blocks/attention/qkv/bias", "blocks/attention/qkv/kernel"]
    # the folder's own settings again, and the other two ways to name and to save biases
    plain = folder_of(tmp_path / "plain", settings | {"bias": "lora_only"}, arrays | biases_of(inside=""))
    assert tree.fingerprint(adapters.load_peft(plain, BASE)[1]) == tree.fingerprint(module)
    adapters.save_peft(tmp_path / "out", adapter, module, BASE, modules=adapters.HF_MODULES["vit"])
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["bias"] == "all"
    again, kept = adapters.load_peft(tmp_path / "out", BASE)
    close(again.delta(kept, BASE)["blocks"]["attention"]["qkv"]["bias"], found)


def test_biases_that_peft_lost_are_told(tmp_path):
    arrays, settings = query_and_value()
    folder = folder_of(tmp_path, settings | {"bias": "lora_only"}, arrays)
    with pytest.raises(
        ValueError, match=r'missing \(4\)(.|\n)*before version 0\.21 left the biases(.|\n)*"bias": "none"'
    ):
        adapters.load_peft(folder, BASE)
    no_bias = jax.tree.map(lambda x: x * 0 if x.ndim == 2 else x, BASE)  # a model whose layers have none
    adapter, module = adapters.load_peft(folder, no_bias)
    assert tree.names(adapter.delta(module, no_bias)) == ["blocks/attention/qkv/kernel"]


def test_all_biases_come_from_norms_and_the_patch_as_well(tmp_path):
    arrays, settings = query_and_value("q")
    names = ["vit.layernorm", "vit.embeddings.patch_embeddings.projection"]
    names += [f"vit.layers.{b}.{x}" for b in range(DEPTH) for x in ("layernorm_before", "layernorm_after", "mlp.fc2",
              "attention.k_proj", "attention.v_proj", "attention.o_proj")]  # fmt: skip
    arrays |= {f"{PREFIX}{name}.bias": normal(WIDTH) for name in names}
    arrays |= {f"{PREFIX}vit.layers.{block}.mlp.fc1.bias": normal(HIDDEN) for block in range(DEPTH)}
    arrays |= {f"{PREFIX}classifier.bias": normal(3)} | biases_of("q")
    arrays |= {f"{PREFIX}vit.layernorm.{kind}.bias": normal(WIDTH) for kind in ("original_module", "modules_to_save")}
    arrays |= {f"{PREFIX}vit.layernorm.weight": normal(WIDTH)}
    settings |= {"bias": "all", "modules_to_save": ["layernorm"]}
    adapter, module = adapters.load_peft(folder_of(tmp_path / "in", settings, arrays), BASE)
    changed = tree.add(BASE, adapter.delta(module, BASE))
    for leaf in (changed["norm"]["bias"], changed["norm"]["scale"], changed["patch"]["bias"]):
        close(leaf, normal(WIDTH))
    close(changed["blocks"]["norm2"]["bias"], np.tile(normal(WIDTH), (DEPTH, 1)))
    close(changed["head"]["bias"], normal(3))
    adapters.save_peft(tmp_path / "out", adapter, module, BASE, modules=adapters.HF_MODULES["vit"])
    again, kept = adapters.load_peft(tmp_path / "out", BASE)
    same = tree.add(BASE, again.delta(kept, BASE))
    jax.tree.map(close, same, changed)


@pytest.mark.parametrize("wide", [1, 2])
def test_a_trained_head_is_handed_over(wide, tmp_path):
    # twice as wide is DINOv2's: the class token and the mean of the patches
    arrays, settings = query_and_value(name={1: NOW, 2: "dinov2.encoder.layer.{}.attention.{}_proj"}[wide])
    head = {f"{PREFIX}classifier.weight": normal(5, wide * WIDTH), f"{PREFIX}classifier.bias": normal(5)}
    folder = folder_of(tmp_path, settings | {"modules_to_save": ["classifier"]}, arrays | head)
    found = adapters.peft_head(folder)
    np.testing.assert_array_equal(found["kernel"], normal(5, wide * WIDTH).T)
    np.testing.assert_array_equal(found["bias"], normal(5))
    adapter, module = adapters.load_peft(folder, BODY)
    assert tree.names(adapter.delta(module, BODY)) == ["blocks/attention/qkv/kernel"]
    with pytest.raises(ValueError, match=r"mis-shaped \(2\)(.|\n)*the folder's classifier isn't of the shape") as error:
        adapters.load_peft(folder, BASE)  # 3 classes
    assert ("mean of the patches" in str(error.value)) == (wide == 2)
    whole = BODY | {"head": jax.tree.map(jnp.zeros_like, found)}
    adapter, module = adapters.load_peft(folder, whole)
    close(adapter.delta(module, whole)["head"]["kernel"], found["kernel"])
    close(adapter.delta(module, whole)["head"]["bias"], found["bias"])
    assert not np.any(adapters.load_peft(folder, BODY | {"head": found})[1]["head"]["kernel"])


def test_a_folder_without_a_head_and_one_that_is_not_finite(tmp_path):
    arrays, settings = query_and_value()
    folder = folder_of(tmp_path / "none", settings, arrays)
    with pytest.raises(
        ValueError, match=r"holds no trained head: there is no base_model\.model\.classifier\.weight in"
    ):
        adapters.peft_head(folder)
    head = {f"{PREFIX}classifier.weight": np.full((3, WIDTH), np.nan, np.float16)}
    folder = folder_of(tmp_path / "nan", settings | {"modules_to_save": ["classifier"]}, arrays | head)
    with pytest.raises(ValueError, match="the head in .* holds NaN"):
        adapters.peft_head(folder)
    assert adapters.peft_head(folder, check_finite=False)["kernel"].dtype == jnp.float32


# Out again


def test_the_joint_weight_goes_out_as_three_that_share_the_first_factor(tmp_path):
    lora = adapters.lora(2)
    module = trained(lora, BODY)
    adapters.save_peft(tmp_path / "out", lora, module, BODY, modules=adapters.HF_MODULES["vit-v4"])
    arrays = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    inside = [f"{PREFIX}vit.encoder.layer.1.attention.attention.{part}" for part in ("query", "key", "value")]
    for name, columns in zip(inside, COLUMNS.values(), strict=True):
        np.testing.assert_array_equal(arrays[f"{name}.lora_A.weight"], qkv_kernel(module)["a"][1].T)
        np.testing.assert_array_equal(arrays[f"{name}.lora_B.weight"], qkv_kernel(module)["b"][1][:, columns].T)
    adapter, again = adapters.load_peft(tmp_path / "out", BODY)
    found, expected = adapter.delta(again, BODY), lora.delta(module, BODY)
    jax.tree.map(close, found, expected)


def test_what_was_read_goes_out_as_it_came(tmp_path):
    arrays, settings = query_and_value()
    head = {f"{PREFIX}classifier.weight": normal(3, WIDTH), f"{PREFIX}classifier.bias": normal(3)}
    folder = folder_of(tmp_path / "in", settings | {"modules_to_save": ["classifier"]}, arrays | head)
    adapter, module = adapters.load_peft(folder, BASE)
    adapters.save_peft(tmp_path / "out", adapter, module, BASE, modules=adapters.HF_MODULES["vit"])
    again = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    assert {name: array.shape for name, array in again.items()} == {
        name: array.shape for name, array in (arrays | head).items()
    }
    close(again[f"{PREFIX}classifier.weight"], normal(3, WIDTH))
    second, kept = adapters.load_peft(tmp_path / "out", BASE)
    jax.tree.map(close, second.delta(kept, BASE), adapter.delta(module, BASE))


def test_what_cannot_go_out(tmp_path):
    names = adapters.HF_MODULES["vit"]
    joint = adapters.lora(1, "qkv/kernel")
    fresh = joint.init(jax.random.key(0), BASE)
    with pytest.raises(ValueError, match="no LoRA factors that change a layer, and PEFT takes no empty adapter"):
        adapters.save_peft(tmp_path / "out", joint, fresh, BASE, modules=names)
    with pytest.raises(
        ValueError, match=r"the 36 outputs of blocks/attention/qkv/kernel can't be parted among a\.\{block\}, b, "
    ):
        adapters.save_peft(
            tmp_path / "out", joint, trained(joint), BASE,
            modules={"blocks/attention/qkv/kernel": ("a.{block}", "b", "c", "d", "e")},
        )  # fmt: skip
    strange = trained(joint) | {"cls": randomised(BASE["cls"], 0)}
    with pytest.raises(ValueError, match="PyTorch's names of cls are not known"):
        adapters.save_peft(tmp_path / "out", joint, strange, BASE, modules=names)
    assert not (tmp_path / "out").exists()


def test_pooling_that_the_base_has_not_is_left_out_and_a_second_tower_is_told(tmp_path):
    arrays, settings = query_and_value(name="vision_model.encoder.layers.{}.self_attn.{}_proj")
    settings["target_modules"].append("head.mlp.fc1")
    pooling = factors("vision_model.head.mlp.fc1", fan_out=HIDDEN)
    folder = folder_of(tmp_path / "one", settings, arrays | pooling)
    adapter, module = adapters.load_peft(folder, BASE)
    assert tree.names(adapter.delta(module, BASE)) == ["blocks/attention/qkv/kernel"]
    pooled = BASE | {"attention_pool": {"mlp": {"fc1": {"kernel": jnp.ones((WIDTH, HIDDEN))}}}}
    adapter, module = adapters.load_peft(folder, pooled)
    found = adapter.delta(module, pooled)["attention_pool"]["mlp"]["fc1"]["kernel"]
    close(found, product(pooling, "vision_model.head.mlp.fc1"))
    arrays |= factors("text_model.encoder.layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match=r"unexpected \(2\): ") as error:
        adapters.load_peft(folder_of(tmp_path / "two", settings, arrays | pooling), BASE)
    assert f"{PREFIX}text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight (2, 12)" in str(error.value)


def test_a_deeper_model_s_blocks_are_counted_in_tens(tmp_path):
    base = vit(depth=11)[1]
    names = [NOW.format(block, "q") for block in (1, 10)]
    arrays = {key: array for name in names for key, array in factors(name).items()}
    settings = {"target_modules": ["q_proj"], "layers_to_transform": [1, 10]}
    adapter, module = adapters.load_peft(folder_of(tmp_path, settings, arrays), base)
    found = qkv_kernel(adapter.delta(module, base))
    close(found[10][:, COLUMNS["q"]], product(arrays, NOW.format(10, "q"), 1.0))
    assert [bool(x.any()) for x in found] == [block in (1, 10) for block in range(11)]
