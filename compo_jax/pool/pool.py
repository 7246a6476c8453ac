"""Trained modules in a folder: each is stored whole by orbax, with a manifest, or is not there at all."""

import contextlib
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Sharding

from compo_jax import adapters, files, mesh
from compo_jax.curvature import Curvature
from compo_jax.pool import changes, composition, search, storage
from compo_jax.pool import curvature as curvatures
from compo_jax.pool import manifest as records
from compo_jax.pool.manifest import Manifest
from compo_jax.tree import Tree


class ModulePool:
    """The modules in the folder `path`, one subfolder each; the first `add` makes the folder.

    Several processes may read and change a pool at once. A reader finds a module as it was before a change or as it
    is after, whatever becomes of the writer; what a killed writer leaves is never read, and `clean` removes it. Every
    byte of a module is under a checksum. In a job of several processes (`mesh.start_distributed`) all call `add`,
    `attach` and `remove` at the same points with the same arguments; process 0 writes, and all find the change when
    they return. Between such calls all read the same parts: orbax counts, and waits where the numbers differ.

    A module is what has a manifest that a pool wrote. Whatever else lies in the folder, links among it, is never
    listed, followed, locked or removed; `check` names it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = files.local_path(path).absolute()
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"a pool is a folder, and {self.path} is a file: choose another path")

    # -- what is there -------------------------------------------------------------------------------------------------
    def names(self) -> list[str]:
        """The names of all modules, sorted.

        A damaged one, with the arrays that a pool wrote but a manifest that can't be read, is among them, so that it is
        not passed over silently; what has no manifest is none.
        """
        return search.names(self.path)

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(search.NAME.fullmatch(name)) and search.module(self.path / name)

    def manifest(self, name: str) -> Manifest:
        """The manifest of a module; KeyError for an unknown name, ValueError for a damaged module."""
        if not isinstance(name, str) or not search.NAME.fullmatch(name) or (self.path / name).is_symlink():
            self._folder(name)
        try:
            return records.read(self.path / name)
        except ValueError:
            self._folder(name)  # KeyError where it is none, or was removed just now
            raise

    def manifests(self) -> dict[str, Manifest]:
        """The manifests of all modules by name, sorted, no array read. A UserWarning names each damaged one."""
        return search.everything(self.path)

    def find(
        self,
        *,
        base: Tree | str | None = None,
        adapter: str | None = None,
        task: str | None = None,
        classes: str | Iterable[str | int] | None = None,
        curvature: str | None = None,
        where: Callable[[Manifest], bool] | None = None,
    ) -> list[str]:
        """The names of the modules that all of this is true of, sorted; no array is read.

        Args:
          base: the parameters that a module was trained on, or their fingerprint.
          adapter, task: the exact names.
          classes: the module knows any of them.
          curvature: the kind that is kept with it, "diagonal" or "kronecker".
          where: a predicate on the manifest, for all else.

        ValueError for what is no fingerprint and no kind. Damaged modules are not found, and named in a UserWarning.
        """
        wanted = search.predicate(base, adapter, task, classes, curvature, where)
        return [manifest.name for manifest in search.listed(self.path) if wanted(manifest)]

    def check(self, names: Sequence[str] | None = None) -> dict[str, str]:
        """What is damaged and why, by name: every byte of the modules `names` is read; {} when all is well.

        Whatever else lies in a module's folder, hidden files too, is named: `remove` would take it away. By default all
        modules, and then what lies in the pool and is no module is named too, but hidden files are not.
        KeyError for unknown names.
        """
        wrong = {}
        every = [entry.name for entry in search.visible(self.path)] if names is None else search.listing(names, "names")
        for name in every:
            try:
                for part in self.manifest(name).parts:
                    with contextlib.suppress(KeyError):  # replaced just now by one without this part
                        self._reading(name, part, storage.check)
                self._reading(name, "module", lambda folder, manifest, _: storage.known(folder, manifest))
            except (ValueError, OSError) as error:
                if os.path.lexists(self.path / name):  # else it was removed just now
                    wrong[name] = str(error)
            except KeyError:
                if names is not None:
                    raise
                if os.path.lexists(self.path / name):  # else it was removed just now
                    wrong[name] = (
                        f"{self.path / name} is no module: no pool wrote a manifest into it. It is not touched"
                    )
        return wrong

    # -- changes -------------------------------------------------------------------------------------------------------
    def add(
        self,
        name: str,
        module: Tree,
        *,
        base: Tree | str,
        adapter: str | adapters.Adapter,
        settings: dict[str, Any] | None = None,
        task: str = "",
        classes: Sequence[str | int] = (),
        metrics: dict[str, Any] | None = None,
        seed: int = 0,
        extra: dict[str, Any] | None = None,
        curvature: Curvature | None = None,
        overwrite: bool = False,
        check_finite: bool = True,
        check_adapter: bool = True,
        **parts: Tree,
    ) -> Manifest:
        """Stores a module and returns its manifest.

        Args:
          name: letters, digits, `.`, `_`, `-`.
          module: nested dictionaries and lists of arrays, with None holes. It comes back with the same bits. One of
            NNX or Equinox is stored as dictionaries (`tree.nested`), and so is curvature of their parameters; `deltas`
            and `compose` put them into the containers of the base.
          base: the parameters that the module was trained on, or their `tree.fingerprint`.
          adapter: an `Adapter`, which knows its own settings, or the name of one and its `settings`.
          task, classes, metrics, seed, extra: kept in the manifest; plain values.
          curvature: of the base on the module's data, to be kept with it, a Fisher diagonal or Kronecker factors;
            `attach` adds it later, or another kind.
          overwrite: replace a module of that name and all that was kept with it; it is visible all the time.
          check_finite: False stores NaN and infinite numbers on purpose.
          check_adapter: False stores a module of an adapter that `adapters.build` doesn't know, to be loaded and not to
            be composed.
          parts: further trees kept with the module, each of which `load` reads alone.

        Raises FileExistsError for a name that is taken, ValueError for a tree or name that cannot be stored, for an
        unknown adapter and for a module or a curvature that doesn't fit it or its base, TypeError for settings that are
        not plain or no curvature, OSError where the folder cannot be written. After any of them the pool is as it was.
        """
        target, module = self.path / search.checked(name, "module"), storage.in_dictionaries(module)
        if isinstance(adapter, adapters.Adapter):
            adapter, settings = adapter.name, adapter.settings if settings is None else settings
        changes.require_replaceable(target, overwrite)
        stored, kinds = storage.stored(name, {"module": module} | parts, curvature, check_finite)
        manifest = Manifest(
            name=name,
            adapter=adapter,
            settings=settings or {},
            base=search.fingerprint(base),
            task=task,
            classes=search.listing(classes, "classes"),
            metrics=metrics or {},
            seed=operator.index(seed) if hasattr(seed, "__index__") else seed,
            extra=extra or {},
            versions=records.versions(),
            created=records.now(),
            parts={part: storage.describe(arrays) for part, arrays in stored.items()},
            curvature=kinds,
            base_leaves={} if isinstance(base, str) else storage.leaves(base),
        )
        records.require_types(manifest)
        read = records.plain(manifest)  # so that a value JSON cannot hold is refused before anything is written
        if check_adapter:
            composition.require_fit(read, module, None if isinstance(base, str) else base)
        curvatures.require_own(manifest, curvature)
        with changes.hidden(self.path, name) as hidden:
            new = hidden / "new"
            manifest = manifest._replace(files=storage.write(new, stored))
            if mesh.is_writer():
                changes.publish(new, target, hidden / "old", manifest, overwrite)
        mesh.barrier("a module is there")
        return records.plain(manifest)

    def attach(
        self,
        name: str,
        *,
        curvature: Curvature | None = None,
        check_finite: bool = True,
        **parts: Tree,
    ) -> Manifest:
        """Adds parts to a module that is there, or replaces them, in one step; returns its new manifest.

        The other parts are not touched. Raises KeyError for an unknown module, ValueError for a damaged one, for a
        tree or a part's name that cannot be stored, for curvature of other parameters than the module's base, for NaN
        and infinite numbers unless `check_finite=False`, and for `module`, which is replaced by
        `add(..., overwrite=True)`.
        """
        manifest = self.manifest(name)
        if "module" in parts or (not parts and curvature is None):
            raise ValueError(
                f"there is nothing to attach to module {name!r}: give `curvature=` or parts by name, other than "
                "`module`, which `add(..., overwrite=True)` replaces with all that was kept with it"
            )
        stored, kinds = storage.stored(name, parts, curvature, check_finite)
        curvatures.require_own(manifest, curvature)
        described = {part: storage.describe(arrays) for part, arrays in stored.items()}
        with changes.hidden(self.path, name) as hidden:
            files = storage.write(hidden / "new", stored)
            if mesh.is_writer():
                with self._locked(name) as folder:
                    before = records.read(folder)  # another may have attached something since
                    storage.require_own(folder, before, stored.keys() & before.parts.keys())
                    manifest = before._replace(
                        parts=before.parts | described, curvature=before.curvature | kinds, files=before.files | files
                    )
                    changes.replace(folder, hidden / "new", hidden / "old", manifest)
        mesh.barrier("parts are there")
        return self.manifest(name)

    def remove(self, name: str, *, force: bool = False) -> None:
        """Removes a module: first out of sight in one rename, then from the disk.

        KeyError for an unknown name. ValueError, unless `force`, where its manifest is damaged, so that nobody knows
        what of its folder is its own, or where something else lies in its folder: that would be removed too.
        """
        self._folder(name)
        mesh.barrier("a module is found")
        if mesh.is_writer():
            with changes.hidden(self.path, name) as hidden, self._locked(name) as folder:
                if not force:
                    storage.require_own(folder, records.read(folder))
                os.rename(folder, hidden / "old")
        mesh.barrier("a module is gone")

    def clean(self) -> list[str]:
        """Removes what killed writers left, and returns what it was.

        A writer locks its hidden folder while it lives, on whatever host, so that nothing of a living one is touched;
        hidden folders that were never locked, and are empty, go after an hour.
        """
        return changes.clean(self.path) if self.path.is_dir() else []

    # -- arrays --------------------------------------------------------------------------------------------------------
    def load(
        self,
        name: str,
        part: str = "module",
        *,
        sharding: Sharding | Callable[[str], Sharding] | Tree | None = None,
    ) -> Tree:
        """A stored tree, its leaves NumPy arrays with the bits that were stored.

        Args:
          sharding: one for all leaves, a function of a leaf's path, or a tree of them. The leaves are then JAX arrays
            that are read straight onto their devices, each of which gets its own pieces only.

        Raises KeyError for an unknown module or part, ValueError where a file or the arrays are not as they were
        stored, and for a sharding that does not fit.
        """
        return self._reading(name, part, lambda *at: storage.load(*at, sharding))

    def curvature(self, name: str, kind: str | None = None) -> Curvature:
        """The curvature kept with a module, JAX arrays with the bits that were stored.

        Args:
          kind: "diagonal" or "kronecker"; default: the only one that is kept.

        Raises KeyError where none is kept, ValueError where there are two to choose from, and as `load`.
        """
        kind = curvatures.choose(self.manifest(name), kind)

        def read(folder, manifest, part):
            return curvatures.restored(kind, manifest, storage.load(folder, manifest, part))

        return self._reading(name, curvatures.part(kind), read)

    def compose(
        self,
        base: Tree,
        names: Sequence[str] | None = None,
        weights: Sequence[float] | jax.Array | None = None,
        *,
        check_finite: bool = True,
    ) -> Tree:
        """`base + sum_t weights[t] * delta_t` over the modules `names` (default: all), with one module in memory.

        `weights` default to 1/T. Before any array is read, ValueError is raised for modules made on another base,
        damaged manifests, another number of weights and weights that are not finite, KeyError for unknown names.
        ValueError also where a module is replaced while it is read, and where the result is not finite, unless
        `check_finite=False`: it names the modules that aren't.
        """
        names = self.chosen(names)
        weights = [1 / len(names)] * len(names) if weights is None else [float(w) for w in weights]
        if len(weights) != len(names):
            raise ValueError(f"{len(weights)} weights were given for {len(names)} modules: {', '.join(names)}")
        if odd := [name for name, weight in zip(names, weights, strict=True) if not math.isfinite(weight)]:
            raise ValueError(f"the weights of {', '.join(odd)} are not finite numbers: {weights}")
        composed = composition.compose(base, weights, self.deltas(base, names))
        if check_finite:
            composition.require_finite(composed, names, lambda: self.deltas(base, names))
        return composed

    def deltas(self, base: Tree, names: Sequence[str] | None = None) -> Iterator[Tree]:
        """The deltas of the modules `names` (default: all) on their base, each read when it is asked for.

        For `compose.merge` and whatever else wants several at once. Errors as `compose`.
        """
        return composition.deltas(base, self.chosen(names), self.manifest, lambda name: self.load(name))

    # -- helpers -------------------------------------------------------------------------------------------------------
    def chosen(self, names: Sequence[str] | None) -> list[str]:
        """The list `names`, or all names for None; TypeError for a text, ValueError where none is named."""
        names = self.names() if names is None else search.listing(names, "names")
        if not names:
            raise ValueError(f"there is no module to compose: of the {len(self)} in the pool {self.path} none is named")
        return names

    def _folder(self, name: str) -> Path:
        if name not in self:
            names = ", ".join(self.names()) or "none"
            raise KeyError(f"the pool {self.path} has no module {name!r}; its modules: {names}")
        return self.path / name

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[Path]:
        try:
            with changes.locked(self._folder(name)):
                yield self.path / name
        except FileNotFoundError:
            self._folder(name)  # KeyError where another removed it just now
            raise

    def _reading(self, name: str, part: str, read: Callable) -> Any:
        """`read(folder, manifest, part)`, again where the part was replaced meanwhile."""
        for _ in range(100):
            manifest = self.manifest(name)
            if part not in manifest.parts:
                parts = ", ".join(manifest.parts)
                raise KeyError(f"module {name!r} of the pool {self.path} has no part {part!r}; its parts: {parts}")
            try:
                return read(self.path / name, manifest, part)
            except storage.Damage as error:
                why = error
            if self.manifest(name).files.get(part) == manifest.files.get(part):
                break
        raise ValueError(
            f"part {part!r} of module {name!r} in the pool {self.path} cannot be restored ({why}): files are damaged, "
            "missing or not its own. Remove it and add it again; the other modules are unaffected"
        ) from why
