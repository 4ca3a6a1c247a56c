"""What must not change what is said: the loss's reduction and the batch size; and models of few layers.

A loss that is summed is N times the mean over its N terms, exactly, and a batch that is repeated k times
has k times the terms. Nothing that is judged may depend on either.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_models import Block, Stack, assert_equal, assert_true, batch, sgd, square_loss, truth, value
from small_models import no_faults as no_faults  # a fixture of every test here
from torch import Tensor, nn

import gradscope
from gradscope.errors import LayerError, QuantityError
from gradscope.record import Record

BLOCKS = 8
TERMS = 5 * 4 * 2  # of the loss on one batch


class Weak(Block):
    """Its output is a third of its input's size: the gradient vanishes over eight of them."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.3 * super().forward(x)


def deep(kind: type[Block]) -> Stack:
    torch.manual_seed(0)
    return Stack(*(kind() for _ in range(BLOCKS))).double()


def summed(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def watched(model: nn.Module, loss: Any, x: Tensor, *, denominator: float | None = None) -> Record:
    with gradscope.watch(model) as scope:
        loss(model, x).backward()
        scope.step(loss_denominator=denominator)
    return scope.record


@pytest.mark.parametrize("kind", [Block, Weak])
@pytest.mark.parametrize("change", ["summed", "64 times the batch", "both"])
def test_reduction_and_batch_size_change_no_judgement(change: str, kind: type[Block]) -> None:
    x = batch()
    loss = square_loss if change == "64 times the batch" else summed
    larger = x if change == "summed" else x.repeat(64, 1, 1)
    before, after = watched(deep(kind), square_loss, x), watched(deep(kind), loss, larger)
    # By hand: a parameter's gradient is that of the sum, an output's has one row per sample.
    terms = TERMS * (1 if change == "summed" else 64)
    factor = {"summed": TERMS, "64 times the batch": 1, "both": terms}[change]
    rows = {"summed": TERMS, "64 times the batch": 64**-0.5, "both": TERMS * 64**0.5}[change]
    for k in range(BLOCKS):
        name = f"blocks.{k}"
        old, new = (value(r, name, "output_grad") for r in (before, after))
        assert_equal(new, rows * old)
        old, new = (value(r, f"{name}.mlp.0.weight", "param_grad") for r in (before, after))
        assert_equal(new, factor * old)

    for quantity in ("grad_l2", "param_grad", "act_var"):
        old, new = (gradscope.profile(r, quantity).increments for r in (before, after))
        # Of a variance the denominator is N − 1, which is another share of another N.
        assert np.allclose(old, new, rtol=1e-9, atol=1e-9, equal_nan=True), quantity
        fits = [gradscope.fit_decay(r, quantity) for r in (before, after)]
        assert fits[0].family == fits[1].family
        assert_equal(fits[1].delta.estimate, fits[0].delta.estimate, 1e-7)
    diagnoses = [gradscope.diagnose(r) for r in (before, after)]
    findings = [[(f.rule, f.layers) for f in d.findings] for d in diagnoses]
    assert findings[0] == findings[1]
    assert bool(findings[0]) == (kind is Weak)
    assert not gradscope.compare(after, before).departures


def test_levels_are_compared_where_the_denominators_are_known() -> None:
    """The flow is that of the summed loss: with both denominators it is the same number."""
    x = batch()
    mean = watched(deep(Block), square_loss, x, denominator=TERMS)
    total = watched(deep(Block), summed, x, denominator=1)
    flow = [gradscope.profile(r).value for r in (mean, total)]
    assert np.allclose(flow[0], flow[1], rtol=1e-12)
    assert not gradscope.compare(mean, total).departures
    # A denominator that is not the loss's is seen as a level that departs.
    wrong = watched(deep(Block), square_loss, x, denominator=1)
    assert gradscope.compare(wrong, total).departures


@pytest.mark.parametrize("blocks", [1, 2])
def test_models_of_one_and_two_blocks(blocks: int) -> None:
    torch.manual_seed(0)
    model = Stack(*(Block() for _ in range(blocks))).double()
    expected = truth(model, batch())
    optimizer = sgd(model)
    with gradscope.watch(model) as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    record = scope.record
    # Blocks and their branches, and all parameters.
    assert assert_true(record, expected) == 2 * 2 * blocks + 4 * blocks + 4
    fit = gradscope.fit_decay(record)
    assert fit.status.startswith("not enough layers") and "not enough layers" in str(fit)
    assert fit.family == "" and not any(math.isfinite(x.estimate) for x in fit.parameters.values())
    profile = gradscope.profile(record)
    assert np.isfinite(profile.value).all()
    diagnosis = gradscope.diagnose(record)
    assert not diagnosis.findings
    assert "one_layer_off" in dict(diagnosis.not_checked)


def test_a_model_without_any_block() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    with pytest.raises(LayerError, match="No trunk found in Linear"):
        gradscope.watch(model)
    expected = truth(model, batch())
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    record = scope.record
    assert assert_true(record, expected) == 4
    for analyse in (gradscope.fit_decay, gradscope.profile):
        with pytest.raises(QuantityError, match="no depth axis"):
            analyse(record)
    diagnosis = gradscope.diagnose(record)
    assert not diagnosis.findings
    assert len(diagnosis.not_checked) > 5
