"""Batches of several tasks at once, as many images of each."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from compo_jax.data import Split, eval_batches, train_batches
from compo_jax.data.batches import Batch
from compo_jax.models.sizes import whole_numbers


def _check(splits: Sequence[Split]) -> None:
    if not splits:
        raise ValueError("there is no task to take batches of")
    for t, split in enumerate(splits):
        if not len(split):
            raise ValueError(f"task or domain {t} has no images: leave it out, or look at how its images are chosen")
    shapes = [split.images(np.zeros(1, np.int64)).shape[1:] for split in splits]
    if len(set(shapes)) > 1:
        listed = ", ".join(f"{shape} (task {t})" for t, shape in enumerate(shapes))
        raise ValueError(f"tasks share one network and need images of one shape, and theirs are {listed}: resize them")


def _rows(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(tasks, batch, ...) as rows (batch · tasks, ...), so that a device that gets a piece has all tasks in it."""
    joined = np.stack(parts, axis=1)
    return joined.reshape(-1, *joined.shape[2:])


def balanced_batches(
    splits: Sequence[Split], batch: int, seed: int | np.integer | Sequence[int]
) -> Callable[[int], Iterator[Batch]]:
    """`start -> iterator` over the batches from step `start` on, for `train.fit`: `batch` images of each task.

    Row `i · tasks + t` is image i of task t, and its `task` is t. Each task goes through its own epochs
    (`data.train_batches`).
    """
    _check(splits)
    whole_numbers(batch=batch)
    seeds = np.atleast_1d(seed).tolist()
    whole_numbers(0, **{f"seed[{i}]" if len(seeds) > 1 else "seed": value for i, value in enumerate(seeds)})
    tasks = _rows([np.full(batch, t, np.int32) for t in range(len(splits))])

    def batches(start: int) -> Iterator[Batch]:
        each = [train_batches(split, batch, [*seeds, t], start) for t, split in enumerate(splits)]
        for parts in zip(*each, strict=True):
            yield {name: _rows([part[name] for part in parts]) for name in ("image", "label")} | {"task": tasks}

    return batches


def balanced_eval(splits: Sequence[Split], batch: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every image once, in order: (the same rows, how many images of each task are real: (tasks,)).

    A task that has come to its end shows its last batch again, with no image that counts.
    """
    _check(splits)
    whole_numbers(batch=batch)
    last = [None] * len(splits)
    for parts in itertools.zip_longest(*(eval_batches(split, batch) for split in splits)):
        real = np.array([0 if part is None else part[1] for part in parts])
        last = [old if part is None else part[0] for part, old in zip(parts, last, strict=True)]
        yield {name: _rows([part[name] for part in last]) for name in ("image", "label")}, real
