"""Full deltas: every number of the chosen weights changes."""

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.adapters.adapter import VIT_TARGETS, Adapter, Targets, in_containers, rules, select
from compo_jax.adapters.entries import ARRAY, scale_of, sum_of


def full(targets: Targets = VIT_TARGETS) -> Adapter:
    """Full fine-tuning as an adapter: the module is the change of the chosen leaves itself, zero at the start.

    `init` raises ValueError where a pattern matches nothing, `delta` where the module is another base's.
    """

    def init(key, base):
        del key
        return jax.tree.map(jnp.zeros_like, select(base, targets))

    def delta(module, base):
        module = in_containers(module, base)
        tree.require_like(module, base, "the module")
        return module

    settings = {"targets": [list(rule) for rule in rules(targets)]}
    return Adapter(init, delta, None, scale_of((ARRAY,)), sum_of((ARRAY,)), "full", settings)
