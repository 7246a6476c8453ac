"""The names and shapes of published checkpoints, written out here by hand, and every layout there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax import adapters, models, tree
from compo_jax.models import ViT, architecture, layouts, pretrained


def pair(name, *shape):
    """A layer's weight and bias under PyTorch's names."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


# What is published: (names and shapes, the model, its parameters in millions as the model cards have them)


def timm(width, depth, patch, rows, hidden=None, classes=0, cls=True, scale=False, registers=0, clip=False, pool=False):
    hidden = hidden or 4 * width
    shapes = {"pos_embed": (1, rows, width)} | ({"cls_token": (1, 1, width)} if cls else {})
    shapes |= pair("patch_embed.proj", width, 3, patch, patch) | pair("norm", width)
    if registers:
        shapes["reg_token"] = (1, registers, width)
    if clip:
        del shapes["patch_embed.proj.bias"]
        shapes |= pair("norm_pre", width)
    for i in range(depth):
        at = f"blocks.{i}"
        shapes |= pair(f"{at}.norm1", width) | pair(f"{at}.attn.qkv", 3 * width, width)
        shapes |= pair(f"{at}.attn.proj", width, width) | pair(f"{at}.norm2", width)
        shapes |= pair(f"{at}.mlp.fc1", hidden, width) | pair(f"{at}.mlp.fc2", width, hidden)
        shapes |= {f"{at}.ls1.gamma": (width,), f"{at}.ls2.gamma": (width,)} if scale else {}
    if pool:
        shapes |= {"attn_pool.latent": (1, 1, width)} | pair("attn_pool.q", width, width)
        shapes |= pair("attn_pool.kv", 2 * width, width) | pair("attn_pool.proj", width, width)
        shapes |= pair("attn_pool.norm", width) | pair("attn_pool.mlp.fc1", hidden, width)
        shapes |= pair("attn_pool.mlp.fc2", width, hidden)
    return shapes | (pair("head", classes, width) if classes else {})


def hf_attention(at, width):
    parts = [pair(f"{at}.attention.attention.{part}", width, width) for part in ("query", "key", "value")]
    return parts[0] | parts[1] | parts[2] | pair(f"{at}.attention.output.dense", width, width)


def hf_embeddings(root, width, patch, rows):
    return {
        f"{root}embeddings.cls_token": (1, 1, width),
        f"{root}embeddings.position_embeddings": (1, rows, width),
    } | pair(f"{root}embeddings.patch_embeddings.projection", width, 3, patch, patch)


def hf_vit(width, depth, patch, rows, classes=0):
    root = "vit." if classes else ""
    shapes = hf_embeddings(root, width, patch, rows) | pair(f"{root}layernorm", width)
    for i in range(depth):
        at = f"{root}encoder.layer.{i}"
        shapes |= hf_attention(at, width) | pair(f"{at}.layernorm_before", width) | pair(f"{at}.layernorm_after", width)
        shapes |= pair(f"{at}.intermediate.dense", 4 * width, width) | pair(f"{at}.output.dense", width, 4 * width)
    return shapes | (pair("classifier", classes, width) if classes else pair("pooler.dense", width, width))


def hf_dinov2(width, depth, rows, registers=0, classes=0):
    root = "dinov2." if classes else ""
    shapes = hf_embeddings(root, width, 14, rows) | pair(f"{root}layernorm", width)
    shapes[f"{root}embeddings.mask_token"] = (1, width)
    if registers:
        shapes[f"{root}embeddings.register_tokens"] = (1, registers, width)
    for i in range(depth):
        at = f"{root}encoder.layer.{i}"
        shapes |= hf_attention(at, width) | pair(f"{at}.norm1", width) | pair(f"{at}.norm2", width)
        shapes |= pair(f"{at}.mlp.fc1", 4 * width, width) | pair(f"{at}.mlp.fc2", width, 4 * width)
        shapes |= {f"{at}.layer_scale1.lambda1": (width,), f"{at}.layer_scale2.lambda1": (width,)}
    return shapes | (pair("classifier", classes, 2 * width) if classes else {})


