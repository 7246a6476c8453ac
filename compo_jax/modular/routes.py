"""Routes: from a network's parameters (..., M) to the weights that M templates have at each layer of each task.

Linear routes are coefficients, which are the weights themselves. All others are logits, whose weights sum to one over
the last axis; hand a function's settings over with `functools.partial`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from compo_jax import tree

Logits = Num[Array, "*layers templates"] | Num[np.ndarray, "*layers templates"]
Coefficients = Float[Array, "*layers templates"] | Float[np.ndarray, "*layers templates"]
Weights = Float[Array, "*layers templates"]


def require_logits(logits: Logits) -> None:
    """ValueError for logits that say no route: NaN, infinity, or -infinity at all templates of a layer."""
    if tree.concrete(logits):
        values = np.asarray(logits, np.float64)
        best = values.max(-1, initial=-np.inf)  # NaN where one is NaN
        if not np.isfinite(best).all():
            place = np.argwhere(~np.isfinite(best))[0].tolist()
            raise ValueError(
                f"a route's logits are finite, or -inf for a template that a layer can't take, and at {place} they are "
                f"{values[tuple(place)].tolist()}: the training diverged, say, or no template is left"
            )


def require_weights(weights: Weights | np.ndarray) -> None:
    """ValueError for what isn't a route's weights: none negative, of sum 1 over the templates."""
    if tree.concrete(weights):
        values = np.asarray(weights, np.float64)
        if not (np.all(values >= 0) and np.allclose(values.sum(-1), 1, atol=1e-2)):
            raise ValueError(
                "a route's weights are none negative and of sum 1 over the templates, and these are not: give "
                "`hard(logits)` or `soft(logits)` where they are logits"
            )


def _require_temperature(temperature: float | Float[Array, ""]) -> None:
    if tree.concrete(temperature) and not 0 < float(temperature) < np.inf:
        raise ValueError(f"a route's temperature is a positive number, not {temperature}")


def linear(coefficients: Coefficients) -> Coefficients:
    """The coefficients as they are; ValueError for NaN and infinities."""
    tree.require_finite({"the route": coefficients}, "a linear route")
    return coefficients


def soft(logits: Logits, temperature: float | Float[Array, ""] = 1.0) -> Weights:
    """`softmax(logits / temperature)`."""
    require_logits(logits)
    _require_temperature(temperature)
    return jax.nn.softmax(jnp.asarray(logits) / temperature, axis=-1)


def hard(logits: Logits) -> Weights:
    """One-hot at the largest logit, the first one of a tie; its gradient is zero."""
    require_logits(logits)
    logits = jnp.asarray(logits)
    dtype = jnp.result_type(logits, float)  # of whole numbers, too
    return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=dtype)


def straight_through(logits: Logits, temperature: float | Float[Array, ""] = 1.0) -> Weights:
    """`hard` forwards and the gradient of `soft` backwards (Bengio et al., 2013, arXiv 1308.3432)."""
    weights = soft(logits, temperature)
    return jax.lax.stop_gradient(hard(logits) - weights) + weights


def gumbel(logits: Logits, key: Key[Array, ""], temperature: float | Float[Array, ""] = 1.0) -> Weights:
    """`soft` of logits with Gumbel noise: a relaxed draw from `softmax(logits)` (Jang et al., 2017; Maddison et al.,
    2017)."""
    return soft(logits + jax.random.gumbel(key, logits.shape, logits.dtype), temperature)


def indices(logits: Logits) -> Int[Array, "*layers"]:
    """The template that a hard route takes at each layer."""
    require_logits(logits)
    return jnp.argmax(jnp.asarray(logits), axis=-1)


def fixed(templates: Int[Array, "*layers"] | Int[np.ndarray, "*layers"], count: int) -> Logits:
    """Logits whose hard route is `templates`; ValueError for a template that isn't there."""
    values = np.asarray(templates) if tree.concrete(templates) else np.zeros(0, int)
    if values.size and not 0 <= values.min() <= values.max() < count:
        raise ValueError(
            f"a route was asked for through the templates {values.tolist()}, and there are {count}, from 0 on"
        )
    return jax.nn.one_hot(jnp.asarray(templates), count)


def random(key: Key[Array, ""], layers: tuple[int, ...], count: int) -> Logits:
    """Logits of a hard route drawn uniformly, the null that learned routes are held against."""
    return fixed(jax.random.randint(key, layers, 0, count), count)


def to_logits(weights: Weights, smoothing: float = 1e-3) -> Logits:
    """Logits whose soft route is `(1 - smoothing) weights + smoothing / M`; smoothing gives an unused template a
    gradient. ValueError for weights that are no route's, and a smoothing outside [0, 1]."""
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing={smoothing} is no share of a route: it lies in [0, 1]")
    require_weights(weights)
    return jnp.log((1 - smoothing) * weights + smoothing / weights.shape[-1])


def shares(coefficients: Coefficients) -> Weights:
    """The part of each template in a layer's coefficients, `c_m² / Σ c²`: none negative and of sum 1, as a route's
    entropy and usage want them; equal parts where all coefficients are 0."""
    square = coefficients**2
    total = square.sum(-1, keepdims=True)
    return jnp.where(total > 0, square / jnp.where(total > 0, total, 1), 1 / coefficients.shape[-1])


def entropy(weights: Weights) -> Float[Array, "*layers"]:
    """`H = -Σ_m a_m log a_m`, from 0 for a one-hot route to log M for a uniform one, in nats; NaN for a NaN."""
    absent = weights <= 0
    return -jnp.sum(jnp.where(absent, 0, weights * jnp.log(jnp.where(absent, 1, weights))), axis=-1)


def scaled_entropy(weights: Weights) -> Float[Array, ""]:
    """The mean over tasks and layers of `H / log M`; 0 where there is one template."""
    count = weights.shape[-1]
    return jnp.mean(entropy(weights)) / jnp.log(count) if count > 1 else jnp.zeros(())


def unused(weights: Weights) -> Float[Array, ""]:
    """`1 - H(ā) / log M` of the mean route ā: 0 where all templates are used equally, 1 where one does all the work."""
    count = weights.shape[-1]
    mean = jnp.mean(weights.reshape(-1, count), axis=0)
    return 1 - entropy(mean) / jnp.log(count) if count > 1 else jnp.zeros(())


KINDS = {"linear": linear, "soft": soft, "hard": hard}  # what `ModularNet.route` can be
