"""The settings of a modular training, and what changes in its course: three phases."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Settings(NamedTuple):
    """How routes, templates and heads are trained together.

    Attributes:
      steps, batch: of the whole training; images of each task in a step.
      learning_rate, weight_decay, warmup, clip: AdamW's rate at its highest and decay, the part of the steps that it
        rises over (a cosine to 0 follows), the largest norm of the gradient.
      route: the route function while routes are learned.
      route_rate: the logits' learning rate, in multiples of `learning_rate`; they have no weight decay.
      entropy: β at its highest, the weight of the mean of H(a) / log M, which pushes routes to one-hot.
      usage: γ, the weight of 1 - H(ā) / log M, which has all modules used.
      temperature: τ in the first phase, and at the end of the second.
      phases: the parts of the steps after which the second and the third phase begin. In the second τ falls
        geometrically and β rises linearly; in the third the route is fixed to its argmax. (0, 0) trains on the hard
        route of the logits as given, (1, 1) on soft routes to the end.
      statistics: `batch`, each batch is normalised by its own statistics; `stored`, by those in the variables.
      estimate: batches that the statistics are taken over when training is done.
    """

    steps: int
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    route: Literal["soft", "straight_through", "gumbel"] = "soft"
    route_rate: float = 10.0
    entropy: float = 0.1
    usage: float = 0.01
    temperature: tuple[float, float] = (1.0, 0.1)
    phases: tuple[float, float] = (0.2, 0.7)
    statistics: Literal["batch", "stored"] = "batch"
    estimate: int = 20

    @property
    def freeze(self) -> int:
        """The first step of the third phase."""
        return round(self.phases[1] * self.steps)


class Phase(NamedTuple):
    """What holds at one step: τ, β, γ, and whether the route is fixed to its argmax."""

    temperature: Float[Array, ""]
    entropy: Float[Array, ""]
    usage: Float[Array, ""]
    fixed: Bool[Array, ""]


def phase(settings: Settings, step: Array | int) -> Phase:
    """The phase of a step. In the third the penalties are 0: nothing of theirs can change."""
    begin, end = settings.phases
    first, last = settings.temperature
    done = jnp.asarray(step, jnp.float32) / settings.steps
    ramp = jnp.clip((done - begin) / max(end - begin, 1e-9), 0, 1)
    fixed = jnp.asarray(step) >= settings.freeze
    return Phase(
        first * (last / first) ** ramp,
        jnp.where(fixed, 0.0, settings.entropy * ramp),
        jnp.where(fixed, 0.0, settings.usage),
        fixed,
    )
