"""Mixtures of experts, the other way to share between tasks: whole networks, and gates that mix what they answer.

MMoE (Ma et al., KDD 2018), CGC (Tang et al., RecSys 2020; PLE of one level) and DSelect-k (Hazimeh et al., NeurIPS
2021, arXiv 2106.03760), with gates that read the flattened image, as users of LibMTL have them.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from compo_jax.models.isometric import branch, convolutions, convolve, patchify, residual
from compo_jax.models.sizes import whole_numbers
from compo_jax.modular.cost import macs
from compo_jax.modular.net import EPSILON, Images, ModularNet, at_once, standardize

GATES = ("mmoe", "cgc", "dselect_k")
_LEAST_REACHED = 0.01


def smooth_step(x: Float[Array, "*shape"], gamma: float = 1.0) -> Float[Array, "*shape"]:
    """The cubic from exactly 0 at -γ/2 to exactly 1 at γ/2 whose slope is 0 at both (arXiv 2002.07772)."""
    x = jnp.clip(x / gamma, -0.5, 0.5)
    return 0.5 + 1.5 * x - 2 * x**3


def selectors(logits: Float[Array, "*shape bits"], experts: int, gamma: float = 1.0) -> Float[Array, "*shape experts"]:
    """How much each expert is selected: the product over the bits of its number, most significant first, of
    `smooth_step(logit)` where the bit is 1 and of 1 minus it where it is 0.

    The sum over the experts is 1 where their number is a power of two, and else less by what numbers without an expert
    get.
    """
    bits = np.arange(experts)[:, None] >> np.arange(logits.shape[-1])[::-1] & 1
    ones = smooth_step(logits, gamma)[..., None, :]
    return jnp.where(bits == 1, ones, 1 - ones).prod(-1)


def selection_penalty(selected: Float[Array, "*shape k experts"], entropy: float) -> Float[Array, ""]:
    """`entropy` times the selectors' entropy, which makes them choose, and `1 / (sum over experts)`, which keeps them
    at numbers that have an expert; summed over the k selectors, the mean over what comes before them."""
    value = -entropy * (selected * jnp.log(selected + 1e-6)).sum((-2, -1))
    experts = selected.shape[-1]
    if experts & (experts - 1):  # a sum of 0 is reached exactly, and one image must not stop a training
        value += (1 / jnp.maximum(selected.sum(-1), _LEAST_REACHED)).sum(-1)
    return value.mean()


def _uniform(limit):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


def _normalised(x, affine, statistics, train):
    """(x normalised, the statistics it was done by): those of x in training, else those given."""
    if train:
        x, mean, var = standardize(x)
        return x * affine["scale"].astype(x.dtype) + affine["bias"].astype(x.dtype), {"mean": mean, "var": var}
    scale = affine["scale"] * jax.lax.rsqrt(statistics["var"] + EPSILON)
    return (x - statistics["mean"].astype(x.dtype)) * scale.astype(x.dtype) + affine["bias"].astype(x.dtype), statistics


def _expert(block, train, images, expert, statistics):
    """(pooled features (batch, width) of one expert, the statistics that they were normalised by)."""
    shapes = convolutions(block, expert["stem"].shape[-1])

    def layer(x, inputs):
        kernels, affine, statistics = inputs
        used = {}

        def step(i, x):
            x = convolve(x, kernels[f"conv{i + 1}"].astype(x.dtype), shapes[i].groups)
            name = f"norm{i + 1}"
            x, used[name] = _normalised(x, affine[name], statistics[name], train)
            return x

        return residual(block, x, lambda x: branch(x, len(shapes), step)), used

    x, stem = _normalised(
        patchify(images, expert["stem"].astype(images.dtype)), expert["norm"]["stem"], statistics["stem"], train
    )
    x, blocks = jax.lax.scan(layer, nn.relu(x), (expert["blocks"], expert["norm"]["blocks"], statistics["blocks"]))
    return x.mean((1, 2)), {"stem": stem, "blocks": blocks}


class ExpertNet(nn.Module):
    """Networks of T tasks that mix the features of experts; images of all tasks in, logits of all tasks out.

    An expert is an isometric residual network without head, and each task mixes the experts' features by its own gate,
    a linear map of the flattened image. The parameters are `shared` (experts, ...), `tasks` (T, task_experts, ...),
    `gate` (and `selector`, of dselect_k) and `head_0`, ...

    Batch normalisation is as in `ModularNet`: with `train` the images of each task are normalised by themselves, and
    `batch_stats` then holds their statistics, which belong to (task, expert, layer); scale and bias belong to (expert,
    layer). All experts are computed for all tasks: a step is that of hard sharing as many times as there are experts.

    Attributes:
      classes: of each task.
      experts: that all tasks share.
      task_experts: that each task has for itself, with the gate `cgc` alone.
      gate: `mmoe`, a softmax over the experts; `cgc`, a softmax over the shared ones and the task's; `dselect_k`, k
        selectors whose bits become exactly 0 or 1, so that at most k experts are left, mixed by a softmax. It sows its
        `selection_penalty` as `penalty` among the `intermediates`.
      k, gamma, entropy: of dselect_k: the number of selectors, the width of their smooth step, the entropy's weight
        (LibMTL's 1e-6 of the sum over a batch of 100 images is 1e-4 here).
      static: gates that don't see the image: each task's mixture is one for all its images.
      layers, width, patch, block: of each expert, see `IsometricNet`.
    """

    classes: Sequence[int]
    experts: int = 4
    task_experts: int = 0
    gate: str = "mmoe"
    k: int = 2
    gamma: float = 1.0
    entropy: float = 1e-4
    static: bool = False
    layers: int = 8
    width: int = 64
    patch: int = 4
    block: str = "basic"
    dtype: Any = None

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(self.classes))  # a network is a key of compiled programs
        whole_numbers(experts=self.experts, k=self.k)
        whole_numbers(0, task_experts=self.task_experts)
        self.one_expert()
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r} is not among {', '.join(GATES)}")
        if self.task_experts and self.gate != "cgc":
            raise ValueError(f"gate={self.gate!r} has no experts of one task: task_experts= is for the gate 'cgc'")
        if self.gate == "dselect_k" and not (self.experts > 1 and self.k <= self.experts):
            raise ValueError(f"dselect_k selects k of two or more experts, and k={self.k} of {self.experts} isn't that")
        if not (self.gamma > 0 and self.entropy >= 0):
            raise ValueError(f"gamma={self.gamma} and entropy={self.entropy}: a positive number and one from 0 on")
        super().__post_init__()

    def one_expert(self) -> ModularNet:
        """One expert as a modular network, whose checks and costs are an expert's too; ValueError for bad sizes."""
        sizes = {"layers": self.layers, "width": self.width, "patch": self.patch, "block": self.block}
        return ModularNet(self.classes, templates=self.layers, **sizes, parent=None)

    def _per_channel(self, stack, one, zero):
        leaf = lambda *shape: {one: jnp.ones((*stack, *shape)), zero: jnp.zeros((*stack, *shape))}
        shapes = convolutions(self.block, self.width)
        blocks = {f"norm{i + 1}": leaf(self.layers, shape.outputs) for i, shape in enumerate(shapes)}
        return {"stem": leaf(self.width), "blocks": blocks}

    def _start(self, key, stack, channels):
        """Of a stack of experts."""
        shapes = convolutions(self.block, self.width)
        stem, *keys = jax.random.split(key, 1 + len(shapes))
        he = lambda more: nn.initializers.he_normal(batch_axis=tuple(range(len(stack) + more)))
        blocks = {f"conv{i + 1}": he(1)(keys[i], (*stack, self.layers, *shape.shape)) for i, shape in enumerate(shapes)}
        kernel = he(0)(stem, (*stack, self.patch, self.patch, channels, self.width))
        return {"stem": kernel, "blocks": blocks, "norm": self._per_channel(stack, "scale", "bias")}

    @nn.compact
    def gates(self, images: Images) -> Float[Array, "tasks batch experts"]:
        """The weights of each image's mixture, those of the task's own experts last."""
        inputs = images.reshape(*images.shape[:2], -1)
        inputs = jnp.ones_like(inputs[..., :1]) if self.static else inputs
        linear = partial(nn.DenseGeneral, batch_dims=0, use_bias=not self.static)
        if self.gate != "dselect_k":
            limit = 1 / math.sqrt(inputs.shape[-1])
            return nn.softmax(
                linear(self.experts + self.task_experts, kernel_init=_uniform(limit), name="gate")(inputs)
            )
        bits, near = (self.experts - 1).bit_length(), _uniform(self.gamma / 100)
        logits = linear((self.k, bits), kernel_init=near, bias_init=near, name="selector")(inputs)
        selected = selectors(logits, self.experts, self.gamma)
        self.sow("intermediates", "penalty", selection_penalty(selected, self.entropy))
        mixing = nn.softmax(linear(self.k, kernel_init=_uniform(0.05), name="gate")(inputs))
        return jnp.einsum("tbk,tbke->tbe", mixing, selected)

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> Float[Array, "tasks batch classes"]:
        """Logits, -inf for the classes that a task has fewer than the largest."""
        self.one_expert()._check(images)
        tasks, widest = len(self.classes), max(self.classes)
        weights, images = self.gates(images), images if self.dtype is None else images.astype(self.dtype)
        stacks = {"shared": (self.experts,)} | ({"tasks": (tasks, self.task_experts)} if self.task_experts else {})
        each, statistics = {}, {}
        for name, stack in stacks.items():
            each[name] = self.param(name, self._start, stack, images.shape[-1])
            full = stack if name == "tasks" else (tasks, *stack)
            statistics[name] = self.variable("batch_stats", name, self._per_channel, full, "var", "mean")
        expert = jax.vmap(partial(_expert, self.block, train), (None, 0, 0))

        def task(x):
            images, weights, experts, statistics = x
            experts = {"shared": each["shared"]} | experts
            answers = {name: expert(images, stack, statistics[name]) for name, stack in experts.items()}
            features = jnp.concatenate([features for features, _ in answers.values()])
            mixture = jnp.einsum("be,ebw->bw", weights.astype(features.dtype), features)
            return mixture, {name: moments for name, (_, moments) in answers.items()}

        together = at_once(images, self, self.experts + self.task_experts)
        over = jax.vmap(task) if together else partial(jax.lax.map, task)
        alone = {name: stack for name, stack in each.items() if name == "tasks"}
        mixtures, moments = over((images, weights, alone, {name: kept.value for name, kept in statistics.items()}))
        for name, kept in statistics.items() if train else ():
            kept.value = moments[name]
        heads = [nn.Dense(count, dtype=self.dtype, name=f"head_{t}") for t, count in enumerate(self.classes)]
        fill = lambda x: jnp.pad(x, ((0, 0), (0, widest - x.shape[-1])), constant_values=-jnp.inf)
        return jnp.stack([fill(head(mixtures[t])) for t, head in enumerate(heads)])


def expert_macs(net: ExpertNet, size: int, channels: int = 3) -> int:
    """Multiply-adds of one image of `size` x `size` pixels through all experts of one task, its gate and mixture, and
    the largest head: what is computed, whatever weights are 0. ValueError where the patches leave a rest."""
    head, count = net.width * max(net.classes), net.experts + net.task_experts
    logits = count if net.gate != "dselect_k" else net.k * (1 + (net.experts - 1).bit_length())
    gate = 0 if net.static else size**2 * channels * logits
    return count * (macs(net.one_expert(), size, channels) - head + net.width) + gate + head