def hf_tower(root, width, depth, hidden):
    shapes = {}
    for i in range(depth):
        at = f"{root}.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= pair(f"{at}.self_attn.{part}", width, width)
        shapes |= pair(f"{at}.layer_norm1", width) | pair(f"{at}.layer_norm2", width)
        shapes |= pair(f"{at}.mlp.fc1", hidden, width) | pair(f"{at}.mlp.fc2", width, hidden)
    return shapes


def hf_text():
    """A few names of a text tower, which are left out."""
    return hf_tower("text_model", 512, 12, 2048) | {
        "text_model.embeddings.token_embedding.weight": (49408, 512),
        "text_model.embeddings.position_ids": (1, 77),
        "logit_scale": (),
    }


def hf_clip(width, depth, patch, rows, projection):
    return {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (rows, width),
        "vision_model.embeddings.position_ids": (1, rows),
        "visual_projection.weight": (projection, width),
        "text_projection.weight": (projection, 512),
        **pair("vision_model.pre_layrnorm", width),
        **pair("vision_model.post_layernorm", width),
        **hf_tower("vision_model", width, depth, 4 * width),
        **hf_text(),
    }


def hf_siglip(width, depth, patch, rows, hidden):
    head = "vision_model.head"
    return {
        **pair("vision_model.embeddings.patch_embedding", width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (rows, width),
        **pair("vision_model.post_layernorm", width),
        **hf_tower("vision_model", width, depth, hidden),
        f"{head}.probe": (1, 1, width),
        f"{head}.attention.in_proj_weight": (3 * width, width),
        f"{head}.attention.in_proj_bias": (3 * width,),
        **pair(f"{head}.attention.out_proj", width, width),
        **pair(f"{head}.layernorm", width),
        **pair(f"{head}.mlp.fc1", hidden, width),
        **pair(f"{head}.mlp.fc2", width, hidden),
        **hf_text(),
        "logit_bias": (1,),
    }


def openai_clip(width, depth, patch, rows, projection):
    shapes = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (rows, width),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.proj": (width, projection),
        "positional_embedding": (77, 512),
        "text_projection": (512, projection),
        "logit_scale": (),
        "token_embedding.weight": (49408, 512),
        **pair("visual.ln_pre", width),
        **pair("visual.ln_post", width),
        **pair("ln_final", 512),
    }
    for root, wide, deep in (("visual.", width, depth), ("", 512, 12)):
        for i in range(deep):
            at = f"{root}transformer.resblocks.{i}"
            shapes |= {f"{at}.attn.in_proj_weight": (3 * wide, wide), f"{at}.attn.in_proj_bias": (3 * wide,)}
            shapes |= pair(f"{at}.attn.out_proj", wide, wide) | pair(f"{at}.ln_1", wide) | pair(f"{at}.ln_2", wide)
            shapes |= pair(f"{at}.mlp.c_fc", 4 * wide, wide) | pair(f"{at}.mlp.c_proj", wide, 4 * wide)
    return shapes


def augreg(width, depth, patch, rows, heads, classes, representation=False):
    size = width // heads
    shapes = {
        "cls": (1, 1, width),
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, rows, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, classes),
        "head/bias": (classes,),
    }
    for i in range(depth):
        at = f"Transformer/encoderblock_{i}"
        for part in ("query", "key", "value"):
            shapes[f"{at}/MultiHeadDotProductAttention_1/{part}/kernel"] = (width, heads, size)
            shapes[f"{at}/MultiHeadDotProductAttention_1/{part}/bias"] = (heads, size)
        shapes[f"{at}/MultiHeadDotProductAttention_1/out/kernel"] = (heads, size, width)
        shapes[f"{at}/MultiHeadDotProductAttention_1/out/bias"] = (width,)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{at}/{norm}/scale": (width,), f"{at}/{norm}/bias": (width,)}
        for dense, ins, outs in (("Dense_0", width, 4 * width), ("Dense_1", 4 * width, width)):
            shapes |= {f"{at}/MlpBlock_3/{dense}/kernel": (ins, outs), f"{at}/MlpBlock_3/{dense}/bias": (outs,)}
    if representation:
        shapes |= {"pre_logits/kernel": (width, width), "pre_logits/bias": (width,)}
    return shapes


