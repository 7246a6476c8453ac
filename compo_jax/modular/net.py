"""The modular network: all tasks' networks at once, each its own mixture of the same block templates."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax.models.isometric import Convolution, branch, convolutions, convolve, patchify, residual
from compo_jax.models.sizes import whole_numbers, whole_patches
from compo_jax.modular import routes
from compo_jax.modular.mixing import mix_templates
from compo_jax.tree import Tree

Images = Float[Array, "tasks batch height width channels"]
Route = Callable[[jax.Array], jax.Array]
EPSILON = 1e-5  # of Flax's own BatchNorm
FILLING = 2_000_000_000  # operations: some 10 µs of a GPU or TPU of today, about what starting a kernel takes
_HE = nn.initializers.he_normal()
_HE_STACKED = nn.initializers.he_normal(batch_axis=0)


class _Layout(NamedTuple):
    """What the parts of a network have to know of it."""

    block: str
    width: int
    mixing: str
    bn: str
    groups: int
    train: bool

    @property
    def shapes(self) -> tuple[Convolution, ...]:
        return convolutions(self.block, self.width)


def standardize(
    x: Float[Array, "batch height width channels"], across: str | None = None
) -> tuple[Float[Array, "batch height width channels"], Float[Array, " channels"], Float[Array, " channels"]]:
    """(x with mean 0 and variance 1 in each channel, the mean, the variance), over the mapped axis `across` too.

    `EPSILON` is added to the variance. Without `across` the derivative is in closed form, which keeps fewer arrays and
    reads them less often than JAX's own; it can be differentiated again. With it there is no such rule: of a function
    that was compiled JAX would apply it outside of the map, where the axis has no name.
    """
    if across is None:
        return _standardize(x)
    mean, var = _moments(x, across)
    return _standardized(x, mean, var)[0], mean, var


@jax.custom_jvp
def _standardize(x):
    mean, var = _moments(x)
    return _standardized(x, mean, var)[0], mean, var


def _means(across, *arrays):
    means = jnp.stack([x.mean((0, 1, 2)) for x in arrays])
    return means if across is None else jax.lax.pmean(means, across)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _moments(x, across=None):
    wide = _wide(x)
    mean, second = _means(across, wide, wide**2)
    return mean, jnp.maximum(second - mean**2, 0)


def _standardized(x, mean, var):
    inverse = jax.lax.rsqrt(var + EPSILON)
    return (x - mean.astype(x.dtype)) * inverse.astype(x.dtype), inverse


@_standardize.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    mean, var = _moments(x)
    y, inverse = _standardized(x, mean, var)
    dmean, slope = _means(None, _wide(dx), _wide(y) * _wide(dx))
    dy = inverse.astype(x.dtype) * (dx - dmean.astype(x.dtype) - y * slope.astype(x.dtype))
    return (y, mean, var), (dy, dmean, 2 * slope / inverse)


class _Norm(nn.Module):
    """Batch normalisation whose scale and bias are given; its statistics are those of the last batch.

    Flax's takes no weights: where the templates' outputs are mixed, the statistics of a layer are those of the mixture,
    each template's counted by its weight, so that on a one-hot route they are the chosen one's.
    """

    layout: _Layout

    @nn.compact
    def __call__(self, x, affine, weight):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        across = "tasks" if self.layout.bn == "layer" else None
        if self.layout.train and weight is None:
            x, mean.value, var.value = standardize(x, across)
            return x * affine["scale"].astype(x.dtype) + affine["bias"].astype(x.dtype)
        if self.layout.train:
            wide = _wide(x)
            moments = jax.lax.psum(weight * _means(None, wide, wide**2), "templates")
            if across is not None:
                moments = jax.lax.pmean(moments, across)
            mean.value, var.value = moments[0], jnp.maximum(moments[1] - moments[0] ** 2, 0)
        scale = affine["scale"] * jax.lax.rsqrt(var.value + EPSILON)
        return (x - mean.value.astype(x.dtype)) * scale.astype(x.dtype) + affine["bias"].astype(x.dtype)


class _Branch(nn.Module):
    """The inside of one block, its kernels and affine parameters given; its weight where it is one of several."""

    layout: _Layout

    @nn.compact
    def __call__(self, x, kernels, affine, weight=None):
        shapes = self.layout.shapes

        def step(i, x):
            x = convolve(x, kernels[f"conv{i + 1}"].astype(x.dtype), shapes[i].groups)
            return _Norm(self.layout, name=f"norm{i + 1}")(x, affine[f"norm{i + 1}"], weight)

        return branch(x, len(shapes), step)


class _Layer(nn.Module):
    """One layer of one task, its kernels mixed already where weights are; scanned over depth, hence the carry and the
    empty output."""

    layout: _Layout

    @nn.compact
    def __call__(self, x, weights, gain, affine, kernels):
        layout, times = self.layout, lambda x: x if gain is None else x * gain.astype(x.dtype)
        if layout.mixing == "weights":
            inside = _Branch(layout, name="branch")
            return residual(layout.block, x, lambda x: times(inside(x, kernels, affine))), None
        axes = (None, 0, 0 if layout.bn == "template" else None, 0)
        each = nn.vmap(_Branch, in_axes=axes, variable_axes={"batch_stats": None}, axis_name="templates")
        inside = each(layout, name="branch")

        def mixture(x):
            return times(jnp.tensordot(weights.astype(x.dtype), inside(x, kernels, affine, weights), 1))

        return residual(layout.block, x, mixture), None


class _Task(nn.Module):
    """The features of one task's images; mapped or scanned over tasks, hence the empty carry."""

    layout: _Layout
    layers: int
    unroll: bool

    @nn.compact
    def __call__(self, _, images, weights, gain, stem_affine, affine, stem, kernels):
        layout = self.layout
        x = patchify(images, stem.astype(images.dtype))
        x = nn.relu(_Norm(layout, name="stem")(x, stem_affine, None))
        mixed = layout.mixing == "weights"
        if mixed:  # of all layers in one product: layer by layer each would add to the gradient of all templates
            kernels = mix_templates(kernels, weights, layout.groups)
            affine = mix_templates(affine, weights, layout.groups) if layout.bn == "template" else affine
        whole = nn.broadcast
        scanned = nn.scan(
            _Layer,
            variable_axes={"batch_stats": 0},
            in_axes=(
                0,
                whole if gain is None else 0,
                0 if mixed or layout.bn != "template" else whole,
                0 if mixed else whole,
            ),
            length=self.layers,
            unroll=self.layers if self.unroll else 1,
        )
        x, _ = scanned(layout, name="layers")(x, weights, gain, affine, kernels)
        return None, x.mean(axis=(1, 2))


