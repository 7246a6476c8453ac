"""ViT with the checkpoints of transformers' and timm's models of random weights, at two resolutions, on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from compo_jax import models

torch = pytest.importorskip("torch")

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 4, "image_size": 24}
HIDDEN = {"intermediate_size": 40}


def images(side):
    return np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(np.float32)


def pixels(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def randomized(module):
    """`module` with random parameters near what trained ones are like."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            one = "norm" in name and name.endswith("weight")
            parameter.normal_(mean=float(one), std=0.2, generator=generator)
    return module.eval()


def arrays_of(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def close(kind, ours, theirs):
    difference = float(np.abs(np.asarray(ours) - theirs).max())
    print(f"{kind}: {difference:.1e}")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# transformers


def hf(kind, **changes):
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40,
            "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    sizes = SIZES | HIDDEN
    if kind == "clip full":
        config = transformers.CLIPConfig(text_config=text, vision_config=sizes, projection_dim=7)
        return randomized(transformers.CLIPModel(config))
    if kind == "siglip classifier":
        config = transformers.SiglipConfig(text_config=text, vision_config=sizes)
        config.num_labels = 5
        return randomized(transformers.SiglipForImageClassification(config))
    name, config = {
        "vit": ("ViTModel", transformers.ViTConfig(**sizes)),
        "vit classifier": ("ViTForImageClassification", transformers.ViTConfig(**sizes, num_labels=5)),
        "dinov2": ("Dinov2Model", transformers.Dinov2Config(**SIZES)),
        "dinov2 classifier": ("Dinov2ForImageClassification", transformers.Dinov2Config(**SIZES, num_labels=5)),
        "dinov2_with_registers": (
            "Dinov2WithRegistersModel", transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)
        ),
        "dinov2_with_registers classifier": (
            "Dinov2WithRegistersForImageClassification",
            transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3, num_labels=5),
        ),
        "clip": ("CLIPVisionModel", transformers.CLIPVisionConfig(**sizes)),
        "clip gelu": ("CLIPVisionModel", transformers.CLIPVisionConfig(**sizes, hidden_act="gelu")),
        "clip projection": (
            "CLIPVisionModelWithProjection", transformers.CLIPVisionConfig(**sizes, projection_dim=7)
        ),
        "siglip": ("SiglipVisionModel", transformers.SiglipVisionConfig(**sizes)),
    }[kind]  # fmt: skip
    return randomized(getattr(transformers, name)(config))


def written(module, folder):
    """The arrays as transformers writes them, under other names than its modules have."""
    module.save_pretrained(folder)
    return safetensors.numpy.load_file(folder / "model.safetensors")


def hf_output(kind, module, x):
    """What the model says of the images: logits, image embeddings, or the pooled feature."""
    resized = {"interpolate_pos_encoding": True} if "dinov2" not in kind else {}
    with torch.no_grad():
        if kind == "clip full":
            return module.get_image_features(pixels(x), **resized).pooler_output.numpy()
        out = module(pixels(x), **resized)
    if "classifier" in kind:
        return out.logits.numpy()
    if kind == "clip projection":
        return out.image_embeds.numpy()
    return (out.pooler_output if kind.split()[0] in ("clip", "siglip") else out.last_hidden_state[:, 0]).numpy()


HF = ["vit", "vit classifier", "dinov2", "dinov2 classifier", "dinov2_with_registers",
      "dinov2_with_registers classifier", "clip", "clip gelu", "clip projection", "clip full", "siglip",
      "siglip classifier"]  # fmt: skip


@pytest.mark.parametrize("kind", HF)
def test_features_and_logits_equal_transformers_at_three_resolutions(kind, tmp_path):
    module = hf(kind)
    module.save_pretrained(tmp_path)
    for side in (24, 36, 12):
        model, params = models.load(tmp_path, image_size=side)
        assert (model.heads, model.image_size) == (3, side)
        x = images(side)
        close(f"transformers {kind} {side}", jax.jit(model.apply)({"params": params}, x), hf_output(kind, module, x))


