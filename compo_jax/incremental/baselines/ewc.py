"""Elastic weight consolidation: fine-tuning, held where the earlier tasks' Fisher is large."""

import jax
import jax.numpy as jnp

from compo_jax import tree
from compo_jax.incremental.baselines.sequential import fine_tuning
from compo_jax.incremental.classifier import task_columns
from compo_jax.incremental.fisher import task_fisher
from compo_jax.incremental.modes import Method, Mode
from compo_jax.incremental.regularisers import ita_penalty, mean_entry
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


def elastic_consolidation(setup: Setup, method: Method) -> Mode:
    """Sequential, held by `½ λ Σ F̃ ⊙ (Δ - Δ_before)²` where F̃, the Fisher diagonal of each task at the weights that
    it left, is summed over the tasks with an older one's share falling by γ = 0.95 a task."""
    plain = fine_tuning(setup, method)
    base, stream, adapter, start = setup.base, setup.stream, method.adapter, plain.memory["module"]
    adapted = [f"^{name}$" for name in tree.names(adapter.delta(start, base))]
    fisher = task_fisher(setup, adapted, ["diagonal"])

    def remember(memory, task, first, module, head, key):
        params, classes = tree.add(base, adapter.delta(module, base)), len(task.classes)
        wide = task_columns(head, 0, classes, len(stream.classes))  # one shape, one compilation
        newest = fisher.of(params, task.train, wide, 0, classes, key, seed=[first])["diagonal"].mean
        total = tree.weighted_sum([memory["fisher"], newest], [0.95, 1.0])
        return {"module": module, "fisher": total, "tasks": 0.95 * memory["tasks"] + 1}

    return plain._replace(
        memory=plain.memory
        | {"fisher": jax.tree.map(jnp.zeros_like, adapter.delta(start, base)), "tasks": jnp.zeros(())},
        hold=lambda memory: {"base": base, "before": adapter.delta(memory["module"], base), "fisher": memory["fisher"]},
        penalty=lambda held, module, _, alpha: ita_penalty(
            tree.weighted_sum([adapter.delta(module, held["base"]), held["before"]], [1.0, -1.0]), held["fisher"], alpha
        ),
        alpha_unit=lambda memory, _: mean_entry(memory["fisher"]) / jnp.maximum(memory["tasks"], 1),  # of one task
        remember=remember,
    )


register(
    "ewc", elastic_consolidation,
    "online elastic weight consolidation (Schwarz et al., 2018, arXiv 1805.06370)", alpha=0.1, coupled=True,
)  # fmt: skip
