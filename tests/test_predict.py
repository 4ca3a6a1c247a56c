"""Predictions of a depth that was not built, against laws that are known and nets that are built."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradscope
from gradscope.analysis import LAWS, law


def profiles(depth: int, delta: float, sd: float, seed: int, replicates: int = 5) -> np.ndarray:
    """Norms [R, depth + 1], input end first; Δ per replicate is N(delta, sd²)."""
    rng = np.random.default_rng([seed, depth])
    y = np.linspace(1, 0, depth + 1) * (delta + sd * rng.normal(size=(replicates, 1)))
    return np.exp(y)


TRUTHS: dict[str, Callable[[float], float]] = {
    "constant": lambda depth: -0.4,
    "linear": lambda depth: -0.25 * depth,
    "linear + ends": lambda depth: -2.0 - 0.25 * depth,
    "logarithm": lambda depth: 0.5 * math.log1p(depth),
    "logarithm + ends": lambda depth: 1.5 + 0.5 * math.log1p(depth),
    "root": lambda depth: 0.8 * math.sqrt(depth),
    "root + ends": lambda depth: 1.0 + 0.8 * math.sqrt(depth),
    "power": lambda depth: -0.02 * depth**1.5,
    "saturating": lambda depth: -2 * (1 - math.exp(-depth / 12)),
    "take-off": lambda depth: 0.5 * (math.exp(depth / 24) - 1),
}


def test_every_law_has_a_case() -> None:
    """Three numbers cannot tell a law with ends and a shape from another one: those have none."""
    shaped = {f"{law.name} + ends" for law in LAWS.values() if law.shape}
    every = {name + ends for name in LAWS for ends in ("", " + ends")} - {"constant + ends"}
    assert set(TRUTHS) == every - shaped


@pytest.mark.parametrize("law", TRUTHS)
def test_an_exact_law_is_recovered_and_followed(law: str) -> None:
    truth = TRUTHS[law]
    found = gradscope.predict([profiles(d, truth(d), 1e-5, 0) for d in (6, 12, 24)], 48)
    assert max(found.laws, key=lambda name: found.laws[name]) == law
    assert sum(found.laws.values()) == pytest.approx(1)
    assert found.expected.low <= truth(48) <= found.expected.high
    assert found.expected.estimate == pytest.approx(truth(48), rel=1e-3)
    assert found.single.low <= found.expected.estimate <= found.single.high
    assert found.measured == (6, 12, 24)
    assert found.misfit > 0.01
    assert "extrapolated by a factor of 2" in str(found)


@pytest.mark.parametrize("truth", [TRUTHS["saturating"], TRUTHS["take-off"]])
def test_a_bend_is_not_taken_for_a_line(truth: Callable[[float], float]) -> None:
    """Where a line through the last two depths misses, the interval of all laws holds the truth."""
    sources = [profiles(d, truth(d), 0.01, 1) for d in (6, 12, 24)]
    found = gradscope.predict(sources, 48)
    line = truth(24) + (truth(24) - truth(12)) / 12 * 24
    assert found.expected.low <= truth(48) <= found.expected.high
    assert abs(found.expected.estimate - truth(48)) < abs(line - truth(48))
    only = gradscope.predict(sources, 48, laws=["linear"])
    assert list(only.laws) == ["linear", "linear + ends"]


def test_four_depths_at_which_no_law_bends_are_a_misfit() -> None:
    up_and_down = {6: 1.0, 12: -1.0, 24: 1.0, 36: -1.0}
    found = gradscope.predict([profiles(d, up_and_down[d], 0.05, 0) for d in up_and_down], 48)
    assert found.misfit < 1e-3
    assert any("no law of growth explains" in note for note in found.notes)
    calm = gradscope.predict([profiles(d, -0.1, 0.05, 0) for d in up_and_down], 48)
    assert not any("no law" in note for note in calm.notes)
    assert found.expected.high - found.expected.low > 5 * (calm.expected.high - calm.expected.low)


def test_farther_is_less_sure() -> None:
    sources = [profiles(d, -0.1 * d, 0.06 * math.sqrt(d), 0) for d in (6, 12, 24)]
    found = [gradscope.predict(sources, depth) for depth in (24, 48, 96, 192)]
    widths = [f.expected.high - f.expected.low for f in found]
    assert all(2 * near < far for near, far in itertools.pairwise(widths))


def test_rescaled_changes_have_rescaled_predictions() -> None:
    """Nothing but the sizes relative to each other counts."""
    y = [np.log(profiles(d, -0.1 * d, 0.06 * math.sqrt(d), 0)) for d in (6, 12, 24)]
    one = gradscope.predict([np.exp(each) for each in y], 48)
    ten = gradscope.predict([np.exp(10 * each) for each in y], 48)
    assert ten.expected.low == pytest.approx(10 * one.expected.low, rel=1e-6)
    assert ten.single.high == pytest.approx(10 * one.single.high, rel=1e-6)


def test_a_law_of_ones_own() -> None:
    @law(name="cube root", formula="b·∛L", source="this test", register=False)
    def cube_root(depth: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """Slower than a root."""
        return np.cbrt(depth) * np.ones_like(shape)

    sources = [profiles(d, np.cbrt(d), 1e-4, 0) for d in (6, 12, 24)]
    found = gradscope.predict(sources, 48, laws=["linear", cube_root])
    assert found.laws["cube root"] > 0.9
    assert "cube root" not in LAWS
    with pytest.raises(ValueError, match="no law of growth 'cubic'; the laws are constant, linear"):
        gradscope.predict(sources, 48, laws=["cubic"])


@pytest.mark.parametrize("law", ["constant", "linear", "logarithm", "root", "saturating", "take-off"])
def test_the_intervals_cover_at_least_at_their_rate(law: str) -> None:
    """Δ over replicates like a random walk's: variance .06² per layer; 40 repetitions."""
    truth, size = TRUTHS[law], 40
    one = mean = 0.0
    for seed in range(size):
        sources = [profiles(d, truth(d), 0.06 * math.sqrt(d), seed) for d in (6, 12, 24)]
        found = gradscope.predict(sources, 48)
        new = np.random.default_rng([seed, 99]).normal(truth(48), 0.06 * math.sqrt(48), 50)
        one += float(np.mean((found.single.low <= new) & (new <= found.single.high)))
        mean += found.expected.low <= truth(48) <= found.expected.high
    # Averaging over laws can only widen: no upper bound but 1.
    least = 0.95 - 2 * math.sqrt(0.95 * 0.05 / size)
    assert one / size >= least
    assert mean / size >= least


