"""A classifier out of texts (Radford et al., 2021, arXiv 2103.00020, section 3.1.4): one direction for each class.

tower, params = clip_text.load(folder)
ids = prompts.token_ids(folder, names, prompts.TEMPLATES["cifar100"])
head = zero_shot.head(zero_shot.class_embeddings(tower, params, ids), params["logit_scale"])
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from compo_jax.models.layers import unit as unit
from compo_jax.models.text_tower import TextTower, require_texts
from compo_jax.tree import Tree


def class_embeddings(
    model: TextTower, params: Tree, ids: Int[Array | np.ndarray, "classes templates tokens"]
) -> Float[Array, "classes width"]:
    """Each class's direction: the mean of its texts' features at length 1, at length 1 itself.

    One class is computed after another. Differentiable in `params`. ValueError for ids that `model` refuses.
    """
    require_texts(model, ids)
    return lax.map(lambda texts: unit(unit(model.apply({"params": params}, texts)).mean(0)), jnp.asarray(ids))


def head(
    embeddings: Float[Array, "classes width"], logit_scale: Float[Array, ""] | float
) -> dict[str, Float[Array, "..."]]:
    """The linear head `{"kernel": (width, classes), "bias": (classes,)}` whose logits are CLIP's, for `unit` features.

    Features of other lengths give the same order of classes, more certain the longer they are.

    Args:
      logit_scale: log of what cosines are multiplied by, `params["logit_scale"]`.
    """
    return {
        "kernel": jnp.exp(jnp.asarray(logit_scale, embeddings.dtype)) * embeddings.T,
        "bias": jnp.zeros(len(embeddings), embeddings.dtype),
    }
