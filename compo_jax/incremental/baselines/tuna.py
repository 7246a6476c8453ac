"""TUNA: an adapter for each task and one fused of all; the surest of the first and the fused one answer together."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import softmax

from compo_jax import tree
from compo_jax.incremental.evaluate import linear
from compo_jax.incremental.ita import task_arithmetic
from compo_jax.incremental.modes import Method, Mode, Snapshot, apart
from compo_jax.incremental.pooled import pool_head
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register
from compo_jax.tree import Tree

Logits = Float[np.ndarray, "images classes"]


def fused(deltas: Callable[[], Iterable[Tree]]) -> Tree:
    """The universal adapter: of each entry the sign of the sum, with the largest magnitude among those of that sign.

    Args:
      deltas: makes them anew each time that it is called, for two are held at a time.
    """
    signs = jax.tree.map(jnp.sign, reduce(partial(jax.tree.map, jnp.add), deltas()))
    agreeing = (jax.tree.map(lambda sign, x: jnp.maximum(sign * x, 0), signs, delta) for delta in deltas())
    return jax.tree.map(jnp.multiply, signs, reduce(partial(jax.tree.map, jnp.maximum), agreeing))


def agreed(specific: Sequence[Logits], universal: Logits) -> Logits:
    """For each image the probabilities by the task's adapter whose answer has the least entropy, plus the universal's.

    The entropy is over the classes of all tasks, so that those of tasks of different sizes can be compared.
    """
    p = softmax(np.stack(specific), axis=-1)
    entropy = -np.sum(p * np.log(np.maximum(p, 1e-30)), axis=-1)
    return p[entropy.argmin(axis=0), np.arange(len(universal))] + softmax(universal, axis=-1)


def mean_row(b: Float[Array, "*stack rank out"]) -> Float[Array, "*stack rank"]:
    """The mean of what LoRA's `b` has for each output, scaled to length 1."""
    squares = jnp.sum(b**2, axis=-2, keepdims=True)
    return jnp.mean(b / jnp.sqrt(jnp.where(squares > 0, squares, 1)), axis=-1)  # at its start b is zero


def overlap(module: Tree, earlier: Tree) -> jax.Array:
    """The loss of orthogonality: for each earlier adapter the magnitude of the mean cosine between the rows of its `b`
    and those of the new one, which is that of their mean rows' product, as a mean over weights and layers.

    Args:
      earlier: for each adapted weight the mean rows (tasks, …, rank); zeros for tasks that haven't come.
    """
    products = jax.tree.map(lambda rows, entry: jnp.abs(jnp.sum(rows * mean_row(entry["b"]), -1)), earlier, module)
    each = jax.tree.leaves(products)
    return sum(jnp.sum(x) for x in each) / sum(x[0].size for x in each)


def universal_adapter(setup: Setup, method: Method) -> Mode:
    """Each LoRA module is trained alone, orthogonal to the earlier ones with weight `alpha`; deltas are fused.

    LoRA is in the place of the paper's bottlenecks, whose two matrices are fused one by one, and the heads are those of
    all methods here. (In the release the weight falls with `exp(-tasks)`, and the loss is off for some sets.)
    """
    plain = task_arithmetic(setup, method)
    base, adapter, tasks = setup.base, method.adapter, len(setup.stream.tasks)
    if adapter.name != "lora":
        raise ValueError(f"method {method.name!r} keeps the factors of LoRA apart: take adapters.lora()")

    def remember(memory, task, first, module, head, key):
        put = lambda rows, entry: rows.at[memory["tasks"]].set(mean_row(jnp.asarray(entry["b"])))
        return {"rows": jax.tree.map(put, memory["rows"], module), "tasks": memory["tasks"] + 1}

    def classify(snapshot: Snapshot):
        names, pool = snapshot.composition.heads, snapshot.pool
        head = pool_head(pool, names, snapshot.reference.head)
        every = [pool.compose(base, [name]) for name in names]
        every.append(tree.add(base, fused(lambda: pool.deltas(base, names))))
        logits = [linear(partial(snapshot.extract, params), head) for params in every]
        return lambda split: agreed([of(split) for of in logits[:-1]], logits[-1](split))

    start = adapter.init(jax.random.key(0), base)
    blank = lambda _, entry: jnp.zeros((tasks, *entry["b"].shape[:-1]), entry["b"].dtype)
    return plain._replace(
        memory={"rows": jax.tree.map(blank, adapter.delta(start, base), start), "tasks": jnp.int32(0)},
        hold=lambda memory: {"base": base, "rows": memory["rows"]},
        penalty=lambda held, module, _, alpha: alpha * overlap(module, held["rows"]),
        alpha_unit=lambda *_: jnp.ones(()),
        remember=remember,
        at_once=False,
        compose=apart,
        classify=classify,
    )


register(
    "tuna", universal_adapter, "task-specific and universal adapters (TUNA; Wang et al., 2025, arXiv 2508.08165)",
    alpha=1e-3, coupled=True,
)  # fmt: skip
