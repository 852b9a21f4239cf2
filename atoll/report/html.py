"""The report's few building blocks: tables, lists of facts, tiles. What goes in as text comes out escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import count


class Markup(str):
    """HTML that is finished: it is not escaped again."""


Cell = str
"""Text, which is escaped, or Markup, which isn't."""


def marked(text: Cell) -> Markup:
    """The text as HTML; a percent sign stays with its number."""
    return text if isinstance(text, Markup) else Markup(escape(visible(text)).replace(" %", "&nbsp;%"))


def visible(text: str) -> str:
    """The text with its control characters shown as symbols, so that no name hides one.

    >>> visible("a\\nb")
    'a␊b'
    """
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else c for c in text)


def paragraph(text: Cell, style: str = "") -> Markup:
    """`<p>`."""
    return Markup(f'<p class="{style}">{marked(text)}</p>' if style else f"<p>{marked(text)}</p>")


def section(heading: str, *parts: str) -> Markup:
    """`<section>` under its own heading."""
    name = "-".join(heading.lower().split())
    return Markup(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(heading)}</h2>{"".join(parts)}</section>'
    )


def facts(pairs: Iterable[tuple[str, Cell]], style: str = "facts") -> Markup:
    """A list of names and values."""
    rows = "".join(f"<div><dt>{marked(k)}</dt><dd>{marked(v)}</dd></div>" for k, v in pairs)
    return Markup(f'<dl class="{style}">{rows}</dl>')


def figure(plot: str, caption: str = "") -> Markup:
    """A plot with the sentence that says what it shows."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Markup(f"<figure>{plot}{below}</figure>")


def code(text: str) -> Markup:
    """A name of the machine's world."""
    return Markup(f"<code>{escape(visible(text))}</code>")


class Table:
    """Rows as they come; the first column heads its row, the others are numbers unless `texts` has them."""

    def __init__(
        self, caption: str, head: Sequence[Cell], *, texts: Sequence[int] = (), style: str = ""
    ) -> None:
        self._caption, self._head, self._texts, self._style = caption, head, set(texts), style
        self._rows: list[str] = []

    def row(self, *cells: Cell, style: str = "") -> None:
        """Add a row."""
        kind = f' class="{style}"' if style else ""
        first = f'<th scope="row">{marked(cells[0])}</th>'
        others = (self._cell(i, cell) for i, cell in zip(count(1), cells[1:], strict=False))
        self._rows.append(f"<tr{kind}>{first}{''.join(others)}</tr>")

    def _cell(self, column: int, cell: Cell) -> str:
        return (
            f'<td class="text">{marked(cell)}</td>' if column in self._texts else f"<td>{marked(cell)}</td>"
        )

    def remark(self, text: str) -> None:
        """Add a row that is one sentence."""
        self._rows.append(f'<tr class="gap"><td colspan="{len(self._head)}">{escape(text)}</td></tr>')

    def html(self) -> Markup:
        """The table in a box that scrolls by itself, and by keyboard."""
        head = "".join(f'<th scope="col"{self._kind(i)}>{marked(h)}</th>' for i, h in enumerate(self._head))
        return Markup(
            f'<div class="scroll {self._style}" tabindex="0" role="region"'
            f' aria-label="{escape(self._caption)}">'
            f"<table><caption><span>{escape(self._caption)}</span></caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(self._rows)}</tbody></table></div>"
        )

    def _kind(self, column: int) -> str:
        return ' style="text-align:left"' if column in self._texts else ""
