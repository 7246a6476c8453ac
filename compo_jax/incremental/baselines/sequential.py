"""Fine-tuning: one module is trained on and on."""

from compo_jax.incremental.ita import task_arithmetic
from compo_jax.incremental.modes import Method, Mode, newest
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


def fine_tuning(setup: Setup, method: Method) -> Mode:
    """A task's training begins with the module that the task before it left, and nothing else is remembered."""
    return task_arithmetic(setup, method)._replace(
        memory={"module": method.adapter.init(setup.keys(0).module, setup.base)},
        begin=lambda key, memory, task: memory["module"],
        remember=lambda memory, task, first, module, head, key: {**memory, "module": module},
        at_once=False,
        compose=newest,
    )


register("sequential", fine_tuning, "one module trained on and on, with nothing against forgetting")
