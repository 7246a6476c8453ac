"""What a method's hard routes say, all of it beside routes drawn at random."""

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
      dead: number of templates that no route goes through.
    """

    distance: Float[np.ndarray, ""]
    nearest: Float[np.ndarray, ""]
    similarity: Float[np.ndarray, "layers layers"]
    usage: Float[np.ndarray, " templates"]
    dead: Float[np.ndarray, ""]


class BesideRandom(NamedTuple):
    """Trained routes beside random hard ones; the fields of `analysis.Null`.

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


def route_numbers(weights: analysis.Weights) -> RouteNumbers:
    """The numbers of routes (tasks, layers, templates)."""
    pairs = analysis.task_distances(weights)[np.triu_indices(len(weights), 1)]
    return RouteNumbers(
        np.mean(pairs) if len(pairs) else np.nan,
        np.min(pairs) if len(pairs) else np.nan,
        analysis.layer_similarity(weights).mean(0),
        np.sort(analysis.usage(weights))[::-1],
        np.float64(len(analysis.dead(weights))),
    )


def beside_random(weights: analysis.Weights, key: Key[jax.Array, ""], draws: int = 200) -> BesideRandom:
    """The numbers of hard routes beside those of as many drawn uniformly, two draws or more."""
    return BesideRandom(*analysis.against_random(route_numbers, weights, key, draws), draws)
