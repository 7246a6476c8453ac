"""The only place that makes a device mesh or a sharding. Axes are Auto: differentiating over a batch sharded on an
Explicit axis raises."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"  # the mesh axis that a batch is split over


def data_mesh(devices: int | None = None) -> Mesh:
    """A one-dimensional mesh over `devices` devices (default: all of them) for data parallelism."""
    available = jax.devices()
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


def start_distributed(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins a multi-host job (`jax.distributed.initialize`); call it before anything else touches a device.

    With no arguments the cluster (Slurm, Cloud TPU, ...) is detected.
    """
    jax.distributed.initialize(coordinator, processes, process)
