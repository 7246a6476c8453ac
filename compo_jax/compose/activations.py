"""Rules that look at what goes through the layers: ESM at the change of each layer's outputs, RegMean++ at inputs that
have passed the layers that are merged already."""

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from compo_jax import lapack, tree
from compo_jax.adapters.adapter import STACKED
from compo_jax.compose.adaptive import Unlabelled, tasks_of
from compo_jax.compose.kronecker import regmean, split_layers
from compo_jax.compose.leaves import Stacked, add_delta, layers, mean_delta, require_sound
from compo_jax.compose.matrices import EXACT, orthonormal, product, svd
from compo_jax.compose.modules import with_zeros
from compo_jax.compose.numbers import (
    Scalar,
    Weights,
    along,
    count_of,
    require_not_negative,
    require_number,
    require_part,
    weigh,
)
from compo_jax.curvature import Kronecker
from compo_jax.curvature.layers import Dense, tap, zeros
from compo_jax.tree import Tree


def esm(
    base: Tree,
    deltas: Sequence[Tree],
    factors: Sequence[Kronecker],
    weights: Weights | None = None,
    *,
    rank: Scalar | None = None,
    power: Scalar = 2.0,
    sharpness: Scalar = 0.15,
    even: bool = True,
    scale: Scalar = 2.0,
    check_finite: bool = True,
) -> Tree:
    """ESM (2026, arXiv 2606.19164): the directions in which each task's outputs move most, made orthogonal.

    In each dense layer V_t (out, k) are the leading principal directions of the shift `x Δ_t` of its outputs over few
    unlabelled inputs x, and `C_t = Δ_t V_t` what leads there. The joined directions are made orthonormal, and
    `τ = C P(V)ᵀ`, or, where `even`, `s̄_C P(C) s̄_V P(V)ᵀ` with the joined C made orthonormal, too: P is the nearest
    orthonormal matrix, s̄ the mean singular value. What is strong is made stronger before (`power`).

    Args:
      factors: one `curvature.kronecker` a task, of the module's own model; only the inputs' side is used, for the
        principal directions are those of `Δ_tᵀ A_t Δ_t`.
      weights: (tasks,), multiply the deltas; default 1. Not negative.
      rank: k as a part of out; default 1 / T, as in the authors' code, which rounds down.
      power: C_t is multiplied by the power of the norm of Δ_t over the tasks' mean norm, each row of the joined C (an
        input) by that of its own over the rows' mean, and each layer of a stack by that of its result's over the
        layers' mean.
      sharpness: directions, and their coefficients, are multiplied by this power of their variance over the mean
        variance.
      scale: of the merged task vector.

    The defaults are those of the authors' code. With `rank=1`, `power=0`, `sharpness=0`, `even=False` and `scale=1` one
    task alone is kept, if its inputs span all directions. Leaves without factors are averaged (the authors' code takes
    TSV-M for other matrices). Errors as `regmean`.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    if rank is not None:
        require_part("rank", rank, "the part of the output directions that is kept, above 0 and at most 1", zero=False)
    require_not_negative(power=power, sharpness=sharpness)
    require_number("scale", scale, "a finite number")
    weights = weigh(weights, len(deltas), 1.0, sign=False)
    covered, factors, rest = split_layers(deltas, factors, weights, ["inputs"] if check_finite else [])
    dense = dict(factors[0].layout)
    kept = 1 / len(deltas) if rank is None else rank

    def leaf(name, *changes):
        if changes[0] is None:
            return None
        lay, wide = dense[name], tree.wide_type(*changes)
        x = jnp.stack([lay.matrix(jnp.asarray(change, wide)) for change in changes])  # (tasks, *stack, in, out)
        x = along(weights, x) * x
        grams = jnp.stack([f.inputs[name].astype(wide) for f in factors])
        count = max(1, count_of(kept, x.shape[-1]))
        # one layer at a time, see lapack.py
        flat = [jnp.moveaxis(a.reshape(len(a), -1, *a.shape[-2:]), 1, 0) for a in (x, grams)]
        merged = _essential(*flat, count, even, jnp.asarray(power, wide), jnp.asarray(sharpness, wide))
        if lay.stack:
            norms = jnp.linalg.norm(merged, axis=(1, 2), keepdims=True)
            merged = merged * _relative(norms, power)
        return lay.leaf(merged.reshape(x.shape[1:]))

    merged = tree.map_with_name(leaf, *covered)
    merged = jax.tree.map(lambda x: jnp.asarray(scale, x.dtype) * x, merged)
    return add_delta(base, tree.combine(merged, rest), check_finite=check_finite)


def _relative(norms: Array, power: Scalar) -> Array:
    """Norms over their mean, to a power."""
    mean = jnp.mean(norms)
    return jnp.where(mean > 0, norms / jnp.where(mean > 0, mean, 1), 1) ** power


@functools.partial(jax.jit, static_argnums=(2, 3))
def _essential(x: Array, grams: Array, count: int, even: bool, power: Array, sharpness: Array) -> Array:
    """ESM of matrices (layers, tasks, in, out) with Gram matrices (layers, tasks, in, in) of their inputs."""

    def directions(part):
        x, gram = part
        values, vectors = lapack.eigh(product(x.T, gram, x))
        values, vectors = jnp.maximum(values[::-1][:count], 0), vectors[:, ::-1][:, :count]
        return vectors, _relative(values, sharpness)

    def layer(part):
        x, gram = part
        vectors, shares = jax.lax.map(directions, (x, gram))
        shares = shares / jnp.mean(shares, axis=1, keepdims=True)
        coefficients = product(x, vectors) * _relative(jnp.linalg.norm(x, axis=(1, 2), keepdims=True), power)
        left, right = (jnp.moveaxis(a * shares[:, None], 0, 1).reshape(a.shape[1], -1) for a in (coefficients, vectors))
        left = left * _relative(jnp.linalg.norm(left, axis=1, keepdims=True), power)
        if not even:
            return product(left, orthonormal(right).T)
        return product(_even(left), _even(right).T)

    return jax.lax.map(layer, (x, grams))


def _even(x: Array) -> Array:
    """The nearest orthonormal matrix, times the mean singular value."""
    parts = svd(x, EXACT)
    return jnp.mean(parts.values) * product(parts.left, parts.right)


@runtime_checkable
class _Grams(Protocol):
    """The inputs of one task."""

    def __call__(self, params: Tree) -> dict[str, Array]:
        """The mean Gram matrix (*stack, in, in) of each dense layer's inputs in a model with these parameters."""
        ...


