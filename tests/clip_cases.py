"""A small CLIP text tower under Hugging Face's and OpenAI's names, token ids for it, and a plain NumPy forward pass."""

import json

import numpy as np
import safetensors.numpy

SMALL = {"width": 24, "depth": 2, "hidden": 40, "vocabulary": 50, "context": 11, "projection": 7}
HEADS, START, END = 3, 48, 49


def names_and_shapes(width, depth, hidden, vocabulary, context, projection):
    """Hugging Face's names of a text tower with their shapes, (out, in) for a linear layer."""
    shapes = {
        "logit_scale": (),
        "text_model.embeddings.token_embedding.weight": (vocabulary, width),
        "text_model.embeddings.position_embedding.weight": (context, width),
        "text_model.final_layer_norm.weight": (width,),
        "text_model.final_layer_norm.bias": (width,),
        "text_projection.weight": (projection, width),
    }
    layers = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    layers |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for at in (f"text_model.encoder.layers.{block}" for block in range(depth)):
        for layer, shape in layers.items():
            shapes |= {f"{at}.{layer}.weight": shape, f"{at}.{layer}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{norm}.weight": (width,), f"{at}.{norm}.bias": (width,)}
    return shapes


def random_arrays(dtype=np.float32, **changes):
    rng = np.random.default_rng(0)
    shapes = names_and_shapes(**(SMALL | changes))
    return {name: np.asarray(rng.normal(scale=0.3, size=shape), dtype) for name, shape in shapes.items()}


def in_openai_names(arrays):
    """The same tower as OpenAI's state dict has it: queries, keys and values in one, the projection (in, out)."""
    renamed = {
        "logit_scale": arrays["logit_scale"],
        "token_embedding.weight": arrays["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": arrays["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": arrays["text_model.final_layer_norm.weight"],
        "ln_final.bias": arrays["text_model.final_layer_norm.bias"],
        "text_projection": arrays["text_projection.weight"].T,
    }
    names = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names |= {"ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    for block in range(sum(name.endswith("mlp.fc1.bias") for name in arrays)):
        for kind in ("weight", "bias"):
            at, to = f"text_model.encoder.layers.{block}", f"transformer.resblocks.{block}"
            renamed |= {f"{to}.{new}.{kind}": arrays[f"{at}.{old}.{kind}"] for new, old in names.items()}
            joint = np.concatenate([arrays[f"{at}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            renamed[f"{to}.attn.in_proj_{kind}"] = joint
    return renamed


def random_ids(texts, tokens=11, seed=1):
    """Texts of different lengths, start and end marked, filled up with the end."""
    rng = np.random.default_rng(seed)
    ids = np.full((texts, tokens), END)
    for row in ids:
        length = rng.integers(1, tokens - 1)
        row[: length + 1] = [START, *rng.integers(0, START, length)]
    return ids


def numpy_features(arrays, ids, heads, ends, epsilon=1e-5):
    """A plain float64 forward pass with QuickGELU, every text for itself and cut behind its end."""
    a = {name: array.astype(np.float64) for name, array in arrays.items()}

    def linear(x, name):
        return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]

    def norm(x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return y * a[f"{name}.weight"] + a[f"{name}.bias"]

    def feature(row):
        x = a["text_model.embeddings.token_embedding.weight"][row]
        x = x + a["text_model.embeddings.position_embedding.weight"][: len(row)]
        for block in range(sum(name.endswith("mlp.fc1.bias") for name in a)):
            at = f"text_model.encoder.layers.{block}"
            y = norm(x, f"{at}.layer_norm1")
            q, k, v = (linear(y, f"{at}.self_attn.{part}_proj").reshape(len(row), heads, -1) for part in "qkv")
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
            weights = np.exp(scores) * np.tri(len(row))
            weights /= weights.sum(-1, keepdims=True)
            x = x + linear(np.einsum("hqk,khd->qhd", weights, v).reshape(len(row), -1), f"{at}.self_attn.out_proj")
            hidden = linear(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
            x = x + linear(hidden / (1 + np.exp(-1.702 * hidden)), f"{at}.mlp.fc2")
        return norm(x, "text_model.final_layer_norm")[-1] @ a["text_projection.weight"].T

    return np.stack([feature(row[: end + 1]) for row, end in zip(ids, ends, strict=True)])


def write_clip(folder, side=8, patch=4):
    """A whole CLIP as Hugging Face's hub has it: the text tower of `SMALL`, an image tower of its sizes."""
    rng, width = np.random.default_rng(2), SMALL["width"]
    draw = lambda *shape: np.asarray(rng.normal(scale=0.3, size=shape), np.float32)
    arrays = random_arrays(context=40, vocabulary=60)
    of_text = "text_model.encoder.", "text_model.final_layer_norm"
    arrays |= {
        name.replace("text_model", "vision_model").replace("final_layer_norm", "post_layernorm"): draw(*array.shape)
        for name, array in arrays.items()
        if name.startswith(of_text)
    }
    arrays |= {f"vision_model.pre_layrnorm.{kind}": draw(width) for kind in ("weight", "bias")}
    arrays |= {
        "vision_model.embeddings.class_embedding": draw(width),
        "vision_model.embeddings.patch_embedding.weight": draw(width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": draw((side // patch) ** 2 + 1, width),
        "visual_projection.weight": draw(SMALL["projection"], width),
    }
    tower = {"num_attention_heads": HEADS, "hidden_act": "quick_gelu"}
    config = {"model_type": "clip", "text_config": tower | {"eos_token_id": 59}, "vision_config": tower}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    return arrays
