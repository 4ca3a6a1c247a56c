"""Decay fits against closed forms, an independent likelihood, and simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from synthetic import stream_step

import gradscope
from gradscope.analysis import FAMILIES, family
from gradscope.analysis.families import Positions
from gradscope.analysis.least_squares import Problem, fit_family, huber_weights, shrunk_covariance
from gradscope.analysis.walk import NOISE_RATIOS, long_run_variance, noise_covariance, noise_ratio
from gradscope.record import Record


def walks(
    mean: np.ndarray, replicates: int, walk: float, noise: float = 0.0, seed: int = 0
) -> np.ndarray:
    """Gradient norms [R, L + 1], input end first: mean + random walk + noise in the logarithm."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, walk, (replicates, len(mean) - 1))
    y = np.concatenate([np.zeros((replicates, 1)), np.cumsum(steps, 1)], axis=1)
    return np.exp(mean + y + noise * rng.normal(size=y.shape))


def positions(layers: int) -> Positions:
    s = np.arange(layers + 1.0)
    return Positions(s, s[::-1], s)


# -- closed forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, -0.2])
def test_a_geometric_profile_is_exponential_with_its_own_rate(rate: float) -> None:
    """Weights g·Q with Q orthogonal change each gradient by ln g per layer; ξ = 1/(2|ln g|)."""
    depth = np.arange(21.0)
    fit = gradscope.fit_decay(np.exp(np.stack([rate * depth, 3 + rate * depth])))
    assert (fit.status, fit.family) == ("ok", "exponential")
    assert fit.parameters["kappa"].estimate == pytest.approx(rate, abs=1e-12)
    assert fit.parameters["kappa"].high - fit.parameters["kappa"].low < 1e-10
    assert fit.depth_scale.estimate == pytest.approx(1 / (2 * abs(rate)), rel=1e-12)
    assert fit.delta.estimate == pytest.approx(-20 * rate, rel=1e-12)
    assert fit.fitted == pytest.approx(fit.y.mean(0), abs=1e-9)


DEPTH = np.arange(33.0)
BACK = DEPTH[::-1]  # distance from the loss


@pytest.mark.parametrize(
    ("name", "curve", "parameters"),
    [
        ("flat", 0 * DEPTH, {}),
        ("exponential", -0.3 * BACK, {"kappa": 0.3}),
        ("power-in", -0.5 * np.log1p(DEPTH), {"p": 0.5}),
        ("power-out", -1.5 * np.log1p(BACK), {"p": 1.5}),
        ("stretched", BACK**0.5, {"a": 1.0, "beta": 0.5}),
        (
            "exponential + floor",
            0.5 * np.log((1 - 0.01) * np.exp(-2 * 0.4 * BACK) + 0.01),
            {"kappa": 0.4, "f": 0.01},
        ),
        (
            "piecewise",
            -0.2 * np.minimum(BACK, 10) + 0.4 * np.maximum(BACK - 10, 0),
            {"kappa_1": 0.2, "kappa_2": -0.4, "knot": 10.0},
        ),
    ],
)
def test_every_family_is_found_with_its_parameters(
    name: str, curve: np.ndarray, parameters: dict[str, float]
) -> None:
    fit = gradscope.fit_decay(walks(curve, 5, 0.003, seed=4))
    assert fit.family == name
    assert fit.weights[name] > 0.6
    assert sum(fit.weights.values()) == pytest.approx(1)
    for parameter, truth in parameters.items():
        found = fit.parameters[parameter]
        assert found.estimate == pytest.approx(truth, rel=0.06)
        if parameter != "knot":
            assert found.low < found.estimate < found.high
    assert name in str(fit)


def test_activations_are_followed_from_the_input() -> None:
    """Forward: the pass starts at l = 0, and ½ ln of the mean square is the amplitude."""
    depth = np.arange(13.0)
    fit = gradscope.fit_decay(np.exp(2 * 0.25 * depth)[None].repeat(3, 0), "act_mean_square")
    assert fit.forward
    assert fit.family == "exponential"
    assert fit.parameters["kappa"].estimate == pytest.approx(-0.25)
    assert fit.delta.estimate == pytest.approx(0.25 * 12)
    assert fit.depth.tolist() == depth.tolist()


# -- an independent likelihood -----------------------------------------------------------------------


