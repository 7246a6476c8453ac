"""Two ways to run the same step on any number of devices: jit over a mesh, and pmap."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from compo_jax import mesh as meshes
from compo_jax.train.step import TrainState, make_step
from compo_jax.tree import Tree


class Runner(NamedTuple):
    """How a step is run. In a job of several processes each of them calls all four, with the same whole trees.

    Attributes:
      place: puts a state or a context (the same on every device) where the step wants it; of several processes'
        values, which may differ by rounding, process 0's.
      shard: divides a batch (first axis) among the devices.
      step: `(state, context, batch) -> (state, metrics)` on what `place` and `shard` return. The new state takes the
        memory of the old one, which can't be read afterwards; place a copy of arrays that are still needed.
      fetch: a placed tree as one copy, for saving and reading.
    """

    place: Callable[[Tree], Tree]
    shard: Callable[[Tree], Tree]
    step: Callable[[TrainState, Tree, Tree], tuple[TrainState, Tree]]
    fetch: Callable[[Tree], Tree]


def _check(batch: Tree, devices: int) -> None:
    shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0] or not shapes[0][0]:
        raise ValueError(f"a batch is arrays of as many rows each, one or more, and not of shapes {shapes}")
    if shapes[0][0] % devices:
        raise ValueError(
            f"a batch of {shapes[0][0]} can't be divided among {devices} devices: choose a multiple of {devices}"
        )


def jit_runner(loss, optimizer, *, extras=None, mesh: Mesh | None = None) -> Runner:
    """The step of `make_step(loss, optimizer, extras=extras)` under jit, the batch split over `mesh`'s data axis.

    The default mesh has every device of every process. The loss sees the whole batch: XLA divides the work and sums
    the gradients.
    """
    mesh = meshes.data_mesh() if mesh is None else mesh
    step = jax.jit(make_step(loss, optimizer, extras=extras), donate_argnums=0)

    def place(tree):
        return meshes.put(meshes.agreed(tree), meshes.replicated(mesh))

    def shard(batch):
        _check(batch, mesh.size)
        return meshes.put(batch, meshes.split(mesh))

    return Runner(place, shard, step, meshes.fetch)


def pmap_runner(loss, optimizer, *, extras=None, devices: int | None = None) -> Runner:
    """The same step under `jax.pmap`: each device sees its part of the batch, and gradients are averaged.

    Equal to `jit_runner` for a loss that is a plain mean over the batch; randomness drawn for a batch differs, since
    each device draws for its own part, all from one key. JAX calls pmap the old way, a layer over `jax.jit` and
    `jax.shard_map` by now, so that there is nothing to gain in speed: take `jit_runner` for new work.
    """
    mesh = meshes.data_mesh(devices)
    count, own = mesh.size, [d.process_index == jax.process_index() for d in mesh.devices.flat]
    here = meshes.data_mesh(sum(own))  # of several processes, pmap takes from each what its own devices hold
    split = meshes.split(here)
    step = make_step(loss, optimizer, extras=extras, axis=meshes.DATA)
    # Under jit each device makes its own row only; stacking first would hold every copy on one device.
    copies = jax.jit(
        lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (here.size, *x.shape)), tree), out_shardings=split
    )

    def shard(batch):
        _check(batch, count)
        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        return jax.device_put(parts if all(own) else jax.tree.map(lambda x: x[np.array(own)], parts), split)

    return Runner(
        place=lambda tree: copies(jax.device_put(meshes.agreed(tree), meshes.replicated(here))),
        shard=shard,
        step=jax.pmap(step, axis_name=meshes.DATA, devices=list(mesh.devices.flat), donate_argnums=0),
        fetch=lambda tree: jax.tree.map(lambda x: x.addressable_data(0)[0], tree),
    )


RUNNERS = {"jit": jit_runner, "pmap": pmap_runner}
