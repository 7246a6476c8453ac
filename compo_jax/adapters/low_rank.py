"""Low-rank adaptation: the change of a weight is a product of two thin matrices."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax import tree
from compo_jax.adapters.adapter import (
    STACKED,
    VIT_TARGETS,
    Adapter,
    Targets,
    patterns,
    require_matrix,
    rules,
    select,
    whole_number,
)
from compo_jax.adapters.entries import ARRAY, Entry, entries, scale_of, sum_of, times


def _fit(entry: Any, shape: tuple[int, ...]) -> bool:
    if len(shape) < 2:
        return False
    *stack, fan_in, fan_out = shape
    a, b = np.shape(entry["a"]), np.shape(entry["b"])
    return a == (*stack, fan_in, *a[-1:]) and b == (*stack, *a[-1:], fan_out)


#: Two thin matrices; in a sum they are put side by side, so that the ranks add up (see `recompress`).
FACTORS = Entry(
    "lora ({'a', 'b'})",
    holds=lambda entry: isinstance(entry, dict) and set(entry) == {"a", "b"},
    fits=_fit,
    term=lambda entry, weight: [{"a": entry["a"], "b": times(weight, entry["b"]).astype(entry["b"].dtype)}],
    total=lambda terms, _: {
        factor: jnp.concatenate([term[factor] for term in terms], axis) for factor, axis in (("a", -1), ("b", -2))
    },
)
KINDS = (FACTORS, ARRAY)


def _product(entry: Any) -> Any:
    """What an entry adds to its leaf: 16-bit factors are multiplied and summed wide, and rounded once."""
    if entry is None or ARRAY.holds(entry):
        return entry
    a, b = entry["a"], entry["b"]
    wide = tree.wide_type(a, b)
    return jnp.matmul(a, b, preferred_element_type=wide).astype(jnp.result_type(a, b))


def lora(
    rank: int = 16,
    targets: Targets = VIT_TARGETS,
    init_scale: float = 1.0,
    *,
    stacked: str | Sequence[str] = STACKED,
) -> Adapter:
    """LoRA (Hu et al., 2022, arXiv 2106.09685): `delta = a @ b`, `a` (in, r) kaiming-uniform and `b` (r, out) zero.

    Args:
      rank: r; a target `(pattern, m)` gets rank m·r (3r for a joint qkv kernel).
      targets: patterns searched for in the paths of `base`, first match wins. A matched leaf is a kernel (in, out), or
        (layers, in, out) where `stacked` says so.
      init_scale: multiplies the bound 1/√in of the uniform start of `a` (1/√r gives the released reference's start).
      stacked: patterns of the paths whose axis 0 counts layers; default: the blocks of our ViT.

    The module's entry for a kernel is `{"a": (…, in, r), "b": (…, r, out)}`; `delta` takes arrays too, full deltas of
    leaves that are no matrices (see `recompress`). `init` raises ValueError where a pattern matches nothing, a leaf is
    no matrix, or the rank exceeds it; `delta` where the module is another base's.
    """
    whole_number("the rank of a LoRA module", rank)
    if not 0 < init_scale < math.inf:
        raise ValueError(f"init_scale={init_scale!r} starts no factor: it is a positive number")
    settings = {
        "rank": int(rank),
        "targets": [list(rule) for rule in rules(targets)],
        "init_scale": init_scale,
        "stacked": list(patterns(stacked)),
    }

    def factors(key, name, kernel):
        require_matrix(name, kernel, "LoRA", stacked)
        width = rank * tree.first_match(name, rules(targets))
        *stack, fan_in, fan_out = kernel.shape
        if width > min(fan_in, fan_out):
            raise ValueError(f"rank {width} is larger than the {fan_in}x{fan_out} matrix {name}: choose a smaller rank")
        bound = init_scale / fan_in**0.5
        return {
            "a": jax.random.uniform(key, (*stack, fan_in, width), kernel.dtype, -bound, bound),
            "b": jnp.zeros((*stack, width, fan_out), kernel.dtype),
        }

    def init(key, base):
        chosen = select(base, targets)
        keys = iter(jax.random.split(key, len(jax.tree.leaves(chosen))))
        return tree.map_with_name(lambda name, leaf: None if leaf is None else factors(next(keys), name, leaf), chosen)

    def delta(module, base):
        held = entries(module, base, KINDS)
        if not any(map(FACTORS.holds, held.values())):
            entries(module, base, (FACTORS,))  # full deltas alone are another adapter's
        return tree.place({name: _product(entry) for name, entry in held.items()}, base)

    def dense(x, y, entry, bias):
        del bias
        rows = x.reshape(-1, x.shape[-1])  # XLA's thin matrix products on a CPU are faster in two dimensions
        return y + ((rows @ entry["a"]) @ entry["b"]).reshape(y.shape)

    return Adapter(init, delta, dense, scale_of(KINDS), sum_of(KINDS), "lora", settings, mixed=True)
