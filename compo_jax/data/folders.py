"""Task streams from folders of images, or from lists of files and labels; nothing is copied, and nothing downloaded."""

import filecmp
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compo_jax.data.reading import CROP, Augment, Look, Part, divide, read_stream, require_options, some
from compo_jax.data.stream import TaskStream, group_classes
from compo_jax.files import local_path

LAYOUT = (
    "lay it out as train/CLASS/... and test/CLASS/... (or val/), or as the lists train.txt and test.txt, a line of "
    "which is `relative/path label`, from the list's folder on"
)
_SHOWN = 5  # names in an error


class Images(NamedTuple):
    """The image files of one part and the class of each, in order."""

    where: Path
    files: list[Path]
    classes: list[str]


class FileSource:
    """Images that are a file each: see `reading.Stored`."""

    advice = "copy the file again, or take it out"

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """The stored images; OSError with the file that can't be read."""
        return [self.files[row].read_bytes() for row in rows]

    def place(self, row: int) -> str:
        """What errors call an image."""
        return str(self.files[row])


def folder_stream(
    path: str | Path,
    *,
    size: int,
    tasks: int = 10,
    seed: int | None = 0,
    class_order: int | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    test_fraction: float = 0.25,
    crop: float = CROP,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    augment: Augment = "default",
    images: int | None = None,
    overlap: bool = False,
    memory: int = 2 * 2**30,
) -> TaskStream:
    """A stream from the images in the folder `path`, in whatever format Pillow reads.

    Its parts are folders with a folder for each class (`train/CLASS/...`, `test/CLASS/...`; deeper folders are read
    too), or lists: `train.txt` and `test.txt`, a line of which is `relative/path label`, the path from `path` on. A
    line without a label is of the class that its file's folder is called. A list goes before a folder. Classes are
    sorted by name, and by number where all are numbers. Grey images, palettes and the like become RGB, and images are
    turned upright as their EXIF tag says.

    Args:
      train_split, test_split: names of the parts. Default: train, and test or else val; where the first is named alone,
        `test_fraction` of each of its classes is held out.
      size, tasks, seed, class_order, test_fraction, mean, std, augment, images, memory: see `tfds_stream`.
      crop: fraction of a test image's shorter side that is kept.
      overlap: lets a file be in both parts.

    FileNotFoundError where a part or a listed file is missing; ValueError, with the names, for empty or broken files,
    classes without images, test classes that aren't trained on, and files that are in both parts.
    """
    require_options(size, images, seed, test_fraction, augment, crop)
    folder = local_path(path)
    parts = [_part(folder, name) for name in _parts(folder, train_split, test_split)]
    names = sorted(set(parts[0].classes), key=_order(parts[0].classes))
    if strange := sorted(set(parts[-1].classes) - set(names)):
        raise ValueError(f"{parts[1].where} has classes that {parts[0].where} lacks: {_some(strange)}")
    if len(parts) > 1 and not overlap:
        _require_apart(*parts)
    _require_readable([file for part in parts for file in part.files])
    number = {name: i for i, name in enumerate(names)}
    sources = [(FileSource(part.files), np.array([number[c] for c in part.classes])) for part in parts]
    if len(sources) > 1:
        train, test = (Part(source, labels, np.arange(len(labels))) for source, labels in sources)
    else:
        train, test = (Part(*sources[0], rows) for rows in divide(sources[0][1], test_fraction, seed))
    groups = group_classes(len(names), tasks, seed, class_order)
    look = Look(size, crop, False, False, mean, std, augment, memory)
    called = [f"{folder.name}-{i}" for i in range(len(groups))]
    return read_stream(folder.name, called, groups, names, some(train, images, seed), test, look)


def folder_parts(path: str | Path) -> list[str]:
    """The folders in it, whose names are those of its parts; FileNotFoundError where there is no such folder."""
    folder = local_path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


# -- what the folder holds ---------------------------------------------------------------------------------------------
def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + f" and {len(names) - _SHOWN:,} more" * (len(names) > _SHOWN)


def _order(classes: Sequence[str]):
    """The key that names of classes are sorted by."""
    return (lambda name: (int(name), name)) if all(name.isdecimal() for name in classes) else str


