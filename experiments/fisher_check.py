"""Question (b) of curvature_check.py: Fisher estimates against the exact Gauss-Newton matrix."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from pool_loss import Problem, functions

from compo_jax import curvature, tree
from compo_jax.curvature.check_results import FisherCheck, FisherEstimate


def fisher_estimates(model, key: jax.Array) -> dict[str, Callable]:
    """`(frozen, size) -> curvature` by the name of the estimate, from batches of `size` images."""
    logits, loss = functions(model)

    def squared_batches(frozen, size):
        """What many take for the Fisher: the square of a batch's gradient, times the batch."""

        def one(pair):
            g = jax.grad(partial(loss, frozen))(frozen.weights, *pair)
            return jax.tree.map(lambda x: size * jnp.square(x), g)

        def grouped(x):
            return x.reshape(-1, size, *x.shape[1:])

        squares = jax.lax.map(one, (grouped(frozen.images), grouped(frozen.labels)))
        return curvature.as_curvature(jax.tree.map(lambda x: jnp.mean(x, axis=0), squares))

    def diagonal(frozen, size, **options):
        return curvature.fisher_diagonal(partial(logits, frozen), frozen.weights, frozen.images, chunk=size, **options)

    def factors(frozen, size, **options):
        return curvature.kronecker(partial(logits, frozen), frozen.weights, frozen.images, chunk=size, **options)

    def corrected(frozen, size):
        data = (partial(logits, frozen), frozen.weights, frozen.images)
        return curvature.eigenvalue_corrected(factors(frozen, size), *data, chunk=size)

    return {
        "exact diagonal": partial(diagonal, method="exact"),
        "low-rank diagonal": partial(diagonal, method="low_rank", tolerance=1e-2),
        "Monte-Carlo diagonal": partial(diagonal, method="monte_carlo", key=key),
        "empirical diagonal": lambda frozen, size: diagonal(frozen, size, method="empirical", labels=frozen.labels),
        "squared batch gradient": squared_batches,
        "Monte-Carlo K-FAC": partial(factors, method="monte_carlo", key=key),
        "K-FAC": factors,
        "K-FAC, reduce": partial(factors, tokens="reduce"),
        "EKFAC": corrected,
    }


@jax.jit
def compare(estimate, exact_diagonal, exact, stacked):
    """The numbers of a `FisherEstimate`: an estimate beside the exact diagonal, and the exact products `exact` with the
    task vectors `stacked`."""
    ours, dots = jax.vmap(estimate.matvec)(stacked), jax.vmap(tree.dot)
    diagonal = tree.place(tree.by_name(estimate.diagonal()), exact_diagonal)
    cosine = dots(ours, exact) / jnp.sqrt(dots(ours, ours) * dots(exact, exact))
    form, true = dots(stacked, ours), dots(stacked, exact)
    norm = jnp.sqrt(tree.dot(diagonal, diagonal) * tree.dot(exact_diagonal, exact_diagonal))
    total = sum(jnp.sum(x) for x in jax.tree.leaves(diagonal))
    return {
        "diagonal_cosine": tree.dot(diagonal, exact_diagonal) / norm,
        "trace_ratio": total / sum(jnp.sum(x) for x in jax.tree.leaves(exact_diagonal)),
        "product_cosine": jnp.mean(cosine),
        "form_ratio": jnp.mean(form / true),
        "form_error": jnp.mean(jnp.abs(form - true) / true),
    }


def check_fisher(model, problem: Problem, count: int, batches: Sequence[int], seed: int) -> FisherCheck:
    """Estimates of the Fisher against the exact Gauss-Newton matrix on the task vectors, at several batch sizes."""
    logits, _ = functions(model)
    frozen = problem._replace(images=problem.images[:count], labels=problem.labels[:count])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *problem.deltas)

    @jax.jit
    def exact_products(frozen, stacked):
        return jax.vmap(lambda v: curvature.ggnvp(partial(logits, frozen), frozen.weights, v, frozen.images))(stacked)

    estimates, exact = fisher_estimates(model, jax.random.key(seed)), exact_products(frozen, stacked)
    slow = ("K-FAC", "K-FAC, reduce", "EKFAC")  # all classes pulled back: at one size, to save time
    tried = [(name, size) for name in estimates for size in (batches[-2:][:1] if name in slow else batches)]
    rows, exact_diagonal = [], None
    for name, size in tried:  # the exact diagonal first
        compiled = jax.jit(partial(estimates[name], size=size)).lower(frozen).compile()
        clock = time.perf_counter()
        estimate = jax.block_until_ready(compiled(frozen))
        seconds = time.perf_counter() - clock
        exact_diagonal = estimate.diagonal() if exact_diagonal is None else exact_diagonal
        numbers = compare(estimate, exact_diagonal, exact, stacked)
        rows.append(FisherEstimate(name, size, seconds, **jax.tree.map(float, numbers)))
    return FisherCheck(count, problem.head["bias"].size, tree.size(problem.weights), rows)
