"""Reads a page that was written, for tests of what it holds."""

import base64
import hashlib
import json
from collections import Counter
from html.parser import HTMLParser
from typing import Any

HOSTILE = "</pre><script>alert(1)</script>\"><img src=x onerror='alert(1)'> {{ 7 * 7 }} [bold]&lt;"


class Page(HTMLParser):
    """Counts the elements of a page and keeps its text and attributes, and apart from them its styles and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.code: dict[str, list[str]] = {"style": [], "script": []}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes.extend((tag, name, value) for name, value in attrs)

    def handle_data(self, data: str) -> None:
        # The parser reads the inside of styles and scripts as one text without markup.
        self.code.get(self.cdata_elem or "", self.text).append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def requests(self) -> list[str]:
        """Attributes and elements through which a page would load something or run what its policy does not name."""
        addresses = [value or "" for _, name, value in self.attributes if name in ("src", "href")]
        handlers = [name for _, name, _ in self.attributes if name.startswith("on")]
        elements = sorted({"link", "img", "iframe", "object", "embed", "base"} & self.elements.keys())
        return [address for address in addresses if not address.startswith("#")] + handlers + elements

    @property
    def rules(self) -> dict[str, str]:
        """The directives of its content security policy."""
        policy = next(value or "" for tag, name, value in self.attributes if value and value.startswith("default-src"))
        return dict((*rule.strip().split(" ", 1), "")[:2] for rule in policy.split(";"))

    @property
    def data(self) -> Any:
        """What the page's script reads."""
        return json.loads(self.code["script"][0])


def digest(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
