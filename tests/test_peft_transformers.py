"""PEFT's adapters of Hugging Face's image classifiers and of timm's ViT, made and read by those libraries themselves,
where they are installed: the same merged weights, and for plain ViTs the same logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from test_peft import ADAPTERS, DEPTH, WIDTH, trained  # noqa: E402

from compo_jax import adapters, tree  # noqa: E402
from compo_jax.models import ViT, from_timm  # noqa: E402

SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
PLAIN = SIZES | {"intermediate_size": 20, "layer_norm_eps": 1e-6}
TEXT = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 30}
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", PLAIN),
    "bare vit": ("ViTModel", "ViTConfig", PLAIN),
    "deit": ("DeiTForImageClassification", "DeiTConfig", PLAIN),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", SIZES | {"mlp_ratio": 2}),
    "registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", SIZES | {"mlp_ratio": 2}),
    "clip": ("CLIPForImageClassification", "CLIPConfig", {"vision_config": PLAIN, "text_config": TEXT}),
    "bare clip": ("CLIPVisionModel", "CLIPVisionConfig", PLAIN),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", {"vision_config": PLAIN, "text_config": TEXT}),
}
ROLES = {  # what a module within a block is, by the end of its name in one version or another
    "q": r"(attention\.query|\.q_proj)", "k": r"(attention\.key|\.k_proj)", "v": r"(attention\.value|\.v_proj)",
    "proj": r"(attention\.output\.dense|\.o_proj|\.out_proj)", "fc1": r"(intermediate\.dense|mlp\.fc1)",
    "fc2": r"((?<!attention\.)output\.dense|mlp\.fc2)", "norm1": "(layernorm_before|norm1)",
    "norm2": "(layernorm_after|norm2)",
}  # fmt: skip


def random_model(name):
    model, config, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**sizes, num_labels=3)).eval()
    return shaken(model, model.parameters())


def shaken(model, parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def role(model, *roles):
    """The last parts of the names of the modules that have these roles."""
    names = [name for name, _ in model.named_modules() if re.search(r"layers?\.0\.", name)]
    return sorted({name.split(".0.")[1] for name in names for r in roles if re.search(f"{ROLES[r]}$", name)})


def ours(model):
    """The weights that our ViT shares with a model of transformers, as our tree."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    blocks = {}
    for name, value in state.items():
        if found := re.search(r"layers?\.(\d+)\.(.+)\.(weight|bias)$", name):
            kind = next((r for r, pattern in ROLES.items() if re.search(f"{pattern}$", "." + found[2])), found[2])
            blocks.setdefault((kind, found[3]), []).append(value.T)
    blocks = {key: np.stack(values) for key, values in blocks.items()}
    for kind in ("weight", "bias"):
        blocks["qkv", kind] = np.concatenate([blocks[x, kind] for x in "qkv"], -1)
    layer = lambda name: {"kernel": blocks[name, "weight"], "bias": blocks[name, "bias"]}
    norm = lambda name: {"scale": blocks[name, "weight"], "bias": blocks[name, "bias"]}
    of = lambda pattern: next(value for name, value in state.items() if re.search(pattern, name))
    params = {
        "blocks": {
            "attention": {"qkv": layer("qkv"), "proj": layer("proj")},
            "mlp": {"fc1": layer("fc1"), "fc2": layer("fc2")},
            "norm1": norm("norm1"),
            "norm2": norm("norm2"),
        },
        "norm": {kind: of(rf"(\.|^)(post_)?layernorm\.{x}$") for kind, x in (("scale", "weight"), ("bias", "bias"))},
    }
    if "classifier.weight" in state:
        params["head"] = {"kernel": state["classifier.weight"].T, "bias": state["classifier.bias"]}
    if any("cls_token" in name for name in state):
        patch = of(r"projection\.weight").transpose(2, 3, 1, 0)
        params |= {"cls": of("cls_token"), "position": of(r"position_embeddings")}
        params["patch"] = {"kernel": patch, "bias": of(r"projection\.bias")}
    return jax.tree.map(jnp.asarray, params)


