"""The README's examples run as written, and what it links to exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs_as_written(number: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number], encoding="utf-8")
    # A warning in an example of ours is a fault of ours.
    command = [sys.executable, "-W", "error::UserWarning", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 7


def test_the_commands_for_ci_run_as_written(tmp_path: Path) -> None:
    job, hook = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
    (first,) = re.findall(r"```sh\n(gradscope check .*?)\n```", README)
    steps = [step["run"] for step in job["jobs"]["gradients"]["steps"] if "run" in step]
    (entry,) = (item["entry"] for repo in hook["repos"] for item in repo["hooks"])
    (target,) = (example for example in EXAMPLES if example.startswith("# model_check.py"))
    (tmp_path / "model_check.py").write_text(target, encoding="utf-8")
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
    }
    commands = [first, *(step for step in steps if not step.startswith("pip ")), entry]
    assert len(commands) == 4
    for command in commands:
        done = subprocess.run(
            ["bash", "-e", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert "passed" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert 'failures="0"' in (tmp_path / "gradients.xml").read_text(encoding="utf-8")


def test_what_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_the_tables_are_those_of_the_study() -> None:
    study = (ROOT / "figures" / "study.md").read_text(encoding="utf-8").splitlines()
    shown = README.split("## What the study finds")[1].split("## Limits")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) > 15
    assert [row for row in rows if row not in study] == []


def test_the_calibration_is_that_of_the_benchmark() -> None:
    found = (ROOT / "figures" / "calibration.md").read_text(encoding="utf-8").splitlines()
    shown = README.split("## Know what it means")[1].split("## What is recorded")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 11
    assert [row for row in rows if row not in found] == []


def test_the_costs_are_those_of_the_benchmark() -> None:
    found = (ROOT / "figures" / "overhead.md").read_text(encoding="utf-8").splitlines()
    shown = README.split("## What it costs")[1].split("## Measure an architecture")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) == 16
    assert [row for row in rows if row not in found] == []


def test_the_architectures_are_those_of_the_table() -> None:
    found = (ROOT / "figures" / "architectures.md").read_text(encoding="utf-8")
    right, asked, wrong = (int(n) for n in re.findall(r"(\d+)\s(?:right|asked for|wrong)", found)[:3])
    assert wrong == 0
    assert f"of {right + asked} that could be built, the right\nblocks in {right}" in README
