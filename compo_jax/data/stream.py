"""A stream of classification tasks: disjoint classes, a train and a test split each, images addressed by index."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Integer, Key, UInt8

from compo_jax.data import glyphs
from compo_jax.data.splits import ArraySplit, JoinedSplit, Split, SubsetSplit, whole

Images = Float[Array, "batch height width channels"]
Augmentation = Callable[[Key[Array, ""], Images], Images]


class Task(NamedTuple):
    """Some classes and their images; label i of the splits is `classes[i]`."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split


class TaskStream(NamedTuple):
    """Tasks in order, with what turns their images into a model's input.

    Attributes:
      size: side of the images, in pixels.
      mean, std: of each channel, for pixel values scaled to [0, 1].
      augment: function (key, prepared images) -> images for training, or None.
      held_out: of domains the names of those that are only adapted to, never learned from.
    """

    name: str
    tasks: tuple[Task, ...]
    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    augment: Augmentation | None = None
    held_out: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of all tasks' classes, in order: entry i is global class i."""
        return tuple(itertools.chain.from_iterable(task.classes for task in self.tasks))

    @property
    def offsets(self) -> tuple[int, ...]:
        """The global index of each task's first class."""
        return tuple(itertools.accumulate((len(task.classes) for task in self.tasks[:-1]), initial=0))

    def sources(self, target: str) -> tuple[Task, ...]:
        """The domains that are learned before `target` is adapted to: all others that aren't held out."""
        return tuple(task for task in self.tasks if task.name not in (target, *self.held_out))

    def prepare(self, images: UInt8[Array | np.ndarray, "batch size size 3"]) -> Float[Array, "batch size size 3"]:
        """`(images / 255 - mean) / std` in float32. Pure; call it inside jit, so that bytes travel to the device."""
        mean, std = (jnp.array(x, jnp.float32).reshape(1, 1, 1, 3) for x in (self.mean, self.std))
        return (jnp.asarray(images, jnp.float32) / 255 - mean) / std


def group_classes(
    classes: int, tasks: int | Iterable[Iterable[int]], seed: int | None, class_order: int | None = None
) -> list[list[int]]:
    """Divides classes 0 .. `classes` - 1 into `tasks` groups as equal as possible, in an order drawn from the seed, or
    from `class_order` by NumPy's older generator, as the field does with 1993.

    With seed None the order is kept. Groups that are given are checked and used as they are, and then the seed plays
    no part; classes in none of them are left out.
    """
    if isinstance(tasks, Iterable):
        groups = [[int(c) for c in group] for group in tasks]
        named = [c for group in groups for c in group]
        if not named or len(set(named)) < len(named) or not all(0 <= c < classes for c in named):
            raise ValueError(f"the tasks must name classes 0 to {classes - 1}, each at most once, and are {groups}")
        return groups
    if not 1 <= tasks <= classes:
        raise ValueError(f"{tasks} tasks were asked for and there are {classes} classes; ask for 1 to {classes // 2}")
    if seed is not None and seed < 0:
        raise ValueError(f"a seed is 0 or more, not {seed}")
    if class_order is not None:
        order = np.random.RandomState(class_order).permutation(classes)
    else:
        order = np.arange(classes) if seed is None else np.random.default_rng(seed).permutation(classes)
    return [group.tolist() for group in np.array_split(order, tasks)]


