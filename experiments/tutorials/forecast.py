"""Forecast a composition before making it: the loss of every weighting, from one Hessian product a module.

python experiments/tutorials/forecast.py                       # after train_and_store.py; 30 s on 2 CPU cores
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from train_and_store import TASKS, task_images

from compo_jax import compose, curvature, models, pool

model, base, _ = models.embedded()
store = pool.ModulePool("runs/tutorial")
names = list(TASKS)
deltas = list(store.deltas(base, names))
head = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *[store.load(name, "head") for name in names])

# -- the loss of all tasks together, on a few images of each -----------------------------------------------------------
parts = [task_images(digits) for digits in TASKS.values()]
images = jnp.concatenate([x[:40] for x, _ in parts])
labels = jnp.concatenate([y[:40] + 3 * number for number, (_, y) in enumerate(parts)])


def loss(params, images, labels):
    z = model.apply({"params": params}, images, method="features")
    return optax.softmax_cross_entropy_with_integer_labels(z @ head["kernel"] + head["bias"], labels).mean()


# -- the landscape: l(w) = l + s·(w - a) + ½ (w - a)ᵀ G (w - a), around the mean of the modules ------------------------
# Around the mean, for modules that were trained far from the base are not forecast well from there.
uniform = [1 / 3] * 3
landscape = curvature.landscape(loss, base, deltas, images, labels, anchor=uniform)
print("slope", np.round(landscape.slope, 2), "and Gram matrix of the modules:", np.round(landscape.gram, 2), sep="\n")

# -- how good is it? Beside the true loss ------------------------------------------------------------------------------
composed_loss = jax.jit(lambda weights, *batch: loss(compose.compose(base, deltas, weights), *batch))
print("weights            forecast  true")
for weights in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0]):
    true = composed_loss(jnp.array(weights), images, labels)
    print(f"{weights!s:18} {landscape.predict(jnp.array(weights)):8.3f} {true:8.3f}")
remainder = landscape.remainder()  # the true loss and its gradient, at the first two modules' mean and at the third
print(
    "relative error of the forecast there:",
    np.round(remainder.loss, 3),
    "and of its slope:",
    np.round(remainder.slope, 3),
)

# -- the best weights, with no pass over the data ----------------------------------------------------------------------
best = landscape.best_weights()
print("best weights on the simplex:", np.round(best, 2))
true, mean = (composed_loss(jnp.asarray(weights), images, labels) for weights in (best, uniform))
print(f"their loss: forecast {landscape.predict(best):.3f}, true {true:.3f}; at the mean {mean:.3f}")
