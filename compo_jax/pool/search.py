"""What lies in a pool's folder, by its manifests alone."""

import gc
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from compo_jax import tree
from compo_jax.pool import curvature as curvatures
from compo_jax.pool import manifest as manifests
from compo_jax.pool.manifest import Manifest
from compo_jax.tree import Tree

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def checked(name: Any, what: str) -> str:
    """The name; ValueError where it cannot be a folder's in a pool."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a {what}: use the letters a to z, digits, '.', '_' and '-', a letter or a digit "
            "first, 128 at most"
        )
    return name


def fingerprint(base: Tree | str) -> str:
    """Of parameters, or the very one that is given; ValueError for a text that is none."""
    if isinstance(base, str) and not re.fullmatch("[0-9a-f]{64}", base):
        raise ValueError(f"{base!r} is no fingerprint: give the base's parameters or `tree.fingerprint` of them")
    return base if isinstance(base, str) else tree.fingerprint(base)


def visible(pool: Path) -> list[os.DirEntry]:
    """All that lies in a pool and is not hidden, by name."""
    if not pool.is_dir():
        return []
    with os.scandir(pool) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)


def names(pool: Path) -> list[str]:
    """See `ModulePool.names`."""
    return [entry.name for entry in visible(pool) if module(Path(entry.path))]


def module(folder: Path) -> bool:
    """Whether a pool's entry is a module."""
    return bool(NAME.fullmatch(folder.name)) and manifests.ours(folder)


def listing(texts: Iterable[str | int], what: str) -> list[str]:
    """The texts as a list; TypeError where one text is given for it, each letter of which would be taken for one."""
    if isinstance(texts, str):
        raise TypeError(f"{what} is the text {texts!r} and should be a list: [{texts!r}]")
    return [str(text) for text in texts]


def listed(pool: Path) -> Iterator[Manifest]:
    """The manifests one by one, so that whoever looks for some does not hold all; see `ModulePool.manifests`."""
    for entry in visible(pool):
        if not NAME.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        try:
            yield manifests.read(pool / entry.name)
        except (ValueError, PermissionError) as error:
            if module(pool / entry.name):  # else it is none, or was removed just now
                warnings.warn(str(error), UserWarning, stacklevel=4)


def everything(pool: Path) -> dict[str, Manifest]:
    """See `ModulePool.manifests`."""
    collecting = gc.isenabled()
    gc.disable()  # it takes half of the time, to look through many containers again and again of which none is garbage
    try:
        return {manifest.name: manifest for manifest in listed(pool)}
    finally:
        if collecting:
            gc.enable()


def predicate(
    base: Tree | str | None,
    adapter: str | None,
    task: str | None,
    classes: str | Iterable[str | int] | None,
    curvature: str | None,
    where: Callable[[Manifest], bool] | None,
) -> Callable[[Manifest], bool]:
    """See `ModulePool.find`."""
    of_base = None if base is None else fingerprint(base)
    wanted = None if classes is None else {classes} if isinstance(classes, str) else set(map(str, classes))
    if curvature is not None:
        curvatures.part(curvature)  # ValueError for an unknown kind
    return lambda manifest: bool(
        (of_base is None or manifest.base == of_base)
        and (adapter is None or manifest.adapter == adapter)
        and (task is None or manifest.task == task)
        and (wanted is None or wanted & set(manifest.classes))
        and (curvature is None or curvature in manifest.curvature)
        and (where is None or where(manifest))
    )
