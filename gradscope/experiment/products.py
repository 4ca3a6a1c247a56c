"""Norms and inner products of gradients in float64, also where their squares leave its range."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["cosine", "inner", "l2"]


def l2(x: Tensor) -> float:
    """‖x‖, of a gradient of any size: it is divided by its largest entry first. 0 for an empty one."""
    x = x.detach().double()
    largest = float(x.abs().amax()) if x.numel() else 0.0
    if not 0 < largest < math.inf:
        return largest
    return largest * float(torch.sum((x / largest) ** 2).sqrt())


def inner(x: Tensor, y: Tensor) -> Tensor:
    """⟨x, y⟩, summed in float64 on the device; [] float64."""
    return torch.sum(x.detach().double() * y.detach().double())


def cosine(x: Tensor, y: Tensor) -> float:
    """⟨x, y⟩/(‖x‖‖y‖); NaN where one of them is 0 or not finite."""
    x, y = x.detach().double(), y.detach().double()
    heights = [float(t.abs().amax()) if t.numel() else 0.0 for t in (x, y)]
    if not all(0 < height < math.inf for height in heights):
        return math.nan
    x, y = x / heights[0], y / heights[1]
    return float(torch.sum(x * y) / (x.norm() * y.norm()))
