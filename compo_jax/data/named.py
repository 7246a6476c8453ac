"""Streams, tasks side by side, and domains by their names."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from compo_jax.data import augment, glyphs
from compo_jax.data.domains import DOMAINS, corrupted_domains
from compo_jax.data.folders import folder_parts, folder_stream
from compo_jax.data.records import split_names
from compo_jax.data.sets import SETS, data_set
from compo_jax.data.sources import tfds_stream
from compo_jax.data.stream import TaskStream, checked, glyph_stream, glyph_task

_DIGITS = "0123456789"
_RENDERED = {  # domains that differ in nothing but how their images are made
    "clean": glyphs.Distortion(),
    "scan": glyphs.SCAN,
    "faint": glyphs.Distortion(contrast=(0.35, 0.5), noise=0.3),
    "slanted": glyphs.Distortion(rotation=0.6, shear=0.6, bend=0.05),
}
_CLEAR = glyphs.Distortion(contrast=(0.7, 1.0), noise=0.05)  # what is to be corrupted
_CORRUPTED = "-corrupted"
FOLDER = "folder:"  # before the path of a folder of images


def open_stream(
    name: str,
    size: int,
    *,
    data_dir: str | Path | None = None,
    tasks: int = 10,
    seed: int = 0,
    classes: int = 16,
    images: int | None = None,
    by: str | None = None,
    train_split: str | None = None,
    **options: Any,
) -> TaskStream:
    """The stream called `name`: `glyphs`, scanned characters of one script a task, a prepared TFDS set, or
    `folder:PATH`, images in folders or lists.

    Args:
      data_dir: of a TFDS set; ValueError without it. Of a folder, where its path begins, if it isn't absolute.
      tasks: of glyphs the first scripts.
      classes: characters of a script (glyphs only).
      images: training images of a class, drawn by the seed, all where there are fewer; None for 100 glyphs, or all.
      by, train_split: see `tfds_stream`; default: as the set wants it, Omniglot by its test split's alphabets say.
      options: see `tfds_stream` and `folder_stream`; None for what they say.
    """
    options = {key: value for key, value in options.items() if value is not None or key == "augment"}
    if name == "glyphs":
        return glyph_stream(
            _scripts(tasks),
            classes=classes,
            train=100 if images is None else images,
            test=20,
            size=size,
            seed=seed,
            distortion=glyphs.SCAN,
        )
    kind = data_set(name)
    if kind.few:
        by, train_split = by or kind.by, train_split or kind.by_split
    if by is not None:
        if name.startswith(FOLDER):
            raise ValueError(f"by={by!r} plays no part with {name}, which is divided by class order: leave it out")
        options["by"] = by
    return _reader(name, data_dir, "glyphs")(
        size=size, tasks=tasks, seed=seed, images=images, train_split=train_split, **options
    )


def _scripts(tasks: int | None) -> list[str]:
    """The first scripts of `glyphs`."""
    known = list(glyphs.TASKS)
    if tasks is not None and not 1 <= tasks <= len(known):
        raise ValueError(f"{tasks} tasks were asked for and glyphs has {len(known)} scripts: {', '.join(known)}")
    return known[:tasks]


def _folder(name: str, data_dir: str | Path | None) -> Path:
    """The folder of images that `folder:PATH` names."""
    path = Path(name.removeprefix(FOLDER))
    if path.is_absolute() and data_dir is not None:
        raise ValueError(f"data_dir (--data-dir) plays no part with {name}, which says where it is: leave it out")
    return path if data_dir is None else Path(data_dir) / path


@runtime_checkable
class Reader(Protocol):
    """`tfds_stream` or `folder_stream` of one set, with their options."""

    def __call__(self, **options: Any) -> TaskStream: ...


def _reader(name: str, data_dir: str | Path | None, rendered: str, asked: str = "") -> Reader:
    """Of what is so called; ValueError where a TFDS set has no folder, under the name that was `asked` for."""
    if name.startswith(FOLDER):
        return partial(folder_stream, _folder(name, data_dir))
    if data_dir is None:
        raise ValueError(
            f"{asked or name} needs data_dir (--data-dir): the folder where TFDS has prepared the set; rendered "
            f"without one: {rendered}; folder:PATH reads images in folders"
        )
    return partial(tfds_stream, name, data_dir)


def open_tasks(
    names: Sequence[str],
    size: int,
    *,
    data_dir: str | Path | None = None,
    tasks: int | None = None,
    seed: int | None = 0,
    classes: int | None = 8,
    images: int | None = None,
    train_split: str | None = None,
) -> TaskStream:
    """Tasks of one set or several side by side, at one size: for networks that learn them at once.

    A set with a feature that divides it gives several tasks (CIFAR-100's superclasses, Omniglot's alphabets, the
    scripts of `glyphs`), any other set and a folder of images (`folder:PATH`) one. Pictures are mirrored at random in
    training; characters are not augmented, nor is anything where both are together.

    Args:
      tasks: how many a divided set gives, drawn by the seed, of `glyphs` the first ones; default all.
      classes: characters of a script (glyphs only).
      images: training images of a class, drawn by the seed, all where there are fewer; None for 50 glyphs, or all.
      train_split: of divided sets, in TFDS's syntax (`train+test` has all of Omniglot's 50 alphabets); default: as the
        set wants it.
    """
    streams = []
    if tasks is not None and names and not any(name == "glyphs" or data_set(name).by for name in names):
        raise ValueError(
            f"tasks={tasks} plays no part with {', '.join(names)}, a task each; divided into tasks are glyphs, "
            f"{', '.join(name for name, kind in SETS.items() if kind.by)}"
        )
    divided = [name for name in names if name != "glyphs" and data_set(name).by]
    if train_split is not None and names and not divided:
        raise ValueError(f"train_split={train_split!r} is of sets that are divided into tasks, and none is named")
    for name in names:
        if name == "glyphs":
            found = glyph_stream(
                _scripts(tasks), classes=classes, train=50 if images is None else images, test=20, size=size,
                seed=seed or 0,
            )  # fmt: skip
        else:
            kind = data_set(name)
            flip = None if kind.characters else augment.random_flip
            of_set = {"tasks": tasks, "by": kind.by, "train_split": train_split or kind.by_split}
            options = of_set if kind.by else {"tasks": 1}
            found = _reader(name, data_dir, "glyphs")(
                size=size, seed=seed, augment=flip, crop=1.0, images=images, **options
            )
            if not kind.by:
                found = found._replace(tasks=(found.tasks[0]._replace(name=found.name),))
        streams.append(found)
    if not streams:
        raise ValueError("no data set was named")
    streams = _told_apart(streams, names)
    augmentations = {stream.augment for stream in streams}
    return checked(
        streams[0]._replace(
            name="+".join(stream.name for stream in streams),
            tasks=tuple(task for stream in streams for task in stream.tasks),
            augment=augmentations.pop() if len(augmentations) == 1 else None,
        )
    )


def _told_apart(streams: list[TaskStream], names: Sequence[str]) -> list[TaskStream]:
    """The streams; of those that are called alike, two configurations of a TFDS set or two folders, each task that is a
    whole set is called as it was asked for."""
    called = [stream.name for stream in streams]

    def one(stream, name):
        if called.count(stream.name) == 1 or stream.tasks[0].name != stream.name:
            return stream
        name = name.removeprefix(FOLDER)
        return stream._replace(name=name, tasks=(stream.tasks[0]._replace(name=name),))

    return [one(*each) for each in zip(streams, names, strict=True)]


def open_domains(
    name: str,
    size: int,
    *,
    data_dir: str | Path | None = None,
    seed: int = 0,
    images: int | None = None,
    label: str = "label",
) -> TaskStream:
    """Domains of one set of classes, as tasks whose classes are the same (so that `classes` and `offsets` of the stream
    mean nothing): a split of each domain's images is its test.

    Args:
      name: `rendered`, digits that are rendered in four ways; `digits`: MNIST, USPS and rendered digits; a TFDS set
        whose splits are domains, of each of which a fifth is held out (PACS), or `folder:PATH` with a folder of classes
        for each domain; or `rendered-corrupted`, or a TFDS set or a folder with that ending (`cifar100-corrupted`): one
        set under twelve corruptions, and, only to be adapted to (`held_out` of the stream), under other severities and
        two corruptions at once, see `corrupted_domains`.
      images: training images of a class, drawn by the seed, all where there are fewer; None for all, but 50 where all
        are rendered and 500 for rendered ones beside MNIST's. For the test a fifth as many are rendered.
      label: feature of a TFDS set that gives the classes, such as CIFAR-100's `coarse_label`.
    """

    def rendered(domain, distortion, number, default=50):
        key, train = jax.random.fold_in(jax.random.key(seed), number), default if images is None else images
        return glyph_task(key, domain, _DIGITS, train, max(train // 5, 1), size, distortion)

    if name == "rendered":
        made = [rendered(domain, distortion, i) for i, (domain, distortion) in enumerate(_RENDERED.items())]
        return checked(TaskStream(name, tuple(made), size))
    if name == "rendered" + _CORRUPTED:
        count = DOMAINS * (50 if images is None else images)
        digits = glyph_task(jax.random.key(seed), name, _DIGITS, count, count // 5, size, _CLEAR)
        return corrupted_domains(TaskStream(name, (digits,), size), seed=seed, images=images)
    read = _reader(name.removesuffix(_CORRUPTED), data_dir, "rendered, rendered-corrupted", name)
    in_folder = name.startswith(FOLDER)
    if in_folder and label != "label":
        raise ValueError(f"label={label!r} plays no part with {name}, whose classes are folders: leave it out")
    flip = None if data_set(name.removesuffix(_CORRUPTED)).characters else augment.random_flip
    if name == "digits":
        real = [
            tfds_stream(each, str(data_dir), size=size, tasks=1, seed=None, images=images).tasks[0]._replace(name=each)
            for each in ("mnist", "usps")
        ]
        return _of_one_set(TaskStream(name, (*real, rendered("rendered", glyphs.Distortion(), 0, 500)), size))
    whole = {"size": size, "tasks": 1, "seed": None, "crop": 1.0, "augment": flip} | (
        {} if in_folder else {"label": label}
    )
    if name.endswith(_CORRUPTED):
        stream = read(memory=0, **whole)
        return corrupted_domains(stream, seed=seed, images=images)._replace(name=name)
    domains = [
        read(train_split=split, test_fraction=0.2, images=images, **whole).tasks[0]._replace(name=split)
        for split in (folder_parts(_folder(name, data_dir)) if in_folder else split_names(name, str(data_dir)))
    ]
    return _of_one_set(TaskStream(name, tuple(domains), size, augment=flip))


def _of_one_set(stream: TaskStream) -> TaskStream:
    """The stream, once its domains are seen to be of the same classes."""
    classes = {domain.name: domain.classes for domain in stream.tasks}
    if len(classes) < 2:
        raise ValueError(
            f"{stream.name} has one split and no domains: its splits must be the domains, as those of PACS are; or "
            f"{stream.name}-corrupted makes some of it"
        )
    if len(set(classes.values())) > 1:
        told = "; ".join(f"{name}: {', '.join(found)}" for name, found in classes.items())
        raise ValueError(f"domains are of the same classes, and those of {stream.name} are not ({told})")
    return stream
