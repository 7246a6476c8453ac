"""A domain without labels: information maximisation chooses its route, templates and head stay as they are."""

import itertools
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.data import Task
from compo_jax.data.stream import Augmentation
from compo_jax.modular import routes
from compo_jax.modular.batches import balanced_batches
from compo_jax.modular.edit import new_task, set_route, take_tasks
from compo_jax.modular.evaluate import predictions, statistics
from compo_jax.modular.losses import Prepare, by_task, forward
from compo_jax.modular.net import ModularNet, Network
from compo_jax.modular.settings import Settings
from compo_jax.modular.updates import optimizer
from compo_jax.train import fit, init_state, jit_runner
from compo_jax.tree import Tree

MIXTURES = ("convex", "layers")


def information_maximisation(logits: Float[Array, "batch classes"]) -> Float[Array, ""]:
    """`E H(p) - H(E p)` in nats: low where each prediction is sure and all classes are predicted (Liang et al., 2020,
    arXiv 2002.08546). At least -log(classes). In float32 or wider: both terms are near each other.

    ValueError for no images, and for logits that give no probabilities (NaN or infinity; -inf is a class less); under
    tracing NaN.
    """
    if not logits.size:
        raise ValueError(f"information maximisation needs an image and a class, and the logits are {logits.shape}")
    p = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    tree.require_finite({"the logits' softmax": p}, "information maximisation")
    return jnp.mean(routes.entropy(p)) - routes.entropy(jnp.mean(p, axis=0))


def _on_route(network: Network, weights: Array, smoothing: float) -> Network:
    """The network on a route that can be learned on: these coefficients, or soft weights."""
    net, variables = network
    if net.route == "linear":
        return Network(net, set_route(variables, weights))
    return Network(net.clone(route="soft"), set_route(variables, routes.to_logits(weights, smoothing)))


def mean_source(network: Network, smoothing: float = 0.05) -> Network:
    """A one-task network whose route is the mean of the sources' routes, and so BN and its statistics.

    `smoothing` is of soft weights, which it is on where the sources aren't linear (see `routes.to_logits`).
    """
    if not network.net.shared_head:
        raise ValueError("a mean of sources is tested on their head: train the sources with shared_head=True")
    weights = routes.KINDS[network.net.route](network.variables["params"]["route"])
    return _on_route(new_task(network, jax.random.key(0)), weights.mean(axis=0, keepdims=True), smoothing)


def one_source(network: Network, source: int, smoothing: float = 0.05) -> Network:
    """The one-task network of a source; `smoothing` as in `mean_source`."""
    one = take_tasks(network, [source])
    return _on_route(one, routes.KINDS[one.net.route](one.variables["params"]["route"]), smoothing)


def source_objectives(
    network: Network, prepare: Prepare, target: Task, batch: int = 64, *, bn: str = "source"
) -> Float[np.ndarray, " sources"]:
    """Information maximisation of each source's network on the target's training images: the lowest is the best
    source that can be told without labels.

    `bn="target"` takes batch statistics on them first (on 20 batches at most, the same for all), so that sources are
    compared by what they see and not by how far their statistics are off. Each source is a network of its own there:
    BN that tasks share would take the mean of what all sources give.
    """
    if bn not in ("source", "target"):
        raise ValueError(f"{bn!r} is not among source, target")

    batches = list(itertools.islice(balanced_batches([target.train], batch, 0)(0), 20)) if bn == "target" else []

    def objective(source: int) -> Array:
        net, variables = take_tasks(network, [source])
        if batches:
            variables = statistics(net, prepare)(variables, batches)
        (logits,) = predictions(net, prepare)(variables, [target.train], batch)
        return information_maximisation(jnp.asarray(logits))

    return np.array([objective(source) for source in range(len(network.net.classes))])


