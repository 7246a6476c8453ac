"""Task streams from TensorFlow Datasets' image classification sets, read without TensorFlow and never downloaded.

A set is divided into tasks by class order or by one of its label features (the alphabets of Omniglot, the coarse labels
of CIFAR-100). Only files that are already prepared are opened, since a missing set would send TFDS to the network.
"""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Integer, UInt8

from compo_jax.data import augment as augmentation
from compo_jax.data import records
from compo_jax.data.records import Records, open_builder
from compo_jax.data.sets import base_name, data_set
from compo_jax.data.stream import ArraySplit, Augmentation, Split, Task, TaskStream, checked, group_classes, relabel

_CHUNK = 512  # images decoded at a time


class Decoding(NamedTuple):
    """How stored bytes become pixels.

    Attributes:
      size: side of the result, in pixels.
      crop: side of the central square that is kept, as a fraction of the image's shorter side.
      invert: swap black and white.
      reduce: filter for images larger than the result; `BOX` averages, which thin strokes survive.
    """

    size: int
    crop: float = 1.0
    invert: bool = False
    reduce: Literal["BICUBIC", "BOX"] = "BICUBIC"

    def __call__(self, stored: bytes) -> UInt8[np.ndarray, "size size 3"]:
        from PIL import Image

        with Image.open(io.BytesIO(stored)) as image:
            image = image.convert("RGB")
        side = self.crop * min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        method = Image.Resampling[self.reduce if side > self.size else "BICUBIC"]
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.resize((self.size, self.size), method, box))
        return 255 - pixels if self.invert else pixels


