"""Written pages and printed tables, taken apart; every element of a page must be closed."""

import io
from html.parser import HTMLParser

from rich.box import HEAVY_HEAD
from rich.console import Console


class Page(HTMLParser):
    """Tags, attributes, text of the body, table rows, and whether every element is closed in order."""

    VOID = {"meta", "br"}

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self.open, self.rows = [], [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += f" {data}"
        if {"td", "th"} & set(self.open):
            self.rows[-1].append(data)


class PlainPage(Page):
    """Its cells with plain spaces."""

    def __init__(self, path):
        super().__init__(path)
        self.rows = [[cell.replace("\u00a0", " ") for cell in row] for row in self.rows]


def printed(table):
    """The cells of a table for the terminal, and all that is printed, 80 characters wide."""
    table.box = HEAVY_HEAD  # as wide as its own, and shows where a cell ends
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return [[c.strip() for c in line.split("│")[1:-1]] for line in lines if "│" in line], console.file.getvalue()
