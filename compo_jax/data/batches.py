"""Batches addressed by step: step k of a run is the same batch whether the run came straight to it or was resumed."""

import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from compo_jax.data.splits import ArraySplit, JoinedSplit, Keys, Split, SubsetSplit, images_of

Batch = dict[str, np.ndarray]

_UNBOUNDED = 2**62  # steps of a run without an end: grain wants a number


def steps_per_epoch(split: Split, batch: int) -> int:
    """Batches that show every image once: images / batch, rounded up."""
    if batch < 1 or not len(split):
        raise ValueError(f"batches of {batch} from a split of {len(split)} images: both must be at least 1")
    return -(-len(split) // batch)


def _take(split: Split, indices: np.ndarray, keys: Keys | None = None) -> Batch:
    return {"image": images_of(split, indices, keys), "label": split.labels[indices]}


def _held(split: Split) -> bool:
    """Whether all the images are in memory."""
    if isinstance(split, SubsetSplit):
        return _held(split.split)
    return all(map(_held, split.splits)) if isinstance(split, JoinedSplit) else isinstance(split, ArraySplit)


def _ahead(split: Split, make, start: int, stop: int) -> Iterator:
    """make(start), make(start + 1), ... made ahead by threads where images have to be decoded."""
    if _held(split):
        return map(make, range(start, stop))
    import grain

    threads = min(16, os.cpu_count() or 1)  # each makes a whole batch, so this bounds the memory too
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    return iter(grain.MapDataset.range(start, max(start, stop)).map(make).to_iter_dataset(options))


def train_batches(
    split: Split, batch: int, seed: int | Sequence[int], start: int = 0, steps: int | None = None
) -> Iterator[Batch]:
    """The batches of steps `start` to `steps` - 1 (None: without end): {"image": uint8 (batch, size, size, 3), "label":
    int32 (batch,)}.

    Step k belongs to epoch k // `steps_per_epoch`, whose order is `np.random.default_rng([*seed, epoch]).permutation`.
    The last batch of an epoch is filled up from the start of the same order: no image is dropped, no shape changes.
    Images that aren't in memory are read and decoded ahead by threads; where crops are drawn from them as they are read
    (`augment="original"`), image i of the batch by the key `[*seed, epoch, step within it, i]`.
    """
    length = steps_per_epoch(split, batch)
    seeds = np.atleast_1d(seed).tolist()

    @functools.lru_cache(maxsize=2)  # threads may stand on both sides of an epoch's end
    def order(epoch: int) -> np.ndarray:
        permutation = np.random.default_rng([*seeds, epoch]).permutation(len(split))
        return np.resize(permutation, (length, batch))

    def make(step: int) -> Batch:
        epoch, row = divmod(step, length)
        return _take(split, order(epoch)[row], [(*seeds, epoch, row, place) for place in range(batch)])

    return _ahead(split, make, start, _UNBOUNDED if steps is None else steps)


def eval_batches(split: Split, batch: int) -> Iterator[tuple[Batch, int]]:
    """Every image once, in order: pairs (batch of fixed size, how many of its rows are real).

    The last batch is filled up by repeating its images; count the first rows only.
    """
    length = steps_per_epoch(split, batch)

    def make(step: int) -> tuple[Batch, int]:
        rows = np.arange(step * batch, min(len(split), (step + 1) * batch))
        return _take(split, np.resize(rows, batch)), len(rows)

    return _ahead(split, make, 0, length)
