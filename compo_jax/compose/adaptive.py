"""Weights that make the merged model sure of itself on test images without labels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.groups import Grouping, Groups, grouped
from compo_jax.compose.leaves import Stacked
from compo_jax.compose.modules import with_holes
from compo_jax.compose.numbers import require_iterations, require_number
from compo_jax.tree import Tree


class Unlabelled(NamedTuple):
    """A task's images without labels, and its model: of AdaMerging test images, of RegMean++ training images.

    Attributes:
      apply: `(params, inputs) -> logits (batch, classes)`, of the task's classes: its head closed over.
      batches: inputs, batch after batch; each step takes the next one of every task, round and round.
    """

    apply: Callable[[Tree, Any], Array]
    batches: Sequence[Any]


def tasks_of(unlabelled: Sequence[Unlabelled], count: int) -> list[Unlabelled]:
    """The tasks, their batches in lists; ValueError for another number than `count`, and for one without images."""
    if len(unlabelled) != count:
        raise ValueError(
            f"{len(unlabelled)} tasks' unlabelled images were given for {count} modules: an Unlabelled(apply, batches) "
            "for each"
        )
    tasks = [Unlabelled(task.apply, list(task.batches)) for task in (Unlabelled(*task) for task in unlabelled)]
    if empty := [str(t) for t, task in enumerate(tasks) if not task.batches]:
        raise ValueError(f"there are no unlabelled images of task {', '.join(empty)}: batches is an empty list")
    return tasks


class Adapted(NamedTuple):
    """A composition adapted to its tasks' images.

    Attributes:
      params: the composed parameters.
      weights: (tasks, groups), from 0 to 1.
      groups: the names of the groups.
      entropies: (steps,), the tasks' sum of the mean entropy, in nats, before each step.
    """

    params: Tree
    weights: Float[np.ndarray, "tasks groups"]
    groups: tuple[str, ...]
    entropies: Float[np.ndarray, " steps"]


def entropy(logits: Float[Array, "batch classes"]) -> Float[Array, ""]:
    """The mean entropy of the softmax, in nats; a class with the logit -inf has no part in it."""
    log_p = jax.nn.log_softmax(logits.astype(tree.wide_type(logits)))
    p = jnp.exp(log_p)
    return -jnp.mean(jnp.sum(p * jnp.where(p > 0, log_p, 0), axis=-1))


def summed_entropy(
    weights: Float[Array, "tasks groups"],
    base: Tree,
    deltas: Sequence[Tree],
    groups: Groups,
    applies: Sequence[Callable[[Tree, Any], Array]],
    inputs: Sequence[Any],
) -> Float[Array, ""]:
    """`Σ_t H(p_t(x_t; base + Σ w_{s,g} delta_s))` with the weights clipped to [0, 1], a batch of each task."""
    params = tree.add(base, groups.combine(deltas, jnp.clip(weights, 0, 1)))
    return sum(entropy(apply(params, x)) for apply, x in zip(applies, inputs, strict=True))


def adamerging(
    base: Tree,
    deltas: Sequence[Tree],
    unlabelled: Sequence[Unlabelled],
    *,
    groups: Grouping = "leaves",
    steps: int = 500,
    learning_rate: float = 1e-3,
    start: float = 0.3,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Adapted:
    """AdaMerging (Yang et al., 2024, arXiv 2310.02575): `min_λ Σ_t E H(p_t(x; base + Σ λ_{s,g} delta_s))`, by Adam.

    Args:
      unlabelled: one a module, each task's test images and model.
      groups: `leaves` is the paper's layer-wise (each tensor, and here each layer of a stack, its own weights), `tasks`
        its task-wise; see `groups.grouped`.
      steps, learning_rate, start: the authors': 500 steps of Adam at 1e-3, from 0.3 everywhere, weights clipped to
        [0, 1]. A step takes one batch of each task; theirs sums two, of 16 images each.

    ValueError for another number of tasks, one without images, and where the entropy isn't finite.
    """
    import optax

    deltas = with_holes(base, deltas, check_finite=check_finite)
    require_iterations(None, steps, "steps")
    require_number("learning_rate", learning_rate, "a positive number", lambda x: x > 0)
    require_number("start", start, "a weight from 0 to 1", lambda x: 0 <= x <= 1)
    tasks = tasks_of(unlabelled, len(deltas))
    parts = grouped(base, deltas, groups, stacked)
    applies, optimiser = [task.apply for task in tasks], optax.adam(learning_rate)

    @jax.jit
    def step(weights, state, inputs, base, deltas):
        value, slope = jax.value_and_grad(summed_entropy)(weights, base, deltas, parts, applies, inputs)
        updates, state = optimiser.update(slope, state)
        return optax.apply_updates(weights, updates), state, value

    weights = jnp.full((len(deltas), len(parts.names)), start, tree.wide_type(*jax.tree.leaves(deltas)))
    state, entropies = optimiser.init(weights), []
    for i in range(steps):
        inputs = [task.batches[i % len(task.batches)] for task in tasks]
        weights, state, value = step(weights, state, inputs, base, deltas)
        entropies.append(float(value))
        if check_finite and not np.isfinite(entropies[-1]):
            tree.require_finite(base, "the base")
            raise ValueError(f"the entropy isn't finite in step {i}: look at the logits, and at the images for NaN")
    weights = np.clip(np.asarray(weights), 0, 1)
    params = parts.compose(base, deltas, weights, check_finite=check_finite)
    return Adapted(params, weights, parts.names, np.array(entropies))
