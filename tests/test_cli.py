from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import gradscope
from gradscope.cli import main
from gradscope.record import Record, Rows, Step


@pytest.fixture
def record_file(tmp_path: Path) -> Path:
    """Three blocks whose gradient halves per block towards the input, over two steps."""
    entries: list[tuple[str, float, str, str, int, str, str]] = []
    values: list[float] = []
    for depth in range(4):
        layer, kind = (f"blocks.{depth - 1}", "Block") if depth else ("blocks", "Stream")
        for signal in ("activation", "output_grad"):
            for statistic, value in (
                ("l2", 8.0 * 2.0 ** (depth - 3)),
                ("count", 64.0),
                ("tokens", 8.0),
                ("absmax", 2.0),
                ("zeros", 0.0),
                ("nonfinite", 0.0),
                ("dot_next", 1.0),
            ):
                entries.append(("blocks", float(depth), layer, kind, 0, signal, statistic))
                values.append(value)
        entries.append(("blocks", float(depth), layer, kind, 0, "activation", "token_variance"))
        values.append(1.5)
    rows = Rows.of(entries)
    last = [i for i, e in enumerate(entries) if e[1] == 3 and e[6] == "dot_next"]
    absent = dict.fromkeys(last, "not called")
    steps = tuple(Step.of(rows, values, absent, step=s, replicate=0) for s in (0, 7))
    header = {"model": "Toy", "loss_denominator": 1, "replicates": "run"}
    return Record(header, steps).save(tmp_path / "run.jsonl")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gradscope {gradscope.__version__}\n"


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from gradscope.cli import main; code = main(['study', '--help']); "
        "heavy = {'torch', 'matplotlib', 'pandas', 'scipy', 'numpy', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("--out DIR", "--text FILE", "--jobs N", "--full", "Ctrl-C"):
        assert word in run.stdout


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["stdy"],
        ["study", "--jobs", "0"],
        ["study", "--jobs", "two"],
        ["study", "--fu"],
        ["study", "--full", "--tiny"],
        ["show"],
    ],
)
def test_wrong_usage_is_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "usage: gradscope" in capsys.readouterr().err


def test_show_prints_the_layers(record_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(record_file)]) == 0
    shown = capsys.readouterr().out
    assert "step 7" in shown
    assert all(f"{block} {block - 1} " in shown for block in range(1, 4))  # depth, layer
    assert "0.125" in shown  # halved three times from the last block to the trunk's input
    assert main(["show", str(record_file), "--step", "0"]) == 0
    assert "step 0" in capsys.readouterr().out


def test_show_plots_a_quantity(record_file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "grad.png"
    assert main(["show", str(record_file), "--plot", str(picture)]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    variance = tmp_path / "variance.svg"
    assert main(["show", str(record_file), "--plot", str(variance), "--quantity", "act_var"]) == 0
    assert b"<svg" in variance.read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "nowhere.jsonl"], "does not exist"),
        (["show", "."], "folder"),
        (["show", "{record}", "--step", "3"], "step 3"),
        (["show", "{record}", "--plot", "x.docx"], "png"),
        (["show", "{record}", "--plot", "x.png", "--quantity", "grad"], "grad_l2"),
        (["show", "{record}", "--quantity", "act_var"], "--plot"),
        (["show", "{record}", "--plot", "no/such/folder/x.png"], "No such file"),
        (["study", "--text", "nowhere.txt"], "no such file"),
        (["study", "--out", "{record}"], "cannot write"),
    ],
)
def test_bad_input_is_code_2_and_a_message_without_traceback(
    words: list[str],
    says: str,
    record_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.format(record=record_file) for word in words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("gradscope: ")
    assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"run.jsonl"}


def test_a_damaged_record_is_refused_and_left_alone(
    record_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = record_file.read_text(encoding="utf-8").splitlines(keepends=True)
    record_file.write_text("".join([lines[0], lines[1][:50] + "\n", *lines[2:]]), encoding="utf-8")
    before = record_file.read_bytes()
    assert main(["show", str(record_file)]) == 2
    assert "damaged" in capsys.readouterr().err
    assert record_file.read_bytes() == before


def test_a_reader_that_has_enough_is_no_error(record_file: Path) -> None:
    show = subprocess.Popen(
        [sys.executable, "-m", "gradscope.cli", "show", str(record_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert show.stdout is not None
    show.stdout.close()
    _, said = show.communicate(timeout=60)
    assert (show.returncode, said) == (0, "")


def test_diagnose_prints_findings_and_verdicts(
    record_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", str(record_file)]) == 0
    out = capsys.readouterr().out
    assert "Toy, steps 0–7: healthy" in out
    assert "grad_l2 over blocks: inconclusive. Not enough layers: 3" in out
    assert "act_mean_square over blocks: inconclusive" in out


def test_diagnose_of_an_empty_record_does_not_end_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gradscope.record import Rows, Step

    path = Record({"model": "Toy"}, (Step.of(Rows.of([]), [], {}, step=0, replicate=0),)).save(
        tmp_path / "empty.jsonl"
    )
    assert main(["diagnose", str(path)]) == 1
    assert "Toy, step 0: nothing recorded" in capsys.readouterr().out


def test_diagnose_ends_with_one_where_something_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import math

    import numpy as np
    from synthetic import stream_step

    rng = np.random.default_rng(0)
    steps = tuple(
        stream_step(
            [rng.normal(size=(8, 16)) * math.exp(0.5 * depth) for depth in range(13)], replicate=r
        )
        for r in range(5)
    )
    header = {"model": "Toy", "replicates": "initialisation", "dtype": "float64"}
    path = Record(header, steps).save(tmp_path / "bad.jsonl")
    assert main(["diagnose", str(path)]) == 1
    out = capsys.readouterr().out
    assert "CRITICAL vanishing gradient" in out
    assert "grad_l2 over h: vanishing" in out
    assert main(["diagnose", str(path), "--trunk", "none"]) == 2
    assert "no trunk 'none'" in capsys.readouterr().err
