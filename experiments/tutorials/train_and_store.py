"""Train small modules around one base and put them into a pool: handwritten digits, three digits a task.

python experiments/tutorials/train_and_store.py                # 20 s on 2 CPU cores; writes runs/tutorial
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from compo_jax import adapters, curvature, models, pool

TASKS = {"low": (0, 1, 2), "middle": (3, 4, 5), "high": (6, 7, 8)}


def task_images(digits, train=True):
    """Images (n, 32, 32, 3) in [-1, 1] of these digits, and labels 0, 1, 2; every fifth image is for testing."""
    pixels, labels = load_digits(return_X_y=True)
    kept = np.isin(labels, digits) & ((np.arange(len(labels)) % 5 > 0) == train)
    images = pixels[kept].reshape(-1, 8, 8, 1).repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
    return jnp.asarray(images / 8 - 1, jnp.float32), jnp.asarray(np.searchsorted(digits, labels[kept]))


if __name__ == "__main__":
    # -- one frozen base, one kind of module ---------------------------------------------------------------------------
    model, base, _ = models.embedded()  # a small ViT, pre-trained on Latin letters
    lora = adapters.lora(rank=4)  # on the attention's and the MLP's weights; targets=... chooses others by their path
    sizes = [sum(x.size for x in jax.tree.leaves(one)) for one in (base, lora.init(jax.random.key(0), base))]
    print("numbers in the base and in a module:", *sizes)

    # `forward(base, module, images)` never forms the gradient of a frozen weight. It is made for Flax Linen models;
    # `adapters.merged(apply, adapter)` does the same for any function of parameters, and forms the merged weights.
    forward = adapters.adapted(model, lora)

    def loss(trained, images, labels):
        features = forward(base, trained["module"], images, method="features")
        logits = features @ trained["head"]["kernel"] + trained["head"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(trained, state, images, labels):
        value, gradient = jax.value_and_grad(loss)(trained, images, labels)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, updates), state, value

    # -- a module and a head for each task, stored with what is worth knowing later ------------------------------------
    store = pool.ModulePool("runs/tutorial")
    for number, (name, digits) in enumerate(TASKS.items()):
        images, labels = task_images(digits)
        head = {"kernel": jnp.zeros((96, 3)), "bias": jnp.zeros(3)}
        trained = {"module": lora.init(jax.random.key(number), base), "head": head}
        state, draw = optimizer.init(trained), np.random.default_rng(number)
        for _ in range(60):
            rows = draw.integers(len(images), size=32)
            trained, state, value = step(trained, state, images[rows], labels[rows])

        # How much the task's loss feels each weight of the base: with it, merge rules can weigh modules later.
        def logits(weights, x, head=trained["head"]):
            return model.apply({"params": weights}, x, method="features") @ head["kernel"] + head["bias"]

        fisher = curvature.fisher_diagonal(logits, base, images[:64], method="monte_carlo", key=jax.random.key(0))
        store.add(
            name, trained["module"], base=base, adapter=lora, task=name, classes=[str(digit) for digit in digits],
            head=trained["head"], curvature=fisher, overwrite=True,
        )  # fmt: skip
        print(f"{name}: loss {value:.3f}; stored in {store.path}")
    print("modules with the class 4:", store.find(classes=["4"]))
