"""Modules from and for Hugging Face's PEFT: a folder out, a folder in, and the sum of two with its rank cut down again.

python experiments/tutorials/peft_in_and_out.py                # after train_and_store.py; a few seconds
"""

import json
from pathlib import Path

import jax
import numpy as np

from compo_jax import adapters, models, pool, tree

model, base, _ = models.embedded()
store = pool.ModulePool("runs/tutorial")
lora = adapters.lora(rank=4)

# -- out: a folder that PeftModel.from_pretrained puts onto the same model of timm's -----------------------------------
folder = Path("runs/tutorial-peft")
if not folder.exists():
    adapters.save_peft(folder, lora, store.load("low"), base)
print(*sorted(file.name for file in folder.iterdir()), sep=", ")
config = json.loads((folder / "adapter_config.json").read_text())
print("target modules:", *config["target_modules"][:4], "...")

# -- in: the adapter and the module, for this base ---------------------------------------------------------------------
adapter, module = adapters.load_peft(folder, base)
there, here = adapter.delta(module, base), lora.delta(store.load("low"), base)
difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), there, here)
print("largest difference after there and back:", max(jax.tree.leaves(difference)))

# -- the exact sum of two LoRA modules has their ranks together; recompress cuts it, and says what that costs ----------
both = lora.sum([store.load("low"), store.load("high")], base, [0.5, 0.5])
small = adapters.recompress(both, base, rank=4)
print(f"relative error of the sum at rank 4: {small.error:.3f} over all weights; by weight:")
for name, error in zip(tree.names(small.errors), jax.tree.leaves(small.errors), strict=True):
    print(f"  {name:32} {error:.3f}")
