"""The manifest of a stored module: what it is, how it was made, and what its arrays must look like."""

import importlib.metadata
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree

Tree = Any
_FILE = "manifest.json"
_PACKAGES = ("compo_jax", "jax", "flax", "orbax-checkpoint")


class Manifest(NamedTuple):
    """What a pool knows of a module without reading its arrays; everything in it is plain JSON.

    Attributes:
      name: the module's name in its pool.
      adapter, settings: `compo_jax.adapters.build(adapter, settings)` makes its adapter again.
      base: `compo_jax.tree.fingerprint` of the base parameters that it was trained on.
      task, classes, metrics, seed, extra: of the run that made it, as given.
      versions: of the packages that wrote it; "unknown" for one that was not installed.
      created: time of writing, ISO 8601, UTC.
      parts: for each stored tree its fingerprint and its leaves, `{path: [shape, dtype]}`.
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
    return np.asarray(value)


def describe(stored: Tree) -> dict[str, Any]:
    """The entry of one stored tree in `Manifest.parts`."""
    leaves = zip(tree.names(stored), jax.tree.leaves(stored), strict=True)
    return {
        "fingerprint": tree.fingerprint(stored),
        "leaves": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves},
    }


def _plain(value):
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{value!r} is no plain value: a manifest holds numbers, strings, lists and dictionaries")


def dumps(manifest: Manifest) -> str:
    """The manifest as JSON; NumPy and JAX numbers become plain ones, TypeError for what JSON cannot hold."""
    return json.dumps(manifest._asdict(), indent=1, default=_plain)


def write(manifest: Manifest, folder: Path) -> None:
    """Writes `folder/manifest.json`."""
    (folder / _FILE).write_text(dumps(manifest), encoding="utf-8")


def read(folder: Path) -> Manifest:
    """The manifest of the module in `folder`; ValueError where there is none or it is damaged."""
    advice = f"remove {folder.name!r} from the pool and add it again; the other modules are unaffected"
    try:
        fields = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        # a module is called as its folder is, so that renaming the folder renames the module
        return Manifest(**(fields | {"name": folder.name}))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no {_FILE} and so is no module of this pool: {advice}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the {_FILE} of {folder} is damaged or of another version of compo_jax ({error}): {advice}"
        ) from error
