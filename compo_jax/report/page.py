"""A page: one HTML file that needs nothing else."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import markupsafe
import matplotlib as mpl
from matplotlib.figure import Figure

from compo_jax.files import local_path
from compo_jax.report.charts import INK
from compo_jax.report.table import Table
from compo_jax.report.text import ABSENT


class Tile(NamedTuple):
    """A number at the top of a page: what it is, the number as text, and its unit."""

    label: str
    text: str
    unit: str = ""


class Block(NamedTuple):
    """A figure, what to look for in it, and its numbers to unfold."""

    figure: Figure
    caption: str
    tables: Sequence[Table] = ()


class Page(NamedTuple):
    """All that a page says.

    Attributes:
      title: of the page.
      lead: what was done, in a sentence or two.
      facts: seed, settings, size of the test set, what the error bars are, ...: what each is and its text.
      tiles: the numbers to read first.
      tables: the results.
      blocks: the figures; a generator draws one at a time.
    """

    title: str
    lead: str
    facts: Mapping[str, str]
    tiles: Sequence[Tile]
    tables: Sequence[Table]
    blocks: Iterable[Block]


def svg(figure: Figure) -> markupsafe.Markup:
    """A figure as an SVG element: letters as paths, images inside it, `charts.INK` as the text's colour around."""
    file, title = io.StringIO(), figure.get_suptitle()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": title, "svg.image_inline": True}):
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", dpi=150, transparent=True, metadata=none)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    return markupsafe.Markup(drawn.replace("<svg", f'<svg role="img" aria-label="{markupsafe.escape(title)}"', 1))


def write_page(folder: str | os.PathLike, page: Page) -> Path:
    """Writes `folder/report.html` and returns its path; OSError where it can't be written."""
    loader = jinja2.PackageLoader("compo_jax.report", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = svg
    text = environment.get_template("page.html.jinja").render(page._asdict(), ABSENT=ABSENT)
    path = local_path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path
