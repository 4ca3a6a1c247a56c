"""The verdict's error rates, small: the large run is tests/benchmarks/calibration.py."""

from __future__ import annotations

import pytest
from benchmarks import calibration, prediction
from benchmarks.calibration import Cell, allowed, cells, rates

import gradscope
from gradscope.reference import VARIANTS

SIMULATIONS = 600
NULL = calibration.THRESHOLD


def some(replicates: int) -> list[Cell]:
    """The corners of the settings: the whole grid is the benchmark's."""
    return [
        Cell(12, replicates, 0.06, 0.0),
        Cell(48, replicates, 0.2, 0.0),
        Cell(24, replicates, 0.06, 0.1),
    ]


def false_rates(settings: list[Cell], simulations: int, seed: int) -> dict[str, list[float]]:
    """Per setting: how often the boundary (true Δ = ∓3) is called the wrong side of it."""
    down = [rates("gradscope", cell, -NULL, simulations, seed) for cell in settings]
    up = [rates("gradscope", cell, NULL, simulations, seed + 1) for cell in settings]
    assert all(d.exploding == 0 and u.vanishing == 0 for d, u in zip(down, up, strict=True))
    return {
        "vanishing": [d.vanishing for d in down],
        "exploding": [u.exploding for u in up],
        "preserved": [r.preserved for r in (*down, *up)],
    }


@pytest.mark.parametrize("replicates", [1, 3, 5])
def test_false_verdicts_on_the_boundary_stay_below_their_rate(replicates: int) -> None:
    """In at most 2.5 % for each word, and two standard errors, over the settings together."""
    rate = 0.05 if replicates == 1 else 0.025
    for shares in false_rates(some(replicates), SIMULATIONS, 11).values():
        assert sum(shares) / len(shares) <= allowed(rate, SIMULATIONS * len(shares)), shares


@pytest.mark.parametrize("replicates", [3, 5])
def test_intervals_cover_at_their_rate(replicates: int) -> None:
    for cell in some(replicates):
        found = rates("gradscope", cell, -NULL, SIMULATIONS, 13)
        assert abs(found.covered - 0.95) <= 0.02 + 2 * (0.95 * 0.05 / SIMULATIONS) ** 0.5, cell


def test_flat_profiles_are_preserved() -> None:
    """In at least 95 %: with five replicates up to walks that change Δ by 1.4 nats from net to net."""
    for cell in (
        Cell(48, 5, 0.06, 0.1),
        Cell(24, 5, 0.2, 0.0),
        Cell(48, 5, 0.2, 0.1),
        Cell(12, 3, 0.06, 0.0),
    ):
        found = rates("gradscope", cell, 0.0, 400, 14)
        assert found.preserved >= 0.95 - 2 * (0.95 * 0.05 / 400) ** 0.5, cell
        assert found.vanishing == found.exploding == 0


def test_correlated_increments_keep_the_error_below_its_bound() -> None:
    """3.9 % of each side at the worst, where Var Δ is four times that of independent increments."""
    for name in ("correlation .05 between all", "one layer 20 times as variable"):
        share = calibration.false_share(name, 48, 5, 1000, 17)
        assert share <= allowed(0.039, 1000), name


def test_the_common_rules_are_wrong_where_the_verdict_is_not() -> None:
    """On the boundary the ratio of endpoints is a coin; a fitted line sees a slope in a flat walk."""
    cell = Cell(24, 5, 0.06, 0.0)
    assert rates("endpoint ratio", cell, -NULL, 200, 15).vanishing > 0.4
    assert rates("least squares", cell, -NULL, 200, 15).vanishing > 0.2
    flat = rates("least squares", cell, 0.0, 200, 16)
    assert flat.drift > 0.5
    assert rates("gradscope", cell, 0.0, 200, 16).drift < 0.1


@pytest.mark.parametrize("curve", calibration.CURVES)
def test_the_family_is_found_at_least_as_often_as_by_the_textbook(curve: str) -> None:
    fits = 40
    cell = Cell(24, 5, 0.06, 0.0)
    ours = calibration.family_rates("gradscope", curve, cell, fits, 17)[curve]
    textbook = calibration.family_rates("GLS, BIC", curve, cell, fits, 17)[curve]
    assert ours >= 0.75 * fits
    assert ours >= textbook - 3


@pytest.mark.slow
@pytest.mark.parametrize("replicates", [1, 3, 5])
def test_every_setting_at_four_thousand_simulations(replicates: int) -> None:
    size = 4000
    rate = 0.05 if replicates == 1 else 0.025
    settings = cells(replicates)
    for shares in false_rates(settings, size, 21).values():
        assert sum(shares) / len(shares) <= allowed(rate, size * len(shares)), shares
        # The largest of so many shares: three standard errors.
        assert max(shares) <= rate + 3 * (rate * (1 - rate) / size) ** 0.5, shares
    if replicates == 5:
        for cell in settings:
            kept = rates("gradscope", cell, 0.0, size, 22).preserved
            assert kept >= 0.95 - 2 * (0.95 * 0.05 / size) ** 0.5, cell
    if replicates > 1:
        for cell in settings:
            for delta in (-NULL, NULL):
                covered = rates("gradscope", cell, delta, size, 23).covered
                assert 0.93 <= covered <= 0.97, (cell, delta, covered)


def test_depth_48_is_predicted_for_a_net_really_built() -> None:
    """One variant, small; all of them in tests/benchmarks/prediction.py."""
    row = prediction.judged("no_skip", 8, 20)
    assert row.single >= 0.85
    assert row.predicted == pytest.approx(row.mean, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_depth_48_is_predicted_at_the_stated_rate(variant: str) -> None:
    """Late in post-norm: its change at 24 blocks is less than five replicates see."""
    row = prediction.judged(variant, 40, 60)
    assert row.single >= (0.88 if variant == "post_norm" else 0.93), row
    assert row.width <= max(5 * 3.92 * row.sd, 1e-12), row


def test_the_bound_of_a_share_is_two_standard_errors() -> None:
    assert allowed(0.025, 4000) == pytest.approx(0.025 + 2 * (0.025 * 0.975 / 4000) ** 0.5)
    assert gradscope.verdict([[1.0] * 5] * 3).word == "preserved"
