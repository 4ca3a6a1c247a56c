"""Networks whose gradients are known in closed form, measured through the public interface.

Each test states its formula. Where a value is a mean over random initialisations, it must lie within
three standard errors of the expectation, and the standard error must be small enough (2 % of the value)
for that to say something. Seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradscope


def probe(model: nn.Module, x: Tensor) -> Tensor:
    """A loss whose gradient with respect to the output is a fixed random direction."""
    y = model(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(99), dtype=y.dtype)
    return (y * direction).sum() / math.sqrt(y.numel())


def inputs(batch: int, width: int, seed: int = 7) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(
    make: Callable[[], nn.Module], x: Tensor, replicates: int, **options: object
) -> gradscope.Profile:
    record = gradscope.measure(
        make, x, probe, replicates, dtype=torch.float64, layers="blocks.*", statistics=[], **options
    )
    profile = gradscope.profile(record)
    assert profile.ok.all()
    assert profile.kind == "initialisation"
    assert profile.depth[0] == 0
    return profile


def within_three_standard_errors(samples: np.ndarray, expected: float) -> None:
    """The mean of the samples, which must be known to 2 % of the expected value."""
    error = float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
    assert error <= 0.02 * abs(expected), f"standard error {error}: more seeds"
    assert abs(float(np.mean(samples)) - expected) <= 3 * error, (np.mean(samples), expected, error)


class Chain(nn.Module):
    """L times the same kind of block; the formula of a block is the test's."""

    def __init__(self, block: Callable[[], nn.Module], depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Gaussian(nn.Module):
    """W x with W ~ N(0, variance/n)."""

    def __init__(self, width: int, variance: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) * math.sqrt(variance / width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


# -- case 1: orthogonal weights ----------------------------------------------------------------------


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


# -- case 3: ReLU under He initialisation ------------------------------------------------------------


class He(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) * math.sqrt(2 / width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.weight.T)


def test_relu_under_he_initialisation_drifts_by_its_width() -> None:
    """E r = -5/(4 n) and Var r = 5/(4 n) per layer: a random walk (Hanin 2018, arXiv:1801.03744).

    One sample only: the walk of a batch is the mean over its samples' walks, and narrower.
    """
    width, depth, replicates = 128, 50, 100
    profile = measured(lambda: Chain(lambda: He(width), depth), inputs(1, width), replicates)
    increments = profile.increments
    # The first and the last layer see the input and the loss, which are no layers.
    steps = increments[:, 1:-1].ravel()
    expected = -5 / (4 * width)
    # 2 % of so small a value would take 250 000 layers; this error tells it from 0 six times over.
    error = steps.std(ddof=1) / math.sqrt(len(steps))
    assert error < abs(expected) / 6
    assert abs(steps.mean() - expected) <= 3 * error
    assert steps.var(ddof=1) == pytest.approx(5 / (4 * width), rel=0.1)


# -- case 5: torch's default initialisation ----------------------------------------------------------


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


# -- case 6: branches that are zero ------------------------------------------------------------------


def test_zero_branches_leave_the_gradient_alone() -> None:
    """x + αF(x) with α = 0 is the identity: r = 0 and D = 0, exactly (ReZero, arXiv:2003.04887)."""
    from gradscope import reference

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


# -- case 8: a two-layer ReLU branch -----------------------------------------------------------------


class ReluBranch(nn.Module):
    """x + V relu(W x), W and V ~ N(0, 1/fan_in)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Gaussian(width), Gaussian(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


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


# -- case 10: pre-norm -------------------------------------------------------------------------------


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
    # One sample per network: the end ratio is then one draw per seed.
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
            _pre_norm().double(), _unit_inputs(8), probe_sum, branches="blocks.*.branch"
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
