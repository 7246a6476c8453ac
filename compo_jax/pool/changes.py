"""How a pool's folders change, in one step each: whoever reads finds the state before it or after it.

A writer works in a hidden folder `.name.*` of the pool and holds the lock on it, which the system lets go when the
process ends, however it ends. A new module comes with the renaming of its folder. One that is there changes with its
manifest, which is replaced by a rename: what the new one speaks of lies beside it before, and what only the old one
spoke of is taken away after. Writers of one module wait for each other by a lock on the module; readers never wait.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from compo_jax import files
from compo_jax.pool import manifest as manifests
from compo_jax.pool import search, storage
from compo_jax.pool.manifest import Manifest

_CONTENTS = {manifests.LOCK, "new", "old"}  # of a hidden folder
_HIDDEN = re.compile(r"\.[A-Za-z0-9][A-Za-z0-9._-]*\.[a-z0-9_]{8}")
_UNLOCKED = 3600  # seconds; a writer locks its hidden folder as soon as it has made it


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other writers off a module; FileNotFoundError where it is gone."""
    descriptor = files.lock(folder / manifests.LOCK)
    try:
        yield
    finally:
        files.unlock(descriptor)


@contextlib.contextmanager
def hidden(pool: Path, name: str) -> Iterator[Path]:
    """A hidden folder in the pool to write to, on the same file system; it goes with all that is left in it."""
    files.writable_path(pool)
    try:
        pool.mkdir(parents=True, exist_ok=True)
        folder, descriptor = _made(pool, name)
        try:
            yield folder
        finally:
            _discard(folder)
            files.unlock(descriptor)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"module {name!r} of the pool {pool} could not be changed ({error.strerror or error}) and is as "
            "it was: check that the folder is writable and its disk not full",
        ) from error


def _made(pool: Path, name: str) -> tuple[Path, int]:
    """A new hidden folder and its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=pool))
        try:
            return folder, files.lock(folder / manifests.LOCK)
        except FileNotFoundError:  # cleaned away before it was locked
            continue
        except BaseException:
            _discard(folder)
            raise


def _discard(folder: Path) -> None:
    """Removes a hidden folder, its lock last, by which `clean` knows that it is a pool's."""
    for entry in _CONTENTS - {manifests.LOCK}:
        shutil.rmtree(folder / entry, ignore_errors=True)
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [manifests.LOCK]:
            (folder / manifests.LOCK).unlink()
        folder.rmdir()


def require_replaceable(target: Path, overwrite: bool) -> None:
    """FileExistsError where `target` is no module, or one that is not to be overwritten, ValueError as of `publish`."""
    if search.module(target):
        if not overwrite:
            raise FileExistsError(
                f"the pool {target.parent} has a module {target.name!r}: choose another name or overwrite=True"
            )
        with contextlib.suppress(FileNotFoundError):  # removed just now
            storage.require_own(target, manifests.read(target))
    elif os.path.lexists(target):  # else it was removed just now
        raise FileExistsError(
            f"{target} is no module of this pool and is not touched: choose another name, or move it elsewhere"
        )


def publish(new: Path, target: Path, out: Path, manifest: Manifest, overwrite: bool) -> None:
    """Makes `new` the module `target`.

    FileExistsError where one is there that is not to be overwritten, or something that is no module; ValueError where
    the module that is there is damaged or holds something else.
    """
    manifests.write(manifest, new)
    for _ in range(100):  # another process may add and remove the name again and again, but not for ever
        if not os.path.lexists(target):  # a rename would replace an empty folder
            try:
                os.rename(new, target)
                return
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
        require_replaceable(target, overwrite)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(target))
            except FileNotFoundError:  # removed just now
                continue
            require_replaceable(target, overwrite)  # another may have replaced it since
            replace(target, new, out, manifest)
            return
    raise FileExistsError(f"{target} is added and removed by others again and again: choose another name")


def replace(target: Path, new: Path, out: Path, manifest: Manifest) -> None:
    """Moves the parts in `new` into the module `target`, makes `manifest` its own, and moves what is stale `out`.

    The caller holds the module's lock.
    """
    manifests.write(manifest, new)
    for entry in os.listdir(new):
        if entry != manifests.FILE:
            os.rename(new / entry, target / entry)
    os.replace(new / manifests.FILE, target / manifests.FILE)  # here the module changes
    for entry in os.listdir(target):
        if storage.leftover(target, entry, manifest):
            with contextlib.suppress(OSError):  # nothing reads it, and `clean` finds it
                os.renames(target / entry, out / entry)


def clean(pool: Path) -> list[str]:
    """Removes what killed writers left, see `ModulePool.clean`."""
    removed = []
    for entry in sorted(os.scandir(pool), key=lambda entry: entry.name):
        folder = Path(entry.path)
        if not entry.is_dir(follow_symlinks=False):
            continue
        if _HIDDEN.fullmatch(entry.name):
            removed += [entry.name] if _clean_hidden(folder) else []
        elif search.NAME.fullmatch(entry.name):
            removed += [f"{entry.name}/{left}" for left in _clean_module(folder)]
    return removed


def _clean_hidden(folder: Path) -> bool:
    try:
        entries = set(os.listdir(folder))
        if not entries and time.time() - folder.stat().st_mtime > _UNLOCKED:  # killed before it was locked
            folder.rmdir()
            return True
        if manifests.LOCK not in entries or not entries <= _CONTENTS:  # another program's
            return False
        descriptor = files.lock(folder / manifests.LOCK, wait=False, create=False)
    except OSError:  # its writer lives, or is another user's; or removed just now
        return False
    _discard(folder)
    files.unlock(descriptor)
    return not folder.exists()


def _clean_module(folder: Path) -> list[str]:
    def left():
        manifest = manifests.read(folder)
        return sorted(entry for entry in os.listdir(folder) if storage.leftover(folder, entry, manifest))

    # damaged: nothing is known of it; or removed just now, or another user's
    with contextlib.suppress(ValueError, FileNotFoundError, PermissionError):
        if left():
            with locked(folder):
                leftovers = left()  # a writer that lives has taken its own away
                for entry in leftovers:
                    shutil.rmtree(folder / entry, ignore_errors=True)
                return leftovers
    return []
