"""What specialising and unlearning reached, as types for `train.write_result` and `train.read_result`."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class PoolSkills(NamedTuple):
    """A pool's test accuracy on each task, in [0, 1], the prediction among all classes.

    Attributes:
      frozen, composed: with no module, and with all.
      specialise, unlearn, subtract: `[t, s]`, on task s, with the module of task t alone, with all others, and with all
        others less its share.
    """

    frozen: Float[np.ndarray, " tasks"]
    composed: Float[np.ndarray, " tasks"]
    specialise: Float[np.ndarray, "tasks tasks"]
    unlearn: Float[np.ndarray, "tasks tasks"]
    subtract: Float[np.ndarray, "tasks tasks"]


class RunSkills(NamedTuple):
    """One run: its name and seed, its tasks with the number of their test images, and its pools by their methods."""

    run: str
    seed: int
    tasks: list[str]
    tested: list[int]
    methods: dict[str, PoolSkills]


class UnlearningResults(NamedTuple):
    """Runs that differ in their seed and have the same methods; `seconds` that the whole took."""

    name: str
    data: str
    backbone: str
    runs: list[RunSkills]
    seconds: float
