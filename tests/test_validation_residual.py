"""Residual chains whose gradients are known in closed form, through the public interface.

As in `test_validation_linear`: each test states its formula, and means over random initialisations
must lie within three standard errors of the expectation, known to 2 % or better. Seeds are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from chains import (
    Chain,
    Gaussian,
    ReluBranch,
    fresh_probe,
    inputs,
    measured,
    probe,
    within_three_standard_errors,
)
from torch import Tensor, nn

import gradscope
from gradscope import reference

# -- branches that are zero --------------------------------------------------------------------------


def test_zero_branches_leave_the_gradient_alone() -> None:
    """x + αF(x) with α = 0 is the identity: r = 0 and D = 0, exactly (ReZero, arXiv:2003.04887)."""
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1], tokens[:, 1:]

    def make() -> nn.Module:
        return reference.Transformer("rezero", depth=6, width=32)

    record = gradscope.measure(make, batch, reference.next_token_loss, 3, dtype=torch.float64)
    profile = gradscope.profile(record)
    assert profile.depth.tolist() == list(range(7))
    assert np.all(profile.increments == 0)
    depth = gradscope.effective_depth(make().double(), batch, reference.next_token_loss)
    assert depth.status == "ok"
    assert depth.branches == 12
    assert depth.value == 0
    assert np.all(depth.per_sample == 0)


# -- a linear branch ---------------------------------------------------------------------------------


class LinearBranch(nn.Module):
    """x + √a W x, W ~ N(0, 1/n)."""

    def __init__(self, width: int, a: float) -> None:
        super().__init__()
        self.branch = Gaussian(width, a)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.mark.parametrize("depth", [4, 16, 64])
def test_linear_branches_of_one_over_depth_multiply_the_energy_by_e(depth: int) -> None:
    """E‖δ_0‖²/‖δ_L‖² = E‖h_L‖²/‖h_0‖² = (1 + a)^L exactly, at any width; with a = 1/L it tends to e.

    The cross term 2√a⟨δ, Wᵀδ⟩ is 0 in the mean (scaling of branches by 1/√L: Hayou et al. 2021,
    arXiv:2010.12859).
    """
    width = 64
    # As many samples as features: the cross terms of a batch average out, and 1 % takes few networks.
    record = gradscope.measure(
        lambda: Chain(lambda: LinearBranch(width, 1 / depth), depth),
        inputs(width, width),
        fresh_probe,
        100,
        dtype=torch.float64,
        layers="blocks.*",
        statistics=[],
    )
    expected = (1 + 1 / depth) ** depth
    gradients = gradscope.profile(record)
    assert gradients.depth.tolist() == list(range(depth + 1))
    backward = np.exp(2 * gradients.delta_per_replicate)
    within_three_standard_errors(backward, expected, relative=0.01)
    # An energy, read along the pass: Δ is that of the first position over the last.
    forward = np.exp(-gradscope.profile(record, "act_mean_square").delta_per_replicate)
    within_three_standard_errors(forward, expected, relative=0.01)
    if depth == 64:
        assert expected == pytest.approx(math.e, rel=0.008)
        assert backward.mean() == pytest.approx(math.e, rel=0.03)


# -- a two-layer ReLU branch -------------------------------------------------------------------------


def test_a_relu_branch_multiplies_the_energy_by_three_halves_both_ways() -> None:
    """‖h‖² and ‖δ‖² both grow by 1.5 per block (Xiong et al. 2020, arXiv:2002.04745, without norms)."""
    width, depth, replicates = 256, 8, 12
    record = gradscope.measure(
        lambda: Chain(lambda: ReluBranch(width), depth),
        inputs(4, width),
        probe,
        replicates,
        dtype=torch.float64,
        layers="blocks.*",
    )
    backward = gradscope.profile(record)
    t = record.table(signal="activation", statistic="l2", type={"Stream", "ReluBranch"})
    energy = np.array(
        [
            [
                t["value"][(t["replicate"] == r) & (t["depth"] == level)].item() ** 2
                for level in range(depth + 1)
            ]
            for r in range(replicates)
        ]
    )
    forward = (energy[:, -1] / energy[:, 0]).mean() ** (1 / depth)
    assert forward == pytest.approx(1.5, rel=0.02)
    gradient = (np.exp(backward.delta_per_replicate) ** 2).mean() ** (1 / depth)
    assert gradient == pytest.approx(1.5, rel=0.02)


# -- pre-norm ----------------------------------------------------------------------------------------


class PreNormBranch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Gaussian(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * x.square().mean(-1, keepdim=True).rsqrt())


class PreNormBlock(nn.Module):
    """x + W rmsnorm(x), W ~ N(0, 1/n)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = PreNormBranch(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


L = 32


def _pre_norm() -> nn.Module:
    return Chain(lambda: PreNormBlock(192), L)


def test_pre_norm_gradients_follow_the_inverse_square_root_of_depth() -> None:
    """‖δ_l‖² ∝ 1/(1+l): the end ratio of the energies is L + 1."""
    # One end ratio per network.
    profile = measured(_pre_norm, _unit_inputs(8), 48)
    ratios = np.exp(2 * profile.delta_per_replicate)
    within_three_standard_errors(ratios, L + 1)
    energy = (profile.value**2 / profile.value[:, -1:] ** 2).mean(0) / (L + 1)
    assert energy == pytest.approx(1 / (1 + np.arange(L + 1)), rel=0.15)


def _unit_inputs(batch: int) -> Tensor:
    x = inputs(batch, 192)
    return x * x.square().mean(-1, keepdim=True).rsqrt()


def test_the_effective_depth_of_pre_norm_is_a_harmonic_number() -> None:
    """D = H_{L+1} - 1: branch l carries 1/(l+1) of the gradient that passes it."""
    found: list[float] = []
    for seed in range(32):
        torch.manual_seed(seed)
        depth = gradscope.effective_depth(
            _pre_norm().double(), _unit_inputs(8), probe_sum, modules="blocks.*.branch"
        )
        assert depth.status == "ok"
        assert depth.branches == L
        found.append(depth.value)
    harmonic = sum(1 / k for k in range(1, L + 2))
    assert harmonic - 1 == pytest.approx(3.089, abs=5e-4)
    within_three_standard_errors(np.array(found), harmonic - 1)


def probe_sum(model: nn.Module, x: Tensor) -> Tensor:
    """As `probe`, but every sample has the same direction, so that a copied batch is copied."""
    y = model(x)
    direction = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(99), dtype=y.dtype)
    return (y * direction).sum()
