"""How one part of a module lies on the disk: a folder that orbax writes, with the checksum of every file in it."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from compo_jax import files, mesh, tree
from compo_jax.curvature import Curvature, pack
from compo_jax.pool import curvature as curvatures
from compo_jax.pool import manifest as manifests
from compo_jax.pool.manifest import Manifest
from compo_jax.pool.search import checked
from compo_jax.tree import Tree

_TREE = "tree"
_SMALL = 2**20  # bytes: orbax's own files are smaller


class Damage(ValueError):
    """Why a part cannot be restored."""


def write(new: Path, stored: dict[str, Tree]) -> dict[str, dict]:
    """Each part in a folder of its own in `new`, named so that no other writer's is; `Manifest.files`."""
    new.mkdir()
    made = {part: save(_agreed(new / f"{part}.{secrets.token_hex(4)}"), value) for part, value in stored.items()}
    mesh.barrier("the parts are read back")
    return made


def _agreed(path: Path) -> Path:
    """Process 0's: orbax lets it write, and the others wait at the same path."""
    if not mesh.several():
        return path
    text = np.frombuffer(os.fsencode(path).ljust(4096, b"\0"), np.uint8)
    return Path(os.fsdecode(mesh.agreed(text).tobytes().rstrip(b"\0")))


def _alone() -> contextlib.AbstractContextManager:
    """What orbax reads within waits for no other process of the job."""
    if not mesh.several():
        return contextlib.nullcontext()
    from orbax.checkpoint import v1 as ocp

    context, process = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = process, {process}
    return context


def stored(
    name: str, parts: dict[str, Tree], curvature: Curvature | None, check_finite: bool
) -> tuple[dict[str, Tree], dict[str, dict]]:
    """(parts as NumPy arrays, entries of the kinds of curvature), all of which can be stored."""
    if taken := [part for part in parts if checked(part, "part").split(".")[0] == "curvature"]:
        raise ValueError(f"the part {taken[0]!r} is where a pool keeps curvature: give it as `curvature=`")
    kinds = {}
    if curvature is not None:
        packed = pack(curvature)
        of_curvature = {key: in_dictionaries(value) for key, value in packed.arrays.items()}
        parts, kinds = parts | {curvatures.part(packed.kind): of_curvature}, {packed.kind: packed.plain}
    checked_parts = {part: arrays(part, value) for part, value in parts.items()}
    if empty := [part for part, value in checked_parts.items() if not jax.tree.leaves(value)]:
        raise ValueError(f"there is no array in part {empty[0]!r} of module {name!r}")
    for part, value in checked_parts.items():
        _require_apart(part, value)
        if check_finite:
            tree.require_finite(curvatures.measured(part, value), f"part {part!r} of module {name!r}")
    return checked_parts, kinds


def in_dictionaries(value: Tree) -> Tree:
    """What lies in other containers anywhere, a State of NNX, a module of Equinox or a NamedTuple say, in dictionaries,
    which find their place in such a base by their paths (`tree.regrown`); what is plain as it is."""
    return value if tree.is_plain(value) else tree.nested(value)


def arrays(part: str, value: Tree, path: str = "") -> Tree:
    """`value` with NumPy arrays for leaves; ValueError for what would not come back as it was."""
    if value is None:
        return None
    if type(value) is list:
        return [arrays(part, child, f"{path}/{i}") for i, child in enumerate(value)]
    if type(value) is dict:
        if bad := [key for key in value if not isinstance(key, str) or not key or "/" in key]:
            raise ValueError(f"part {part!r} has the key {bad[0]!r} in {path or '/'}: keys are strings without a slash")
        return {key: arrays(part, child, f"{path}/{key}") for key, child in value.items()}
    dtype = np.dtype(type(value)) if isinstance(value, float | int) else getattr(value, "dtype", None)
    if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_)):
        raise ValueError(
            f"part {part!r} has a {type(value).__name__} ({dtype}) at {path or '/'}, which would not be restored as "
            "one: a pool stores dictionaries and lists of numeric arrays and None (`tree.nested` makes dictionaries of "
            "other containers, `jax.random.key_data` an array of a key)"
        )
    array = np.asarray(mesh.fetch(value))
    return array.astype(array.dtype.newbyteorder("="))  # orbax reads back the machine's own byte order only