def at_once(images: Images, net: Any, blocks: int = 1) -> bool:
    """Whether the networks of several tasks are computed at once, and not one after another: never on a CPU, whose
    cache holds the arrays of one task (at once a step took 0.9 to 1.7 times as long, of 2 to 20 tasks, 8 to 64 wide);
    on a GPU or TPU where a layer of one task is too little work to fill it (not measured).

    Args:
      net: has patch, block and width.
      blocks: that a layer of one task computes.
    """
    places = math.prod(images.shape[1:4]) // net.patch**2
    operations = 2 * blocks * places * sum(math.prod(each.shape) for each in convolutions(net.block, net.width))
    return jax.default_backend() != "cpu" and operations < FILLING


def _over_tasks(layout: _Layout, gains: bool, unroll: int, together: bool):
    """`_Task` of all tasks: one after another or together, as they have to be where they share their statistics."""
    together = together or layout.bn == "layer"
    same = None if together else nn.broadcast
    norm = 0 if layout.bn == "task" else same
    axes = (0, 0, 0 if gains else same, norm, norm, same, same)
    if together:
        stats = {"batch_stats": None if layout.bn == "layer" else 0}
        return nn.vmap(_Task, in_axes=(None, *axes), variable_axes=stats, axis_name="tasks")
    return nn.scan(_Task, in_axes=axes, variable_axes={"batch_stats": 0}, unroll=unroll)


