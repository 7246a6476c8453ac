"""Checkpoints against the architecture written out by hand, a plain NumPy forward pass, PyTorch and timm."""

import inspect
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from scipy.special import erf
from vit_arrays import HEADS, hollow, names_and_shapes, random_arrays, random_images

from compo_jax import tree
from compo_jax.models import ViT, architecture, from_hf, from_openai_clip, from_timm, load, to_timm

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def numpy_logits(arrays, images, heads):
    """A plain float64 forward pass over timm's names; images NHWC."""
    a = {name: array.astype(np.float64) for name, array in arrays.items()}

    def linear(x, name):
        return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * a[f"{name}.weight"] + a[f"{name}.bias"]

    weight = a["patch_embed.proj.weight"]
    width, _, patch, _ = weight.shape
    n, side = images.shape[0], images.shape[1] // patch
    patches = images.reshape(n, side, patch, side, patch, 3).transpose(0, 1, 3, 5, 2, 4).reshape(n, side * side, -1)
    x = patches @ weight.reshape(width, -1).T + a["patch_embed.proj.bias"]
    x = np.concatenate([np.repeat(a["cls_token"], n, axis=0), x], axis=1) + a["pos_embed"]
    for block in range(1 + max(int(name.split(".")[1]) for name in a if name.startswith("blocks."))):
        at = f"blocks.{block}"
        qkv = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv")
        q, k, v = (part.reshape(n, -1, heads, width // heads) for part in np.split(qkv, 3, axis=-1))
        scores = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(width // heads)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + linear(np.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, -1, width), f"{at}.attn.proj")
        hidden = linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        x = x + linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, f"{at}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


# Names and shapes


@pytest.mark.parametrize("classes, tensors", [(0, 150), (1000, 152), (21843, 152)])
def test_vit_b16_has_timms_names_shapes_and_size(classes, tensors):
    shapes = names_and_shapes(width=768, depth=12, hidden=3072, patch=16, grid=14, classes=classes)
    assert len(shapes) == tensors
    model = ViT(classes=classes)
    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))[
        "params"
    ]
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    assert {name: array.shape for name, array in to_timm(zeros).items()} == shapes
    assert tree.size(zeros) == sum(map(np.prod, shapes.values())) == 85_798_656 + 769 * classes


def test_from_timm_accepts_vit_b16():
    # one tensor short, so that nothing of its size is made: the other 151 fit
    arrays = hollow(names_and_shapes(width=768, depth=12, hidden=3072, patch=16, grid=14, classes=1000))
    del arrays["norm.bias"]
    with pytest.raises(ValueError) as error:
        from_timm(arrays)
    assert str(error.value).splitlines()[1:] == ["missing (1): norm.bias"]


def test_architecture_is_read_off_vit_ti16():
    arrays = hollow(names_and_shapes(width=192, depth=12, hidden=768, patch=16, grid=14, classes=0))
    model, params = from_timm(arrays | {"pos_embed": np.ones((1, 197, 192), np.float32)})
    assert model == ViT(image_size=224, patch=16, width=192, depth=12, heads=3, mlp_ratio=4.0, classes=0)
    assert tree.size(params) == 5_524_416  # 5,717,416 of the published ViT-Ti/16 less its head, 1000 x 193


def test_architecture_is_read_off_odd_sizes():
    model, params = from_timm(random_arrays(), heads=HEADS, dtype=jnp.bfloat16)
    assert (model.width, model.depth, model.patch, model.image_size, model.classes) == (24, 3, 4, 12, 5)
    assert model.heads == HEADS and model.dtype == jnp.bfloat16
    init = jax.eval_shape(model.clone(dtype=None).init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, init)


# Round trips


@pytest.mark.parametrize("classes", [0, 5])
def test_round_trip_is_exact(classes):
    arrays = random_arrays(classes=classes)
    back = to_timm(from_timm(arrays, heads=HEADS)[1])
    assert back.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(back[name], arrays[name], strict=True)


def test_parameters_are_a_copy():
    arrays = random_arrays()
    before = arrays["cls_token"].copy()
    params = from_timm(arrays, heads=HEADS)[1]
    arrays["cls_token"][:] = 0
    np.testing.assert_array_equal(params["cls"], before)


def test_to_timm_leaves_out_holes_and_absent_leaves():
    arrays = random_arrays()
    kept, _ = tree.partition(from_timm(arrays, heads=HEADS)[1], "qkv/kernel|head/bias")
    del kept["blocks"]["mlp"]
    found = to_timm(kept)
    assert found.keys() == {"head.bias"} | {f"blocks.{block}.attn.qkv.weight" for block in range(3)}
    for name in found:
        np.testing.assert_array_equal(found[name], arrays[name])


def test_to_timm_rejects_other_trees():
    params = from_timm(random_arrays(), heads=HEADS)[1]
    with pytest.raises(ValueError, match=r"counterpart of params/blocks/attention.*give the tree under 'params'"):
        to_timm({"params": params})
    with pytest.raises(ValueError, match=r"counterpart of blocks/lora, gate: "):
        to_timm({"gate": np.ones(2), "blocks": {"lora": np.ones(2)}, "cls": np.ones((1, 1, 2))})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_arrays_become_float32(dtype):
    arrays = random_arrays(dtype)
    params = from_timm(arrays, heads=HEADS)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for name, array in to_timm(params).items():
        np.testing.assert_array_equal(array, arrays[name].astype(np.float32))


# Mismatches


def test_all_mismatches_are_listed_at_once():
    arrays = random_arrays()
    del arrays["norm.weight"], arrays["head.bias"], arrays["blocks.1.attn.qkv.bias"]
    arrays |= {"extra.weight": np.zeros((2, 3)), "blocks.0.mlp.fc3.bias": np.zeros(7)}
    arrays["patch_embed.proj.weight"] = np.zeros((24, 1, 4, 4))
    arrays["blocks.2.mlp.fc1.weight"] = np.zeros((24, 40))
    arrays["pos_embed"] = np.zeros((1, 11, 24))
    arrays["blocks.0.norm1.bias"] = np.zeros(23)
    with pytest.raises(ValueError) as error:
        from_timm(arrays, heads=HEADS)
    summary, missing, unexpected, misshaped = str(error.value).splitlines()
    assert "width 24, depth 3, patch 4, RGB images of 12x12 and 5 classes" in summary
    assert missing.startswith("missing (3): ") and unexpected.startswith("unexpected (2): ")
    assert set(re.split(r"[:,] ", missing)[1:]) == {"norm.weight", "head.bias", "blocks.1.attn.qkv.bias"}
    assert "extra.weight (2, 3)" in unexpected and "blocks.0.mlp.fc3.bias (7,)" in unexpected
    assert misshaped.startswith("mis-shaped (4): ")
    for entry in (
        "patch_embed.proj.weight (24, 1, 4, 4) instead of (24, 3, 4, 4)",
        "blocks.2.mlp.fc1.weight (24, 40) instead of (40, 24)",
        "pos_embed (1, 11, 24) instead of (1, 10, 24)",
        "blocks.0.norm1.bias (23,) instead of (24,)",
    ):
        assert entry in misshaped


def test_gap_in_the_blocks_is_listed():
    arrays = {name: array for name, array in random_arrays(depth=4).items() if not name.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"depth 4(.|\n)*missing \(12\): blocks\.1\.norm1\.weight, ") as error:
        from_timm(arrays, heads=HEADS)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    "name, variant",
    [
        ("dist_token", "distilled DeiT"),
        ("blocks.0.attn.q_norm.weight", "normalises queries and keys"),
        ("blocks.2.gamma_1", "layer scale under other names"),
        ("pre_logits.fc.weight", "representation layer"),
        ("blocks.0.mlp.w12.weight", "gated"),
        ("rel_pos_bias", "relative"),
    ],
)
def test_unsupported_variants_are_named(name, variant):
    with pytest.raises(ValueError, match=rf"unexpected \(1\): {re.escape(name)} \(24,\)\nthis is .*{variant}"):
        from_timm(random_arrays() | {name: np.zeros(24)}, heads=HEADS)


