"""The notebooks run as they are, and what they show is what they were saved with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def _read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def _printed(notebook: Any) -> list[str]:
    """What each cell printed or returned, without pictures."""
    found: list[str] = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return found


def test_there_is_one() -> None:
    assert [path.name for path in NOTEBOOKS] == ["effective_depth.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_executed_and_small(path: Path) -> None:
    assert path.stat().st_size < 400_000
    cells = [cell for cell in _read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a notebook shows its pictures
    notebook = _read(path)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    fresh, saved = _printed(notebook), _printed(_read(path))
    assert len(fresh) == len(saved)
    # What does not depend on the last digits of a training run on this machine.
    assert fresh[:2] == saved[:2]