class ModularNet(nn.Module):
    """Networks of T tasks that are mixtures of M block templates; images of all tasks in, logits of all tasks out.

    `net.apply(variables, images, route, train)`: `route` is a function from the parameters of that name to weights
    (`routes.linear`, ...), by default the network's. The parameters are `stem` (patch, patch, channels, width),
    `templates` (M, ...), `route` (T, layers, M) or (T, layers, groups, M), `norm` (scale and bias) and `head_0`, ... or
    `head`.

    Batch normalisation has no running averages. With `train` each batch is normalised by its own statistics, which the
    collection `batch_stats` then holds; without, by those in it: see `evaluate.statistics`, which takes them over as
    many images as one wants, for the very route that is evaluated (Wu and Johnson, 2021, arXiv 2105.07576).

    Attributes:
      classes: of each task.
      layers, templates: L, M.
      width, patch, block: see `IsometricNet`.
      bn: whose scale and bias they are: `task`, of each task at each layer; `layer`, of each layer, shared by the tasks
        (statistics too: they are taken over all tasks' images); `template`, of each template, and then depth costs
        the route only. Statistics are no parameters: but for `layer` they always belong to (task, layer).
      mixing: `weights`, one block with mixed kernels, whose work doesn't depend on M; `outputs`, all M blocks,
        their outputs mixed.
      route: what weighs the templates. `linear`, free coefficients: the kind to take first; `soft`, softmax of logits;
        `hard`, the template of the largest logit, on soft routes while it is learned (see `Settings`).
      start: of the route. `shared`, coefficients from N(0, 1/M), the same in all tasks, which leave them as they learn;
        logits near 0. `one_hot`, each layer takes one template, again the same in all tasks (logits to 0.9).
        `distinct`, others in each task: coefficients from N(0, 1/M), logits from N(0, 1).
      groups: of the output channels of a block's convolutions; with more than one each has linear coefficients of its
        own: a finer order, whose scalars are still few.
      gain: one more parameter `gain` (T, layers), from 1 on, that scales what a block adds: the control for
        coefficients, which scale it too where BN is of `template`.
      shared_head: one head, for tasks that are domains of one set of classes.
      unroll: writes the layers (and tasks) out instead of scanning over them; count FLOPs with this on.
    """

    classes: Sequence[int]
    layers: int = 8
    templates: int = 8
    width: int = 64
    patch: int = 4
    block: str = "basic"
    bn: str = "task"
    mixing: str = "weights"
    route: str = "linear"
    start: str = "shared"
    groups: int = 1
    gain: bool = False
    shared_head: bool = False
    dtype: Any = None
    unroll: bool = False

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(self.classes))  # a network is a key of compiled programs
        sizes = ("layers", "templates", "width", "patch", "groups")
        whole_numbers(**{name: getattr(self, name) for name in sizes})
        whole_numbers(0, **{f"classes[{t}]": count for t, count in enumerate(self.classes)})
        if not self.classes:
            raise ValueError("a modular network needs a task: classes= has the number of classes of each")
        for t, count in enumerate(self.classes):
            if count < 2:
                raise ValueError(f"task {t} has {count} class and needs two: leave it out, or join it with another")
        if self.shared_head and len(set(self.classes)) > 1:
            raise ValueError(f"a shared head is for tasks of the same classes, and they have {self.classes}")
        for option, choices in (
            ("bn", ("task", "layer", "template")), ("mixing", ("weights", "outputs")), ("route", tuple(routes.KINDS)),
            ("start", ("shared", "one_hot", "distinct")),
        ):  # fmt: skip
            if getattr(self, option) not in choices:
                raise ValueError(f"{option}={getattr(self, option)!r} is not among {', '.join(choices)}")
        if (self.mixing, self.route) == ("outputs", "linear"):
            raise ValueError(
                "outputs are mixed by weights of sum 1, which their statistics are taken with, too: give route='soft' "
                "or 'hard'; or mix weights"
            )
        shapes = convolutions(self.block, self.width)
        if self.groups > 1 and self.route != "linear":
            raise ValueError(f"groups={self.groups} is of linear routes: a {self.route} one takes whole templates")
        if uneven := sorted({shape.outputs for shape in shapes if shape.outputs % self.groups}):
            raise ValueError(f"{uneven[0]} output channels can't be cut into {self.groups} groups of one size")
        super().__post_init__()

    def _check(self, images):
        if images.ndim != 5 or images.shape[0] != len(self.classes):
            raise ValueError(
                f"{len(self.classes)} tasks need images of shape (tasks, batch, height, width, channels), and these "
                f"are {images.shape}"
            )
        whole_patches(images.shape, self.patch)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images of {images.dtype} would have the kernels rounded to it: make floats of them with the tasks' "
                "`prepare`"
            )

    def _first_route(self, key, shape):
        linear, distinct = self.route == "linear", self.start == "distinct"
        if self.start == "one_hot":
            order = np.arange(self.layers) * self.templates // self.layers
            one = routes.fixed(order, self.templates).reshape(1, self.layers, *[1] * (len(shape) - 3), -1)
            return jnp.broadcast_to(one if linear else routes.to_logits(one, 0.1), shape)
        if not linear:
            return (1.0 if distinct else 0.01) * jax.random.normal(key, shape)
        one = jax.random.normal(key, (shape[0] if distinct else 1, *shape[1:]))
        return jnp.broadcast_to(one / self.templates**0.5, shape)

    @nn.compact
    def features(self, images: Images, route: Route | None = None, train: bool = False) -> Array:
        """The pooled features (tasks, batch, width)."""
        self._check(images)
        tasks, shapes = len(self.classes), convolutions(self.block, self.width)

        def norms(*stack):
            one = lambda *shape: {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}
            return {f"norm{i + 1}": one(*stack, shape.outputs) for i, shape in enumerate(shapes)}

        def stacked(key):
            keys = jax.random.split(key, len(shapes))
            return {
                f"conv{i + 1}": _HE_STACKED(keys[i], (self.templates, *shape.shape)) for i, shape in enumerate(shapes)
            }

        stack = {"task": (tasks, self.layers), "layer": (self.layers,), "template": (self.templates,)}[self.bn]
        stem_shape = (tasks, self.width) if self.bn == "task" else (self.width,)
        stem = self.param("stem", _HE, (self.patch, self.patch, images.shape[-1], self.width))
        kernels = self.param("templates", stacked)
        groups = () if self.groups == 1 else (self.groups,)
        given = self.param("route", self._first_route, (tasks, self.layers, *groups, self.templates))
        norm = self.param(
            "norm",
            lambda _: {"stem": {"scale": jnp.ones(stem_shape), "bias": jnp.zeros(stem_shape)}, "blocks": norms(*stack)},
        )
        weights = (route or routes.KINDS[self.route])(given)
        if weights.shape != given.shape:
            raise ValueError(
                f"the route has shape {weights.shape} and the network's is {given.shape}: (tasks, layers, templates), "
                "with groups before the templates where there are several"
            )
        if self.dtype is not None:
            images = images.astype(self.dtype)
        layout = _Layout(self.block, self.width, self.mixing, self.bn, self.groups, train)
        gain = self.param("gain", nn.initializers.ones, (tasks, self.layers)) if self.gain else None
        together = at_once(images, self, self.templates if self.mixing == "outputs" else 1)
        over_tasks = _over_tasks(layout, self.gain, tasks if self.unroll else 1, together)
        _, x = over_tasks(layout, self.layers, self.unroll, name="tasks")(
            None, images, weights, gain, norm["stem"], norm["blocks"], stem, kernels
        )
        return x

    @nn.compact
    def __call__(
        self, images: Images, route: Route | None = None, train: bool = False
    ) -> Float[Array, "tasks batch classes"]:
        """Logits, -inf for the classes that a task has fewer than the largest."""
        x, widest = self.features(images, route, train), max(self.classes)
        if self.shared_head:
            return nn.Dense(widest, dtype=self.dtype, name="head")(x)
        heads = [nn.Dense(count, dtype=self.dtype, name=f"head_{t}") for t, count in enumerate(self.classes)]
        return jnp.stack(
            [
                jnp.pad(head(x[t]), ((0, 0), (0, widest - head.features)), constant_values=-jnp.inf)
                for t, head in enumerate(heads)
            ]
        )


class Network(NamedTuple):
    """A modular network and its variables: the collections `params` and `batch_stats`."""

    net: ModularNet
    variables: Tree