@pytest.mark.parametrize("kind", [kind for kind in HF if kind not in ("clip gelu", "dinov2_with_registers")])
def test_to_hf_gives_back_what_transformers_wrote(kind, tmp_path):
    module = hf(kind)
    arrays = written(module, tmp_path)
    _, params = models.from_hf(arrays, heads=3)
    back = models.to_hf(params, module.config.model_type.removesuffix("_vision_model"))
    unread = {name for name in arrays if "text" in name or "logit" in name or "pooler" in name or "mask" in name}
    if kind == "siglip classifier":
        unread |= {name for name in arrays if ".head." in name}
    assert {name.removeprefix("vision_model.") for name in back} == {
        name.removeprefix("vision_model.") for name in arrays.keys() - unread
    }
    for name, array in back.items():
        same = arrays[name] if name in arrays else arrays[name.removeprefix("vision_model.")]
        np.testing.assert_array_equal(array, same, strict=True)


# timm

TIMM = {
    "plain": {},
    "DeiT III": {"no_embed_class": True, "init_values": 1e-6},
    "DINOv2": {"init_values": 1.0},
    "registers": {"init_values": 1.0, "reg_tokens": 3, "no_embed_class": True},
    "mean": {"global_pool": "avg"},
    "mean without class token": {
        "global_pool": "avg", "class_token": False, "no_embed_class": True, "reg_tokens": 2
    },
    "mean of normed tokens": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "CLIP": {"pre_norm": True, "norm_layer": "layernorm"},
    "OpenAI's CLIP": {"pre_norm": True, "norm_layer": "layernorm", "act_layer": "quick_gelu"},
    "SigLIP": {"class_token": False, "global_pool": "map"},
    "SigLIP of tanh": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
}  # fmt: skip


def timm_model(side, kind, trained=None):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    options = dict(TIMM[kind])
    if options.get("norm_layer") == "layernorm":
        options["norm_layer"] = lambda width, **rest: torch.nn.LayerNorm(width, eps=1e-5, **rest)
    module = vision_transformer.VisionTransformer(
        img_size=side, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5, **options
    )
    if trained is None:
        return randomized(module)
    module.load_state_dict(vision_transformer.checkpoint_filter_fn(trained.state_dict(), module))
    return module.eval()


@pytest.mark.parametrize("kind", TIMM)
def test_logits_equal_timm_at_three_resolutions_and_come_back(kind):
    trained = timm_model(24, kind)
    arrays = arrays_of(trained)
    activation = TIMM[kind].get("act_layer", "gelu")
    for side in (24, 36, 12):
        model, params = models.from_timm(arrays, heads=3, image_size=side, activation=activation)
        x = images(side)
        with torch.no_grad():
            expected = timm_model(side, kind, trained)(pixels(x)).numpy()
        close(f"timm {kind} {side}", jax.jit(model.apply)({"params": params}, x), expected)
    back = models.to_timm(models.from_timm(arrays, heads=3, activation=activation)[1])
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array, strict=True)


def test_openai_clip_is_what_transformers_and_timm_make_of_it(tmp_path):
    convert = pytest.importorskip("timm.models.vision_transformer")._convert_openai_clip
    params = models.from_hf(written(hf("clip projection"), tmp_path), heads=3)[1]
    arrays = models.to_openai_clip(params)
    model, back = models.from_openai_clip(arrays | {"logit_scale": np.ones(()), "ln_final.bias": np.ones(9)}, heads=3)
    assert model.activation == "quick_gelu" and model.projection == 7
    x = images(24)
    ours = jax.jit(model.apply)({"params": back}, x)
    close("openai", ours, hf_output("clip projection", hf("clip projection"), x))
    timm_arrays = convert({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}, None)
    model, params = models.from_timm(
        {name: tensor.numpy() for name, tensor in timm_arrays.items()}, heads=3, activation="quick_gelu"
    )
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), ours, atol=1e-6)


def test_augreg_is_what_timm_reads(tmp_path):
    load_weights = pytest.importorskip("timm.models.vision_transformer")._load_weights
    module = timm_model(24, "plain")
    params = models.from_timm(arrays_of(module), heads=3)[1]
    np.savez(tmp_path / "S_4.npz", **models.to_augreg(params, heads=3))
    other = timm_model(24, "plain")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_weights(other, str(tmp_path / "S_4.npz"))
    for name, array in arrays_of(other).items():
        np.testing.assert_array_equal(array, arrays_of(module)[name])
    model, back = models.load(tmp_path / "S_4.npz")
    assert model.heads == 3
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), back, params))
