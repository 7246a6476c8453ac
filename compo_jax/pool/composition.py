"""The composition of a pool's modules on their base, one module in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from compo_jax import adapters, tree
from compo_jax.pool.manifest import Manifest

Tree = Any


def deltas(
    base: Tree, names: Sequence[str], manifest: Callable[[str], Manifest], load: Callable[[str], Tree]
) -> Iterator[Tree]:
    """The modules' deltas, each read when it is asked for; see `ModulePool.deltas`."""
    own = tree.fingerprint(base)
    listed = [manifest(name) for name in names]
    if other := [f"{m.name} (on {m.base[:12]})" for m in listed if m.base != own]:
        raise ValueError(
            f"modules were made on another base than this one ({own[:12]}): {', '.join(other)}. Load the very "
            "parameters that they were trained on (same checkpoint, dtype and leaves), or leave these modules out of "
            "`names`"
        )
    made = [_adapter(known) for known in listed]

    def read(known, adapter):
        module = load(known.name)
        if _made(manifest(known.name)) != _made(known):
            raise ValueError(f"module {known.name!r} was replaced while it was read: read it again")
        return adapter.delta(module, base)

    return map(read, listed, made)  # which keeps no delta alive while the next is read


def compose(base: Tree, weights: Sequence[float], deltas: Iterator[Tree]) -> Tree:
    """`base + sum_t weights[t] * delta_t`; see `ModulePool.compose`."""
    return tree.add(base, tree.weighted_sum(deltas, weights, wide=True))


def _adapter(manifest: Manifest) -> adapters.Adapter:
    try:
        return adapters.build(manifest.adapter, manifest.settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the adapter of module {manifest.name!r} is not built: {error}") from error


def _made(manifest: Manifest) -> tuple:
    return manifest.base, manifest.adapter, manifest.settings, manifest.parts["module"]["fingerprint"]