def soup_of_sources(network: Network, prepare: Prepare, target: Task, batch: int = 64) -> list[int]:
    """The sources whose mean is the best that can be told without labels, found as a greedy soup: from the best source
    on, in the order of `source_objectives` with the target's statistics, each is taken in where the mean with it has no
    higher an objective (after Wortsman et al., 2022, arXiv 2203.05482, who weigh parameters by validation accuracy).

    `mean_source(take_tasks(network, soup), 1e-6)` is their network. It needs no rate and no steps, and one evaluation a
    source.
    """
    objectives = source_objectives(network, prepare, target, batch, bn="target")
    first, *others = (int(source) for source in np.argsort(objectives, kind="stable"))
    soup, lowest = [first], objectives[first]
    for source in others:
        mean = mean_source(take_tasks(network, [*soup, source]), 1e-6)
        (value,) = source_objectives(mean, prepare, target, batch, bn="target")
        if value <= lowest:
            soup, lowest = [*soup, source], value
    return soup


@runtime_checkable
class Adapt(Protocol):
    """The variables of a one-task network adapted to the target's training images.

    No label is read. `sources` are the routes' weights or coefficients that a mixture is of; `fit_options` are
    `train.fit`'s.
    """

    def __call__(
        self,
        variables: Tree,
        target: Task,
        seed: int,
        sources: Float[Array, "sources layers templates"] | None = None,
        **fit_options,
    ) -> Tree: ...


def adaptation(
    net: ModularNet,
    prepare: Prepare,
    settings: Settings,
    classes: Sequence[str],
    *,
    route: str = "free",
    bn: str = "source",
    prior: float = 0.0,
    consistency: float = 0.0,
    augment: Augmentation | None = None,
    runner=jit_runner,
) -> Adapt:
    """Adapts to a domain by information maximisation; templates and head stay to the bit.

    Args:
      net: of one task; `mean_source` and `one_source` make it and where training starts.
      settings: steps, batch, rates.
      classes: names of the sources' classes.
      route: `convex`, it is a convex mixture of `sources`, whose weights, one a source, are learned from equal ones on:
        the one to take where sources span the target; `layers`, the same with weights of its own at each layer;
        `free`, its coefficients or logits are learned; `fixed`, it stays.
      bn: `source`, as it is; `target`, statistics of the target (AdaBN: Li et al., 2016, arXiv 1603.04779); `affine`,
        those, and scale and bias are learned (Tent: Wang et al., 2021, arXiv 2006.10726).
      prior: weight of the pull towards the sources, 0 for none: of a mixture, of its weights' relative entropy to equal
        ones (nats; at each layer, averaged); of a free route, of `|c - c_0|² / |c_0|²`, c_0 where training starts.
      consistency: weight of the cross-entropy (nats) of the answers to images under `augment` with the answers to the
        images themselves as targets, which get no gradient (Xie et al., 2020, arXiv 1904.12848); 0 for none.
      runner: `jit_runner`, or `pmap_runner`, under which each device takes H(E p) over its own part of the batch, and
        needs two images of it.
    """
    _require_options(net, route, bn)
    if settings.batch < 2 and not (prior or consistency) and (route != "fixed" or bn == "affine"):
        raise ValueError("of one image information maximisation is zero whatever is predicted: take batches of two")
    _require_weights(route, prior, consistency, augment)
    trained = [pattern for pattern, yes in (("^route$", route == "free"), ("^norm/", bn == "affine")) if yes]
    transform, route_of = optimizer(settings), routes.KINDS[net.route]
    estimate = statistics(net, prepare)

    def weights_of(params, whole, sources):
        if route not in MIXTURES:
            return route_of(whole["route"])
        shares = jnp.broadcast_to(jax.nn.softmax(params["mixture"]), (net.layers, len(sources)))
        return jnp.einsum("ls,sl...->l...", shares, sources)[None]

    def distance(params, whole, start):
        if route in MIXTURES:
            shares = jax.nn.softmax(params["mixture"])
            return math.log(shares.shape[-1]) - jnp.mean(routes.entropy(shares))
        size = jnp.sum(start**2)
        return jnp.sum((whole["route"] - start) ** 2) / jnp.where(size > 0, size, 1)

    def loss(params, context, batch, step):
        whole = tree.combine(params["net"], context["frozen"])
        images = prepare(batch["image"])
        variables = {"params": whole, "batch_stats": context["statistics"]}
        weights = weights_of(params, whole, context["sources"])
        answers = lambda images: forward(net, variables, by_task(images, 1), weights, bn != "source")[0]
        logits = answers(images)
        p, value = jax.nn.softmax(logits), information_maximisation(logits)
        if prior:
            value += prior * distance(params, whole, context["start"])
        if consistency:
            changed = answers(augment(jax.random.fold_in(context["key"], step), images))
            value += consistency * optax.softmax_cross_entropy(changed, jax.lax.stop_gradient(p)).mean()
        return value, {"entropy": jnp.mean(routes.entropy(p))}

    run = runner(loss, transform)

    def adapt(variables, target, seed, sources=None, **fit_options):
        _require_target(net, variables, target, classes, sources, route)
        labelled = balanced_batches([target.train], settings.batch, seed)
        batches = lambda start: ({"image": batch["image"], "task": batch["task"]} for batch in labelled(start))
        if trained:
            kept, frozen = tree.partition(variables["params"], trained)
        else:
            kept, frozen = None, variables["params"]
        mixture = {}
        if sources is not None:
            mixture = {"mixture": jnp.zeros((net.layers if route == "layers" else 1, len(sources)))}
        if trained or mixture:
            params = mixture | {"net": kept if trained else jax.tree.map(lambda _: None, frozen)}
            context = {
                "frozen": frozen, "statistics": variables["batch_stats"], "sources": sources,
                "start": variables["params"]["route"], "key": jax.random.key(seed),
            }  # fmt: skip
            state = fit(run, init_state(params, transform), context, batches, settings.steps, **fit_options)
            whole = tree.combine(state.params["net"], frozen)
            variables = {**variables, "params": whole}
            if mixture:
                weights = weights_of(state.params, whole, sources)
                weights = weights if net.route == "linear" else routes.to_logits(weights, 1e-6)
                variables = set_route(variables, weights)
        return variables if bn == "source" else estimate(variables, itertools.islice(batches(0), settings.estimate))

    return adapt