def _tapped(task: Unlabelled, params: Tree, changed: Sequence[str], what: str) -> tuple[dict[str, Dense], _Grams]:
    """(the dense layers among the leaves that are changed, in the order of the forward pass; their Gram matrices)."""
    layers = tap(task.apply, params, task.batches[0]).layers
    dense = {name: layer for name, layer in layers.items() if name in changed}
    if not dense:
        raise ValueError(
            f"{what} has no dense layer among the weights that the modules change, {', '.join(changed)}: its apply "
            "takes the parameters first, and multiplies inputs by them"
        )

    @jax.jit
    def sums(params, batch):
        taps = tap(task.apply, params, batch)
        _, inputs = taps.forward(zeros(taps.probes), params, batch)
        rows = {name: inputs[name].astype(tree.wide_type(inputs[name])) for name in dense}
        grams = {name: jnp.einsum("...ni,...nj->...ij", x, x, precision="highest") for name, x in rows.items()}
        return grams, {name: jnp.asarray(x.shape[-2], x.dtype) for name, x in rows.items()}

    def grams(params):
        ones = [1.0] * len(task.batches)
        total, rows = tree.weighted_sum((sums(params, batch) for batch in task.batches), ones)
        return jax.tree.map(lambda x, count: x / count, total, rows)

    return dense, grams


class _Block(NamedTuple):
    """Leaves that are merged together, one layer of a stack after another, or all at once.

    Attributes:
      dense, others: the paths of dense layers' weights, and of what is merged with them.
      depth: layers of the stack; None where there is none.
    """

    dense: list[str]
    others: list[str]
    depth: int | None


