"""Numbered checkpoints in a folder, written whole or not at all, each with the checksums of its arrays."""

import hashlib
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from compo_jax import files, mesh, tree
from compo_jax.tree import Tree

_KEPT = 2


class _Refused(ValueError):
    """Why a checkpoint isn't taken."""


class _Misfit(_Refused):
    """It is of another tree than the one that is asked for."""


def _leaves(like: Tree) -> dict[str, str]:
    leaves = jax.tree.leaves(like)
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in zip(tree.names(like), leaves, strict=True)}


def _sha256(leaf: Any) -> str:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return hashlib.sha256(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)).hexdigest()


def _checksums(state: Tree) -> dict[str, str]:
    leaves = jax.tree.leaves(state)
    # processes gather the leaves of several hosts one by one, in the same order
    with ThreadPoolExecutor(1 if jax.process_count() > 1 else None) as threads:
        return dict(zip(tree.names(state), threads.map(_sha256, leaves), strict=True))


def _everywhere(good: bool) -> bool:
    """Whether it is so in all processes, which go on together."""
    return good if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(good))))


def _shared(state: Tree) -> Tree:
    """Of several processes, orbax takes no JAX arrays that are one's own: process 0's NumPy arrays are written."""
    if not mesh.several():
        return state
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) and x.is_fully_addressable else x, state)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(state: Tree) -> Tree:
    """What orbax can write in place of random keys, their numbers, and of empty arrays, a zero."""

    def one(leaf):
        if _is_key(leaf):
            return jax.random.key_data(leaf)
        return leaf if np.size(leaf) else np.zeros(1, leaf.dtype)

    return jax.tree.map(one, state)


def _as_it_was(stored: Tree, like: Tree) -> Tree:
    """The inverse of `_storable`, with the empty arrays of `like`."""

    def one(stored, leaf):
        if _is_key(leaf):
            return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(leaf))
        return stored if np.size(leaf) else leaf

    return jax.tree.map(one, stored, like)


class Checkpoints:
    """The newest two states saved under `path`.

    Orbax writes aside and renames, so that a killed run leaves no half one. A checkpoint is known by the checksums of
    its arrays: where the newest is damaged, the one before it is used. In a job of several processes all call `save`
    and `load` at the same points, and process 0 writes.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = files.local_path(path).absolute()
        self._damaged: set[int] = set()

    def _numbers(self) -> list[int]:
        try:
            entries = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(int(entry) for entry in entries if entry.isdecimal() and entry == str(int(entry)))

    @property
    def latest(self) -> int | None:
        """Number of the newest checkpoint that `load` did not find damaged, None where there is none."""
        return max((n for n in self._numbers() if n not in self._damaged), default=None)

    def save(self, number: int, state: Tree) -> None:
        """Saves `state` as checkpoint `number`, unless that one is there; returns when it is on disk.

        Raises OSError where it could not be written; the checkpoints before it are as they were.
        """
        if self.latest == number:
            return
        from orbax.checkpoint import v1 as ocp

        files.writable_path(self.path)
        state = _storable(state)
        made = {"number": number, "sha256": _checksums(state)}
        try:
            self._remove(self._damaged)
            with files.one_error():
                ocp.save(self.path / str(number), _shared(state), custom_metadata=made)
        except Exception as error:  # TensorStore says ValueError where the disk is full
            why = files.write_error(error)
            self._remove_halves()
            raise OSError(
                why.errno,
                f"checkpoint {number} could not be written to {self.path} ({why.strerror}): is the disk full or "
                "read-only? The checkpoints before it are as they were",
            ) from error
        self._damaged.clear()
        self._remove(self._numbers()[:-_KEPT])
        self._remove_halves()

    def load(self, like: Tree) -> Tree:
        """The newest whole checkpoint, as arrays of the shapes, dtypes and shardings of `like`.

        A UserWarning names each newer one that is damaged; the next `save` removes it. ValueError where none is whole,
        or they were saved from a tree of another structure.
        """
        refused: dict[int, _Refused] = {}
        for number in reversed(self._numbers()):
            try:
                state = _as_it_was(self._read(number, _storable(like)), like)
            except _Refused as error:
                refused[number] = error
                continue
            for newer, error in refused.items():
                warnings.warn(
                    f"checkpoint {newer} in {self.path} is not used ({error}); going on from checkpoint {number}",
                    stacklevel=2,
                )
            self._damaged = set(refused)
            return state
        if misfits := [error for error in refused.values() if isinstance(error, _Misfit)]:
            raise ValueError(f"the checkpoint in {self.path} {misfits[0]} Remove the folder to start over")
        told = "; ".join(f"{number}: {error}" for number, error in refused.items()) or "there is none"
        raise ValueError(f"no checkpoint in {self.path} is whole ({told}). Remove the folder to start over")

    def _read(self, number: int, like: Tree) -> Tree:
        """_Refused where the checkpoint is damaged, or isn't of the structure of `like`."""
        from orbax.checkpoint import v1 as ocp

        folder = self.path / str(number)
        try:
            with files.one_error(everything=True):
                described = ocp.metadata(folder)
            # Compared here, since orbax casts another dtype in silence and reports other names without naming them.
            made, saved, wanted = described.custom_metadata or {}, _leaves(described.metadata), _leaves(like)
            whole = saved and saved.keys() == made.get("sha256", saved).keys()
            why = None if whole else _Refused("it is damaged: what describes its arrays is not as it was saved")
        except Exception as error:  # orbax and TensorStore raise many types for a damaged file
            why = _damage(error)
        if not _everywhere(why is None):
            raise why or _Refused("it is damaged for another process")
        if differing := sorted(name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)):
            told = [f"{n}: {saved.get(n, 'nothing')} there, {wanted.get(n, 'nothing')} now" for n in differing[:8]]
            raise _Misfit(
                f"doesn't fit this run ({'; '.join(told)}{'; ...' if differing[8:] else ''}): was it written with "
                "other settings or by another version?"
            )
        try:
            with files.one_error():
                state = ocp.load(folder, _shared(like))
        except Exception as error:
            why = _damage(error)
        if not _everywhere(why is None):
            raise why or _Refused("it is damaged for another process")
        if "sha256" not in made:  # older versions wrote none
            return state
        found = _checksums(state)
        wrong = [name for name in wanted if found[name] != made["sha256"].get(name)]
        if not _everywhere(not wrong and made.get("number") == number):
            what = f"{', '.join(wrong[:8])} is not as it was saved" if wrong else f"it is number {made.get('number')}"
            raise _Refused(f"it is damaged: {what}")
        return state

    def _remove(self, numbers: Any) -> None:
        if jax.process_index() == 0:
            for number in numbers:
                place = self.path / str(number)
                if place.is_dir() and not place.is_symlink():
                    shutil.rmtree(place, ignore_errors=True)
                else:
                    place.unlink(missing_ok=True)

    def _remove_halves(self) -> None:
        if jax.process_index() == 0:
            for half in self.path.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)

    def remove(self) -> None:
        """Deletes all checkpoints."""
        self._damaged.clear()
        shutil.rmtree(self.path, ignore_errors=True)


def _damage(error: Exception) -> _Refused:
    return _Refused(f"it is damaged: {str(error).split(' [')[0].split(chr(10))[0][:200]}")
