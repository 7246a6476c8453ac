"""What a pool knows when modules are left out of it, with no training."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Float

from compo_jax.incremental.classifier import Head
from compo_jax.incremental.evaluate import Evaluator
from compo_jax.incremental.pooled import pool_head
from compo_jax.pool import ModulePool
from compo_jax.tree import Tree


def _others(task: int, tasks: int, weight: float = 0.0) -> list[float]:
    return [weight if s == task else 1 / (tasks - 1) for s in range(tasks)]


#: `(task, tasks) -> weights` of the modules: the task's module alone; the mean of all others; that, less the share
#: that the module had in the mean of all.
WEIGHTINGS: dict[str, Callable[[int, int], list[float]]] = {
    "specialise": lambda task, tasks: [float(s == task) for s in range(tasks)],
    "unlearn": _others,
    "subtract": lambda task, tasks: _others(task, tasks, -1 / tasks),
}


def skills(
    weighting: str, pool: ModulePool, base: Tree, reference: Head, test: Evaluator
) -> Float[np.ndarray, "tasks tasks"]:
    """`[t, s]`, the accuracy on task s among all classes when the pool is specialised on task t, or has unlearned it.

    What training did to the head's columns of a task is undone, too, where its module has no positive weight.

    Args:
      weighting: one of `WEIGHTINGS`.
      pool: a module for each task of the stream, two or more, which are averaged.
      reference: the newest aligned head; see `stream_head`.
    """
    names = pool.names()
    head = pool_head(pool, names, reference)
    columns = np.repeat(range(len(names)), [len(pool.manifest(name).classes) for name in names])  # whose they are

    def row(task: int) -> np.ndarray:
        weights = WEIGHTINGS[weighting](task, len(names))
        kept = np.isin(columns, [s for s, weight in enumerate(weights) if weight > 0])
        reached = [s for s, weight in enumerate(weights) if weight]
        params = pool.compose(base, [names[s] for s in reached], [weights[s] for s in reached])
        mixed = jax.tree.map(lambda trained, start: np.where(kept, trained, start), head, reference)
        return test(params, mixed, len(names)).incremental

    with ThreadPoolExecutor(2) as threads:  # a module is read while another is tested
        return np.stack(list(threads.map(row, range(len(names)))))
