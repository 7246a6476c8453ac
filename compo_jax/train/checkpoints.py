"""Numbered checkpoints in a folder, written whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from compo_jax import tree

Tree = Any


def _leaves(like: Tree) -> dict[str, str]:
    leaves = jax.tree.leaves(like)
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in zip(tree.names(like), leaves, strict=True)}


class Checkpoints:
    """The newest two states saved under `path`; orbax writes aside and renames, so a killed run leaves no half one."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        self._orbax = None

    def _open(self) -> ocp.training.Checkpointer:
        if self._orbax is None:
            newest = ocp.training.preservation_policies.LatestN(2)
            self._orbax = ocp.training.Checkpointer(self.path, preservation_policy=newest)
        return self._orbax

    @property
    def latest(self) -> int | None:
        """Number of the newest checkpoint, None where there is none."""
        if not self.path.exists():
            return None
        newest = self._open().latest
        return None if newest is None else newest.step

    def save(self, number: int, state: Tree) -> None:
        """Saves `state` as checkpoint `number`, unless that one is there; returns when it is on disk."""
        if self.latest != number:
            self._open().save(number, state)

    def load(self, like: Tree) -> Tree:
        """The newest checkpoint, as arrays of the shapes, dtypes and shardings of `like`.

        ValueError where it was saved from a tree of another structure.
        """
        # Compared here, since orbax casts another dtype in silence and reports other names without naming them.
        saved, wanted = _leaves(self._open().metadata(self.latest).metadata), _leaves(like)
        if differing := sorted(name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)):
            told = [f"{n}: {saved.get(n, 'nothing')} there, {wanted.get(n, 'nothing')} now" for n in differing[:8]]
            raise ValueError(
                f"the checkpoint in {self.path} doesn't fit this run ({'; '.join(told)}"
                f"{'; ...' if differing[8:] else ''}): was it written with other settings or by another version? "
                "Remove the folder to start over"
            )
        return self._open().load(self.latest, like)

    def remove(self) -> None:
        """Deletes all checkpoints."""
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None
        shutil.rmtree(self.path, ignore_errors=True)
