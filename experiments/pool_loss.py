"""The loss of a pool's compositions on test images of all tasks, as a function of the adapted weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compo_jax import adapters, incremental, tree
from compo_jax.tree import Tree

PATTERNS = [pattern for pattern, _ in adapters.VIT_TARGETS]


class Problem(NamedTuple):
    """The loss of a pool's compositions.

    Attributes:
      weights, rest: the adapted weights of the base, and its other parameters.
      deltas: task vectors of the pool's modules.
      head: their heads, side by side.
      images, labels: test images of all tasks, as many of each.
    """

    weights: Tree
    rest: Tree
    deltas: list[Tree]
    head: dict[str, jax.Array]
    images: jax.Array
    labels: jax.Array


def problem_of(run: incremental.FinishedRun, name: str, count: int, seed: int) -> Problem:
    pool, stream = run.pools[name], run.stream
    members = pool.names()
    each = count // len(members)
    chosen = [np.random.default_rng([seed, t]).permutation(len(k.test))[:each] for t, k in enumerate(stream.tasks)]
    images = np.concatenate([task.test.images(rows) for task, rows in zip(stream.tasks, chosen, strict=True)])
    labels = np.concatenate(
        [k.test.labels[rows] + first for k, rows, first in zip(stream.tasks, chosen, stream.offsets, strict=True)]
    )
    order = np.random.default_rng(seed).permutation(len(labels))  # every batch has images of all tasks
    weights, rest = tree.partition(run.base, PATTERNS)
    deltas = []
    for member in members:
        manifest = pool.manifest(member)
        delta = adapters.build(manifest.adapter, manifest.settings).delta(pool.load(member), run.base)
        deltas.append(jax.tree.map(lambda d, _: d, delta, weights))
    heads = [pool.load(member, "head") for member in members]
    head = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *heads)
    return Problem(weights, rest, deltas, head, stream.prepare(jnp.asarray(images[order])), jnp.asarray(labels[order]))


def functions(model):
    """(logits, loss) of the adapted weights, with what is frozen in a `Problem`."""

    def logits(frozen: Problem, weights, images):
        z = model.apply({"params": tree.combine(weights, frozen.rest)}, images, method="features")
        return z @ frozen.head["kernel"] + frozen.head["bias"]

    def loss(frozen: Problem, weights, images, labels):
        values = logits(frozen, weights, images)
        return optax.softmax_cross_entropy_with_integer_labels(values, labels).mean()

    return logits, loss


def batches(problem: Problem, size: int = 64) -> list[tuple]:
    return [(problem.images[i : i + size], problem.labels[i : i + size]) for i in range(0, len(problem.labels), size)]