S14 = ViT(518, 14, 384, 12, 6, layer_scale=True)
B16 = ViT(224, 16, 768, 12, 12)
CLIP = {"pre_norm": True, "activation": "quick_gelu", "epsilon": 1e-5}
SIGLIP = {"class_token": False, "activation": "gelu_tanh", "pool": "attention"}
PUBLISHED = {
    "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k": (
        timm(768, 12, 16, 197, classes=1000), B16.copy(classes=1000), 86.57),
    "timm/deit3_small_patch16_224.fb_in1k": (
        timm(384, 12, 16, 196, classes=1000, scale=True),
        ViT(224, 16, 384, 12, 6, classes=1000, layer_scale=True, class_position=False), 22.06),
    "timm/vit_small_patch14_dinov2.lvd142m": (timm(384, 12, 14, 1370, scale=True), S14, 22.06),
    "timm/vit_small_patch14_reg4_dinov2.lvd142m": (
        timm(384, 12, 14, 1369, scale=True, registers=4), S14.copy(registers=4, class_position=False), 22.06),
    "timm/vit_base_patch16_clip_quickgelu_224.openai": (
        timm(768, 12, 16, 197, classes=512, clip=True), B16.copy(classes=512, **CLIP), 86.19),
    "timm/vit_base_patch16_siglip_224.webli": (
        timm(768, 12, 16, 196, cls=False, pool=True), B16.copy(class_token=False, pool="attention"), 92.88),
    "google/vit-base-patch16-224": (hf_vit(768, 12, 16, 197, 1000), B16.copy(classes=1000, epsilon=1e-12), 86.57),
    "google/vit-base-patch16-224-in21k": (hf_vit(768, 12, 16, 197), B16.copy(epsilon=1e-12), 85.80),
    "facebook/dinov2-small": (hf_dinov2(384, 12, 1370), S14, 22.06),
    "facebook/dinov2-small-imagenet1k-1-layer": (
        hf_dinov2(384, 12, 1370, classes=1000), S14.copy(classes=1000, pool="class_and_mean"), 22.83),
    "facebook/dinov2-with-registers-small": (hf_dinov2(384, 12, 1370, registers=4), S14.copy(registers=4), 22.06),
    "openai/clip-vit-base-patch32": (
        hf_clip(768, 12, 32, 50, 512), ViT(224, 32, 768, 12, 12, projection=512, **CLIP), 87.85),
    "openai/clip-vit-large-patch14": (
        hf_clip(1024, 24, 14, 257, 768), ViT(224, 14, 1024, 24, 16, projection=768, **CLIP), 303.97),
    "google/siglip-base-patch16-224": (hf_siglip(768, 12, 16, 196, 3072), B16.copy(**SIGLIP), 92.88),
    "google/siglip-so400m-patch14-384": (
        hf_siglip(1152, 27, 14, 729, 4304),
        ViT(378, 14, 1152, 27, 16, mlp_ratio=4304 / 1152, **SIGLIP), 428.23),
    "ViT-B-16.pt": (openai_clip(768, 12, 16, 197, 512), B16.copy(projection=512, **CLIP), 86.19),
    "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz": (
        augreg(384, 12, 16, 197, 6, 21843), ViT(224, 16, 384, 12, 6, classes=21843), 30.08),
    "imagenet21k/ViT-B_16.npz": (augreg(768, 12, 16, 197, 12, 21843, representation=True), B16, 85.80),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes_are_of_this_model(name):
    shapes, model, millions = PUBLISHED[name]
    layout = layouts.likely(layouts.LAYOUTS, shapes)
    kept = layout.kept(shapes)
    bare = {short: shapes[full] for short, full in kept.items()}
    if layout.name == "augreg":
        layout = layouts.augreg(model.heads)
    fields = {"activation": "quick_gelu", **layout.fields} if "clip" in name else layout.fields
    read = architecture.read_architecture(bare, layout, fields)
    assert read.copy(heads=architecture.read_heads(read, False, None)) == model
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    assert {name: array.shape for name, array in pretrained.write(hollow, layout).items()} == bare
    assert round(tree.size(hollow) / 1e6, 2) == millions


# There and back

TINY = {"image_size": 8, "patch": 4, "width": 12, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
KINDS = {
    "timm": {}, "timm with all": {"layer_scale": True, "registers": 2, "class_position": False, "classes": 3},
    "timm fc_norm": {"pool": "mean_then_norm", "class_token": False}, "timm pool": {"pool": "attention",
    "class_token": False}, "vit": {"epsilon": 1e-12, "classes": 3}, "dinov2": {"layer_scale": True},
    "dinov2_with_registers": {"layer_scale": True, "registers": 2}, "clip": {**CLIP, "projection": 5},
    "siglip": SIGLIP, "augreg": {"classes": 3}, "openai_clip": {**CLIP, "projection": 5},
}  # fmt: skip


def writer(kind):
    if kind.startswith("timm"):
        return models.to_timm
    if kind == "augreg":
        return lambda params: models.to_augreg(params, heads=2)
    return models.to_openai_clip if kind == "openai_clip" else lambda params: models.to_hf(params, kind)


def reader(kind):
    if kind == "augreg":
        return models.from_augreg
    name = "timm" if kind.startswith("timm") else kind if kind == "openai_clip" else "hf"
    return lambda arrays: getattr(models, f"from_{name}")(arrays, heads=2)


def random_params(model):
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_come_back_and_so_do_trees_with_holes(kind):
    model = ViT(**TINY, **KINDS[kind])
    params = random_params(model)
    arrays = writer(kind)(params)
    read, back = reader(kind)(arrays)
    assert read == model
    assert tree.fingerprint(back) == tree.fingerprint(params)
    again = writer(kind)(back)
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[name], arrays[name]) for name in arrays)
    delta, _ = tree.partition(params, "attention/qkv/kernel$")  # None elsewhere
    part = writer(kind)(delta)
    assert part
    assert all(np.array_equal(array, arrays[name]) for name, array in part.items())
    assert sum(array.size for array in part.values()) == sum(leaf.size for leaf in jax.tree.leaves(delta))


