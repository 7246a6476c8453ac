"""The text tower of CLIP (Radford et al., 2021, arXiv 2103.00020) in Flax Linen: token ids in, features out."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from compo_jax import tree
from compo_jax.models.layers import Dense, LayerNorm
from compo_jax.models.sizes import whole_numbers
from compo_jax.models.transformer import activation, blocks

_normal = nn.initializers.normal


class TextTower(nn.Module):
    """A causal transformer over token ids; a text's feature is the one at its end-of-text token, projected.

    The parameters of all blocks are stacked on axis 0, and a collection `adapter` goes through the scan, as in `ViT`.

    Attributes:
      vocabulary: number of token ids.
      context: tokens of a text at most, what fills it up included.
      width, depth, heads, mlp_ratio, activation, epsilon: of the blocks, see `transformer.Block`.
      projection: size of a feature; 0 for none, and then a feature has the tower's width.
      temperature: whether there is `logit_scale`, the log of what CLIP multiplies cosines by; a call doesn't use it.
      end: the end-of-text id, whose first place counts; None for the place of a text's highest id, which is OpenAI's
        rule and holds for their vocabulary, where end of text is the last id.
      dtype, unroll, kernel: as in `ViT`.
    """

    vocabulary: int = 49408
    context: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    projection: int = 512
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    temperature: bool = True
    end: int | None = None
    dtype: Any = None
    unroll: bool = False
    kernel: str = "xla"

    def __post_init__(self):
        sizes = ("vocabulary", "context", "width", "depth", "heads")
        whole_numbers(**{name: getattr(self, name) for name in sizes})
        whole_numbers(0, projection=self.projection, end=0 if self.end is None else self.end)
        activation(self.activation)
        if self.width % self.heads:
            raise ValueError(
                f"{self.heads} heads don't divide the width {self.width}: give the heads it was trained with"
            )
        super().__post_init__()

    def setup(self):
        self.tokens = self.param("tokens", _normal(0.02), (self.vocabulary, self.width))
        self.position = self.param("position", _normal(0.01), (self.context, self.width))
        stack, hidden = blocks(self.depth, self.unroll), round(self.width * self.mlp_ratio)
        kinds = {"activation": self.activation, "causal": True, "epsilon": self.epsilon}
        self.blocks = stack(self.heads, hidden, self.dtype, self.kernel, **kinds, name="blocks")
        self.norm = LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")
        if self.projection:
            options = {"use_bias": False, "dtype": self.dtype, "kernel_init": _normal(self.width**-0.5)}
            self.project = Dense(self.projection, **options, name="projection")
        if self.temperature:
            self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    def __call__(self, ids: Int[Array | np.ndarray, "texts tokens"]) -> Float[Array, "texts features"]:
        if ids.ndim != 2:
            raise ValueError(f"the tower takes ids (texts, tokens) and got {ids.shape}: one text is ids[None]")
        require_texts(self, ids)
        x = jnp.take(self.tokens, ids, axis=0, mode="fill") + self.position[: ids.shape[-1]]
        x, _ = self.blocks(x if self.dtype is None else x.astype(self.dtype), None)
        ends = jnp.argmax(ids if self.end is None else ids == self.end, axis=-1)
        x = self.norm(jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0])
        return self.project(x) if self.projection else x


def require_texts(model: TextTower, ids: Int[Array | np.ndarray, "*texts tokens"]) -> None:
    """ValueError for texts that are too long, ids that `model` doesn't have, and texts without an end, all listed.

    Nothing but the length is looked at while a function is traced: features of ids that aren't there are NaN then.
    """
    if not ids.size:
        raise ValueError(f"there is no text in token ids of shape {ids.shape}")
    if ids.shape[-1] > model.context:
        raise ValueError(
            f"texts of {ids.shape[-1]} tokens are longer than the {model.context} that the model reads: shorten them, "
            "and leave away what only fills up behind the end-of-text id"
        )
    if not tree.concrete(ids):
        return
    ids = np.asarray(ids)
    if ids.min() < 0 or ids.max() >= model.vocabulary:
        raise ValueError(
            f"token ids from {ids.min()} to {ids.max()} and a model of the ids 0 to {model.vocabulary - 1}: take the "
            "tokenizer of this checkpoint"
        )
    if model.end is None:
        missing = (ids.argmax(-1) == 0) | (ids.max(-1) != ids.max())
        token = f"the highest id, {ids.max()} here"
    else:
        missing, token = ~(ids == model.end).any(-1), f"{model.end}"
    if missing.any():
        raise ValueError(
            f"{missing.sum()} of {missing.size} texts have no end-of-text token ({token}), whose feature is the "
            f"text's, at {np.argwhere(missing)[:9].tolist()}: they were cut, or made by a tokenizer that marks no "
            "start and end"
        )
