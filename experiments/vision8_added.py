"""vision8's modules that are made to be added: how they are held and taught, what is shared, and what sums reach.

Kinds linear and tak are of the linearised model `f(base) + J delta`, in training and in tests. TAK (Porrello et al.,
2026, arXiv 2602.17385) holds a module where the other tasks' features don't move, by Kronecker factors that the tasks
share instead of images; so modules are added with coefficient 1, and one that is subtracted takes its task away. DELTA
(Sommariva et al., 2026, arXiv 2605.18993) teaches a module of the network itself to do what one of the linearised model
does, which learns beside it and isn't kept. Deltas and factors are of the kernels of the blocks' dense layers; the
authors train biases and layer normalisations, too, and hold DELTA's modules by eigenvalue-corrected factors of one set
of general images where ours have the factors of the other tasks, as TAK's.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import merge_bench
import numpy as np

from compo_jax import adapters, compose, curvature, data, incremental, tree
from compo_jax.compose.rule_results import MergedPool, PoolMerges
from compo_jax.compose.scaled_results import Scaled, Sweep
from compo_jax.pool import ModulePool

COEFFICIENTS = {"linear": np.linspace(0, 1, 11), "tak": np.linspace(0, 1, 11), "delta": np.linspace(0, 1, 5)}
PATTERNS = [pattern for pattern, _ in adapters.VIT_TARGETS]


class Penalty(NamedTuple):
    """`strength tr(B Δᵀ A Δ)`, where `others` has the factors of all tasks but one, for each task."""

    strength: float
    others: list[curvature.Kronecker]


def along_path(key: jax.Array, progress: jax.Array) -> jax.Array:
    """How far along their deltas DELTA's modules learn at this part of the steps, from 0 to 1: uniform between bounds
    that go from 1 to 1/2 and to 2, with the root of it (the authors' settings)."""
    opened = jnp.sqrt(progress)
    return jax.random.uniform(key, minval=1 - 0.5 * opened, maxval=1 + opened)


def distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean over images of the features' squared distance, in units of the teacher's mean square, who doesn't learn by
    it: the authors' features have norm one."""
    teacher = jax.lax.stop_gradient(teacher)
    return jnp.sum((student - teacher) ** 2) / jnp.sum(teacher**2)


class Parts(NamedTuple):
    """The tasks, and the same with images for tests that were left out of training."""

    stream: data.TaskStream
    validation: data.TaskStream


def shuffled(split: data.Split, seed: list[int]) -> np.ndarray:
    """The split's rows in a random order, one of each class first."""
    rows = np.random.default_rng(seed).permutation(len(split))
    _, first = np.unique(split.labels[rows], return_index=True)
    return np.concatenate([rows[first], np.delete(rows, first)])


def held_out(stream: data.TaskStream, seed: int) -> Parts:
    """A fifth of each task's training images is left out, but for the last one of a class."""
    kept, left = [], []
    for t, task in enumerate(stream.tasks):
        rows = shuffled(task.train, [seed, t, 5])
        count = min(len(rows) // 5, len(rows) - len(task.classes))
        if count < 1:
            raise ValueError(
                f"{task.name} has {len(rows)} training images of {len(task.classes)} classes: kinds to be added leave "
                "out a fifth, and want more"
            )
        train, validation = (data.SubsetSplit(task.train, np.sort(x)) for x in (rows[:-count], rows[-count:]))
        kept.append(task._replace(train=train))
        left.append(task._replace(train=train, test=validation))
    return Parts(stream._replace(tasks=tuple(kept)), stream._replace(tasks=tuple(left)))


def shared_factors(run: incremental.FinishedRun, images: int, seed: int) -> list[curvature.Kronecker]:
    """Each task's factors of the features' Jacobian at the base, by one probe an image.

    They are in the authors' units, for whom features have norm one and B is a mean over an image's tokens, so that a
    strength means the same here.
    """
    weights, rest = tree.partition(run.base, PATTERNS)

    @jax.jit
    def of_images(key, weights, images):
        images = run.stream.prepare(images)

        def features(weights, images):
            return run.model.apply({"params": tree.combine(weights, rest)}, images, method="features")

        factors = curvature.jacobian_factors(features, weights, images, key=key)
        norm = jnp.mean(jnp.sum(features(weights, images) ** 2, axis=-1))
        return factors.scale(1 / (norm * max(layer.tokens for _, layer in factors.layout)))

    shared = []
    for t, task in enumerate(run.stream.tasks):
        rows = np.sort(np.random.default_rng([seed, t]).permutation(len(task.train))[:images])
        shared.append(of_images(jax.random.fold_in(jax.random.key(seed), t), weights, task.train.images(rows)))
    return shared


class Logits(NamedTuple):
    """Of a task's test images: the base's (images, classes), and each module's change (modules, images, classes)."""

    base: np.ndarray
    changes: np.ndarray

    def at(self, weights: np.ndarray) -> np.ndarray:
        return self.base + np.tensordot(weights, self.changes, 1)


class Weighed(NamedTuple):
    """The logits of every task of a stream: of all weightings of the modules at once, for the model is linear."""

    stream: data.TaskStream
    logits: list[Logits]

    def accuracies(self, weights: np.ndarray) -> incremental.Accuracies:
        """Of the base plus the weighted sum of the modules."""
        parts = iter([logits.at(weights) for logits in self.logits])
        return incremental.accuracies(lambda _: np.concatenate(list(parts)), self.stream, len(self.logits))


def weighed(run: incremental.FinishedRun, deltas: list, stream: data.TaskStream, batch: int = 32) -> Weighed:
    """The modules of the linearised model on the test images of this stream."""
    tangent, extract = incremental.tangent_features(run.model), incremental.features(run.model, stream, 128)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *deltas)
    forward = jax.jit(lambda base, deltas, x: jax.vmap(lambda d: tangent(base, d, stream.prepare(x)))(deltas))
    kernel, logits = np.asarray(run.head["kernel"]), []
    for task in stream.tasks:
        base = extract(run.base, task.test)
        moved = [
            np.asarray(forward(run.base, stacked, part["image"]), np.float32)[:, :real]
            for part, real in data.eval_batches(task.test, batch)
        ]
        changes = np.concatenate(moved, axis=1) - base
        logits.append(Logits(base @ kernel + np.asarray(run.head["bias"]), changes @ kernel))
    return Weighed(stream, logits)


Reached = Callable[[np.ndarray], incremental.Accuracies]


def reached(run: incremental.FinishedRun, kind: str, deltas: list, stream: data.TaskStream) -> Reached:
    """What tests the base plus a weighted sum of the modules, in the model that this kind is of."""
    if kind != "delta":
        return weighed(run, deltas, stream).accuracies
    test = incremental.evaluator(incremental.features(run.model, stream, 128), stream)
    return lambda weights: test(compose.compose(run.base, deltas, weights), run.head, len(deltas))


def sweep(test: Reached, tasks: int, coefficients: np.ndarray) -> Sweep:
    """So many modules added, and each taken off, with each coefficient; those begin with 0."""
    one, base = np.eye(tasks), test(np.zeros(tasks)).within
    added = [base, *(test(c * one.sum(axis=0)).within for c in coefficients[1:])]
    negated = [[base] * tasks, *([test(-c * t).within for t in one] for c in coefficients[1:])]
    return Sweep(np.array(added), np.array(negated))


def merged(
    run: incremental.FinishedRun, kind: str, pool: ModulePool, joint: np.ndarray, validation: Sweep, strength: float
) -> PoolMerges:
    """A pool averaged, added, and added with the coefficient that validation images choose."""
    deltas = list(pool.deltas(run.base))
    test, tasks = reached(run, kind, deltas, run.stream), len(deltas)
    scaled = Scaled(COEFFICIENTS[kind], validation, sweep(test, tasks, COEFFICIENTS[kind]))
    individual = np.array([test(alone).within[t] for t, alone in enumerate(np.eye(tasks))])
    rules, best, call = {}, float(scaled.coefficients[scaled.best()]), jax.jit(compose.compose)
    of_pool = {"strength": f"{strength:g}"} if kind != "linear" else {}
    for name, weight in (("average", 1 / tasks), ("added", 1.0), ("added, scaled", best)):
        weights = np.full(tasks, weight)
        among_all, within = test(weights)
        _, seconds, warnings = merge_bench.timed(partial(call, run.base, deltas, jnp.asarray(weights)))
        rules[name] = MergedPool(within, among_all, seconds, None, warnings, {"coefficient": f"{weight:.3g}"} | of_pool)
    cosines = np.asarray(compose.cosines(deltas))
    return PoolMerges(individual, scaled.test.added[0], {}, rules, cosines, joint, scaled=scaled)
