"""SLCA: fine-tuning at a slow rate, and a classifier that is aligned on a Gaussian of each class's features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from compo_jax import tree
from compo_jax.incremental.baselines.ncm import class_counts
from compo_jax.incremental.baselines.sequential import fine_tuning
from compo_jax.incremental.classifier import Head, alignment_loss, logits, task_columns
from compo_jax.incremental.evaluate import Classifier, linear
from compo_jax.incremental.extraction import feature_width, features
from compo_jax.incremental.modes import Method, Mode, Snapshot
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register

SLOW = 0.01  # the backbone's rate over the head's: 1e-4 and 1e-2 in the paper
EPOCHS, DRAWN, RATE = 5, 256, 0.01  # of the alignment; features drawn of a class, and in a batch: the authors' code
MOMENTUM, DECAY, RIDGE = 0.9, 5e-4, 1e-4  # of its SGD, and what is added to a covariance: the authors' code

Means = Float[Array | np.ndarray, "classes features"]
Roots = Float[Array | np.ndarray, "classes features features"]


def gaussians(z: Float[np.ndarray, "images features"], labels: Int[np.ndarray, " images"]) -> tuple[Means, Roots]:
    """(mean, lower Cholesky factor of the covariance plus a ridge) of each class from 0 to the largest label."""
    rows = [z[labels == label].astype(np.float64) for label in range(len(class_counts(z, labels)))]
    ridge = RIDGE * np.eye(z.shape[1])
    covariances = [np.cov(r, rowvar=False) + ridge if len(r) > 1 else ridge for r in rows]  # one image has none
    means, roots = [r.mean(axis=0) for r in rows], np.linalg.cholesky(covariances)
    return np.float32(means), np.float32(roots)


def draw(
    key: Key[Array, ""], means: Means, roots: Roots, seen: Int[Array, ""] | int
) -> tuple[Float[Array, "drawn features"], Int[Array, " drawn"]]:
    """(features, labels), as many of each class, shuffled; those of the first `seen` classes come before the others."""
    key_noise, key_order = jax.random.split(key)
    noise = jax.random.normal(key_noise, (means.shape[0], DRAWN, means.shape[1]))
    z = means[:, None] + jnp.einsum("cnj,cij->cni", noise, roots)
    labels = jnp.repeat(jnp.arange(means.shape[0]), DRAWN)
    order = jnp.argsort(jax.random.uniform(key_order, labels.shape) + (labels >= seen))
    return z.reshape(-1, z.shape[-1])[order], labels[order]


def align_classes(key: Key[Array, ""], head: Head, means: Means, roots: Roots, seen: Int[Array, ""] | int) -> Head:
    """The head after SGD with momentum on features drawn from the first `seen` classes' Gaussians, all alike.

    The loss is the cross-entropy of logits over 0.1 times their norm (Zhang et al., 2023, arXiv 2303.05118;
    the authors' code takes the mean of the tasks' norms, and draws old classes around means that it shortens by up to a
    tenth). The rate falls by a cosine, epoch by epoch.
    """
    mask = jnp.arange(means.shape[0]) < seen

    def step(rate, z, labels, i, state):
        head, velocity = state
        rows = (jax.lax.dynamic_slice_in_dim(x, i * DRAWN, DRAWN) for x in (z, labels))
        gradient = jax.grad(lambda head, z, labels: alignment_loss(logits(head, z), labels, mask))(head, *rows)
        velocity = jax.tree.map(lambda v, g, h: MOMENTUM * v + g + DECAY * h, velocity, gradient, head)
        return jax.tree.map(lambda h, v: h - rate * v, head, velocity), velocity

    def epoch(e, state):
        rate = RATE * 0.5 * (1 + jnp.cos(jnp.pi * e / EPOCHS))
        drawn = draw(jax.random.fold_in(key, e), means, roots, seen)
        return jax.lax.fori_loop(0, seen, partial(step, rate, *drawn), state)

    return jax.lax.fori_loop(0, EPOCHS, epoch, (head, jax.tree.map(jnp.zeros_like, head)))[0]


def slow_learner(setup: Setup, method: Method) -> Mode:
    """Sequential, the backbone's rate a hundredth of the method's, which is the head's. After each task all heads
    together are aligned, for this test alone: the next task's alignment begins with the heads as they were trained.

    A class's Gaussian is of its features by the model that its task left, and stays. The optimiser is AdamW as of all
    methods here, where the paper has SGD.
    """
    plain = fine_tuning(setup, method)
    model, base, stream, settings, seed = setup
    adapter, total, width = method.adapter, len(stream.classes), feature_width(model, base, stream)
    extract = features(model, stream, settings.features_batch)
    align = jax.jit(align_classes)

    def remember(memory, task, first, module, head, key):
        means, roots = gaussians(extract(tree.add(base, adapter.delta(module, base)), task.train), task.train.labels)
        put = lambda all, new: jnp.asarray(all).at[first : first + len(new)].set(new)
        return {"module": module, "means": put(memory["means"], means), "roots": put(memory["roots"], roots)}

    def classify(snapshot: Snapshot) -> Classifier:
        heads = [snapshot.pool.load(name, "head") for name in snapshot.composition.heads]
        head = jax.tree.map(lambda *columns: np.concatenate(columns, axis=-1), *heads)
        if snapshot.task:  # of one task's classes alone there is nothing to align
            seen, key = head["bias"].shape[0], jax.random.fold_in(jax.random.key(seed), snapshot.task)
            wide = task_columns(head, 0, seen, total)
            aligned = align(key, wide, snapshot.memory["means"], snapshot.memory["roots"], seen)
            head = task_columns(aligned, 0, seen, seen)
        params = snapshot.pool.compose(base, snapshot.composition.modules)
        return linear(partial(snapshot.extract, params), head)

    return plain._replace(
        memory=plain.memory | {"means": jnp.zeros((total, width)), "roots": jnp.zeros((total, width, width))},
        remember=remember,
        module_rate=SLOW,
        classify=classify,
    )


register(
    "slca", slow_learner, "slow learner with classifier alignment (SLCA, Zhang et al., 2023, arXiv 2303.05118)"
)  # fmt: skip
