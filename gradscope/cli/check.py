"""What ``gradscope check`` does: a target against a baseline file, for a terminal and for CI."""

from __future__ import annotations

import re
import shlex
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from gradscope.analysis.gate.tolerance import parse_tolerance
from gradscope.analysis.wording import escaped
from gradscope.cli.output import columns
from gradscope.errors import GateError, GradscopeError
from gradscope.gate import Baseline, check, outdated, take
from gradscope.target import load_target

__all__ = ["check_target"]


def check_target(
    target: str,
    path: Path,
    *,
    update: bool = False,
    fail_on: str | None = None,
    junit: Path | None = None,
    markdown: Path | None = None,
    words: Sequence[str] = (),
) -> bool:
    """Check a target against its baseline, print the outcome, and write the reports, of an error too.

    Args:
        target: ``package.module:function`` or ``file.py:function``.
        path: the baseline file.
        update: write a missing baseline, and replace one that the target departs from.
        fail_on: the smallest change worth failing for, such as ``flow:20%``; None for the defaults.
        junit: write a JUnit XML file there.
        markdown: write a comment for a pull request there.
        words: the command line, for the line that accepts a change.

    Returns:
        Whether the check passed, or was accepted.

    Raises:
        GateError: no baseline and no ``update``, or one that cannot be used; nothing is overwritten.
        MeasureError: the target cannot be loaded or measured.
    """
    accept = shlex.join(["gradscope", *words, *(() if "--update" in words else ("--update",))])
    begin = time.perf_counter()
    error: Exception | None = None
    try:
        result = _checked(target, path, update, fail_on, accept)
    except Exception as caught:  # reported, and raised again below
        error = caught
        said = f"{type(caught).__name__}: {caught}"
        text = said if isinstance(caught, GradscopeError) else traceback.format_exc()
        result = _Result("error", said, text, f"**Gradient check: error.** {escaped(said)}\n")
    for report in (junit, markdown):
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
    if junit is not None:
        junit.write_bytes(_junit(target, result, time.perf_counter() - begin))
    if markdown is not None:
        markdown.write_text(result.markdown, encoding="utf-8")
    if error is not None:
        raise error
    return result.element == ""


@dataclass(frozen=True, slots=True)
class _Result:
    """What the reports say.

    Attributes:
        element: ``failure`` or ``error``; "" where it passed.
        headline: one sentence.
        text: all of it.
        markdown: the same for a pull request.
    """

    element: str
    headline: str
    text: str
    markdown: str


def _checked(target: str, path: Path, update: bool, fail_on: str | None, accept: str) -> _Result:
    parse_tolerance(fail_on)  # a wrong one is said before anything runs
    if not path.exists() and not update:
        raise GateError(f"There is no baseline {path}. Look at the model, and write one:\n{accept}")
    new = not path.exists() or (update and outdated(path))
    old = None if new else Baseline.load(path)
    found = load_target(target)
    if old is None:
        baseline = take(found.model, found.batch, found.loss, progress=True)
        baseline.save(path)
        said = f"{baseline}\nwritten to {path}: look at it, and commit it"
        print(said, flush=True)
        return _Result("", f"A new baseline, {path}.", said, f"```text\n{said}\n```\n")
    outcome = check(old, found.model, found.batch, found.loss, tolerance=fail_on, progress=True)
    print(outcome.text(columns()), flush=True)
    if outcome.failed and update:
        take(found.model, found.batch, found.loss, progress=True).save(path)
        accepted = f"accepted: {path} is replaced"
        print(accepted, flush=True)
        return _Result(
            "", accepted, f"{outcome}\n{accepted}", f"{outcome.markdown()}\n{escaped(accepted)}\n"
        )
    if not outcome.failed:
        return _Result("", outcome.reason, str(outcome), outcome.markdown())
    print(f"To accept the change:\n{accept}", flush=True)
    return _Result(
        "failure",
        outcome.reason,
        f"{outcome}\nTo accept the change:\n{accept}",
        f"{outcome.markdown()}\nTo accept the change:\n\n```sh\n{accept}\n```\n",
    )


def _junit(target: str, result: _Result, seconds: float) -> bytes:
    """One test suite with one test case, as CI systems read it."""
    suite = ElementTree.Element(
        "testsuite",
        name="gradscope",
        tests="1",
        failures=str(int(result.element == "failure")),
        errors=str(int(result.element == "error")),
        skipped="0",
        time=f"{seconds:.3f}",
    )
    case = ElementTree.SubElement(
        suite, "testcase", classname="gradscope.check", name=_legal(target), time=f"{seconds:.3f}"
    )
    if result.element:
        said = ElementTree.SubElement(case, result.element, message=_legal(result.headline))
    else:
        said = ElementTree.SubElement(case, "system-out")
    said.text = _legal(result.text)
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def _legal(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