def checked(stream: TaskStream) -> TaskStream:
    """The stream, once it is seen that its images can be prepared and that every task has two classes or more, each
    with a name of its own and with train and test images, and that no two tasks have one name."""
    if stream.size < 1:
        raise ValueError(f"images of {stream.name} have {stream.size} pixels a side and need one at least")
    mean, std = np.asarray(stream.mean, float), np.asarray(stream.std, float)
    if (
        mean.shape != (3,)
        or std.shape != (3,)
        or not np.isfinite(mean).all()
        or not (std > 0).all()
        or np.isinf(std).any()
    ):
        raise ValueError(
            f"mean={stream.mean} and std={stream.std} of {stream.name}: each is three finite numbers, one a channel, "
            "for pixels from 0 to 1, and images are divided by std, which must be above 0"
        )
    if not (stream.augment is None or callable(stream.augment)):
        raise ValueError(f"augment={stream.augment!r} is no augmentation: give None or a function (key, images)")
    called = [task.name for task in stream.tasks]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise ValueError(
            f"two tasks of {stream.name} are called {', '.join(twice[:8])}: name each once, or rename them"
        )
    for task in stream.tasks:
        if len(task.classes) < 2:
            raise ValueError(f"task {task.name!r} has {len(task.classes)} class and needs two: ask for fewer tasks")
        if twice := sorted({name for name in task.classes if task.classes.count(name) > 1}):
            raise ValueError(f"task {task.name!r} has classes of one name: {', '.join(twice[:8])}; join or rename them")
        for kind, split in (("train", task.train), ("test", task.test)):
            if len(wrong := np.flatnonzero((split.labels < 0) | (split.labels >= len(task.classes)))):
                raise ValueError(
                    f"task {task.name!r} has {len(task.classes)} classes and {kind} image {wrong[0]} the label "
                    f"{split.labels[wrong[0]]}: labels of a task go from 0 to {len(task.classes) - 1}"
                )
            counts = np.bincount(split.labels, minlength=len(task.classes))
            empty = [name for name, count in zip(task.classes, counts, strict=True) if not count]
            if empty:
                raise ValueError(
                    f"task {task.name!r} has classes with no {kind} images: {', '.join(empty[:8])}"
                    f"{' ...' if empty[8:] else ''}; leave them out, or divide the images into train and test otherwise"
                )
    return stream


def _pixels(images: np.ndarray) -> UInt8[np.ndarray, "images size size 3"]:
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] in (1, 3)
    if images.dtype != np.uint8 or not square:
        raise ValueError(
            f"images must be uint8 of shape (images, size, size), or with 1 or 3 channels after it, and these are "
            f"{images.dtype} of shape {images.shape}: scale values to 0..255, make them square, put the channels last"
        )
    return np.repeat(images, 3, axis=-1) if images.shape[3] == 1 else images


def array_stream(
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    tasks: int | Sequence[Sequence[int]],
    class_names: Sequence[str] | None = None,
    seed: int | None = None,
    name: str = "arrays",
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    augment: Augmentation | None = None,
    overlap: bool = False,
) -> TaskStream:
    """A stream of uint8 images in memory: (images, size, size), or with 1 or 3 channels after it; integer labels.

    `tasks` is a number of equal groups of the classes (in an order drawn from `seed`; kept if None) or the groups;
    `overlap` lets an image be in both splits.
    """
    same = np.shares_memory(images, test_images) or np.array_equal(images, test_images)
    images, test_images = _pixels(images), _pixels(test_images)
    if images.shape[1:] != test_images.shape[1:]:
        raise ValueError(f"train images are {images.shape[1:]}, test images {test_images.shape[1:]}: resize one")
    labels, test_labels = whole(labels), whole(test_labels)
    if same and not overlap:
        raise ValueError(
            "train and test images are the same: a test would tell nothing; divide them, or pass overlap=True"
        )
    if (len(labels), len(test_labels)) != (len(images), len(test_images)):
        raise ValueError(
            f"{len(images)} train and {len(test_images)} test images need as many labels, not {len(labels)} and "
            f"{len(test_labels)}"
        )
    every = np.concatenate([labels, test_labels])
    count = len(class_names) if class_names is not None else int(every.max(initial=0)) + 1
    if every.min(initial=0) < 0 or every.max(initial=0) >= count:
        raise ValueError(
            f"labels run from {every.min()} to {every.max()} and must lie in 0 to {count - 1}: number them from 0"
        )
    names = class_names if class_names is not None else [str(c) for c in range(count)]

    def part(pixels, labels, group):
        rows = np.flatnonzero(np.isin(labels, group))
        return ArraySplit(pixels[rows], relabel(labels[rows], group))

    made = [
        Task(
            f"{name}-{i}",
            tuple(names[c] for c in group),
            part(images, labels, group),
            part(test_images, test_labels, group),
        )
        for i, group in enumerate(group_classes(count, tasks, seed))
    ]
    return checked(TaskStream(name, tuple(made), images.shape[1], mean, std, augment))


