"""HTML whose text is escaped unless it was made here: nothing that a file says becomes markup."""

import html
from collections.abc import Iterable, Sequence

_VOID = ("img",)  # has neither content nor an end tag


class Html(str):
    """Text that is markup already."""


def element(tag: str, *content: str | None, **attributes: str | None) -> Html:
    """<tag a="…">content</tag>; plain strings are escaped, None is left out, `cls` is `class`, `data_x` is `data-x`."""
    inside = "".join(part if isinstance(part, Html) else html.escape(part) for part in content if part is not None)
    given = "".join(
        f' {"class" if name == "cls" else name.replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{given}>" if tag in _VOID else f"<{tag}{given}>{inside}</{tag}>")


def joined(parts: Iterable[str | None]) -> Html:
    """One after the other, plain strings escaped."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts if part is not None))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], **attributes: str | None) -> Html:
    """The first cell of a row is its heading. Scrolls sideways where it has to."""
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head))) if any(head) else None
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    )
    return element("div", element("table", top, element("tbody", *body), **attributes), cls="scroll")


def items(texts: Iterable[str], **attributes: str | None) -> Html:
    return element("ul", *(element("li", text) for text in texts), **attributes)
