"""Class-incremental metrics of an accuracy matrix `A[t, s]`: accuracy on task s after task t, nan for s > t."""

import numpy as np
from jaxtyping import Float


def final_accuracy(matrix: Float[np.ndarray, "tasks tasks"]) -> float:
    """FA: the mean over tasks of the accuracy after the last one."""
    return float(np.mean(matrix[-1]))


def final_forgetting(matrix: Float[np.ndarray, "tasks tasks"]) -> float:
    """FF: the mean over all tasks but the last of their best accuracy before the end, less the one at the end."""
    if len(matrix) < 2:
        return 0.0
    return float(np.mean(np.nanmax(matrix[:-1, :-1], axis=0) - matrix[-1, :-1]))


def accuracy_so_far(matrix: Float[np.ndarray, "tasks tasks"]) -> Float[np.ndarray, " tasks"]:
    """The mean accuracy over the tasks seen, after each task."""
    return np.nanmean(matrix, axis=1)
