"""Safetensors checkpoints, each in one file or several: mapped into memory, and written a tensor after another."""

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from compo_jax.files import (
    INDEX,
    SINGLE,
    index_file,
    local_path,
    replaced,
    require_ordinary,
    safetensors_file,
    weight_files,
    weight_map,
)

#: The types that are merged; tensors of others (counts, masks) are the same in all checkpoints, and are copied.
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
#: What a merge may be written in, by the names that PyTorch and mergekit have.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@runtime_checkable
class Progress(Protocol):
    """What follows a merge while it is written, a progress bar say."""

    def __call__(self, done: int, total: int) -> object:
        """Is called after each tensor that is written: bytes of the result so far, and of the whole."""
        ...


class Tensor(NamedTuple):
    """What a checkpoint's header says of a tensor: the place of its first byte in the file, and the number of them."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Checkpoint(NamedTuple):
    """The tensors of one file or of several.

    Attributes:
      path: as the caller has it.
      files: that hold it.
      tensors: in the order of the files.
      index: the list of the files; None of one file.
    """

    path: Path
    files: list[Path]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None
    index: Path | None = None

    def lost_by(self, written: Path) -> bool:
        """Whether this wouldn't be read any more with another file in that place."""
        own = [*self.files, *([] if self.index is None else [self.index, self.index.with_name(SINGLE)])]
        return written.resolve() in (file.resolve() for file in own)

    def floats(self) -> dict[str, Tensor]:
        """Those that are merged."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.dtype in FLOATS}

    def row(self, name: str) -> np.ndarray:
        """The tensor's entries in one row, bytes where its type isn't merged: mapped into memory as long as held."""
        tensor = self.tensors[name]
        dtype = np.dtype(FLOATS.get(tensor.dtype, np.uint8))
        if not tensor.size:
            return np.empty(0, dtype)
        return np.memmap(tensor.file, dtype, "r", tensor.start, (tensor.size // dtype.itemsize,)).view(np.ndarray)


def opened(path: str | os.PathLike) -> Checkpoint:
    """The headers of a checkpoint: a file, an index of files or a folder; ValueError where a file is none, or isn't
    whole, or an index isn't true, FileNotFoundError where one isn't there."""
    path, tensors, metadata = local_path(path), {}, {}
    index = index_file(path)
    listed = {} if index is None else weight_map(index)
    files = sorted(set(listed.values())) or weight_files(path)
    for file in files:
        theirs, about = _header(file)
        theirs = {name: tensor for name, tensor in theirs.items() if listed.get(name, file) == file}
        if twice := [name for name in theirs if name in tensors]:
            raise ValueError(
                f"{path} has {', '.join(twice[:5])} in two files, {tensors[twice[0]].file.name} and {file.name}, and "
                "no index says in which one to read it: bring the checkpoint again from where it came"
            )
        tensors |= theirs
        metadata |= about
    if lacking := [f"{name} ({file.name})" for name, file in listed.items() if name not in tensors]:
        raise ValueError(
            f"{path}: its index names files that lack {', '.join(lacking[:5])}{' and others' * (len(lacking) > 5)}: "
            "bring the checkpoint again from where it came"
        )
    return Checkpoint(path, files, tensors, metadata or None, index)


def _header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors_file(path):
        pass
    with open(path, "rb") as file:  # the library doesn't tell where tensors are, and would copy each to read it
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata, tensors = header.pop("__metadata__", None), {}
    for name, tensor in header.items():
        start, stop = tensor["data_offsets"]
        tensors[name] = Tensor(tensor["dtype"], tuple(tensor["shape"]), path, 8 + length + start, stop - start)
    return dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata or {}


def require_alike(like: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """ValueError with every tensor that isn't in all checkpoints, of one shape and type."""
    problems = []
    for model in models:
        theirs, expected = model.tensors, like.tensors
        problems += [f"{model.path} lacks {name}" for name in expected if name not in theirs]
        problems += [f"{model.path} has {name}, and {like.path} hasn't" for name in theirs if name not in expected]
        for name in (name for name in expected if name in theirs):
            if expected[name][:2] != theirs[name][:2]:
                problems.append(f"{name} is {theirs[name]} in {model.path} and {expected[name]} in {like.path}")
            elif expected[name].dtype not in FLOATS and not np.array_equal(like.row(name), model.row(name)):
                problems.append(f"{name}, of type {expected[name].dtype}, isn't merged and differs in {model.path}")
    if problems:
        raise ValueError(f"the checkpoints don't fit together: {'; '.join(problems)}")


