"""What importing gradscope costs, and what works where torch is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gradscope

# As on a machine without torch. (sys.modules["torch"] = None would trip scipy, which looks there.)
NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch' (blocked by the test)", name="torch")
sys.meta_path.insert(0, NoTorch())
"""
HEAVY = {"torch", "numpy", "scipy", "pandas", "matplotlib", "seaborn", "rich", "transformers"}


def run(code: str) -> str:
    """What a fresh interpreter prints; its error, with the traceback, on failure."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    tops = "{name.partition('.')[0] for name in sys.modules}"
    return set(json.loads(run(f"{code}\nimport json, sys\nprint(json.dumps(sorted({tops})))")))


def test_importing_loads_nothing_heavy():
    loaded = loaded_by("import gradscope")
    assert "gradscope" in loaded
    assert loaded & HEAVY == set()


def test_the_check_for_heavy_imports_can_fail():
    assert "numpy" in loaded_by("import gradscope; gradscope.Record")


def test_errors_and_version_need_nothing():
    loaded = loaded_by(
        "import gradscope; gradscope.GradscopeError; gradscope.__version__; dir(gradscope)"
    )
    assert loaded & HEAVY == set()


def test_a_record_needs_numpy_only():
    assert loaded_by("import gradscope; gradscope.Record({})") & HEAVY == {"numpy"}


def test_a_profile_needs_no_plotting_library():
    loaded = loaded_by("import gradscope; gradscope.profile")
    assert loaded & HEAVY <= {"numpy"}


def test_public_names_are_sorted_few_and_all_there():
    assert gradscope.__all__ == sorted(gradscope.__all__)
    assert len(gradscope.__all__) <= 22
    assert set(gradscope.__all__) <= set(dir(gradscope))
    assert set(gradscope._HOME) == set(gradscope.__all__)


@pytest.mark.parametrize("name", gradscope.__all__)
def test_public_name_resolves(name):
    found = getattr(gradscope, name)
    home, _, attribute = gradscope._HOME[name].partition(":")
    assert found is (getattr(sys.modules[home], attribute) if attribute else sys.modules[home])
    assert found.__doc__


def test_type_checkers_see_the_same_names():
    import ast

    source = ast.parse(Path(gradscope.__file__).read_text(encoding="utf-8"))
    guarded = {}
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gradscope"):
            for alias in node.names:
                guarded[alias.asname] = (node.module, alias.name)
    assert guarded.keys() == set(gradscope.__all__)
    for name, (module, attribute) in guarded.items():
        home = gradscope._HOME[name]
        if ":" in home:  # a class or function: the same object, maybe re-exported
            imported = getattr(__import__(module, fromlist=[attribute]), attribute)
            assert imported is getattr(gradscope, name)
        else:
            assert f"{module}.{attribute}" == home


def test_functions_win_over_modules_of_the_same_name():
    # gradscope.experiment.measure is a module, gradscope.measure the function in it.
    said = run(
        "import gradscope.experiment.measure, gradscope.experiment.effective_depth\n"
        "import gradscope.analysis.profile, gradscope.reference, gradscope\n"
        "print(*(type(getattr(gradscope, n)).__name__"
        " for n in ('measure', 'effective_depth', 'profile', 'watch', 'plot', 'reference')))"
    )
    assert said.split() == ["function"] * 4 + ["module"] * 2


def test_star_import_and_unknown_names():
    names: dict[str, object] = {}
    exec("from gradscope import *", names)
    assert set(gradscope.__all__) <= names.keys()
    with pytest.raises(AttributeError, match="module 'gradscope' has no attribute 'wacth'"):
        _ = gradscope.wacth
    assert not hasattr(gradscope, "__path_hook__")


def test_records_are_judged_and_drawn_without_torch(tmp_path):
    run(f"""{NO_TORCH}
import importlib, math, pkgutil
import gradscope
from gradscope.record import Record, RecordWriter, Rows, Step

assert len(gradscope.Record({{}})) == 0
for room in ("analysis", "show"):
    package = importlib.import_module("gradscope." + room)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

L = 4
entries = [("h", float(l), f"h.{{l}}", "Block", 0, "output_grad", s)
           for l in range(L + 1) for s in ("l2", "count", "tokens", "dot_next")]
values = [v for l in range(L + 1) for v in (math.exp(-(L - l)), 12.0, 3.0, 0.0)]
rows = Rows.of(entries)
record = Record({{"model": "chain", "replicates": "run"}},
                tuple(Step.of(rows, values, {{}}, step=n, replicate=0) for n in range(3)))
record = gradscope.Record.load(record.save({str(tmp_path / "chain.jsonl")!r}))
assert len(record.to_pandas()) == 3 * len(entries)

gradscope.profile(record)
from gradscope.show import terminal
assert "chain, step 2, trunk h" in terminal.render(record, width=120)
axes = gradscope.plot.depth(record)
axes.figure.savefig({str(tmp_path / "depth.png")!r})
gradscope.plot.heatmap(record)
assert not [name for name in sys.modules if name.partition(".")[0] == "torch"]
""")


@pytest.mark.parametrize("name", ["watch", "measure", "effective_depth", "reference"])
def test_the_measuring_side_says_that_torch_is_missing(name):
    said = run(
        f"{NO_TORCH}\nimport gradscope\n"
        f"try:\n    gradscope.{name}\nexcept ImportError as error:\n    print(error)"
    )
    assert "No module named 'torch' (blocked by the test)" in said
