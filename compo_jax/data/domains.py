"""Domains of one set of classes that differ by how their images are corrupted; some of them are held out as targets."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from compo_jax.data.corruptions import corrupt
from compo_jax.data.stream import ArraySplit, Task, TaskStream, checked, pooled

HELD_OUT = (
    "contrast+gaussian_noise", "invert+motion_blur", "elastic+impulse_noise", "fog+pixelate",
    "fog-5", "gaussian_noise-5", "gaussian_blur-5",
)  # fmt: skip
_SOURCES = (
    "clean", "gaussian_noise", "impulse_noise", "gaussian_blur", "motion_blur", "elastic", "contrast", "brightness",
    "fog", "invert", "pixelate",
)  # fmt: skip
_OF_GREY, _OF_COLOUR = ("shot_noise", "jpeg"), ("hue", "saturate")
DOMAINS = len(_SOURCES) + 2 + len(HELD_OUT)
_TESTED = 2000  # images that a domain is tested on, at most


def corrupted_domains(
    stream: TaskStream,
    *,
    seed: int = 0,
    images: int | None = None,
    sources: Sequence[str] | None = None,
    held_out: Sequence[str] = HELD_OUT,
) -> TaskStream:
    """All classes of the stream in several domains, each of which has other training images and the same test images.

    A domain's name says what is done to its images: `clean`, `fog` (of severity 3), `fog-5`, `contrast+gaussian_noise`
    (one after the other). The images are corrupted once, here. Of what is random, nothing in a test image is that of a
    training image.

    Args:
      images: training images of a class in a domain, drawn by the seed; None for all, divided equally.
      sources: domains that are learned from; default: clean and twelve corruptions, two of which are `hue` and
        `saturate`, or for grey images `shot_noise` and `jpeg`.
      held_out: domains that are only adapted to.

    The test images are the same part of each class, drawn by the seed, 2000 at most. ValueError for names that
    are none, and where a class has fewer training images than there are domains.
    """
    whole = pooled(stream)
    if sources is None:
        some = whole.train.images(np.arange(min(32, len(whole.train))))
        sources = (*_SOURCES, *(_OF_GREY if (some == some[..., :1]).all() else _OF_COLOUR))
    names = (*sources, *held_out)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"domains are named twice: {', '.join(twice)}")
    train = _dealt(whole.train.labels, len(names), images, [seed, 0])
    test = _dealt(whole.test.labels, 1, max(1, _TESTED // len(whole.classes)), [seed, 1])[0]
    fewest = np.bincount(whole.train.labels, minlength=len(whole.classes))
    if fewest.min() < len(names):
        raise ValueError(
            f"class {whole.classes[fewest.argmin()]} of {stream.name} has {fewest.min()} training images, and each of "
            f"{len(names)} domains needs another one: name fewer domains, or a coarser label"
        )
    tested = whole.test.images(test)
    domains = [
        Task(
            name,
            whole.classes,
            ArraySplit(_made(name, whole.train.images(rows), [seed, 0], rows), whole.train.labels[rows]),
            ArraySplit(_made(name, tested, [seed, 1], test), whole.test.labels[test]),
        )
        for name, rows in zip(names, train, strict=True)
    ]
    return checked(stream._replace(tasks=tuple(domains), held_out=tuple(held_out)))


def _dealt(labels: Int[np.ndarray, " images"], parts: int, images: int | None, seed: list[int]) -> list[np.ndarray]:
    """Rows of each part: of each class they are dealt out in an order drawn by the seed, `images` at most to a part."""
    shuffled = [
        np.random.default_rng([*seed, int(c)]).permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)
    ]
    return [np.sort(np.concatenate([rows[part::parts][:images] for rows in shuffled])) for part in range(parts)]


def _made(domain: str, images: UInt8[np.ndarray, "n size size 3"], seed: list[int], rows: Int[np.ndarray, " n"]):
    """The images in this domain."""
    names, _, severity = domain.partition("-")
    if severity and not severity.isdecimal():
        raise ValueError(f"domain {domain!r} has no severity behind its dash: call it {names}-5, say")
    return images if domain == "clean" else corrupt(images, names, int(severity or 3), seed, rows)
