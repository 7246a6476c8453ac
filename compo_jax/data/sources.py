"""Task streams from TensorFlow Datasets' image classification sets, read without TensorFlow and never downloaded.

A set is divided into tasks by class order or by one of its label features (the alphabets of Omniglot, the coarse labels
of CIFAR-100). Only files that are already prepared are opened, since a missing set would send TFDS to the network.
"""

from pathlib import Path
from typing import Any

import numpy as np

from compo_jax.data import records
from compo_jax.data.reading import CROP, Augment, Look, Part, divide, read_stream, require_options, some
from compo_jax.data.records import Records, open_builder
from compo_jax.data.sets import base_name, data_set
from compo_jax.data.stream import TaskStream, group_classes


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
    class_order: int | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    test_fraction: float = 0.25,
    label: str = "label",
    invert: bool | None = None,
    crop: float | None = None,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    augment: Augment = "default",
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
      class_order: seed of the field's class order, `np.random.seed(1993); np.random.permutation(classes)`, instead of
        that drawn from `seed`.
      train_split, test_split: in TFDS's syntax (`"train+validation"`, `"train[:10%]"`). Default: train and test, but
        Omniglot's train and ImageNet-R's test alone.
      test_fraction: share of each class's images that is held out for the test where `train_split` is given alone.
      invert: swap black and white. Default: for Omniglot alone, so that its strokes are white.
      crop: fraction of a test image's shorter side that is kept. Default: 0.875 where the images' sizes differ
        (photographs: resize to 256 and crop 224), else 1; train images are always kept whole.
      augment: "default": random resized crop and flip of the resized squares, on the device; for characters a small
        affine map. "original": crops and flips are drawn from the stored images while these are read, the whole width
        and in full resolution, as the papers do (`reading.RandomCrop`); then training images are never held in memory,
        and are seen as the test's where they aren't augmented.
      images: training images of a class, drawn by the seed; None for all, as where a class has fewer.
      overlap: lets an image be in both splits.
      numbered: lets classes without names (the file LABEL.labels.txt) have their numbers for names. Default: for MNIST
        and other digits and characters, which their makers store so.
      memory: bytes up to which the decoded images are held in memory; beyond it they are decoded when asked for.

    Raises FileNotFoundError or ValueError with the file, the split and the place for what is missing or damaged.
    """
    require_options(size, images, seed, test_fraction, augment, crop)
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
        sources, values, rows = sources * 2, values * 2, divide(values[0][0], test_fraction, seed)
    every = np.concatenate(values, axis=1)
    names, groups = _groups(every, named[label], by and named[by], tasks, seed, class_order, base)
    train, test = (Part(s, v[0], r) for s, v, r in zip(sources, values, rows, strict=True))
    if crop is None:
        features: Any = builder.info.features
        crop = CROP if None in features["image"].shape else 1.0
    look = Look(
        size, crop, of_set.characters, of_set.inverted if invert is None else invert, mean, std, augment, memory
    )
    return read_stream(base, names, groups, named[label], some(train, images, seed), test, look)


def _require_apart(builder, train_split: str, test_split: str, images: int) -> None:
    if shared := records.overlap(builder, train_split, test_split):
        raise ValueError(
            f"{shared} of {images} test images of {builder.name} are training images too, for its splits "
            f"{train_split!r} and {test_split!r} overlap: a test would tell nothing; name others, or pass overlap=True"
        )


def _groups(every, names, values, tasks, seed, class_order, base):
    """Names and classes (in order) of the tasks; `every` holds the labels and, with `values`, the dividing feature."""
    present = np.unique(every[0])  # Omniglot's classes are spread over its splits
    if values is None:
        if tasks is None:
            raise ValueError(f"the number of tasks is needed to divide {base} by class order; or divide it with `by`")
        groups = [[int(present[i]) for i in group] for group in group_classes(len(present), tasks, seed, class_order)]
        return [f"{base}-{i}" for i in range(len(groups))], groups
    if class_order is not None:
        raise ValueError(f"class_order={class_order} plays no part where {base} is divided by a feature: leave it out")
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
