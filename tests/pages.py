"""A written page, taken apart: its tags, attributes, text and tables; every element must be closed."""

from html.parser import HTMLParser


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
