"""Learning without forgetting: fine-tuning, with the earlier answers kept by distillation."""

import jax
import jax.numpy as jnp

from compo_jax.incremental.baselines.sequential import fine_tuning
from compo_jax.incremental.classifier import logits, masked
from compo_jax.incremental.extraction import feature_width
from compo_jax.incremental.modes import Method, Mode
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


def distillation(setup: Setup, method: Method) -> Mode:
    """Sequential, with the earlier classes' answers of the model before the task kept, on the task's own images, at
    temperature 2. The earlier heads stand still. The answers are one softmax over all earlier classes, for tasks are
    not told apart in a test, where the paper keeps each earlier task's apart."""
    plain = fine_tuning(setup, method)
    base, total = setup.base, len(setup.stream.classes)
    width = feature_width(setup.model, base, setup.stream)

    def remember(memory, task, first, module, head, key):
        put = lambda all, columns: all.at[..., first : first + len(task.classes)].set(columns)
        return {
            "module": module,
            "head": jax.tree.map(put, memory["head"], head),
            "seen": jnp.int32(first + len(task.classes)),
        }

    def distil(held, z, images, alpha):
        before = jax.lax.stop_gradient(logits(held["head"], plain.features(held, held["module"], images)))
        seen = jnp.arange(total) < jnp.maximum(held["seen"], 1)  # of one class alone there is nothing to keep
        old, new = (
            jnp.where(seen, jax.nn.log_softmax(masked(values, seen) / 2), 0)
            for values in (before, logits(held["head"], z))
        )
        return alpha * 4 * jnp.mean(jnp.sum(jnp.where(seen, jnp.exp(old) * (old - new), 0), axis=-1))

    head = {"kernel": jnp.zeros((width, total)), "bias": jnp.zeros(total)}
    return plain._replace(
        memory=plain.memory | {"head": head, "seen": jnp.int32(0)},
        hold=lambda memory: {"base": base, **memory},
        penalty=lambda *_: jnp.zeros(()),
        alpha_unit=lambda *_: jnp.ones(()),
        distil=distil,
        remember=remember,
    )


register("lwf", distillation, "learning without forgetting (Li and Hoiem, 2016, arXiv 1606.09282)", alpha=10.0)
