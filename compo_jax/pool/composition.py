"""The composition of a pool's modules on their base, one module in memory at a time."""

from collections.abc import Callable, Iterator, Sequence

import jax

from compo_jax import adapters, tree
from compo_jax.pool.manifest import Manifest
from compo_jax.tree import Tree


def deltas(
    base: Tree, names: Sequence[str], manifest: Callable[[str], Manifest], load: Callable[[str], Tree]
) -> Iterator[Tree]:
    """The modules' deltas, each read when it is asked for; see `ModulePool.deltas`."""
    of_base = tree.fingerprint(base)
    listed = [manifest(name) for name in names]
    if other := [f"{m.name} (on {m.base[:12]})" for m in listed if m.base != of_base]:
        raise ValueError(
            f"modules were made on another base than this one ({of_base[:12]}): {', '.join(other)}. Load the very "
            "parameters that they were trained on (same checkpoint, dtype and leaves), or leave these modules out of "
            "`names`"
        )
    made = [_adapter(listed_manifest) for listed_manifest in listed]

    def read(listed_manifest, adapter):
        module = load(listed_manifest.name)
        if _made(manifest(listed_manifest.name)) != _made(listed_manifest):
            raise ValueError(f"module {listed_manifest.name!r} was replaced while it was read: read it again")
        return adapter.delta(module, base)

    return map(read, listed, made)  # which keeps no delta alive while the next is read


def compose(base: Tree, weights: Sequence[float], deltas: Iterator[Tree]) -> Tree:
    """`base + sum_t weights[t] * delta_t`; see `ModulePool.compose`."""
    return tree.add(base, tree.weighted_sum(deltas, weights, wide=True))


def require_finite(composed: Tree, names: Sequence[str], deltas: Callable[[], Iterator[Tree]]) -> None:
    """ValueError where the composition is not finite: it names the modules that aren't, read once more to be found."""
    try:
        tree.require_finite(composed, f"the composition of {', '.join(names)}")
    except ValueError:
        for name, delta in zip(names, deltas(), strict=True):
            tree.require_finite(delta, f"the delta of module {name!r}")
        raise


def require_fit(manifest: Manifest, module: Tree, base: Tree | None) -> None:
    """ValueError where a module's adapter can't be built, or the module is not one of its for the base."""
    adapter = _adapter(manifest)
    if base is None:
        return
    try:
        delta = jax.eval_shape(adapter.delta, module, base)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"module {manifest.name!r} is none of the adapter {manifest.adapter!r} for this base ({why}): was it made "
            "for other parameters, or by another adapter?"
        ) from error
    tree.require_like(delta, base, f"the delta of module {manifest.name!r}")


def _adapter(manifest: Manifest) -> adapters.Adapter:
    try:
        return adapters.build(manifest.adapter, manifest.settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the adapter of module {manifest.name!r} is not built: {error}") from error


def _made(manifest: Manifest) -> tuple:
    return manifest.base, manifest.adapter, manifest.settings, manifest.parts["module"]["fingerprint"]