class SourceSplit:
    """A split that reads and decodes the asked images; `rows` are their places in `source`.

    ValueError for one that can't be, with its set, split and place.
    """

    def __init__(self, source: Records, rows: Integer[np.ndarray, " images"], labels, decoding: Decoding):
        self.source, self.rows, self.decoding = source, rows, decoding
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n size size 3"]:
        rows = self.rows[indices].tolist()
        pixels = [self._decoded(row, record["image"]) for row, record in zip(rows, self.source[rows], strict=True)]
        return np.array(pixels, np.uint8).reshape(-1, self.decoding.size, self.decoding.size, 3)

    def _decoded(self, row: int, stored: bytes) -> UInt8[np.ndarray, "size size 3"]:
        try:
            return self.decoding(stored)
        except Exception as error:  # Pillow raises a dozen types, SyntaxError among them
            raise ValueError(
                f"{self.source.where}: image {row} can't be decoded ({error}): its {len(stored)} bytes are damaged or "
                "of a format that Pillow lacks; copy the set again from where it was prepared"
            ) from error

    def load(self) -> ArraySplit:
        """The same split in memory, decoded by threads."""
        pieces = np.array_split(np.arange(len(self)), -(-len(self) // _CHUNK) or 1)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return ArraySplit(np.concatenate(list(pool.map(self.images, pieces))), self.labels)


def _divide(labels: Integer[np.ndarray, " images"], fraction: float, seed: int | None):
    """Rows for train and for test: `fraction` of each class's images for the test, the last ones if seed is None."""
    test = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        rows = rows if seed is None else np.random.default_rng([seed, c]).permutation(rows)
        test[rows[len(rows) - round(fraction * len(rows)) :]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def _drawn(labels: Integer[np.ndarray, " images"], rows: Integer[np.ndarray, " n"], images: int, seed: int | None):
    """`images` of the rows of each class, drawn by the seed (0 for None), in their order; all where there are fewer."""
    of_class = [rows[labels[rows] == c] for c in np.unique(labels[rows])]
    chosen = [np.random.default_rng([seed or 0, int(labels[r[0]])]).permutation(r)[:images] for r in of_class]
    return np.sort(np.concatenate(chosen))


def _named(builder, name: str, label: str, by: str | None, numbered: bool) -> dict[str, list[str]]:
    """The names of the values of all label features, once the set is seen to have those that are wanted."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features)
    named = {key: feature.names for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)}
    if label not in named or not isinstance(features.get("image"), tfds.features.Image):
        there = ", ".join(sorted(features))
        raise ValueError(f"{name} needs a feature `image` and class labels {label!r}, and has {there}")
    if by is not None and (by not in named or by == label):
        others = ", ".join(sorted(set(named) - {label})) or "none"
        raise ValueError(f"{name} can't be divided into tasks by {by!r}; its other label features are: {others}")
    for feature in [] if numbered else filter(None, (label, by)):
        file = builder.data_path / f"{feature}.labels.txt"
        if file.exists() and len(set(named[feature])) < len(named[feature]):
            raise ValueError(f"{file} has a name twice: it is of another version, or was changed; copy the set again")
        if not file.exists():
            raise FileNotFoundError(
                f"{builder.data_path} lacks {feature}.labels.txt, the names of its {len(named[feature])} classes: copy "
                "it from where the set was prepared, or take their numbers with numbered=True"
            )
    return named


def tfds_stream(
    name: str,
    data_dir: str | Path,
    *,
    size: int,
    tasks: int | None = 10,
    by: str | None = None,
    seed: int | None = 0,
    train_split: str | None = None,
    test_split: str | None = None,
    test_fraction: float = 0.25,
    label: str = "label",
    invert: bool | None = None,
    crop: float | None = None,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    augment: Augmentation | Literal["default"] | None = "default",
    images: int | None = None,
    overlap: bool = False,
    numbered: bool | None = None,
    memory: int = 2 * 2**30,
) -> TaskStream:
    """A stream from the TFDS image classification set `name`, prepared in `data_dir` as array_record files.

    Args:
      size: side of the images, in pixels: the central square of each is resized to it (antialiased).
      tasks: number of tasks. With `by`, that many of the feature's values are drawn from `seed`; None takes them all.
      by: None for equal groups of classes; else a label feature, each of whose values is a task.
      seed: of the class order, or of which values of `by` and in what order, and of `test_fraction`; None keeps the
        set's own order.
      train_split, test_split: in TFDS's syntax (`"train+validation"`, `"train[:10%]"`). Default: train and test, but
        Omniglot's train and ImageNet-R's test alone.
      test_fraction: share of each class's images that is held out for the test where `train_split` is given alone.
      invert: swap black and white. Default: for Omniglot alone, so that its strokes are white.
      crop: fraction of a test image's shorter side that is kept. Default: 0.875 where the images' sizes differ
        (photographs: resize to 256 and crop 224), else 1; train images are always kept whole.
      augment: default: random resized crop and flip; for characters a small affine map.
      images: training images of a class, drawn by the seed; None for all, as where a class has fewer.
      overlap: lets an image be in both splits.
      numbered: lets classes without names (the file LABEL.labels.txt) have their numbers for names. Default: for MNIST
        and other digits and characters, which their makers store so.
      memory: bytes up to which the decoded images are held in memory; beyond it they are decoded when asked for.

    Raises FileNotFoundError or ValueError with the file, the split and the place for what is missing or damaged.
    """
    _require_options(size, images, seed, test_fraction, augment)
    builder = open_builder(name, data_dir)
    base, of_set = base_name(name), data_set(name)
    named = _named(builder, name, label, by, of_set.numbered if numbered is None else numbered)

    if train_split is None:
        train_split, default_test = of_set.splits
        test_split = test_split or default_test
    wanted = [label] if by is None else [label, by]
    counts = {feature: len(named[feature]) for feature in wanted}
    sources = tuple(Records(builder, split) for split in (train_split, test_split) if split)
    if test_split and not overlap:
        _require_apart(builder, train_split, test_split, len(sources[1]))
    values = tuple(source.integers(counts) for source in sources)
    if test_split:
        rows = [np.arange(len(v[0])) for v in values]
    else:
        sources, values, rows = sources * 2, values * 2, _divide(values[0][0], test_fraction, seed)
    if images is not None:
        rows = (_drawn(values[0][0], rows[0], images, seed), rows[1])
    every = np.concatenate(values, axis=1)
    names, groups = _groups(every, named[label], by and named[by], tasks, seed, base)

    decodings = _decodings(builder, of_set, size, crop, of_set.inverted if invert is None else invert)

    def part(kind: int, group: list[int]) -> Split:
        chosen = rows[kind][np.isin(values[kind][0][rows[kind]], group)]
        labels = relabel(values[kind][0][chosen], group)
        return SourceSplit(sources[kind], chosen, labels, decodings[kind])

    made = [
        Task(task, tuple(named[label][c] for c in group), part(0, group), part(1, group))
        for task, group in zip(names, groups, strict=True)
    ]
    if augment == "default":
        augment = augmentation.random_affine if of_set.characters else _crop_and_flip(size)
    return _in_memory(checked(TaskStream(base, tuple(made), size, mean, std, augment)), memory)


def _require_options(size, images, seed, test_fraction, augment) -> None:
    for what, value, least in (("size", size, 1), ("images", images, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise ValueError(f"{what} is {value} and must be {least} or more")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction} is a part of each class's images, between 0 and 1")
    if not (augment is None or augment == "default" or callable(augment)):
        raise ValueError(f"augment={augment!r} is no augmentation: give None, 'default' or a function (key, images)")


def _require_apart(builder, train_split: str, test_split: str, images: int) -> None:
    if shared := records.overlap(builder, train_split, test_split):
        raise ValueError(
            f"{shared} of {images} test images of {builder.name} are training images too, for its splits "
            f"{train_split!r} and {test_split!r} overlap: a test would tell nothing; name others, or pass overlap=True"
        )


def _decodings(builder, of_set, size: int, crop: float | None, invert: bool) -> list[Decoding]:
    """Of the training images and of the test images."""
    photographs = None in builder.info.features["image"].shape
    crops = (1.0, (0.875 if photographs else 1.0) if crop is None else crop)
    return [Decoding(size, kept, invert, "BOX" if of_set.characters else "BICUBIC") for kept in crops]


def _crop_and_flip(size: int) -> Augmentation:
    return augmentation.chain(partial(augmentation.random_resized_crop, size=size), augmentation.random_flip)


def _in_memory(stream: TaskStream, memory: int) -> TaskStream:
    """The stream with its images decoded, where they fit into so many bytes."""
    count = sum(len(task.train) + len(task.test) for task in stream.tasks)
    if count * stream.size**2 * 3 > memory:
        return stream
    loaded = [task._replace(train=task.train.load(), test=task.test.load()) for task in stream.tasks]
    return stream._replace(tasks=tuple(loaded))


def _groups(every, names, values, tasks, seed, base):
    """Names and classes (in order) of the tasks; `every` holds the labels and, with `values`, the dividing feature."""
    present = np.unique(every[0])  # Omniglot's classes are spread over its splits
    if values is None:
        if tasks is None:
            raise ValueError(f"the number of tasks is needed to divide {base} by class order; or divide it with `by`")
        groups = [[int(present[i]) for i in group] for group in group_classes(len(present), tasks, seed)]
        return [f"{base}-{i}" for i in range(len(groups))], groups
    pairs = np.unique(every, axis=1)
    if pairs.shape[1] > len(present):
        torn = pairs[0][np.flatnonzero(np.diff(pairs[0]) == 0)[0]]
        raise ValueError(f"class {names[torn]!r} of {base} would be in several tasks: divide by a coarser feature")
    found = np.unique(pairs[1])
    if tasks is not None and not 1 <= tasks <= len(found):
        raise ValueError(f"{tasks} tasks were asked for and {base} divides into {len(found)}: ask for fewer, or None")
    order = found if seed is None else np.random.default_rng(seed).permutation(found)
    chosen = order[:tasks]
    return [values[v] for v in chosen], [pairs[0][pairs[1] == v].tolist() for v in chosen]
