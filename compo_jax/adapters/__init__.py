"""Adapters: LoRA, (IA)³ and full deltas as pure functions, the forward pass of an adapted model, and PEFT's folders.

Which to take: `lora` for most (0.1 to 1 % of the weights, sums of modules have the sum of their ranks), `ia3` for the
fewest numbers (one an output), `full` where size doesn't matter: it reaches the highest accuracy and sums stay as large
as one. An adapter of your own: `Adapter`, made known by `register`.
"""

from compo_jax.adapters.adapter import STACKED as STACKED
from compo_jax.adapters.adapter import VIT_TARGETS as VIT_TARGETS
from compo_jax.adapters.adapter import Adapter as Adapter
from compo_jax.adapters.adapter import is_stacked as is_stacked
from compo_jax.adapters.algebra import Recompressed as Recompressed
from compo_jax.adapters.algebra import fuse as fuse
from compo_jax.adapters.algebra import recompress as recompress
from compo_jax.adapters.algebra import unfuse as unfuse
from compo_jax.adapters.forward import Forward as Forward
from compo_jax.adapters.forward import adapted as adapted
from compo_jax.adapters.forward import linearised as linearised
from compo_jax.adapters.forward import merged as merged
from compo_jax.adapters.low_rank import lora as lora
from compo_jax.adapters.peft import HF_MODULES as HF_MODULES
from compo_jax.adapters.peft import TIMM_MODULES as TIMM_MODULES
from compo_jax.adapters.peft import load_peft as load_peft
from compo_jax.adapters.peft import peft_head as peft_head
from compo_jax.adapters.peft import save_peft as save_peft
from compo_jax.adapters.registry import build as build
from compo_jax.adapters.registry import register as register
from compo_jax.adapters.rescaling import ia3 as ia3
from compo_jax.adapters.whole import full as full
