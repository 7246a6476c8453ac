"""Modules as folders of Hugging Face's PEFT (Mangrulkar et al., 2022, github.com/huggingface/peft): LoRA, DoRA, (IA)³.

A folder holds `adapter_config.json`, which says what is adapted and how, and `adapter_model.safetensors`. PEFT knows
linear layers one by one, with weights (out, in), and Hugging Face's ViTs have three for query, key and value; ours may
be stacked over depth, (layers, in, out), and have those three side by side.
"""

from compo_jax.adapters.peft.layouts import HF_MODULES as HF_MODULES
from compo_jax.adapters.peft.layouts import TIMM_MODULES as TIMM_MODULES
from compo_jax.adapters.peft.reading import load_peft as load_peft
from compo_jax.adapters.peft.reading import peft_head as peft_head
from compo_jax.adapters.peft.writing import save_peft as save_peft
