"""One task of a modular network as a plain network, every block written out."""

import jax
import numpy as np

from compo_jax.models.isometric import IsometricNet
from compo_jax.modular import routes
from compo_jax.modular.edit import take_tasks
from compo_jax.modular.mixing import mix_templates
from compo_jax.modular.net import ModularNet, Network, Route
from compo_jax.tree import Tree


def block(net: ModularNet, params: Tree, layer: int, weights) -> Tree:
    """The parameters of the block that these weights (M,), or (groups, M), mix at that layer, as
    `models.isometric.Block` names them.

    `params` are of one task, see `take_tasks`; its gain at that layer becomes part of the last BN.
    """
    kernels = mix_templates(params["templates"], weights, net.groups)
    norms = params["norm"]["blocks"]
    if net.bn == "template":
        norms = mix_templates(norms, weights, net.groups)
    else:
        norms = jax.tree.map(lambda x: x[0, layer] if net.bn == "task" else x[layer], norms)
    if net.gain:
        last = f"norm{len(norms)}"
        norms = norms | {last: jax.tree.map(lambda x: x * params["gain"][0, layer], norms[last])}
    return {name: {"kernel": kernel} for name, kernel in kernels.items()} | norms


def plain(network: Network, task: int = 0, route: Route | None = None) -> tuple[IsometricNet, Tree]:
    """(network, variables) that give the task's logits, with as many blocks as the route has layers.

    A hard route is a plain network, and under weight-space mixing any route is; ValueError for a soft one under
    output-space mixing. A gain becomes part of each block's last BN. `route` as in `ModularNet`.
    """
    net, variables = network
    one, taken = take_tasks(network, [task])
    params, statistics = taken["params"], taken["batch_stats"]["tasks"]
    weights = (route or routes.KINDS[net.route])(variables["params"]["route"])[task]
    chosen, one_hot = routes.indices(weights), net.groups == 1 and np.array_equal(weights, routes.hard(weights))
    if net.mixing == "outputs" and not one_hot:
        raise ValueError("a soft mixture of outputs is no plain network: give a hard route (route=routes.hard)")
    layers = [block(one, params, layer, chosen[layer] if one_hot else weights[layer]) for layer in range(net.layers)]

    def of_layer(layer):
        return jax.tree.map(lambda x: x[layer] if net.bn == "layer" else x[0, layer], statistics["layers"]["branch"])

    stem_norm, stem_statistics = params["norm"]["stem"], statistics["stem"]
    if net.bn == "task":
        stem_norm = jax.tree.map(lambda x: x[0], stem_norm)
    if net.bn != "layer":
        stem_statistics = jax.tree.map(lambda x: x[0], stem_statistics)
    names = [f"block{layer}" for layer in range(net.layers)]
    exported = {
        "params": {
            "stem": {"kernel": params["stem"]},
            "stem_norm": stem_norm,
            "head": params["head" if net.shared_head else "head_0"],
            **dict(zip(names, layers, strict=True)),
        },
        "batch_stats": {"stem_norm": stem_statistics, **{name: of_layer(i) for i, name in enumerate(names)}},
    }
    return IsometricNet(one.classes[0], net.layers, net.width, net.patch, net.block, net.dtype), exported