def test_the_deviance_is_that_of_a_multivariate_gaussian() -> None:
    """−2 ln L of the increments under s²(diag(g) + ρDDᵀ), from scipy's own density, per family."""
    z = np.diff(np.log(walks(-0.1 * np.arange(13.0), 4, 0.1, 0.05, seed=1))[:, ::-1], axis=1)
    at = positions(12)
    for ratio in (0.0, 0.3, 3.0, math.inf):
        problem = Problem.of(z, at, ratio=ratio, weights=np.ones_like(z))
        second = 2 * np.eye(12) - np.eye(12, k=1) - np.eye(12, k=-1)
        covariance = second if math.isinf(ratio) else np.eye(12) + ratio * second
        for name in ("flat", "exponential", "power-in"):
            fitted = fit_family(FAMILIES[name], problem)
            assert fitted is not None
            x = {"flat": np.zeros(12), "exponential": -np.ones(12)}.get(name, -np.diff(np.log1p(at.l)))
            inverse = np.linalg.inv(covariance)
            b = 0.0 if name == "flat" else (z.mean(0) @ inverse @ x) / (x @ inverse @ x)
            residual = z - b * x
            variance = np.einsum("ri,ij,rj->", residual, inverse, residual) / z.size
            density = stats.multivariate_normal(np.zeros(12), variance * covariance)
            expected = -2 * density.logpdf(residual).sum() - z.size * (1 + math.log(2 * math.pi))
            assert fitted.deviance == pytest.approx(expected, abs=1e-8)
            if name != "flat":
                assert fitted.coefficients[0] == pytest.approx(b, abs=1e-10)


def test_a_rates_interval_is_students_over_the_replicates_own_rates() -> None:
    """Without measurement noise the rate of a replicate is its mean increment."""
    values = walks(-0.4 * BACK, 4, 0.05, seed=2)
    fit = gradscope.fit_decay(values, families=["exponential"])
    own = np.log(values[:, -1] / values[:, 0]) / 32
    low, high = stats.t.interval(0.95, 3, own.mean(), stats.sem(own))
    found = fit.parameters["kappa"]
    if fit.noise.measurement == 0 and (fit.huber == 1).all():
        assert (found.estimate, found.low, found.high) == pytest.approx((own.mean(), low, high))
    # Whatever the weights, the end-to-end change is the plain one.
    assert -fit.increment.high == pytest.approx(low)
    assert -fit.increment.low == pytest.approx(high)
    assert fit.depth_scale.low == pytest.approx(1 / (2 * high))
    assert fit.depth_scale.high == pytest.approx(1 / (2 * low))


def test_a_depth_scale_is_unbounded_where_no_change_is_possible_too() -> None:
    fit = gradscope.fit_decay(walks(np.zeros(25), 5, 0.1, seed=5))
    assert fit.increment.low < 0 < fit.increment.high
    assert fit.depth_scale.high == math.inf
    assert fit.depth_scale.low == pytest.approx(1 / (2 * max(-fit.increment.low, fit.increment.high)))
    assert "∞]" in str(fit)


def test_the_noise_ratio_is_found_on_many_replicates() -> None:
    rng = np.random.default_rng(0)
    for truth in NOISE_RATIOS:
        covariance = noise_covariance(np.ones(20), truth)
        z = rng.multivariate_normal(np.linspace(-1, 1, 20), covariance, size=400)
        assert noise_ratio(z, np.ones(20)) == truth


def test_the_noise_ratio_knows_gaps() -> None:
    """Positions that were left out make longer increments, not noisier ones."""
    rng = np.random.default_rng(1)
    gaps = np.array([1.0, 3.0, 1.0, 1.0, 5.0, 1.0, 2.0, 1.0, 1.0, 1.0])
    z = rng.multivariate_normal(np.zeros(10), np.diag(gaps), size=400)
    assert noise_ratio(z, gaps) == 0.0


def test_the_long_run_variance_is_the_textbooks() -> None:
    """Newey and West, by the double sum over all pairs of increments within m lags."""
    rng = np.random.default_rng(0)
    shocks = rng.normal(size=60)
    x = shocks.copy()
    for i in range(1, 60):
        x[i] += 0.6 * x[i - 1]
    lags = int(4 * (60 / 100) ** (2 / 9))
    centred = x - x.mean()
    total = 0.0
    for i in range(60):
        for j in range(60):
            if abs(i - j) <= lags:
                total += (1 - abs(i - j) / (lags + 1)) * centred[i] * centred[j]
    assert long_run_variance(x) == pytest.approx(total * 60 / 59)
    alternating = np.array([1.0, -1.0] * 20)  # negative autocorrelation is not believed
    assert long_run_variance(alternating) == pytest.approx(40 * alternating.var(ddof=1))