def _require_options(net: ModularNet, route: str, bn: str) -> None:
    for value, choices in ((route, (*MIXTURES, "free", "fixed")), (bn, ("source", "target", "affine"))):
        if value not in choices:
            raise ValueError(f"{value!r} is not among {', '.join(choices)}")
    if (route, bn) == ("fixed", "source"):
        raise ValueError("with a fixed route and the source's BN there is nothing to adapt")
    if not net.shared_head or len(net.classes) != 1:
        raise ValueError(
            "adaptation is of one domain on the sources' head: train the sources with shared_head=True, and take one "
            "task (`mean_source`, `one_source`)"
        )
    if net.route == "hard":
        raise ValueError("a hard route has no gradient: start from `mean_source` or `one_source`, whose route is soft")


def _require_weights(route: str, prior: float, consistency: float, augment: Augmentation | None) -> None:
    for name, weight in (("prior", prior), ("consistency", consistency)):
        if not 0 <= weight < np.inf:
            raise ValueError(f"{name}={weight!r}: a weight is a finite number, 0 or more")
    if prior and route == "fixed":
        raise ValueError("prior pulls a route that is learned, and this one is fixed")
    if (augment is None) is bool(consistency):
        raise ValueError("consistency is a weight of answers under an augmentation: give both or neither")


def _require_target(
    net: ModularNet, variables: Tree, target: Task, classes: Sequence[str], sources: Array | None, route: str
) -> None:
    if tuple(target.classes) != tuple(classes):
        raise ValueError(
            f"the target {target.name!r} has the classes {', '.join(target.classes[:6])} and the sources "
            f"{', '.join(list(classes)[:6])}: adaptation keeps the head, so they must be the same, in one order"
        )
    if (sources is None) is (route in MIXTURES):
        raise ValueError("the sources' routes are for a mixture (convex, layers), and are needed there: sources=...")
    if sources is not None and sources.shape[1:] != variables["params"]["route"].shape[1:]:
        raise ValueError(
            f"sources' routes of shape {sources.shape} don't fit the network's {variables['params']['route'].shape}"
        )
    if sources is not None:
        routes.linear(sources) if net.route == "linear" else routes.require_weights(sources)
