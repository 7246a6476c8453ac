"""Trained modules in a folder: each is stored whole by orbax, with a manifest, or is not there at all."""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from compo_jax import adapters, tree
from compo_jax.pool import manifest as manifests
from compo_jax.pool.manifest import Manifest

Tree = Any
_ARRAYS = "arrays"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a {what}: use letters, digits, '.', '_' and '-', a letter or a digit first"
        )
    return name


class ModulePool:
    """The modules in the folder `path`, one subfolder each; the first `add` makes the folder.

    Several processes may read and change a pool at once. A module is written to a hidden folder and renamed, so that
    a reader finds it whole or not at all, whatever becomes of the writer; what a killed writer leaves are hidden
    folders (`.name.*`) that nothing reads and that may be deleted. One process writes a module: orbax waits for all
    processes of a `jax.distributed` job, and `add` refuses there.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser().absolute()
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"a pool is a folder, and {self.path} is a file: choose another path")

    def names(self) -> list[str]:
        """The names of all modules, sorted. A damaged one is among them, so that it is not passed over silently."""
        if not self.path.is_dir():
            return []
        return sorted(entry.name for entry in self.path.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(_NAME.fullmatch(name)) and (self.path / name).is_dir()

    def manifest(self, name: str) -> Manifest:
        """The manifest of a module; KeyError for an unknown name, ValueError for a damaged module."""
        return manifests.read(self._folder(name))

    def add(
        self,
        name: str,
        module: Tree,
        *,
        base: Tree | str,
        adapter: str | adapters.Adapter,
        settings: dict[str, Any] | None = None,
        task: str = "",
        classes: Sequence[str] = (),
        metrics: dict[str, Any] | None = None,
        seed: int = 0,
        extra: dict[str, Any] | None = None,
        overwrite: bool = False,
        **parts: Tree,
    ) -> Manifest:
        """Stores a module and returns its manifest.

        Args:
          name: letters, digits, `.`, `_`, `-`.
          module: nested dictionaries and lists of arrays, with None holes. It comes back with the same bits.
          base: the parameters that the module was trained on, or their `tree.fingerprint`.
          adapter: an `Adapter`, which knows its own settings, or the name of one and its `settings`.
          task, classes, metrics, seed, extra: kept in the manifest; plain values.
          overwrite: replace a module of that name. Between two renames neither the old nor the new one is visible.
          parts: further trees kept with the module, each of which `load` reads alone.

        Raises FileExistsError for a name that is taken, ValueError for a tree or name that cannot be stored, TypeError
        for settings that are not plain, OSError where the folder cannot be written. After any of them the pool is as
        it was.
        """
        target = self.path / _checked(name, "module")
        if jax.process_count() > 1:
            raise ValueError(
                f"module {name!r} cannot be added from a job of {jax.process_count()} processes: gather it "
                "(`jax.experimental.multihost_utils.process_allgather`), and add it from a job of one process"
            )
        if isinstance(base, str) and not re.fullmatch("[0-9a-f]{64}", base):
            raise ValueError(f"{base!r} is no fingerprint: give the base's parameters or `tree.fingerprint` of them")
        if isinstance(adapter, adapters.Adapter):
            adapter, settings = adapter.name, adapter.settings if settings is None else settings
        if target.exists() and not overwrite:
            raise self._taken(name)

        trees = {"module": module} | parts
        stored = {_checked(part, "part"): manifests.arrays(part, value) for part, value in trees.items()}
        if empty := [part for part, arrays in stored.items() if not jax.tree.leaves(arrays)]:
            raise ValueError(f"there is no array in part {empty[0]!r} of module {name!r}")
        manifest = Manifest(
            name=name,
            adapter=adapter,
            settings=settings or {},
            base=base if isinstance(base, str) else tree.fingerprint(base),
            task=task,
            classes=[str(label) for label in classes],
            metrics=metrics or {},
            seed=int(seed),
            extra=extra or {},
            versions=manifests.versions(),
            created=manifests.now(),
            parts={part: manifests.describe(arrays) for part, arrays in stored.items()},
        )
        manifests.dumps(manifest)  # so that a value JSON cannot hold is refused before anything is written
        with self._hidden(name) as hidden:
            new = hidden / "new"
            new.mkdir()
            # orbax refuses empty arrays; the manifest knows their shapes
            kept = {part: jax.tree.map(lambda x: x if x.size else None, arrays) for part, arrays in stored.items()}
            try:
                ocp.save_checkpointables(new / _ARRAYS, kept)
            except Exception as error:  # TensorStore says ValueError where the disk is full
                raise OSError(getattr(error, "errno", None) or errno.EIO, str(error).split(" [")[0][:400]) from error
            manifests.write(manifest, new)
            written = manifests.read(new)._replace(name=name)
            self._publish(name, new, hidden, overwrite)
        return written

    def load(self, name: str, part: str = "module") -> Tree:
        """A stored tree, its leaves NumPy arrays with the bits that were stored.

        Raises KeyError for an unknown module or part, ValueError where the arrays are not those of the manifest.
        """
        folder = self._folder(name)
        manifest = manifests.read(folder)
        if part not in manifest.parts:
            known = ", ".join(manifest.parts)
            raise KeyError(f"module {name!r} of the pool {self.path} has no part {part!r}; its parts: {known}")
        leaves = manifest.parts[part]["leaves"]

        def restored(path, leaf):
            return np.zeros(leaves[path][0], leaves[path][1]) if leaf is None and path in leaves else leaf

        try:
            loaded = ocp.load_checkpointables(folder / _ARRAYS, {part: None})[part]
            loaded = tree.map_with_name(restored, loaded)
            found = manifests.describe(loaded)
        except (PermissionError, MemoryError):
            raise
        except Exception as error:  # orbax and TensorStore raise many types for a damaged file
            raise self._damaged(name, part, str(error).split(" [")[0][:400]) from error
        if found != manifest.parts[part]:
            raise self._damaged(name, part, "they are not the arrays that its manifest describes")
        return loaded

    def remove(self, name: str) -> None:
        """Removes a module: first out of sight in one rename, then from the disk. KeyError for an unknown name."""
        folder = self._folder(name)
        with self._hidden(name) as hidden:
            os.rename(folder, hidden / "old")

    def compose(
        self, base: Tree, names: Sequence[str] | None = None, weights: Sequence[float] | jax.Array | None = None
    ) -> Tree:
        """`base + sum_t weights[t] * delta_t` over the modules `names` (default: all), with one module in memory.

        `weights` default to 1/T. Before any array is read, ValueError is raised for modules made on another base,
        damaged manifests and another number of weights, KeyError for unknown names.
        """
        names = self.names() if names is None else list(names)
        if not names:
            raise ValueError(f"there is no module to compose: of the {len(self)} in the pool {self.path} none is named")
        weights = [1 / len(names)] * len(names) if weights is None else [float(w) for w in weights]
        if len(weights) != len(names):
            raise ValueError(f"{len(weights)} weights were given for {len(names)} modules: {', '.join(names)}")

        own = tree.fingerprint(base)
        listed = [self.manifest(name) for name in names]
        if other := [f"{m.name} (on {m.base[:12]})" for m in listed if m.base != own]:
            raise ValueError(
                f"modules of {self.path} were made on another base than this one ({own[:12]}): {', '.join(other)}. "
                "Load the very parameters that they were trained on (same checkpoint, dtype and leaves), or leave "
                "these modules out of `names`"
            )
        total = None
        for manifest, adapter, weight in zip(listed, [self._adapter(m) for m in listed], weights, strict=True):
            total = _accumulate(total, adapter.delta(self.load(manifest.name), base), weight)
        return tree.add(base, total)

    def _adapter(self, manifest: Manifest) -> adapters.Adapter:
        try:
            return adapters.build(manifest.adapter, manifest.settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"the adapter of module {manifest.name!r} in {self.path} is not built: {error}") from error

    def _folder(self, name: str) -> Path:
        if name not in self:
            known = ", ".join(self.names()) or "none"
            raise KeyError(f"the pool {self.path} has no module {name!r}; its modules: {known}")
        return self.path / name

    @contextlib.contextmanager
    def _hidden(self, name: str) -> Iterator[Path]:
        """A hidden folder in the pool to write to, on the same file system; it goes with all that is left in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=self.path, ignore_cleanup_errors=True) as folder:
                yield Path(folder)
        except FileExistsError:
            raise
        except OSError as error:
            raise OSError(
                error.errno,
                f"module {name!r} of the pool {self.path} could not be changed ({error.strerror or error}) and is as "
                "it was: check that the folder is writable and its disk not full",
            ) from error

    def _publish(self, name: str, new: Path, hidden: Path, overwrite: bool) -> None:
        target = self.path / name
        for attempt in range(100):  # another process may take the name again and again, but not for ever
            try:
                return os.rename(new, target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                if not overwrite:
                    raise self._taken(name) from error
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, hidden / f"old{attempt}")
        raise self._taken(name)

    def _taken(self, name: str) -> FileExistsError:
        return FileExistsError(f"the pool {self.path} has a module {name!r}: choose another name or overwrite=True")

    def _damaged(self, name: str, part: str, why: str) -> ValueError:
        return ValueError(
            f"part {part!r} of module {name!r} in the pool {self.path} cannot be restored ({why}): files are damaged "
            "or missing, or the module was replaced just now. Try again, else remove it and add it again; the other "
            "modules are unaffected"
        )


def _accumulate(total: Tree | None, delta: Tree, weight: float) -> Tree:
    # a function, so that no name keeps the last delta alive while the next module is read
    return tree.weighted_sum([delta], [weight]) if total is None else tree.weighted_sum([total, delta], [1.0, weight])