def _require_apart(part: str, value: Tree) -> None:
    """ValueError where orbax, which joins the keys of a path by dots, would write two leaves into one file."""
    seen: dict[str, str] = {}
    for path in tree.names(value):
        other = seen.setdefault(path.replace("/", "."), path)
        if other != path:
            raise ValueError(f"part {part!r} has the paths {other} and {path}, one file on the disk: rename a key")


def leaves(stored: Tree) -> dict[str, list]:
    """The shapes and types of a tree's leaves by path, as in `Manifest.parts`."""
    named = zip(tree.names(stored), jax.tree.leaves(stored), strict=True)
    return {
        name: [list(np.shape(leaf)), str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)]
        for name, leaf in named
    }


def describe(stored: Tree) -> dict[str, Any]:
    """The entry of one stored tree in `Manifest.parts`."""
    return {"fingerprint": tree.fingerprint(stored), "leaves": leaves(stored)}


def _sha256(file: str | Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    """All files below `folder`, and links, which are not followed."""
    paths = []
    for at, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(at, name))]
        paths += [os.path.relpath(os.path.join(at, name), folder) for name in names + links]
    return sorted(path.replace(os.sep, "/") for path in paths)


def save(folder: Path, value: Tree) -> dict[str, Any]:
    """Writes a tree of NumPy arrays to `folder`, which is made; its entry in `Manifest.files`.

    Raises OSError for whatever goes wrong.
    """
    from orbax.checkpoint import v1 as ocp

    # orbax refuses empty arrays; the manifest knows their shapes
    kept = jax.tree.map(lambda x: x if x.size else None, value)
    try:
        with files.one_error():
            ocp.save_checkpointables(folder, {_TREE: kept})
    except Exception as error:  # TensorStore says ValueError where the disk is full
        raise files.write_error(error) from error
    return {"folder": folder.name, "sha256": {path: _sha256(folder / path) for path in _files(folder)}}


def _place(folder: Path, manifest: Manifest, part: str) -> tuple[Path, str]:
    """Where orbax wrote a part, and under which name."""
    if part not in manifest.files:
        return folder / manifests.ARRAYS, part
    name = manifest.files[part]["folder"]
    if not manifests.PART.fullmatch(name):
        raise Damage(f"its manifest names the folder {name!r}, which no pool makes")
    return folder / name, _TREE


def folders(manifest: Manifest) -> set[str]:
    """The folders of a module that its manifest speaks of."""
    old = {manifests.ARRAYS} if set(manifest.parts) - set(manifest.files) else set()
    return old | {entry["folder"] for entry in manifest.files.values()}


def leftover(folder: Path, entry: str, manifest: Manifest) -> bool:
    """Whether what lies in a module's folder was put there by a writer too early, or has not been taken away yet."""
    named = entry == manifests.ARRAYS or manifests.PART.fullmatch(entry)
    if entry in folders(manifest) or not named or (folder / entry).is_symlink():
        return False
    try:  # what was taken away by half lacks the files that orbax writes beside the arrays
        return manifests.made_by_orbax(folder / entry) or set(os.listdir(folder / entry)) <= {_TREE}
    except OSError:
        return False


def foreign(folder: Path, manifest: Manifest, parts: Iterable[str] | None = None) -> list[str]:
    """What lies in a module's folder, or in those of some of its parts, and is none of it."""
    others = []
    if parts is None:
        ours = {manifests.FILE, manifests.LOCK, *folders(manifest)}
        others = [e for e in os.listdir(folder) if e not in ours and not leftover(folder, e, manifest)]
        others = [e for e in others if os.path.lexists(folder / e)]  # else a writer has just taken it away
        parts = manifest.parts
    for part in parts:
        if part in manifest.files:
            place, _ = _place(folder, manifest, part)
            if place.is_symlink():
                others.append(place.name)
            else:
                others += [f"{place.name}/{path}" for path in set(_files(place)) - set(manifest.files[part]["sha256"])]
    return sorted(others)


def require_own(folder: Path, manifest: Manifest, parts: Iterable[str] | None = None) -> None:
    """ValueError where something else would be removed with a module, or with some of its parts."""
    if others := foreign(folder, manifest, parts):
        raise ValueError(
            f"in {folder} lies what is none of the module's ({', '.join(others[:8])}): move it elsewhere, or remove "
            f"the module with all that lies there, `remove({folder.name!r}, force=True)`"
        )


