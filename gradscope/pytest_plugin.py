"""The pytest plugin: the ``gradient_baseline`` fixture, ``--gradscope-update``, unused baselines.

It is on by installation. Until a test asks for the fixture it imports nothing but pytest, which is there,
and looks at no file but the folder of baselines beside a test module.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradscope.gate import Outcome

__all__ = ["GradientBaseline", "gradient_baseline"]

FOLDER: Final = "gradient_baselines"
_OPTION: Final = "--gradscope-update"
_FILE: Final = "gradient_baseline_file"
_SAID: Final = "gradient_baseline"
#: Folder of a test module's baselines → id → key of all its tests, selected or not.
_KNOWN: Final = pytest.StashKey[dict[str, dict[str, str]]]()
#: Baselines that this run has written and nobody has accepted.
_WRITTEN: Final = pytest.StashKey[set[Path]]()
_SENT: Final = "gradscope_known"
_LOOK: Final = "look at it, commit it, and run again."
_WIDTH: Final = "gradscope_width"


class GradientBaseline:
    """What the fixture ``gradient_baseline`` gives: `check`.

    The baseline is kept in ``gradient_baselines/<test file>/<test>.json`` beside the test file.
    """

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._node: Any = request.node
        self._config = request.config
        self._used: set[Path] = set()
        self._width = _width(request.config)

    def path(self, name: str | None = None) -> Path:
        """Where the baseline is kept; ``name`` tells several in one test apart."""
        key = _key(self._node) + ("" if name is None else f"--{_safe(name)}")
        return _folder(self._node.path) / f"{key}.json"

    def check(
        self,
        make_model: Callable[[], nn.Module] | nn.Module,
        batch: Any,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        *,
        tolerance: str | None = None,
        replicates: int = 20,
        name: str | None = None,
    ) -> Outcome:
        """Compare the model with its baseline; fail where it departs, or where there is none yet.

        The first run writes the baseline and fails: look at it, and commit it. ``--gradscope-update``
        accepts: it writes a missing baseline and replaces one that the model departs from, or that an
        older version of gradscope wrote; one that still holds stays as it is. A damaged, newer or
        read-only file is never overwritten.

        ::

            def test_gradients(gradient_baseline):
                gradient_baseline.check(lambda: MyTransformer(depth=12), batch, loss)

        Args:
            make_model: returns a new model; or a model, whose replicates are batches.
            batch: what ``loss`` takes; with a model, a list of such batches.
            loss: function (model, batch) → scalar tensor; None for ``model(**batch).loss``.
            tolerance: the smallest change worth failing for, such as ``"flow:20%,delta:.5nat"``; None for
                the defaults.
            replicates: of a new baseline.
            name: needed where one test checks several models.

        Returns:
            The outcome, which did not fail.
        """
        __tracebackhide__ = True
        from gradscope import gate
        from gradscope.analysis.gate.tolerance import parse_tolerance
        from gradscope.errors import GradscopeError

        path = self.path(name)
        if path in self._used:
            pytest.fail(
                f"This test checks a second model against {_shown(path)}. Tell them apart: "
                'gradient_baseline.check(..., name="…")',
                pytrace=False,
            )
        self._used.add(path)
        self._node.user_properties.append((_FILE, str(path)))

        def take() -> str:
            baseline = gate.take(make_model, batch, loss, replicates=replicates)
            baseline.save(path)
            return str(baseline)

        def compare() -> Outcome:
            baseline = gate.Baseline.load(path)
            return gate.check(baseline, make_model, batch, loss, tolerance=tolerance)

        try:
            parse_tolerance(tolerance)  # a wrong one is said before anything is written
            return self._checked(path, take, compare)
        except GradscopeError as error:
            unusable = str(error)
        pytest.fail(unusable, pytrace=False)

    def _checked(self, path: Path, take: Callable[[], str], compare: Callable[[], Outcome]) -> Outcome:
        __tracebackhide__ = True
        from gradscope import gate

        update = bool(self._config.getoption(_OPTION))
        written = self._config.stash.setdefault(_WRITTEN, set())
        if path in written:  # a failed test that another plugin runs again at once
            pytest.fail(f"This run has written {_shown(path)}: {_LOOK}", pytrace=False)
        old = path.exists() and update and gate.outdated(path)
        outcome = compare() if path.exists() and not old else None
        if outcome is not None and not (outcome.failed and update):
            text = outcome.text(self._width)
            if outcome.failed:
                pytest.fail(f"{text}\nTo accept the change:\n{self._accept()}", pytrace=False)
            self._say(f"{outcome.status}: {_shown(path)}", text)
            return outcome
        replaced = path.exists()
        summary = take()
        if not update:
            written.add(path)
            self._node.user_properties.append((_SAID, f"new: {_shown(path)}"))
            pytest.fail(
                f"There was no gradient baseline; one has been written to {_shown(path)}\n{summary}\n"
                f"{_LOOK.capitalize()}",
                pytrace=False,
            )
        before = "" if outcome is None else f"{outcome.text(self._width)}\nreplaced by:\n"
        self._say(f"{'replaced' if replaced else 'new'}: {_shown(path)}", f"{before}{summary}")
        outcome = compare()
        if outcome.failed:
            pytest.fail(
                f"What has just been written to {_shown(path)} does not hold: the model, the batch or "
                f"the loss is another one each time.\n{outcome.text(self._width)}",
                pytrace=False,
            )
        return outcome

    def _say(self, line: str, text: str) -> None:
        """For the report: the terminal summary, ``-rP`` and ``--junitxml`` show it."""
        self._node.user_properties.append((_SAID, line))
        self._node.add_report_section("call", "gradient baseline", text)

    def _accept(self) -> str:
        """The command line that accepts the change, from where pytest was called."""
        place = os.path.relpath(self._node.path, self._config.invocation_params.dir)
        inner = self._node.nodeid.partition("::")[2]
        return shlex.join(["pytest", f"{place}::{inner}", _OPTION])


@pytest.fixture
def gradient_baseline(request: pytest.FixtureRequest) -> GradientBaseline:
    """Compares a model's gradients with a baseline that is kept beside the test."""
    return GradientBaseline(request)


