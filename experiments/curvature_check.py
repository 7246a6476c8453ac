"""How exact is the curvature, and how far does the second order see? Checked on the pools of a run.

    python experiments/curvature_check.py                                     # makes a small run of its own first
    python experiments/curvature_check.py --run runs/incremental-glyphs-0-ita-lora-none-lora

Four questions, one page (RUN/curvature/report.html, numbers in metrics.json): (a) Hessian products against the dense
matrix and against finite differences; (b) Fisher estimates against the exact Gauss-Newton matrix, on the real task
vectors, at several batch sizes; (c) the landscape's forecast of the loss of random compositions, with and without the
regulariser, and Theorem 1 of Porrello et al. (2025) as the modules move away from the base; (d) whether the Hessian at
the base is positive. Under 4 minutes on 2 CPU cores with no arguments, the run included. Expected numbers: README.md.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import job
import options as line
from job import closing, console
from options import Count, Counts, OnRuns, Seed, number

SMALL = ["ita-lora", "none-lora"]


@dataclass(frozen=True)
class Options(OnRuns):
    images: Count = 160
    """test images that losses are means over"""
    fisher_images: Count = 128
    """a multiple of 8 of them for Fisher estimates"""
    fisher_batches: Counts = (1, 8, 32, 128)
    """batch sizes tried where they divide it"""
    weightings: Annotated[int, number(int, 2)] = 100
    """random compositions to forecast"""
    order: Count = 20
    """Lanczos steps"""
    seed: Seed = 0
    """of the images, the directions and the compositions"""


def parse(arguments: Sequence[str] | None = None) -> Options:
    return line.parse(Options, __doc__, arguments)


if __name__ == "__main__":
    closing(parse)  # help and a wrong command line end here, before JAX and the rooms are loaded

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fisher_check import check_fisher
from pool_loss import Problem, batches, functions, problem_of

from compo_jax import curvature, incremental, report, tree
from compo_jax.curvature.check_results import (
    CurvatureResults,
    Expansion,
    ForecastCheck,
    ProductCheck,
    SpectrumCheck,
    Theorem,
)
from compo_jax.train import write_result


# -- (a) products ----------------------------------------------------------------------------------------------------
def check_products(model, problem: Problem, seed: int) -> ProductCheck:
    """A Hessian product in float64 and float32, against the dense matrix (reverse over reverse) and differences."""
    _, loss = functions(model)
    name = "blocks/attention/proj/bias"
    images, labels = problem.images[:4], problem.labels[:4]
    biases, rest = tree.partition(problem.rest, name)

    def run(dtype):
        cast = partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
        frozen = problem._replace(weights=None, deltas=[], head=cast(problem.head))
        point, others, weights, pixels = map(cast, (biases, rest, problem.weights, images))
        vector = jax.tree.map(
            lambda x: jnp.asarray(np.random.default_rng(seed).normal(size=x.shape) / np.sqrt(x.size), dtype), point
        )

        def of_biases(p):
            return loss(frozen._replace(rest=tree.combine(p, others)), weights, pixels, labels)

        def flat(t):
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(t)])

        product = jax.jit(lambda p, v: flat(curvature.hvp(of_biases, p, v)))(point, vector)
        return of_biases, point, vector, flat, product

    def gap(a, b):
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    single = run(jnp.float32)[-1]
    with jax.enable_x64(True):
        of_biases, point, vector, flat, product = run(jnp.float64)
        _, unravel = jax.flatten_util.ravel_pytree(point)
        gradient = jax.jit(lambda x: jax.grad(lambda y: of_biases(unravel(y)))(x))

        @jax.jit
        def dense_product(x, v):
            _, pull = jax.vjp(jax.grad(lambda y: of_biases(unravel(y))), x)
            rows = jax.lax.map(lambda e: pull(e)[0], jnp.eye(x.size), batch_size=32)
            return rows @ v, jnp.abs(rows - rows.T).max() / jnp.abs(rows).max()

        x, v = flat(point), flat(vector)
        dense, asymmetry = dense_product(x, v)
        steps = 10.0 ** np.arange(0, -8, -0.5)
        differences = [gap((gradient(x + h * v) - gradient(x - h * v)) / (2 * h), dense) for h in steps]
        return ProductCheck(
            leaf=name,
            dimension=x.size,
            error_float64=gap(product, dense),
            error_float32=gap(jnp.asarray(single, jnp.float64), dense),
            asymmetry_of_dense=float(asymmetry),
            difference_steps=steps,
            difference_errors=np.array(differences),
        )


# -- (c) forecast and theorem ----------------------------------------------------------------------------------------
def check_forecast(model, problem: Problem, count: int, seed: int) -> ForecastCheck:
    """The landscape's forecasts of random compositions, around the base and around the uniform composition."""
    logits, loss = functions(model)
    tasks = len(problem.deltas)
    uniform = np.full(tasks, 1 / tasks)

    @jax.jit
    def expand(problem, data, anchor):
        return curvature.landscape(partial(loss, problem), problem.weights, problem.deltas, batches=data, anchor=anchor)

    @jax.jit
    def true_losses(problem, weights):
        def one(w):
            params = tree.add(problem.weights, tree.weighted_sum(problem.deltas, w))
            return loss(problem, params, problem.images, problem.labels)

        return jax.lax.map(one, weights)

    @jax.jit
    def gain_error(problem, best, uniform):
        """The standard error, over the images, of the difference between the losses at two weightings."""
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(
                logits(problem, tree.add(problem.weights, tree.weighted_sum(problem.deltas, w)), problem.images),
                problem.labels,
            )
            for w in (best, uniform)
        ]
        return jnp.std(losses[0] - losses[1], ddof=1) / jnp.sqrt(len(problem.labels))

    weights = np.random.default_rng(seed).dirichlet(np.ones(tasks), count)
    scales = np.linspace(0, 1.5, 7)
    moved = np.concatenate([scales[:, None] * uniform, *(scales[:, None] * e for e in np.eye(tasks))])
    true = np.asarray(true_losses(problem, weights.astype(np.float32)))
    path = np.asarray(true_losses(problem, moved.astype(np.float32))).reshape(tasks + 1, -1)
    anchors = {}
    for name, anchor in (("the base", np.zeros(tasks)), ("the uniform composition", uniform)):
        found = expand(problem, batches(problem), anchor.astype(np.float32))
        forecast = np.asarray(found.predict(weights))
        remainder = found.remainder()
        best = found.best_weights()
        anchors[name] = Expansion(
            forecast=forecast,
            correlation=float(np.corrcoef(forecast, true)[0, 1]),
            relative_error=float(np.mean(np.abs(forecast - true) / true)),
            standard_error=float(np.mean(found.standard_error(weights))),
            remainder_loss=np.asarray(remainder.loss),
            remainder_slope=np.asarray(remainder.slope),
            gram_eigenvalues=np.linalg.eigvalsh(np.asarray(found.gram, np.float64)),
            best_weights=best,
            best_forecast=float(found.predict(best)),
            best_true=float(true_losses(problem, best.astype(np.float32)[None])[0]),
            gain_error=float(gain_error(problem, best.astype(np.float32), uniform.astype(np.float32))),
        )
        if name == "the base":
            gap = scales**2 * float(found.gap(uniform))
    single, composed = path[1:].mean(axis=0), path[0]
    at_uniform = float(composed[np.argmin(np.abs(scales - 1))])
    return ForecastCheck(true, at_uniform, anchors, Theorem(scales, single, composed, gap, single - composed))


