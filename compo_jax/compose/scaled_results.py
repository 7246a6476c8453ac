"""What sums of modules reached over their coefficient, and negated modules, as types for `train.write_result`."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Sweep(NamedTuple):
    """Accuracies in [0, 1] on some images, the prediction among the task's own classes.

    Attributes:
      added: `[c, s]`, on task s, of the base plus coefficient c of all modules.
      negated: `[c, t, s]`, on task s, of the base less coefficient c of the module of task t.
    """

    added: Float[np.ndarray, "coefficients tasks"]
    negated: Float[np.ndarray, "coefficients tasks tasks"]

    def target(self) -> Float[np.ndarray, " coefficients"]:
        """The mean over tasks, each by its negated module."""
        return np.diagonal(self.negated, axis1=1, axis2=2).mean(axis=-1)

    def control(self) -> Float[np.ndarray, " coefficients"]:
        """The mean over the other tasks, by the negated modules."""
        return self.negated[:, ~np.eye(self.negated.shape[-1], dtype=bool)].mean(axis=-1)


class Scaled(NamedTuple):
    """Sums and negations over the coefficient, from 0, which is the base, to 1.

    Attributes:
      validation: on training images that were left out of training, which coefficients are chosen by.
      test: on test images.
    """

    coefficients: Float[np.ndarray, " coefficients"]
    validation: Sweep
    test: Sweep

    def best(self) -> int:
        """Which coefficient of all modules does best on validation images."""
        return int(np.argmax(self.validation.added.mean(axis=-1)))

    def forgetting(self, kept: float = 0.95) -> int:
        """Which coefficient forgets most on validation images while the other tasks keep this part of the base's
        accuracy (Ilharco et al., 2023, arXiv 2212.04089)."""
        control = self.validation.control()
        return int(np.argmin(np.where(control >= kept * control[0], self.validation.target(), np.inf)))
