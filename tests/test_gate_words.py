"""What a gradient check says: widths, order, words that a reader who gets it red can act on."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest

from gradscope.analysis.gate.features import KINDS
from gradscope.analysis.wording import aligned, wrapped
from gradscope.cli.output import columns, plain_where_needed
from gradscope.gate import Change, Outcome, Profile
from gradscope.gate.outcome import MEANINGS

LONG = "transformer.encoder.layers.3.attention.branch.function.query.weight"


def outcome(status: str = "failed", layer: str = "blocks.3", **more: object) -> Outcome:
    profile = Profile(
        name="ln gradient norm along the depth, from the loss (0 at the right)",
        expected=tuple(float(x) for x in range(200)),
        obtained=tuple(float(x) for x in range(200)),
    )
    change = Change(
        layer=layer, feature="rms", expected="-2.3", obtained="-2.0", change=0.3, tolerance=0.02
    )
    fields = {
        "reason": "The same seeds give other values, first at blocks.3.",
        "tier": "same seeds",
        "changes": (change,),
        "profiles": (profile,),
        "resolution": {"flow": 0.05, "act": 0.05, "upd": 0.17, "gup": 0.2, "endpoint": 0.1, "rms": 0.03},
        "notes": ("the same seeds differ by more than rounding explains " * 3,),
        "model": "Transformer",
    }
    return Outcome(status=status, **(fields | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [70, 80, 100, 120, 200])
@pytest.mark.parametrize("layer", ["blocks.3", LONG])
def test_it_fits_the_terminal(layer: str, width: int) -> None:
    lines = outcome(layer=layer).text(width).splitlines()
    own = [line for line in lines if line.strip() == LONG]
    assert max(len(line) for line in lines if line not in own) <= width
    assert sum("▁" in line for line in lines) == 2
    for line in lines:  # a table may be wider than a sentence
        assert len(line) <= 100 or "nat (×" in line or line.strip().startswith("layer")


def test_a_pass_says_its_resolution_in_lines_of_100() -> None:
    other = outcome("passed", changes=(), profiles=())
    assert "upd 0.17" in str(other) and max(map(len, str(other).splitlines())) <= 100
    same = outcome("passed", changes=(), resolution=dict.fromkeys(("flow", "act", "upd"), 0.02))
    assert "0.02 in every feature" in " ".join(str(same).split())


def test_a_mean_over_blocks_names_the_layers_and_the_kind() -> None:
    change = Change(layer="rms blocks.*.query.weight", feature="mean", expected="1", obtained="2")
    assert change.row[:2] == ("blocks.*.query.weight", "mean rms")


def test_what_a_row_is_the_logarithm_of_is_said() -> None:
    """Each kind of feature that is shown, once; exact facts need no words."""
    mean = Change(layer="gup blocks.*", feature="mean", expected="1", obtained="2")
    shown = [*outcome().changes, mean, replace(mean, layer="rms blocks.*.weight")]
    text = " ".join(str(outcome(changes=tuple(shown))).split())
    assert text.count("rms: root mean square of a parameter") == 1
    assert text.count("gup: what the block adds to the gradient") == 1 and "flow:" not in text
    exact = replace(mean, layer="blocks.1.weight", feature="requires_grad")
    assert "logarithms" not in str(outcome(changes=(exact,)))
    assert set(MEANINGS) == set(KINDS) - {"mean"}


def test_a_table_keeps_every_name_whole() -> None:
    head, rows = ("layer", "change"), [(LONG, "+1"), ("h.0", "+2")]
    wide = aligned(head, rows, 200)
    assert len(wide) == 3 and len({line.index("+") for line in wide[1:]}) == 1
    narrow = aligned(head, rows, 40)
    assert [line.strip() for line in narrow] == ["layer", "change", LONG, "+1", "h.0", "+2"]
    assert any(LONG in line for line in wrapped(f"renamed: {LONG}", 40))


def test_signs_that_a_log_lacks_are_written_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    plain_where_needed()
    print(outcome(), flush=True)
    print("Δ ξ → ü", flush=True)
    said = file.getvalue().decode("ascii")
    assert "(x1.35)" in said and "expected 1" in said and "8\n" in said
    assert "Delta xi -> ?" in said


def test_the_width_is_the_terminals_or_a_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    assert columns() == 77
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    assert columns() == 120
