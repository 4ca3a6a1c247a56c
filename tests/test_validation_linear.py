"""Chains without skips whose gradients are known in closed form, through the public interface.

Each test states its formula. Where a value is a mean over random initialisations, it must lie within
three standard errors of the expectation, and the standard error must be small enough (2 % of the value)
for that to say something. Seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chains import (
    Chain,
    Gaussian,
    fresh_probe,
    inputs,
    measured,
    probe,
    standard_error,
    within_three_standard_errors,
)
from scipy.special import digamma, polygamma
from scipy.stats import binom
from torch import Tensor, nn

import gradscope

# -- orthogonal weights ------------------------------------------------------------------------------


class Orthogonal(nn.Module):
    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        weight = nn.init.orthogonal_(torch.empty(width, width, dtype=torch.float64), gain)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_orthogonal_weights_scale_each_gradient_by_their_gain() -> None:
    """r = ln gain in every layer: an isometry times a number (Saxe et al. 2014, arXiv:1312.6120)."""
    profile = measured(lambda: Chain(lambda: Orthogonal(32, 0.95), 50), inputs(4, 32), 2)
    assert 50 * math.log(0.95) == pytest.approx(-2.564664719378, abs=1e-12)
    assert profile.delta().estimate == pytest.approx(50 * math.log(0.95), abs=1e-9)
    assert profile.delta_per_replicate == pytest.approx([50 * math.log(0.95)] * 2, abs=1e-9)
    assert profile.increments == pytest.approx(np.full((2, 50), math.log(0.95)), abs=1e-9)


# -- random walks: Gaussian weights ------------------------------------------------------------------


def _increments(block: type[nn.Module], width: int, depth: int, replicates: int) -> np.ndarray:
    """r_l [replicates, depth] of one sample under a fresh direction of the loss.

    One sample: the walk of a batch is the mean over its samples' walks, and narrower.
    """

    def make() -> nn.Module:
        # Only the flow is asked for; gradients of the weights would cost a third of the time.
        return Chain(lambda: block(width), depth).requires_grad_(False)

    increments = measured(make, inputs(1, width), replicates, fresh_probe).increments
    assert increments.shape == (replicates, depth)
    return increments


def _is_a_walk(increments: np.ndarray) -> None:
    """Neighbouring increments are uncorrelated."""
    centred = increments - increments.mean()
    correlation = (centred[:, 1:] * centred[:, :-1]).mean() / centred.var()
    assert abs(correlation) <= 3 / math.sqrt(centred[:, 1:].size)


def gaussian_law(width: int) -> tuple[float, float]:
    """Mean and standard deviation of r for W ~ N(0, 1/n): ‖Wᵀδ‖² = ‖δ‖²·χ²_n/n, exactly."""
    mean = 0.5 * (digamma(width / 2) + math.log(2 / width))
    return float(mean), 0.5 * math.sqrt(polygamma(1, width / 2))


def test_the_law_of_gaussian_layers_in_numbers() -> None:
    assert gaussian_law(128) == pytest.approx((-0.00392, 0.06274), abs=5e-6)
    # A Monte Carlo of the χ² itself, without a network.
    draws = 0.5 * np.log(np.random.default_rng(0).chisquare(4, 400_000) / 4)
    assert gaussian_law(4) == pytest.approx((draws.mean(), draws.std()), abs=0.003)


def test_gaussian_layers_drift_by_a_digamma() -> None:
    """E r = ½[ψ(n/2) + ln(2/n)], sd r = ½√ψ'(n/2); narrow, so that 2 % tells it from −1/(2n)."""
    mean, deviation = gaussian_law(4)
    increments = _increments(Gaussian, width=4, depth=50, replicates=480)
    within_three_standard_errors(increments, mean)
    assert abs(increments.mean() + 1 / (2 * 4)) > 3 * standard_error(increments)
    assert increments.std(ddof=1) == pytest.approx(deviation, rel=0.02)
    _is_a_walk(increments)


def test_wide_gaussian_layers_step_by_half_the_root_of_a_trigamma() -> None:
    increments = _increments(Gaussian, width=128, depth=50, replicates=160)
    mean, deviation = gaussian_law(128)
    assert increments.std(ddof=1) == pytest.approx(deviation, rel=0.05)
    # The mean to 2 % is the slow test's; here the error is a fifth of the value.
    within_three_standard_errors(increments, mean, relative=0.2)


@pytest.mark.slow
def test_wide_gaussian_layers_drift_by_a_digamma() -> None:
    mean, deviation = gaussian_law(128)
    increments = _increments(Gaussian, width=128, depth=50, replicates=13_200)
    within_three_standard_errors(increments, mean)
    assert increments.std(ddof=1) == pytest.approx(deviation, rel=0.01)
    _is_a_walk(increments)


# -- random walks: ReLU under He initialisation ------------------------------------------------------


