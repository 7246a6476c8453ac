"""How one part of a module lies on the disk: a folder that orbax writes, with the checksum of every file in it."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from compo_jax import mesh, tree
from compo_jax.pool import curvature as curvatures
from compo_jax.pool import manifest as manifests
from compo_jax.pool.manifest import Manifest
from compo_jax.pool.search import checked

Tree = Any
_TREE = "tree"
_OLD = "arrays"  # older versions kept all parts in one folder, without checksums of its files
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.[0-9a-f]{8}")
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
    context, own = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = own, {own}
    return context


def stored(name: str, parts: dict[str, Tree], curvature: Any) -> tuple[dict[str, Tree], dict[str, dict]]:
    """(parts as NumPy arrays, entries of the kinds of curvature), all of which can be stored."""
    if taken := [part for part in parts if checked(part, "part").split(".")[0] == "curvature"]:
        raise ValueError(f"the part {taken[0]!r} is where a pool keeps curvature: give it as `curvature=`")
    kinds = {}
    if curvature is not None:
        kind, entry, factors = curvatures.pack(curvature)
        parts, kinds = parts | {curvatures.part(kind): factors}, {kind: entry}
    found = {part: arrays(part, value) for part, value in parts.items()}
    if empty := [part for part, own in found.items() if not jax.tree.leaves(own)]:
        raise ValueError(f"there is no array in part {empty[0]!r} of module {name!r}")
    for part, own in found.items():
        _require_apart(part, own)
    return found, kinds


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
            "one: a pool stores dictionaries and lists of numeric arrays and None (`flax.serialization.to_state_dict` "
            "makes dictionaries of other containers, `jax.random.key_data` an array of a key)"
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


def _leaves(stored: Tree) -> dict[str, list]:
    leaves = zip(tree.names(stored), jax.tree.leaves(stored), strict=True)
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves}


def describe(stored: Tree) -> dict[str, Any]:
    """The entry of one stored tree in `Manifest.parts`."""
    return {"fingerprint": tree.fingerprint(stored), "leaves": _leaves(stored)}


def _sha256(file: str | Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    found = (os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names)
    return sorted(path.replace(os.sep, "/") for path in found)


def save(folder: Path, value: Tree) -> dict[str, Any]:
    """Writes a tree of NumPy arrays to `folder`, which is made; its entry in `Manifest.files`.

    Raises OSError for whatever goes wrong.
    """
    # orbax refuses empty arrays; the manifest knows their shapes
    kept = jax.tree.map(lambda x: x if x.size else None, value)
    try:
        ocp.save_checkpointables(folder, {_TREE: kept})
    except Exception as error:  # TensorStore says ValueError where the disk is full
        raise OSError(getattr(error, "errno", None) or errno.EIO, str(error).split(" [")[0][:400]) from error
    return {"folder": folder.name, "sha256": {path: _sha256(folder / path) for path in _files(folder)}}


def _place(folder: Path, manifest: Manifest, part: str) -> tuple[Path, str]:
    """Where orbax wrote a part, and under which name."""
    if part not in manifest.files:
        return folder / _OLD, part
    own = manifest.files[part]["folder"]
    if not _FOLDER.fullmatch(own):
        raise Damage(f"its manifest names the folder {own!r}, which no pool makes")
    return folder / own, _TREE


def folders(manifest: Manifest) -> set[str]:
    """The folders of a module that its manifest speaks of."""
    old = {_OLD} if set(manifest.parts) - set(manifest.files) else set()
    return old | {entry["folder"] for entry in manifest.files.values()}


def leftover(entry: str, manifest: Manifest) -> bool:
    """Whether a folder of a module is one that a writer has not put there yet, or has not taken away yet."""
    return (entry == _OLD or bool(_FOLDER.fullmatch(entry))) and entry not in folders(manifest)


def verify(folder: Path, manifest: Manifest, part: str, largest: int | None = None) -> None:
    """Damage where a file, of at most `largest` bytes, is missing or not as it was written."""
    place, _ = _place(folder, manifest, part)
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
    place, _ = _place(folder, manifest, part)
    if more := sorted(set(_files(place)) - set(manifest.files[part]["sha256"])):
        raise Damage(f"the file {place.name}/{more[0]} was put there and is none of its own")


def _planned(sharding: Sharding | Callable | Tree, leaves: dict[str, list]) -> dict[str, Sharding]:
    """The sharding of every leaf; ValueError for one that does not fit it."""
    if not isinstance(sharding, Sharding) and not callable(sharding):
        given = dict(zip(tree.names(sharding), jax.tree.leaves(sharding), strict=True))
        if missing := [path for path in leaves if path not in given]:
            raise ValueError(f"there is no sharding for {', '.join(missing)}: give a tree with one at each leaf's path")
    else:
        given = {path: sharding if isinstance(sharding, Sharding) else sharding(path) for path in leaves}
    for path, (shape, _) in leaves.items():
        if not isinstance(given[path], Sharding):
            raise ValueError(f"the sharding of {path} is {given[path]!r}: make one with `compo_jax.mesh`")
        try:
            given[path].shard_shape(tuple(shape))
        except ValueError as error:
            raise ValueError(f"the sharding of {path} does not fit its shape {tuple(shape)}: {error}") from error
    return given


def load(folder: Path, manifest: Manifest, part: str, sharding: Sharding | Callable | Tree | None = None) -> Tree:
    """A part as it was stored, or Damage; see `ModulePool.load`.

    NumPy arrays are verified by their fingerprint, so that large files are read once; sharded ones, which no device
    or process may hold whole, by the checksums of the files.
    """
    leaves = manifest.parts[part]["leaves"]
    plan = None if sharding is None else _planned(sharding, leaves)
    verify(folder, manifest, part, _SMALL if plan is None else None)
    place, name = _place(folder, manifest, part)

    def abstract(path, leaf):
        return None if leaf is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=plan[path])

    def restored(path, leaf):
        if leaf is not None or path not in leaves:
            return leaf
        empty = np.zeros(leaves[path][0], leaves[path][1])
        return empty if plan is None else jax.device_put(empty, plan[path])

    try:
        target = None
        if plan is not None:
            with _alone():
                target = tree.map_with_name(abstract, ocp.checkpointables_metadata(place).metadata[name])
        with _alone():
            loaded = tree.map_with_name(restored, ocp.load_checkpointables(place, {name: target})[name])
        found = _leaves(loaded)
        whole = (
            found == leaves if plan is not None and part in manifest.files else describe(loaded) == manifest.parts[part]
        )
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # orbax and TensorStore raise many types for a damaged file
        raise Damage(str(error).split(" [")[0][:400]) from error
    wide = [path for path in found if path in leaves and leaves[path][1].endswith(("64", "128"))]
    if rounded := [path for path in wide if leaves[path][1] != found[path][1]]:
        raise ValueError(
            f"{rounded[0]} is {leaves[rounded[0]][1]}, which JAX rounded to {found[rounded[0]][1]}: call "
            "`jax.config.update('jax_enable_x64', True)` (orbax's threads don't see a context), or load it unsharded"
        )
    if not whole:
        raise Damage("they are not the arrays that its manifest describes")
    return loaded


def known(folder: Path, manifest: Manifest) -> None:
    """Damage where something lies in a module's folder that is none of it."""
    own = {manifests.FILE, *folders(manifest)}
    for entry in sorted(set(os.listdir(folder)) - own):
        if not entry.startswith(".") and not leftover(entry, manifest):
            raise Damage(f"{entry!r} was put into its folder and is none of it: move it elsewhere")
