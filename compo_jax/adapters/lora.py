"""Low-rank adaptation: the change of a weight is a product of two thin matrices."""

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.adapters.adapter import VIT_TARGETS, Adapter, Targets, require_kernel, rules, select


def lora(rank: int = 16, targets: Targets = VIT_TARGETS, init_scale: float = 1.0) -> Adapter:
    """LoRA (Hu et al., 2022, arXiv 2106.09685): `delta = a @ b`, `a` (in, r) kaiming-uniform and `b` (r, out) zero.

    Args:
      rank: r; a target `(pattern, m)` gets rank m·r (3r for a joint qkv kernel).
      targets: patterns searched for in the paths of `base`, first match wins. A matched leaf is a kernel (in, out), or
        (layers, in, out) for layers stacked on axis 0.
      init_scale: multiplies the bound 1/√in of the uniform start of `a` (1/√r gives the released reference's start).

    The module's entry for a kernel is `{"a": (…, in, r), "b": (…, r, out)}`. `init` raises ValueError where a pattern
    matches nothing, a leaf is no matrix, or the rank exceeds it.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA module is at least 1, not {rank}")

    def factors(key, name, kernel):
        require_kernel(name, kernel, "LoRA")
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
        return jax.tree.map(lambda _, entry: None if entry is None else entry["a"] @ entry["b"], base, module)

    def dense(x, y, entry, bias):
        del bias
        rows = x.reshape(-1, x.shape[-1])  # XLA's thin matrix products on a CPU are faster in two dimensions
        return y + ((rows @ entry["a"]) @ entry["b"]).reshape(y.shape)

    settings = {"rank": rank, "targets": [list(rule) for rule in rules(targets)], "init_scale": init_scale}
    return Adapter(init, delta, dense, "lora", settings)
