"""Tables of changes in words: aligned for a terminal and a CI log, or for a pull-request comment."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Final

__all__ = ["PROSE", "WIDTH", "aligned", "and_more", "escaped", "markdown_table", "wrapped"]

Row = Sequence[str]

#: Columns of a table where no terminal says how wide it is: what a CI log shows in one line.
WIDTH: Final = 120
#: Columns of a sentence, in a wider terminal too.
PROSE: Final = 100


def aligned(head: Row, rows: Sequence[Row], width: int = WIDTH) -> list[str]:
    """One line per row, the columns padded to one width.

    Where that is wider than ``width``, the first column stands on a line of its own.
    """
    every = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]

    def joined(cells: Row, of: Sequence[int]) -> str:
        return "  ".join(x.ljust(w) for x, w in zip(cells, of, strict=True)).rstrip()

    if sum(widths) + 2 * len(widths) <= width:
        return [f"  {joined(row, widths)}" for row in every]
    return [
        line for row in every for line in (f"  {row[0]}", f"      {joined(row[1:], widths[1:])}".rstrip())
    ]


def wrapped(text: str, width: int = PROSE, indent: str = "") -> list[str]:
    """A sentence in lines of at most ``width``; what follows the first is indented further.

    Names are not broken: a line that holds a longer one is as long as that.
    """
    return textwrap.wrap(
        text,
        max(min(width, PROSE), 30),
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def markdown_table(head: Row, rows: Sequence[Row]) -> list[str]:
    """The same as a table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {' | '.join(map(escaped, row))} |" for row in rows]


def and_more(rows: int, shown: int) -> list[str]:
    """A line that says how many rows are not shown; none where all are."""
    return [f"and {rows - shown} more"] if rows > shown else []


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    for character in "\\|<*_":
        text = text.replace(character, "&lt;" if character == "<" else f"\\{character}")
    return text
