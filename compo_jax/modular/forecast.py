"""One layer of a trained route led by and by to other templates: the true loss, and what its curvature forecasts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from compo_jax.data import Split
from compo_jax.modular import routes
from compo_jax.modular.bridge import route_landscape
from compo_jax.modular.edit import take_tasks
from compo_jax.modular.losses import Prepare
from compo_jax.modular.net import Network


class Rerouting(NamedTuple):
    """The loss (nats) of one task as the weights of one layer go to a single template, each in turn.

    Attributes:
      template: that has the largest weight there.
      amounts: parts of the way.
      loss: of the trained route.
      true, forecast: with the weights `amounts` of the way towards each template (of the coefficients' norm).
      error: median over the other templates of |forecast - true| / |true - loss|.
    """

    task: int
    layer: int
    template: int
    images: int
    loss: float
    amounts: Float[np.ndarray, " amounts"]
    true: Float[np.ndarray, "templates amounts"]
    forecast: Float[np.ndarray, "templates amounts"]
    error: Float[np.ndarray, " amounts"]


def rerouting(
    network: Network,
    prepare: Prepare,
    split: Split,
    task: int,
    layer: int,
    amounts: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0),
) -> Rerouting:
    """Of a network with two templates or more, on all images of the split as one batch; see `route_landscape`."""
    if network.net.groups > 1:
        raise ValueError("a layer is led to single templates as a whole: its coefficients have one group of channels")
    one, taken = take_tasks(network, [task])
    images, labels = prepare(split.images(np.arange(len(split)))), jnp.asarray(split.labels)
    landscape = route_landscape(network, task, layer, images, labels)
    whole = routes.KINDS[one.route](taken["params"]["route"])

    @jax.jit
    def loss(weights):
        logits = one.apply(taken, images[None], lambda _: whole.at[0, layer].set(weights))[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    start = whole[0, layer]
    corners = jnp.eye(one.templates) * (jnp.linalg.norm(start) if one.route == "linear" else 1.0)
    moved = start + jnp.asarray(amounts)[:, None] * (corners[:, None] - start)
    true = np.array([[float(loss(weights)) for weights in row] for row in moved])
    forecast = np.array([[float(landscape.predict(weights - start)) for weights in row] for row in moved])
    template, trained = int(start.argmax()), float(loss(start))
    others = np.arange(one.templates) != template
    error = np.median(np.abs(forecast - true)[others] / np.abs(true - trained)[others], axis=0)
    return Rerouting(task, layer, template, len(split), trained, np.array(amounts), true, forecast, error)
