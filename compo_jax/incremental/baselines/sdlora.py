"""SD-LoRA: the earlier tasks' directions stay, and how far the model goes along each is learned on."""

import jax
import jax.numpy as jnp

from compo_jax.incremental.ita import task_arithmetic
from compo_jax.incremental.modes import Method, Mode, newest
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register
from compo_jax.tree import Tree


def whole(module: Tree, magnitudes: Tree, directions: Tree) -> Tree:
    """The LoRA module `a b + Σ_k α_k D_k`, its factors side by side.

    Args:
      module: LoRA's a and b.
      magnitudes: α (…, tasks) for each adapted weight.
      directions: D, a LoRA module whose factors are those of all tasks side by side; zeros where a task hasn't come.
    """

    def entry(magnitude, new, old):
        scale = jnp.repeat(magnitude, old["b"].shape[-2] // magnitude.shape[-1], axis=-1)
        a = jnp.concatenate([old["a"], new["a"]], axis=-1)
        return {"a": a, "b": jnp.concatenate([scale[..., None] * old["b"], new["b"]], axis=-2)}

    return jax.tree.map(entry, magnitudes, module, directions)


def decoupled(module: Tree, magnitudes: Tree, directions: Tree, task: int | jax.Array) -> tuple[Tree, Tree]:
    """(magnitudes, directions) with the module's `a b`, of each weight and layer, as those of this task: its Frobenius
    norm, and what is left when divided by it."""

    def norm(_, new):
        product = jnp.matmul(new["a"], new["b"], precision=jax.lax.Precision.HIGHEST)
        return jnp.sqrt(jnp.sum(product**2, axis=(-2, -1)))

    def put(norm, new, old):
        rank = new["a"].shape[-1]
        columns = task * rank + jnp.arange(rank)
        unit = new["b"] / jnp.where(norm > 0, norm, 1)[..., None, None]  # a module may have learned nothing
        return {"a": old["a"].at[..., columns].set(new["a"]), "b": old["b"].at[..., columns, :].set(unit)}

    norms = jax.tree.map(norm, magnitudes, module)
    grown = jax.tree.map(lambda all, norm: all.at[..., task].set(norm), magnitudes, norms)
    return grown, jax.tree.map(put, norms, module, directions)


def decoupled_low_rank(setup: Setup, method: Method) -> Mode:
    """Trained are a new LoRA module and the magnitudes of the earlier ones, a number for each task, weight and layer.

    A task begins with the model that the task before left. (In the release all layers share a magnitude, and each task
    begins with 0.8 for all.) Memory and step have room for the directions of all tasks, and cost as much from the first
    task on.
    """
    plain = task_arithmetic(setup, method)
    base, adapter, tasks = setup.base, method.adapter, len(setup.stream.tasks)
    if adapter.name != "lora":
        raise ValueError(f"method {method.name!r} keeps the factors of LoRA: take adapters.lora()")

    def features(held, trained, images):
        module = whole(trained["module"], trained["magnitudes"], held["directions"])
        return plain.features(held, module, images)

    def remember(memory, task, first, trained, head, key):
        module, magnitudes = (jax.tree.map(jnp.asarray, trained[part]) for part in ("module", "magnitudes"))
        magnitudes, directions = decoupled(module, magnitudes, memory["directions"], memory["tasks"])
        return {"magnitudes": magnitudes, "directions": directions, "tasks": memory["tasks"] + 1}

    blank = adapter.scale(adapter.init(jax.random.key(0), base), base, 0.0)
    blank = jax.tree.map(jnp.zeros_like, adapter.sum([blank] * tasks, base, [0.0] * tasks))
    sizes = jax.tree.map(lambda w: jnp.zeros((*w.shape[:-2], tasks), w.dtype), adapter.delta(blank, base))
    return plain._replace(
        begin=lambda key, memory, task: {"module": adapter.init(key, base), "magnitudes": memory["magnitudes"]},
        features=features,
        memory={"magnitudes": sizes, "directions": blank, "tasks": jnp.int32(0)},
        hold=lambda memory: {"base": base, "directions": memory["directions"]},
        penalty=lambda *_: jnp.zeros(()),
        keep=lambda memory, trained: whole(trained["module"], trained["magnitudes"], memory["directions"]),
        remember=remember,
        at_once=False,
        compose=newest,
    )


register("sdlora", decoupled_low_rank, "scalable decoupled LoRA (SD-LoRA; Wu et al., 2025, arXiv 2501.13198)")
