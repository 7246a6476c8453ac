"""An experiment on images of your own: arrays in, tasks one after another, a module each, what remains after each.

python experiments/tutorials/your_own_images.py               # a minute on 2 CPU cores; writes runs/tutorial-images
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from compo_jax import adapters, data, incremental, models

# -- your images: uint8 (n, size, size[, 1 or 3]) and labels from 0 on -------------------------------------------------
pixels, labels = load_digits(return_X_y=True)
images = (pixels * 15.9).astype(np.uint8).reshape(-1, 8, 8).repeat(4, axis=1).repeat(4, axis=2)
train_images, test_images, train_labels, test_labels = train_test_split(images, labels, stratify=labels, random_state=0)

# -- a stream: five tasks of two digits each, in an order that the seed draws ------------------------------------------
stream = data.array_stream(
    train_images, train_labels, test_images, test_labels, tasks=5, seed=0, name="digits",
    class_names=[f"digit {number}" for number in range(10)],
)  # fmt: skip
for task in stream.tasks:
    print(task.name, *task.classes, f"{len(task.train)} training images", sep=", ")

# -- what is compared: modules with the Fisher penalty and heads pulled to the aligned classifier, and with neither ----
model, base, _ = models.embedded()  # or models.load("vit_small_patch16_224.safetensors"), with images of its size
lora = adapters.lora(rank=4)
options = {"adapter": lora, "learning_rate": 3e-3}
methods = [
    incremental.method("ita", **options, alpha=0.1, pull=(0.1, 0.05)),
    incremental.method("none", **options),
    incremental.method("ncm"),  # nearest class means of the frozen features: trains nothing
]

# -- learned; a second start goes on where the first was ---------------------------------------------------------------
settings = incremental.Settings(epochs=3, batch=32, fisher_images=64, fisher_method="monte_carlo")
setup = incremental.Setup(model, base, stream, settings, seed=0)
for after in incremental.learn_stream(setup, methods, Path("runs/tutorial-images")):
    reached = {name: round(100 * outcome.final_accuracy, 1) for name, outcome in after.outcomes.items()}
    print(f"after {stream.tasks[after.task].name}: {reached}; frozen features: {100 * after.frozen.final_accuracy:.1f}")

# -- forgetting a task costs no training -------------------------------------------------------------------------------
learner = after.learners["ita-lora"]
test = incremental.evaluator(after.snapshots["ita-lora"].extract, stream)
without = incremental.skills("unlearn", learner.pool, base, after.reference.head, test)
print("accuracy on each task (columns) without the module of one (rows):")
print(np.round(100 * without))