def verify(folder: Path, manifest: Manifest, part: str, largest: int | None = None) -> None:
    """Damage where a file, of at most `largest` bytes, is missing or not as it was written."""
    place, _ = _place(folder, manifest, part)
    if links := [path for path in (place, *(place / file for file in _files(place))) if path.is_symlink()]:
        raise Damage(f"{links[0].relative_to(folder)} is a link, which is not followed")
    for path, digest in manifest.files.get(part, {"sha256": {}})["sha256"].items():
        try:
            large = largest is not None and os.stat(place / path).st_size > largest
            whole = large or _sha256(place / path) == digest
        except PermissionError:
            raise
        except OSError as error:
            raise Damage(f"its file {place.name}/{path} is missing or cannot be read: {error.strerror}") from error
        if not whole:
            raise Damage(f"its file {place.name}/{path} is not as it was written")


def check(folder: Path, manifest: Manifest, part: str) -> None:
    """Damage where any byte of a part's files is not as it was written, or a file was put there."""
    if part not in manifest.files:
        load(folder, manifest, part)
        return
    verify(folder, manifest, part)
    if more := foreign(folder, manifest, [part]):
        raise Damage(f"the file {more[0]} was put there and is none of its own")


def _planned(sharding: Sharding | Callable | Tree, leaves: dict[str, list]) -> dict[str, Sharding]:
    """The sharding of every leaf; ValueError for one that does not fit it."""
    if not isinstance(sharding, Sharding) and not callable(sharding):
        shardings = tree.by_name(sharding)
        if missing := [path for path in leaves if path not in shardings]:
            raise ValueError(f"there is no sharding for {', '.join(missing)}: give a tree with one at each leaf's path")
    else:
        shardings = {path: sharding if isinstance(sharding, Sharding) else sharding(path) for path in leaves}
    for path, (shape, _) in leaves.items():
        if not isinstance(shardings[path], Sharding):
            raise ValueError(f"the sharding of {path} is {shardings[path]!r}: make one with `compo_jax.mesh`")
        try:
            shardings[path].shard_shape(tuple(shape))
        except ValueError as error:
            raise ValueError(f"the sharding of {path} does not fit its shape {tuple(shape)}: {error}") from error
    return shardings


def load(folder: Path, manifest: Manifest, part: str, sharding: Sharding | Callable | Tree | None = None) -> Tree:
    """A part as it was stored, or Damage; see `ModulePool.load`.

    NumPy arrays are verified by their fingerprint, so that large files are read once; sharded ones, which no device
    or process may hold whole, by the checksums of the files.
    """
    from orbax.checkpoint import v1 as ocp

    described = manifest.parts[part]["leaves"]
    plan = None if sharding is None else _planned(sharding, described)
    verify(folder, manifest, part, _SMALL if plan is None else None)
    place, name = _place(folder, manifest, part)

    def abstract(path, leaf):
        return None if leaf is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=plan[path])

    def restored(path, leaf):
        if leaf is not None or path not in described:
            return leaf
        empty = np.zeros(*described[path])
        return empty if plan is None else jax.device_put(empty, plan[path])

    try:
        target = None
        if plan is not None:
            with _alone():
                target = tree.map_with_name(abstract, ocp.checkpointables_metadata(place).metadata[name])
        with _alone(), files.one_error():
            loaded = tree.map_with_name(restored, ocp.load_checkpointables(place, {name: target})[name])
        restored_leaves = leaves(loaded)
        if plan is not None and part in manifest.files:
            whole = restored_leaves == described
        else:
            whole = describe(loaded) == manifest.parts[part]
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # orbax and TensorStore raise many types for a damaged file
        raise Damage(str(error).split(" [")[0][:400]) from error
    wide = [path for path in restored_leaves if path in described and described[path][1].endswith(("64", "128"))]
    if rounded := [path for path in wide if described[path][1] != restored_leaves[path][1]]:
        raise ValueError(
            f"{rounded[0]} is {described[rounded[0]][1]}, which JAX rounded to {restored_leaves[rounded[0]][1]}: call "
            "`jax.config.update('jax_enable_x64', True)` (orbax's threads don't see a context), or load it unsharded"
        )
    if not whole:
        raise Damage("they are not the arrays that its manifest describes")
    return loaded


def known(folder: Path, manifest: Manifest) -> None:
    """Damage where something lies in a module's folder that is none of it."""
    if more := foreign(folder, manifest):
        raise Damage(f"{more[0]!r} was put into its folder and is none of it: move it elsewhere")
