"""What merge rules reached, as types for `train.write_result` and `train.read_result`."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from compo_jax.compose.scaled_results import Scaled


class Expected(NamedTuple):
    """What training images tell of merged models, before any is tested.

    Attributes:
      forecast: of the loss, to second order around the modules' average.
      loss: the true one, on the same images.
      distance: from the average, in multiples of the average's from the base.
    """

    forecast: Float[np.ndarray, "*models"]
    loss: Float[np.ndarray, "*models"]
    distance: Float[np.ndarray, "*models"]


class Weightings(NamedTuple):
    """Modules composed with weights that no rule chose: first the same weight for all, from the base on over the
    average to the sum, then random ones that sum to one.

    Attributes:
      within: test accuracy on each task, in [0, 1], the prediction among its own classes.
    """

    weights: Float[np.ndarray, "models tasks"]
    expected: Expected
    within: Float[np.ndarray, "models tasks"]

    @property
    def even(self) -> Bool[np.ndarray, " models"]:
        """Which have the same weight for all modules."""
        return np.ptp(self.weights, axis=1) == 0


class MergedPool(NamedTuple):
    """The modules of a pool merged by one rule; accuracies in [0, 1].

    Attributes:
      within, incremental: test accuracy on each task, the prediction among its own classes, and among all; nan among
        all of a rule that makes a model for each task.
      seconds: of the rule alone, compiled.
      memory: of the whole rule as one program, in multiples of the base; None where it wasn't counted.
      warnings: what the rule had to tell.
      options: where they differ from the rule's defaults, as text.
      expected: None of a rule that makes a model for each task.
    """

    within: Float[np.ndarray, " tasks"]
    incremental: Float[np.ndarray, " tasks"]
    seconds: float
    memory: float | None
    warnings: list[str]
    options: dict[str, str]
    expected: Expected | None = None


class PoolMerges(NamedTuple):
    """A pool under every rule.

    Attributes:
      individual: of each module alone, the accuracy on its own task, which is known.
      base: the same of the base without a module.
      curvature_seconds: by kind, what the modules' curvature took; None where it was there already.
      rules: by their names.
      cosines: of the modules' deltas with one another.
      joint: what one module that was trained on all tasks together reaches on each; None where there is none.
      weightings: None where none were tested.
      scaled: of modules of the linearised model, their sums and negations; None for others.
    """

    individual: Float[np.ndarray, " tasks"]
    base: Float[np.ndarray, " tasks"]
    curvature_seconds: dict[str, float | None]
    rules: dict[str, MergedPool]
    cosines: Float[np.ndarray, "tasks tasks"]
    joint: Float[np.ndarray, " tasks"] | None = None
    weightings: Weightings | None = None
    scaled: Scaled | None = None

    def normalised(self, accuracy: Float[np.ndarray, " tasks"]) -> Float[np.ndarray, " tasks"]:
        """An accuracy over that of the module alone, on each task; nan where that gets nothing right."""
        alone = np.where(self.individual > 0, self.individual, np.nan)
        return accuracy / alone


class MergingRun(NamedTuple):
    """One run: its name and seed, its tasks with the number of their test images, and its pools by their methods."""

    run: str
    seed: int
    tasks: list[str]
    tested: list[int]
    pools: dict[str, PoolMerges]


class MergingResults(NamedTuple):
    """Runs that differ in their seed and have the same pools and rules.

    Attributes:
      images: training images of a task, for its module's curvature.
      seconds: that the whole took.
    """

    name: str
    data: str
    backbone: str
    images: int
    runs: list[MergingRun]
    seconds: float
