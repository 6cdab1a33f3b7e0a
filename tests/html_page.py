"""What tests ask of a page."""

import html.parser


class Page(html.parser.HTMLParser):
    """The elements, attributes and text of a page whose tags are balanced."""

    _VOID = ("meta", "img", "link", "br", "input", "hr")

    def __init__(self, source: str) -> None:
        super().__init__()
        self._open: list[str] = []
        self._words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self._VOID or self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self._words += data.split()

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    @property
    def attributes(self) -> list[tuple[str, str, str | None]]:
        """Tag, name and value of each attribute."""
        return [(tag, *attribute) for tag, attributes in self.elements for attribute in attributes.items()]

    @property
    def text(self) -> str:
        return " ".join(self._words)

    def count(self, tag: str, of_class: str) -> int:
        return sum(t == tag and a.get("class", "") == of_class for t, a in self.elements)
