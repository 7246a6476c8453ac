"""What throughput.py tells of our side alone: a LoRA step, curvature, and a tour of an accelerator."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import ours
from timing import Sizes, Work

from compo_jax import adapters, compose, curvature
from compo_jax.data import glyphs
from compo_jax.incremental import Settings, Setup, parallel_trainer, task_trainer
from compo_jax.models import embedded
from compo_jax.train import make_step

TASKS, TEMPLATES = (5, 20, 100), (8, 32, 128)  # of a modular network
TOGETHER = 8  # tasks that are trained, models that are merged


class Timed(NamedTuple):
    """Seconds of the first time, which compiles, and of each of the others."""

    first: float
    others: list[float]

    @property
    def median(self) -> float:
        return float(np.median(self.others))


def timed(work: Work, repeats: int) -> Timed:
    """The work, done once and then `repeats` times."""
    seconds = []
    for _ in range(repeats + 1):
        clock = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - clock)
    return Timed(seconds[0], seconds[1:])


# -- a training step -------------------------------------------------------------------------------------------------
class Step(NamedTuple):
    """FLOPs of the step and of a forward pass are XLA's count, of the unrolled model."""

    time: Timed
    flops: float
    forward: float

    @property
    def rate(self) -> float:
        """In TFLOP/s."""
        return self.flops / self.time.median / 1e12


def adapter_step(sizes: Sizes, adapter: adapters.Adapter, repeats: int) -> Step:
    step = ours.plain(sizes, adapter)
    base, images = step.net.params, step.batch["image"]
    unrolled = step.net.model.copy(unroll=True, kernel="xla")  # a fused kernel's FLOPs are not in XLA's count
    count = lambda function, *given: jax.jit(function).lower(*given).cost_analysis()["flops"]
    flops = count(make_step(step.loss_of(unrolled), step.optimizer), step.state, base, step.batch)
    forward = count(lambda p, x: unrolled.apply({"params": p}, x), base, images)
    return Step(timed(ours.plain_step(step), repeats), flops, forward)


def lora_speed(model: str, sizes: Sizes, repeats: int, peak: float | None) -> None:
    """Prints the speed of a LoRA step."""
    step = adapter_step(sizes, adapters.lora(sizes.rank), repeats)
    first, others = step.time
    device = f"{jax.devices()[0].device_kind} x {jax.device_count()}"
    spread = f"{1e3 * min(others):.1f} to {1e3 * max(others):.1f}"
    print(f"{model}, batch {sizes.batch}, {sizes.dtype}, {device}: {sizes.batch / step.time.median:.0f} images/s")
    compile, median = first - step.time.median, 1e3 * step.time.median
    print(f"compile {compile:.1f} s; step {median:.1f} ms, median of {repeats} ({spread})")
    print(
        f"step {step.flops / 1e9:.2f} GFLOP = {step.flops / step.forward:.2f} forward passes; {step.rate:.3f} TFLOP/s "
        "reached"
    )
    if peak:
        print(f"{100 * step.rate / peak:.1f} % of the peak of {peak} TFLOP/s")


# -- a modular training step -----------------------------------------------------------------------------------------
def modular_speed(batch: int, repeats: int) -> None:
    """Prints a table of the time of a training step of a modular network, over its tasks and its templates."""
    sizes = Sizes(task_batch=batch, layers=4)
    print(f"{sizes.layers} layers of {sizes.channels} channels, {batch} images of each task; ms a step")
    print(f"| tasks | {' | '.join(f'{count} templates' for count in TEMPLATES)} |\n|---|{'---|' * len(TEMPLATES)}")
    for tasks in TASKS:
        work = [ours.ROWS["multitask"](sizes._replace(tasks=tasks, templates=count)) for count in TEMPLATES]
        medians = [timed(step, repeats).median for step in work]
        print(f"| {tasks} | {' | '.join(f'{1e3 * median:,.1f}' for median in medians)} |", flush=True)


# -- curvature of a trained model ------------------------------------------------------------------------------------
def curvature_speed(images: int, repeats: int) -> None:
    """Times of Hessian and Gauss-Newton products and Fisher diagonals of all parameters, each timed in turn."""
    classes = 100
    model, params, _ = embedded()
    params["head"] = {name: x[..., :classes] for name, x in params["head"].items()}
    labels = np.arange(images) % classes
    shapes = glyphs.masters("".join(glyphs.PRETRAINING.values()))[:classes]
    x = jnp.asarray(glyphs.images(jax.random.key(1), shapes, labels)) / jnp.float32(127.5) - 1
    net = ours.Network(model.copy(classes=classes), params, x, jnp.asarray(labels))
    y, apply, hvp = net.labels, net.apply, partial(curvature.hvp, net.loss)
    eight = jax.tree.map(lambda p: jnp.stack([p] * 8), params)
    fisher = partial(curvature.fisher_diagonal, apply)
    jobs = {
        "gradient": (jax.grad(net.loss), params, x, y),
        "Hessian product": (hvp, params, params, x, y),
        "8 Hessian products": (partial(hvp, stacked=True), params, eight, x, y),
        "Gauss-Newton product": (partial(curvature.ggnvp, apply), params, params, x),
        "Fisher diagonal, exact": (fisher, params, x),
        "Fisher diagonal, low-rank 1e-2": (partial(fisher, method="low_rank", tolerance=1e-2), params, x),
        "Fisher diagonal, low-rank 1e-3": (partial(fisher, method="low_rank", tolerance=1e-3), params, x),
        "Fisher diagonal, Monte-Carlo": (partial(fisher, method="monte_carlo", key=jax.random.key(0)), params, x),
    }
    work = {name: ours.ready(*job) for name, job in jobs.items()}
    seconds = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name in jobs:
            clock = time.perf_counter()
            work[name]()
            seconds[name].append(time.perf_counter() - clock)
    medians = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    print(f"embedded ViT, {classes} classes, {images} images, {repeats} repeats on {jax.devices()[0].device_kind}")
    for name, median in medians.items():
        print(f"{name:32s} {1e3 * median / images:8.2f} ms an image {median / medians['gradient']:7.2f} gradients")


