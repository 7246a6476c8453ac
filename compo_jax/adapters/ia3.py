"""(IA)³: every output of a weight is multiplied by one learned number."""

import jax.numpy as jnp

from compo_jax import tree
from compo_jax.adapters.adapter import VIT_TARGETS, Adapter, Targets, entries, require_kernel, rules, select


def _bias_beside(name: str) -> str:
    return "/".join([*name.split("/")[:-1], "bias"])


def ia3(targets: Targets = VIT_TARGETS, bias: bool = False) -> Adapter:
    """(IA)³ (Liu et al., 2022, arXiv 2205.05638): `delta = W ⊙ (l - 1)`, one `l` per output, ones at the start.

    Args:
      targets: patterns searched for in the paths of `base`, first match wins. A matched leaf is a kernel (in, out), or
        (layers, in, out) for layers stacked on axis 0. The multiples of LoRA's rank in them play no part.
      bias: False scales the kernel alone, as Porrello et al. (2025, arXiv 2405.16350) do; True scales the bias beside
        it as well, the layer's whole output, as Hugging Face's PEFT does.

    The module's entry for a kernel is `{"l": (…, out)}`. `init` raises ValueError where a pattern matches nothing or a
    leaf is no matrix.
    """

    def init(key, base):
        del key

        def ones(name, kernel):
            if kernel is None:
                return None
            require_kernel(name, kernel, "(IA)³")
            return {"l": jnp.ones((*kernel.shape[:-2], kernel.shape[-1]), kernel.dtype)}

        return tree.map_with_name(ones, select(base, targets))

    def delta(module, base):
        excess = {name: entry["l"] - 1 for name, entry in entries(module, base).items()}
        of_bias = {_bias_beside(name): value for name, value in excess.items()} if bias else {}

        def change(name, leaf):
            if name in excess:
                return leaf * excess[name][..., None, :]
            return leaf * of_bias[name] if name in of_bias else None

        return tree.map_with_name(change, base)

    def dense(x, y, entry, frozen_bias):
        del x
        if bias:
            return y * entry["l"]
        product = y if frozen_bias is None else y - frozen_bias
        return y + product * (entry["l"] - 1)

    settings = {"targets": [list(rule) for rule in rules(targets)], "bias": bias}
    return Adapter(init, delta, dense, "ia3", settings)
