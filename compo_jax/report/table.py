"""One table for the terminal and for the page, and which of its numbers may be called the best."""

from collections.abc import Sequence
from textwrap import fill
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich import table as terminal
from rich.box import SIMPLE_HEAD
from rich.text import Text

from compo_jax.report.text import counted, spread, with_error

Numbers = Sequence[float | None] | Float[np.ndarray, " values"]


class Cell(NamedTuple):
    """A text, with or without emphasis."""

    text: str
    strong: bool = False


class Table(NamedTuple):
    """Rows of text, the same on the terminal (`rich`) and on a page.

    Attributes:
      title: of the whole.
      headings: of the columns; the first is that of the rows' names.
      rows: each a name and its cells, as plain text where there is no emphasis.
      notes: sentences below the table.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    notes: Sequence[str] = ()

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, with every cell as a `Cell`."""
        return [[one if isinstance(one, Cell) else Cell(one) for one in row] for row in self.rows]

    def rich(self) -> terminal.Table:
        """For the terminal: headings in lines as narrow as their columns, a number above its error where it must be;
        a name is broken between its words alone."""
        caption = Text("\n".join(self.notes)) if self.notes else None
        drawn = terminal.Table(title=Text(self.title), caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        rows = [
            [Text(one.text.replace("\u00a0±\u00a0", " ±"), "bold" * one.strong) for one in row] for row in self.cells
        ]
        for i, heading in enumerate(self.headings):
            width = max(map(len, [*heading.split(), *(row[i].plain for row in rows)]), default=1)
            justify, a_word = "right" if i else "left", not i and not any(" " in row[0].plain for row in rows)
            drawn.add_column(Text(fill(heading, width)), justify=justify, overflow="fold", no_wrap=a_word)
        for row in rows:
            drawn.add_row(*row)
        return drawn


def binomial_error(accuracy: float | np.ndarray, images: int | np.integer | np.ndarray) -> np.ndarray:
    """The standard error of an accuracy in [0, 1] on so many test images: `sqrt(a (1 - a) / n)`.

    Of an accuracy of 0 or 1 it is taken half an image away from there, for a few images prove nothing.
    """
    half = 0.5 / np.asarray(images)
    inside = np.clip(accuracy, half, 1 - half)
    return np.asarray(np.sqrt(inside * (1 - inside) / images))


def mean_error(errors: Float[np.ndarray, "... values"]) -> np.ndarray:
    """The standard error of the mean of values with these (independent) errors; nan among them is left out."""
    return np.asarray(np.sqrt(np.nansum(errors**2, axis=-1)) / np.isfinite(errors).sum(axis=-1))


def standard_error(values: Float[np.ndarray, " runs"]) -> float:
    """Of the mean over runs; nan of a single one."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


class Score(NamedTuple):
    """A fraction that each run reached, and the standard error of its mean over runs; see `score`."""

    runs: Float[np.ndarray, " runs"]
    error: float

    @property
    def mean(self) -> float:
        """Over runs."""
        return float(np.mean(self.runs))

    def text(self) -> str:
        """In %: mean ± sample standard deviation over runs, of a single run ± its standard error."""
        return spread(100 * self.runs) if len(self.runs) > 1 else with_error(100 * self.mean, 100 * self.error)


def score(runs: Float[np.ndarray, " runs"], images: int | None = None) -> Score:
    """The accuracy of each run in [0, 1], with its error from the runs, or, of one, from the number of test images."""
    if len(runs) > 1:
        return Score(runs, standard_error(runs))
    return Score(runs, float("nan") if images is None else float(binomial_error(runs[0], images)))


def clear_best(values: Numbers, errors: Numbers, *, largest: bool = True) -> int | None:
    """The place of the best value, where it leads each other by more than two standard errors of the difference.

    None where nothing leads so clearly, where a value stands alone, and where an error isn't there (None, nan): a
    number without an error bar is no winner.

    Args:
      errors: standard errors of the values.
      largest: whether the best is the largest.
    """
    number, error = np.array(values, float), np.array(errors, float)
    finite = np.flatnonzero(np.isfinite(number))
    if len(finite) < 2:
        return None
    number = number if largest else -number
    best = finite[np.argmax(number[finite])]
    others = finite[finite != best]
    leads = number[best] - number[others] > 2 * np.hypot(error[best], error[others])
    return int(best) if leads.all() else None


def column(texts: Sequence[str], values: Numbers, errors: Numbers, *, largest: bool = True) -> list[Cell]:
    """The texts as cells, with emphasis on the clear best (see `clear_best`), if there is one."""
    best = clear_best(values, errors, largest=largest)
    return [Cell(text, i == best) for i, text in enumerate(texts)]


def score_column(scores: Sequence[Score], *, largest: bool = True) -> list[Cell]:
    """Scores as cells, with emphasis on the clear best, if there is one."""
    texts, means, errors = zip(*((one.text(), one.mean, one.error) for one in scores), strict=True)
    return column(texts, means, errors, largest=largest)


BOLD = "Bold leads every other number of its column by more than two standard errors."


def run_facts(seeds: Sequence[int], tested: Sequence[Sequence[int]]) -> dict[str, str]:
    """What a page says of its seeds, its test sets and its error bars, as `Score.text` and `charts.dots` show them.

    Args:
      tested: for each seed the number of test images of each task.
    """
    each = sorted({int(count) for counts in tested for count in counts})
    images = f"{each[0]:,}" if len(each) == 1 else f"{each[0]:,} to {each[-1]:,}"
    several = len(seeds) > 1
    return {
        "seeds" if several else "seed": ", ".join(map(str, seeds)),
        "tested on": f"{images} images of each task, {sum(tested[0]):,} in all",
        "error bars": f"± in tables is the sample standard deviation over {counted(len(seeds), 'run')}, in figures the "
        "standard error of their mean"
        if several
        else "± one standard error, from the size of the test set (binomial); what another seed would change is not "
        "in them",
    }
