"""Tables of changes in words: aligned for a terminal and a CI log, or for a pull-request comment."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned", "and_more", "escaped", "markdown_table"]

Row = Sequence[str]


def aligned(head: Row, rows: Sequence[Row]) -> list[str]:
    """One line per row, the columns padded to one width."""
    every = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    return ["  " + "  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in every]


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
