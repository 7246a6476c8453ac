"""Images and their labels, addressed by index: in memory, read when asked, some of another's, several end to end."""

from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, UInt8


@runtime_checkable
class Split(Protocol):
    """Images of one task, addressed by index.

    Attributes:
      labels: (images,) int32, from 0 to the number of the task's classes - 1.
    """

    labels: np.ndarray

    def __len__(self) -> int: ...

    def images(self, indices: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n size size 3"]: ...


Keys = Sequence[Sequence[int]]


class _Drawn(Protocol):
    """A split that may draw from its images as it reads them."""

    def images(self, indices: Int[np.ndarray, " n"], keys: Keys) -> UInt8[np.ndarray, "n size size 3"]: ...


def images_of(split: Split, indices: Int[np.ndarray, " n"], keys: Keys | None) -> UInt8[np.ndarray, "n size size 3"]:
    """The split's images; of one that draws from them as it reads (`draws`, as `reading.SourceSplit` may) what it draws
    by the key of each, which is some whole numbers."""
    if keys is not None and getattr(split, "draws", False):
        return cast(_Drawn, split).images(indices, keys)
    return split.images(indices)


def whole(labels) -> Int32[np.ndarray, " images"]:
    """The labels as int32; ValueError where they are no whole numbers, one for each image."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are whole numbers, one for each image, and these are {labels.dtype} of shape {labels.shape}: cast "
            "them to int, with argmax where they are one-hot"
        )
    return labels.astype(np.int32)


class ArraySplit:
    """A split held in memory: an image for each label, which are whole numbers."""

    def __init__(self, pixels: UInt8[np.ndarray, "images size size 3"], labels: np.ndarray):
        self.pixels = pixels
        self.labels = whole(labels)
        if len(self.labels) != len(pixels):
            raise ValueError(f"{len(pixels)} images need as many labels, not {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n size size 3"]:
        return self.pixels[indices]


class SubsetSplit:
    """Some rows of a split, in this order, read when asked."""

    def __init__(self, split: Split, rows: Int[np.ndarray, " images"]):
        self.split, self.rows = split, np.asarray(rows)
        self.labels: Int32[np.ndarray, " images"] = split.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def draws(self) -> bool:
        """See `images_of`."""
        return getattr(self.split, "draws", False)

    def images(self, indices: Int[np.ndarray, " n"], keys: Keys | None = None) -> UInt8[np.ndarray, "n size size 3"]:
        return images_of(self.split, self.rows[indices], keys)


class JoinedSplit:
    """Several splits end to end, the labels of each raised by its offset; images are read from the parts when asked."""

    def __init__(self, splits: Sequence[Split], offsets: Sequence[int]):
        self.splits = tuple(splits)
        self.starts = np.cumsum([0, *map(len, splits)])
        self.labels: Int32[np.ndarray, " images"] = np.concatenate(
            [s.labels + np.int32(offset) for s, offset in zip(splits, offsets, strict=True)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def draws(self) -> bool:
        """See `images_of`."""
        return any(getattr(split, "draws", False) for split in self.splits)

    def images(self, indices: Int[np.ndarray, " n"], keys: Keys | None = None) -> UInt8[np.ndarray, "n size size 3"]:
        indices = np.arange(len(self))[indices]  # rejects what is out of range and resolves negative indices
        part = np.searchsorted(self.starts, indices, side="right") - 1
        order = np.argsort(part, kind="stable")
        pieces = []
        for p in np.unique(part).tolist():
            places = np.flatnonzero(part == p)
            chosen = None if keys is None else [keys[i] for i in places.tolist()]
            pieces.append(images_of(self.splits[p], indices[places] - self.starts[p], chosen))
        if not pieces:
            return self.splits[0].images(indices)
        return np.concatenate(pieces)[np.argsort(order)]
