"""Chains of equal blocks and what measures them, for tests against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import gradscope
from gradscope.analysis import Profile


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


class ReluBranch(nn.Module):
    """x + V relu(W x), W and V ~ N(0, 1/fan_in)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Gaussian(width), Gaussian(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def inputs(batch: int, width: int, seed: int = 7) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probe(model: nn.Module, x: Tensor) -> Tensor:
    """A loss whose gradient with respect to the output is a fixed random direction."""
    y = model(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(99), dtype=y.dtype)
    return (y * direction).sum() / math.sqrt(y.numel())


def fresh_probe(model: nn.Module, x: Tensor) -> Tensor:
    """As `probe`, with another direction for every replicate: `measure` seeds the generator for each."""
    y = model(x)
    return (y * torch.randn_like(y)).sum() / math.sqrt(y.numel())


def measured(
    make: Callable[[], nn.Module],
    x: Tensor,
    replicates: int,
    loss: Callable[[nn.Module, Tensor], Tensor] = probe,
) -> Profile:
    """The gradient flow of a `Chain`, in float64, from its input on."""
    record = gradscope.measure(
        make, x, loss, replicates, dtype=torch.float64, layers="blocks.*", statistics=[]
    )
    profile = gradscope.profile(record)
    assert profile.ok.all()
    assert profile.kind == "initialisation"
    assert profile.depth[0] == 0
    return profile


def standard_error(samples: np.ndarray) -> float:
    return float(np.std(samples, ddof=1)) / math.sqrt(samples.size)


def within_three_standard_errors(samples: np.ndarray, expected: float, relative: float = 0.02) -> None:
    """The mean of the samples, which must be known to 2 % (or so) of the expected value."""
    error = standard_error(samples)
    assert error <= relative * abs(expected), f"standard error {error}: more seeds"
    assert abs(float(np.mean(samples)) - expected) <= 3 * error, (np.mean(samples), expected, error)