@pytest.mark.parametrize("kind", ["timm with all", "clip", "siglip"])
def test_adapters_reach_every_part_without_forming_the_sum(kind):
    model, adapter = ViT(**TINY, **KINDS[kind]), adapters.lora(2)
    params = random_params(model)
    module = jax.tree.map(lambda leaf: leaf + 0.1, adapter.init(jax.random.key(0), params))
    images = jnp.sin(jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32)).reshape(2, 8, 8, 3)
    fast = jax.jit(adapters.adapted(model, adapter))(params, module, images)
    whole = jax.jit(model.apply)({"params": tree.add(params, adapter.delta(module, params))}, images)
    np.testing.assert_allclose(fast, whole, rtol=1e-3, atol=1e-4)


def test_separate_q_k_v_are_columns_of_the_joint_one():
    params = random_params(ViT(**TINY))
    arrays = models.to_hf(params, "vit")
    joint = np.asarray(params["blocks"]["attention"]["qkv"]["kernel"])
    for i, part in enumerate(("query", "key", "value")):
        weight = arrays[f"encoder.layer.1.attention.attention.{part}.weight"]
        np.testing.assert_array_equal(weight.T, joint[1, :, 12 * i : 12 * (i + 1)])
    heads_apart = models.to_augreg(params, heads=2)[
        "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"
    ]
    np.testing.assert_array_equal(heads_apart[:, 1], joint[1, :, 18:24])


def test_what_fits_no_layout_is_told():
    params = random_params(ViT(**TINY, layer_scale=True))
    with pytest.raises(
        ValueError, match="'vit' has no counterpart of blocks/layer_scale1, blocks/layer_scale2: .*that has"
    ):
        models.to_hf(params, "vit")
    with pytest.raises(ValueError, match="no layout is called 'deit'; there are vit, dinov2"):
        models.to_hf(params, "deit")
    arrays = models.to_hf(params, "dinov2")
    del arrays["encoder.layer.1.attention.attention.key.bias"]
    arrays["encoder.layer.0.mlp.weights_in.weight"] = np.zeros((4, 12))
    with pytest.raises(ValueError, match=r"(?s)missing \(1\): encoder\.layer\.1\.attention\.attention\.key\.bias\n"
                       r"unexpected \(1\): encoder\.layer\.0\.mlp\.weights_in\.weight.*gated \(SwiGLU\)"):  # fmt: skip
        models.from_hf(arrays, heads=2)
    clip = models.to_timm(random_params(ViT(**TINY, pre_norm=True)))
    with pytest.raises(ValueError, match="QuickGELU .* or GELU .*, and no array tells which: pass activation="):
        models.from_timm(clip, heads=2)
    with pytest.raises(ValueError, match="no activation is called 'relu'; there are gelu, quick_gelu, gelu_tanh"):
        models.from_timm(clip, heads=2, activation="relu")