def test_attention_without_biases_is_named():
    arrays = {name: x for name, x in random_arrays().items() if not name.endswith("qkv.bias")}
    with pytest.raises(ValueError, match=r"missing (.|\n)*have no biases \(qkv_bias false in config.json\): put zeros"):
        from_timm(arrays, heads=HEADS)


def test_a_part_that_is_there_in_part_is_listed():
    arrays = random_arrays()
    with pytest.raises(ValueError, match=r"with layer scale(.|\n)*missing \(5\): blocks\.0\.ls1\.gamma, "):
        from_timm(arrays | {"blocks.2.ls1.gamma": np.zeros(24)}, heads=HEADS)
    with pytest.raises(ValueError, match=r"missing \(1\): norm_pre\.weight\nunexpected \(1\): patch_embed\.proj\.bias"):
        from_timm(arrays | {"norm_pre.bias": np.zeros(24)}, heads=HEADS)
    with pytest.raises(ValueError, match=r"pool 'mean_then_norm'(.|\n)*missing \(1\): fc_norm\.bias\nunexpected \(2\)"):
        from_timm(arrays | {"fc_norm.weight": np.zeros(24)}, heads=HEADS)


def test_foreign_names_are_an_error():
    prefixed = {f"module.{name}": array for name, array in random_arrays().items()}
    told = (
        r"^none of the 44 arrays \(module\.\S+, module\.\S+, module\.\S+, \.\.\.\) is called as those of a ViT are .*"
    )
    for read in (from_timm, from_hf, from_openai_clip):
        with pytest.raises(ValueError, match=told + "or all names have a common prefix, which has to be stripped$"):
            read(prefixed)
    with pytest.raises(ValueError, match=r"missing \(17\)(.|\n)*unexpected \(44\)"):  # one name that is a ViT's
        from_timm(prefixed | {"norm.bias": np.zeros(24)})
    with pytest.raises(ValueError, match=r"missing \(18\)"):
        from_timm({})


