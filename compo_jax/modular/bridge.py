"""The loss of re-routings near a trained route, forecast by curvature: a route is a composition of templates, too."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from compo_jax.curvature import Landscape, landscape
from compo_jax.modular.edit import take_tasks
from compo_jax.modular.export import block, plain
from compo_jax.modular.net import Network, Route


def route_landscape(
    network: Network,
    task: int,
    layer: int,
    *args: Any,
    route: Route | None = None,
    loss: Callable[[Array, Array], Array] | None = None,
    **options: Any,
) -> Landscape:
    """The task's loss over all sums of the templates at one layer, the other layers as trained.

    With θ what the route mixes there and a its weights, the landscape is over `θ + Σ w_m T_m`: `.predict(b - a)`
    forecasts the loss of the weights b at that layer. The expansion is at the trained route: it is good for b near a,
    and `.remainder()` says how far off it is elsewhere. The kinks of ReLU are in no Hessian, so that near is nearer in
    a small network on few images. With groups of channels w has a number for each group and template, in this order.

    Args:
      args: the one batch (images (batch, height, width, channels), labels (batch,)); or `batches=` of such pairs.
      route: as in `ModularNet`.
      loss: `(logits, labels) -> mean`; default the cross-entropy.
      options: of `curvature.landscape`: batches, check, anchor, ...

    Batch statistics are those in the network's variables.
    """
    net = network.net
    if net.mixing != "weights" or net.templates < 2:
        raise ValueError(
            "a route is a composition of weights where these are mixed, and there are two templates or more"
        )
    if not 0 <= layer < net.layers:
        raise ValueError(f"there is no layer {layer} among {net.layers}")
    value = loss or (lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean())
    one, taken = take_tasks(network, [task])
    model, exported = plain(network, task, route)
    name = f"block{layer}"
    base = exported["params"][name]
    shape = taken["params"]["route"].shape[2:]
    corners = [block(one, taken["params"], layer, jnp.reshape(unit, shape)) for unit in jnp.eye(math.prod(shape))]

    def delta(path, corner):
        return None if path[0].key.startswith("norm") and net.bn != "template" else corner

    deltas = [jax.tree_util.tree_map_with_path(delta, corner) for corner in corners]

    def of_block(params, images, labels):
        whole = {**exported, "params": {**exported["params"], name: params}}
        return value(model.apply(whole, images), labels)

    return landscape(of_block, base, deltas, *args, **options)
