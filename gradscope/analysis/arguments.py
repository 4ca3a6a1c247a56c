"""What analyses say of arguments that they cannot take: what came, and the line to write."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

from gradscope.record import Record

__all__ = ["as_record", "check_coverage", "meant", "not_a_record"]


def as_record(given: Any, call: str) -> Record:
    """The Record itself.

    Raises:
        TypeError: it is none; the message says where one comes from.
    """
    if isinstance(given, Record):
        return given
    raise TypeError(f"{call}() takes a Record; {not_a_record(given)}")


def not_a_record(given: Any) -> str:
    """What came in a Record's place, and the line that gives one."""
    if given is None:
        return "got None. A Record is scope.record, or what gradscope.measure(...) returns."
    kind = "the class" if isinstance(given, type) else "an object of type"
    kind = f"{kind} {given.__name__ if isinstance(given, type) else type(given).__name__}"
    if isinstance(given, str | Path):
        return f"got {kind}. Read the file first: gradscope.Record.load({str(given)!r})."
    if isinstance(getattr(given, "record", None), Record):
        return f"got {kind}. Give what it recorded: scope.record."
    return f"got {kind}. A Record is scope.record, or what gradscope.measure(...) returns."


def meant(given: Any, known: Iterable[str]) -> str:
    """A sentence with the names next to a misspelt one, and a blank after it; empty if none is near."""
    near = difflib.get_close_matches(str(given), list(known), n=2, cutoff=0.6)
    return f"Did you mean {' or '.join(repr(name) for name in near)}? " if near else ""


def check_coverage(confidence: Any) -> None:
    """A confidence must be a number between 0 and 1.

    Raises:
        ValueError: it is a number outside.
        TypeError: it is no number.
    """
    if not isinstance(confidence, Real):
        raise TypeError(f"confidence= is a number between 0 and 1, such as .95; got {confidence!r}")
    value = float(confidence)
    if not 0 < value < 1:
        hint = f"; {value:g} % is {value / 100:g}" if 1 < value < 100 else ""
        raise ValueError(f"confidence is a coverage between 0 and 1, such as .95; got {value:g}{hint}")
