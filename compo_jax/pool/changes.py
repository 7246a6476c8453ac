"""How a pool's folders change, in one step each: whoever reads finds the state before it or after it.

A writer works in a hidden folder `.name.*` of the pool and holds the lock on it, which the system lets go when the
process ends, however it ends. A new module comes with the renaming of its folder. One that is there changes with its
manifest, which is replaced by a rename: what the new one speaks of lies beside it before, and what only the old one
spoke of is taken away after. Writers of one module wait for each other by a lock on the module; readers never wait.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from compo_jax.pool import manifest as manifests
from compo_jax.pool import storage
from compo_jax.pool.manifest import Manifest

LOCK = ".lock"
_HIDDEN = re.compile(r"\.[A-Za-z0-9][A-Za-z0-9._-]*\.[a-z0-9_]{8}")
_UNLOCKED = 3600  # seconds; a writer locks its hidden folder as soon as it has made it


def _lock(folder: Path, wait: bool = True, create: bool = True) -> int:
    """A descriptor that holds the folder's lock until it is closed.

    FileNotFoundError where the folder is gone, BlockingIOError where another has the lock and we don't wait.
    """
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # the folder may have been removed, and made anew, while we waited
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile holds a copy of the descriptor
    os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other writers off a module; FileNotFoundError where it is gone."""
    descriptor = _lock(folder)
    try:
        yield
    finally:
        _unlock(descriptor)


@contextlib.contextmanager
def hidden(pool: Path, name: str) -> Iterator[Path]:
    """A hidden folder in the pool to write to, on the same file system; it goes with all that is left in it."""
    try:
        pool.mkdir(parents=True, exist_ok=True)
        descriptor = None
        while descriptor is None:
            made = tempfile.TemporaryDirectory(prefix=f".{name}.", dir=pool, ignore_cleanup_errors=True)
            with contextlib.suppress(FileNotFoundError):  # cleaned away before it was locked
                descriptor = _lock(Path(made.name))
        with made as folder:
            try:
                yield Path(folder)
            finally:
                _unlock(descriptor)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"module {name!r} of the pool {pool} could not be changed ({error.strerror or error}) and is as "
            "it was: check that the folder is writable and its disk not full",
        ) from error


def publish(new: Path, target: Path, out: Path, manifest: Manifest, overwrite: bool) -> bool:
    """Makes `new` the module `target`; False where there is one that is not to be overwritten.

    FileExistsError where a file has its name.
    """
    own = {manifests.FILE, LOCK, *storage.folders(manifest)}
    manifests.write(manifest, new)
    for _ in range(100):  # another process may add and remove the name again and again, but not for ever
        try:
            os.rename(new, target)
            return True
        except OSError as error:
            if error.errno == errno.ENOTDIR:
                raise FileExistsError(f"{target} is a file and no module: move it elsewhere") from error
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        if not overwrite:
            return False
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(target))
            except FileNotFoundError:  # removed just now
                continue
            replace(target, new, out, manifest, lambda entry: entry not in own)
            return True
    return False


def replace(target: Path, new: Path, out: Path, manifest: Manifest, stale: Callable[[str], bool]) -> None:
    """Moves the parts in `new` into the module `target`, makes `manifest` its own, and moves what is stale `out`.

    The caller holds the module's lock.
    """
    manifests.write(manifest, new)
    for entry in os.listdir(new):
        if entry != manifests.FILE:
            os.rename(new / entry, target / entry)
    os.replace(new / manifests.FILE, target / manifests.FILE)  # here the module changes
    for entry in os.listdir(target):
        if stale(entry):
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
        elif not entry.name.startswith("."):
            removed += [f"{entry.name}/{left}" for left in _clean_module(folder)]
    return removed


def _clean_hidden(folder: Path) -> bool:
    descriptor = None
    try:
        descriptor = _lock(folder, wait=False, create=False)
    except (BlockingIOError, PermissionError):  # its writer lives, or is another user's
        return False
    except FileNotFoundError:  # killed before it was locked, or removed just now
        if not folder.exists() or time.time() - folder.stat().st_mtime < _UNLOCKED:
            return False
    shutil.rmtree(folder, ignore_errors=True)
    if descriptor is not None:
        _unlock(descriptor)
    return not folder.exists()


def _clean_module(folder: Path) -> list[str]:
    def left():
        manifest = manifests.read(folder)
        return sorted(entry for entry in os.listdir(folder) if storage.leftover(entry, manifest))

    # damaged: nothing is known of it; or removed just now, or another user's
    with contextlib.suppress(ValueError, FileNotFoundError, PermissionError):
        if left():
            with locked(folder):
                found = left()  # a writer that lives has taken its own away
                for entry in found:
                    shutil.rmtree(folder / entry, ignore_errors=True)
                return found
    return []
