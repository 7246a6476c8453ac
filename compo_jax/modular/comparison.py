"""How methods compare: differences on the same pairs with their standard error, rank correlations, means of what is
known."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Paired(NamedTuple):
    """How one method differs from another on the same pairs; pairs with a nan are left out.

    Attributes:
      mean: of the differences; nan for no pair.
      error: standard error of the mean, pairs taken as independent; nan for fewer than two.
      won, tied, pairs: numbers of pairs.
    """

    mean: float
    error: float
    won: int
    tied: int
    pairs: int


def paired(values: Float[np.ndarray, " pairs"], reference: Float[np.ndarray, " pairs"]) -> Paired:
    """The differences `values - reference`."""
    difference = (values - reference)[np.isfinite(values - reference)]
    count = len(difference)
    error = float(np.std(difference, ddof=1) / np.sqrt(count)) if count > 1 else np.nan
    mean = float(np.mean(difference)) if count else np.nan
    return Paired(mean, error, int((difference > 0).sum()), int((difference == 0).sum()), count)


def mean_known(values: Float[np.ndarray, "..."], axis: int | tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """The mean of what isn't nan; nan where all is."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(axis), known.sum(axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def rank_correlation(
    values: Float[np.ndarray, " methods *places"], others: Float[np.ndarray, " methods *places"]
) -> Float[np.ndarray, "*places"]:
    """Spearman's rank correlation over methods at each place; nan for fewer than three that are known, and where all
    are the same."""
    from scipy.stats import spearmanr

    correlation = np.full(values.shape[1:], np.nan)
    for place in np.ndindex(correlation.shape):
        pairs = np.stack([values[:, *place], others[:, *place]], axis=1)
        pairs = pairs[np.isfinite(pairs).all(1)]
        if len(pairs) > 2 and (np.ptp(pairs, axis=0) > 0).all():
            correlation[place] = spearmanr(*pairs.T).statistic
    return correlation
