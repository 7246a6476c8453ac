"""What a method's routes say, all of it beside routes drawn at random."""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Key

from compo_jax.modular import analysis


class RouteNumbers(NamedTuple):
    """Of the routes of several tasks.

    Attributes:
      distance, nearest: mean and least of the distances between two tasks; nan for one task.
      similarity: of layers, the mean over tasks.
      usage: of the templates, the most used first.
      dead: number of templates whose weight is the largest nowhere.
    """

    distance: Float[np.ndarray, ""]
    nearest: Float[np.ndarray, ""]
    similarity: Float[np.ndarray, "layers layers"]
    usage: Float[np.ndarray, " templates"]
    dead: Float[np.ndarray, ""]


class BesideRandom(NamedTuple):
    """Trained routes beside random ones; the fields of `analysis.Null`.

    Attributes:
      mean, deviation: of the random ones; standard deviation of single draws.
      above: the part of the draws that is at least as large as the value.
      draws: how many.
    """

    value: RouteNumbers
    mean: RouteNumbers
    deviation: RouteNumbers
    above: RouteNumbers
    draws: int


def route_numbers(weights: analysis.Weights, *, linear: bool = False) -> RouteNumbers:
    """The numbers of routes (tasks, layers, templates); `linear` as in `analysis`."""
    pairs = analysis.task_distances(weights, linear=linear)[np.triu_indices(len(weights), 1)]
    return RouteNumbers(
        np.mean(pairs) if len(pairs) else np.nan,
        np.min(pairs) if len(pairs) else np.nan,
        analysis.layer_similarity(weights, linear=linear).mean(0),
        np.sort(analysis.usage(weights, linear=linear))[::-1],
        np.float64(len(analysis.dead(weights, linear=linear))),
    )


def beside_random(
    weights: analysis.Weights, key: Key[jax.Array, ""], draws: int = 200, *, linear: bool = False
) -> BesideRandom:
    """The numbers of routes beside those of as many drawn at random (see `analysis.against_random`), two draws or
    more. Of coefficients distances are held against independent directions, the rest against rotated ones."""
    numbers = partial(route_numbers, linear=linear)
    null = analysis.against_random(numbers, weights, key, draws, linear=linear)
    if linear:
        rotated = analysis.against_random(numbers, weights, key, draws, linear=True, rotated=True)
        pairs = zip(null, rotated, strict=True)
        null = [turned._replace(distance=free.distance, nearest=free.nearest) for free, turned in pairs]
    return BesideRandom(*null, draws)
