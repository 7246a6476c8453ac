"""CLIP's text tower from the arrays of others' checkpoints, and back: Hugging Face, OpenAI and open_clip.

Of a whole CLIP the text half is read; `models.load` and its like read the other.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.models.architecture import Shapes, depth, shapes_by_path, usual_length
from compo_jax.models.descriptions import activation_of
from compo_jax.models.layouts import LINEAR, Layout, Row, fitting, foreign, hf_blocks, likely, norm, openai_blocks
from compo_jax.models.loading import opened
from compo_jax.models.pretrained import Arrays, filled, write, written_shapes
from compo_jax.models.text_tower import TextTower as TextTower
from compo_jax.tree import Tree

HF_TEXT = Layout(
    "clip_text",
    (
        Row("tokens", ("embeddings.token_embedding.weight",)),
        Row("position", ("embeddings.position_embedding.weight",)),
        *hf_blocks(),
        *norm("norm", "final_layer_norm"),
        Row("projection/kernel", ("text_projection.weight",), LINEAR),
        Row("logit_scale", ("logit_scale",)),
    ),
    roots=("text_model.", ""),
    rootless=("text_projection.", "logit_scale"),
    skipped=(("", r"vision_model\..*|visual_projection\..*|embeddings\.position_ids"),),
)

OPENAI_TEXT = Layout(
    "openai_clip_text",
    (
        Row("tokens", ("token_embedding.weight",)),
        Row("position", ("positional_embedding",)),
        *openai_blocks(),
        *norm("norm", "ln_final"),
        Row("projection/kernel", ("text_projection",)),
        Row("logit_scale", ("logit_scale",)),
    ),
    skipped=(("", r"visual\..*|input_resolution|context_length|vocab_size|attn_mask"),),
)


def from_hf(
    arrays: Arrays,
    *,
    heads: int | None = None,
    activation: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    check_finite: bool = True,
) -> tuple[TextTower, Tree]:
    """The tower and its parameters (`model.apply({"params": params}, ids)`) from arrays under Hugging Face's names:
    CLIPModel, CLIPTextModelWithProjection, or CLIPTextModel, which has no projection.

    Sizes are read off the shapes. 16-bit arrays become float32. Copies; the blocks are stacked on axis 0.

    Args:
      heads: default: what `config` says, or a head for 64 channels, as in all that OpenAI and LAION published.
      activation: default: what `config` says, or `quick_gelu`, OpenAI's; LAION's and DataComp's are `gelu`.
      config: the checkpoint's config.json; without it the end of text is a text's highest id, as OpenAI has it.
      dtype: the tower's compute dtype.
    Raises:
      ValueError: names or shapes don't fit, all of them listed; heads aren't known or don't divide the width; `config`
        is of another model; arrays hold NaN or infinities, unless `check_finite` is False.
    """
    return _read(arrays, HF_TEXT, heads, activation, config, dtype, check_finite)


def from_openai(
    arrays: Arrays,
    *,
    heads: int | None = None,
    activation: str | None = None,
    dtype: Any = None,
    check_finite: bool = True,
) -> tuple[TextTower, Tree]:
    """`from_hf` for the names of OpenAI's CLIP and of open_clip (`transformer.resblocks...`)."""
    return _read(arrays, OPENAI_TEXT, heads, activation, None, dtype, check_finite)


def load(
    path: str | Path,
    *,
    heads: int | None = None,
    activation: str | None = None,
    dtype: Any = None,
    check_finite: bool = True,
) -> tuple[TextTower, Tree]:
    """`from_hf` or `from_openai`, by its names, of what `models.load` takes: a file, a folder, or `hf:owner/name`.

    FileNotFoundError, and ValueError where it is another kind of file or doesn't fit.
    """
    checkpoint = opened(path, (HF_TEXT, OPENAI_TEXT))
    layout = likely((HF_TEXT, OPENAI_TEXT), checkpoint.arrays)
    heads = checkpoint.stated.get("heads") if heads is None else heads
    try:
        return _read(checkpoint.arrays, layout, heads, activation, checkpoint.config, dtype, check_finite)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_hf(params: Tree) -> dict[str, np.ndarray]:
    """The arrays under Hugging Face's names, the exact inverse of `from_hf`; see `models.to_timm`."""
    return write(params, HF_TEXT, HF_TEXT.roots[0])


