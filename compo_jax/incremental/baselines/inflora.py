"""InfLoRA: a task's LoRA reads only those directions of its inputs that the earlier tasks' inputs don't take up."""

from functools import partial

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.incremental.baselines.subspaces import design, input_grams, protect
from compo_jax.incremental.ita import task_arithmetic
from compo_jax.incremental.modes import Method, Mode, Snapshot, apart, composed
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register

PROTECTED = 0.95  #: of the first task's input variance, as the release for CIFAR-100; grows to 1 over the tasks


def summed(snapshot: Snapshot):
    """The base with the sum of the modules' deltas, under the head that the tasks' heads make."""
    names = snapshot.composition.heads
    params = snapshot.pool.compose(snapshot.setup.base, names, weights=[1.0] * len(names))
    return composed(snapshot, params)


def interference_free(setup: Setup, method: Method) -> Mode:
    """LoRA's `b` alone is trained. Its `a` is fixed before: the principal directions of the layer's inputs, which the
    model so far makes of the task's images, outside the subspace of the earlier tasks' inputs, where their gradients
    lie too.

    All weights of the adapter are adapted (in the paper keys and values), and the share of the inputs' variance that is
    protected is of their squared singular values (in the release of these squared once more).
    """
    plain = task_arithmetic(setup, method)
    base, adapter, tasks = setup.base, method.adapter, len(setup.stream.tasks)
    if adapter.name != "lora":
        raise ValueError(f"method {method.name!r} designs the factors of LoRA: take adapters.lora()")
    nothing = adapter.delta(adapter.init(jax.random.key(0), base), base)
    grams = input_grams(setup, tree.names(nothing))

    def begin(key, memory, task):
        inputs = grams(tree.add(base, memory["sum"]), task.train)

        def factors(gram, protected, start):  # orthonormal / √3: as long as LoRA's own start
            directions = design(gram, protected, rank=start["a"].shape[-1]) / 3**0.5
            return {"a": directions.astype(start["a"].dtype), "b": start["b"]}

        return jax.tree.map(factors, inputs, memory["protected"], adapter.init(key, base))

    def features(held, module, images):
        fixed = lambda _, entry: {"a": jax.lax.stop_gradient(entry["a"]), "b": entry["b"]}
        return plain.features(held, jax.tree.map(fixed, nothing, module), images)

    def remember(memory, task, first, module, head, key):
        total, share = tree.add(memory["sum"], adapter.delta(module, base)), memory["tasks"] / tasks
        inputs = grams(tree.add(base, total), task.train)
        grown = partial(protect, share=PROTECTED + (1 - PROTECTED) * share)
        protected = jax.tree.map(grown, inputs, memory["protected"])
        return {"sum": total, "protected": protected, "tasks": memory["tasks"] + 1}

    unprotected = jax.tree.map(lambda w: jnp.zeros((*w.shape[:-1], w.shape[-2]), tree.wide_type(w)), nothing)
    return plain._replace(
        begin=begin,
        features=features,
        memory={"sum": nothing, "protected": unprotected, "tasks": jnp.zeros(())},
        hold=lambda memory: {"base": tree.add(base, memory["sum"])},
        penalty=lambda *_: jnp.zeros(()),
        remember=remember,
        at_once=False,
        compose=apart,
        classify=summed,
    )


register("inflora", interference_free, "interference-free LoRA (InfLoRA; Liang and Li, 2024, arXiv 2404.00228)")
