"""One module that is trained on all tasks together: what the others are measured against."""

from compo_jax.data import pooled
from compo_jax.incremental.ita import task_arithmetic
from compo_jax.incremental.modes import Composition, Lesson, Method, Mode
from compo_jax.incremental.settings import Setup
from compo_jax.incremental.ways import register


def joint_training(setup: Setup, method: Method) -> Mode:
    """Nothing is trained before the last task has come, and then everything at once."""

    def lesson(stream, task):
        return Lesson("joint", pooled(stream), 0) if task == len(stream.tasks) - 1 else None

    def compose(names, task):
        return Composition(["joint"], ["joint"]) if task == len(names) - 1 else None

    return task_arithmetic(setup, method)._replace(lesson=lesson, at_once=False, compose=compose)


register("joint", joint_training, "one module trained on all tasks together")
