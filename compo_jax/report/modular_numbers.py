"""What the reports of modular networks share: checks of their metrics, paired differences, and both as text."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from compo_jax.report.numbers import ABSENT, Metrics, decimal, fitting, require, signed

_SHARED = ("name", "data", "seeds", "seconds", "net", "methods")
_NET = ("layers", "templates", "width", "patch", "block", "bn", "size")


class Paired(NamedTuple):
    """How one method differs from another on the same pairs, as fractions; pairs that aren't known are left out.

    Attributes:
      mean: of the differences.
      error: standard error of the mean, pairs taken as independent; nan for fewer than two.
      won, tied, known: numbers of pairs.
    """

    mean: float
    error: float
    won: int
    tied: int
    known: int


def check_modular(metrics: Metrics, needed: Sequence[str]) -> None:
    """Raises KeyError for what the metrics of a modular experiment lack, ValueError where they have nothing to show."""
    require(metrics, (*_SHARED, *needed))
    require(metrics["net"], _NET, "net.")
    if not metrics["seeds"] or not metrics["methods"]:
        raise ValueError(
            f"the metrics have {len(metrics['seeds'])} seeds and {len(metrics['methods'])} methods and need at least "
            "one of each: the run may not have finished"
        )


def templates_of(values: Any, layers: int, templates: int, where: str) -> Int[np.ndarray, " layers"]:
    """A hard route; ValueError where it doesn't name one of the templates for every layer."""
    route = fitting(values, (layers,), where, "a template for each layer")
    if not np.isin(route, np.arange(templates)).all():
        raise ValueError(
            f"{where} in the metrics is {list(values)} and must hold whole numbers from 0 to {templates - 1}, one of "
            f"{templates} templates for each layer: the route may be of another network"
        )
    return route.astype(int)


def by_size(budgets: Sequence[int | None]) -> list[int]:
    """The places of label budgets from the smallest to the largest; None is all labels."""
    return sorted(range(len(budgets)), key=lambda i: (budgets[i] is None, budgets[i] or 0))


def paired(own: Float[np.ndarray, " pairs"], reference: Float[np.ndarray, " pairs"]) -> Paired:
    """The differences `own - reference`."""
    difference = (own - reference)[np.isfinite(own - reference)]
    known = len(difference)
    error = float(np.std(difference, ddof=1)) / np.sqrt(known) if known > 1 else np.nan
    mean = float(np.mean(difference)) if known else np.nan
    return Paired(mean, float(error), int((difference > 0).sum()), int((difference == 0).sum()), known)


def paired_text(pair: Paired) -> str:
    """The mean difference in points ± its standard error, then the pairs won, as "+1.2 ± 0.4 (5/6)"."""
    if not pair.known:
        return ABSENT
    error = "" if np.isnan(pair.error) else f"\u00a0±\u00a0{decimal(100 * pair.error)}"
    tied = f",\u00a0{pair.tied}\u00a0tied" if pair.tied else ""
    return f"{signed(pair.mean)}{error} ({pair.won}/{pair.known}{tied})"


def millions(count: float) -> str:
    """A number in millions as text, a dash for nan."""
    return decimal(count / 1e6, 1 if count >= 1e7 else 2)


def net_text(net: Mapping[str, Any]) -> str:
    """The network in a few words, without its depth."""
    return (
        f"{net['block']} blocks of {net['width']} channels, normalised by {net['bn']}, on images of "
        f"{net['size']}\u00a0px in patches of {net['patch']}"
    )


def several(seeds: Sequence[int]) -> str:
    """What the numbers of a page are, where there is more than one seed."""
    return f" Numbers are mean ± standard deviation over {len(seeds)} seeds." if len(seeds) > 1 else ""
