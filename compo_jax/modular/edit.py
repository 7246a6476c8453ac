"""Tasks, layers and templates of a trained modular network added, removed, reordered and repeated.

Each function takes a network with its variables and returns one anew.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from compo_jax import tree
from compo_jax.modular import routes
from compo_jax.modular.layout import join, parted, take
from compo_jax.modular.mixing import count
from compo_jax.modular.net import ModularNet, Network
from compo_jax.tree import Tree


def _heads(net: ModularNet, params: Tree, tasks: Sequence[int]) -> dict[str, Tree]:
    return {} if net.shared_head else {f"head_{i}": params[f"head_{t}"] for i, t in enumerate(tasks)}


def without_heads(network: Network) -> Network:
    """The network without the parameters of heads that its tasks have each to itself."""
    net, variables = network
    params = {k: v for k, v in variables["params"].items() if net.shared_head or not k.startswith("head_")}
    return Network(net, {**variables, "params": params})


def take_tasks(network: Network, tasks: Sequence[int]) -> Network:
    """The network of some of the tasks, in this order."""
    net, params = network.net, network.variables["params"]
    taken = take(without_heads(network), "task", tasks)
    taken["params"] |= _heads(net, params, tasks)
    return Network(net.clone(classes=tuple(net.classes[t] for t in tasks)), taken)


def add_task(network: Network, other: Network) -> Network:
    """The network with the tasks of another behind its own; the outputs of its own don't change by a bit.

    ValueError where the other has other settings, or doesn't share the stem and templates to the bit.
    """
    # Neither the compute dtype nor unrolling nor where training started is a property of the variables.
    alike = lambda net: net.clone(classes=(2,), dtype=None, unroll=False, start="shared")
    if alike(network.net) != alike(other.net):
        raise ValueError("the tasks to add are of a network with other settings: make it with `take_tasks` or new_task")
    digests = [set(_digests(parted(one).shared).items()) for one in (network, other)]
    if differing := sorted(digests[0] ^ digests[1]):
        names = list(dict.fromkeys(name for name, _ in differing))
        if all(name.startswith("batch_stats/") for name in names):
            raise ValueError(
                f"the tasks to add have other batch statistics ({', '.join(names)}), which all tasks share with "
                'bn="layer": train them with `Settings(statistics="stored")`'
            )
        raise ValueError(
            f"the tasks to add were trained with other shared weights ({', '.join(names)}): keep these frozen, with "
            "one of `modular.PARTS` that leaves them as they are"
        )
    net, count = network.net, len(network.net.classes)
    joined = join(net, "task", without_heads(network).variables, without_heads(other).variables)
    joined["params"] |= _heads(net, network.variables["params"], range(count))
    theirs = _heads(other.net, other.variables["params"], range(len(other.net.classes)))
    joined["params"] |= {f"head_{count + i}": head for i, head in enumerate(theirs.values())}
    return Network(net.clone(classes=net.classes + other.net.classes), joined)


def _digests(parts: Tree) -> dict[str, str]:
    leaves = zip(tree.names(parts), jax.tree.leaves(parts), strict=True)
    return {name: tree.fingerprint(leaf) for name, leaf in leaves}


def new_task(network: Network, key: Key[Array, ""], classes: int | None = None, *, like: int | None = None) -> Network:
    """A network of one new task on the same stem and templates.

    Its head is new (kernel truncated normal of variance 1 / width, bias 0), unless the tasks share one. Its route, gain
    and BN are those of task `like`; by default they are the tasks' means, but logits are new, of almost equal weights.
    """
    net, variables = network
    one, taken = take_tasks(network, [0 if like is None else like])
    params = taken["params"]
    key_route, key_head = jax.random.split(key)
    if like is None:
        bare = without_heads(network)
        means = jax.tree.map(lambda x: jnp.mean(x, axis=0, keepdims=True), parted(bare).of_tasks)
        taken = tree.combine(means, bare.variables)
        params = taken["params"] | _heads(net, variables["params"], [0])
        if net.route != "linear":
            params["route"] = 0.01 * jax.random.normal(key_route, params["route"].shape, params["route"].dtype)
    if net.shared_head:
        if classes not in (None, net.classes[0]):
            raise ValueError(f"the tasks share a head of {net.classes[0]} classes, and the new one has {classes}")
        return Network(one, {**taken, "params": params})
    if classes is None or classes < 2:
        raise ValueError(f"a new task needs two classes or more, not {classes}")
    kernel = params["head_0"]["kernel"]
    fresh = jax.nn.initializers.lecun_normal()(key_head, (kernel.shape[0], classes), kernel.dtype)
    params["head_0"] = {"kernel": fresh, "bias": jnp.zeros(classes, kernel.dtype)}
    return Network(one.clone(classes=(classes,)), {**taken, "params": params})


def set_route(variables: Tree, logits: Array) -> Tree:
    """The variables with these route logits or coefficients; ValueError where they are of another size, or no route."""
    routes.require_logits(logits)
    logits, have = jnp.asarray(logits), variables["params"]["route"]
    if logits.shape != have.shape:
        raise ValueError(
            f"a route of shape {logits.shape} was given for one of {have.shape}: (tasks, layers, templates), or with "
            "groups (tasks, layers, groups, templates). `take_layers` changes the number of layers, `add_templates` "
            "that of templates"
        )
    return {**variables, "params": {**variables["params"], "route": jnp.asarray(logits, have.dtype)}}


def harden(network: Network) -> Network:
    """The network whose layers each take one template, that of the largest weight: the nearest one-hot order.

    Of a linear network coefficients become 0 and 1; a soft one becomes a hard one. Take the statistics again
    (`statistics`) or train on in this order (`learner(..., trained=FIXED_ORDER)`).
    """
    net, variables = network
    if net.route == "linear":
        return Network(net, set_route(variables, routes.hard(variables["params"]["route"])))
    return Network(net.clone(route="hard"), variables)


def take_layers(network: Network, order: Sequence[int] | Int[np.ndarray, " n"]) -> Network:
    """The network whose layer i is layer `order[i]` of this one, with its BN.

    A permutation reorders, `np.delete(range(L), l)` removes, `np.repeat(range(L), 2)` repeats each layer (AABB),
    `np.tile(range(L), 2)` the whole (ABAB).
    """
    return Network(network.net.clone(layers=len(order)), take(network, "layer", order))


def add_layer(network: Network, at: int, template: int) -> Network:
    """The network with one more layer before layer `at` (or behind the last one), through `template` in all tasks.

    Its BN is a copy of that of the layer before it (at 0, of the one behind it): take the statistics again
    (`evaluate.statistics`).
    """
    net = network.net
    if not 0 <= at <= net.layers:
        raise ValueError(
            f"a layer can't be put at {at} of {net.layers}: 0 is before the first, {net.layers} at the end"
        )
    order = np.insert(np.arange(net.layers), at, max(at - 1, 0))
    net, variables = take_layers(network, order)
    route = variables["params"]["route"]
    height = 1.0  # of a coefficient
    if net.route != "linear":
        finite = np.asarray(route)[np.isfinite(route)]  # -inf is a template that a layer can't take
        height = np.ptp(finite) + 10.0  # a soft route takes the template too, and the logits' scale is kept
    chosen = route.at[:, at].set(height * routes.fixed(np.full(route[:, at, ..., 0].shape, template), net.templates))
    return Network(net, set_route(variables, chosen))


def add_templates(network: Network, kernels: Tree) -> Network:
    """The network with more templates, `kernels` stacked as its own; no linear or hard route changes.

    The coefficients of a new template are 0, its logits the lowest that a layer has; BN of a new template starts at the
    identity.
    ValueError for kernels of another shape, and for NaN or infinities in them.
    """
    net, variables = network
    templates = variables["params"]["templates"]
    if not (number := count(kernels)):
        raise ValueError("no template was given to add: kernels are stacked on axis 0, one entry for each template")
    tree.require_finite(kernels, "the new template")
    tree.require_like(
        jax.tree.map(lambda x: x[0], kernels), jax.tree.map(lambda x: x[0], templates), "the new template"
    )
    added = take(network, "template", [0] * number)
    params = added["params"]
    route = variables["params"]["route"]
    lowest = jnp.zeros_like(route[..., :1]) if net.route == "linear" else route.min(axis=-1, keepdims=True)
    params["route"], params["templates"] = jnp.broadcast_to(lowest, params["route"].shape), kernels
    if net.bn == "template":
        params["norm"] = tree.map_with_name(
            lambda name, x: jnp.ones_like(x) if name.endswith("scale") else jnp.zeros_like(x), params["norm"]
        )
    return Network(net.clone(templates=net.templates + number), join(net, "template", variables, added))


def remove_template(network: Network, template: int) -> Network:
    """The network without one template; ValueError where a route still goes through it (a coefficient that isn't 0, the
    largest logit of a layer), it isn't there, or no other is."""
    net, variables = network
    if not 0 <= template < net.templates:
        raise ValueError(f"there is no template {template} to remove: there are {net.templates}, from 0 on")
    if net.templates == 1:
        raise ValueError("the only template can't be removed: a network has one at least")
    route = np.asarray(variables["params"]["route"])
    used = np.argwhere(route[..., template] != 0 if net.route == "linear" else route.argmax(-1) == template)
    if len(used):
        places = ", ".join(f"layer {layer} of task {t}" for t, layer, *_ in used[:8].tolist())
        raise ValueError(
            f"template {template} is still used, in {places}{' ...' if len(used) > 8 else ''}: change the route there "
            "first (`set_route`), or take these layers out (`take_layers`)"
        )
    rest = [m for m in range(net.templates) if m != template]
    return Network(net.clone(templates=net.templates - 1), take(network, "template", rest))
