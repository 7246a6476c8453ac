"""Class-incremental metrics of an accuracy matrix `A[t, s]`: accuracy on task s after task t, nan for s > t.

Two conventions are in use, which agree after the last task where all tasks have as many test images: the mean over
tasks (FA; Porrello et al., 2025, and most work on rehearsal), and the accuracy over all test images (A_last and Ā;
Rebuffi et al., 2017, and most work on pre-trained models). Compare numbers of one convention only.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def final_accuracy(matrix: Float[np.ndarray, "tasks tasks"]) -> float:
    """FA: the mean over tasks of the accuracy after the last one (Lopez-Paz and Ranzato, 2017, equation 2)."""
    return float(np.mean(matrix[-1]))


def final_forgetting(matrix: Float[np.ndarray, "tasks tasks"]) -> float:
    """FF: the mean over all tasks but the last of their best accuracy before the end, less the one at the end
    (Chaudhry et al., 2018, equation 3)."""
    if len(matrix) < 2:
        return 0.0
    return float(np.mean(np.nanmax(matrix[:-1, :-1], axis=0) - matrix[-1, :-1]))


def accuracy_so_far(matrix: Float[np.ndarray, "tasks tasks"]) -> Float[np.ndarray, " tasks"]:
    """The mean accuracy over the tasks seen, after each task."""
    return np.nanmean(matrix, axis=1)


def image_accuracy(
    matrix: Float[np.ndarray, "tasks tasks"], tested: Sequence[int] | Int[np.ndarray, " tasks"]
) -> Float[np.ndarray, " tasks"]:
    """A_t: the accuracy over all test images of the tasks seen, after each task; nan where one of them is.

    Args:
      tested: test images of each task.
    """
    images = np.asarray(tested, float)
    return np.array([matrix[t, : t + 1] @ images[: t + 1] / images[: t + 1].sum() for t in range(len(matrix))])


def last_accuracy(matrix: Float[np.ndarray, "tasks tasks"], tested: Sequence[int] | Int[np.ndarray, " tasks"]) -> float:
    """A_last: `image_accuracy` after the last task."""
    return float(image_accuracy(matrix, tested)[-1])


def average_accuracy(
    matrix: Float[np.ndarray, "tasks tasks"], tested: Sequence[int] | Int[np.ndarray, " tasks"]
) -> float:
    """Ā: the mean over steps of `image_accuracy`, the average incremental accuracy (Rebuffi et al., 2017, section 4);
    nan where something wasn't tested after every task."""
    return float(np.mean(image_accuracy(matrix, tested)))