def target(out: str | os.PathLike, max_shard_size: int | None = None) -> Path:
    """The path of the file to write, or of the folder where it is cut in shards; an error where that can't be."""
    out = local_path(out)
    out = out.resolve() if max_shard_size is not None else out  # a folder behind a link is made anew where it is
    if max_shard_size is not None and max_shard_size < 1:
        raise ValueError(f"max_shard_size is the most bytes of a file, not {max_shard_size}")
    if max_shard_size is None and out.is_dir():
        raise ValueError(f"{out} is a folder: give the name of the file to write")
    require_ordinary(out)
    if max_shard_size is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: files of at most max_shard_size= bytes are written to a new folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write {out.name} to: make it first")
    return out


class Plan(NamedTuple):
    """What is written.

    Attributes:
      like: the checkpoint that has the result's tensors, and its metadata.
      dtype: of the tensors that are merged, of `FLOATS`; None for that of `like`.
      check_finite: whether a number that is too large for `dtype` is an error.
    """

    like: Checkpoint
    dtype: str | None = None
    check_finite: bool = True
    progress: Progress | None = None
    max_shard_size: int | None = None

    def kind(self, name: str) -> str:
        tensor = self.like.tensors[name]
        return self.dtype if self.dtype is not None and tensor.dtype in FLOATS else tensor.dtype

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""

        def size(name, tensor):
            if (kind := self.kind(name)) == tensor.dtype:
                return tensor.size
            return tensor.size // np.dtype(FLOATS[tensor.dtype]).itemsize * np.dtype(FLOATS[kind]).itemsize

        return {name: size(name, tensor) for name, tensor in self.like.tensors.items()}

    def row(self, name: str, params: Mapping[str, Any]) -> np.ndarray:
        """The entries of the result's tensor."""
        if name not in params:
            return self.like.row(name)
        row, dtype = params[name].open()[:], np.dtype(FLOATS[self.kind(name)])
        if row.dtype == dtype:
            return row
        with np.errstate(over="ignore"):
            cast = row.astype(dtype)
        if self.check_finite and not np.array_equal(np.isfinite(cast), np.isfinite(row)):
            raise ValueError(f"numbers too large for {dtype} come out in {name}: take a wider dtype")
        return cast


def write(out: Path, plan: Plan, params: Mapping[str, Any]) -> None:
    """A checkpoint with the tensors of `plan.like`, those of `params` in their places; each is made, written, let go.

    A file, or, where `plan.max_shard_size` says so, a folder of files with their index: whole, or not at all. OSError
    where it can't be written, and before anything is where the disk has no room for it.
    """
    sizes = plan.sizes()
    total, free = sum(sizes.values()), shutil.disk_usage(out.parent).free
    if total > free:
        raise OSError(
            errno.ENOSPC,
            f"{out} is not written: it takes {total / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB left",
        )
    done = 0

    def written(path: Path, names: Sequence[str]) -> None:
        nonlocal done
        with open(path, "wb") as file:
            file.write(_header_of(plan, {name: sizes[name] for name in names}))
            for name in names:
                file.write(plan.row(name, params).view(np.uint8).data)
                done += sizes[name]
                if plan.progress is not None:
                    plan.progress(done, total)

    try:
        with replaced(out) as aside:
            if plan.max_shard_size is None:
                written(aside, list(sizes))
                return
            aside.mkdir()
            shards = _cut(sizes, plan.max_shard_size)
            files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
            for file, names in zip(files, shards, strict=True):
                written(aside / file, names)
            places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (aside / INDEX).write_text(json.dumps(index, indent=1))
    except OSError as error:
        raise OSError(error.errno, f"{out} is not written ({error.strerror or error})") from error


def _header_of(plan: Plan, sizes: dict[str, int]) -> bytes:
    # by hand, as safetensors' own functions take all tensors at once
    header: dict[str, Any] = {"__metadata__": plan.like.metadata} if plan.like.metadata else {}
    place = 0
    for name, size in sizes.items():
        shape, offsets = plan.like.tensors[name].shape, [place, place := place + size]
        header[name] = {"dtype": plan.kind(name), "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _cut(sizes: dict[str, int], most: int) -> list[list[str]]:
    """The names in their order, so many together that their sizes are at most `most`; a larger tensor is alone."""
    shards: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards
