"""The files of a prepared TFDS set: found, opened and read without TensorFlow, and named where one is damaged."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from compo_jax.files import local_path

if TYPE_CHECKING:
    import tensorflow_datasets

_CHUNK = 512  # records read at a time
_POINTER = b"version https://git-lfs"
_AGAIN = "copy it again from where the set was prepared"


def prepared(name: str, data_dir: str | Path) -> Path:
    """The folder of the set's newest version (or the one in `name`, as `mnist:3.0.1`), as TFDS lays it out."""
    import tensorflow_datasets as tfds

    root = local_path(data_dir)
    advice = (
        f'prepare the set where there is a network: python -c "import tensorflow_datasets as tfds; tfds.builder('
        f"'{name}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()\""
    )
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; give TFDS's data_dir, or {advice}")
    path, _, version = name.partition(":")
    if Path(path).is_absolute() or ".." in Path(path).parts or not path.strip("./"):
        raise ValueError(f"{name!r} is not the name of a set in {root}: give that, without the folder")
    found = [p.parent for p in (root / path).glob(f"{version or '*'}/features.json")]
    if not found:
        if others := sorted((root / path).glob(f"{version or '*'}/dataset_info.json")):
            raise FileNotFoundError(f"{others[0].parent} lacks features.json, which says what the set holds: {_AGAIN}")
        files = [*root.glob("*/*/features.json"), *root.glob("*/*/*/features.json")]  # the latter with a config
        sets = ", ".join(sorted({str(p.parent.parent.relative_to(root)) for p in files})) or "none at all"
        raise FileNotFoundError(f"{root} has no prepared set {name!r}; it has {sets}; {advice}")
    return max(found, key=lambda folder: tfds.core.Version(folder.name))


def open_builder(name: str, data_dir: str | Path) -> "tensorflow_datasets.core.DatasetBuilder":
    """TFDS's reader of a prepared set; ValueError or FileNotFoundError for what is damaged or missing."""
    import tensorflow_datasets as tfds

    folder = prepared(name, data_dir)
    for file in (folder / "features.json", folder / "dataset_info.json"):
        if not file.exists():
            raise FileNotFoundError(f"{folder} lacks {file.name}: {_AGAIN}")
        try:
            json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no JSON{_likely(file)} ({error}): {_AGAIN}") from error
    try:
        return tfds.builder_from_directory(str(folder))
    except Exception as error:  # TFDS and protobuf have a type of error for everything
        raise ValueError(
            f"TFDS can't open {folder} ({_first_line(error)}): features.json, dataset_info.json or a file of labels is "
            "damaged or of another version"
        ) from error


def split_names(name: str, data_dir: str | Path) -> list[str]:
    """The splits of a prepared set."""
    return list(open_builder(name, data_dir).info.splits)


def _likely(file: Path) -> str:
    """What a damaged file seems to be, to stand behind its name."""
    with file.open("rb") as opened:
        head = opened.read(len(_POINTER))
    return ", it is empty" if not head else ", it is a Git LFS pointer: run git lfs pull" * head.startswith(_POINTER)


def _shards(builder, split: str) -> list:
    """The pieces of files that a split is made of; FileNotFoundError or ValueError where one is not there or hollow."""
    pieces = builder.info.splits[split].file_instructions
    for piece in pieces:
        file = Path(piece.filename)
        if not file.exists():
            raise FileNotFoundError(f"{file}, of the split {split!r}, is not there: {_AGAIN}")
        if told := _likely(file):
            raise ValueError(f"{file}, of the split {split!r}, holds no images{told}; or {_AGAIN}")
    return pieces


def overlap(builder, first: str, second: str) -> int:
    """How many records two splits share."""
    ranges = [
        [(p.filename, p.skip, p.skip + p.take) for p in builder.info.splits[split].file_instructions]
        for split in (first, second)
    ]
    return sum(
        max(0, min(stop, other_stop) - max(start, other_start))
        for file, start, stop in ranges[0]
        for other, other_start, other_stop in ranges[1]
        if file == other
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Records:
    """The records of one split, images left as bytes; `where` names the set and the split in errors."""

    advice = "copy the set again from where it was prepared"

    def __init__(self, builder, split: str):
        import tensorflow_datasets as tfds

        self.where = f"{builder.info.full_name}, split {split!r}"
        self.pieces = _shards(builder, split)
        if not self.pieces:
            raise ValueError(f"{self.where} has no images: name another, or more of it")
        images = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
        self.source: Any = builder.as_data_source(
            split=split, decoders={key: tfds.decode.SkipDecoding() for key in images}
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """These records; ValueError with the first that can't be read, and its file."""
        try:
            return self._read(rows)
        except Exception as error:  # array_record, TFDS and protobuf raise what they like
            row, reason = self._first_damaged(rows) or (rows[0], error)
            ends = np.cumsum([piece.take for piece in self.pieces])
            file = self.pieces[int(np.searchsorted(ends, row, "right"))].filename
            raise ValueError(
                f"{self.where}: record {row} in {file} can't be read ({_first_line(reason)}): the file was cut or "
                f"changed, {_AGAIN}"
            ) from reason

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """The stored images of these records."""
        return [record["image"] for record in self[rows]]

    def place(self, row: int) -> str:
        """What errors call a record."""
        return f"{self.where}: image {row}"

    def _read(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        found = self.source.__getitems__(list(rows))
        if any(all(value is None for value in record.values()) for record in found):  # past the end of a cut file
            raise ValueError("it is empty")
        return found

    def _first_damaged(self, rows: Sequence[int]) -> tuple[int, Exception] | None:
        for row in rows:
            try:
                self._read([row])
            except Exception as error:
                return row, error
        return None

    def integers(self, features: dict[str, int]) -> Int64[np.ndarray, "features records"]:
        """These integer features of all records; ValueError where one doesn't lie below the number given with it."""
        starts = range(0, len(self), _CHUNK)
        chunks = (self[range(start, min(start + _CHUNK, len(self)))] for start in starts)
        values = [[record[feature] for feature in features] for chunk in chunks for record in chunk]
        found = np.array(values, np.int64).reshape(-1, len(features)).T
        for row, (feature, count) in zip(found, features.items(), strict=True):
            if len(wrong := np.flatnonzero((row < 0) | (row >= count))):
                raise ValueError(
                    f"{self.where}: record {wrong[0]} has {feature} {row[wrong[0]]}, and there are {count} of them, "
                    f"from 0 on: features.json or the file of names is of another version; {_AGAIN}"
                )
        return found
