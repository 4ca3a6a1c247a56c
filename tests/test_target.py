"""What a command line measures: the function that a target names."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from gradscope.errors import MeasureError
from gradscope.target import load_target

CODE = """
import torch
from torch import nn

def pair():
    return nn.Linear(2, 1), {"x": 1}

def maker():
    return (lambda: nn.Linear(3, 1)), 4, (lambda model, batch: batch)

def wrong():
    return nn.Linear(2, 1)

def number():
    return 3, 4
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    path = tmp_path / "some_targets.py"
    path.write_text(CODE)
    return path


def test_a_file_and_a_module_of_the_current_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target(f"{file}:pair")
    assert isinstance(target.build(), nn.Linear) and target.batch == {"x": 1} and target.loss is None
    monkeypatch.chdir(file.parent)
    target = load_target("some_targets:maker")
    assert target.build().in_features == 3
    assert target.loss is not None and target.loss(None, target.batch) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "is no target"),
        (":f", "is no target"),
        ("no.such.module:f", "There is no module 'no.such.module'"),
        ("missing.py:f", "There is no file missing.py"),
    ],
)
def test_what_cannot_be_found_is_said(text: str, said: str) -> None:
    with pytest.raises(MeasureError, match=said) as error:
        load_target(text)
    assert "package.module:function" in str(error.value)


def test_what_is_no_target_is_said(file: Path) -> None:
    with pytest.raises(MeasureError, match="no function 'pear'; it has pair, maker, wrong"):
        load_target(f"{file}:pear")
    with pytest.raises(MeasureError, match="returned a Linear"):
        load_target(f"{file}:wrong")
    with pytest.raises(MeasureError, match="model is of type int"):
        load_target(f"{file}:number")


def test_an_import_that_fails_inside_the_module_is_shown_as_it_is(file: Path) -> None:
    file.write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_target(f"{file}:pair")
