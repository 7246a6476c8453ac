"""The ViT: shapes, scanned as unrolled, other dtypes, and what its attention and layers compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compo_jax import tree
from compo_jax.data import glyphs
from compo_jax.models import ViT, embedded

SMALL = {"image_size": 16, "patch": 8, "width": 12, "depth": 3, "heads": 2, "classes": 5}
IMAGES = jnp.sin(jnp.arange(2 * 16 * 16 * 3, dtype=jnp.float32)).reshape(2, 16, 16, 3)


def initial(model):
    return jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]


def test_scanned_and_unrolled_are_one_model_with_one_set_of_parameters():
    params = initial(ViT(**SMALL))
    assert params["blocks"]["attention"]["qkv"]["kernel"].shape == (3, 12, 36)
    unrolled = ViT(**SMALL, unroll=True)
    assert tree.names(initial(unrolled)) == tree.names(params)
    np.testing.assert_allclose(
        ViT(**SMALL).apply({"params": params}, IMAGES), unrolled.apply({"params": params}, IMAGES), atol=1e-6
    )


def test_logits_are_the_head_of_the_features_and_a_model_without_head_returns_them():
    model = ViT(**SMALL)
    params = initial(model)
    z = model.apply({"params": params}, IMAGES, method="features")
    assert z.shape == (2, 12)
    logits = z @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(model.apply({"params": params}, IMAGES), logits, atol=1e-6)
    headless = {name: leaf for name, leaf in params.items() if name != "head"}
    np.testing.assert_array_equal(model.copy(classes=0).apply({"params": headless}, IMAGES), z)


def test_compute_dtype_follows_the_arrays_or_the_attribute():
    model = ViT(**SMALL)
    params = initial(model)
    exact = model.apply({"params": params}, IMAGES)
    half = model.copy(dtype=jnp.bfloat16).apply({"params": params}, IMAGES)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.05 * float(jnp.abs(exact).max()))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        out = model.apply({"params": wide}, IMAGES.astype(jnp.float64))
        assert out.dtype == jnp.float64
        # In float64 a central difference agrees with the derivative far beyond what float32 anywhere would allow.
        direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), wide)
        images = IMAGES.astype(jnp.float64)
        f = jax.jit(lambda t: jnp.sum(jnp.sin(model.apply({"params": tree.add(wide, direction, t)}, images))))
        step = 1e-6
        np.testing.assert_allclose(jax.grad(f)(0.0), (f(step) - f(-step)) / (2 * step), rtol=1e-6)


def test_bad_sizes_are_explained():
    model = ViT(**SMALL)
    with pytest.raises(ValueError, match="takes 16x16 images and got 24x24.*resize"):
        model.init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))
    with pytest.raises(ValueError, match="the patch \\(7\\) divides"):
        ViT(**{**SMALL, "patch": 7}).init(jax.random.key(0), IMAGES)


@pytest.mark.parametrize("name, value", [("depth", 0), ("heads", 0), ("width", 0), ("patch", 0), ("image_size", -16),
                                         ("classes", -1), ("depth", -3)])  # fmt: skip
def test_sizes_that_make_no_network_are_told_where_it_is_made(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: a whole number, {0 if name == 'classes' else 1} or more"):
        ViT(**SMALL | {name: value})


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), 0.01])
def test_a_hidden_layer_of_no_width_is_told(ratio):
    with pytest.raises(ValueError, match="mlp_ratio=.* leaves no hidden layer"):
        ViT(**SMALL, mlp_ratio=ratio)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"pool": "max"}, "no features are called pool='max'; there are class, mean, mean_then_norm, "),
        ({"class_token": False}, "pool='class' needs a class token: take pool='mean'"),
        ({"activation": "relu"}, "no activation is called 'relu'; there are gelu, quick_gelu, gelu_tanh"),
        ({"registers": -1}, "registers=-1: a whole number, 0 or more"),
    ],
)
def test_parts_that_make_no_network_are_told_where_it_is_made(fields, told):
    with pytest.raises(ValueError, match=told):
        ViT(**SMALL | fields)


def test_parts_hold_what_they_say_and_nothing_when_off():
    def size_and_flops(**fields):
        model = ViT(**SMALL, unroll=True, **fields)
        params = initial(model)
        compiled = jax.jit(model.apply).lower({"params": params}, IMAGES).compile()
        return tree.size(params), compiled.cost_analysis()["flops"]

    size, flops = size_and_flops()
    assert size == 12 * (3 * 64 + 1 + 1 + 5) + 3 * (12 * 12 * 12 + 13 * 12) + 2 * 12 + 5 * 13
    for fields, more in (({"layer_scale": True}, 2 * 3 * 12), ({"registers": 2}, 2 * 12), ({"pre_norm": True}, 12)):
        larger, work = size_and_flops(**fields)
        assert larger == size + more
        assert work > flops


def test_images_with_channels_first_are_told_to_be_transposed():
    model = ViT(**SMALL)
    params = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    swapped = IMAGES.transpose(0, 3, 1, 2)
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\) have their channels first.*images, \(0, 2, 3, 1\)\)"):
        jax.eval_shape(model.apply, params, swapped)
    assert jnp.transpose(swapped, (0, 2, 3, 1)).shape == IMAGES.shape


def test_the_shipped_backbone_is_as_accurate_as_its_sidecar_says():
    model, params, made = embedded()
    assert made["seed"] == 0
    assert made["command"].startswith("python experiments/pretrain.py")
    shapes = glyphs.masters("".join(glyphs.PRETRAINING.values()))
    assert model.classes == len(shapes) == sum(made["characters"].values())
    labels = np.arange(made["held_out_images"]) % len(shapes)
    images = glyphs.images(jax.random.key(1001), shapes, labels)  # the key that experiments/pretrain.py holds out
    predict = jax.jit(lambda x: model.apply({"params": params}, x / 127.5 - 1).argmax(axis=-1))
    accuracy = np.mean(
        [predict(x.astype(np.float32)) == y for x, y in zip(np.split(images, 8), np.split(labels, 8), strict=True)]
    )
    assert abs(accuracy - made["held_out_accuracy"]) < 0.005
    assert accuracy > 0.85
