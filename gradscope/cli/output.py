"""Signs that a terminal or a log may not have, in ASCII."""

from __future__ import annotations

import codecs
import shutil
import sys
from typing import Final

__all__ = ["columns", "plain_where_needed"]

_NAME: Final = "gradscope_plain"
_PLAIN: Final = {
    **dict(zip("▁▂▃▄▅▆▇█", "12345678", strict=True)),
    **{"×": "x", "→": "->", "–": "-", "—": "-", "·": ".", "…": "...", "≤": "<=", "≥": ">=", "±": "+-"},
    **{"Δ": "Delta", "ξ": "xi", "σ": "sigma", "√": "sqrt", "∇": "grad ", "‖": "||"},
    **{"│": "|", "├": "|", "└": "`", "─": "-", "━": "-"},
}


def plain_where_needed() -> None:
    """Let the process's output write what its encoding lacks in ASCII, where it would raise an error."""
    codecs.register_error(_NAME, _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", "") == "strict":
            reconfigure(errors=_NAME)


def columns() -> int:
    """Of the terminal (or of ``COLUMNS``); of a CI log where there is none."""
    from gradscope.analysis.wording import WIDTH

    return shutil.get_terminal_size((WIDTH, 24)).columns


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign, "?") for sign in text), error.end
