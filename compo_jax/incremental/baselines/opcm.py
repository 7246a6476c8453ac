"""OPCM: modules trained alone, each projected away from what is merged before it is added."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from compo_jax import adapters, tree
from compo_jax.compose.numbers import require_part
from compo_jax.incremental.ita import task_arithmetic
from compo_jax.incremental.modes import Method, Mode, apart, composed
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


def projected(
    delta: Float[np.ndarray, "*layers in out"], merged: Float[np.ndarray, "*layers in out"], alpha: float
) -> Float[np.ndarray, "*layers in out"]:
    """`Σ_{i,j ≥ r, i ≠ j} ⟨Δ, u_i v_jᵀ⟩ u_i v_jᵀ` in the singular vectors of what is merged, layer by layer.

    r is the first with `σ_1 + … + σ_r ≥ alpha Σ σ` (Tang et al., 2025, arXiv 2501.09522). Pairs of vectors
    whose singular value is zero could be any, and nothing is left out for them. The authors' code takes out less: the
    terms with i and j below r, where this takes out those with i or j.
    """
    left, values, right = np.linalg.svd(merged, full_matrices=False)
    leading = np.cumsum(values, axis=-1) < alpha * values.sum(axis=-1, keepdims=True)
    floor = np.finfo(np.float32).eps * max(merged.shape[-2:]) * values[..., :1]  # rounding, in a module's own type
    u, v = left * leading[..., None, :], right * leading[..., :, None]
    rest = delta - u @ (np.swapaxes(u, -1, -2) @ delta)
    rest = rest - (rest @ np.swapaxes(v, -1, -2)) @ v
    pairs = np.einsum("...ik,...ij,...kj->...k", left, rest, right, optimize=True) * (values > floor)
    return rest - (left * pairs[..., None, :]) @ right


def projected_merging(setup: Setup, method: Method, *, alpha: float = 0.5) -> Mode:
    """Every module starts from the base; the sum of their projections is scaled to the mean length of the task vectors.

    With `S_t = S_{t-1} + P(Δ_t)`, projected by the singular vectors of S_{t-1}, the model is `base + S_t / λ_t` where
    `λ_t = ‖S_t‖ / mean_{s ≤ t} ‖Δ_s‖`. A weight that is no matrix is added as it is. The heads are trained and put
    together as those of other methods are; the paper has CLIP's zero-shot heads instead. Queries, keys and values are
    one matrix where the model has them in one, as timm's have; in the paper's CLIP they are three.

    Args:
      alpha: part of the singular values' sum whose vectors are left out, from 0 to 1; default: the paper's.
    """
    require_part("alpha", alpha, "the part of the singular values' sum whose vectors are left out, from 0 to 1")
    plain = task_arithmetic(setup, method)
    base, adapter = setup.base, method.adapter

    def project(name, delta, merged):
        if delta is None or delta.ndim - adapters.is_stacked(name) != 2:
            return delta
        wide = (np.asarray(x, np.float64) for x in (delta, merged))
        return jnp.asarray(projected(*wide, alpha), delta.dtype)

    def remember(memory, task, first, module, head, key):
        delta = adapter.delta(module, base)
        return {
            "sum": tree.add(memory["sum"], tree.map_with_name(project, delta, memory["sum"])),
            "length": memory["length"] + optax.tree.norm(delta),
            "tasks": memory["tasks"] + 1,
        }

    def classify(snapshot):
        memory, length = snapshot.memory, optax.tree.norm(snapshot.memory["sum"])
        scale = jnp.where(length > 0, memory["length"] / memory["tasks"] / jnp.where(length > 0, length, 1), 0)
        return composed(snapshot, tree.add(base, memory["sum"], scale))

    start = adapter.delta(adapter.init(jax.random.key(0), base), base)
    return plain._replace(
        memory={"sum": jax.tree.map(jnp.zeros_like, start), "length": jnp.zeros(()), "tasks": jnp.zeros(())},
        remember=remember,
        at_once=False,
        compose=apart,
        classify=classify,
    )


register(
    "opcm", projected_merging,
    "modules trained alone, merged by orthogonal projections (OPCM, Tang et al., 2025, arXiv 2501.09522)",
)  # fmt: skip