def test_scalars_in_place_of_arrays_are_an_error():
    with pytest.raises(ValueError, match=r"mis-shaped \(42\)"):
        from_timm({name: np.zeros(()) for name in random_arrays(classes=0)})


# The papers' tables: Dosovitskiy et al. (2021), Touvron et al. (2021), Zhai et al. (2022), Alabdulmohsin et al. (2023).
PUBLISHED = {"Ti/16": (192, 12, 16, 3), "S/16": (384, 12, 16, 6), "S/14": (384, 12, 14, 6), "B/32": (768, 12, 32, 12),
             "B/8": (768, 12, 8, 12), "L/14": (1024, 24, 14, 16), "H/14": (1280, 32, 14, 16),
             "g/14": (1408, 40, 14, 16), "G/14": (1664, 48, 14, 16), "So400m/14": (1152, 27, 14, 16)}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_architectures_have_their_heads(name):
    width, depth, patch, heads = PUBLISHED[name]
    model = ViT(image_size=2 * patch, patch=patch, width=width, depth=depth, heads=1)
    assert architecture.read_heads(model, False, None) == heads
    assert architecture.read_heads(model, False, 2) == 2
    for other in (model.clone(depth=depth + 1), model.clone(patch=2 * patch - 1, image_size=2 * patch - 1)):
        with pytest.raises(ValueError, match=rf"no known ViT is {width} wide and {other.depth} deep .*: pass heads="):
            architecture.read_heads(other, False, None)
    if width < 768:  # MoCo v3's ViT-S: 12 heads, and no shape that tells
        with pytest.raises(ValueError, match=rf"12 heads instead of {heads} .*: pass heads="):
            architecture.read_heads(model, True, None)
        assert architecture.read_heads(model, True, 12) == 12


def test_heads():
    with pytest.raises(ValueError, match="no known ViT is 24 wide and 3 deep with patches of 4, .*: pass heads="):
        from_timm(random_arrays())
    with pytest.raises(ValueError, match="5 heads don't divide the width 24"):
        from_timm(random_arrays(), heads=5)
    for heads in (0, -2, 2.5):
        with pytest.raises(ValueError, match=f"heads={heads}: a whole number, 1 or more, is needed"):
            inspect.unwrap(architecture.read_heads)(ViT(), False, heads)


