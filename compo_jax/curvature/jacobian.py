"""The curvature that tasks share so that their modules stay apart: of the model's outputs, whatever the loss (TAK)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax.curvature.kfac import Kronecker, kronecker, merge_kronecker
from compo_jax.curvature.output_loss import squared_loss
from compo_jax.tree import Tree


def jacobian_factors(
    apply: Callable[[Tree, Any], Float[Array, "batch *tokens outputs"]],
    params: Tree,
    inputs: Any,
    *,
    key: Any = None,
    tokens: str = "expand",
    chunk: int | None = None,
) -> Kronecker:
    """Kronecker factors of the mean of `JᵀJ` over the images, the Gauss-Newton matrix of the squared loss: A the Gram
    matrix of a layer's inputs, B that of probes pulled back from the outputs (Porrello et al., 2026, arXiv 2602.17385).

    `quadratic(delta)` estimates how far a delta moves the outputs on the images, `mean ‖J delta‖²`.

    Args:
      apply: the features, as the authors take them, or the logits.
      key: of one standard normal probe an image, which is what the authors take; None for the exact sum over all
        outputs, at the cost of a backward pass for each.

    The other arguments, and the errors: see `kronecker`.
    """
    method = "exact" if key is None else "monte_carlo"
    return kronecker(
        apply, params, inputs, tokens=tokens, method=method, key=key, chunk=chunk, output_loss=squared_loss()
    )


def factors_of_others(factors: Sequence[Kronecker]) -> list[Kronecker]:
    """For each task the factors of all tasks but it, merged into one pair: A as a mean over images, B as a sum over
    tasks (Porrello et al., 2026, equation 8). So it costs the same however many tasks there are.

    The penalty of a task's delta is `strength * factors_of_others(factors)[t].quadratic(delta)`. Without the merging it
    is `Σ_s (n_s / N) factors[s].quadratic(delta)` over the other tasks (equation 7), and T - 1 times as dear.

    ValueError for fewer than two tasks, or where they are of different layers.
    """
    factors = list(factors)
    if len(factors) < 2:
        raise ValueError(f"the factors of other tasks need two tasks at least, and there are {len(factors)}")
    return [merge_kronecker([*factors[:t], *factors[t + 1 :]], jnp.ones(len(factors) - 1)) for t in range(len(factors))]
