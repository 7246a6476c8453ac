"""The linear classifier over all classes: started by a probe, aligned on features drawn from the mixtures.

A head is `{"kernel": (features, classes), "bias": (classes,)}`; the classes of a stream are its columns, in order, so
that those seen so far are the first ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from compo_jax.incremental.mixtures import Mixtures, sample

Head = dict[str, Array | np.ndarray]


def new_head(key: Key[Array, ""], features: int, classes: int) -> Head:
    """A head at its start: kernel truncated normal of standard deviation 0.02, bias 0."""
    kernel = 0.02 * jax.random.truncated_normal(key, -2, 2, (features, classes))
    return {"kernel": kernel, "bias": jnp.zeros(classes)}


def task_columns(head: Head, first: int, count: int, width: int) -> Head:
    """The columns of one task, filled up with zeros to `width`, so that every task's head has one shape."""
    return jax.tree.map(
        lambda x: jnp.pad(x[..., first : first + count], [(0, 0)] * (x.ndim - 1) + [(0, width - count)]), head
    )


def logits(head: Head, features: Float[Array, "n features"]) -> Float[Array, "n classes"]:
    """The head's linear map."""
    return features @ head["kernel"] + head["bias"]


def masked(values: Float[Array, "n classes"], mask: Bool[Array, " classes"]) -> Float[Array, "n classes"]:
    """Logits with -inf for the classes that do not take part."""
    return jnp.where(mask, values, -jnp.inf)


def alignment_loss(
    values: Float[Array, "n classes"], labels: Int[Array, " n"], mask: Bool[Array, " classes"], temperature: float = 0.1
) -> Float[Array, ""]:
    """Mean cross-entropy of logits divided by `temperature` times their norm over the classes of `mask`.

    Of the pre-consolidation of Porrello et al. (2025): no class can win by longer logits.
    """
    present = jnp.where(mask, values, 0)
    squares = jnp.sum(present**2, axis=-1, keepdims=True)
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)  # no NaN gradient at zero logits
    scaled = masked(values / (temperature * (norm + 1e-7)), mask)
    return optax.softmax_cross_entropy_with_integer_labels(scaled, labels).mean()


def probe(
    key: Key[Array, ""],
    head: Head,
    features: Float[Array, "images features"],
    labels: Int[Array, " images"],
    mask: Bool[Array, " classes"],
    *,
    steps: int,
    batch: int = 128,
    learning_rate: float = 0.01,
) -> Head:
    """Linear probe by plain SGD on the features of one task, the other classes' logits masked."""

    def body(k, head):
        chosen = jax.random.randint(jax.random.fold_in(key, k), (batch,), 0, features.shape[0])

        def loss(head):
            values = masked(logits(head, features[chosen]), mask)
            return optax.softmax_cross_entropy_with_integer_labels(values, labels[chosen]).mean()

        return jax.tree.map(lambda p, g: p - learning_rate * g, head, jax.grad(loss)(head))

    return jax.lax.fori_loop(0, steps, body, head)


def align(
    key: Key[Array, ""],
    head: Head,
    mixtures: Mixtures,
    seen: Int[Array, ""] | int,
    *,
    steps: Int[Array, ""] | int,
    batch: int = 128,
    learning_rate: float = 0.01,
) -> Head:
    """Alignment over the first `seen` classes, on features drawn afresh from their mixtures at every step.

    SGD with a cosine from `learning_rate` to 0 over `steps` (which may be traced: one compilation for every task).
    """
    mask = jnp.arange(head["bias"].shape[0]) < seen

    def body(k, head):
        key_label, key_feature = jax.random.split(jax.random.fold_in(key, k))
        labels = jax.random.randint(key_label, (batch,), 0, seen)
        features = sample(key_feature, mixtures, labels)
        gradient = jax.grad(lambda head: alignment_loss(logits(head, features), labels, mask))(head)
        rate = learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * k / steps))
        return jax.tree.map(lambda p, g: p - rate * g, head, gradient)

    return jax.lax.fori_loop(0, steps, body, head)


def head_fisher(head: Head, features: Float[Array, "n features"], mask: Bool[Array, " classes"]) -> dict[str, Array]:
    """Mean diagonal Fisher of the head in closed form: `mean_n p_k (1 - p_k) z_d²` and `mean_n p_k (1 - p_k)`."""
    p = jax.nn.softmax(masked(logits(head, features), mask))
    variance = p * (1 - p)
    return {"kernel": (features**2).T @ variance / features.shape[0], "bias": variance.mean(axis=0)}
