"""What ``gradscope check`` does: a target against a baseline file, for a terminal and for CI."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from gradscope.errors import GateError
from gradscope.gate import Baseline, Outcome, check, take
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
    """Check a target against its baseline, print the outcome, and write the reports.

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
    if not path.exists() and not update:
        raise GateError(f"There is no baseline {path}. Look at the model, and write one:\n{accept}")
    begin = time.perf_counter()
    found = load_target(target)
    if not path.exists():
        baseline = take(found.model, found.batch, found.loss, progress=True)
        baseline.save(path)
        print(f"{baseline}\nwritten to {path}", flush=True)
        return True
    outcome = check(
        Baseline.load(path), found.model, found.batch, found.loss, tolerance=fail_on, progress=True
    )
    print(outcome, flush=True)
    accepted = update and outcome.failed
    if accepted:
        take(found.model, found.batch, found.loss, progress=True).save(path)
        print(f"accepted: {path} is replaced", flush=True)
    elif outcome.failed:
        print(f"To accept the change:\n{accept}", flush=True)
    passed = accepted or not outcome.failed
    if junit is not None:
        junit.write_bytes(_junit(target, outcome, passed, accept, time.perf_counter() - begin))
    if markdown is not None:
        text = outcome.markdown()
        if not passed:
            text += f"\nTo accept the change:\n\n```sh\n{accept}\n```\n"
        markdown.write_text(text, encoding="utf-8")
    return passed


def _junit(target: str, outcome: Outcome, passed: bool, accept: str, seconds: float) -> bytes:
    """One test suite with one test case, as CI systems read it."""
    suite = ElementTree.Element(
        "testsuite",
        name="gradscope",
        tests="1",
        failures="0" if passed else "1",
        errors="0",
        skipped="0",
        time=f"{seconds:.3f}",
    )
    case = ElementTree.SubElement(
        suite, "testcase", classname="gradscope.check", name=_legal(target), time=f"{seconds:.3f}"
    )
    if passed:
        ElementTree.SubElement(case, "system-out").text = _legal(str(outcome))
    else:
        failure = ElementTree.SubElement(case, "failure", message=_legal(outcome.reason))
        failure.text = _legal(f"{outcome}\nTo accept the change:\n{accept}")
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def _legal(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
