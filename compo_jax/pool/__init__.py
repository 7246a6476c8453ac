"""A pool of trained modules in a folder: add, list, load, remove, and compose them on their base."""

from compo_jax.pool.manifest import Manifest as Manifest
from compo_jax.pool.pool import ModulePool as ModulePool
