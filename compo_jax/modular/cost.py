"""What a network costs: scalars and multiply-adds."""

import jax

from compo_jax import tree
from compo_jax.models.isometric import convolutions
from compo_jax.models.sizes import whole_numbers, whole_patches
from compo_jax.modular.net import ModularNet
from compo_jax.tree import Tree


def parameters(params: Tree, *, route: bool = True) -> int:
    """How many scalars a network has; without `route` those of one whose blocks stand in a fixed order."""
    leaves = zip(tree.names(params), jax.tree.leaves(params), strict=True)
    return sum(leaf.size for name, leaf in leaves if route or name != "route")


def macs(net: ModularNet, size: int, channels: int = 3) -> int:
    """Multiply-adds of one image of `size` x `size` pixels through the convolutions of one task and its largest head.

    Weight-space mixing adds M multiply-adds a weight, once for a whole batch, on a hard route too: its weights are
    one-hot and are summed like others. The network that `plain` gives has none. ValueError where the patches leave a
    rest.
    """
    whole_numbers(size=size, channels=channels)
    whole_patches((size, size, channels), net.patch)
    positions = (size // net.patch) ** 2
    block = sum(c.size**2 * c.inputs // c.groups * c.outputs for c in convolutions(net.block, net.width))
    blocks = net.layers * (net.templates if net.mixing == "outputs" else 1)
    stem = net.patch**2 * channels * net.width
    return positions * (stem + blocks * block) + net.width * max(net.classes)
