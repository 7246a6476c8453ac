"""The modular network: all tasks' networks at once, each its own mixture of the same block templates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax.models.isometric import Convolution, branch, convolutions, convolve, patchify, residual
from compo_jax.models.sizes import whole_numbers, whole_patches
from compo_jax.modular import routes
from compo_jax.modular.mixing import mix_templates

Images = Float[Array, "tasks batch height width channels"]
Route = Callable[[jax.Array], jax.Array]
EPSILON = 1e-5  # of Flax's own BatchNorm
_HE = nn.initializers.he_normal()
_HE_STACKED = nn.initializers.he_normal(batch_axis=0)


class _Layout(NamedTuple):
    """What the parts of a network have to know of it."""

    block: str
    width: int
    mixing: str
    bn: str
    train: bool

    @property
    def shapes(self) -> tuple[Convolution, ...]:
        return convolutions(self.block, self.width)


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
        if self.layout.train:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            moments = jnp.stack([wide.mean((0, 1, 2)), (wide**2).mean((0, 1, 2))])
            if weight is not None:
                moments = jax.lax.psum(weight * moments, "templates")
            if self.layout.bn == "layer":
                moments = jax.lax.pmean(moments, "tasks")
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
    """One layer of one task; scanned over depth, hence the carry and the empty output."""

    layout: _Layout

    @nn.compact
    def __call__(self, x, weights, affine, templates):
        layout, (kernels, of_templates) = self.layout, templates
        own = layout.bn != "template"
        if layout.mixing == "weights":
            mixed = mix_templates(kernels, weights), affine if own else mix_templates(of_templates, weights)
            inside = _Branch(layout, name="branch")
            return residual(layout.block, x, lambda x: inside(x, *mixed)), None
        axes = (None, 0, None if own else 0, 0)
        each = nn.vmap(_Branch, in_axes=axes, variable_axes={"batch_stats": None}, axis_name="templates")
        inside = each(layout, name="branch")

        def mixture(x):
            outputs = inside(x, kernels, affine if own else of_templates, weights)
            return jnp.tensordot(weights.astype(x.dtype), outputs, 1)

        return residual(layout.block, x, mixture), None


class _Task(nn.Module):
    """The features of one task's images; mapped over tasks."""

    layout: _Layout
    layers: int
    unroll: bool

    @nn.compact
    def __call__(self, images, weights, stem_affine, affine, stem, templates):
        x = patchify(images, stem.astype(images.dtype))
        x = nn.relu(_Norm(self.layout, name="stem")(x, stem_affine, None))
        scanned = nn.scan(
            _Layer,
            variable_axes={"batch_stats": 0},
            in_axes=(0, 0, nn.broadcast),
            length=self.layers,
            unroll=self.layers if self.unroll else 1,
        )
        x, _ = scanned(self.layout, name="layers")(x, weights, affine, templates)
        return x.mean(axis=(1, 2))


class ModularNet(nn.Module):
    """Networks of T tasks that are mixtures of M block templates; images of all tasks in, logits of all tasks out.

    `net.apply(variables, images, route, train)`: `route` is a function from logits to weights (`routes.soft`, ...).
    The parameters are `stem` (patch, patch, channels, width), `templates` (M, ...), `route` (T, layers, M), `norm`
    (scale and bias) and `head_0`, ... or `head`.

    Batch normalisation has no running averages. With `train` each batch is normalised by its own statistics, which the
    collection `batch_stats` then holds; without, by those in it: see `evaluate.statistics`, which takes them over as
    many images as one wants, for the very route that is evaluated (Wu and Johnson, 2021, arXiv 2105.07576).

    Attributes:
      classes: of each task.
      layers, templates: L, M.
      width, patch, block: see `IsometricNet`.
      bn: whose scale and bias they are: `task`, of each task at each layer; `layer`, of each layer, shared by the tasks
        (statistics too: they are taken over all tasks' images); `template`, of each template, and then depth costs
        route logits only. Statistics are no parameters: but for `layer` they always belong to (task, layer).
      mixing: `weights`, one block with mixed kernels, whose work doesn't depend on M; `outputs`, all M blocks,
        their outputs mixed.
      shared_head: one head, for tasks that are domains of one set of classes.
      unroll: writes the layers out instead of scanning over them; count FLOPs with this on.
    """

    classes: tuple[int, ...]
    layers: int = 8
    templates: int = 8
    width: int = 64
    patch: int = 4
    block: str = "basic"
    bn: str = "task"
    mixing: str = "weights"
    shared_head: bool = False
    dtype: Any = None
    unroll: bool = False

    def __post_init__(self):
        whole_numbers(layers=self.layers, templates=self.templates, width=self.width, patch=self.patch)
        whole_numbers(0, **{f"classes[{t}]": count for t, count in enumerate(self.classes)})
        if not self.classes:
            raise ValueError("a modular network needs a task: classes= has the number of classes of each")
        for t, count in enumerate(self.classes):
            if count < 2:
                raise ValueError(f"task {t} has {count} class and needs two: leave it out, or join it with another")
        if self.shared_head and len(set(self.classes)) > 1:
            raise ValueError(f"a shared head is for tasks of the same classes, and they have {self.classes}")
        for option, known in (("bn", ("task", "layer", "template")), ("mixing", ("weights", "outputs"))):
            if getattr(self, option) not in known:
                raise ValueError(f"{option}={getattr(self, option)!r} is not among {', '.join(known)}")
        convolutions(self.block, self.width)
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

    @nn.compact
    def features(self, images: Images, route: Route = routes.soft, train: bool = False) -> Array:
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
        logits = self.param("route", nn.initializers.normal(0.01), (tasks, self.layers, self.templates))
        norm = self.param(
            "norm",
            lambda _: {"stem": {"scale": jnp.ones(stem_shape), "bias": jnp.zeros(stem_shape)}, "blocks": norms(*stack)},
        )
        weights = route(logits)
        if weights.shape != logits.shape:
            raise ValueError(
                f"the route has shape {weights.shape} and the network's is {logits.shape}: (tasks, layers, templates)"
            )
        if self.dtype is not None:
            images = images.astype(self.dtype)
        per_task = 0 if self.bn == "task" else None
        mapped = nn.vmap(
            _Task,
            in_axes=(0, 0, per_task, per_task, None, None),
            variable_axes={"batch_stats": None if self.bn == "layer" else 0},
            axis_name="tasks",
        )
        layout = _Layout(self.block, self.width, self.mixing, self.bn, train)
        own, of_templates = (None, norm["blocks"]) if self.bn == "template" else (norm["blocks"], None)
        return mapped(layout, self.layers, self.unroll, name="tasks")(
            images, weights, norm["stem"], own, stem, (kernels, of_templates)
        )

    @nn.compact
    def __call__(
        self, images: Images, route: Route = routes.soft, train: bool = False
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
