"""Predictions of a depth that was not built, against laws that are known and nets that are built."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradscope
from gradscope.analysis.predict import LAWS


def profiles(depth: int, delta: float, sd: float, seed: int, replicates: int = 5) -> np.ndarray:
    """Norms [R, depth + 1], input end first; Δ per replicate is N(delta, sd²)."""
    rng = np.random.default_rng([seed, depth])
    y = np.linspace(1, 0, depth + 1) * (delta + sd * rng.normal(size=(replicates, 1)))
    return np.exp(y)


TRUTHS = {
    "constant": lambda depth: -0.4,
    "linear": lambda depth: -0.25 * depth,
    "linear + ends": lambda depth: -2.0 - 0.25 * depth,
    "logarithm": lambda depth: 0.5 * math.log1p(depth),
    "logarithm + ends": lambda depth: 1.5 + 0.5 * math.log1p(depth),
    "root + ends": lambda depth: 1.0 + 0.8 * math.sqrt(depth),
    "three halves + ends": lambda depth: -1.0 + 0.02 * depth**1.5,
}


def test_every_law_has_a_case() -> None:
    assert set(TRUTHS) == set(LAWS)


@pytest.mark.parametrize("law", TRUTHS)
def test_a_law_is_followed_beyond_the_measured_depths(law: str) -> None:
    truth = TRUTHS[law]
    found = gradscope.predict([profiles(d, truth(d), 1e-3, 0) for d in (6, 12, 24)], 48)
    assert max(found.laws, key=lambda name: found.laws[name]) == law
    assert sum(found.laws.values()) == pytest.approx(1)
    assert found.expected.low <= truth(48) <= found.expected.high
    assert found.expected.estimate == pytest.approx(truth(48), rel=0.02)
    assert found.single.low < found.expected.low < found.expected.high < found.single.high
    assert found.measured == (6, 12, 24)
    assert "extrapolated by a factor of 2" in str(found)


@pytest.mark.parametrize("law", ["linear", "logarithm", "constant"])
def test_the_interval_covers_at_least_at_its_rate(law: str) -> None:
    """Δ over replicates like a random walk's: variance .06² per layer; 300 repetitions."""
    truth = TRUTHS[law]
    inside = 0
    for seed in range(300):
        sources = [profiles(d, truth(d), 0.06 * math.sqrt(d), seed) for d in (6, 12, 24)]
        found = gradscope.predict(sources, 48)
        new = np.random.default_rng([seed, 99]).normal(truth(48), 0.06 * math.sqrt(48))
        inside += found.single.low <= new <= found.single.high
    # Averaging over laws can only widen: no upper bound but 1.
    assert inside / 300 >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / 300)


def test_between_measured_depths_is_no_extrapolation() -> None:
    found = gradscope.predict([profiles(d, -0.1 * d, 0.01, 0) for d in (6, 12, 24)], 18)
    assert found.notes == ()
    assert found.expected.estimate == pytest.approx(-1.8, abs=0.02)


def test_two_depths_say_what_they_cannot_tell() -> None:
    found = gradscope.predict([profiles(d, -0.1 * d, 0.01, 0) for d in (6, 12)], 24)
    assert any("measure a third" in note for note in found.notes)


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(gradscope.GradscopeError, match="two or more depths; got 1: 6"):
        gradscope.predict([profiles(6, -1, 0.1, 0), profiles(6, -1, 0.1, 1)], 12)
    with pytest.raises(gradscope.GradscopeError, match="two or more replicates"):
        gradscope.predict([profiles(d, -1, 0.1, 0, 1) for d in (6, 12)], 24)
    zero = profiles(12, -1, 0.1, 0)
    zero[:, 0] = 0
    with pytest.raises(gradscope.GradscopeError, match="no Δ from end to end: exactly 0 at depth 0"):
        gradscope.predict([profiles(6, -1, 0.1, 0), zero], 24)
    with pytest.raises(ValueError, match="positive number of blocks"):
        gradscope.predict([profiles(d, -1, 0.1, 0) for d in (6, 12)], 0)


def test_identical_nets_predict_themselves() -> None:
    """Zero branches at initialisation: Δ = 0 at every depth, without any spread."""
    found = gradscope.predict([np.ones((3, d + 1)) for d in (6, 12, 24)], 48)
    assert found.expected.estimate == 0
    assert gradscope.depth_limit([np.ones((3, d + 1)) for d in (6, 12, 24)]).estimate == math.inf


# -- how deep ----------------------------------------------------------------------------------------


def test_the_depth_limit_is_where_the_law_reaches_three_nats() -> None:
    found = gradscope.depth_limit([profiles(d, -0.1 * d, 1e-3, 0) for d in (6, 12, 24)])
    assert found.word == "vanishing"
    assert found.estimate == pytest.approx(30, abs=1)
    assert found.low <= found.estimate <= found.high
    growing = gradscope.depth_limit([profiles(d, 0.5 * math.log1p(d), 1e-4, 0) for d in (6, 12, 24)])
    assert growing.word == "exploding"
    assert growing.estimate == pytest.approx(math.exp(6) - 1, rel=0.03)
    never = gradscope.depth_limit([profiles(d, -0.4, 0.01, 0) for d in (6, 12, 24)])
    assert never.high == math.inf


class Chain(nn.Module):
    """Orthogonal layers with a gain: ln g per layer, exactly; and some noise on the gain."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(depth))
        for block in self.blocks:
            nn.init.orthogonal_(block.weight, gain=math.exp(-0.1 + 0.02 * torch.randn(()).item()))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def measured(depth: int, seed: int) -> gradscope.Record:
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    return gradscope.measure(
        lambda: Chain(depth), x, lambda m, b: m(b).sum(), 5, seed=seed, dtype=torch.float64
    )


def test_nets_built_on_both_sides_of_the_limit_turn_the_verdict() -> None:
    records = [measured(d, 10 * d) for d in (6, 12, 24)]
    limit = gradscope.depth_limit(records)
    assert limit.low < 30 < limit.high
    below, above = math.floor(limit.low * 0.9), math.ceil(limit.high * 1.1)
    assert above < 60
    assert gradscope.verdict(measured(below, 1)).word == "preserved"
    assert gradscope.verdict(measured(above, 2)).word == "vanishing"
