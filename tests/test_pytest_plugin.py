"""The plugin in test suites of its own: new, unchanged, changed, unused and unusable baselines."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from gradscope import gate, reference

ROOT = Path(__file__).parents[1]
pytest_plugins = ["pytester"]

SUITE = """
import os
import pytest
import torch
from gradscope import reference

tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
batch = (tokens[:, :-1], tokens[:, 1:])


def make():
    model = reference.Transformer("pre_norm", depth=4, width=16, heads=2)
    if os.environ.get("PLANTED"):
        model.blocks[2].requires_grad_(False)
    return model


def test_model(gradient_baseline):
    gradient_baseline.check(make, batch, reference.next_token_loss, replicates=3)
"""
PLUGIN = ("-p", "gradscope.pytest_plugin", "-p", "no:cacheprovider")


@pytest.fixture(scope="module", autouse=True)
def everything_loaded() -> None:
    """pytester forgets what a run has imported, and torch cannot be imported twice."""
    tokens = torch.randint(256, (2, 9))
    batch = (tokens[:, :-1], tokens[:, 1:])
    makers = [
        lambda v=v: reference.Transformer(v, depth=2, width=16, heads=2) for v in ("pre_norm", "skip")
    ]
    baseline = gate.take(makers[0], batch, reference.next_token_loss, replicates=3)
    torch.optim.AdamW(makers[0]().parameters()).step()
    for make in makers:
        str(gate.check(baseline, make, batch, reference.next_token_loss))


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A suite of one test, without a baseline."""
    monkeypatch.delenv("PLANTED", raising=False)
    pytester.makepyfile(test_suite=SUITE)
    return pytester


@pytest.fixture
def kept(suite: pytest.Pytester) -> Path:
    """The same suite with its baseline."""
    suite.runpytest_inprocess(*PLUGIN, "--gradscope-update").assert_outcomes(passed=1)
    return suite.path / "gradient_baselines" / "test_suite" / "test_model.json"


def test_the_first_run_writes_and_fails_and_the_next_passes(suite: pytest.Pytester) -> None:
    first = suite.runpytest_inprocess(*PLUGIN)
    first.assert_outcomes(failed=1)
    path = suite.path / "gradient_baselines" / "test_suite" / "test_model.json"
    first.stdout.fnmatch_lines(
        ["*one has been written to gradient_baselines/test_suite/test_model.json*", "Look at it, commit*"]
    )
    text = path.read_text(encoding="utf-8")
    assert json.loads(text)["gradscope"] == "baseline"
    assert max(map(len, text.splitlines())) < 1000
    second = suite.runpytest_inprocess(*PLUGIN)
    second.assert_outcomes(passed=1)
    second.stdout.no_fnmatch_line("*gradient baselines*")
    assert path.read_text(encoding="utf-8") == text


