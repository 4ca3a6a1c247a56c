"""A diagnosis on the terminal: root causes, and under each what it explains."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, Final

from gradscope.analysis.diagnosis import Diagnosis, Finding

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.tree import Tree

__all__ = ["findings_tree", "render"]

_STYLES: Final = {"critical": "bold red", "warning": "yellow", "note": "dim"}


def findings_tree(diagnosis: Diagnosis) -> Tree:
    """The findings as a ``rich.tree.Tree``: symptoms hang under the finding that explains them.

    The severity stands there as a word too, so that nothing depends on colour.

    Args:
        diagnosis: what `gradscope.diagnose` returned.
    """
    from rich.text import Text
    from rich.tree import Tree

    # ASCII guides come with a console that is not UTF-8.
    root = Tree(Text(diagnosis.summary, style="bold"))
    places: list[Tree] = []
    for finding in diagnosis.findings:
        above = root if finding.because_of is None else places[finding.because_of]
        places.append(above.add(_described(finding)))
    if diagnosis.not_checked:
        blind = root.add(Text("not checked", style="dim"))
        for names, reason in diagnosis.blind_spots:
            blind.add(Text(f"{names}: {reason}", style="dim"))
    return root


def _described(finding: Finding) -> RenderableType:
    from rich.text import Text

    text = Text()
    text.append(f"{finding.severity.upper()} ", style=_STYLES[finding.severity])
    text.append(f"{finding.title} ", style="bold")
    text.append(f"[{finding.rule}]\n")
    text.append(finding.message)
    if finding.because_of is None:
        for label, line in (
            ("cause", finding.cause),
            ("do", finding.remedy),
            ("source", finding.citation),
        ):
            text.append(f"\n{label}: ", style="bold")
            text.append(line)
    return text


def render(diagnosis: Diagnosis, width: int | None = None) -> str:
    """`findings_tree` as plain text, without colour.

    Args:
        diagnosis: what `gradscope.diagnose` returned.
        width: columns; None: that of the terminal, or 80 where there is none.
    """
    import shutil

    from rich.console import Console

    width = width if width is not None else shutil.get_terminal_size((80, 24)).columns
    out = StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, highlight=False)
    console.print(findings_tree(diagnosis))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
