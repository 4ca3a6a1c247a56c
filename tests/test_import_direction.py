"""The direction of imports inside gradscope, read from the source: nothing is imported.

Data flows one way, from a model to a Record to what is known from it to what is shown. Imports under
``if TYPE_CHECKING`` and inside functions count like any other: a dependency is one.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import gradscope

PACKAGE = Path(gradscope.__file__).parent

# A room is a module or package directly under gradscope; each may import itself and what stands here.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "record": {"errors"},
    "analysis": {"errors", "record"},
    "show": {"errors", "record", "analysis"},
    "layers": {"errors"},
    # The kernels behind the table of statistics, which is the Record's.
    "statistics": {"errors", "record", "layers"},
    "collect": {"errors", "record", "layers", "statistics"},
    "experiment": {"errors", "record", "layers", "statistics", "collect"},
    "reference": {"errors", "layers", "statistics", "collect", "experiment"},
}
# They may import everything, each other too; no room may import them.
FRONT_DOORS = {"scope", "gate", "study", "cli", "target", "pytest_plugin", "testing", "integrations"}
# A Record is judged and drawn where torch is not installed.
TORCH_FREE = {"errors", "record", "analysis", "show"}
TORCH = {"torch", "torchvision", "torchaudio", "transformers", "lightning", "accelerate", "safetensors"}
SHOWING = {"pandas", "matplotlib", "seaborn", "rich"}


def modules_under(package: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name; packages by the name of their folder."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> list[tuple[int, str]]:
    """(line, dotted name) of everything imported: a module where there is one, else module.name."""
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                # A package's own name is the package; the face has names of its own.
                face = base == name.split(".")[0]
                found.append((node.lineno, inner if inner in modules or face else base))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func
            word = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if word in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def with_parents(module: str, modules: dict[str, Path]) -> set[str]:
    """The module and the packages that importing it runs, without the face, which loads lazily."""
    parts = module.split(".")
    return {m for n in range(2, len(parts) + 1) if (m := ".".join(parts[:n])) in modules}


def reached_from(start: str, modules: dict[str, Path]) -> dict[str, str]:
    """Each top-level package outside gradscope that a module imports, at any remove, and by whom."""
    face = start.split(".")[0]
    outside: dict[str, str] = {}
    waiting, seen = list(with_parents(start, modules)), set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for _, target in imports_of(module, modules[module], modules):
            if target.split(".")[0] == face:
                waiting += with_parents(target, modules)
            else:
                outside.setdefault(target.split(".")[0], module)
    return outside


def violations(package: Path) -> list[str]:
    """One sentence for each import that goes the wrong way."""
    face = package.name
    modules = modules_under(package)
    wrong = []
    for name, path in modules.items():
        if name == face:
            continue
        room = name.split(".")[1]
        if room not in ROOMS and room not in FRONT_DOORS:
            wrong.append(f"{name}: the room {room!r} is not known to this test")
            continue
        if room in FRONT_DOORS:
            continue
        for line, target in imports_of(name, path, modules):
            parts = target.split(".")
            at = f"{path.relative_to(package.parent)}:{line}"
            if parts[0] != face:
                if room == "analysis" and parts[0] in SHOWING:
                    wrong.append(f"{at}: analysis is numpy and scipy only, not {parts[0]}")
            elif parts[1:] == ["__version__"]:
                continue
            elif target == face or ".".join(parts[:2]) not in modules:
                wrong.append(f"{at}: {room} imports the face of the package, {target}")
            elif parts[1] != room and parts[1] not in ROOMS[room]:
                wrong.append(f"{at}: {room} imports {parts[1]}")
        if room in TORCH_FREE:
            wrong += [
                f"{name} needs {bad}, imported by {by}"
                for bad, by in sorted(reached_from(name, modules).items())
                if bad in TORCH
            ]
    return wrong


def test_imports_go_one_way():
    assert violations(PACKAGE) == []


def test_the_package_is_looked_at():
    assert {"gradscope", "gradscope.errors", "gradscope.record"} <= modules_under(PACKAGE).keys()
    # record imports numpy, and only what is named here
    assert set(reached_from("gradscope.record", modules_under(PACKAGE))) >= {"numpy", "json"}


GOOD = {
    "__init__.py": "if TYPE_CHECKING:\n    from gradscope.scope import watch as watch\n__version__ = '1'",
    "errors.py": "",
    "record.py": "import numpy\nfrom gradscope.errors import RecordError",
    "analysis/__init__.py": "from gradscope.analysis.profile import profile",
    "analysis/profile.py": "from gradscope.record import Record",
    "show/__init__.py": "",
    "show/plots.py": "import matplotlib\nfrom gradscope import analysis, record",
    "layers.py": "import torch\nfrom gradscope.errors import LayerError",
    "statistics.py": "import torch\nfrom . import layers",
    "collect/__init__.py": "",
    "collect/recorder.py": "from ..record import Record\nfrom gradscope import __version__",
    "experiment/__init__.py": "",
    "experiment/measure.py": "from gradscope.collect.recorder import Recorder",
    "reference/__init__.py": "import torch",
    "scope.py": "import gradscope.show.plots\nfrom gradscope.collect import recorder",
    "study/__init__.py": "from gradscope import measure, scope",
    "cli.py": "def main():\n    from gradscope.study import run",
}


def tree(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "gradscope"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    return package


def test_a_tree_that_follows_the_rules_passes(tmp_path):
    assert violations(tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("errors.py", "from gradscope.record import Record", "errors imports record"),
        ("record.py", "import gradscope.analysis.profile", "record imports analysis"),
        ("record.py", "import torch", "gradscope.record needs torch"),
        ("record.py", "from gradscope import analysis", "record imports analysis"),
        ("analysis/profile.py", "from gradscope.show import plots", "analysis imports show"),
        ("analysis/profile.py", "def f():\n    import pandas", "not pandas"),
        ("analysis/profile.py", "import torch.nn", "gradscope.analysis.profile needs torch"),
        ("analysis/profile.py", "def f():\n    from torch import nn", "needs torch"),
        ("analysis/profile.py", "if TYPE_CHECKING:\n    import torch", "needs torch"),
        ("analysis/profile.py", "importlib.import_module('torch')", "needs torch"),
        ("show/plots.py", "from gradscope.layers import Layer", "show imports layers"),
        ("show/plots.py", "from gradscope.layers import Layer", "imported by gradscope.layers"),
        ("show/plots.py", "from ..collect import recorder", "show imports collect"),
        ("layers.py", "from gradscope import statistics", "layers imports statistics"),
        ("layers.py", "from .record import Record", "layers imports record"),
        ("statistics.py", "import gradscope.collect", "statistics imports collect"),
        ("collect/recorder.py", "import gradscope.experiment.measure", "collect imports experiment"),
        ("collect/recorder.py", "from gradscope.analysis import profile", "collect imports analysis"),
        ("collect/recorder.py", "from ..show import plots", "collect imports show"),
        ("experiment/measure.py", "from gradscope.reference import x", "experiment imports reference"),
        ("experiment/measure.py", "from gradscope.show.plots import x", "experiment imports show"),
        ("experiment/measure.py", "from gradscope.scope import watch", "experiment imports scope"),
        ("reference/__init__.py", "import gradscope.study", "reference imports study"),
        ("reference/__init__.py", "import gradscope.cli", "reference imports cli"),
        ("collect/recorder.py", "import gradscope", "the face of the package, gradscope"),
        ("collect/recorder.py", "from gradscope import watch", "the face of the package"),
        ("utilities.py", "", "'utilities' is not known"),
    ],
)
def test_the_check_can_fail(tmp_path, file, text, said):
    wrong = violations(tree(tmp_path, {**GOOD, file: text}))
    assert any(said in sentence for sentence in wrong), wrong