def _blocks(dense: dict[str, Dense], rest: dict[str, tuple[int, ...]]) -> list[_Block]:
    """The blocks in the order of the forward pass; `rest` are the shapes of other leaves that are stacks."""
    blocks: list[_Block] = []
    for name, layer in dense.items():
        depth = layer.stack[0] if layer.stack else None
        if depth is None or not blocks or blocks[-1].depth != depth:
            blocks.append(_Block([], [], depth))
        blocks[-1].dense.append(name)
    for name, shape in rest.items():
        near = [block for block in blocks if block.depth == shape[0]]
        if near:  # the block whose paths are most like this one
            shared = [max(len(os.path.commonpath([name, other])) for other in block.dense) for block in near]
            near[int(np.argmax(shared))].others.append(name)
    return blocks


def regmean_plus(
    base: Tree,
    deltas: Sequence[Tree],
    unlabelled: Sequence[Unlabelled],
    weights: Weights | None = None,
    *,
    scaling: Scalar = 0.95,
    damping: Scalar = 0.0,
    stacked: Stacked = STACKED,
    check_finite: bool = True,
) -> Tree:
    """RegMean++ (2025, arXiv 2508.03121): RegMean from the first layer to the last, of inputs that have passed the
    layers before as they are merged.

    Each task's images go through the merged layers and then through its own model's next block, whose inputs make the
    Gram matrices with which `regmean` merges that block. A block is one step of a scan, as in our ViT; layers that
    aren't stacked are merged one by one. The images pass once for each block. Not under jit.

    Args:
      unlabelled: one a module, inputs of its task and its model, whose outputs are left aside.
      weights, scaling, damping: see `regmean`; the authors' scaling is 0.95.
      stacked: patterns of the paths of leaves whose axis 0 counts layers.

    Leaves without dense layers are averaged, those of a stack with the block that they are in, others (embeddings)
    before the first, as in the authors' code. ValueError as `regmean`, for another number of tasks, and where the
    models have no dense layers that the modules change, or not the same.
    """
    deltas = with_zeros(base, deltas, check_finite=check_finite)
    weights = weigh(weights, len(deltas), sign=False)
    changed = tree.names(deltas[0])
    models = [tree.by_name(tree.add(base, delta)) for delta in deltas]
    merged = tree.by_name(tree.add(base, mean_delta(deltas, weights)))
    tasks = tasks_of(unlabelled, len(deltas))
    tapped = [
        _tapped(task, tree.place(model, base), changed, f"the model of task {t}")
        for t, (task, model) in enumerate(zip(tasks, models, strict=True))
    ]
    dense = tapped[0][0]
    if other := [str(t) for t, (theirs, _) in enumerate(tapped) if theirs.keys() != dense.keys()]:
        raise ValueError(
            f"the models of tasks {', '.join(other)} have other dense layers than that of task 0, {', '.join(dense)}"
        )
    of_layers = layers(base, deltas[0], stacked)
    stacks = {name: np.shape(merged[name]) for name in changed if name in of_layers and name not in dense}
    later = _blocks(dense, stacks)
    while later:
        block, *later = later
        for layer in range(block.depth or 1):
            seen = []
            for model, (_, grams) in zip(models, tapped, strict=True):
                params = merged | {name: model[name] for other in later for name in other.dense + other.others}
                for name in block.dense + block.others:
                    whole = block.depth is None
                    params[name] = model[name] if whole else model[name].at[:layer].set(merged[name][:layer])
                seen.append(grams(tree.place(params, base)))
            at = slice(None) if block.depth is None else slice(layer, layer + 1)
            part = [{name: tree.by_name(x)[name][at] for name in block.dense} for x in (base, *deltas)]
            layout = tuple((name, _cut(dense[name])) for name in block.dense)
            factors = [Kronecker({n: g[n][at] for n in block.dense}, {}, jnp.array(1), layout) for g in seen]
            options = {"scaling": scaling, "damping": damping, "check_finite": check_finite}
            done = regmean(part[0], part[1:], factors, weights, **options)
            merged |= {name: merged[name].at[at].set(x) for name, x in done.items()}
    params = tree.place(merged, base)
    if check_finite:
        require_sound(params, base, deltas)
    return params


def _cut(layer: Dense) -> Dense:
    """One layer of a stack, alone."""
    return layer._replace(stack=(1, *layer.stack[1:])) if layer.stack else layer