def test_a_law_that_holds_to_a_tenth_foresees_to_a_tenth() -> None:
    """Every stretch is off by a share N(0, .1²) of the law; replicates alone would claim 1 %."""
    size = 40
    rng = np.random.default_rng(3)
    inside = 0
    for seed in range(size):
        stretches = -0.1 * np.asarray([6, 6, 12, 24]) * (1 + 0.1 * rng.normal(size=4))
        delta = np.cumsum(stretches)
        sources = [profiles(d, delta[i], 1e-3, seed) for i, d in enumerate((6, 12, 24))]
        found = gradscope.predict(sources, 48, laws=["linear"]).expected
        inside += found.low <= delta[3] <= found.high
        assert found.high - found.low < 5
    assert inside / size >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / size)


def test_between_measured_depths_is_no_extrapolation() -> None:
    found = gradscope.predict([profiles(d, -0.1 * d, 0.01, 0) for d in (6, 12, 24)], 18)
    assert found.notes == ()
    assert found.expected.estimate == pytest.approx(-1.8, abs=0.02)


def test_shallower_than_measured_is_an_extrapolation_too() -> None:
    found = gradscope.predict([profiles(d, -0.1 * d, 0.01, 0) for d in (6, 12, 24)], 3)
    assert found.notes == ("extrapolated by a factor of 2 in depth",)
    assert found.expected.low < -0.3 < found.expected.high
    assert found.expected.estimate == pytest.approx(-0.3, abs=0.05)


