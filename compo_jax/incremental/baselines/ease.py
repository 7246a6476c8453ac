"""EASE: an adapter for each task, and class means in the features of each of them."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from compo_jax.incremental.baselines.ncm import nearest_class_mean
from compo_jax.incremental.ita import task_arithmetic
from compo_jax.incremental.modes import Method, Mode, Snapshot, apart
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register

OTHERS = 0.1  #: weight of the subspaces of other tasks than a class's own (the paper's α)
Prototypes = Float[np.ndarray, "_classes features"]


def _unit(rows: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n features"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def completed(measured: Sequence[Sequence[Prototypes]]) -> list[list[Prototypes]]:
    """`[task][subspace]`, the prototypes of each task's classes in the features of every task's adapter.

    Those of an older task's classes in a newer subspace can't be measured, for its images are gone: they are the newer
    classes' means there, weighted by how near the old class is to each in its own subspace (a softmax of cosines). The
    authors' code has a switch by which they are made anew of all newer tasks' classes after each task.

    Args:
      measured: `[task][subspace]`, those in the subspaces up to the task's own.
    """
    every = [list(row) for row in measured]
    for task, row in enumerate(every):
        for newer in range(task + 1, len(every)):
            nearness = np.exp(_unit(row[task]) @ _unit(measured[newer][task]).T)
            row.append(nearness / nearness.sum(axis=1, keepdims=True) @ measured[newer][newer])
    return every


def reweighted(
    features: Sequence[Float[np.ndarray, "images features"]], prototypes: Sequence[Sequence[Prototypes]]
) -> Float[np.ndarray, "images classes"]:
    """A class's logit: its cosine in its task's subspace, plus `OTHERS` times those in each other subspace.

    Args:
      features: in each subspace.
      prototypes: `[task][subspace]`.
    """
    units = [_unit(z) for z in features]
    return np.concatenate(
        [
            sum((1 if s == task else OTHERS) * units[s] @ _unit(p).T for s, p in enumerate(row))
            for task, row in enumerate(prototypes)
        ],
        axis=1,
    )


def expandable_subspaces(setup: Setup, method: Method) -> Mode:
    """Each adapter is trained alone, with a head that is then thrown away; class means of its features classify.

    Adapters are the method's, LoRA say, in the place of the paper's bottlenecks beside the MLPs. (The release divides
    `OTHERS` by the number of other tasks.)
    """
    stream, made = setup.stream, {}  # what was measured once stays: modules and tasks don't change

    def classify(snapshot: Snapshot):
        names = snapshot.composition.heads
        extracts = [partial(snapshot.extract, snapshot.pool.compose(setup.base, [name])) for name in names]
        for task, subspace in ((t, s) for t in range(len(names)) for s in range(t + 1)):
            if (task, subspace) not in made:
                train = stream.tasks[task].train
                made[task, subspace] = nearest_class_mean(extracts[subspace](train), train.labels)["kernel"].T
        prototypes = completed([[made[t, s] for s in range(t + 1)] for t in range(len(names))])
        return lambda split: reweighted([extract(split) for extract in extracts], prototypes)

    return task_arithmetic(setup, method)._replace(compose=apart, classify=classify)


register("ease", expandable_subspaces, "expandable subspace ensemble (EASE; Zhou et al., 2024, arXiv 2403.12030)")
