"""A data set as the operators see it: batches on the device, scanned over, with means weighted by examples."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from compo_jax import tree
from compo_jax.mesh import DATA, replicated, split
from compo_jax.tree import Tree


class Batches(NamedTuple):
    """A data set on the device.

    Attributes:
      groups: batches of one size each, stacked on axis 0.
      counts: examples in each batch of a group.
    """

    groups: tuple[Tree, ...]
    counts: tuple[Any, ...]

    @property
    def first(self) -> tuple:
        return jax.tree.map(lambda x: x[0], self.groups[0])


def examples(batch: Tree) -> int:
    """Length of axis 0, which all arrays of a batch share."""
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if not sizes:
        raise ValueError("there are no arrays in a batch: its inputs are empty")
    if len(sizes) != 1 or () in sizes:
        shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
        raise ValueError(f"a batch's arrays must share the length of axis 0; its arrays have the shapes {shapes}")
    return sizes.pop()[0]


def require_examples(batch: Tree) -> None:
    """ValueError where an array has no examples on axis 0: the mean over them would be nan."""
    for x in jax.tree.leaves(batch):
        if np.shape(x)[:1] == (0,):
            raise ValueError(f"a batch without examples was given, an array of shape {np.shape(x)}: its mean is nan")


def stack(batches: Iterable[tuple], mesh: Mesh | None = None) -> Batches:
    """Stacks batches `(inputs, labels, ...)` of equal shapes, so that a scan can go over them.

    Args:
      batches: what a loss takes after the parameters, a tuple for each batch; examples on axis 0 of every array.
      mesh: splits every batch over the mesh's devices; one that they don't divide, as the last may be, is replicated.
    """
    groups: dict[Any, list[tuple]] = {}
    for batch in batches:
        if not isinstance(batch, tuple):
            raise ValueError(
                f"a batch is the tuple of what follows the parameters, (images, labels) say, not {type(batch)}"
            )
        if examples(batch) == 0:
            raise ValueError("there is a batch without examples: drop it, or look at what made it")
        shapes = jax.tree.map(lambda x: (np.shape(x), jnp.result_type(x)), batch)
        groups.setdefault(str(shapes), []).append(batch)
    if not groups:
        raise ValueError("there are no batches: an iterator that has been used up gives none a second time")
    counts = tuple(examples(group[0]) for group in groups.values())
    stacked = tuple(jax.tree.map(lambda *x: jnp.stack(x), *group) for group in groups.values())
    if mesh is not None:
        devices = mesh.shape[DATA]
        stacked = tuple(
            jax.device_put(group, split(mesh, axis=1) if count % devices == 0 else replicated(mesh))
            for group, count in zip(stacked, counts, strict=True)
        )
    return Batches(stacked, counts)


def count(batches: Batches, examples: Callable[..., jax.Array] | None = None) -> Any:
    """The number of all examples, or of those of each batch that `examples(*batch)` counts."""
    if examples is None:
        return sum(size * _length(group) for group, size in zip(*batches, strict=True))
    return sum(jnp.sum(jax.lax.map(lambda batch: examples(*batch), group)) for group in batches.groups)


def mean(function: Callable[..., Tree], batches: Batches, examples: Callable[..., jax.Array] | None = None) -> Tree:
    """The mean of `function(*batch)`, a mean over the batch's examples, over all examples; one result in memory.

    Args:
      examples: `batch ->` how many of its examples the function's mean is over; default all.
    """
    total = None
    for group, size in zip(*batches, strict=True):
        like = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], group))
        # A sum in a 16-bit dtype stops growing after some hundred terms.
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), like)

        def add(sum, batch):
            share = 1 if examples is None else examples(*batch)
            return jax.tree.map(lambda s, x: s + share * x, sum, function(*batch)), None

        part, _ = jax.lax.scan(add, zero, group)
        part = jax.tree.map(lambda x, n=size if examples is None else 1: n * x, part)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    number = count(batches, examples)
    return jax.tree.map(lambda x, y: (x / number).astype(y.dtype), total, like)


def each(function: Callable[..., Tree], batches: Batches) -> tuple[Tree, jax.Array]:
    """(`function(*batch)` of every batch, stacked on axis 0; each batch's fraction of the examples)."""
    parts = [jax.lax.scan(lambda _, batch: (None, function(*batch)), None, group)[1] for group in batches.groups]
    counts = jnp.concatenate([jnp.full(_length(g), n) for g, n in zip(*batches, strict=True)])
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts), counts / counts.sum()


