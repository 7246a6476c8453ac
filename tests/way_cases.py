"""A small stream and model that ways to learn are tried on."""

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax.data import array_stream
from compo_jax.incremental import Settings, Setup
from compo_jax.models import ViT

MODEL = ViT(image_size=16, patch=8, width=12, depth=1, heads=2, unroll=True)
SETTINGS = Settings(
    epochs=4, batch=16, components=2, probe_epochs=2, align_epochs=(2, 1), align_samples=32, fisher_method="exact",
    eval_batch=16, features_batch=16,
)  # fmt: skip


def noisy_pictures(tasks, noise):
    """Tasks of these classes, of each of which there are 16 and 6 noisy pictures of one pattern."""
    random, classes = np.random.default_rng(0), sum(map(len, tasks))
    patterns = random.integers(0, 256, size=(classes, 16, 16, 3))

    def split(count):
        labels = np.repeat(np.arange(classes), count)
        pictures = patterns[labels] + noise * random.normal(size=(len(labels), 16, 16, 3))
        return np.clip(pictures, 0, 255).astype(np.uint8), labels

    base = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    base = jax.tree.map(lambda x: 3 * np.asarray(x), base)
    return Setup(MODEL, base, array_stream(*split(16), *split(6), tasks=tasks), SETTINGS, seed=0)
