"""Images that are read from files and decoded when they are asked for, and tasks made of them."""

import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Integer, UInt8

from compo_jax.data import augment as augmentation
from compo_jax.data.splits import ArraySplit, Keys, Split
from compo_jax.data.stream import Augmentation, Task, TaskStream, checked, relabel

_CHUNK = 512  # images decoded at a time
CROP = 0.875  # of photographs: resize to 256 and keep 224
Augment = Augmentation | Literal["default", "original"] | None


@runtime_checkable
class Stored(Protocol):
    """Where the images of one part of a set are: their files' bytes, and what errors call each."""

    advice: str

    def __len__(self) -> int: ...

    def read(self, rows: Sequence[int]) -> list[bytes]: ...

    def place(self, row: int) -> str: ...


def _opened(stored: bytes):
    """The image upright and in RGB; 16 bits a channel become 8, and transparency is dropped."""
    from PIL import Image, ImageOps

    image = Image.open(io.BytesIO(stored))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # which Pillow would cut at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of no certain range: convert it to 8 or 16 bits a channel")
    if "transparency" in image.info:  # Pillow warns of palettes with it
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


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

        image = _opened(stored)
        side = self.crop * min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        method = Image.Resampling[self.reduce if side > self.size else "BICUBIC"]
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.resize((self.size, self.size), method, box))
        return 255 - pixels if self.invert else pixels