def test_the_shrunk_covariance_lies_between_sample_and_walk() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(12, 20))
    shrunk = shrunk_covariance(z, np.ones(20), 0.0)
    sample = np.cov(z.T)
    target = np.eye(20) * np.trace(sample) / 20
    # One number λ explains every entry.
    off = ~np.eye(20, dtype=bool)
    share = shrunk[off] / sample[off]
    assert share == pytest.approx(np.full(off.sum(), share[0]))
    assert 0 <= share[0] < 0.5  # independent increments: nearly all of the target
    assert np.linalg.norm(shrunk - np.eye(20)) < np.linalg.norm(sample - np.eye(20))
    assert np.trace(shrunk) == pytest.approx(np.trace(target))
    assert np.linalg.eigvalsh(shrunk).min() > 0


# -- robustness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicates", [1, 5])
def test_one_bad_increment_moves_the_rate_little_and_is_named(replicates: int) -> None:
    """A step in one layer is permanent: the increment loses weight, no layer is dropped."""
    depth = np.arange(25.0)
    broken = np.where(depth >= 9, 0.0, -2.0) + 0.1 * depth
    values = walks(broken, replicates, 0.02, seed=3)
    fit = gradscope.fit_decay(values)
    clean = gradscope.fit_decay(walks(0.1 * depth, replicates, 0.02, seed=3))
    assert fit.family == "exponential"
    assert fit.parameters["kappa"].estimate == pytest.approx(0.1, abs=0.015)
    least_squares = np.polyfit(depth, np.log(values).mean(0), 1)[0]
    assert abs(least_squares - 0.1) > 0.05
    assert len(fit.depth) == 25
    assert fit.delta.estimate == pytest.approx(-4.4, abs=0.2)  # Δ keeps the step: it is there
    assert any("down-weighted: depth 9→8" in note for note in fit.notes)
    assert not any("down-weighted" in note for note in clean.notes)


def test_increments_that_some_family_explains_keep_their_weight() -> None:
    """The steep start of a power law is no outlier."""
    z = np.diff(-0.5 * np.log1p(np.arange(49.0)[::-1]))[None] + np.random.default_rng(0).normal(
        0, 0.01, (3, 48)
    )
    weights = huber_weights(z, positions(48), list(FAMILIES.values()), 0.0)
    assert weights[:, -1].min() == 1.0


# -- what a user meets -------------------------------------------------------------------------------


def test_one_replicate_says_what_it_costs() -> None:
    fit = gradscope.fit_decay(walks(-0.3 * BACK, 1, 0.05)[0])
    assert fit.ok
    assert any("one replicate" in note for note in fit.notes)
    assert fit.parameters["kappa"].estimate == pytest.approx(0.3, abs=0.05)
    assert math.isnan(fit.parameters["kappa"].low)
    assert fit.delta.low < -9.6 < fit.delta.high


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_too_few_layers_are_a_result_and_no_exception(layers: int) -> None:
    fit = gradscope.fit_decay(np.exp(np.arange(layers + 1.0))[None].repeat(3, 0))
    assert not fit.ok
    assert fit.status.startswith("not enough layers")
    assert fit.family == ""
    assert math.isnan(fit.noise.walk)
    assert fit.delta.estimate == pytest.approx(-layers)
    assert "not enough layers" in str(fit)


def test_four_layers_are_enough_with_and_without_the_input() -> None:
    from synthetic import Builder

    builder = Builder()
    for depth in (1, 2, 3, 4):
        builder.module(
            depth,
            f"h.{depth - 1}",
            "output_grad",
            {"l2": math.exp(0.5 * depth), "tokens": 1.0, "count": 8.0, "dot_next": "not sampled"},
        )
    fit = gradscope.fit_decay(Record({"replicates": "run"}, (builder.step(),)))
    assert fit.ok
    assert fit.parameters["kappa"].estimate == pytest.approx(0.5)


def test_absent_positions_are_left_out_and_named() -> None:
    rng = np.random.default_rng(0)
    tensors = [rng.normal(size=(4, 8)) * math.exp(0.2 * depth) for depth in range(11)]
    tensors[5] = np.zeros((4, 8))
    record = Record({"replicates": "initialisation"}, (stream_step(tensors),))
    fit = gradscope.fit_decay(record)
    assert fit.ok
    assert fit.dropped == ("exactly 0 at depth 5",)
    assert 5 not in fit.depth
    assert fit.parameters["kappa"].estimate == pytest.approx(0.2, abs=0.1)


