"""The curvature of a backbone's weights on a task, through a head over all classes seen."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from compo_jax import tree
from compo_jax.curvature import FisherDiagonal, Kronecker, fisher_diagonal, kronecker
from compo_jax.data import Split
from compo_jax.incremental.classifier import Head, logits, masked
from compo_jax.incremental.regularisers import Curvature
from compo_jax.incremental.settings import Setup
from compo_jax.tree import Tree

Fisher = FisherDiagonal | Kronecker


@runtime_checkable
class EstimateFisher(Protocol):
    """The Fisher of each kind on at most `settings.fisher_images` images of the split, drawn by `seed`.

    The classes are the head's first `seen`, and those of the split follow the first `past`; `key` is of the labels that
    are drawn.
    """

    def __call__(
        self, params: Tree, split: Split, head: Head, past: int, seen: int, key: Key[Array, ""], *, seed: Sequence[int]
    ) -> dict[str, Fisher]: ...


class TaskFisher(NamedTuple):
    """How the Fisher of chosen weights is taken; `zero(params, head)` is that of no images."""

    of: EstimateFisher
    zero: Callable[[Tree, Head], dict[str, Fisher]]


class Kind(NamedTuple):
    """A kind of curvature.

    Attributes:
      estimate: `(apply, params, images, **options) -> Fisher`.
      mean: `(Fisher, epsilon) ->` what penalties take: over the images, zero over none.
    """

    estimate: Callable[..., Fisher]
    mean: Callable[[Fisher, float], Curvature]


def _damped(fisher: FisherDiagonal, epsilon: float) -> Tree:
    return jax.tree.map(lambda f: f / jnp.maximum(fisher.count, 1) + epsilon, fisher.total)


KINDS = {"diagonal": Kind(fisher_diagonal, _damped), "kronecker": Kind(kronecker, lambda fisher, epsilon: fisher)}


def task_fisher(setup: Setup, adapted: Sequence[str], kinds: Sequence[str]) -> TaskFisher:
    """The Fisher of the weights whose paths match `adapted`; ValueError for an unknown kind."""
    model, stream, settings = setup.model, setup.stream, setup.settings
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"unknown curvature {unknown[0]!r}; known are {', '.join(KINDS)}")
    options = {"method": settings.fisher_method, "tolerance": settings.fisher_tolerance}

    @jax.jit
    def batch(params, images, head, seen, key, labels):
        kept, rest = tree.partition(params, adapted)

        def apply(kept, images):
            z = model.apply({"params": tree.combine(kept, rest)}, images, method="features")
            return masked(logits(head, z), jnp.arange(head["bias"].shape[0]) < seen)

        images = stream.prepare(images)
        return {kind: KINDS[kind].estimate(apply, kept, images, key=key, labels=labels, **options) for kind in kinds}

    def of(params, split: Split, head, past, seen, key, *, seed):
        chosen = np.random.default_rng(seed).permutation(len(split))[: settings.fisher_images or None]
        total = None
        for first in range(0, len(chosen), settings.eval_batch):
            part = chosen[first : first + settings.eval_batch]
            labels = jnp.asarray(split.labels[part] + past)
            one = batch(params, split.images(part), head, seen, jax.random.fold_in(key, first), labels)
            total = one if total is None else {kind: total[kind] + one[kind] for kind in kinds}
        return total

    def zero(params, head):
        structure = None

        def leaves(images):
            nonlocal structure
            fishers = batch(params, images, head, 1, jax.random.key(0), jnp.zeros(1, int))
            parts, structure = jax.tree.flatten(fishers)
            return parts

        shapes = jax.eval_shape(leaves, jnp.zeros((1, stream.size, stream.size, 3), jnp.uint8))
        return jax.tree.unflatten(structure, [jnp.zeros(x.shape, x.dtype) for x in shapes])

    return TaskFisher(of, zero)
