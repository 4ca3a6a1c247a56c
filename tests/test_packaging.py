"""What is installed is what the project says it is."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import gradscope

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> dict[str, str]:
    """The floor of each direct dependency, those of the test extra too."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    matches = [re.fullmatch(r"([A-Za-z0-9-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in lines]
    assert all(matches), lines
    return {m[1]: m[2] for m in matches if m}


def pins() -> dict[str, str]:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split("+")[0].split("."))


def test_installed_under_its_own_name():
    distribution = importlib.metadata.distribution("torch-gradscope")
    assert distribution.version == gradscope.__version__
    scripts = distribution.entry_points.select(group="console_scripts")
    assert {s.name: s.value for s in scripts} == {"gradscope": "gradscope.cli:main"}


def test_the_pytest_plugin_is_on_by_installation():
    entry = PROJECT["project"]["entry-points"]["pytest11"]
    # One name for the installed plugin and for `-p`, or pytest would find two.
    assert entry == {"gradscope.pytest_plugin": "gradscope.pytest_plugin"}


def test_the_command_is_there():
    from gradscope.cli import main

    assert callable(main)


def test_the_package_is_typed():
    assert (Path(gradscope.__file__).parent / "py.typed").is_file()


def test_every_direct_dependency_is_pinned_above_its_floor():
    floors, pinned = requirements(), pins()
    assert pinned.keys() >= floors.keys()
    for name, floor in floors.items():
        assert numbers(pinned[name]) >= numbers(floor), name


def test_no_pin_names_a_build():
    assert not [name for name, version in pins().items() if "+" in version]


def test_the_torch_floor_is_the_version_that_was_tested():
    assert requirements()["torch"] == pins()["torch"] == "2.13.0"


def test_the_changelog_knows_this_version():
    assert gradscope.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_built_file_is_kept():
    if not (ROOT / ".git").exists():
        pytest.skip("not in a checkout")
    command = ["git", "ls-files"]
    kept = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    built = (".so", ".pyd", ".dylib", ".o", ".pyc", ".whl")
    assert [name for name in kept.splitlines() if name.endswith(built)] == []


def test_nobody_is_told_to_install_another_project():
    # The plain name belongs to someone else on the package index.
    files = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "gradscope").rglob("*.py")]
    wrong = re.compile(r"pip install (?:-U |--upgrade )?[\"']?gradscope\b")
    assert [str(f) for f in files if f.exists() and wrong.search(f.read_text(encoding="utf-8"))] == []