def made(model, config, folder):
    """`model` with an adapter of random numbers, which `folder` then holds."""
    adapted = peft.get_peft_model(model, config).eval()
    shaken(adapted, [p for p in adapted.parameters() if p.requires_grad], seed=1)
    adapted.save_pretrained(folder)
    return adapted


def largest(differences):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(differences))


IMAGES = np.random.default_rng(3).normal(size=(5, 8, 8, 3)).astype(np.float32)
VIT = ViT(image_size=8, patch=4, width=12, depth=2, heads=2, mlp_ratio=20 / 12, classes=3)


def theirs_of(model):
    return model(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())).logits.detach().numpy()


LORA = {
    "query and value": lambda r: {"target_modules": r("q", "v"), "modules_to_save": ["classifier"]},
    "ranks and scales": lambda r: {
        "target_modules": "all-linear", "lora_alpha": 5, "use_rslora": True, "alpha_pattern": {r("v")[0]: 7},
        "rank_pattern": {r("q")[0]: 2, "classifier": 1}, "exclude_modules": r("k"),
    },
    "one block": lambda r: {"target_modules": r("q", "fc2"), "layers_to_transform": [1]},
    "an expression": lambda r: {"target_modules": rf".*\.1\..*({'|'.join(r('v', 'fc1'))})", "fan_in_fan_out": True},
    "biases": lambda r: {"target_modules": r("q", "v", "proj"), "bias": "lora_only"},
    "all biases": lambda r: {
        "target_modules": r("q", "fc1"), "bias": "all", "modules_to_save": ["classifier", "layernorm"],
    },
    "dora": lambda r: {
        "target_modules": r("q", "v", "proj", "fc1"), "use_dora": True, "lora_alpha": 3, "rank_pattern": {"fc1": 2},
        "modules_to_save": ["classifier"],
    },
}  # fmt: skip
IA3 = {
    "ia3": lambda r: {"target_modules": r("k", "v", "fc1"), "feedforward_modules": []},
    "ia3 as in its paper": lambda r: {
        "target_modules": r("k", "v", "fc2"), "feedforward_modules": r("fc2"), "modules_to_save": ["classifier"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [*LORA, *IA3])
def test_a_classifier_that_peft_adapted_has_the_same_logits_here(name, tmp_path):
    model = random_model("vit")
    base, plain = ours(model), theirs_of(model)
    roles = lambda *names: role(model, *names)
    config = peft.LoraConfig(**({"r": 3} | LORA[name](roles))) if name in LORA else peft.IA3Config(**IA3[name](roles))
    adapted = made(model, config, tmp_path)
    expected = theirs_of(adapted)
    if name == "biases" and int(peft.__version__.split(".")[1]) < 21:
        with pytest.raises(ValueError, match="PEFT before version 0.21 left the biases"):
            adapters.load_peft(tmp_path, base)
        return
    adapter, module = adapters.load_peft(tmp_path, base)
    found = jax.jit(adapters.adapted(VIT, adapter))(base, module, IMAGES)
    print(f"{name}: {np.abs(found - expected).max():.1e} of {np.abs(expected).max():.2f}")
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    merged = ours(adapted.merge_and_unload())
    weights = tree.add(base, adapter.delta(module, base))
    assert largest(jax.tree.map(jnp.subtract, weights, merged)) < 1e-5
    if adapter.name == "lora":
        names = adapters.HF_MODULES["vit" if "attention.q_proj" in roles("q") else "vit-v4"]
        adapters.save_peft(tmp_path / "again", adapter, module, base, modules=names)
        again = peft.PeftModel.from_pretrained(random_model("vit"), tmp_path / "again").eval()
        np.testing.assert_allclose(theirs_of(again), expected, rtol=1e-5, atol=1e-5)
    if config.modules_to_save:
        body = {part: leaf for part, leaf in base.items() if part != "head"}
        adapter, module = adapters.load_peft(tmp_path, body)
        whole = tree.add(body, adapter.delta(module, body)) | {"head": adapters.peft_head(tmp_path)}
        assert largest(jax.tree.map(jnp.subtract, whole, merged)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_those_that_peft_merges(name, tmp_path):
    model = random_model(name)
    base = ours(model)
    saved = ["classifier"] if "head" in base else None
    config = peft.LoraConfig(r=3, target_modules=role(model, "q", "v", "proj", "fc2"), modules_to_save=saved)
    adapted = made(model, config, tmp_path)
    adapter, module = adapters.load_peft(tmp_path, base)
    merged = ours(adapted.merge_and_unload())
    weights = tree.add(base, adapter.delta(module, base))
    print(f"{name}: {largest(jax.tree.map(jnp.subtract, weights, merged)):.1e}")
    assert largest(jax.tree.map(jnp.subtract, base, merged)) > 0.1
    assert largest(jax.tree.map(jnp.subtract, weights, merged)) < 1e-5
    assert module["blocks"]["attention"]["qkv"]["kernel"]["a"].shape == (2, 12, 6)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_peft_puts_a_module_of_ours_onto_a_classifier(kind, tmp_path):
    model = random_model("vit")
    base, plain = ours(model), theirs_of(model)
    adapter = {"lora": adapters.lora(2), "ia3": adapters.ia3(bias=True)}[kind]
    rng = np.random.default_rng(4)
    shapes = jax.eval_shape(adapter.init, jax.random.key(0), base)
    module = jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.4, size=x.shape), x.dtype), shapes)
    names = adapters.HF_MODULES["vit" if "attention.q_proj" in role(model, "q") else "vit-v4"]
    adapters.save_peft(tmp_path / "out", adapter, module, base, modules=names)
    found = theirs_of(peft.PeftModel.from_pretrained(model, tmp_path / "out").eval())
    expected = jax.jit(adapters.adapted(VIT, adapter))(base, module, IMAGES)
    print(f"{kind} out: {np.abs(found - expected).max():.1e} of {np.abs(expected).max():.2f}")
    assert np.abs(found - plain).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# timm's names


