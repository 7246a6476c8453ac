"""What goes into the dense layers of a model, as subspaces: those that are to be left alone grow from task to task."""

from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compo_jax import tree
from compo_jax.curvature.layers import tap, zeros
from compo_jax.data import Split, eval_batches
from compo_jax.incremental.settings import Setup
from compo_jax.lapack import eigh
from compo_jax.tree import Tree

_LEAST = 1e-6  # of the variance: a direction with less is rounding's, and may lie among those that are protected
_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
Square = Float[Array, "*stack n n"]


def input_grams(setup: Setup, adapted: Sequence[str]) -> Callable[[Tree, Split], Tree]:
    """`(params, split) -> Σ x xᵀ` over all images' tokens x that go into a dense layer, for each weight in `adapted`.

    ValueError where a path in `adapted` isn't that of the weight of one dense layer.
    """
    model, stream = setup.model, setup.stream

    @jax.jit
    def batch(params, images, real):
        kept, rest = tree.partition(params, lambda name: name in adapted)
        apply = lambda kept, x: model.apply({"params": tree.combine(kept, rest)}, x, method="features")
        taps = tap(apply, kept, stream.prepare(images))
        if other := sorted(set(adapted) - set(taps.layers)):
            raise ValueError(
                f"the inputs are wanted of dense layers that are used once, and these are none: {', '.join(other)}"
            )
        _, inputs = taps.forward(zeros(taps.probes), kept, stream.prepare(images))

        def gram(x):  # (*stack, images * tokens, in), the last images being there to fill up
            seen = jnp.repeat(jnp.arange(len(images)) < real, x.shape[-2] // len(images))
            x = jnp.where(seen[:, None], x.astype(tree.wide_type(x)), 0)
            return _product(jnp.swapaxes(x, -1, -2), x)

        return tree.place({name: gram(inputs[name]) for name in adapted}, params)

    def grams(params, split):
        parts = (batch(params, part["image"], real) for part, real in eval_batches(split, setup.settings.eval_batch))
        return reduce(partial(jax.tree.map, jnp.add), parts)

    return grams


def _unprotected(gram: Square, protected: Square) -> tuple[Float[Array, "*stack n"], Square, Float[Array, "*stack 1"]]:
    """(eigenvalues from the largest on, eigenvectors) of the Gram matrix outside the subspace, and its whole trace."""
    free = jnp.eye(gram.shape[-1], dtype=gram.dtype) - protected
    rest, total = _product(_product(free, gram), free), jnp.trace(gram, axis1=-2, axis2=-1)[..., None]
    values, vectors = jax.lax.map(eigh, rest.reshape(-1, *gram.shape[-2:]))
    values = values[..., ::-1].reshape(gram.shape[:-1])
    return jnp.where(values > _LEAST * total, values, 0), vectors[..., ::-1].reshape(gram.shape), total


@partial(jax.jit, static_argnames="rank")
def design(gram: Square, protected: Square, rank: int) -> Float[Array, "*stack n rank"]:
    """The leading directions of the inputs outside the protected subspace; columns of zeros where fewer are left."""
    values, vectors, _ = _unprotected(gram, protected)
    return jnp.where(values[..., None, :] > 0, vectors, 0)[..., :rank]


@jax.jit
def protect(gram: Square, protected: Square, share: float | Float[Array, ""]) -> Square:
    """The projector on the protected subspace, grown by the fewest directions to hold `share` of the inputs' variance.

    DualGPM keeps a basis of the subspace or of its complement, whichever is smaller: the projector is of one shape.
    """
    values, vectors, total = _unprotected(gram, protected)
    held = total - jnp.sum(values, axis=-1, keepdims=True) + jnp.cumsum(values, axis=-1) - values  # before each
    grown = jnp.where(((held < share * total) & (values > 0))[..., None, :], vectors, 0)
    return protected + _product(grown, jnp.swapaxes(grown, -1, -2))
