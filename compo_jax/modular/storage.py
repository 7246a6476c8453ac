"""A modular network's templates and its tasks' own parts in a pool of modules."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from compo_jax import tree
from compo_jax.modular.edit import take_tasks
from compo_jax.modular.layout import parted
from compo_jax.modular.net import ModularNet, Network
from compo_jax.pool import Manifest, ModulePool
from compo_jax.tree import Tree

SHARED, TASK = "modular-templates", "modular-task"


def _settings(net: ModularNet) -> dict[str, Any]:
    names = ("layers", "templates", "width", "patch", "block", "bn", "mixing", "route", "start", "groups", "gain")
    names += ("shared_head",)
    return {name: getattr(net, name) for name in names}


def _without_holes(parts: Tree) -> Tree:
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(parts).items() if leaf is not None})


def _shared(network: Network) -> Tree:
    return _without_holes(parted(network).shared)


def save_templates(pool: ModulePool, name: str, network: Network, **options: Any) -> Manifest:
    """Stores what all tasks share: stem, templates, and BN or a head where they are shared.

    `options` are those of `ModulePool.add`: metrics, seed, extra, overwrite.
    """
    shared, settings = _shared(network), _settings(network.net)
    return pool.add(name, shared, base=shared, adapter=SHARED, settings=settings, check_adapter=False, **options)


def save_task(pool: ModulePool, name: str, network: Network, index: int, **options: Any) -> Manifest:
    """Stores what task number `index` has of its own: route, head, BN with its statistics. Its base is what it shares.

    `options` are those of `ModulePool.add`: task (its name), classes (their names), metrics, ...
    """
    one = take_tasks(network, [index])
    settings = _settings(network.net) | {"classes": one.net.classes[0]}
    module, shared = _without_holes(parted(one).of_tasks), _shared(one)
    return pool.add(name, module, base=shared, adapter=TASK, settings=settings, check_adapter=False, **options)


def load_templates(pool: ModulePool, name: str) -> Tree:
    """What `save_templates` stored, for `load_task`."""
    _manifest(pool, name, SHARED)
    return pool.load(name)


def load_task(pool: ModulePool, name: str, shared: Tree) -> Network:
    """The one-task network of a stored task on these templates; `add_task` joins several.

    ValueError where the task was stored against other templates.
    """
    manifest = _manifest(pool, name, TASK)
    if manifest.base != (fingerprint := tree.fingerprint(shared)):
        raise ValueError(
            f"task {name!r} of {pool.path} was stored against other templates ({manifest.base[:12]}) than these "
            f"({fingerprint[:12]}): load the templates that were stored with it"
        )
    settings = {"route": "hard"} | manifest.settings  # older pools have hard routes and don't say so
    net = ModularNet(classes=(settings.pop("classes"),), **settings)
    variables = unflatten_dict(flatten_dict(shared) | flatten_dict(pool.load(name)))
    return Network(net, jax.tree.map(jnp.asarray, variables))


def _manifest(pool: ModulePool, name: str, kind: str) -> Manifest:
    manifest = pool.manifest(name)
    if manifest.adapter != kind:
        raise ValueError(f"module {name!r} of {pool.path} is of the kind {manifest.adapter!r}, and {kind!r} is wanted")
    return manifest