def test_two_depths_say_what_they_cannot_tell() -> None:
    sources = [profiles(d, -0.1 * d, 0.01, 0) for d in (6, 12, 24)]
    two, three = (gradscope.predict(each, 48) for each in (sources[:2], sources))
    assert any("measure a third" in note for note in two.notes)
    assert two.expected.high - two.expected.low > 3 * (three.expected.high - three.expected.low)


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(gradscope.GradscopeError, match="two or more depths; got 1: 6"):
        gradscope.predict([profiles(6, -1, 0.1, 0), profiles(6, -1, 0.1, 1)], 12)
    with pytest.raises(gradscope.GradscopeError, match="two or more replicates"):
        gradscope.predict([profiles(d, -1, 0.1, 0, 1) for d in (6, 12)], 24)
    zero = profiles(12, -1, 0.1, 0)
    zero[:, 0] = 0
    with pytest.raises(gradscope.GradscopeError, match="no Δ from end to end: exactly 0 at depth 0"):
        gradscope.predict([profiles(6, -1, 0.1, 0), zero], 24)
    two = [profiles(d, -1, 0.1, 0) for d in (6, 12)]
    with pytest.raises(ValueError, match="positive number of blocks"):
        gradscope.predict(two, 0)
    with pytest.raises(gradscope.GradscopeError, match="more than 100 times the deepest measurement"):
        gradscope.predict(two, 1201)
    assert math.isfinite(gradscope.predict(two, 1200).single.high)
    with pytest.raises(TypeError, match="depth= is a number of blocks; got an object of type str"):
        gradscope.predict(two, "48")  # type: ignore[arg-type]


def test_what_is_no_list_of_measurements_is_refused_with_what_to_write() -> None:
    record = measured(6, 0)
    write = r"predict\(\[shallow, deeper, deepest\], 48\)"
    for wrong, seen in (
        (record, "one Record is one measurement"),
        (gradscope.profile(record), "one Profile is one measurement"),
        (profiles(6, -1, 0.1, 0), "one ndarray is one measurement"),
        ({6: record}, "a mapping has no order"),
        ("run.jsonl", "got a str"),
        (48, "got a int"),
    ):
        for call in (lambda x: gradscope.predict(x, 48), gradscope.depth_limit):
            with pytest.raises(TypeError, match=f"{seen}.*{write}"):
                call(wrong)
    with pytest.raises(TypeError, match=r"got a str. Give gradscope.Record.load\(path\)"):
        gradscope.predict(["a.jsonl", "b.jsonl"], 48)
    with pytest.raises(TypeError, match=r"got a DecayFit\. Give the Record itself"):
        gradscope.predict([gradscope.fit_decay(record)] * 2, 48)
    mixed = [gradscope.profile(record), gradscope.profile(measured(12, 0), "grad_rms")]
    with pytest.raises(gradscope.GradscopeError, match="quantities together: grad_l2, grad_rms"):
        gradscope.predict(mixed, 48)


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
    for name in ("constant", "saturating"):
        never = gradscope.depth_limit([profiles(d, TRUTHS[name](d), 1e-4, 0) for d in (6, 12, 24)])
        assert never.estimate == never.high == math.inf
        assert "no turn of the verdict" in str(never)
    sure = gradscope.depth_limit([profiles(d, -0.4, 1e-4, 0) for d in (6, 12, 24)], laws=["saturating"])
    assert sure.low == math.inf


def test_the_depth_limit_is_where_the_prediction_crosses_the_threshold() -> None:
    sources = [profiles(d, -0.1 * d, 0.06 * math.sqrt(d), 0) for d in (6, 12, 24)]
    found = gradscope.depth_limit(sources)
    below, above = (gradscope.predict(sources, d).expected for d in (found.low - 1, found.low))
    assert below.low > -3 >= above.low
    below, above = (gradscope.predict(sources, d).expected for d in (found.high - 1, found.high))
    assert below.high > -3 >= above.high


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