def test_a_change_fails_and_the_last_line_accepts_it(
    suite: pytest.Pytester, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kept.read_bytes()
    monkeypatch.setenv("PLANTED", "1")
    run = suite.runpytest_inprocess(*PLUGIN, "-rN")
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(["*gradient baseline of Transformer: failed*", "*blocks.2*", "To accept*"])
    assert kept.read_bytes() == before
    line = run.outlines[run.outlines.index("To accept the change:") + 1]
    assert line == "pytest test_suite.py::test_model --gradscope-update"
    accepted = suite.runpytest_inprocess(*PLUGIN, *shlex.split(line)[1:])
    accepted.assert_outcomes(passed=1)
    accepted.stdout.fnmatch_lines(["replaced: gradient_baselines/test_suite/test_model.json"])
    assert kept.read_bytes() != before
    suite.runpytest_inprocess(*PLUGIN).assert_outcomes(passed=1)


@pytest.mark.parametrize("words", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_a_failure_fits_the_terminal(
    suite: pytest.Pytester, kept: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("PLANTED", "1")
    monkeypatch.setenv("COLUMNS", "60")
    run = suite.runpytest_subprocess(*PLUGIN, "-rN", *words)
    begin = next(i for i, line in enumerate(run.outlines) if "Transformer: failed" in line)
    message = run.outlines[begin : run.outlines.index("To accept the change:")]
    assert len(message) > 8
    assert max(map(len, message)) <= 60


def test_the_line_is_right_from_another_folder(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", "")
    folder = pytester.mkdir("with blank")
    (folder / "test_suite.py").write_text(
        SUITE.replace("def test_model(", "@pytest.mark.parametrize('x', [0])\ndef test_model(x, "),
        "utf-8",
    )
    pytester.runpytest_inprocess(*PLUGIN, "--gradscope-update").assert_outcomes(passed=1)
    monkeypatch.setenv("PLANTED", "1")
    monkeypatch.chdir(folder)
    run = pytester.runpytest_inprocess(*PLUGIN, "--rootdir", str(pytester.path))
    run.assert_outcomes(failed=1)
    line = run.outlines[run.outlines.index("To accept the change:") + 1]
    assert line == "pytest 'test_suite.py::test_model[0]' --gradscope-update"


def test_accepting_leaves_a_baseline_that_holds(suite: pytest.Pytester, kept: Path) -> None:
    kept.write_text(kept.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")
    before = kept.read_bytes()
    suite.runpytest_inprocess(*PLUGIN, "--gradscope-update").assert_outcomes(passed=1)
    assert kept.read_bytes() == before


RERUN = """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    for _ in range(2):
        runtestprotocol(item, nextitem=nextitem, log=True)
        item._initrequest()
    return True
"""


def test_a_failed_test_that_is_run_again_at_once_does_not_accept_what_it_wrote(
    suite: pytest.Pytester,
) -> None:
    """As pytest-rerunfailures does: on a CI server nobody has looked at a baseline or committed it."""
    suite.makeconftest(RERUN)
    run = suite.runpytest_inprocess(*PLUGIN)
    run.assert_outcomes(failed=2)
    (suite.path / "conftest.py").unlink()
    suite.runpytest_inprocess(*PLUGIN).assert_outcomes(passed=1)


def test_an_older_baseline_is_replaced_on_demand_alone(suite: pytest.Pytester, kept: Path) -> None:
    whole = kept.read_bytes()
    kept.write_text(json.dumps({"gradscope": "baseline", "schema": 1}), encoding="utf-8")
    old = kept.read_bytes()
    run = suite.runpytest_inprocess(*PLUGIN)
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(["*schema 1*--gradscope-update*"])
    assert kept.read_bytes() == old
    suite.runpytest_inprocess(*PLUGIN, "--gradscope-update").assert_outcomes(passed=1)
    assert kept.read_bytes() == whole


def test_an_error_is_said_once_without_the_library_s_own_lines(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_suite=SUITE.replace("replicates=3", "tolerance='flow:20'").replace("make, batch", "0, batch")
        + "\n\ndef test_model_is_none(gradient_baseline):\n"
        + "    make = lambda: torch.nn.Linear(2, 2)\n"
        + "    gradient_baseline.check(make, torch.ones(2, 2), lambda model, x: model(x).sum())\n"
    )
    run = pytester.runpytest_inprocess(*PLUGIN)
    run.assert_outcomes(failed=2)
    text = run.stdout.str()
    assert text.count("write kind:20%") == 1 and "No trunk found in Linear" in text
    assert "During handling" not in text and "site-packages" not in text and "gate/" not in text
    assert not (pytester.path / "gradient_baselines").exists()


def test_what_is_another_model_each_time_cannot_be_accepted(pytester: pytest.Pytester) -> None:
    changed = "    model.blocks[1].requires_grad_(bool(CALLS))\n    CALLS.append(0)\n    return model\n"
    pytester.makepyfile(
        test_suite=SUITE.replace("    return model\n", "    CALLS.append(0)\n" + changed)
        .replace("def make()", "CALLS = []\n\n\ndef make()")
        .replace("bool(CALLS)", "len(CALLS) < 12")
    )
    run = pytester.runpytest_inprocess(*PLUGIN, "--gradscope-update")
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(["*does not hold*another one each time*"])


GIVEN = """
import os
import pytest
import torch
from gradscope import reference

tokens = torch.randint(64, (35, 4, 9), generator=torch.Generator().manual_seed(0))
batches = [(t[:, :-1], t[:, 1:]) for t in tokens]


@pytest.fixture(scope="session")
def trained():
    torch.manual_seed(0)
    model = reference.Transformer("pre_norm", depth=4, width=16, heads=2, vocabulary=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches[:10]:
        reference.next_token_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    if os.environ.get("PLANTED"):
        with torch.no_grad():
            model.blocks[2].attention.branch.function.value.weight.mul_(1.5)
    return model


def test_trained(trained, gradient_baseline):
    begin, end = (int(x) for x in os.environ.get("PART", "0 20").split())
    gradient_baseline.check(trained, batches[begin:end], reference.next_token_loss)
"""


def test_a_model_in_training_has_batches_for_replicates(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PLANTED", raising=False)
    pytester.makepyfile(test_given=GIVEN)
    first = pytester.runpytest_inprocess(*PLUGIN)
    first.assert_outcomes(failed=1)
    first.stdout.fnmatch_lines(["*20 batches of one model*"])
    pytester.runpytest_inprocess(*PLUGIN).assert_outcomes(passed=1)
    monkeypatch.setenv("PART", "20 35")
    other = pytester.runpytest_inprocess(*PLUGIN, "-rP")
    other.assert_outcomes(passed=1)
    other.stdout.fnmatch_lines(["*resolution: * in 95 % of checks *"])
    monkeypatch.setenv("PLANTED", "1")
    for part in ("0 20", "20 35"):
        monkeypatch.setenv("PART", part)
        run = pytester.runpytest_inprocess(*PLUGIN, "-rN")
        run.assert_outcomes(failed=1)
        run.stdout.fnmatch_lines(["*blocks.2*", "To accept*"])


@pytest.mark.parametrize("update", [(), ("--gradscope-update",)])
@pytest.mark.parametrize("damage", ["corrupt", "cut", "newer", "foreign"])
def test_an_unusable_baseline_is_an_error_and_stays(
    suite: pytest.Pytester, kept: Path, damage: str, update: tuple[str, ...]
) -> None:
    text = kept.read_text(encoding="utf-8")
    content = {
        "corrupt": "{ no json",
        "cut": text[: len(text) // 2],
        "newer": text.replace('"schema": 2', '"schema": 999'),
        "foreign": "{}",
    }[damage]
    assert content != text
    kept.write_text(content, encoding="utf-8")
    run = suite.runpytest_inprocess(*PLUGIN, *update)
    run.assert_outcomes(failed=1)
    says = {"newer": "*newer*", "foreign": "*no gradient baseline*"}.get(damage, "*is damaged*")
    run.stdout.fnmatch_lines([says])
    assert kept.read_text(encoding="utf-8") == content
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_a_read_only_baseline_is_compared_and_not_replaced(
    suite: pytest.Pytester, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kept.read_bytes()
    kept.chmod(0o444)
    suite.runpytest_inprocess(*PLUGIN).assert_outcomes(passed=1)
    monkeypatch.setenv("PLANTED", "1")
    run = suite.runpytest_inprocess(*PLUGIN, "--gradscope-update")
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(["*read-only*"])
    assert kept.read_bytes() == before


def test_two_models_in_one_test_need_names(pytester: pytest.Pytester) -> None:
    line = "    gradient_baseline.check(make, batch, reference.next_token_loss, replicates=3"
    pytester.makepyfile(test_suite=f"{SUITE}\n{line})\n")
    run = pytester.runpytest_inprocess(*PLUGIN, "--gradscope-update")
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(["*second model*name=*"])
    pytester.makepyfile(test_suite=f'{SUITE}\n{line}, name="a second/one")\n')
    pytester.runpytest_inprocess(*PLUGIN, "--gradscope-update").assert_outcomes(passed=1)
    folder = pytester.path / "gradient_baselines" / "test_suite"
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2
    assert names[0].startswith("test_model--a_second_one-")
    again = pytester.runpytest_inprocess(*PLUGIN)
    again.assert_outcomes(passed=1)
    again.stdout.no_fnmatch_line("unused: *")


UNUSED = [
    "*gradient baselines*",
    "unused: gradient_baselines/test_suite/test_gone.json: no test uses it; delete it",
    "unused: gradient_baselines/test_other/test_gone_too.json: no test uses it; delete it",
]


def plant_unused(kept: Path) -> None:
    (kept.parent / "test_gone.json").write_bytes(kept.read_bytes())
    other = kept.parent.parent / "test_other"
    other.mkdir()
    (other / "test_gone_too.json").write_bytes(kept.read_bytes())


def test_unused_baselines_are_reported(suite: pytest.Pytester, kept: Path) -> None:
    plant_unused(kept)
    run = suite.runpytest_inprocess(*PLUGIN)
    run.assert_outcomes(passed=1)
    run.stdout.fnmatch_lines(UNUSED)
    run.stdout.no_fnmatch_line("unused: *test_model*")


def test_where_only_a_part_runs_nothing_is_called_unused(suite: pytest.Pytester, kept: Path) -> None:
    suite.makepyfile(test_suite=SUITE + "\n\ndef test_plain():\n    pass\n")
    for words in (["-k", "test_plain"], ["test_suite.py::test_plain"]):
        run = suite.runpytest_inprocess(*PLUGIN, *words)
        run.assert_outcomes(passed=1, deselected=1 if words[0] == "-k" else 0)
        run.stdout.no_fnmatch_line("unused: *")


def test_a_test_of_the_same_name_in_another_file_is_another_test(
    suite: pytest.Pytester, kept: Path
) -> None:
    suite.makepyfile(test_a="def test_model():\n    pass\n")
    run = suite.runpytest_inprocess(*PLUGIN, "--deselect", "test_suite.py::test_model")
    run.assert_outcomes(passed=1, deselected=1)
    run.stdout.no_fnmatch_line("unused: *")
    suite.makepyfile(test_a="def test_model():\n    assert False\n")
    suite.runpytest_inprocess(*PLUGIN, "-x").stdout.no_fnmatch_line("unused: *")


def test_parameters_that_look_alike_have_files_of_their_own(suite: pytest.Pytester) -> None:
    mark = '@pytest.mark.parametrize("word", ["a::b", "a.b"])\ndef test_model(word, '
    suite.makepyfile(test_suite=SUITE.replace("def test_model(", mark))
    suite.runpytest_inprocess(*PLUGIN).assert_outcomes(failed=2)
    names = {path.name for path in (suite.path / "gradient_baselines" / "test_suite").iterdir()}
    assert len(names) == 2 and "test_model[a.b].json" in names
    again = suite.runpytest_inprocess(*PLUGIN)
    again.assert_outcomes(passed=2)
    again.stdout.no_fnmatch_line("unused: *")


def test_new_changed_and_unused_baselines_under_xdist(
    suite: pytest.Pytester, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_unused(kept)
    second = "\n\ndef test_second(gradient_baseline):\n    test_model(gradient_baseline)\n"
    suite.makepyfile(test_suite=SUITE + second)
    monkeypatch.setenv("PLANTED", "1")
    run = suite.runpytest(*PLUGIN, "-n", "2", "-rN")
    run.assert_outcomes(failed=2)
    run.stdout.fnmatch_lines(
        ["*one has been written to gradient_baselines/test_suite/test_second.json"], consecutive=False
    )
    run.stdout.fnmatch_lines(["pytest test_suite.py::test_model --gradscope-update"])
    new = "new: gradient_baselines/test_suite/test_second.json"
    run.stdout.fnmatch_lines([UNUSED[0], new, *UNUSED[1:]])
    run.stdout.no_fnmatch_line("unused: *test_model*")
    assert (kept.parent / "test_second.json").exists()


def test_a_plugin_that_no_test_uses_imports_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_light():
            heavy = {"torch", "numpy", "scipy", "pandas", "matplotlib", "rich"}
            assert not heavy & set(sys.modules)
            assert "gradscope.gate" not in sys.modules
        """
    )
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)


@pytest.mark.parametrize("also", [(), ("-p", "gradscope.pytest_plugin")], ids=["installed", "and -p"])
def test_it_is_on_by_installation(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, also: tuple[str, ...]
) -> None:
    """A distribution with the entry points of pyproject.toml, beside what is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = pytester.mkdir("site") / "standin-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: standin\nVersion: 1\n", "utf-8")
    lines = [f"{name} = {place}" for name, place in project["entry-points"]["pytest11"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines, ""]), "utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(pytester.path / "site"), str(ROOT)]))
    run = pytester.runpytest_subprocess(*also, "--help")
    assert run.ret == 0
    run.stdout.fnmatch_lines(["*--gradscope-update*"])
    if not also:
        off = pytester.runpytest_subprocess("-p", "no:gradscope.pytest_plugin", "--help")
        off.stdout.no_fnmatch_line("*--gradscope-update*")


def test_importing_the_plugin_costs_nothing() -> None:
    code = (
        "import pytest, sys; before = set(sys.modules); import gradscope.pytest_plugin; "
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert loaded <= {"gradscope", "shlex"} | set(sys.stdlib_module_names)