def _length(group: Tree) -> int:
    return jax.tree.leaves(group)[0].shape[0]


def require_deterministic(function: Callable, *args: Any) -> None:
    """ValueError where `function(*args)` has two values; under a trace, where there are no values, nothing is done."""
    if not tree.concrete(args):
        return
    draws = (
        "the function has two values at the same parameters and the same batch: curvature is taken of a function "
        "that draws nothing. Turn dropout off (deterministic=True), fix the random key, and don't shuffle or "
        "augment anew at each call"
    )
    try:  # traced twice, because what Python draws (a dropout key, a shuffled index) is drawn while tracing
        values = [jax.tree.leaves(jax.jit(lambda *a: function(*a))(*args)) for _ in range(2)]
    except jax.errors.UnexpectedTracerError as error:  # the first trace has left a key behind for the second
        raise ValueError(draws) from error
    if not tree.concrete(values):  # something closed over is being traced
        return
    if not all(np.allclose(a, b, rtol=1e-5, equal_nan=True) for a, b in zip(*values, strict=True)):
        raise ValueError(draws)


_COMPARED = 32  # rows: enough for a mean over them to be another one


def require_independent(apply: Callable[[Tree, Any], jax.Array], params: Tree, inputs: Any) -> None:
    """ValueError where the first row of `apply(params, inputs)` is another one than alone: each image's own gradient
    then says nothing of the whole. Some rows, spread over the batch, are looked at; under a trace, nothing is.

    Products are taken at the highest precision, and compared at the fourth root of the coarsest dtype's rounding
    (1e-4 in float64, 2 % in float32), for what a model rounds to 16 bits inside is not seen from here.
    """
    rows = examples(inputs)
    if rows < 2 or not tree.concrete(params, inputs):
        return
    some = np.linspace(0, rows - 1, min(rows, _COMPARED)).astype(int)

    def agree(function):
        with jax.default_matmul_precision("highest"):
            together, alone = (
                function(params, jax.tree.map(lambda x, rows=rows: x[rows], inputs)) for rows in (some, some[:1])
            )
        if not tree.concrete(together, alone):  # something closed over is being traced
            return True
        kinds = {jnp.result_type(x) for x in jax.tree.leaves((params, inputs, together))}
        rounding = max(float(jnp.finfo(kind).eps) for kind in kinds if jnp.issubdtype(kind, jnp.floating)) ** 0.25
        together, alone = np.asarray(together, np.float64), np.asarray(alone, np.float64)
        size = np.max(np.abs(together), where=np.isfinite(together), initial=0)
        return np.allclose(alone[0], together[0], rtol=0, atol=rounding * size, equal_nan=True)

    # Compiled once for the batches of one shape. What `apply` reads may have changed since: no error comes of the old.
    if not agree(jax.jit(functools.partial(apply) if apply.__hash__ is None else apply)) and not agree(apply):
        raise ValueError(
            "the model's outputs for an image depend on the others in the batch, and then an image has no gradient of "
            "its own. Likely causes: BatchNorm in training mode (use_running_average=True), a mean over the batch, "
            "dropout (deterministic=True) or another draw"
        )


def require_scalar(loss: Any) -> jax.Array:
    """The loss itself; ValueError where it is more than one number, or none that can be differentiated."""
    if isinstance(loss, tuple | list | dict):
        raise ValueError(f"the loss returns a {type(loss).__name__}: return the number alone, without aux")
    loss = jnp.asarray(loss)
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"the loss is an array of shape {loss.shape} and type {loss.dtype}: it must be one floating-point number, "
            "the mean over the batch"
        )
    return loss


def require_count(value: Any, message: str) -> None:
    """ValueError with this message where `value` is no integer from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(message)


def require_key(key: Any, what: str) -> None:
    """ValueError where `key` isn't one random key; `what` says what it is for."""
    new = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    old = isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1  # jax.random.PRNGKey
    if not new and not old:
        raise ValueError(f"{what}: key=jax.random.key(0), not {key!r}")