def relabel(labels: Integer[np.ndarray, " images"], group: Sequence[int]) -> Int32[np.ndarray, " images"]:
    """The position of each label in `group`, which has them all."""
    order = np.argsort(group)
    return order[np.searchsorted(np.asarray(group)[order], labels)].astype(np.int32)


def glyph_stream(
    scripts: Iterable[str] | None = None,
    *,
    classes: int | None = 16,
    train: int = 200,
    test: int = 50,
    size: int = 32,
    seed: int = 0,
    distortion: glyphs.Distortion = glyphs.Distortion(),
) -> TaskStream:
    """One task per script: `train` and `test` images of each of its first `classes` characters (None: all of them).

    The default is the first ten of `glyphs.TASKS`. Images follow from the seed and the script alone, whichever other
    scripts are asked for, and no test image shares a key with a train image.
    """
    scripts = list(glyphs.TASKS)[:10] if scripts is None else list(scripts)
    if len(set(scripts)) < len(scripts):
        raise ValueError(f"a script is named twice: {', '.join(scripts)}")
    if size < 1 or (classes is not None and classes < 1):
        raise ValueError(f"{classes} classes of {size} pixels a side: both must be at least 1")
    unknown = [s for s in scripts if s not in glyphs.SCRIPTS]
    if unknown or not scripts:
        raise ValueError(f"no script is called {', '.join(unknown) or 'that'}; there are {', '.join(glyphs.SCRIPTS)}")
    if min(train, test) < 1:
        raise ValueError(f"{train} train and {test} test images of each character: both must be at least 1")
    made = []
    for script in scripts:
        characters = glyphs.SCRIPTS[script]
        if classes is not None and classes > len(characters):
            raise ValueError(f"{classes} classes were asked for and {script} has only {len(characters)} characters")
        key = jax.random.fold_in(jax.random.key(seed), list(glyphs.SCRIPTS).index(script))
        made.append(glyph_task(key, script, characters[:classes], train, test, size, distortion))
    return checked(TaskStream("glyphs", tuple(made), size))


def glyph_task(
    key: Key[Array, ""],
    name: str,
    characters: str,
    train: int,
    test: int,
    size: int = 32,
    distortion: glyphs.Distortion = glyphs.Distortion(),
) -> Task:
    """`train` and `test` rendered images of each of these characters."""
    shapes = glyphs.masters(characters)
    splits = []
    for part, count in zip(jax.random.split(key), (train, test), strict=True):
        labels = np.tile(np.arange(len(characters)), count)
        splits.append(ArraySplit(glyphs.images(part, shapes, labels, size, distortion), labels))
    return Task(name, tuple(characters), *splits)


def pooled(stream: TaskStream) -> Task:
    """All tasks as one, for joint training: labels become global classes. Reads nothing until images are asked for."""
    train, test = (JoinedSplit([getattr(t, kind) for t in stream.tasks], stream.offsets) for kind in ("train", "test"))
    return Task(stream.name, stream.classes, train, test)


def validation(stream: TaskStream, part: float, *, seed: int = 0) -> TaskStream:
    """The stream whose test images are a part of its training images, of each class, and are trained on no more: what
    settings are chosen by, so that the true test images stay unseen.

    Drawn by the seed. Of a class with two images or more at least one is on either side. ValueError for a part that
    isn't between 0 and 1, and for a class of one image.
    """
    if not 0 < part < 1:
        raise ValueError(f"a validation part of {part} of the training images: it lies between 0 and 1")

    def divided(index: int, task: Task) -> Task:
        labels, held = task.train.labels, np.zeros(len(task.train), bool)
        for c in np.unique(labels):
            rows = np.random.default_rng([seed, index, int(c)]).permutation(np.flatnonzero(labels == c))
            if len(rows) < 2:
                raise ValueError(
                    f"class {task.classes[c]!r} of {task.name!r} has one training image, and none to spare"
                )
            held[rows[: int(np.clip(round(part * len(rows)), 1, len(rows) - 1))]] = True
        train, test = (SubsetSplit(task.train, np.flatnonzero(held == kept)) for kept in (False, True))
        return task._replace(train=train, test=test)

    return stream._replace(tasks=tuple(divided(i, task) for i, task in enumerate(stream.tasks)))
