"""`gradscope check`: exit codes, reports, and what it never overwrites."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gradscope.analysis.gate.tolerance import DEFAULTS, EFFECTIVE_DEPTH
from gradscope.cli import main

TARGET = """
import os
import torch
from gradscope import reference

tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))


def make():
    model = reference.Transformer("pre_norm", depth=4, width=16, heads=2)
    if os.environ.get("PLANTED"):
        model.blocks[2].requires_grad_(False)
    return model


def target():
    return make, (tokens[:, :-1], tokens[:, 1:]), reference.next_token_loss


def broken():
    raise RuntimeError("the data are not here")


def no_model():
    return 3, tokens


def drawn():
    other = torch.randint(256, (2, 9))
    return make, (other[:, :-1], other[:, 1:]), reference.next_token_loss
"""
CHECK = ["check", "model_check.py:target", "--baseline", "gradients.json"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLANTED", raising=False)
    (tmp_path / "model_check.py").write_text(TARGET, encoding="utf-8")
    return tmp_path


@pytest.fixture
def kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main([*CHECK, "--update"]) == 0
    assert "written to gradients.json" in capsys.readouterr().out
    return folder / "gradients.json"


def reports(folder: Path) -> tuple[ElementTree.Element, str]:
    junit = ElementTree.fromstring((folder / "g.xml").read_bytes())
    return junit, (folder / "g.md").read_text(encoding="utf-8")


def test_without_a_baseline_it_is_code_2_and_says_the_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(CHECK) == 2
    said = capsys.readouterr().err
    assert said.startswith("gradscope: There is no baseline gradients.json.")
    assert not (folder / "gradients.json").exists()
    assert shlex.split(said.splitlines()[-1]) == ["gradscope", *CHECK, "--update"]


def test_unchanged_changed_and_accepted(
    folder: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*CHECK, "--junit", "g.xml", "--markdown", "g.md"]
    before = kept.read_bytes()
    assert main(words) == 0
    assert "Transformer: passed" in capsys.readouterr().out
    junit, comment = reports(folder)
    assert (junit.get("tests"), junit.get("failures")) == ("1", "0")
    assert "passed" in (junit.findtext("testcase/system-out") or "")
    assert "passed" in comment and "accept" not in comment

    monkeypatch.setenv("PLANTED", "1")
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "Transformer: failed" in said and "blocks.2" in said
    assert max(map(len, said.splitlines())) <= 140
    again = shlex.split(said.splitlines()[-1])
    assert again == ["gradscope", *words, "--update"]
    junit, comment = reports(folder)
    assert junit.get("failures") == "1"
    failure = junit.find("testcase/failure")
    assert failure is not None and "blocks.2" in (failure.text or "")
    assert "| blocks.2" in comment and shlex.join(again) in comment
    assert kept.read_bytes() == before

    assert main(again[1:]) == 0
    assert "accepted: gradients.json is replaced" in capsys.readouterr().out
    assert reports(folder)[0].get("failures") == "0"
    assert main(CHECK) == 0


def test_a_new_baseline_is_reported_too(folder: Path) -> None:
    words = ["--junit", "reports/new/g.xml", "--markdown", "reports/new/g.md"]
    assert main([*CHECK, "--update", *words]) == 0
    junit, comment = reports(folder / "reports" / "new")
    assert (junit.get("failures"), junit.get("errors")) == ("0", "0")
    assert "written to gradients.json" in comment


@pytest.mark.parametrize(("name", "says"), [("broken", "the data are not here"), ("target", "damaged")])
def test_reports_of_an_error_are_no_older_ones(
    name: str, says: str, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*CHECK, "--junit", "g.xml", "--markdown", "g.md"]
    assert main(words) == 0
    if name == "target":
        kept.write_text("{", encoding="utf-8")
    words[1] = f"model_check.py:{name}"
    assert main(words) == 2
    junit, comment = reports(kept.parent)
    assert (junit.get("failures"), junit.get("errors")) == ("0", "1")
    error = junit.find("testcase/error")
    assert error is not None and says in (error.get("message") or "")
    assert "Traceback" in (error.text or "") or name == "target"
    assert says in comment and "passed" not in comment


def test_a_drawn_batch_is_said_to_be_none_that_can_be_kept(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "model_check.py:drawn", "--baseline", "gradients.json"]) == 1
    assert "the batch must be the same in every run" in capsys.readouterr().out


def test_accepting_leaves_a_baseline_that_holds(kept: Path) -> None:
    before = kept.stat()
    assert main([*CHECK, "--update"]) == 0
    assert kept.stat() == before or kept.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("update", [[], ["--update"]])
@pytest.mark.parametrize("damage", ["{ no json", "newer"])
def test_an_unusable_baseline_is_code_2_and_stays(
    kept: Path, damage: str, update: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.dumps(json.loads(kept.read_text("utf-8")) | {"schema": 999})
    kept.write_text(content if damage == "newer" else damage, encoding="utf-8")
    before = kept.read_bytes()
    assert main([*CHECK, *update]) == 2
    assert ("newer" if damage == "newer" else "damaged") in capsys.readouterr().err
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["check", "model_check.py:target"], "--baseline"),
        ([*CHECK, "--fail-on", "flow"], "tolerance"),
        ([*CHECK, "--fail-on", "flow:20"], "tolerance"),
        (["check", "nowhere.py:target", "--baseline", "gradients.json"], "no file"),
        (["check", "model_check.py:broken", "--baseline", "gradients.json"], "the data are not here"),
        (["check", "model_check.py:no_model", "--baseline", "gradients.json"], "of type int"),
        (["check", "model_check.py:broken", "--baseline", "gradients.json", "--fail-on", "x"], "kind:"),
    ],
)
def test_wrong_usage_and_a_broken_target_are_code_2(
    words: list[str], says: str, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_the_help_lists_every_kind_of_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split()).partition("kinds: ")[2]
    kinds = ", ".join([*DEFAULTS, EFFECTIVE_DEPTH])
    assert said.startswith(kinds)


def test_a_given_tolerance_is_the_smallest_change_that_fails(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = "[p.mul_(1.1) for p in model.blocks[1].parameters()]"
    scaled = f"    with torch.no_grad():\n        {grown}\n    return model\n"
    other = TARGET.replace("    return model\n", scaled, 1)
    (kept.parent / "model_check.py").write_text(other, encoding="utf-8")
    assert main(CHECK) == 1
    kinds = ("flow", "act", "upd", "gup", "endpoint", "delta", "param_grad", "rms", "mean")
    assert main([*CHECK, "--fail-on", ",".join(f"{kind}:2nat" for kind in kinds)]) == 0