# Position embeddings


def bicubic(old, new):
    """The (new, old) matrix of 1-D bicubic resampling (Keys, 1981, a = -1/2), widened when shrinking."""
    scale = max(1.0, old / new)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    t = np.abs(centres[:, None] - np.arange(old)) / scale
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("new", [4, 7, 12])
def test_positions_are_resized_bicubically(new):
    arrays = random_arrays(grid=7)
    model, params = from_timm(arrays, heads=HEADS, image_size=4 * new)
    assert model.image_size == 4 * new
    old = arrays["pos_embed"]
    np.testing.assert_array_equal(params["position"][:, 0], old[:, 0])
    matrix = bicubic(7, new)
    expected = np.einsum("ab,cd,bdw->acw", matrix, matrix, old[0, 1:].reshape(7, 7, -1)).reshape(new * new, -1)
    np.testing.assert_allclose(params["position"][0, 1:], expected, atol=1e-6)
    assert jax.eval_shape(model.apply, {"params": params}, random_images(4 * new)).shape == (2, 5)


def test_same_size_leaves_positions_alone():
    arrays = random_arrays()
    params = from_timm(arrays, heads=HEADS, image_size=12)[1]
    np.testing.assert_array_equal(params["position"], arrays["pos_embed"])


def test_constant_positions_stay_constant():
    arrays = random_arrays()
    arrays["pos_embed"] = np.full_like(arrays["pos_embed"], 0.25)
    params = from_timm(arrays, heads=HEADS, image_size=28)[1]
    np.testing.assert_allclose(params["position"], np.full((1, 50, 24), 0.25), rtol=1e-6)


@pytest.mark.parametrize("size", [13, 0, 2, -4])
def test_image_size_must_be_a_multiple_of_the_patch(size):
    with pytest.raises(
        ValueError, match=rf"the patch \(4\) doesn't divide image_size={size}|image_size={size}: a whole"
    ):
        from_timm(random_arrays(), heads=HEADS, image_size=size)


# Forward pass


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(np.float32, 1e-5), (np.float64, 1e-10)],
)
def test_logits_equal_a_plain_numpy_forward_pass(dtype, tolerance):
    arrays, images = random_arrays(dtype), random_images(dtype=dtype)
    with enable_x64(dtype == np.float64):
        model, params = from_timm(arrays, heads=HEADS)
        logits = jax.jit(model.apply)({"params": params}, images)
        assert logits.dtype == dtype
        np.testing.assert_allclose(logits, numpy_logits(arrays, images, HEADS), rtol=tolerance, atol=tolerance)


def test_logits_equal_pytorch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    arrays, images = random_arrays(), random_images()
    w = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def norm(x, name):
        return functional.layer_norm(x, (24,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(x, name):
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = functional.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4)
    x = torch.cat([w["cls_token"].expand(2, -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + w["pos_embed"]
    for at in ("blocks.0", "blocks.1", "blocks.2"):
        qkv = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").reshape(2, 10, 3, HEADS, 8).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(2, 10, 24)
        x = x + linear(attended, f"{at}.attn.proj")
        x = x + linear(functional.gelu(linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
    expected = linear(norm(x, "norm")[:, 0], "head")
    model, params = from_timm(arrays, heads=HEADS)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, images), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [12, 20, 8])
def test_logits_equal_timm(size, tmp_path):
    torch = pytest.importorskip("torch")
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    kinds = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": HEADS, "mlp_ratio": 2.0, "num_classes": 5}
    trained = vision_transformer.VisionTransformer(img_size=12, **kinds).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(std=0.3, generator=generator)
    arrays = {name: tensor.numpy() for name, tensor in trained.state_dict().items()}
    resized = vision_transformer.VisionTransformer(img_size=size, **kinds).eval()
    resized.load_state_dict(vision_transformer.checkpoint_filter_fn(trained.state_dict(), resized))
    images = random_images(size)
    with torch.no_grad():
        expected = resized(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    model, params = load(tmp_path / "model.safetensors", heads=HEADS, image_size=size)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, images), expected, rtol=1e-5, atol=1e-5)