def to_openai(params: Tree) -> dict[str, np.ndarray]:
    """The arrays under OpenAI's names, the exact inverse of `from_openai`; see `models.to_timm`."""
    return write(params, OPENAI_TEXT)


def _read(
    arrays: Arrays,
    layout: Layout,
    heads: int | None,
    activation: str | None,
    config: Mapping[str, Any] | None,
    dtype: Any,
    check_finite: bool,
) -> tuple[TextTower, Tree]:
    if arrays and not any(fitting(each, arrays) for each in (HF_TEXT, OPENAI_TEXT)):
        raise foreign(arrays, "those of a CLIP's text tower are by Hugging Face or OpenAI")
    arrays = {name: arrays[full] for name, full in layout.kept(arrays).items()}
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    model = _architecture(shapes, layout)
    ids = jax.ShapeDtypeStruct((1, model.context), jnp.int32)
    params_shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    _check(shapes, written_shapes(params_shapes, layout), model)
    fields = _described(config) if config else {} if heads else {"heads": _heads(model.width)}
    chosen = {"heads": heads, "activation": activation, "dtype": dtype}
    model = model.clone(**fields | {name: value for name, value in chosen.items() if value is not None})
    params = filled(arrays, params_shapes, layout)
    if check_finite:
        tree.require_finite(params, "the checkpoint")
    return model, params


def _architecture(shapes: Shapes, layout: Layout) -> TextTower:
    """The tower that most of the shapes agree on; what no shape tells is that of OpenAI's ViT-B, with one head."""
    shaped = shapes_by_path(shapes, layout)
    length = partial(usual_length, shaped)
    width = length("blocks/norm1/scale", 1, 0) or 512
    return TextTower(
        vocabulary=length("tokens", 2, 0) or 49408,
        context=length("position", 2, 0) or 77,
        width=width,
        depth=depth(shapes, layout),
        heads=1,
        mlp_ratio=(length("blocks/mlp/fc1/bias", 1, 0) or 4 * width) / width,
        projection=length("projection/kernel", 2, 1),
        temperature="logit_scale" in shaped,
    )


def _check(shapes: Shapes, expected: Shapes, model: TextTower) -> None:
    """ValueError with all that doesn't fit: names that are missing or unexpected, and shapes."""
    lines = tree.mismatches(shapes, expected)
    if not lines:
        return
    if expected.keys() & shapes.keys() <= {"logit_scale"}:
        lines.append("no name is that of a CLIP text tower: this is another model, or all names have a common prefix")
    summary = (
        f"the arrays don't fit a text tower of width {model.width}, depth {model.depth}, {model.vocabulary} token ids "
        f"and {model.context} tokens a text, which most of their shapes speak for:"
    )
    raise ValueError("\n".join([summary, *lines]))


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the tower that no shape tells, from Hugging Face's config.json, which leaves out its defaults."""
    kind = config.get("model_type")
    if kind not in ("clip", "clip_text_model"):
        raise ValueError(f"its model_type is {kind!r}, which has no text tower of CLIP: clip or clip_text_model has")
    # the first checkpoints say in text_config_dict what their text_config leaves open
    text = {**(config.get("text_config") or config), **(config.get("text_config_dict") or {})}
    end = text.get("eos_token_id", 49407)
    return {
        "activation": activation_of(text.get("hidden_act", "quick_gelu")),
        "epsilon": text.get("layer_norm_eps", 1e-5),
        "end": None if end == 2 else end,  # a wrong id that was published; transformers takes the highest id then, too
        "heads": text.get("num_attention_heads", 8),
    }


def _heads(width: int) -> int:
    if width % 64:
        raise ValueError(
            f"no head of 64 channels divides the width {width}, and the number of heads isn't in the arrays: pass "
            "heads= as the model was trained"
        )
    return width // 64
