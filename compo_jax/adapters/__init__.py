"""Adapters: LoRA and full deltas as pairs of pure functions, and the fast forward pass of an adapted model."""

from typing import Any

from compo_jax.adapters.adapter import VIT_TARGETS as VIT_TARGETS
from compo_jax.adapters.adapter import Adapter as Adapter
from compo_jax.adapters.forward import adapted as adapted
from compo_jax.adapters.full import full as full
from compo_jax.adapters.lora import lora as lora

_KINDS = {"full": full, "lora": lora}


def build(name: str, settings: dict[str, Any]) -> Adapter:
    """The adapter that has this `name` and these `settings` (as stored beside a module in a pool)."""
    if name not in _KINDS:
        raise ValueError(f"unknown adapter {name!r}; known are {', '.join(sorted(_KINDS))}")
    return _KINDS[name](**settings)
