"""How a Linen model uses kernels that a fast pass leaves as they are: whether dense layers alone read them, and as they
lie. Seen in the model's jaxpr, of which nothing is computed."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Literal

from compo_jax import tree
from compo_jax.tree import Tree

if TYPE_CHECKING:
    import flax.linen

_MARK = "compo_jax kernel "
_SAME = ("convert_element_type", "squeeze", "copy", "sharding_constraint", "stop_gradient")
_TAKE = "take adapters.merged, which takes any model"


def is_plain(layer: "flax.linen.Module", method: str) -> bool:
    """Whether this is the call of a dense layer whose output is `x @ kernel + bias`."""
    import flax.linen as nn

    if type(layer) is not nn.Dense or method != "__call__" or layer.dot_general_cls is not None:
        return False
    if layer.dot_general in (None, jax.lax.dot_general):
        return True
    try:
        return _is_product(layer.dot_general)
    except (TypeError, jax.errors.ConcretizationTypeError):  # it has no hash, or closes over what is traced
        return False


@functools.lru_cache(64)
def _is_product(dot_general: Callable) -> bool:
    """Whether it is JAX's on a small example, up to what rounding to few bits does."""
    with jax.ensure_compile_time_eval():
        x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(5, 8), (8, 3)]))
        made = dot_general(x, kernel, (((1,), (0,)), ((), ())), precision=None)
        expected = jnp.matmul(x, kernel, precision="highest")
        return made.shape == expected.shape and bool(jnp.abs(made - expected).max() < 0.1 * jnp.abs(expected).max())


def inputs_of(args: Sequence, kwargs: Mapping[str, Any]) -> Any:
    """What a dense layer is called with."""
    return args[0] if args else kwargs["inputs"]


def require_read_as_they_lie(apply: Callable[[Tree], Any], base: Tree, kernels: set[str]) -> None:
    """ValueError where something else than dense layers reads one of these kernels, where a layer gets one changed, and
    where it can't be seen. `apply(base)` is the model's output."""
    import flax.linen as nn
    from jax.interpreters import partial_eval

    changed, rest = tree.partition(base, lambda name: name in kernels)

    def blind(call, args, kwargs, context):
        layer, name = context.module, "/".join((*context.module.path, "kernel"))
        if name not in kernels or not is_plain(layer, context.method_name):
            return call(*args, **kwargs)
        kernel = checkpoint_name(layer.get_variable("params", "kernel"), _MARK + name)
        x, _ = nn.dtypes.promote_dtype(inputs_of(args, kwargs), jnp.zeros((), kernel.dtype), dtype=layer.dtype)
        return jnp.broadcast_to(x.sum(axis=-1, keepdims=True), (*x.shape[:-1], layer.features))

    def output(changed):
        with nn.intercept_methods(blind):
            return apply(tree.combine(changed, rest))

    traced, names = jax.make_jaxpr(output)(changed).jaxpr, tree.names(changed)
    marks: list[tuple[str, Any]] = []
    _follow(traced, names, marks)
    if unseen := sorted(kernels - {name for name, _ in marks}):
        raise ValueError(
            f"how the model uses {', '.join(unseen)} can't be seen: nn.jit answers from its cache, say. Put jax.jit "
            f"around the whole pass in its place, or {_TAKE}"
        )
    if altered := sorted({name for name, origin in marks if origin != name}):
        raise ValueError(
            f"the model changes {', '.join(altered)} before a layer gets it, as nn.map_variables does to standardise "
            f"or mask weights, and the module's change wouldn't be: {_TAKE}"
        )
    _, used = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    if both := [name for name, yes in zip(names, used, strict=True) if yes]:
        raise ValueError(
            f"the model reads {', '.join(both)} outside of nn.Dense layers, too, as a tied decoder does, where the "
            f"module's change would be missing: {_TAKE}"
        )


def _keeps_matrices(equation: Any) -> bool:
    """Whether a transposition or a new shape leaves the last two axes as they are, moving those of stacks alone."""
    if equation.primitive.name == "transpose":
        first, second = equation.params["permutation"][-2:]
        return first < second
    before, after = ([d for d in v.aval.shape if d != 1] for v in (equation.invars[0], equation.outvars[0]))
    return before == after


def _follow(jaxpr: Jaxpr, origins: Sequence[Any], marks: list[tuple[str, Any]]) -> list:
    """The outputs' origins, those of the inputs, where a value is an input as it lies, or a slice that a scan has made;
    `marks` takes in (the path of a marked kernel, its origin)."""
    found = dict(zip(jaxpr.invars, origins, strict=True))
    origin = lambda atom: None if isinstance(atom, Literal) else found.get(atom)
    for equation in jaxpr.eqns:
        name, ins = equation.primitive.name, [origin(atom) for atom in equation.invars]
        if name == "name" and equation.params["name"].startswith(_MARK):
            marks.append((equation.params["name"].removeprefix(_MARK), ins[0]))
        if name in ("name", *_SAME) or (name in ("transpose", "reshape") and _keeps_matrices(equation)):
            found[equation.outvars[0]] = ins[0]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if not hasattr(inner, "eqns"):
                continue
            theirs = ins[len(ins) - len(inner.invars) :]  # a branch's and a loop body's are the last ones
            outs = _follow(inner, [None] * (len(inner.invars) - len(theirs)) + theirs, marks)
            if name in ("jit", "pjit", "remat", "checkpoint", "custom_jvp_call", "custom_vjp_call", "closed_call"):
                found |= dict(zip(equation.outvars, outs, strict=True))
    return [origin(atom) for atom in jaxpr.outvars]
