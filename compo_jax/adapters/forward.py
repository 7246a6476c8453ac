"""The forward pass of an adapted Linen model, by the adapter's short cut through dense layers where it has one."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from compo_jax import tree
from compo_jax.adapters.adapter import Adapter, alike, kind

if TYPE_CHECKING:
    import flax.linen

_COLLECTION = "adapter"


def adapted(model: "flax.linen.Module", adapter: Adapter) -> Callable:
    """`(base, module, *args, **kwargs) -> output` of `model` at `base + adapter.delta(module, base)`.

    With an adapter that has `dense` the sum is never formed: the module travels as a variable collection `adapter` and
    each `nn.Dense` that has an entry adds its term, so that with `base` frozen no gradient of its size exists. Any
    model of Dense layers will do; one that scans over layers must carry the collection: `nn.scan(variable_axes={...,
    "adapter": 0})`. Full deltas among a `mixed` adapter's entries (see `recompress`) are added to the base. ValueError
    where the module doesn't fit the base, and where an entry of it was not reached.
    """
    import flax.linen as nn

    def merged(base, module, *args, **kwargs):
        return model.apply({"params": tree.add(base, adapter.delta(module, base))}, *args, **kwargs)

    def factored(base, module, *args, **kwargs):
        reached, module = set(), alike(module, base)
        jax.eval_shape(adapter.delta, module, base)  # which tells a module of another base or adapter
        if adapter.mixed:
            is_entry = lambda at: lambda _, entry: entry if (kind(entry) == "full") is at else None
            base = tree.add(base, jax.tree.map(is_entry(True), base, module))
            module = jax.tree.map(is_entry(False), base, module)

        def intercept(call, args, kwargs, context):
            y = call(*args, **kwargs)
            layer = context.module
            if not isinstance(layer, nn.Dense) or context.method_name != "__call__":
                return y
            entry = layer.get_variable(_COLLECTION, "kernel")
            if entry is None:
                return y
            reached.add("/".join((*layer.path, "kernel")))
            leaves, structure = jax.tree.flatten(entry)
            bias = layer.get_variable("params", "bias")
            x, bias, *leaves = nn.dtypes.promote_dtype(args[0], bias, *leaves, dtype=layer.dtype)
            return adapter.dense(x, y, jax.tree.unflatten(structure, leaves), bias)

        with nn.intercept_methods(intercept):
            output = model.apply({"params": base, _COLLECTION: module}, *args, **kwargs)
        entries = jax.tree.map(lambda _, entry: True if jax.tree.leaves(entry) else None, base, module)
        if missed := sorted(set(tree.names(entries)) - reached):
            raise ValueError(
                f"the forward pass did not reach the module's entries for {', '.join(missed)}: they are not kernels of "
                'nn.Dense layers, or they lie inside an nn.scan without variable_axes={..., "adapter": 0}'
            )
        return output

    return merged if adapter.dense is None else factored