# -- (d) spectrum ----------------------------------------------------------------------------------------------------
def check_spectrum(model, problem: Problem, count: int, order: int, seed: int) -> SpectrumCheck:
    """The spectrum of the Hessian of the adapted weights at the base."""
    _, loss = functions(model)
    some = problem._replace(images=problem.images[:count], labels=problem.labels[:count])

    @jax.jit
    def lanczos(problem, data, key):
        matvec = curvature.hessian(partial(loss, problem), problem.weights, data, check=False)
        found = curvature.spectrum(matvec, problem.weights, key, order)
        smallest = curvature.top_eigenvalues(matvec, problem.weights, key, 1, order, "smallest")
        return found, (smallest.values[0], smallest.error_bounds[0])

    found, smallest = lanczos(some, batches(some), jax.random.key(seed))
    nodes, weights = np.asarray(found.nodes[0]), np.asarray(found.weights[0])
    return SpectrumCheck(
        images=count,
        dimension=tree.size(problem.weights),
        nodes=nodes,
        weights=weights,
        smallest=float(smallest[0]),
        bound=float(smallest[1]),
        largest=float(nodes.max()),
        negative_mass=float(-(weights * nodes)[nodes < 0].sum() / (weights * np.abs(nodes)).sum()),
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    began = time.perf_counter()
    if options.fisher_images % 8 or options.fisher_images > options.images:
        raise ValueError(
            f"--fisher-images {options.fisher_images} must be a multiple of 8, at most the {options.images} of --images"
        )
    sizes = [b for b in options.fisher_batches if options.fisher_images % b == 0]
    if not sizes or (options.fisher_batches != Options.fisher_batches and len(sizes) < len(options.fisher_batches)):
        wrong = [b for b in options.fisher_batches if b not in sizes]
        raise ValueError(
            f"--fisher-batches {' '.join(map(str, wrong))}: not divisors of {options.fisher_images} images"
        )
    if len(options.run) > 1:
        raise ValueError(f"--run names {len(options.run)} runs, and one is checked at a time: start it again for each")
    (folder,) = job.finished_runs(options, "curvature-pools", SMALL)
    run = incremental.open_finished(folder, options.data_dir)
    if not run.pools:
        raise ValueError(f"{folder} has no pool of modules trained alone: give the run a method such as ita-lora")
    if len(run.stream.tasks) < 2:
        raise ValueError(f"{folder} has one task only: compositions need two")
    if options.images < (tasks := len(run.stream.tasks)):
        raise ValueError(f"--images {options.images}: {folder} has {tasks} tasks, and each needs a test image at least")
    pools = incremental.common_methods([run], options.methods)
    kind = {name: problem_of(run, name, options.images, options.seed) for name in pools}
    first = kind[next(iter(kind))]
    labels = len(first.labels)
    if options.fisher_images > labels:
        raise ValueError(f"--fisher-images must be a multiple of 8, at most the {labels} images that there are")
    console.print(f"{run.backbone}; {run.stream.name}: {len(first.deltas)} modules, {labels} images; {', '.join(kind)}")

    _, loss = functions(run.model)
    curvature.hessian(partial(loss, first), first.weights, batches(first)[:1])  # refuses a loss that draws anything
    products = check_products(run.model, first, options.seed)
    console.print(f"(a) Hessian products: relative error {products.error_float64:.1e} in float64")
    fisher = check_fisher(run.model, first, options.fisher_images, sizes, options.seed)
    console.print(report.fisher_table(fisher).rich())
    forecast = {n: check_forecast(run.model, k, options.weightings, options.seed) for n, k in kind.items()}
    console.print(report.forecast_table(forecast).rich())
    spectrum = check_spectrum(run.model, first, min(128, labels), options.order, options.seed)
    console.print(f"(d) Hessian at the base: eigenvalues from {spectrum.smallest:.3g} to {spectrum.largest:.3g}")
    results = CurvatureResults(
        name=folder.name,
        data=run.stream.name,
        backbone=run.backbone,
        seed=options.seed,
        tasks=[task.name for task in run.stream.tasks],
        images=labels,
        products=products,
        fisher=fisher,
        forecast=forecast,
        spectrum=spectrum,
        seconds=time.perf_counter() - began,
    )
    job.put_aside(folder / "curvature", options)
    path = report.curvature_page(folder / "curvature", results)
    write_result(folder / "curvature" / "metrics.json", results)
    console.print(f"{results.seconds:.0f} s; report: {path}", soft_wrap=True)


if __name__ == "__main__":
    closing(main, "the same command begins again with the run, which is kept")