def _parts(folder: Path, train: str | None, test: str | None) -> list[str]:
    """The names of one or two parts that are there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: {LAYOUT}")

    def there(name: str) -> bool:
        return (folder / f"{name}.txt").is_file() or (folder / name).is_dir()

    wanted = [train or "train", *([test] if test else [] if train else ["test" if there("test") else "val"])]
    if missing := [name for name in wanted if not there(name)]:
        holds = _some(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        one = " (or name the one to train on alone, and a part of it is held out)" * (missing == ["val"])
        said = " or ".join(["test", "val"] if missing[-1] == "val" and not test else missing[:1])
        raise FileNotFoundError(f"{folder} lacks {said}, a folder or a list, and holds {holds}: {LAYOUT}{one}")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"{folder}: {wanted[0]} is to be trained on and tested on: name two parts, or the first alone")
    return wanted


def _part(folder: Path, name: str) -> Images:
    listed = folder / f"{name}.txt"
    return _listed(listed) if listed.is_file() else _in_folders(folder / name)


def _extensions() -> set[str]:
    """Ends of the names of files that Pillow opens."""
    from PIL import Image

    return {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _in_folders(folder: Path) -> Images:
    ends, files, classes, empty = _extensions(), [], [], []
    for name in folder_parts(folder):
        inside = [
            Path(where, file) for where, names in _walk(folder / name) for file in names
            if os.path.splitext(file)[1].lower() in ends and not file.startswith(".")
        ]  # fmt: skip
        files += sorted(inside)
        classes += [name] * len(inside)
        empty += [] if inside else [name]
    if empty or not files:
        what = f"classes without images: {_some(empty)}" if empty else "no folders of classes"
        raise ValueError(f"{folder} has {what}; an image's name ends in .jpg, .png or another end that Pillow knows")
    return Images(folder, files, classes)


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folders in a folder, hidden ones left out, and the files in each; a folder that links lead to again is read
    once."""
    seen = {os.path.realpath(folder)}
    for where, inside, files in os.walk(folder, followlinks=True):
        shown = sorted(name for name in inside if not name.startswith("."))
        real = {name: os.path.realpath(os.path.join(where, name)) for name in shown}
        inside[:] = [name for name, path in real.items() if path not in seen and not seen.add(path)]
        yield where, files


def _listed(file: Path) -> Images:
    ends, seen = _extensions(), {}
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}): {LAYOUT}") from error
    for number, line in enumerate(lines, 1):
        if not (line := line.strip()):
            continue
        path, _, label = line.rpartition(" ") if "\t" not in line else line.rpartition("\t")
        if os.path.splitext(line)[1].lower() in ends:
            path, label = line, Path(line).parent.name
        if not path.strip() or not label:
            raise ValueError(f"{file}, line {number}: {line!r} has no path or no label: {LAYOUT}")
        image = file.parent / path.strip()
        if seen.setdefault(image, label) != label:
            raise ValueError(
                f"{file}, line {number}: {path} has the label {label} and, further up, {seen[image]}. A line is a "
                "path and, behind a space or a tab, its label"
            )
    if not seen:
        raise ValueError(f"{file} lists no images: {LAYOUT}")
    if missing := [str(image) for image in seen if not image.is_file()]:
        raise FileNotFoundError(
            f"{file} lists {len(missing):,} files that are not there: {_some(missing)}. A line is a path with slashes "
            "and, behind a space or a tab, its label; no comma between them, no quotes, no header"
        )
    return Images(file, list(seen), list(seen.values()))


def _require_apart(train: Images, test: Images) -> None:
    """ValueError where a file is in both parts, as itself or as a copy under one name."""

    def name(part: Images, image: Path) -> tuple[str, int]:
        return f"{image.parent.name}/{image.name}", image.stat().st_size

    trained = {image.resolve() for image in train.files}
    named: dict[tuple[str, int], list[Path]] = {}
    for image in train.files:
        named.setdefault(name(train, image), []).append(image)
    both = [
        str(image) for image in test.files
        if image.resolve() in trained
        or any(filecmp.cmp(image, twin, shallow=False) for twin in named.get(name(test, image), []))
    ]  # fmt: skip
    if both:
        raise ValueError(
            f"{len(both):,} of {len(test.files):,} images of {test.where} are in {train.where} too, {_some(both)}: a "
            "test would tell nothing; take them out of one, or pass overlap=True"
        )


def _require_readable(files: Sequence[Path]) -> None:
    """ValueError with the files whose first bytes aren't an image's; their pixels are not read."""
    from PIL import Image

    def reason(file: Path) -> str | None:
        try:
            with Image.open(file):
                return None
        except Exception as error:  # Pillow raises a dozen types
            return f"{file} ({'it is empty' if not file.stat().st_size else type(error).__name__})"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        broken = [told for told in pool.map(reason, files) if told]
    if broken:
        raise ValueError(
            f"{len(broken):,} of {len(files):,} images can't be read, {_some(broken)}: copy them again or take them out"
        )
