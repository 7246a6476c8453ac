"""Class embeddings and heads out of texts: their definition, gradients, and CLIP of transformers."""

import clip_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compo_jax as cj
from compo_jax.models import clip_text, load, zero_shot

MODEL = clip_text.TextTower(50, 11, width=24, depth=2, heads=3, mlp_ratio=2.0, projection=7)
IDS = clip_cases.random_ids(12).reshape(4, 3, 11)


def random_params():
    rng = np.random.default_rng(0)
    layout = jax.eval_shape(MODEL.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 11), jnp.int32))["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), layout)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_class_is_the_mean_of_its_texts_directions():
    params = random_params()
    features = np.asarray(jax.jit(MODEL.apply)({"params": params}, IDS.reshape(12, 11))).reshape(4, 3, 7)
    embeddings = zero_shot.class_embeddings(MODEL, params, IDS)
    np.testing.assert_allclose(embeddings, unit(unit(features).mean(1)), rtol=1e-4, atol=1e-5)


def test_a_head_gives_scaled_cosines_and_is_one_of_incremental_learning():
    embeddings = jnp.asarray(unit(np.random.default_rng(1).normal(size=(4, 7))), jnp.float32)
    head = zero_shot.head(embeddings, np.log(100))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
    logits = cj.incremental.classifier.logits(head, zero_shot.unit(images))
    np.testing.assert_allclose(logits, 100 * unit(np.asarray(images)) @ np.asarray(embeddings).T, rtol=1e-4, atol=1e-4)
    start = cj.incremental.classifier.new_head(jax.random.key(0), 7, 4)
    assert jax.tree.map(jnp.shape, head) == jax.tree.map(jnp.shape, start)
    order = cj.incremental.classifier.logits(head, images).argsort(-1)
    np.testing.assert_array_equal(order, logits.argsort(-1))


def test_gradients_reach_every_parameter_and_nothing_behind_the_end():
    params = random_params()
    images = zero_shot.unit(jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), jnp.float32))

    def loss(params):
        head = zero_shot.head(zero_shot.class_embeddings(MODEL, params, IDS), params["logit_scale"])
        return -jax.nn.log_softmax(images @ head["kernel"] + head["bias"]).diagonal().mean()

    gradient = jax.jit(jax.grad(loss))(params)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all() and (np.abs(leaf) > 0).any()
    ends = (IDS == clip_cases.END).argmax(-1)
    assert not np.any(gradient["position"][ends.max() + 1 :]) and np.all(np.any(gradient["position"][:2], -1))
    used = {token for text, end in zip(IDS.reshape(12, 11), ends.flat, strict=True) for token in text[: end + 1]}
    np.testing.assert_array_equal(np.any(gradient["tokens"], -1), [token in used for token in range(50)])


def test_zeros_have_no_direction_and_a_gradient():
    np.testing.assert_array_equal(zero_shot.unit(jnp.zeros((2, 3))), np.zeros((2, 3)))
    assert np.isfinite(jax.grad(lambda x: zero_shot.unit(x).sum())(jnp.zeros((2, 3)))).all()
    assert zero_shot.unit(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32


def test_ids_of_another_tokenizer_are_refused_before_anything_is_computed():
    cut = IDS.copy()
    cut[2, 1] = 7
    with pytest.raises(
        ValueError, match=r"1 of 12 texts have no end-of-text token \(the highest id, 49 here\), .* at \[\[2, 1\]\]"
    ):
        zero_shot.class_embeddings(MODEL, {}, cut)


def test_logits_equal_those_of_transformers_clip(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = sizes | {"vocab_size": 50, "max_position_embeddings": 11, "eos_token_id": clip_cases.END}
    config = transformers.CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 12, "patch_size": 4},
                                     projection_dim=7)  # fmt: skip
    reference = transformers.CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim:
                parameter.normal_(std=0.3, generator=generator)
    reference.save_pretrained(tmp_path)
    images = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        expected = reference(torch.from_numpy(IDS[:, 0]), pixels).logits_per_image.numpy()
    tower, params = clip_text.load(tmp_path)
    head = zero_shot.head(zero_shot.class_embeddings(tower, params, IDS[:, :1]), params["logit_scale"])
    vit, vision = load(tmp_path)
    logits = zero_shot.unit(jax.jit(vit.apply)({"params": vision}, images)) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.exp(params["logit_scale"]))