def test_a_family_of_ones_own_can_be_fitted() -> None:
    @family(name="logistic", formula="c − b·tanh(s/10)", source="own", linear=("b",), register=False)
    def logistic(at: Positions, shape: object) -> np.ndarray:
        """Decays and stops."""
        return -np.tanh(at.s / 10)[:, None]

    assert "logistic" not in FAMILIES
    fit = gradscope.fit_decay(walks(-2 * np.tanh(BACK / 10), 4, 0.01), families=["flat", logistic])
    assert fit.family == "logistic"
    assert fit.parameters["b"].estimate == pytest.approx(2, rel=0.05)


def test_families_have_one_place_and_clear_errors() -> None:
    assert list(FAMILIES) == [
        "flat",
        "exponential",
        "power-in",
        "power-out",
        "stretched",
        "exponential + floor",
        "piecewise",
    ]
    for each in FAMILIES.values():
        assert each.meaning and each.source and each.formula
    with pytest.raises(ValueError, match="no family 'expo'; the families are flat, exponential"):
        gradscope.fit_decay(np.ones((2, 9)), families=["expo"])
    with pytest.raises(ValueError, match="already registered"):
        family(name="flat", formula="", source="")(lambda at, shape: np.zeros((len(at.s), 0)))
    with pytest.raises(ValueError, match="negative"):
        gradscope.fit_decay(np.log(walks(-BACK, 2, 0.1)))
    with pytest.raises(gradscope.GradscopeError, match="has no decay"):
        gradscope.fit_decay(np.ones((2, 9)), "token_cosine")


def test_with_ten_replicates_the_covariance_comes_from_them() -> None:
    values = walks(-0.3 * BACK, 12, 0.05)
    assert gradscope.fit_decay(values).covariance == "empirical"
    assert gradscope.fit_decay(values, covariance="random walk").covariance == "random walk"
    assert gradscope.fit_decay(values[:9]).covariance == "random walk"
    with pytest.raises(ValueError, match="needs 10 replicates; there are 5"):
        gradscope.fit_decay(values[:5], covariance="empirical")
    assert gradscope.fit_decay(values).parameters["kappa"].estimate == pytest.approx(0.3, abs=0.02)


def test_a_fit_does_not_depend_on_the_level_or_the_order_of_replicates() -> None:
    values = walks(-0.2 * BACK, 5, 0.1, 0.05, seed=9)
    one = gradscope.fit_decay(values)
    for other in (gradscope.fit_decay(1e-30 * values), gradscope.fit_decay(values[::-1])):
        assert other.family == one.family
        for name, found in one.parameters.items():
            assert other.parameters[name].estimate == pytest.approx(found.estimate, rel=1e-6)
            assert other.parameters[name].low == pytest.approx(found.low, rel=1e-6)
        assert other.delta.low == pytest.approx(one.delta.low, rel=1e-9)


def test_a_flat_profile_without_any_noise_is_flat() -> None:
    fit = gradscope.fit_decay(np.ones((3, 12)))
    assert fit.family == "flat"
    assert fit.delta.estimate == 0
    assert fit.depth_scale.estimate == math.inf


def test_a_short_run_with_a_clear_rate_is_not_called_flat() -> None:
    """Six increments of one replicate: the small-sample penalty must not swallow the evidence."""
    rng = np.random.default_rng(0)
    families = [
        gradscope.fit_decay(np.exp(np.cumsum(rng.normal(0.7, 0.15, 7)))).family for _ in range(20)
    ]
    assert families.count("flat") <= 2


def test_ten_replicates_without_any_spread_are_fitted() -> None:
    assert gradscope.fit_decay(np.ones((10, 13))).family == "flat"


def test_positions_that_are_missing_at_an_end_move_no_origin() -> None:
    """A power of the distance from the loss stays one where the last depths were not recorded."""
    values = walks(-0.5 * np.log1p(BACK), 5, 0.003)
    whole = gradscope.fit_decay(values, families=["power-out"]).parameters["p"]
    values[:, -3:] = np.nan
    cut = gradscope.fit_decay(values, families="power-out").parameters["p"]
    assert whole.estimate == pytest.approx(0.5, abs=0.02)
    assert cut.estimate == pytest.approx(0.5, abs=0.04)
