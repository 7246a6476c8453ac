"""The only place that makes a device mesh or a sharding, and that knows of other hosts. Axes are Auto: differentiating
over a batch sharded on an Explicit axis raises.

A job of several processes runs the same program in each of them. They read one file system, and process 0 writes to it.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

DATA = "data"  # the mesh axis that a batch is split over


def data_mesh(devices: int | None = None) -> Mesh:
    """A one-dimensional mesh for data parallelism.

    Args:
      devices: so many of this process's own devices; default: all devices of all processes.
    """
    available = jax.devices() if devices is None else jax.local_devices()
    count = len(available) if devices is None else devices
    if not 1 <= count <= len(available):
        raise ValueError(f"{count} devices were asked for and {len(available)} are there: {available}")
    return Mesh(np.array(available[:count]), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis of an array is divided over the mesh's data axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))


def put(tree: Any, sharding: Sharding) -> Any:
    """`jax.device_put`, to devices of other processes too: each process has the whole tree and takes its own pieces."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda at: x[at]), tree)


def fetch(tree: Any) -> Any:
    """A placed tree as one that this process can read whole; the same tree where it can already.

    Every process calls it, for divided arrays are gathered.
    """

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        return x.addressable_data(0) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


# -- several processes -------------------------------------------------------------------------------------------------


def start_distributed(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins a job of several processes (`jax.distributed.initialize`); call it before anything else touches a device.

    Args:
      coordinator: ADDRESS:PORT of process 0; a free port there.
      processes, process: how many there are, and which of them this is, from 0.

    With no arguments the cluster (Slurm, Cloud TPU, ...) is detected. Where a process dies, the others end too, at once
    or within two minutes; start all of them again to go on.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it keeps SIGTERM from ending a process
    # Short, since a process that failed waits so long for the others, which wait for it.
    jax.distributed.initialize(coordinator, processes, process, shutdown_timeout_seconds=60)
    barrier("start")  # gloo waits 30 seconds for the others' first call


def several() -> bool:
    """Whether this process is one of several."""
    # Asked first, since counting processes starts the devices.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process writes the job's files: process 0 does."""
    return not several() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here; what one wrote before, the others read after."""
    if several():
        multihost_utils.sync_global_devices(name)


def agreed(tree: Any) -> Any:
    """Process 0's values of a tree that has the same shapes and types in every process, which may differ by rounding.

    For whatever decides what is computed next, and for what training keeps a copy of on each device.
    """
    if not several():
        return tree
    keys = jax.tree.map(
        lambda x: isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key), tree
    )
    plain = jax.tree.map(lambda x, key: jax.random.key_data(x) if key else x, tree, keys)

    def back(x, like, key):
        return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if key else x

    return jax.tree.map(back, multihost_utils.broadcast_one_to_all(plain), tree, keys)