def timm_vit():
    """A Vision Transformer under timm's names in PyTorch, and ours with the same weights; random images for both."""
    from test_oracle import Transformer, arrays_of, set_randomly

    theirs = set_randomly(Transformer(8, 4, WIDTH, DEPTH, 2, 3), 0.3).eval()
    ours, base = from_timm(arrays_of(theirs), heads=2)
    images = np.random.default_rng(3).normal(size=(5, 8, 8, 3)).astype(np.float32)
    return theirs, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), ours, base, images


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_loads_what_is_written(kind, tmp_path):
    theirs, pixels, ours, base, images = timm_vit()
    plain = theirs(pixels).detach().numpy()
    adapter = ADAPTERS[kind]
    module = trained(adapter, base)
    adapters.save_peft(tmp_path / "out", adapter, module, base)
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    found = loaded(pixels).detach().numpy()
    expected = jax.jit(adapters.adapted(ours, adapter))(base, module, images)
    assert np.abs(found - plain).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("lora", {"r": 3, "lora_alpha": 7, "target_modules": ["qkv", "fc2", "head"]}),
        ("lora", {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear",
                  "rank_pattern": {"attn.qkv": 6, r"blocks\.1\.mlp\.fc1": 1}, "alpha_pattern": {"proj": 5}}),
        ("lora", {"r": 2, "target_modules": ["qkv", "fc1"], "layers_to_transform": [1], "layers_pattern": "blocks"}),
        ("ia3", {"target_modules": ["qkv", "fc1", "attn.proj"], "feedforward_modules": []}),
    ],
    ids=["patterns of targets", "ranks and scales", "one block", "ia3"],
)  # fmt: skip
def test_what_peft_saves_is_read(kind, settings, tmp_path):
    theirs, pixels, ours, base, images = timm_vit()
    plain = theirs(pixels).detach().numpy()
    made = peft.get_peft_model(theirs, {"lora": peft.LoraConfig, "ia3": peft.IA3Config}[kind](**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(tmp_path)
    expected = made(pixels).detach().numpy()
    adapter, module = adapters.load_peft(tmp_path, base)
    found = jax.jit(adapters.adapted(ours, adapter))(base, module, images)
    assert np.abs(expected - plain).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
