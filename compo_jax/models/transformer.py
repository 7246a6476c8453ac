"""The transformer block of Vision Transformers and of CLIP's text tower: pre-norm, with one joint qkv weight."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax.models.layers import Dense, LayerNorm, attention, gelu, quick_gelu

Tokens = Float[Array, "batch tokens width"]
NORMAL = nn.initializers.truncated_normal(0.02)
ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu, "gelu_tanh": partial(nn.gelu, approximate=True)}


def activation(name: str):
    """The function that a checkpoint's description calls `name`; ValueError, with the names, where there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"no activation is called {name!r}; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Attention(nn.Module):
    """Multi-head self-attention with one joint qkv weight; `causal`: no token sees a later one."""

    heads: int
    dtype: Any = None
    kernel: str = "xla"
    causal: bool = False

    @nn.compact
    def __call__(self, x: Tokens, asking: int = 0) -> Float[Array, "batch some width"]:
        """Of all tokens; or, where `asking` isn't 0, of that many first ones, which see only those after them."""
        batch, _, width = x.shape
        qkv = Dense(3 * width, dtype=self.dtype, kernel_init=NORMAL, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, width // self.heads)
        if asking:
            q, k, v = qkv[:, :asking, 0], qkv[:, asking:, 1], qkv[:, asking:, 2]
            x = attention(*(part.swapaxes(1, 2) for part in (q, k, v))).swapaxes(1, 2)
        elif self.kernel == "xla" and qkv.dtype.itemsize > 2:
            x = attention(*jnp.transpose(qkv, (2, 0, 3, 1, 4)), causal=self.causal).swapaxes(1, 2)
        else:
            x = jax.nn.dot_product_attention(
                *jnp.moveaxis(qkv, 2, 0), implementation=self.kernel, is_causal=self.causal
            )
        return Dense(width, dtype=self.dtype, kernel_init=NORMAL, name="proj")(x.reshape(batch, -1, width))


class MLP(nn.Module):
    """Two dense layers with an activation between them."""

    width: int
    dtype: Any = None
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        out = x.shape[-1]
        x = Dense(self.width, dtype=self.dtype, kernel_init=NORMAL, name="fc1")(x)
        x = activation(self.activation)(x)
        return Dense(out, dtype=self.dtype, kernel_init=NORMAL, name="fc2")(x)


class Block(nn.Module):
    """One pre-norm transformer block; scanned over depth (see `blocks`), hence the carry and the empty output.

    Attributes:
      kernel: attention implementation, see `ViT`.
      activation: of the MLP: `gelu` (exact), `quick_gelu` (OpenAI's CLIP) or `gelu_tanh` (SigLIP).
      layer_scale: what attention and MLP add is multiplied by a learned number per channel (Touvron et al., 2021,
        arXiv 2103.17239), 1e-5 at first.
      causal: no token sees a later one (text).
      epsilon: added to the variance in both norms.
    """

    heads: int
    mlp_width: int
    dtype: Any = None
    kernel: str = "xla"
    activation: str = "gelu"
    layer_scale: bool = False
    causal: bool = False
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Tokens, _=None):
        norm = partial(LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        attended = Attention(self.heads, self.dtype, self.kernel, self.causal, name="attention")(norm(name="norm1")(x))
        x = x + self._scaled("layer_scale1", attended)
        changed = MLP(self.mlp_width, self.dtype, self.activation, name="mlp")(norm(name="norm2")(x))
        return x + self._scaled("layer_scale2", changed), None

    def _scaled(self, name, x):
        if not self.layer_scale:
            return x
        return x * self.param(name, nn.initializers.constant(1e-5), (x.shape[-1],), jnp.float32).astype(x.dtype)


def blocks(depth: int, unroll: bool = False):
    """The module class of `depth` blocks: called as `Block`, parameters and adapters stacked on axis 0.

    unroll: True writes the blocks out instead of scanning over them.
    """
    return nn.scan(
        Block,
        variable_axes={"params": 0, "adapter": 0},
        split_rngs={"params": True},
        length=depth,
        unroll=depth if unroll else 1,
    )


class AttentionPool(nn.Module):
    """One learned query that attends to all tokens, then an MLP: the head of SigLIP (Zhai et al., 2022, 2106.04560)."""

    heads: int
    mlp_width: int
    dtype: Any = None
    activation: str = "gelu"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, "batch width"]:
        probe = self.param("probe", NORMAL, (1, 1, x.shape[-1])).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(probe, (len(x), *probe.shape[1:])), x], axis=1)
        x = Attention(self.heads, self.dtype, name="attention")(x, asking=1)
        norm = LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        return (x + MLP(self.mlp_width, self.dtype, self.activation, name="mlp")(norm))[:, 0]
