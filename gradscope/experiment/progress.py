"""How far long work is, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

__all__ = ["counted"]

T = TypeVar("T")


def counted(items: Sequence[T], what: str, *, show: bool) -> Iterator[T]:
    """The items one by one; on a terminal, ``what: 3 of 24`` on one line of the error stream."""
    show = show and len(items) > 1 and sys.stderr.isatty()
    for number, item in enumerate(items, 1):
        if show:
            end = "\n" if number == len(items) else ""
            print(f"\r{what}: {number} of {len(items)}", end=end, file=sys.stderr, flush=True)
        yield item