def _folder(test_file: Path) -> Path:
    return test_file.parent / FOLDER / test_file.stem


def _key(item: Any) -> str:
    """The file name of a test: its class and name, parameters too."""
    name, bracket, parameters = item.nodeid.partition("::")[2].partition("[")
    return _safe(".".join(name.split("::")) + bracket + parameters)


def _safe(text: str) -> str:
    """A file name on every system; a digest tells names apart that would become the same."""
    safe = re.sub(r"[^A-Za-z0-9_.\[\]-]+", "_", text)[:100]
    return safe if safe == text else f"{safe.strip('_')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _width(config: pytest.Config) -> int:
    """Columns of the terminal, or of ``COLUMNS``; of a CI log where there is neither."""
    sent = getattr(config, "workerinput", {}).get(_WIDTH)
    if sent is not None:
        return int(sent)
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not (reporter.isatty or "COLUMNS" in os.environ):
        return 120
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    # While a test runs, the process's output is a file, which has no width.
    with contextlib.nullcontext() if capture is None else capture.global_and_fixture_disabled():
        return config.get_terminal_writer().fullwidth


def _shown(path: Path) -> str:
    """Relative to the working folder where it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# -- pytest's hooks --------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--gradscope-update``."""
    parser.getgroup("gradscope").addoption(
        _OPTION,
        action="store_true",
        help="accept the gradients as they are: write missing baselines, replace those that models "
        "depart from",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Remember which tests stand beside baselines, before any is deselected."""
    known: dict[Path, dict[str, str] | None] = {}
    for item in items:
        if item.path not in known:
            known[item.path] = {} if (item.path.parent / FOLDER).is_dir() else None
        keys = known[item.path]
        if keys is not None:
            keys[item.nodeid] = _key(item)
    config.stash[_KNOWN] = {str(_folder(p)): keys for p, keys in known.items() if keys is not None}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker process of pytest-xdist hands over what it has collected."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_SENT] = session.config.stash.get(_KNOWN, {})


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A worker process of pytest-xdist has no terminal: it is told how wide the real one is."""
    node.workerinput[_WIDTH] = _width(node.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The process that started the workers of pytest-xdist takes it over."""
    found = getattr(node, "workeroutput", {}).get(_SENT, {})
    node.config.stash[_KNOWN] = {**node.config.stash.get(_KNOWN, {}), **found}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name the baselines that are new, replaced, suspicious, or used by no test."""
    reports = [r for group in terminalreporter.stats.values() for r in group if hasattr(r, "nodeid")]
    said = [line for line in _properties(reports, _SAID) if not line.startswith("passed")]
    known = config.stash.get(_KNOWN, {})
    # Where only a part was collected, nothing can be said of the rest.
    whole = not (config.getoption("lf", False) or any("::" in arg for arg in config.args))
    unused = list(_unused(known, reports)) if known and whole else []
    if said or unused:
        terminalreporter.section("gradient baselines")
        for line in dict.fromkeys(said):
            terminalreporter.line(line)
        for path in unused:
            terminalreporter.line(f"unused: {_shown(path)}: no test uses it; delete it")


def _properties(reports: Iterable[Any], name: str) -> list[str]:
    return [
        str(value)
        for report in reports
        if getattr(report, "when", "") == "call"
        for key, value in report.user_properties
        if key == name
    ]


def _unused(known: dict[str, dict[str, str]], reports: list[Any]) -> Iterator[Path]:
    """Files of no test, and of tests that passed without them.

    A test that failed, was skipped or was not run may use its file another time.
    """
    used = set(_properties(reports, _FILE))
    passed = {r.nodeid for r in reports if getattr(r, "when", "") == "call" and r.passed}
    for folder, keys in sorted(known.items()):
        waiting = {key for test, key in keys.items() if test not in passed}
        for path in sorted(Path(folder).glob("*.json")):
            owned = any(path.stem == key or path.stem.startswith(f"{key}--") for key in waiting)
            if str(path) not in used and not owned:
                yield path
    for above in sorted({Path(folder).parent for folder in known}):
        for path in sorted(above.glob("*/*.json")):
            if not (above.parent / f"{path.parent.name}.py").exists():
                yield path
