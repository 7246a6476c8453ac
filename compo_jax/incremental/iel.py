"""Incremental ensemble learning: a module is trained inside the composition with all earlier ones."""

import jax
import jax.numpy as jnp

from compo_jax import adapters, tree
from compo_jax.incremental.ita import task_arithmetic
from compo_jax.incremental.modes import Method, Mode
from compo_jax.incremental.regularisers import iel_penalty
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


def ensemble_learning(setup: Setup, method: Method) -> Mode:
    """The composed model is trained, the earlier modules frozen in it: `W₀ + (1/T)(Σ_{s<t} Δ_s + Δ_t)`.

    The past is folded once a task: a sum of LoRA modules, whose ranks add up, into the weight; one of full deltas or of
    (IA)³, which is as large as each, into a module beside the base.
    """
    base, adapter = setup.base, method.adapter
    forward = adapters.adapted(setup.model, adapter)
    blank = adapter.scale(adapter.init(jax.random.key(0), base), base, 0.0)
    doubled = jax.eval_shape(lambda: adapter.sum([blank, blank], base, [1.0, 1.0]))
    closed = jax.tree.map(lambda x: x.shape, doubled) == jax.tree.map(lambda x: x.shape, blank)

    def hold(memory):
        past, tasks = memory["sum"], memory["tasks"] + 1
        if closed:
            return {"base": base, "module": past, "past": adapter.delta(past, base), "tasks": tasks}
        return {"base": tree.add(base, past, 1 / tasks), "past": past, "tasks": tasks}

    def features(held, module, images):
        share = 1 / held["tasks"]
        if closed:
            whole = adapter.sum([held["module"], module], held["base"], [share, share])
        else:
            whole = adapter.scale(module, held["base"], share)
        return forward(held["base"], whole, images, method="features")

    def remember(memory, task, first, module, head, key):
        if closed:
            total = adapter.sum([memory["sum"], module], base, [1.0, 1.0])
        else:
            total = tree.add(memory["sum"], adapter.delta(module, base))
        return {"sum": total, "tasks": memory["tasks"] + 1}

    return task_arithmetic(setup, method)._replace(
        memory={"sum": blank if closed else adapter.delta(blank, base), "tasks": jnp.zeros(())},
        hold=hold,
        features=features,
        penalty=lambda held, module, f, alpha: iel_penalty(
            adapter.delta(module, held["base"]), held["past"], f, alpha, held["tasks"]
        ),
        remember=remember,
        at_once=False,
        metric=lambda reference: reference.every,
    )


_PAPER = "Porrello et al., 2025, arXiv 2405.16350"
_PULL = (0.1, 0.05)

register("iel", ensemble_learning, f"incremental ensemble learning ({_PAPER})", averages=True, alpha=0.1, pull=_PULL)
register("iel_pull", ensemble_learning, f"without the penalty on weights ({_PAPER})", averages=True, pull=_PULL)
register("iel_none", ensemble_learning, "modules trained in their ensemble, with no penalty", averages=True)
