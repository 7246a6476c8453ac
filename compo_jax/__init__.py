"""Composing models in JAX: small modules trained around one base, pooled, weighed by exact curvature, added together.

What lives where; a room imports only from floors below its own:

    floor  room
    4      report       figures, tables and the page of a run
    3      incremental  wing 1: tasks one after another, a module and a head each, and what their composition knows
           modular      wing 2: blocks shared by tasks as templates, and a learned order of them for each task
    2      compose      modules into one model: arithmetic on task vectors, merge rules, solves with exact curvature
           train        one pure step, runners for any number of devices, a loop that can be killed and resumed
           pool         trained modules in a folder: added, found, loaded, removed, composed on their base
    1      adapters     LoRA, (IA)³ and full deltas as pairs of pure functions; PEFT's folders
           curvature    exact curvature of any function of any pytree: products, Fisher, Kronecker factors, landscapes
           data         streams of tasks, batches that are addressed by step, augmentation
           models       Flax Linen models, and checkpoints that others trained
    0      tree         algebra on pytrees that `jax.tree` and `optax.tree` lack
           mesh         device meshes, shardings, several hosts
           files        paths, locks and why a file was not written
           lapack       decompositions of matrices, which numbers that aren't finite can't stop
           memory       freed memory that is kept for the next step

A room is loaded when it is first touched: `import compo_jax as cj; cj.curvature.hvp`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compo_jax import adapters as adapters
    from compo_jax import compose as compose
    from compo_jax import curvature as curvature
    from compo_jax import data as data
    from compo_jax import files as files
    from compo_jax import incremental as incremental
    from compo_jax import lapack as lapack
    from compo_jax import memory as memory
    from compo_jax import mesh as mesh
    from compo_jax import models as models
    from compo_jax import modular as modular
    from compo_jax import pool as pool
    from compo_jax import report as report
    from compo_jax import train as train
    from compo_jax import tree as tree

__version__ = "0.1.0"
_ROOMS = (
    "adapters", "compose", "curvature", "data", "files", "incremental", "lapack", "memory", "mesh", "models", "modular",
    "pool", "report", "train", "tree",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
