"""Merging from file to file: safetensors checkpoints in and one out, a leaf at a time."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax.compose.entries import Deferred
from compo_jax.compose.rules import RULES, find_rule, merge
from compo_jax.files import local_path, replaced, safetensors_file

#: The types that are merged; tensors of others (counts, masks) are the same in all checkpoints, and are copied.
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_WITHOUT_BASE = ("average", "slerp", "karcher")


class _Tensor(NamedTuple):
    """What a checkpoint's header says of a tensor; the place of its first byte in the file, and the number of them."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class _Checkpoint(NamedTuple):
    path: Path
    tensors: dict[str, _Tensor]  # in the order of the file
    metadata: dict[str, str] | None

    def row(self, name: str) -> np.ndarray:
        """The tensor's entries in one row, bytes where its type isn't merged: mapped into memory as long as held."""
        _, _, start, size = tensor = self.tensors[name]
        dtype = np.dtype(_FLOATS.get(tensor.dtype, np.uint8))
        if not size:
            return np.empty(0, dtype)
        return np.memmap(self.path, dtype, "r", start, (size // dtype.itemsize,)).view(np.ndarray)


class _Row:
    """The entries of a checkpoint's tensor, or of its difference from the base's, see `Deferred`."""

    def __init__(self, checkpoint: _Checkpoint, name: str, base: _Checkpoint | None, check_finite: bool):
        self.where, self.check_finite = f"{checkpoint.path} holds NaN or infinite numbers in {name}", check_finite
        self.row, self.base = checkpoint.row(name), None if base is None else base.row(name)

    def __getitem__(self, place: slice) -> np.ndarray:
        x = self.row[place]
        with np.errstate(all="ignore"):
            if self.check_finite and not np.isfinite(np.sum(x, dtype=np.float32)) and not np.all(np.isfinite(x)):
                raise ValueError(
                    f"{self.where}: a training that diverged, say, or a damaged file. Leave it out, or let it through "
                    "on purpose with check_finite=False"
                )
            return x if self.base is None else x - self.base[place]


class _Zeros(NamedTuple):
    size: int
    dtype: np.dtype

    def __getitem__(self, place: slice) -> np.ndarray:
        return np.zeros(len(range(*place.indices(self.size))), self.dtype)


def merge_files(
    name: str,
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    check_finite: bool = True,
    **options: Any,
) -> None:
    """`merge` of safetensors checkpoints into the safetensors file `out`, with no more than a leaf of each in memory.

    The deltas are the checkpoints' differences from the base's, `task_vector`, and each leaf comes out as `merge` of
    the whole trees makes it, bit by bit. Rules that need something of all leaves first (TIES its thresholds, SLERP the
    angle) read the files twice.

    Args:
      name: of `RULES`; not one that solves for all leaves at once (regmean, kronecker, ggn).
      paths: T checkpoints with the same tensors, in shapes and types, under the same names.
      out: either the whole file is there or, after an error, what was there before. Tensors, types and metadata are as
        in the base, or the first checkpoint.
      base: the checkpoint that all were trained from. Without one the parameters themselves are merged, in the rules
        average, slerp and karcher.
      check_finite: see `merge`; an error names the first tensor that isn't finite.
      options: of the rule, and what it needs, as in `merge`: `weights`, `key`, `density`, ...

    Tensors of whole numbers aren't merged: they are the same in all checkpoints. ValueError, before anything is
    written, for a file that is no complete safetensors file and for checkpoints that differ, with all differences;
    FileNotFoundError for one that isn't there, and for the folder of `out`; what else `merge` raises; OSError where the
    file can't be written, the disk is full say.
    """
    behind = find_rule(name).behind
    last = options.get("rule", behind) if behind else name
    if not (find_rule(name).leafwise and find_rule(last).leafwise):
        able = ", ".join(other for other in RULES if RULES[other].leafwise)
        raise ValueError(
            f"the rule {last!r} solves for all leaves at once and doesn't merge files leaf by leaf, as {able} do: load "
            "the checkpoints, and call merge"
        )
    if base is None and name not in _WITHOUT_BASE:
        raise ValueError(f"the rule {name!r} merges differences from a base: say base=, the file of the model before")
    if not paths or isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"paths are the checkpoints to merge, a list of files, not {paths!r}")
    out = _place(out)
    start = None if base is None else _opened(base)
    models = [_opened(path) for path in paths]
    like = models[0] if start is None else start
    _require_alike(like, models)

    def deferred(make: Callable[[str], Any]) -> dict[str, Deferred]:
        floats = {name: tensor for name, tensor in like.tensors.items() if tensor.dtype in _FLOATS}
        return {n: Deferred(t.shape, _FLOATS[t.dtype], lambda n=n: make(n)) for n, t in floats.items()}

    def zeros(name):
        dtype = np.dtype(_FLOATS[like.tensors[name].dtype])
        return _Zeros(like.tensors[name].size // dtype.itemsize, dtype)

    origin = deferred(zeros if start is None else start.row)
    deltas = [deferred(lambda name, m=m: _Row(m, name, start, check_finite)) for m in models]
    double = any(tensor.dtype == "F64" for tensor in like.tensors.values())
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        _write(out, like, merge(name, origin, deltas, check_finite=check_finite, **options))


def _place(out: str | os.PathLike) -> Path:
    out = local_path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: give the name of the file to write")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write {out.name} to: make it first")
    return out


def _opened(path: str | os.PathLike) -> _Checkpoint:
    """The header of a safetensors file; ValueError where the file is none, or isn't whole."""
    path = local_path(path)
    with safetensors_file(path):
        pass
    with open(path, "rb") as file:  # the library doesn't tell where tensors are, and would copy each to read it
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata, tensors = header.pop("__metadata__", None), {}
    for name, tensor in header.items():
        start, stop = tensor["data_offsets"]
        tensors[name] = _Tensor(tensor["dtype"], tuple(tensor["shape"]), 8 + length + start, stop - start)
    return _Checkpoint(path, dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata)


def _require_alike(like: _Checkpoint, models: Sequence[_Checkpoint]) -> None:
    """ValueError with every tensor that isn't in all checkpoints, of one shape and type."""
    problems = []
    for model in models:
        theirs, expected = model.tensors, like.tensors
        problems += [f"{model.path} lacks {name}" for name in expected if name not in theirs]
        problems += [f"{model.path} has {name}, and {like.path} hasn't" for name in theirs if name not in expected]
        for name in (name for name in expected if name in theirs):
            if expected[name][:2] != theirs[name][:2]:
                problems.append(f"{name} is {theirs[name]} in {model.path} and {expected[name]} in {like.path}")
            elif expected[name].dtype not in _FLOATS and not np.array_equal(like.row(name), model.row(name)):
                problems.append(f"{name}, of type {expected[name].dtype}, isn't merged and differs in {model.path}")
    if problems:
        raise ValueError(f"the checkpoints don't fit together: {'; '.join(problems)}")


def _write(out: Path, like: _Checkpoint, params: Mapping[str, Any]) -> None:
    """A file with the tensors of `like`, those of `params` in their places; each is made, written and let go."""
    # by hand, as safetensors' own functions take all tensors at once
    header: dict[str, Any] = {"__metadata__": like.metadata} if like.metadata else {}
    place = 0
    for name, tensor in like.tensors.items():
        offsets = [place, place := place + tensor.size]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with replaced(out) as aside, open(aside, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in like.tensors:
                file.write((params[name].open()[:] if name in params else like.row(name)).view(np.uint8).data)
    except OSError as error:
        raise OSError(error.errno, f"{out} is not written ({error.strerror or error})") from error