class He(nn.Module):
    """relu(W x), W ~ N(0, 2/n)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) * math.sqrt(2 / width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.weight.T)


def he_law(width: int) -> tuple[float, float]:
    """Mean and variance of r under an isotropic direction of the loss, exactly.

    Unit i is active with probability ½, independently. Its weights w_i, given that they make it active,
    times the random sign of δ_i, are Gaussian again: Wᵀ D δ ~ N(0, (2/n) Σ_active δ_i²) in every
    direction, independent of everything below. So ‖Wᵀ D δ‖² = ‖δ‖²·(2/n)·χ²_n·Beta(K/2, (n − K)/2), with
    K ~ Binomial(n, ½) active units, and the increments of different layers are independent:
    E r = ½[ln(4/n) + E ψ(K/2)], Var r = ¼[E ψ'(K/2) + Var ψ(K/2)]. To first order −5/(4n) and 5/(4n)
    (Hanin 2018, arXiv:1801.03744, for the variance's dependence on depth over width).

    Given K > 0: a layer without an active unit has no gradient.
    """
    k = np.arange(1, width + 1)
    weight = binom.pmf(k, width, 0.5) / (1 - 0.5**width)
    psi = digamma(k / 2)
    mean = float(weight @ psi)
    variance = weight @ polygamma(1, k / 2) + weight @ (psi - mean) ** 2
    return 0.5 * (math.log(4 / width) + mean), 0.25 * float(variance)


def test_the_law_of_relu_layers_in_numbers() -> None:
    """Against layers of plain numpy, and against the first order in 1/n."""
    width, count = 6, 40_000
    random = np.random.default_rng(0)
    h, delta = np.ones(width), random.normal(size=(count, width))
    weight = random.normal(size=(count, width, width)) * math.sqrt(2 / width)
    below = np.einsum("si,sij->sj", delta * (weight @ h > 0), weight)
    alive = (below != 0).any(1)
    r = np.log(np.linalg.norm(below[alive], axis=1) / np.linalg.norm(delta[alive], axis=1))
    mean, variance = he_law(width)
    assert abs(r.mean() - mean) <= 3 * standard_error(r)
    assert r.var() == pytest.approx(variance, rel=0.05)
    for n in (1000, 4000):
        assert he_law(n) == pytest.approx((-5 / (4 * n), 5 / (4 * n)), rel=4 / n)


def test_relu_under_he_initialisation_drifts_by_its_width() -> None:
    """A random walk, at a width whose drift 2 % tells from its first order −5/(4n)."""
    mean, variance = he_law(20)
    increments = _increments(He, width=20, depth=50, replicates=860)
    within_three_standard_errors(increments, mean)
    assert abs(increments.mean() + 5 / (4 * 20)) > 3 * standard_error(increments)
    assert increments.var(ddof=1) == pytest.approx(variance, rel=0.05)
    _is_a_walk(increments)


@pytest.mark.slow
def test_wide_relu_under_he_initialisation_drifts_by_its_width() -> None:
    """At n = 128 the first order, E r = −5/(4n) and Var r = 5/(4n), is right to 1.3 % and 3 %."""
    mean, variance = he_law(128)
    increments = _increments(He, width=128, depth=50, replicates=5_300)
    within_three_standard_errors(increments, mean)
    assert increments.var(ddof=1) == pytest.approx(variance, rel=0.03)
    first = -5 / (4 * 128)
    assert abs(increments.mean() - first) <= 3 * standard_error(increments) + 0.01 * abs(first)
    assert increments.var(ddof=1) == pytest.approx(-first, rel=0.1)
    _is_a_walk(increments)


# -- torch's default initialisation ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relu", "expected"),
    [(False, -0.5 * math.log(3)), (True, -0.5 * math.log(6))],
    ids=["linear", "relu"],
)
def test_torch_default_linears_lose_half_a_log_of_three_or_six(relu: bool, expected: float) -> None:
    """Var W = 1/(3 n), and a ReLU halves the energy: r = ½ ln(1/3), ½ ln(1/6)."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 256), nn.ReLU()) if relu else nn.Linear(256, 256)

    profile = measured(lambda: Chain(block, 12), inputs(8, 256), 8)
    assert profile.mean_increment().estimate == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_the_same_in_a_plain_sequential(relu: bool) -> None:
    """The depth axis of a plain stack is found without being named, from its input on."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(12):
            layers += [nn.Linear(256, 256), nn.ReLU()] if relu else [nn.Linear(256, 256)]
        return nn.Sequential(*layers)

    record = gradscope.measure(make, inputs(8, 256), probe, 8, dtype=torch.float64, statistics=[])
    profile = gradscope.profile(record)
    assert profile.depth.tolist() == list(range(13))
    assert profile.mean_increment().estimate == pytest.approx(-0.5 * math.log(6 if relu else 3), abs=0.01)
