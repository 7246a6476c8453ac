"""Domains of one set of classes that differ by how their images are corrupted; some of them are held out as targets."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int, UInt8

from compo_jax.data.corruptions import corrupt
from compo_jax.data.splits import ArraySplit
from compo_jax.data.stream import Task, TaskStream, checked, pooled

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
    """All classes of the stream in several domains, each with training images of its own and with the same test images.

    A domain's name says what is done to its images: `clean`, `fog` (of severity 3), `fog-5`, `contrast+gaussian_noise`
    (one after the other). Images are corrupted once, here, each by random numbers that no other of the domain has.

    Args:
      images: training images of a class in a domain, drawn by the seed; None for all, in equal parts. The test images
        are drawn by it too, as many of each class and at most 2000 in all.
      sources: domains to learn from; default: clean and twelve corruptions, which are, for grey images, `shot_noise`
        and `jpeg` where those in colour have `hue` and `saturate`.
      held_out: domains that are only adapted to (`held_out` of the stream).

    Raises ValueError for names that are none, and where a class has fewer training images than there are domains.
    """
    whole = pooled(stream)
    if sources is None:
        some = whole.train.images(np.arange(min(32, len(whole.train))))
        sources = (*_SOURCES, *(_OF_GREY if (some == some[..., :1]).all() else _OF_COLOUR))
    names = (*sources, *held_out)
    for name in names:  # says what is wrong with a name, before images are read
        _corrupted(name, np.zeros((0, stream.size, stream.size, 3), np.uint8), [seed], np.arange(0))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"domains are named twice: {', '.join(twice)}")
    if images is not None and images < 1:
        raise ValueError(f"images is {images} and must be 1 or more")
    counts = np.bincount(whole.train.labels, minlength=len(whole.classes))
    if counts.min() < len(names):
        raise ValueError(
            f"class {whole.classes[counts.argmin()]!r} of {stream.name} has {counts.min()} training images, and each "
            f"of {len(names)} domains needs another: name fewer domains, or a label with fewer classes"
        )
    tests = _dealt(whole.test.labels, 1, max(1, _TESTED // len(whole.classes)), [seed, 1])[0]
    tested = whole.test.images(tests)

    def domain(name: str, rows: np.ndarray) -> Task:
        train = ArraySplit(_corrupted(name, whole.train.images(rows), [seed, 0], rows), whole.train.labels[rows])
        test = ArraySplit(_corrupted(name, tested, [seed, 1], tests), whole.test.labels[tests])
        return Task(name, whole.classes, train, test)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        domains = tuple(pool.map(domain, names, _dealt(whole.train.labels, len(names), images, [seed, 0])))
    return checked(stream._replace(tasks=domains, held_out=tuple(held_out)))


def _dealt(labels: Int[np.ndarray, " images"], parts: int, images: int | None, seed: list[int]) -> list[np.ndarray]:
    """Rows of each part: of each class they are dealt out in an order drawn by the seed, `images` at most to a part."""
    shuffled = [
        np.random.default_rng([*seed, int(c)]).permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)
    ]
    return [np.sort(np.concatenate([rows[part::parts][:images] for rows in shuffled])) for part in range(parts)]


def _corrupted(domain: str, images: UInt8[np.ndarray, "n size size 3"], seed: list[int], rows: Int[np.ndarray, " n"]):
    """The images as this domain has them."""
    names, dash, severity = domain.partition("-")
    if dash and not severity.isdecimal():
        raise ValueError(f"domain {domain!r} has no severity behind its dash, as {names}-5 has")
    return images if domain == "clean" else corrupt(images, names, int(severity or 3), seed, rows)
