"""The coefficients of a task in closed form: one Newton step, from one exact Hessian product for each coefficient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compo_jax.curvature import landscape
from compo_jax.data import Split
from compo_jax.modular.batches import balanced_batches
from compo_jax.modular.edit import set_route
from compo_jax.modular.evaluate import require_tasks
from compo_jax.modular.losses import Prepare, cross_entropy, forward
from compo_jax.modular.net import Network


class NewtonStep(NamedTuple):
    """A task's network with its new coefficients, and what they were told to be worth.

    Attributes:
      network: its batch statistics are those of the old coefficients: train on, or take them again (`statistics`).
      damping: μ that was taken, in multiples of the largest |eigenvalue|; infinity where no step lowered the loss.
      loss: before, in nats.
      forecast, true: after, by the expansion and by the network.
    """

    network: Network
    damping: float
    loss: float
    forecast: float
    true: float


def newton_route(
    network: Network,
    prepare: Prepare,
    split: Split,
    *,
    images: int = 256,
    dampings: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
) -> NewtonStep:
    """`c - V (|Λ| + μ)⁻¹ Vᵀ g` with gradient g and Hessian `V Λ Vᵀ` of the loss in the coefficients c of all layers.

    A template at a layer is a module, and c its weight: the landscape of a composition, whose Hessian costs a Hessian
    product a module. Eigenvalues count by their size, so that the step leads down where curvature is negative, too
    (Dauphin et al., 2014, arXiv 1406.2572). Of the dampings μ the one of the lowest true loss is taken.

    Args:
      network: linear, of one task; its head should be one of the task (train it first).
      split: the task's labelled images, of which the first batch of `images` is looked at, by its batch statistics.

    ValueError for another kind of route, and for more than one task.
    """
    net, variables = network
    if net.route != "linear" or len(net.classes) != 1:
        raise ValueError(
            f"a Newton step is of the coefficients of one task, and this network has {net.route} routes of "
            f"{len(net.classes)}: see `take_tasks`, `new_task`"
        )
    require_tasks(net, [split], labels=True)
    route = variables["params"]["route"]
    batch = next(balanced_batches([split], min(images, len(split)), 0)(0))
    rows, labels = prepare(batch["image"])[None], jnp.asarray(batch["label"])[None]

    def loss(weights, rows, labels):
        return cross_entropy(forward(net, variables, rows, weights, True), labels)

    units = jnp.eye(route.size).reshape(-1, *route.shape)
    land = landscape(loss, route, list(units), rows, labels, check=np.zeros((1, route.size)))
    gradient, (values, vectors) = np.asarray(land.slope, np.float64), np.linalg.eigh(np.asarray(land.gram, np.float64))
    scale = max(float(np.abs(values).max()), 1e-12)
    steps = [np.zeros(route.size)]
    steps += [-vectors @ ((vectors.T @ gradient) / (np.abs(values) + damping * scale)) for damping in dampings]
    steps = jnp.asarray(np.array(steps), route.dtype)
    value, moved = jax.jit(loss), route + steps.reshape(-1, *route.shape)
    reached = [float(value(weights, rows, labels)) for weights in moved]
    best = int(np.nanargmin(reached))
    stepped = Network(net, set_route(variables, moved[best]))
    forecast = float(land.predict(steps[best]))
    return NewtonStep(stepped, (np.inf, *dampings)[best], reached[0], forecast, reached[best])
