"""The composition of a pool's modules on their base, one module in memory at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from compo_jax import adapters, tree
from compo_jax.pool.manifest import Manifest

Tree = Any


def compose(
    base: Tree,
    names: Sequence[str],
    weights: Sequence[float] | jax.Array | None,
    manifest: Callable[[str], Manifest],
    load: Callable[[str], Tree],
) -> Tree:
    """`base + sum_t weights[t] * delta_t`; see `ModulePool.compose`."""
    weights = [1 / len(names)] * len(names) if weights is None else [float(w) for w in weights]
    if len(weights) != len(names):
        raise ValueError(f"{len(weights)} weights were given for {len(names)} modules: {', '.join(names)}")
    own = tree.fingerprint(base)
    listed = [manifest(name) for name in names]
    if other := [f"{m.name} (on {m.base[:12]})" for m in listed if m.base != own]:
        raise ValueError(
            f"modules were made on another base than this one ({own[:12]}): {', '.join(other)}. Load the very "
            "parameters that they were trained on (same checkpoint, dtype and leaves), or leave these modules out of "
            "`names`"
        )
    total = None
    for known, adapter, weight in zip(listed, [_adapter(m) for m in listed], weights, strict=True):
        total = _accumulate(total, adapter.delta(load(known.name), base), weight)
        if _made(manifest(known.name)) != _made(known):
            raise ValueError(f"module {known.name!r} was replaced while it was read: compose again")
    return tree.add(base, total)


def _adapter(manifest: Manifest) -> adapters.Adapter:
    try:
        return adapters.build(manifest.adapter, manifest.settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the adapter of module {manifest.name!r} is not built: {error}") from error


def _made(manifest: Manifest) -> tuple:
    return manifest.base, manifest.adapter, manifest.settings, manifest.parts["module"]["fingerprint"]


def _accumulate(total: Tree | None, delta: Tree, weight: float) -> Tree:
    # a function, so that no name keeps the last delta alive while the next module is read
    return tree.weighted_sum([delta], [weight]) if total is None else tree.weighted_sum([total, delta], [1.0, weight])
