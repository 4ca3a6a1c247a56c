"""Rules on numbers that left the range of their dtype: what they see, and what they let pass."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from planted import (
    WIDTH,
    Chain,
    classified,
    data,
    half_precision,
    measured,
    only,
    orthogonal,
    overflowing,
    poisoned,
    reasons,
    relu_block,
    trained,
)
from synthetic import Builder
from torch import Tensor, nn

import gradscope
from gradscope.analysis.diagnosis import Diagnosis, diagnose
from gradscope.analysis.view import View
from gradscope.record import Record


def test_non_finite_names_the_layer_and_step_where_it_began() -> None:
    found = only(poisoned(True), "non_finite")
    # The block around it is broken as well, and all that comes after; the branch was first.
    assert found.layers == ("blocks.2.mlp",)
    assert found.steps == (7, 11)
    assert found.depths == (3.0,)
    assert found.severity == "critical"
    assert found.value == 32 * WIDTH
    assert found.because_of is None


class RootAtZero(nn.Module):
    """x + √(0·x): nothing happens forward, and ∞·0 = NaN backward."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x * 0).abs().sqrt()


def test_non_finite_gradient_names_the_output_it_arrives_at() -> None:
    torch.manual_seed(0)
    broken = Chain(orthogonal(), orthogonal(), RootAtZero(), orthogonal())
    found = only(diagnose(trained(broken, 1)), "non_finite")
    # Seen at the input of the broken block, which is the output of the one before.
    assert found.layers == ("blocks.1",)
    assert "the gradient at the output of blocks.1" in found.message
    whole = Chain(orthogonal(), orthogonal(), nn.Identity(), orthogonal())
    assert not diagnose(trained(whole, 1)).of("non_finite")


class Masked(nn.Module):
    """Adds nothing, but holds a module that gives an additive mask with −∞."""

    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(1, WIDTH).masked_fill(torch.arange(WIDTH) > 3, -math.inf)

    def __init__(self) -> None:
        super().__init__()
        self.mask = self.Mask()

    def forward(self, x: Tensor) -> Tensor:
        return x + (x + self.mask(x)).softmax(-1)


def test_an_infinite_mask_that_breaks_nothing_is_a_note() -> None:
    diagnosis = diagnose(trained(Chain(Masked(), Masked()), 2, layers="**"))
    assert only(diagnosis, "non_finite").severity == "note"
    assert diagnosis.healthy


def test_underflow_of_half_precision_gradients() -> None:
    # An element of δ is of size .6 · scale or so, and lost where it is below 2^-25.
    found = only(half_precision(2.0**-24), "underflow")
    assert set(found.layers) == {"input of blocks.0", *(f"blocks.{k}" for k in range(4))}
    assert found.value > 0.5
    assert "float16" in found.cause
    # Small, and yet all there.
    assert not half_precision(2.0**-18).of("underflow")


def test_underflow_under_autocast_is_seen_although_the_parameters_are_float32() -> None:
    def run(scale: float) -> Diagnosis:
        torch.manual_seed(0)
        model = Chain(*(orthogonal() for _ in range(4)))
        direction = torch.randn(64, 3, generator=torch.Generator().manual_seed(2))

        def loss(m: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.float16):
                return (m(x).float() * direction * scale).sum()

        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        return diagnose(gradscope.measure(model, [x], loss, layers="blocks.*"))

    assert "without loss scaling" in only(run(2.0**-24), "underflow").cause
    assert not run(1.0).of("underflow")


def test_zeros_alone_are_no_underflow() -> None:
    # ReLU and a loss on one token of many make zeros of ordinary gradients.
    record = measured(lambda: Chain(*(relu_block() for _ in range(5))), layers="**")
    zeros = View(record).grid("output_grad", "zeros").value
    assert (zeros > 0).any()
    assert not diagnose(record).of("underflow")


def test_a_scaler_that_keeps_skipping() -> None:
    found = only(overflowing(lambda step: step % 4 == 0), "skipped_steps")
    assert found.value == pytest.approx(5 / 20)
    assert found.steps == (20, 36)
    # Finding its scale in the first steps is what a scaler does.
    assert not overflowing(lambda step: step < 12).of("skipped_steps")


@pytest.mark.parametrize("gradients", [False, True])
def test_an_infinity_is_harmless_only_where_finite_gradients_prove_it(gradients: bool) -> None:
    builder = Builder()
    for depth in range(1, 6):
        bad = float(depth == 2)
        values = {
            "l2": math.inf if bad else 1.0,
            "absmax": math.inf if bad else 1.0,
            "nonfinite": bad,
            "count": 8.0,
        }
        builder.module(depth, f"h.{depth - 1}", "activation", values)
        if gradients:
            builder.module(
                depth, f"h.{depth - 1}", "output_grad", {"l2": 1.0, "nonfinite": 0.0, "count": 8.0}
            )
    record = Record({"replicates": "run"}, (builder.step(),))
    (found,) = diagnose(record).of("non_finite")
    assert found.severity == ("note" if gradients else "critical")


def shrinking(gain: float, scale: float, dtype: torch.dtype) -> Diagnosis:
    """A chain that multiplies gradients by the gain per block, in that dtype."""
    torch.manual_seed(0)
    model = Chain(*(orthogonal(gain) for _ in range(6))).to(dtype)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    direction = torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
    return diagnose(
        gradscope.measure(
            model, [x], lambda m, b: (m(b).float() * direction * scale).sum(), layers="blocks.*"
        )
    )


@pytest.mark.parametrize(("gain", "scale"), [(0.01, 2.0**-12), (0.002, 2.0**-8)])
def test_a_gradient_that_leaves_the_range_within_one_block_underflows_from_the_first_step(
    gain: float, scale: float
) -> None:
    # δ_L is about .6 · scale, subnormal two blocks further on, and 0 after that: no output shows half.
    diagnosis = shrinking(gain, scale, torch.float16)
    found = only(diagnosis, "underflow")
    assert "input of blocks.0" in found.layers and "blocks.0" in found.layers
    assert "blocks.5" not in found.layers
    assert found.value > 0.5
    # The note on zeros from the first step stands under its cause.
    note = only(diagnosis, "zero_by_construction")
    assert note.because_of is not None and diagnosis.findings[note.because_of].rule == "underflow"
    # In bfloat16 the same gradients are there.
    assert not shrinking(gain, scale, torch.bfloat16).of("underflow")


class Closed(nn.Linear):
    """A block without skip whose weights are zero: nothing comes back, at any scale."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        nn.init.zeros_(self.weight)


def test_zero_weights_are_no_underflow() -> None:
    torch.manual_seed(0)
    model = Chain(orthogonal(), orthogonal(), Closed(), orthogonal()).half()
    x, y = next(data())
    diagnosis = diagnose(gradscope.measure(model, [(x.half(), y)], classified, layers="blocks.*"))
    assert only(diagnosis, "zero_by_construction").because_of is None
    assert not diagnosis.of("underflow")


@pytest.mark.parametrize("loss_scale", [None, 8.0])
def test_skipped_steps_says_what_it_had_to_look_at(loss_scale: float | None) -> None:
    def run(steps: int) -> str:
        b = Builder()
        b.module(1.0, "h.0", "activation", {"l2": 1.0})
        first = b.step(loss_scale=loss_scale)
        made = tuple(dataclasses.replace(first, step=i) for i in range(steps))
        return reasons(diagnose(Record({"replicates": "run"}, made)), "skipped_steps")

    assert "no gradient scaler" in run(40) if loss_scale is None else not run(40)
    assert "no gradient scaler" in run(4) if loss_scale is None else "there are 0" in run(4)
