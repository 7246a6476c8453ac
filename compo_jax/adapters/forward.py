"""The forward pass of an adapted model: of any framework, of its first order, and a fast one for Linen models."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.adapters.adapter import Adapter, alike
from compo_jax.adapters.entries import ARRAY
from compo_jax.adapters.kernel_use import inputs_of, is_plain, require_read_as_they_lie
from compo_jax.tree import Tree

if TYPE_CHECKING:
    import flax.linen

_COLLECTION = "adapter"


@runtime_checkable
class Forward(Protocol):
    """The forward pass of an adapted model."""

    def __call__(self, base: Tree, module: Tree, *args: Any, **kwargs: Any) -> Any:
        """The model's output for the other arguments at `base + adapter.delta(module, base)`, or its first order."""
        ...


def merged(apply: Callable[..., Any], adapter: Adapter) -> Forward:
    """The forward pass of any `apply(params, *args, **kwargs)`, such as a model of Equinox or Flax NNX:

        params, static = eqx.partition(model, eqx.is_inexact_array)
        forward = merged(lambda params, x: jax.vmap(eqx.combine(params, static))(x), lora(4, r"weight$"))

        graph, params = nnx.split(model)
        forward = merged(lambda params, x: nnx.merge(graph, params)(x), lora(4, "kernel"))

    The sum of base and delta is formed, as large as the base. Patterns are searched for in `tree.names(params)`. LoRA
    doesn't mind how a weight lies; (IA)³ multiplies its last axis, the outputs in Flax but the inputs in Equinox.
    """

    def forward(base, module, *args, **kwargs):
        return apply(tree.add(base, adapter.delta(module, base)), *args, **kwargs)

    return forward


def linearised(apply: Callable[..., Any], adapter: Adapter | None = None) -> Forward:
    """The first order of any `apply(params, *args, **kwargs)` at the base: `apply(base) + J delta`.

    It is linear in the delta, so that what modules change in the outputs adds up exactly (Ortiz-Jimenez et al., 2023,
    arXiv 2305.12827), and costs two forward passes: J is that of the leaves that the delta moves.

    Args:
      apply: returns floating-point arrays, and has forward derivatives: a `jax.custom_vjp` rules them out, and so does
        cuDNN's attention (a ViT takes `kernel="xla"`).
      adapter: None: a module is a delta itself, None in it where nothing changes.

    ValueError where the delta doesn't fit the base.
    """

    def forward(base, module, *args, **kwargs):
        delta = alike(module, base) if adapter is None else adapter.delta(module, base)
        tree.require_like(delta, base, "the delta")
        base = jax.tree.map(jnp.asarray, base)
        delta = tree.spread(delta, base)
        moved = jax.tree.map(lambda b, d: None if d is None else b, base, delta)
        direction = jax.tree.map(lambda b, d: None if d is None else jnp.asarray(d, b.dtype), base, delta)
        tree.require_float(moved, "what the delta is added to")
        value, change = jax.jvp(lambda some: apply(tree.combine(some, base), *args, **kwargs), (moved,), (direction,))
        return jax.tree.map(jnp.add, value, change)

    return forward


def adapted(model: "flax.linen.Module", adapter: Adapter) -> Forward:
    """The forward pass of a Linen model, fast where the adapter has a short cut through dense layers.

    With an adapter that has `dense` the sum is never formed: the module travels as a variable collection `adapter` and
    each `nn.Dense` that has an entry adds its term, so that with `base` frozen no gradient of its size exists. Any
    model of Dense layers will do; one that scans over layers must carry the collection: `nn.scan(variable_axes={...,
    "adapter": 0})`. Full deltas among a `mixed` adapter's entries (see `recompress`) are added to the base. Other
    collections than the parameters go by the keyword `variables`, `{"batch_stats": ...}` say; further keywords are
    those of `model.apply`.

    ValueError where the module doesn't fit the base, where an entry of it was not reached (subclasses of `nn.Dense`,
    and layers with a product of their own, may do anything with their kernel), and where a kernel that it changes is
    read by something else, too, as by a decoder that is tied to it, or changed before a layer gets it: take `merged`
    there.
    """
    import flax.errors
    import flax.linen as nn

    seen: set = set()
    is_boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)

    def applied(collections, *args, variables=None, **kwargs):
        return model.apply({**(variables or {}), **collections}, *args, **kwargs)

    def factored(base, module, *args, **kwargs):
        reached, module = set(), alike(module, base)
        if any(map(is_boxed, jax.tree.leaves(base, is_leaf=is_boxed))):
            raise ValueError("parameters in boxes of nn.with_partitioning: take them out by flax.linen.meta.unbox")
        jax.eval_shape(adapter.delta, module, base)  # which tells a module of another base or adapter
        if adapter.mixed:
            is_entry = lambda at: lambda _, entry: entry if ARRAY.holds(entry) is at else None
            base = tree.add(base, jax.tree.map(is_entry(True), base, module))
            module = jax.tree.map(is_entry(False), base, module)

        def intercept(call, args, kwargs, context):
            y = call(*args, **kwargs)
            layer = context.module
            if not is_plain(layer, context.method_name):
                return y
            entry = layer.get_variable(_COLLECTION, "kernel")
            if entry is None:
                return y
            reached.add("/".join((*layer.path, "kernel")))
            leaves, structure = jax.tree.flatten(entry)
            bias = layer.get_variable("params", "bias")
            x, bias, *leaves = nn.dtypes.promote_dtype(inputs_of(args, kwargs), bias, *leaves, dtype=layer.dtype)
            return adapter.dense(x, y, jax.tree.unflatten(structure, leaves), bias)

        def apply(base):
            return applied({"params": base, _COLLECTION: module}, *args, **kwargs)

        try:
            with nn.intercept_methods(intercept):
                output = apply(base)
        except flax.errors.ScopeParamNotFoundError as error:
            if "/kernel/" not in str(error):  # which an entry's own path has, and no parameter's
                raise
            raise ValueError(
                "a wrapper such as nn.WeightNorm takes the module's entries for parameters of its own: take "
                "adapters.merged, which takes any model"
            ) from error
        entries = jax.tree.map(lambda _, entry: True if jax.tree.leaves(entry) else None, base, module)
        if missed := sorted(set(tree.names(entries)) - reached):
            raise ValueError(
                f"the forward pass did not reach the module's entries for {', '.join(missed)}: they are not kernels of "
                "nn.Dense layers with the usual product, they lie inside an nn.scan without variable_axes={..., "
                '"adapter": 0}, or nn.jit answered from its cache; adapters.merged takes any model'
            )
        called = _form((base, module, args, kwargs))
        if reached and called not in seen:  # once, for it is one more trace
            require_read_as_they_lie(apply, base, reached)
            seen.add(called)
        return output

    if adapter.dense is None:
        return merged(lambda params, *args, **kwargs: applied({"params": params}, *args, **kwargs), adapter)
    return factored


def _form(arguments: Any) -> tuple:
    """What decides which way a call takes through a model: structures, shapes, types, and all that is no number."""
    leaves, structure = jax.tree.flatten(arguments)

    def form(x):
        if hasattr(x, "dtype"):
            return x.shape, x.dtype
        return type(x) if isinstance(x, int | float) and not isinstance(x, bool) else repr(x)

    return structure, tuple(map(form, leaves))
