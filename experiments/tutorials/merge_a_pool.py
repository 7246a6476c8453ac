"""Compose and merge the modules of a pool, take one away again, and see what each choice knows.

python experiments/tutorials/merge_a_pool.py                   # after train_and_store.py; 30 s on 2 CPU cores
"""

import jax
import jax.numpy as jnp
from train_and_store import TASKS, task_images

from compo_jax import compose, incremental, models, pool

model, base, _ = models.embedded()
store = pool.ModulePool("runs/tutorial")
names = list(TASKS)

# -- a classifier of all nine digits: the modules' heads side by side --------------------------------------------------
heads = [store.load(name, "head") for name in names]
head = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *heads)
features = jax.jit(lambda params, images: model.apply({"params": params}, images, method="features"))
tests = {name: task_images(digits, train=False) for name, digits in TASKS.items()}


def accuracies(params) -> dict[str, float]:
    """Of each task, the prediction among all nine digits."""
    reached = {}
    for number, (name, (images, labels)) in enumerate(tests.items()):
        logits = features(params, images) @ head["kernel"] + head["bias"]
        reached[name] = round(float(jnp.mean(logits.argmax(-1) == labels + 3 * number)), 2)
    return reached


# -- weighted sums: the composed model costs what the base costs -------------------------------------------------------
print("base alone:        ", accuracies(base))
print("mean of all:       ", accuracies(store.compose(base, names)))
print("without `high`:    ", accuracies(store.compose(base, names[:2])))
print("`high` alone:      ", accuracies(store.compose(base, ["high"])))

# -- other rules, by name: what they need of curvature is beside the modules -------------------------------------------
for rule, options in {"ties": {"density": 0.5}, "tsv": {}, "fisher": {}}.items():
    print(f"{rule + ':':19}", accuracies(incremental.merge_pool(rule, store, base, names, **options)))

# -- and on trees of your own: any rule takes task vectors, from wherever they come ------------------------------------
deltas = list(store.deltas(base, names))
print("twice the mean:    ", accuracies(compose.compose(base, deltas, weights=[2 / 3] * 3)))
print("all rules:", ", ".join(compose.RULES))
