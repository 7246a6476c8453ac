"""What is known of data sets by their names, in one table: a set that isn't in it is one of photographs."""

from typing import NamedTuple


class DataSet(NamedTuple):
    """How a TFDS set differs from others.

    Attributes:
      characters: its images are of characters or signs, whose mirror images are others.
      numbered: its makers store no names of its classes.
      inverted: its strokes are black on white, and are turned to white on black.
      splits: what is trained on, and what is tested on; None for a held-out part of the first.
      by: the label feature that divides it into tasks, where it has one.
      by_split: the split that is trained on then, a part of it held out; None for `splits`.
      few: whether a class has so few images that only such a task is one to learn alone.
    """

    characters: bool = False
    numbered: bool = False
    inverted: bool = False
    splits: tuple[str, str | None] = ("train", "test")
    by: str | None = None
    by_split: str | None = None
    few: bool = False


SETS = {
    "mnist": DataSet(characters=True, numbered=True),
    "kmnist": DataSet(characters=True, numbered=True),
    "kmnist28": DataSet(characters=True),
    "emnist": DataSet(characters=True, numbered=True),
    "usps": DataSet(characters=True, numbered=True),
    "svhn": DataSet(characters=True),
    "svhn_cropped": DataSet(characters=True, numbered=True),
    "quickdraw_bitmap": DataSet(characters=True),
    "letters64": DataSet(characters=True),
    "gtsrb": DataSet(characters=True),
    "gtsrb32": DataSet(characters=True),
    "omniglot": DataSet(
        characters=True, inverted=True, splits=("train", None), by="alphabet", by_split="test", few=True
    ),
    "cifar100": DataSet(by="coarse_label"),
    "imagenet_r": DataSet(splits=("test", None)),
}


def data_set(name: str) -> DataSet:
    """That of a TFDS name, which may have a configuration and a version: `emnist/letters:3.0.0`.

    Of a collection whose configuration is called as a set (`visual_domain_decathlon/svhn`) the images are like that
    set's, and nothing else is.
    """
    base, *configuration = name.split(":")[0].split("/")
    characters = any(SETS[part].characters for part in configuration if part in SETS)
    return SETS.get(base, DataSet(characters=characters))


def base_name(name: str) -> str:
    """The name without configuration and version."""
    return name.split(":")[0].split("/")[0]
