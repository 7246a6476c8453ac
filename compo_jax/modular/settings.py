"""The settings of a modular training, and what changes in the course of one of hard routes: three phases."""

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class _Fields(NamedTuple):
    steps: int
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    route_rate: float = 3.0
    relaxation: Literal["soft", "straight_through", "gumbel"] = "soft"
    entropy: float = 0.1
    usage: float = 0.01
    temperature: tuple[float, float] = (1.0, 0.1)
    phases: tuple[float, float] = (0.2, 0.7)
    statistics: Literal["batch", "stored"] = "batch"
    estimate: int = 20


class _Range(NamedTuple):
    """What a setting has to be, in words and as a test."""

    words: str
    holds: Any


def _is_count(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and bool(x >= 1)


def _among(*values: str) -> _Range:
    return _Range(f"not among {', '.join(values)}", lambda x: x in values)


_COUNT = _Range("no whole number from 1 on", _is_count)
_POSITIVE = _Range("no positive number", lambda x: 0 < x < math.inf)
_NOT_NEGATIVE = _Range("no number from 0 on", lambda x: 0 <= x < math.inf)
_RANGES = {
    "steps": _COUNT,
    "batch": _COUNT,
    "learning_rate": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "warmup": _Range("no part of the steps, from 0 to below 1", lambda x: 0 <= x < 1),
    "clip": _Range("no positive number (infinity clips nothing)", lambda x: x > 0),
    "route_rate": _NOT_NEGATIVE,
    "relaxation": _among("soft", "straight_through", "gumbel"),
    "entropy": _NOT_NEGATIVE,
    "usage": _NOT_NEGATIVE,
    "temperature": _Range("no two positive numbers", lambda x: len(x) == 2 and all(0 < t < math.inf for t in x)),
    "phases": _Range("no two parts of the steps in order, 0 to 1", lambda x: len(x) == 2 and 0 <= x[0] <= x[1] <= 1),
    "statistics": _among("batch", "stored"),
    "estimate": _COUNT,
}


class Settings(_Fields):
    """How routes, templates and heads are trained together; ValueError that names all values out of their range.

    Attributes:
      steps, batch: of the whole training; images of each task in a step.
      learning_rate, weight_decay, warmup, clip: AdamW's rate at its highest and decay, the part of the steps that it
        rises over (a cosine to 0 follows), the largest norm of the gradient.
      route_rate: the learning rate of routes, in multiples of `learning_rate`: the product about 0.01 for coefficients
        and 0.03 for logits. They have no weight decay.
      statistics: `batch`, each batch is normalised by its own statistics; `stored`, by those in the variables.
      estimate: batches that the statistics are taken over when training is done.

    Of hard routes only:
      relaxation: what stands for them while they are learned.
      entropy: β at its highest, the weight of the mean of H(a) / log M, which pushes routes to one-hot.
      usage: γ, the weight of 1 - H(ā) / log M, which has all modules used.
      temperature: τ in the first phase, and at the end of the second.
      phases: the parts of the steps after which the second and the third phase begin. In the second τ falls
        geometrically and β rises linearly; in the third the route is fixed to its argmax. (0, 0) trains on the hard
        route of the logits as given.
    """

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any):
        made = super().__new__(cls, *args, **kwargs)
        problems = []
        for name, value in zip(cls._fields, made, strict=True):
            try:
                sound = _RANGES[name].holds(value)
            except TypeError:  # another type, which has no order
                sound = False
            if not sound:
                problems.append(f"{name}={value!r} is {_RANGES[name].words}")
        if problems:
            raise ValueError(f"a modular training can't have these settings: {'; '.join(problems)}")
        return made

    @classmethod
    def _make(cls, values):  # what `_replace` makes is looked at too
        return cls(*values)

    @property
    def freeze(self) -> int:
        """The first step of the third phase, of hard routes."""
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


def learned_temperature(settings: Settings) -> Float[Array, ""]:
    """τ at the last step that hard routes are learned in; that of the first step, where they are never learned."""
    return phase(settings, max(settings.freeze - 1, 0)).temperature