def renamed(arrays, *changes):
    for old, new in changes:
        arrays = {name.replace(old, new): x for name, x in arrays.items()}
    return arrays


def test_what_a_checkpoint_is_that_does_not_fit_is_told():
    plain, clip = (random_params(ViT(**TINY, **KINDS[kind])) for kind in ("vit", "clip"))
    hf = models.to_hf(plain, "vit")
    new = renamed(hf, ("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"))
    with pytest.raises(ValueError, match="transformers 5's own names: write the checkpoint by its save_pretrained"):
        models.from_hf(new, heads=2)
    with pytest.raises(ValueError, match="no table of positions: where they are rotary, as DINOv3's"):
        models.from_hf({name: x for name, x in hf.items() if "position" not in name}, heads=2)
    timm = models.to_timm(plain)
    with pytest.raises(ValueError, match="no table of positions: where they are rotary, as DINOv3's"):
        models.from_timm({name: x for name, x in timm.items() if name != "pos_embed"}, heads=2)
    classifier = {"classifier.weight": np.zeros((3, 12), np.float32), "classifier.bias": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="classifier of a CLIP reads the mean of its patches' tokens"):
        models.from_hf(models.to_hf(clip, "clip") | classifier, heads=2)
    with pytest.raises(
        ValueError, match=r"norm.weight \(int8\) hold no floating-point numbers: a quantised checkpoint"
    ):
        models.from_timm(timm | {"norm.weight": np.ones(12, np.int8)}, heads=2)
    index = {"blocks.0.attn.relative_position_index": np.zeros((5, 5), np.int64)}
    with pytest.raises(ValueError, match="a variant with relative or rotary positions"):
        models.from_timm(timm | index, heads=2)
    with pytest.raises(ValueError) as told:
        models.from_timm(timm | classifier, heads=2)
    assert "CLIP" not in str(told.value) and "rotary" not in str(told.value)
    for config, told in (
        ({"architecture": "vit_base_patch16_rpn_224"}, "vit_base_patch16_rpn_224.* normalises what each part gives"),
        (
            {"architecture": "vit_tiny_patch16_224", "global_pool": "avg", "model_args": {"pool_include_prefix": True}},
            "pool_include_prefix pools over the class token, too",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            models.from_timm(timm, heads=2, config=config)
    for pool in ("max", "avgmax"):
        config = {"architecture": "vit_tiny_patch16_224", "global_pool": pool}
        with pytest.raises(ValueError, match=f"global_pool is '{pool}', and ViT pools by token, avg or map"):
            models.from_timm(timm, heads=2, config=config)


QUICK = {
    "vit_base_patch16_clip_quickgelu_224.openai": True, "vit_base_patch16_clip_224.openai": True,
    "vit_base_patch16_clip_224.laion2b": False, "vit_base_patch16_clip_224.openai_ft_in12k_in1k": False,
    "vit_base_patch32_clip_224.laion400m_e32": True, "vit_base_patch16_clip_224.laion400m_e32": False,
    "vit_large_patch14_clip_224.dfn2b_s39b": False, "vit_huge_patch14_clip_378.metaclip2_worldwide": False,
    "vit_huge_patch14_clip_224.metaclip2_worldwide": True, "vit_base_patch16_clip_224.metaclip_400m": True,
    "vit_huge_patch14_clip_224.dfn5b": True, "vit_base_patch16_224.augreg_in21k": False,
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_timms_names_tell_which_were_trained_with_quick_gelu(name):
    arrays = models.to_timm(random_params(ViT(**TINY, pre_norm=True)))
    architecture_name, _, tag = name.partition(".")
    config = {"architecture": architecture_name, "pretrained_cfg": {"tag": tag}}
    model, _ = models.from_timm(arrays, heads=2, config=config)
    assert model.activation == ("quick_gelu" if QUICK[name] else "gelu")
    assert model.epsilon == 1e-5
