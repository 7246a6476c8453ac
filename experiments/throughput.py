"""Speed of a LoRA training step, or of curvature: compile time, images per second, FLOPs by XLA's count.

    python experiments/throughput.py                                  # the embedded size
    python experiments/throughput.py --curvature --batch 32           # products and Fisher, in gradients
    python experiments/throughput.py --model s16 --batch 16
    python experiments/throughput.py --model b16 --batch 128 --dtype bfloat16 --peak 989    # on a GPU; TFLOP/s

Takes a minute or two. FLOPs are those of the unrolled model (XLA counts the body of a scan once); the time is the
median of the steps of the scanned one. Expected numbers: the table in README.md.
"""

import time
from functools import partial

import job
from job import closing

MODELS = {  # image and patch size, width, depth, heads
    "embedded": (32, 8, 96, 4, 3),
    "s16": (224, 16, 384, 12, 6),
    "b16": (224, 16, 768, 12, 12),
}

parser = job.Parser(__doc__)
parser.add_argument("--model", choices=MODELS, default="embedded")
parser.add_argument("--batch", type=job.count, default=64)
parser.add_argument("--rank", type=job.count, default=16)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
parser.add_argument("--steps", type=job.count, default=10, help="timed, after the first")
parser.add_argument("--curvature", action="store_true", help="the embedded model with a head of 100 trained classes")
parser.add_argument("--peak", type=job.rate, help="the device's matrix peak in TFLOP/s, for the fraction reached")

if __name__ == "__main__":
    closing(parser.parse_args)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compo_jax import adapters, curvature
from compo_jax.data import glyphs
from compo_jax.models import ViT, embedded
from compo_jax.train import init_state, jit_runner, make_step


def curvature_speed(images: int, repeats: int) -> None:
    """Times of Hessian and Gauss-Newton products and Fisher diagonals of all parameters, each timed in turn."""
    classes = 100
    model, params, _ = embedded()
    params["head"] = {name: x[..., :classes] for name, x in params["head"].items()}
    model = model.copy(classes=classes)
    labels = np.arange(images) % classes
    shapes = glyphs.masters("".join(glyphs.PRETRAINING.values()))[:classes]
    x = jnp.asarray(glyphs.images(jax.random.key(1), shapes, labels)) / jnp.float32(127.5) - 1

    def apply(p, x):
        return model.apply({"params": p}, x)

    def loss(p, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(p, x), y).mean()

    y = jnp.asarray(labels)
    eight = jax.tree.map(lambda p: jnp.stack([p] * 8), params)
    fisher = partial(curvature.fisher_diagonal, apply)
    jobs = {
        "gradient": (jax.grad(loss), (params, x, y)),
        "Hessian product": (lambda p, v, x, y: curvature.hvp(loss, p, v, x, y), (params, params, x, y)),
        "8 Hessian products": (
            lambda p, v, x, y: jax.vmap(lambda v: curvature.hvp(loss, p, v, x, y))(v),
            (params, eight, x, y),
        ),
        "Gauss-Newton product": (lambda p, v, x: curvature.ggnvp(apply, p, v, x), (params, params, x)),
        "Fisher diagonal, exact": (fisher, (params, x)),
        "Fisher diagonal, low-rank 1e-2": (partial(fisher, method="low_rank", tolerance=1e-2), (params, x)),
        "Fisher diagonal, low-rank 1e-3": (partial(fisher, method="low_rank", tolerance=1e-3), (params, x)),
        "Fisher diagonal, Monte-Carlo": (partial(fisher, method="monte_carlo", key=jax.random.key(0)), (params, x)),
    }
    compiled = {name: jax.jit(job).lower(*given).compile() for name, (job, given) in jobs.items()}
    seconds = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, (_, given) in jobs.items():
            clock = time.perf_counter()
            jax.block_until_ready(compiled[name](*given))
            seconds[name].append(time.perf_counter() - clock)
    medians = {name: float(np.median(times[1:])) for name, times in seconds.items()}
    print(f"embedded ViT, {classes} classes, {images} images, {repeats} repeats on {jax.devices()[0].device_kind}")
    for name, median in medians.items():
        print(f"{name:32s} {1e3 * median / images:8.2f} ms an image {median / medians['gradient']:7.2f} gradients")


def main(arguments: list[str] | None = None) -> None:
    options = parser.parse_args(arguments)
    if options.curvature:
        parser.refuse(
            "with --curvature, which is of all the embedded model's weights", "model", "rank", "dtype", "peak"
        )
        return curvature_speed(options.batch, options.steps)
    job.divisible(options.batch, "--batch")
    half = options.dtype == "bfloat16"
    model = ViT(*MODELS[options.model]).copy(
        dtype=jnp.bfloat16 if half else None, kernel="cudnn" if half and jax.default_backend() == "gpu" else "xla"
    )
    shape = (options.batch, model.image_size, model.image_size, 3)
    base = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape[1:])))["params"]
    adapter = adapters.lora(options.rank)
    optimizer = optax.adamw(1e-3)
    params = {"module": adapter.init(jax.random.key(1), base), "head": jnp.zeros((model.width, 10))}
    state = init_state(params, optimizer)

    def loss_of(model):
        forward = adapters.adapted(model, adapter)

        def loss(params, context, batch, step):
            z = forward(context, params["module"], batch["image"], method="features")
            logits = z.astype(jnp.float32) @ params["head"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), {}

        return loss

    batch = {
        "image": np.random.default_rng(0).normal(size=shape).astype(np.float32),
        "label": np.arange(options.batch, dtype=np.int32) % 10,
    }

    unrolled = model.copy(unroll=True, kernel="xla")  # a fused kernel's FLOPs are not in XLA's count
    step = jax.jit(make_step(loss_of(unrolled), optimizer)).lower(state, base, batch).cost_analysis()["flops"]
    forward = (
        jax.jit(lambda p, x: unrolled.apply({"params": p}, x)).lower(base, batch["image"]).cost_analysis()["flops"]
    )

    runner = jit_runner(loss_of(model), optimizer)
    state, context, batch = runner.place(state), runner.place(base), runner.shard(batch)
    clock = time.perf_counter()
    state, _ = jax.block_until_ready(runner.step(state, context, batch))
    first = time.perf_counter() - clock
    seconds = []
    for _ in range(options.steps):
        clock = time.perf_counter()
        state, _ = jax.block_until_ready(runner.step(state, context, batch))
        seconds.append(time.perf_counter() - clock)
    median = float(np.median(seconds))
    device = f"{jax.devices()[0].device_kind} x {jax.device_count()}"
    spread = f"{1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}"
    print(f"{options.model}, batch {options.batch}, {options.dtype}, {device}: {options.batch / median:.0f} images/s")
    print(f"compile {first - median:.1f} s; step {1e3 * median:.1f} ms, median of {options.steps} ({spread})")
    print(
        f"step {step / 1e9:.2f} GFLOP = {step / forward:.2f} forward passes; {step / median / 1e12:.3f} TFLOP/s reached"
    )
    if options.peak:
        print(f"{100 * step / median / 1e12 / options.peak:.1f} % of the peak of {options.peak} TFLOP/s")


if __name__ == "__main__":
    closing(main, "nothing is kept")
