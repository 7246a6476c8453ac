"""(IA)³: every output of a weight is multiplied by one learned number."""

import re
from collections.abc import Sequence
from typing import Any

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
)
from compo_jax.adapters.entries import Entry, entries, scale_of, sum_of, times

_END = r"(?=_?\d*(/value)?$)"  # nnx keeps an array at its variable's `value`
_KERNEL = rf"(?<![A-Za-z])(kernel|weight|w|W){_END}"
_BIASES = tuple((_KERNEL, bias) for bias in ("bias", "b", "B"))


#: One number for each output; a sum adds what is above one.
FACTORS = Entry(
    "ia3 ({'l'})",
    holds=lambda entry: isinstance(entry, dict) and set(entry) == {"l"},
    fits=lambda entry, shape: len(shape) > 1 and np.shape(entry["l"]) == (*shape[:-2], shape[-1]),
    term=lambda entry, weight: times(weight, jnp.asarray(entry["l"], tree.wide_type(entry["l"])) - 1),
    total=lambda terms, dtype: {"l": (1 + terms).astype(dtype)},
)


def _layer(name: str) -> str:
    return name.removesuffix("/value").rpartition("/")[0]


def _bias_beside(name: str, shapes: dict[str, tuple], bias: bool | Sequence[Sequence[str]]) -> str | None:
    """The path of the bias that belongs to the kernel `name`; None where its layer has none."""
    out = (*shapes[name][:-2], shapes[name][-1])
    for pattern, replacement in _BIASES if bias is True else bias:
        beside, replaced = re.subn(pattern, replacement, name)
        if replaced and beside in shapes and beside != name:
            if shapes[beside] != out:
                raise ValueError(f"{beside} {shapes[beside]} is no bias of {name} {shapes[name]}: it should be {out}")
            return beside
    maybe = [other for other, shape in shapes.items() if _layer(other) == _layer(name) and shape == out]
    if bias is True and maybe:
        raise ValueError(
            f"ia3(bias=True) finds no bias beside {name} by its name, and {', '.join(maybe)} may be it: give "
            "bias=[(pattern in the kernel's path, what stands there in the bias's)], or leave it out with bias=False"
        )
    return None


def ia3(
    targets: Targets = VIT_TARGETS,
    bias: bool | Sequence[Sequence[str]] = False,
    *,
    stacked: str | Sequence[str] = STACKED,
) -> Adapter:
    """(IA)³ (Liu et al., 2022, arXiv 2205.05638): `delta = W ⊙ (l - 1)`, one `l` per output, ones at the start.

    Args:
      targets: patterns searched for in the paths of `base`, first match wins. A matched leaf is a kernel (in, out), or
        (layers, in, out) where `stacked` says so. The multiples of LoRA's rank in them play no part.
      bias: False scales the kernel alone, as Porrello et al. (2025, arXiv 2405.16350) do; True scales the bias beside
        it as well, the layer's whole output, as Hugging Face's PEFT does. It is told by its name (`bias` beside
        `kernel` or `weight`, `b` beside `w`); for other names give `[(pattern, replacement)]`, as of `re.sub`, that
        make the bias's path of the kernel's.
      stacked: patterns of the paths whose axis 0 counts layers; default: the blocks of our ViT.

    The module's entry for a kernel is `{"l": (…, out)}`. `init` raises ValueError where a pattern matches nothing or a
    leaf is no matrix; `init` and `delta` where a layer has what may be a bias under another name; `delta` where the
    module is another base's.
    """
    settings = {
        "targets": [list(rule) for rule in rules(targets)],
        "bias": bias if isinstance(bias, bool) else [list(pair) for pair in bias],
        "stacked": list(patterns(stacked)),
    }
    if wrong := [pair for pair in ([] if isinstance(bias, bool) else bias) if len(pair) != 2]:
        raise ValueError(f"bias= takes (pattern, replacement) pairs, not {wrong[0]!r}")
    patterns(() if isinstance(bias, bool) else (pattern for pattern, _ in bias))

    def biases(kernels: Sequence[str], base: Any) -> dict[str, str]:
        """The kernels by the paths of their biases."""
        shapes = {name: np.shape(leaf) for name, leaf in tree.by_name(base).items()}
        pairs = {_bias_beside(name, shapes, bias): name for name in kernels} if bias else {}
        return {beside: name for beside, name in pairs.items() if beside is not None}

    def init(key, base):
        del key
        chosen = select(base, targets)

        def ones(name, kernel):
            if kernel is None:
                return None
            require_matrix(name, kernel, "(IA)³", stacked)
            return {"l": jnp.ones((*kernel.shape[:-2], kernel.shape[-1]), kernel.dtype)}

        module = tree.map_with_name(ones, chosen)
        biases(tree.names(chosen), base)
        return module

    def delta(module, base):
        held = entries(module, base, (FACTORS,))
        kernels = biases(list(held), base)

        def change(name, leaf):
            if name not in held and name not in kernels:
                return None
            scales = held[kernels.get(name, name)]["l"]
            wide = tree.wide_type(leaf, scales)
            excess = jnp.asarray(scales, wide) - 1
            product = jnp.asarray(leaf, wide) * (excess if name in kernels else excess[..., None, :])
            return product.astype(jnp.result_type(leaf, scales))

        return tree.map_with_name(change, base)

    def dense(x, y, entry, frozen_bias):
        del x
        if bias:
            return y * entry["l"]
        product = y if frozen_bias is None else y - frozen_bias
        return y + product * (entry["l"] - 1)

    return Adapter(init, delta, dense, scale_of((FACTORS,)), sum_of((FACTORS,)), "ia3", settings)
