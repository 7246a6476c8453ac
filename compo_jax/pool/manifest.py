"""The manifest of a stored module: what it is, how it was made, and what its arrays and files must look like."""

import hashlib
import importlib.metadata
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import jax
import numpy as np

from compo_jax import files

FILE = "manifest.json"
LOCK = ".lock"
_PACKAGES = ("compo_jax", "jax", "flax", "orbax-checkpoint")
ARRAYS = "arrays"  # older versions kept all parts in one folder, without checksums of its files
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.[0-9a-f]{8}")
_ORBAX = ("_CHECKPOINT_METADATA", "orbax.checkpoint")
_SEAL = ',\n "checksum": "'


class Manifest(NamedTuple):
    """What a pool knows of a module without reading its arrays; everything in it is plain JSON.

    Attributes:
      name: the module's name in its pool.
      adapter, settings: `compo_jax.adapters.build(adapter, settings)` makes its adapter again.
      base: `compo_jax.tree.fingerprint` of the base parameters that it was trained on.
      task, classes, metrics, seed, extra: of the run that made it, as `add` was told.
      versions: of the packages that wrote it; "unknown" for one that was not installed.
      created: time of writing, ISO 8601, UTC.
      parts: for each stored tree its fingerprint and its leaves, `{path: [shape, dtype]}`.
      curvature: for each kind kept, "diagonal" or "kronecker", its `count` of images and what else is no array.
      files: for each part its folder, and the SHA-256 of every file in it; what older versions wrote has none.
      base_leaves: the base's leaves, as those of a part; {} where only its fingerprint was told.
    """

    name: str
    adapter: str
    settings: dict[str, Any]
    base: str
    task: str
    classes: list[str]
    metrics: dict[str, Any]
    seed: int
    extra: dict[str, Any]
    versions: dict[str, str]
    created: str
    parts: dict[str, dict[str, Any]]
    curvature: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}
    base_leaves: dict[str, list] = {}


_TYPES = {key: get_origin(kind) or kind for key, kind in Manifest.__annotations__.items()}


def versions() -> dict[str, str]:
    """The installed versions of the packages that write a module."""

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    return {package: version(package) for package in _PACKAGES}


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value):
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{value!r} is no plain value: a manifest holds numbers, strings, lists and dictionaries")


def _sealed(text: str) -> str:
    """JSON without its last brace, closed by the checksum of all before it, so that no byte changes unseen."""
    return f'{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}"\n}}'


def dumps(manifest: Manifest) -> str:
    """The manifest as JSON; NumPy and JAX numbers become plain ones, TypeError for what JSON cannot hold."""
    return _sealed(json.dumps(manifest._asdict(), indent=1, default=_plain).removesuffix("\n}"))


def plain(manifest: Manifest) -> Manifest:
    """The manifest as `read` finds it when it is written."""
    return Manifest(**json.loads(json.dumps(manifest._asdict(), default=_plain)))


def write(manifest: Manifest, folder: Path) -> None:
    """Writes `folder/manifest.json`."""
    (folder / FILE).write_bytes(dumps(manifest).encode())


def made_by_orbax(folder: Path) -> bool:
    """Whether a part's arrays lie in `folder`, not behind a link: it holds what orbax writes beside them."""
    return not folder.is_symlink() and any((folder / name).is_file() for name in _ORBAX)


def ours(folder: Path) -> bool:
    """Whether `folder` is a module: it has a manifest of ours, or the arrays beside a damaged one say it is."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        read(folder)
        return True
    except PermissionError:
        return os.path.lexists(folder / FILE)
    except ValueError:
        pass
    try:
        entries = os.listdir(folder)
    except OSError:  # removed just now, or another user's
        return False
    parts = [entry for entry in entries if entry == ARRAYS or PART.fullmatch(entry)]
    return FILE in entries and any(made_by_orbax(folder / entry) for entry in parts)


def _regular(file: str, flags: int) -> int:
    return os.open(file, flags | files.NO_LINK | getattr(os, "O_NONBLOCK", 0))  # no link, and no pipe to wait at


def require_types(manifest: Manifest) -> None:
    """TypeError where an entry is of another type than it is read back as."""
    for key, kind in _TYPES.items():
        if not isinstance(value := getattr(manifest, key), kind):
            raise TypeError(f"its {key} is a {type(value).__name__} and should be a {kind.__name__}")


def read(folder: Path) -> Manifest:
    """The manifest of the module in `folder`; ValueError where there is none or it is damaged."""
    advice = (
        f"remove {folder.name!r} with all that lies in it, `remove({folder.name!r}, force=True)`, and add it again; "
        "the other modules are unaffected"
    )
    try:
        with open(folder / FILE, "rb", opener=_regular) as file:
            text = file.read().decode()
        fields = json.loads(text)
        # older versions wrote no checksum
        if fields.pop("checksum", None) is not None and text != _sealed(text[: text.rfind(_SEAL)]):
            raise ValueError("its checksum is not that of its text: it was damaged, or edited by hand")
        # a module is called as its folder is, so that renaming the folder renames the module
        manifest = Manifest(**(fields | {"name": folder.name}))
        require_types(manifest)
        return manifest
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no {FILE} and so is no module") from error
    except PermissionError:
        raise
    except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(
            f"the {FILE} of {folder} is damaged or of another version of compo_jax ({error}): {advice}"
        ) from error
