"""What a second-order expansion around the modules' average expects of merged models, and what they really reach."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from compo_jax import compose, curvature, tree
from compo_jax.compose.rule_results import Expected, Weightings
from compo_jax.tree import Tree

EVEN = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # sums of the same weight for all modules: 0 is the base, 1 the average
RANDOM = 8  # weightings that sum to one


class Expectation(NamedTuple):
    """`of(params)` is what the curvature's images tell of a merged model.

    Attributes:
      forecast: of the loss of all tasks on `batches`, compiled, on the part of the parameters that `part` takes.
      base: parameters.
      average: that part of the modules' average.
      unit: distance between the two.
    """

    forecast: Callable[..., curvature.Forecast]
    batches: list[tuple]
    part: Callable[[Tree], Tree]
    base: Tree
    average: Tree
    unit: float

    def of(self, params: Tree) -> Expected:
        made = self.forecast(self.average, self.part(params), batches=self.batches)
        distance = _distance(self.part(params), self.average) / self.unit
        return Expected(np.array(float(made.forecast)), np.array(float(made.loss)), np.array(distance))


def expectation(loss, batches: list[tuple], part: Callable[[Tree], Tree], base: Tree, deltas) -> Expectation:
    """Of models that are merged from these modules."""
    forecast = jax.jit(partial(curvature.forecast, loss))
    average = part(compose.compose(base, deltas))
    return Expectation(forecast, batches, part, base, average, _distance(part(base), average))


def _distance(one: Tree, other: Tree) -> float:
    step = tree.add(one, other, -1.0)
    return float(np.sqrt(tree.dot(step, step)))


def weights_to_test(tasks: int, seed: int) -> Float[np.ndarray, "models tasks"]:
    """The same weight for all, from the base to the sum, and random weights that sum to one."""
    sums = np.array([*(x for x in EVEN if x < tasks), float(tasks)])
    drawn = np.random.default_rng(seed).dirichlet(np.ones(tasks), RANDOM)
    return np.concatenate([np.tile(sums[:, None] / tasks, (1, tasks)), drawn])


def tested(
    expected: Expectation, deltas: Sequence[Tree], weights: Float[np.ndarray, "models tasks"], test: Callable
) -> Weightings:
    """Each composition, with what is expected of it and its accuracy by `test(params)`."""
    models = (compose.compose(expected.base, deltas, row) for row in weights)  # one in memory
    known, within = zip(*((expected.of(params), test(params)) for params in models), strict=True)
    return Weightings(weights, Expected(*map(np.array, zip(*known, strict=True))), np.array(within))