# -- a tour of an accelerator ----------------------------------------------------------------------------------------
class Tour(NamedTuple):
    """What a row is made of: sizes, how often it is timed, the matrix peak in 16 bits in TFLOP/s or None."""

    sizes: Sizes
    repeats: int
    peak: float | None


def _steps(tour: Tour, adapter: str, dtype: str) -> str:
    rank = {"rank": tour.sizes.rank} if adapter == "lora" else {}
    step = adapter_step(tour.sizes._replace(dtype=dtype), adapters.build(adapter, rank), tour.repeats)
    part = f" = {100 * step.rate / tour.peak:.1f} % of the peak" if tour.peak and dtype == "bfloat16" else ""
    speed = f"{tour.sizes.batch / step.time.median:,.0f} images/s, {step.rate:.2f} TFLOP/s{part}"
    return f"{speed}; {_milliseconds(step.time)}"


def _milliseconds(time: Timed) -> str:
    return f"{1e3 * time.median:,.1f} ms, the first {time.first:.1f} s"


def _iel(tour: Tour, tasks: int) -> str:
    return _milliseconds(timed(ours.iel(tour.sizes._replace(dtype="bfloat16"), tasks), tour.repeats))


def _curvature(tour: Tour, name: str, part: int) -> str:
    """Of this part of the batch."""
    few = max(tour.sizes.batch // part, 1)
    sizes = tour.sizes._replace(batch=few, fisher_images=few)
    return f"{few} images, {_milliseconds(timed(ours.ROWS[name](sizes), tour.repeats))}"


def _parallel(tour: Tour) -> str:
    """The second of two trainings of an epoch, the first of which compiles."""
    batch = max(tour.sizes.batch // TOGETHER, jax.device_count())
    net, settings = ours.vit(tour.sizes._replace(batch=batch, dtype="bfloat16"), classes=0), Settings(1, batch)
    count = 4 * tour.repeats * batch
    stream, reference = ours.random_stream(net, TOGETHER, count)
    setup, method = Setup(net.model, net.params, stream, settings, seed=0), ours.method(adapters.lora(tour.sizes.rank))
    every = parallel_trainer(setup, method)
    mode, one = task_trainer(setup, method)
    tasks, firsts = stream.tasks, stream.offsets
    apart = lambda: [one(task, first, reference, mode.memory) for task, first in zip(tasks, firsts, strict=True)]
    at_once = timed(lambda: every(tasks, firsts, [reference] * TOGETHER), 1).median
    in_turn = timed(apart, 1).median
    return (
        f"{TOGETHER} tasks, {batch} images of each in a step: {TOGETHER * count / at_once:,.0f} images/s at once, "
        f"{TOGETHER * count / in_turn:,.0f} one after another ({in_turn / at_once:.2f} times)"
    )


def _merging(tour: Tour) -> str:
    params, keys = ours.vit(tour.sizes).params, jax.random.split(jax.random.key(0), TOGETHER)
    noise = jax.jit(lambda key: jax.tree.map(lambda p: 1e-3 * jax.random.normal(key, p.shape), params))
    deltas = [noise(key) for key in keys]

    def merged(rule):
        return timed(lambda: jax.block_until_ready(compose.merge(rule, params, deltas)), 1)

    told = ", ".join(f"{rule} {_milliseconds(merged(rule))}" for rule in ("average", "ties"))
    return f"{TOGETHER} models of {sum(x.size for x in jax.tree.leaves(params)) / 1e6:,.1f} million weights: {told}"


ROWS: dict[str, Callable[[Tour], str]] = {
    "lora-bfloat16": lambda tour: _steps(tour, "lora", "bfloat16"),
    "lora-float32": lambda tour: _steps(tour, "lora", "float32"),
    "full-bfloat16": lambda tour: _steps(tour, "full", "bfloat16"),
    "full-float32": lambda tour: _steps(tour, "full", "float32"),
    "iel-1": lambda tour: _iel(tour, 1),
    "iel-50": lambda tour: _iel(tour, 50),
    "hvp": lambda tour: _curvature(tour, "hvp", 4),
    "ggn": lambda tour: _curvature(tour, "ggn", 4),
    "fisher": lambda tour: _curvature(tour, "fisher", 16),
    "parallel": _parallel,
    "merging": _merging,
}


def device_speed(model: str, tour: Tour, names: Sequence[str], minutes: float) -> None:
    """Prints each row as soon as it is measured. Where less time is left than the longest so far took, a row is left
    out, and so is one that the memory is too small for; both are told."""
    began, longest = time.perf_counter(), 0.0
    print(
        f"{model}, batch {tour.sizes.batch}, rank {tour.sizes.rank}, {tour.repeats} repeats, "
        f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        flush=True,
    )
    for name in names:
        clock = time.perf_counter()
        left = began + 60 * minutes - clock
        if left < longest:
            told = f"left out: {max(left, 0):.0f} s are left, and a row took up to {longest:.0f} s"
        else:
            try:
                told = ROWS[name](tour)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                told = "left out: memory ran out; lower --batch"
        longest = max(longest, time.perf_counter() - clock)
        print(f"{name:14s} {told}", flush=True)