class RandomCrop(NamedTuple):
    """A random part of the whole stored image, resized to `size` (bicubic), mirrored with probability 1/2.

    The law is torchvision's `RandomResizedCrop` (Szegedy et al., 2015): a part whose share of the area is uniform in
    `scale` and the logarithm of whose width over height is uniform in that of `ratio`, drawn again up to ten times
    where it is larger than the image; then the largest central part whose ratio lies in the bounds.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, stored: bytes, generator: np.random.Generator) -> UInt8[np.ndarray, "size size 3"]:
        from PIL import Image

        image = _opened(stored)
        part = image.crop(self.box(*image.size, generator)).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.asarray(part)[:, :: -1 if generator.random() < 0.5 else 1]

    def box(self, width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the part, in whole pixels."""
        for _ in range(10):
            area = width * height * generator.uniform(self.scale[0], self.scale[1])
            aspect = math.exp(generator.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = generator.integers(width - w + 1), generator.integers(height - h + 1)
                return int(left), int(top), int(left) + w, int(top) + h
        w, h = min(width, round(height * self.ratio[1])), min(height, round(width / self.ratio[0]))
        return (width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h


class SourceSplit:
    """A split that reads and decodes the asked images; `rows` are their places in `source`.

    ValueError for one that can't be, with its place.

    Args:
      draw: how a training image is drawn from what is stored, by `images(indices, keys)`; None: as it is decoded.
    """

    def __init__(
        self, source: Stored, rows: Integer[np.ndarray, " images"], labels, decoding: Decoding,
        draw: RandomCrop | None = None,
    ):  # fmt: skip
        self.source, self.rows, self.decoding, self.draw = source, rows, decoding, draw
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def draws(self) -> bool:
        """Whether an image may be drawn from at random while it is read."""
        return self.draw is not None

    def images(self, indices: Int[np.ndarray, " n"], keys: Keys | None = None) -> UInt8[np.ndarray, "n size size 3"]:
        """The decoded images or, with a key of whole numbers for each, what is drawn from them by it."""
        rows = self.rows[indices].tolist()
        pixels = [
            self._decoded(row, stored, None if keys is None else keys[i])
            for i, (row, stored) in enumerate(zip(rows, self.source.read(rows), strict=True))
        ]
        return np.array(pixels, np.uint8).reshape(-1, self.decoding.size, self.decoding.size, 3)

    def _decoded(self, row: int, stored: bytes, key: Sequence[int] | None) -> UInt8[np.ndarray, "size size 3"]:
        try:
            if key is None or self.draw is None:
                return self.decoding(stored)
            return self.draw(stored, np.random.default_rng(key))
        except Exception as error:  # Pillow raises a dozen types, SyntaxError among them
            raise ValueError(
                f"{self.source.place(row)} can't be decoded ({error}): its {len(stored)} bytes are damaged or of a "
                f"format that Pillow lacks; {self.source.advice}"
            ) from error

    def load(self) -> ArraySplit:
        """The same split in memory, decoded by threads."""
        pieces = np.array_split(np.arange(len(self)), -(-len(self) // _CHUNK) or 1)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return ArraySplit(np.concatenate(list(pool.map(self.images, pieces))), self.labels)


# -- tasks -----------------------------------------------------------------------------------------------------------
class Part(NamedTuple):
    """What is trained on, or tested on: the stored images, the class number of each, and the rows that are taken."""

    source: Stored
    labels: Integer[np.ndarray, " images"]
    rows: Integer[np.ndarray, " taken"]


class Look(NamedTuple):
    """How images look, and what is made of them in training.

    Attributes:
      size: side, in pixels.
      crop: fraction of a test image's shorter side that is kept.
      characters: whether a mirror image is another class.
      invert: swap black and white.
      mean, std: see `TaskStream`.
      augment: see `tfds_stream`.
      memory: bytes up to which the decoded images are held in memory.
    """

    size: int
    crop: float
    characters: bool
    invert: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augment: Augment
    memory: int


def require_options(size, images, seed, test_fraction, augment, crop=None) -> None:
    """ValueError for what no stream can be made with."""
    for what, value, least in (("size", size, 1), ("images", images, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise ValueError(f"{what} is {value} and must be {least} or more")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction} is a part of each class's images, between 0 and 1")
    if crop is not None and not 0 < crop <= 1:
        raise ValueError(f"crop={crop} is a fraction of an image's shorter side, above 0 and at most 1")
    if not (augment in (None, "default", "original") or callable(augment)):
        raise ValueError(
            f"augment={augment!r} is no augmentation: give None, 'default', 'original' or a function (key, images)"
        )


def divide(labels: Integer[np.ndarray, " images"], fraction: float, seed: int | None):
    """Rows for train and for test: `fraction` of each class's images for the test, the last ones if seed is None."""
    test = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        rows = rows if seed is None else np.random.default_rng([seed, c]).permutation(rows)
        test[rows[len(rows) - round(fraction * len(rows)) :]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def some(part: Part, images: int | None, seed: int | None) -> Part:
    """`images` of each class, drawn by the seed (0 for None), in order; all where there are fewer, or for None."""
    if images is None:
        return part
    labels = part.labels[part.rows]
    of_class = [(int(c), part.rows[labels == c]) for c in np.unique(labels)]
    chosen = [np.random.default_rng([seed or 0, c]).permutation(rows)[:images] for c, rows in of_class]
    return part._replace(rows=np.sort(np.concatenate(chosen)))


def read_stream(
    name: str, tasks: Sequence[str], groups: Sequence[Sequence[int]], classes: Sequence[str], train: Part, test: Part,
    look: Look,
) -> TaskStream:  # fmt: skip
    """The stream of these tasks, each with the classes (their numbers) of its group; decoded where memory allows."""
    original, reduce = look.augment == "original", "BOX" if look.characters else "BICUBIC"
    if original and (look.characters or look.invert):
        raise ValueError(
            f"{name} is of characters, which are neither cropped nor mirrored: leave augment='original' out"
        )
    tested = Decoding(look.size, look.crop, look.invert, reduce)
    trained = tested if original else tested._replace(crop=1.0)

    def split(part: Part, group: Sequence[int], *how) -> Split:
        chosen = part.rows[np.isin(part.labels[part.rows], group)]
        return SourceSplit(part.source, chosen, relabel(part.labels[chosen], group), *how)

    draw = RandomCrop(look.size) if original else None
    made = [
        Task(task, tuple(classes[c] for c in group), split(train, group, trained, draw), split(test, group, tested))
        for task, group in zip(tasks, groups, strict=True)
    ]
    if look.augment == "default":
        augment = augmentation.random_affine if look.characters else _crop_and_flip(look.size)
    else:
        augment = None if look.augment == "original" else look.augment
    return _in_memory(checked(TaskStream(name, tuple(made), look.size, look.mean, look.std, augment)), look.memory)


def _crop_and_flip(size: int) -> Augmentation:
    return augmentation.chain(partial(augmentation.random_resized_crop, size=size), augmentation.random_flip)


def _in_memory(stream: TaskStream, memory: int) -> TaskStream:
    """The stream with its images decoded, but those that are drawn from, where they fit into so many bytes."""
    kinds = [kind for kind in ("train", "test") if not getattr(stream.tasks[0], kind).draws]
    count = sum(len(getattr(task, kind)) for task in stream.tasks for kind in kinds)
    if count * stream.size**2 * 3 > memory:
        return stream
    loaded = [task._replace(**{kind: getattr(task, kind).load() for kind in kinds}) for task in stream.tasks]
    return stream._replace(tasks=tuple(loaded))
