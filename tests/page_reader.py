"""A page as its reader gets it: its elements, its text, and what it would fetch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta", "link", "br", "img", "input", "hr"}
_FETCHING = ("src", "href", "srcset", "action", "data", "poster", "background")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        """Those of a tag in it, in order."""
        return [found for child in self.children for found in ([child] if child.tag == tag else []) + child.all(tag)]

    def whole_text(self) -> str:
        return self.text if self.tag == "#text" else "".join(child.whole_text() for child in self.children)

    def rows(self) -> list[list[str]]:
        """Of a table."""
        return [[cell.whole_text() for cell in row.children if cell.tag in ("th", "td")] for row in self.all("tr")]


class Page(HTMLParser):
    """Raises AssertionError where an element is not closed, or closed twice."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("#page", {})
        self._open = [self.root]
        self.feed(html)
        self.close()
        assert self._open == [self.root], f"not closed: {[element.tag for element in self._open[1:]]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        assert len(element.attributes) == len(attrs), f"an attribute twice in {tag}"
        self._open[-1].children.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> ends <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(Element("#text", {}, data))

    def every(self) -> list[Element]:
        def below(element: Element) -> list[Element]:
            return [element, *(found for child in element.children for found in below(child))]

        return [element for element in below(self.root) if element.tag != "#text"]

    def section(self, name: str) -> Element:
        (found,) = (e for e in self.root.all("section") if e.attributes.get("aria-labelledby") == name)
        return found

    def charts(self) -> dict[str, Any]:
        """Name → what the page's script draws."""
        (data,) = (e for e in self.root.all("script") if e.attributes.get("id") == "chart-data")
        return {chart["name"]: chart for chart in json.loads(data.whole_text())}

    def fetched(self) -> list[str]:
        """What it refers to outside of itself."""
        found = [e.attributes[name] or "" for e in self.every() for name in _FETCHING if name in e.attributes]
        return [address for address in found if not address.startswith(("data:", "#"))]
