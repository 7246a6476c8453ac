"""Full deltas: every number of the chosen weights changes."""

import jax
import jax.numpy as jnp

from compo_jax.adapters.adapter import VIT_TARGETS, Adapter, Targets, rules, select


def full(targets: Targets = VIT_TARGETS) -> Adapter:
    """Full fine-tuning as an adapter: the module is the change of the chosen leaves itself, zero at the start."""

    def init(key, base):
        del key
        return jax.tree.map(jnp.zeros_like, select(base, targets))

    def delta(module, base):
        del base
        return module

    return Adapter(init, delta, None, "full", {"targets": [list(rule) for rule in rules(targets)]})
