"""CLIP's text tower and its checkpoints: a plain NumPy forward pass, OpenAI's names, transformers, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from clip_cases import END, HEADS, START, in_openai_names, names_and_shapes, numpy_features, random_arrays, random_ids

from compo_jax import tree
from compo_jax.adapters import adapted, lora
from compo_jax.models import clip_text

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
LAYOUTS = {
    "hf": (lambda arrays: arrays, clip_text.from_hf, clip_text.to_hf),
    "openai": (in_openai_names, clip_text.from_openai, clip_text.to_openai),
}
CONFIG = {"model_type": "clip_text_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
          "num_attention_heads": HEADS, "vocab_size": 50, "max_position_embeddings": 11, "hidden_act": "quick_gelu",
          "layer_norm_eps": 1e-5, "projection_dim": 7, "eos_token_id": END}  # fmt: skip


def features(model, params, ids):
    return jax.jit(lambda params: model.apply({"params": params}, ids))(params)


# Forward pass


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_features_equal_a_plain_numpy_forward_pass(dtype, tolerance):
    arrays, ids = random_arrays(dtype), random_ids(3)
    with enable_x64(dtype == np.float64):
        model, params = clip_text.from_hf(arrays, heads=HEADS)
        result = features(model.clone(unroll=dtype == np.float64), params, ids)
        assert result.dtype == dtype
        expected = numpy_features(arrays, ids, HEADS, (ids == END).argmax(-1))
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def test_the_end_is_the_first_highest_id_or_the_one_that_is_named():
    arrays, ids = random_arrays(), random_ids(4)
    model, params = clip_text.from_hf(arrays, heads=HEADS)
    ends = (ids == END).argmax(-1)
    after = np.where(np.arange(11) > ends[:, None], 3, ids)[:, : ends.max() + 1]  # what fills up doesn't matter
    expected = numpy_features(arrays, ids, HEADS, ends)
    np.testing.assert_allclose(features(model, params, after), expected, rtol=1e-5, atol=1e-5)
    lower = np.where(ids == END, 30, np.where(ids == 30, 31, ids))
    expected = numpy_features(arrays, lower, HEADS, (lower == 30).argmax(-1))
    np.testing.assert_allclose(features(model.clone(end=30), params, lower), expected, rtol=1e-5, atol=1e-5)


def test_adapters_of_vits_fit_a_tower():
    model, params = clip_text.from_hf(random_arrays(), heads=HEADS)
    adapter, ids = lora(2), random_ids(2)
    module = jax.tree.map(lambda x: x + 0.1, adapter.init(jax.random.key(0), params))
    fast = jax.jit(adapted(model, adapter))(params, module, ids)
    expected = features(model, tree.add(params, adapter.delta(module, params)), ids)
    np.testing.assert_allclose(fast, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_is_near():
    model, params = clip_text.from_hf(random_arrays(), heads=HEADS)
    ids = random_ids(3)
    half = features(model.clone(dtype=jnp.bfloat16), params, ids)
    assert half.dtype == jnp.bfloat16
    expected = numpy_features(random_arrays(), ids, HEADS, (ids == END).argmax(-1))
    np.testing.assert_allclose(half.astype(np.float32), expected, atol=0.3)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, 30, END])
def test_features_equal_transformers(activation, end, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = {name: value for name, value in CONFIG.items() if name != "model_type"}
    config |= {"hidden_act": activation, "eos_token_id": end, "layer_norm_eps": 1e-3}
    reference = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3, generator=generator)
    reference.save_pretrained(tmp_path)
    model, params = clip_text.load(tmp_path)
    assert (model.heads, model.activation, model.epsilon) == (HEADS, activation, 1e-3)
    assert model.end == (None if end == 2 else end) and not model.temperature
    ids = random_ids(5)
    if end == 30:
        ids = np.where(ids == END, 30, np.where(ids == 30, 31, ids))
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).text_embeds.numpy()
    np.testing.assert_allclose(features(model, params, ids), expected, rtol=1e-5, atol=1e-5)
    theirs = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    assert clip_text.to_hf(params).keys() == theirs.keys()


# Names and shapes

PUBLISHED = {  # width, depth, heads, projection: ViT-B/32 and B/16, L/14, OpenCLIP's H/14 and bigG/14
    "B": (512, 12, 8, 512, 63_428_097),
    "L": (768, 12, 12, 768, 123_650_305),
    "H": (1024, 24, 16, 1024, 354_032_641),
    "bigG": (1280, 32, 20, 1280, 694_659_841),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_towers_have_their_names_shapes_size_and_heads(name):
    width, depth, heads, projection, size = PUBLISHED[name]
    shapes = names_and_shapes(width, depth, 4 * width, 49408, 77, projection)
    assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == size
    hollow = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    del hollow["text_model.final_layer_norm.bias"]  # so that nothing of its size is made: all else fits
    with pytest.raises(ValueError) as error:
        clip_text.from_hf(hollow)
    assert str(error.value).splitlines()[1:] == ["missing (1): final_layer_norm.bias"]
    model = clip_text.TextTower(width=width, depth=depth, heads=heads, projection=projection)
    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 77), jnp.int32))["params"]
    assert tree.size(params) == size


# Round trips, and the text half of a whole CLIP


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_exact(layout):
    rename, read, write = LAYOUTS[layout]
    arrays = rename(random_arrays())
    back = write(read(arrays, heads=HEADS)[1])
    assert back.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(back[name], arrays[name], strict=True)


@pytest.mark.parametrize("absent", ["logit_scale", "text_projection.weight"])
def test_what_a_checkpoint_leaves_out_the_tower_leaves_out(absent):
    arrays = random_arrays()
    del arrays[absent]
    model, params = clip_text.from_hf(arrays, heads=HEADS)
    assert clip_text.to_hf(params).keys() == arrays.keys()
    assert (model.projection, model.temperature) == ((7, False) if absent == "logit_scale" else (0, True))
    assert features(model, params, random_ids(2)).shape == (2, 7 if absent == "logit_scale" else 24)


def test_only_the_text_half_of_a_whole_clip_is_read():
    vision = {"vision_model.encoder.layers.0.mlp.fc1.bias": np.ones(9), "visual_projection.weight": np.ones((7, 9)),
              "text_model.embeddings.position_ids": np.arange(11)[None], "vision_model.post_layernorm.bias": np.ones(9),
              "vision_model.embeddings.position_ids": np.arange(5)[None]}  # fmt: skip
    params = clip_text.from_hf(random_arrays() | vision, heads=HEADS)[1]
    assert tree.fingerprint(params) == tree.fingerprint(clip_text.from_hf(random_arrays(), heads=HEADS)[1])
    vision = {"visual.proj": np.ones((9, 7)), "visual.transformer.resblocks.0.ln_1.bias": np.ones(9),
              "input_resolution": np.array(224), "context_length": np.array(11), "vocab_size": np.array(50),
              "attn_mask": np.ones((11, 11))}  # fmt: skip
    again = clip_text.from_openai(in_openai_names(random_arrays()) | vision, heads=HEADS)[1]
    assert tree.fingerprint(again) == tree.fingerprint(params)


# What is refused


def test_all_mismatches_are_listed_at_once():
    arrays = random_arrays()
    del arrays["text_model.final_layer_norm.weight"], arrays["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    arrays |= {"text_model.extra.weight": np.zeros((2, 3)), "prompt": np.zeros(3)}
    arrays["text_model.encoder.layers.0.mlp.fc1.weight"] = np.zeros((24, 40))
    with pytest.raises(ValueError) as error:
        clip_text.from_hf(arrays, heads=HEADS)
    summary, missing, unexpected, misshaped = str(error.value).splitlines()
    assert "a text tower of width 24, depth 2, 50 token ids and 11 tokens a text" in summary
    assert missing.startswith("missing (2): ") and "self_attn.k_proj.bias" in missing
    assert unexpected == "unexpected (2): extra.weight (2, 3), prompt (3,)"
    assert misshaped.endswith("layers.0.mlp.fc1.weight (24, 40) instead of (40, 24)")


def test_a_checkpoint_without_text_is_refused():
    told = r"^none of the 1 arrays \(vision_model\.post_layernorm\.bias\) is called as those of a CLIP's text tower"
    with pytest.raises(ValueError, match=told):
        clip_text.from_hf({"vision_model.post_layernorm.bias": np.ones(9)})
    with pytest.raises(ValueError, match=r"missing(.|\n)*no name is that of a CLIP text tower"):
        clip_text.from_openai(random_arrays())


def test_heads_are_64_wide_or_asked_for():
    with pytest.raises(ValueError, match="no head of 64 channels divides the width 24.*: pass heads="):
        clip_text.from_hf(random_arrays())
    with pytest.raises(ValueError, match="5 heads don't divide the width 24"):
        clip_text.from_hf(random_arrays(), heads=5)
    assert clip_text.from_hf(random_arrays(width=128))[0].heads == 2


def test_damaged_numbers_are_refused():
    arrays = random_arrays()
    arrays["text_projection.weight"][0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite numbers in projection/kernel"):
        clip_text.from_hf(arrays, heads=HEADS)
    clip_text.from_hf(arrays, heads=HEADS, check_finite=False)


@pytest.mark.parametrize(
    "end, ids, told",
    [
        (None, np.zeros((0, 3), int), r"there is no text in token ids of shape \(0, 3\)"),
        (None, np.full((1, 12), END), r"texts of 12 tokens are longer than the 11 that the model reads"),
        (None, [[START, 1, 50]], r"token ids from 1 to 50 and a model of the ids 0 to 49: take the tokenizer of this"),
        (None, [[START, 1, -1]], r"token ids from -1 to 48"),
        (None, [[START, 1, 2]], r"1 of 1 texts have no end-of-text token \(the highest id, 48 here\).* at \[\[0\]\]"),
        (None, [[START, 1, END], [1, 5, 2]], r"1 of 2 texts have no .* \(the highest id, 49 here\).* at \[\[1\]\]"),
        (30, [[START, 1, END], [START, 30, 2]], r"1 of 2 texts have no end-of-text token \(30\).* at \[\[0\]\]"),
    ],
)
def test_ids_that_the_model_can_not_read_are_refused(end, ids, told):
    model, params = clip_text.from_hf(random_arrays(), heads=HEADS)
    with pytest.raises(ValueError, match=told):
        model.clone(end=end).apply({"params": params}, np.asarray(ids))


def test_a_tower_that_can_not_be_is_refused():
    for wrong, told in [({"heads": 7}, "7 heads don't divide"), ({"depth": 0}, "depth=0"), ({"end": -1}, "end=-1")]:
        with pytest.raises(ValueError, match=told):
            clip_text.TextTower(**wrong)
    with pytest.raises(ValueError, match="no activation is called 'relu'"):
        clip_text.TextTower(activation="relu")


# Files


def write_folder(path, config=CONFIG, arrays=None):
    safetensors.numpy.save_file(arrays or random_arrays(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_folder_says_how_its_tower_was_trained(tmp_path):
    config = CONFIG | {"num_attention_heads": 6, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "eos_token_id": 30}
    model, params = clip_text.load(write_folder(tmp_path, config), dtype=jnp.bfloat16)
    assert (model.heads, model.activation, model.epsilon, model.end) == (6, "gelu", 1e-6, 30)
    assert model.dtype == jnp.bfloat16
    assert tree.fingerprint(params) == tree.fingerprint(clip_text.from_hf(random_arrays(), heads=6)[1])
    assert clip_text.load(tmp_path, heads=2, activation="quick_gelu")[0].activation == "quick_gelu"
    whole = {"model_type": "clip", "text_config": config | {"eos_token_id": 2}, "vision_config": {}}
    model, _ = clip_text.load(write_folder(tmp_path, whole))
    assert (model.heads, model.end) == (6, None)
    old = {"model_type": "clip", "text_config": {}, "text_config_dict": {"num_attention_heads": 4}}
    assert clip_text.load(write_folder(tmp_path, old))[0].heads == 4


def test_a_file_of_openai_names_is_read(tmp_path):
    path = tmp_path / "clip.safetensors"
    arrays = in_openai_names(random_arrays(np.float16))
    arrays["text_projection"] = arrays["text_projection"].copy()
    safetensors.numpy.save_file(arrays, path)
    model, params = clip_text.load(path, heads=HEADS)
    assert model.end is None and {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match="clip.safetensors: no head of 64 channels"):
        clip_text.load(path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        clip_text.load(tmp_path / "other.safetensors")


def test_the_text_half_of_several_files_is_read(tmp_path):
    arrays = random_arrays() | {"vision_model.post_layernorm.bias": np.ones(9, np.float32)}
    halves = {"a.safetensors": list(arrays)[:20], "b.safetensors": list(arrays)[20:]}
    for file, names in halves.items():
        safetensors.numpy.save_file({name: arrays[name] for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": CONFIG}))
    model, params = clip_text.load(tmp_path)
    assert model.heads == HEADS
    assert tree.fingerprint(params) == tree.fingerprint(clip_text.from_hf(random_arrays(), heads=HEADS)[1])


def test_a_description_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="its model_type is 'siglip', which has no text tower of CLIP"):
        clip_text.load(write_folder(tmp_path, {"model_type": "siglip"}))
