"""Reads a page that was written, for tests of what it holds."""

from collections import Counter
from html.parser import HTMLParser

HOSTILE = "</pre><script>alert(1)</script>\"><img src=x onerror='alert(1)'> {{ 7 * 7 }} [bold]&lt;"


class Page(HTMLParser):
    """Counts the elements of a page and keeps its text and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        self.attributes.extend((tag, name, value) for name, value in attrs)

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def requests(self) -> list[str]:
        """Attributes and elements through which a page would load or run something."""
        names = [name for _, name, _ in self.attributes if name in ("src", "href") or name.startswith("on")]
        return names + sorted({"script", "link", "img", "iframe"} & self.elements.keys())
