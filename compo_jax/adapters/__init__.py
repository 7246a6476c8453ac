"""Adapters: LoRA, (IA)³ and full deltas as pairs of pure functions, the fast forward pass of an adapted model, sums of
modules, and PEFT's folders."""

from typing import Any

from compo_jax.adapters.adapter import STACKED as STACKED
from compo_jax.adapters.adapter import VIT_TARGETS as VIT_TARGETS
from compo_jax.adapters.adapter import Adapter as Adapter
from compo_jax.adapters.adapter import is_stacked as is_stacked
from compo_jax.adapters.algebra import Recompressed as Recompressed
from compo_jax.adapters.algebra import fuse as fuse
from compo_jax.adapters.algebra import recompress as recompress
from compo_jax.adapters.algebra import scale as scale
from compo_jax.adapters.algebra import unfuse as unfuse
from compo_jax.adapters.algebra import weighted_sum as weighted_sum
from compo_jax.adapters.forward import adapted as adapted
from compo_jax.adapters.low_rank import lora as lora
from compo_jax.adapters.peft import TIMM_MODULES as TIMM_MODULES
from compo_jax.adapters.peft import load_peft as load_peft
from compo_jax.adapters.peft import save_peft as save_peft
from compo_jax.adapters.rescaling import ia3 as ia3
from compo_jax.adapters.whole import full as full

_KINDS = {"full": full, "ia3": ia3, "lora": lora}


def build(name: str, settings: dict[str, Any]) -> Adapter:
    """The adapter that has this `name` and these `settings` (as stored beside a module in a pool)."""
    if name not in _KINDS:
        raise ValueError(f"unknown adapter {name!r}; known are {', '.join(sorted(_KINDS))}")
    return _KINDS[name](**settings)
