"""What the base model alone says of each task, before any module is trained: mixtures, aligned head, Fisher."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.curvature import fisher_diagonal
from compo_jax.data import Split, TaskStream, eval_batches
from compo_jax.incremental.classifier import Head, align, head_fisher, logits, masked, new_head, probe
from compo_jax.incremental.mixtures import Mixtures, empty_mixtures, fit_mixtures, sample
from compo_jax.incremental.settings import Settings

Tree = Any


class Reference(NamedTuple):
    """The state of the reference after the tasks 0 … t.

    Attributes:
      mixtures: of the features of every class seen.
      head: aligned over all classes seen; columns in the stream's class order.
      fisher: sum over images of the base's Fisher diagonal of the tasks seen, None where nothing is adapted.
      images: their number.
      others: mean Fisher of the tasks before t plus ε, what a module trained on task t is kept neutral to.
      head_fisher: mean Fisher of the head on the features of the classes before t.
    """

    mixtures: Mixtures
    head: Head
    fisher: Tree
    images: Array
    others: Tree
    head_fisher: Head


def features(model, stream: TaskStream, batch: int) -> Callable[[Tree, Split], Float[np.ndarray, "images features"]]:
    """`(params, split) -> features` of all images of the split, in order, `batch` at a time; compiled once."""

    @jax.jit
    def forward(params, images):
        return model.apply({"params": params}, stream.prepare(images), method="features")

    def run(params, split):
        return np.concatenate(
            [np.asarray(forward(params, part["image"]), np.float32)[:real] for part, real in eval_batches(split, batch)]
        )

    return run


def reference_stage(
    model, base: Tree, stream: TaskStream, settings: Settings, adapted: Iterable[str], seed: int
) -> tuple[Reference, Callable[[Reference, int], Reference]]:
    """The empty reference of a stream, and `(reference, t) -> reference` after task t.

    Args:
      adapted: path patterns of the weights whose Fisher is wanted.
    """
    total = len(stream.classes)
    kept = tree.partition(base, list(adapted))[0]
    width = jax.eval_shape(
        lambda: model.apply({"params": base}, jnp.zeros((1, stream.size, stream.size, 3)), method="features")
    ).shape[-1]
    root = jax.random.key(seed)
    extract = features(model, stream, settings.eval_batch)
    probe_head = jax.jit(probe, static_argnames=("steps", "batch"))
    align_head = jax.jit(align, static_argnames=("batch",))

    @jax.jit
    def weight_fisher(kept, base, images, head, seen, key, labels):
        def apply(params, images):
            z = model.apply({"params": tree.combine(params, base)}, images, method="features")
            return masked(logits(head, z), jnp.arange(total) < seen)

        return fisher_diagonal(
            apply,
            kept,
            stream.prepare(images),
            method=settings.fisher_method,
            tolerance=settings.fisher_tolerance,
            key=key,
            labels=labels,
        )

    @jax.jit
    def fisher_of_head(key, head, mixtures, past, seen):
        labels = jax.random.randint(key, (4096,), 0, jnp.maximum(past, 1))
        drawn = sample(jax.random.fold_in(key, 1), mixtures, labels)
        found = head_fisher(head, drawn, jnp.arange(total) < seen)
        return jax.tree.map(lambda f: jnp.where(past > 0, f, 0), found)

    head = new_head(root, width, total)
    start = Reference(
        empty_mixtures(total, settings.components, width),
        head,
        jax.tree.map(jnp.zeros_like, kept),
        jnp.zeros((), jnp.int32),
        jax.tree.map(jnp.zeros_like, kept),
        jax.tree.map(jnp.zeros_like, head),
    )

    def after(reference: Reference, t: int) -> Reference:
        task = stream.tasks[t]
        past = stream.offsets[t]
        seen = past + len(task.classes)
        keys = jax.random.split(jax.random.fold_in(root, t + 1), 5)
        z = extract(base, task.train)
        labels = task.train.labels + past
        mixtures = fit_mixtures(reference.mixtures, z, labels, seed=seed)

        columns = jnp.arange(total)
        own = (columns >= past) & (columns < seen)
        steps = settings.probe_epochs * -(-len(labels) // settings.batch)
        head = probe_head(keys[0], reference.head, z, labels, own, steps=steps)
        passes = settings.align_epochs[0] + settings.align_epochs[1] * t
        head = align_head(keys[1], head, mixtures, seen, steps=passes * -(-seen * settings.align_samples // 128))

        chosen = np.random.default_rng([seed, t]).permutation(len(labels))[: settings.fisher_images or None]
        fisher, images = reference.fisher, reference.images
        for first in range(0, len(chosen), settings.eval_batch):
            part = chosen[first : first + settings.eval_batch]
            images_of_part, key = task.train.images(part), jax.random.fold_in(keys[2], first)
            found = weight_fisher(kept, base, images_of_part, head, seen, key, jnp.asarray(labels[part]))
            fisher = jax.tree.map(jnp.add, fisher, found.total)
            images = images + found.count
        count = jnp.maximum(reference.images, 1)
        others = jax.tree.map(lambda f: f / count + settings.epsilon, reference.fisher)
        return Reference(mixtures, head, fisher, images, others, fisher_of_head(keys[3], head, mixtures, past, seen))

    return start, after
