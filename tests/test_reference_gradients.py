"""The reference models keep their gradients: guarded by gradscope's own baselines, beside this file."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from gradscope import reference
from gradscope.pytest_plugin import GradientBaseline


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm"])
def test_reference_model(
    variant: Literal["pre_norm", "post_norm"], gradient_baseline: GradientBaseline
) -> None:
    tokens = torch.arange(2 * 17).mul(37).remainder(64).reshape(2, 17)
    gradient_baseline.check(
        lambda: reference.Transformer(variant, depth=6, width=32, heads=2, vocabulary=64, context=16),
        (tokens[:, :-1], tokens[:, 1:]),
        reference.next_token_loss,
    )
