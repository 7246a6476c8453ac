"""Files of this machine: which paths are served, locks that end with their process, files that are written whole or not
at all, and why one was not."""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

if TYPE_CHECKING:
    import safetensors

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
INDEX = "model.safetensors.index.json"  # what Hugging Face calls the list of a checkpoint's files
SINGLE = "model.safetensors"  # and the file that is read before it
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FULL = "No space left on device"
_held: set[int] = set()


def local_path(path: str | os.PathLike) -> Path:
    """The path with `~` expanded.

    ValueError for `gs://...` and its like: object stores have no atomic rename and no locks, which all that is written
    here relies on, and as a path such a name would be a folder `gs:`.
    """
    if _SCHEME.match(os.fsdecode(path)):
        raise ValueError(
            f"{os.fsdecode(path)} is an address and no path on this machine: object stores have no atomic renames and "
            "no locks. Mount it as a folder, or write to a local one and copy that"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # of a user that isn't there
        raise ValueError(f"the home folder in {os.fsdecode(path)} is not known: write the path in full") from error


def writable_path(path: str | os.PathLike) -> Path:
    """`local_path` of what orbax is to write to, in full.

    ValueError for a bracket or two stars in it: orbax finds its own files there by a pattern that has the path in it,
    and so not.
    """
    path = local_path(path).absolute()
    if "[" in str(path.resolve()) or "**" in path.resolve().parts:
        raise ValueError(
            f"{path} has a bracket or two stars, and what orbax writes there can't be read again: choose another name"
        )
    return path


def require_ordinary(path: Path) -> None:
    """ValueError for a device, a pipe or a socket, which writing by `replaced` would put a file in the place of."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is no ordinary file, and one would be put in its place: give another name")


def lock(file: Path, *, wait: bool = True, create: bool = True) -> int:
    """A descriptor that holds the lock of `file` until `unlock`, or until the process ends, however it ends.

    Args:
      wait: for another that has it; else BlockingIOError.
      create: the file where it isn't there. Its folder is never made: FileNotFoundError where that is gone.

    A forked child doesn't hold its parent's locks. OSError where the file system has none.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | NO_LINK | (os.O_CREAT if create else 0), 0o666)
        _held.add(descriptor)
        try:
            try:
                got = filelock.lock_descriptor(descriptor, blocking=wait, poll_interval=0.01)
            except OSError as error:
                raise OSError(error.errno, f"the file system of {file} has no locks ({error.strerror})") from error
            if not got:
                raise BlockingIOError(errno.EWOULDBLOCK, f"another process holds {file}")
            # the file may have been removed, and made anew, while we waited
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            unlock(descriptor)
            raise
        unlock(descriptor)


def unlock(descriptor: int) -> None:
    """Lets go of what `lock` returned; nothing happens in a child that was forked since."""
    if descriptor in _held:
        _held.discard(descriptor)
        filelock.unlock_descriptor(descriptor)  # a process that was forked by C code holds a copy of the descriptor
        os.close(descriptor)


def _forget() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def safetensors_file(path: Path) -> Iterator["safetensors.safe_open"]:
    """The safetensors file `path`, open; nothing of it is read but its header.

    FileNotFoundError where there is none; ValueError, with what to do, where it is another kind of file or isn't whole.
    """
    import safetensors

    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}: check the path, or download the file first")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:  # looks at the whole header, and the file's size
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is {_foreign(path, error)}") from error


def json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): bring it again from where it came") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object with names: bring it again from where it came")
    return content


def weight_map(index: Path) -> dict[str, Path]:
    """The files that an index lists, each of which has to be there, by the tensors' names."""
    listed = (json_object(index) or {}).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} lists no files: its weight_map is empty. Bring it again from where it came")
    files = {name: index.parent / Path(file).name for name, file in listed.items()}
    if missing := sorted({file.name for file in files.values() if not file.exists()}):
        raise FileNotFoundError(f"{index} lists {', '.join(missing)}, not beside it: bring all of its files")
    return files


def index_file(path: Path) -> Path | None:
    """The list of the files that hold a checkpoint, in a folder or as it is named; None where one file holds it.

    ValueError for a folder without any.
    """
    if path.is_dir():
        if (path / SINGLE).exists():
            return None
        if not (path / INDEX).exists():
            pickled = " pytorch_model*.bin is a PyTorch pickle, which isn't read as it can run code: convert it, where "
            pickled += (
                "PyTorch is, by safetensors.torch.save_file(torch.load(..., weights_only=True), 'model.safetensors')"
            )
            raise ValueError(
                f"{path} holds neither model.safetensors nor {INDEX}: give a checkpoint's folder or its file."
                + pickled * any(path.glob("pytorch_model*.bin"))
            )
        path = path / INDEX
    return path if path.name.endswith(".index.json") else None


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, those that an index lists, or those in a folder.

    ValueError for a folder without any.
    """
    if index := index_file(path):
        return sorted(set(weight_map(index).values()))
    return [path / SINGLE if path.is_dir() else path]


JOIN = "join the arrays of all of them (safetensors.numpy.load_file gives a file's), for models.from_timm say"


def _foreign(path: Path, error: Exception) -> str:
    """What a file is that isn't read, and what to do."""
    if path.name.endswith(".json"):
        return f"no checkpoint but a list of the files that hold it: {JOIN}"
    if path.suffix in (".npz", ".npy"):
        return "a NumPy archive and no safetensors file: models.load reads AugReg's .npz, and nothing else does"
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return (
            "a PyTorch pickle, which isn't read as it can run code. Convert it once, where PyTorch is: "
            f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), "
            f"{path.with_suffix('.safetensors').name!r})"
        )
    return (
        f"no complete safetensors file ({error}): it may be a truncated download, a Git LFS pointer, or another "
        "format; download it again"
    )


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A hidden path beside `path`, to write the new file or folder to: it takes the place of the old one in the end,
    whole, or is removed where an error is raised. ValueError as of `require_ordinary`."""
    require_ordinary(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def one_error(everything: bool = False) -> Iterator[None]:
    """Keeps from the log what each of orbax's threads says of an error that is raised to the caller as well.

    Args:
      everything: keeps all else from the log too, where the caller finds out itself what it would be about.
    """

    def kept(record):
        return not everything and (record.levelno < logging.ERROR or not record.exc_info)

    logger = logging.getLogger("absl")
    logger.addFilter(kept)
    try:
        yield
    finally:
        logger.removeFilter(kept)


def write_error(error: Exception) -> OSError:
    """An OSError with the cause in one line, of whatever orbax and TensorStore raise where a write fails."""
    text = getattr(error, "strerror", None) or str(error).split(" [")[0].split("\n")[0][:400]
    full = errno.ENOSPC if _FULL in str(error) else None
    return OSError(getattr(error, "errno", None) or full or errno.EIO, _FULL if full else text)
