"""Rules on the profile over depth, against chains with a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from planted import Chain, gained, measured, one_gain, only, orthogonal, read, reasons, transformer
from synthetic import flat_record

import gradscope
from gradscope.analysis.diagnosis import (
    diagnose,
)


@pytest.mark.parametrize(
    ("gain", "names"),
    [
        (0.5, {"vanishing", "forward_vanishing"}),
        (2.0, {"exploding", "forward_exploding"}),
        (1.0, set()),
    ],
)
def test_vanishing_and_exploding_in_closed_form(gain: float, names: set[str]) -> None:
    diagnosis = gained(gain)
    found = {f.rule: f for f in diagnosis.findings if f.rule.endswith(("vanishing", "exploding"))}
    assert set(found) == names
    for name, finding in found.items():
        assert finding.value == pytest.approx(8 * math.log(gain), rel=1e-4)
        assert finding.layers == (("blocks.7",) if name.startswith("forward") else ("input of blocks.0",))
        assert abs(finding.threshold) == 3.0


def test_vanishing_without_skips() -> None:
    diagnosis = read(transformer("no_skip"))
    assert only(diagnosis, "vanishing").severity == "critical"
    healthy = read(transformer("skip"))
    assert not healthy.of("vanishing")


def test_inconclusive_is_no_finding_but_said() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 1.5, (3, 9)).cumsum(1))
    record = flat_record(norms)
    found = gradscope.verdict(record)
    assert found.word == "inconclusive" and found.delta.low < -3 and found.delta.high > 3
    diagnosis = diagnose(record)
    assert not diagnosis.of("vanishing") and not diagnosis.of("exploding")
    for name in ("vanishing", "exploding"):
        assert "inconclusive, Δ = " in reasons(diagnosis, name)
    # Between vanishing and preserved: that it does not explode is known.
    falls = np.exp(np.outer([2.5, 3.0, 3.5], np.linspace(0, 1, 9)))
    diagnosis = diagnose(flat_record(falls))
    assert "inconclusive" in reasons(diagnosis, "vanishing")
    assert not reasons(diagnosis, "exploding") and not diagnosis.of("exploding")


@pytest.mark.parametrize("gain", [20.0, 1 / 20])
def test_one_layer_off_names_it(gain: float) -> None:
    found = only(one_gain(gain), "one_layer_off")
    assert found.layers == ("blocks.5",)
    assert found.value == pytest.approx(math.log(gain / 0.9), rel=1e-4)
    # Gradient and activation are off in the same block: one finding.
    assert "the gradient" in found.message and "the activation" in found.message


def test_one_layer_off_explains_the_explosion() -> None:
    diagnosis = diagnose(
        measured(lambda: Chain(*(orthogonal(90.0 if k == 5 else 1.0) for k in range(10))))
    )
    exploding = diagnosis.of("exploding") + diagnosis.of("forward_exploding")
    for finding in exploding:
        assert finding.because_of is not None
        assert diagnosis.findings[finding.because_of].rule == "one_layer_off"
