"""What the base model alone says of each task, before any module is trained: mixtures, aligned head, Fisher."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from compo_jax.incremental.classifier import Head, align, head_fisher, new_head, probe
from compo_jax.incremental.extraction import Extract, feature_width, features
from compo_jax.incremental.fisher import KINDS, Fisher, task_fisher
from compo_jax.incremental.mixtures import Mixtures, empty_mixtures, fit_mixtures, sample
from compo_jax.incremental.regularisers import Curvature
from compo_jax.incremental.settings import Setup


class Metric(NamedTuple):
    """The curvature of some tasks, as a mean over their images.

    Attributes:
      weights: by kind: `diagonal`, plus ε, None where nothing is adapted; `kronecker`, merged factors.
      head: the head's Fisher diagonal on features drawn from the mixtures of the tasks' classes.
    """

    weights: dict[str, Curvature]
    head: Head


class Reference(NamedTuple):
    """The state of the reference after the tasks 0 … t.

    Attributes:
      mixtures: of the features of every class seen.
      head: aligned over all classes seen; columns in the stream's class order.
      newest: the base's curvature on task t alone, by kind.
      seen: that on the tasks up to t together.
      others: mean over the tasks before t, what a module trained alone is kept neutral to.
      every: mean over the tasks up to t, the metric of an ensemble.
    """

    mixtures: Mixtures
    head: Head
    newest: dict[str, Fisher]
    seen: dict[str, Fisher]
    others: Metric
    every: Metric


@runtime_checkable
class Refer(Protocol):
    """The reference after task `t`, from that after the tasks before it."""

    def __call__(self, reference: Reference, t: int) -> Reference: ...


def reference_stage(
    setup: Setup, adapted: Iterable[str], kinds: Iterable[str] = ("diagonal",), extract: Extract | None = None
) -> tuple[Reference, Refer]:
    """The empty reference of a stream, and what it becomes task by task.

    Args:
      adapted: path patterns of the weights whose curvature is wanted.
      kinds: of it, `diagonal` and `kronecker`.
      extract: the model's `features`, where they are compiled already.
    """
    model, base, stream, settings, seed = setup
    total = len(stream.classes)
    width = feature_width(model, base, stream)
    root = jax.random.key(seed)
    extract = extract or features(model, stream, settings.eval_batch)
    probe_head = jax.jit(probe, static_argnames=("steps", "batch"))
    align_head = jax.jit(align, static_argnames=("batch",))
    curvature = task_fisher(setup, list(adapted), list(kinds))

    @jax.jit
    def fisher_of_head(key, head, mixtures, among, seen):
        labels = jax.random.randint(key, (4096,), 0, jnp.maximum(among, 1))
        drawn = sample(jax.random.fold_in(key, 1), mixtures, labels)
        fisher = head_fisher(head, drawn, jnp.arange(total) < seen)
        return jax.tree.map(lambda f: jnp.where(among > 0, f, 0), fisher)

    @jax.jit
    def metric(fishers, head):
        return Metric({kind: KINDS[kind].mean(fisher, settings.epsilon) for kind, fisher in fishers.items()}, head)

    @jax.jit
    def gather(seen, newest):
        return {kind: seen[kind] + fisher for kind, fisher in newest.items()}

    head = new_head(root, width, total)
    nothing = curvature.zero(base, head)
    blank = metric(nothing, jax.tree.map(jnp.zeros_like, head))
    start = Reference(empty_mixtures(total, settings.components, width), head, nothing, nothing, blank, blank)

    def after(reference: Reference, t: int) -> Reference:
        task = stream.tasks[t]
        past = stream.offsets[t]
        seen = past + len(task.classes)
        keys = jax.random.split(jax.random.fold_in(root, t + 1), 5)
        z = extract(base, task.train)
        labels = task.train.labels + past
        mixtures = fit_mixtures(reference.mixtures, z, labels, seed=seed)

        columns = jnp.arange(total)
        of_task = (columns >= past) & (columns < seen)
        steps = settings.probe_epochs * -(-len(labels) // settings.batch)
        head = probe_head(keys[0], reference.head, z, labels, of_task, steps=steps)
        passes = settings.align_epochs[0] + settings.align_epochs[1] * t
        head = align_head(keys[1], head, mixtures, seen, steps=passes * -(-seen * settings.align_samples // 128))

        newest = curvature.of(base, task.train, head, past, seen, keys[2], seed=[seed, t])
        every = gather(reference.seen, newest)
        before, now = (fisher_of_head(keys[3], head, mixtures, among, seen) for among in (past, seen))
        return Reference(mixtures, head, newest, every, metric(reference.seen, before), metric(every, now))

    return start, after
