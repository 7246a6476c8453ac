"""MagMax: fine-tuning, and of all task vectors the entries of largest magnitude."""

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.compose.numbers import require_number
from compo_jax.incremental.baselines.sequential import fine_tuning
from compo_jax.incremental.modes import Method, Mode, composed
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register
from compo_jax.tree import Tree


def largest_magnitude(a: Tree, b: Tree) -> Tree:
    """Entry by entry the one of larger magnitude, with its sign; that of `a` where they are equal."""
    return jax.tree.map(lambda x, y: jnp.where(jnp.abs(y) > jnp.abs(x), y, x), a, b)


def magnitude_merging(setup: Setup, method: Method, *, scale: float = 0.5) -> Mode:
    """Sequential; what is tested is `base + scale Δ`, Δ the largest entries of the task vectors, each from the base to
    the weights that a task left (Marczak et al., 2024).

    The heads are trained and put together as those of other methods are; the paper has CLIP's zero-shot head instead.

    Args:
      scale: λ of the merged task vector; default: that of the authors' code for all class-incremental streams.
    """
    require_number("scale", scale, "the finite factor of the merged task vector")
    plain = fine_tuning(setup, method)
    base, adapter = setup.base, method.adapter
    nothing = jax.tree.map(jnp.zeros_like, adapter.delta(plain.memory["module"], base))
    return plain._replace(
        memory=plain.memory | {"merged": nothing},
        remember=lambda memory, task, first, module, head, key: {
            "module": module, "merged": largest_magnitude(memory["merged"], adapter.delta(module, base)),
        },
        classify=lambda snapshot: composed(snapshot, tree.add(base, snapshot.memory["merged"], scale)),
    )  # fmt: skip


register(
    "magmax", magnitude_merging,
    "fine-tuning, merged by the largest entries of its task vectors (Marczak et al., 2024, arXiv 2407.06322)",
)  # fmt: skip
