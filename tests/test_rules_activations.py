"""Rules on the size of activations, against autograd on the functions themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted import WIDTH, Chain, classified, data, massive, only, orthogonal, reasons, saturated, trained
from synthetic import Builder, moments
from torch import Tensor, nn

import gradscope
from gradscope.analysis.diagnosis import Diagnosis, diagnose
from gradscope.record import Record

LARGEST = {"Tanh": 1.0, "Sigmoid": 0.25, "Softsign": 1.0}


def true_slope(kind: str, x: Tensor) -> float:
    """Mean derivative over the largest possible, by autograd."""
    x = x.detach().double().clone().requires_grad_()
    getattr(nn, kind)()(x).sum().backward()
    assert x.grad is not None
    return x.grad.mean().item() / LARGEST[kind]


def one_output(kind: str, y: Tensor, **others: float) -> Diagnosis:
    """A Record of the output of one module of that class, through which a gradient flows."""
    b = Builder()
    array = y.double().numpy()
    b.module(1.0, "h.0", "activation", moments(array) | others, kind=kind)
    b.module(1.0, "h.0", "output_grad", {"l2": 1.0}, kind=kind)
    return diagnose(Record({"replicates": "run"}, (b.step(),)))


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("shift", [0.0, 4.0, -40.0])
@pytest.mark.parametrize("kind", sorted(LARGEST))
def test_the_slope_is_that_of_autograd_or_a_bound_of_it(kind: str, scale: float, shift: float) -> None:
    x = shift + scale * torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).double()
    true = true_slope(kind, x)
    found = one_output(kind, getattr(nn, kind)()(x)).of("saturation")
    if kind != "Softsign":
        assert bool(found) == (true <= 0.1)
        assert not found or found[0].value == pytest.approx(true, abs=1e-12)
    elif found:  # certain, because what is compared is never below the truth
        assert true <= found[0].value <= 0.1 and "at most" in found[0].message
    else:
        assert true > 0.03, "softsign is judged too late"


def test_softsign_saturates_later_than_tanh() -> None:
    # At |y| = .95 tanh has a slope of .0975; softsign of .0025, and is saturated from .684 on.
    for y, tanh, softsign in ((0.6, False, False), (0.75, False, True), (0.96, True, True)):
        outputs = torch.full((8, 8), y) * torch.randn(8, 8).sign()
        outputs[0, 0] = 0.995
        assert bool(one_output("Tanh", outputs).of("saturation")) == tanh
        assert bool(one_output("Softsign", outputs).of("saturation")) == softsign
        # Without the fourth moment only E y² ≤ E|y| is known: a looser bound, and never a false alarm.
        blind = one_output("Softsign", outputs, kurtosis=math.nan).of("saturation")
        assert bool(blind) == (y**2 >= 0.9)


@pytest.mark.parametrize("kind", ["Hardtanh", "ReLU6", "Hardsigmoid", "LogSigmoid"])
def test_of_a_hard_clip_the_rule_could_not_look(kind: str) -> None:
    module: type[nn.Module] = getattr(nn, kind)
    diagnosis = saturated(300.0, module, layers="**")
    assert not diagnosis.of("saturation")
    said = reasons(diagnosis, "saturation")
    assert "blocks.1.1" in said and "share of outputs at the bounds is not recorded" in said
    # Within ±.99 tanh would be saturated at 1 − E y² = .02; not one element of this clip is.
    inside = 0.99 * torch.ones(8, 8)
    assert true_slope("Tanh", torch.atanh(inside)) < 0.1
    assert not one_output(kind, inside).of("saturation")


@pytest.mark.parametrize("kind", [nn.Tanh, nn.Sigmoid, nn.Softsign])
def test_the_saturated_module_is_named(kind: type[nn.Module]) -> None:
    assert only(saturated(300.0, kind, layers="**"), "saturation").layers[0] == "blocks.1.1"
    assert not saturated(1.0, kind, layers="**").of("saturation")


def test_a_block_that_ends_in_tanh_is_seen_from_outside() -> None:
    found = only(saturated(60.0), "saturation")
    assert found.layers == ("blocks.1",)
    assert "taken for a tanh's" in found.message
    assert found.value < found.threshold == 0.1


class Signs(nn.Module):
    """A constant of ±1 that is multiplied in: at the bounds, and no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("signs", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.signs.expand(x.shape).clone()


class Signed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.signs, self.linear = Signs(), orthogonal()

    def forward(self, x: Tensor) -> Tensor:
        return self.signs(x) * self.linear(x)


def test_a_mask_of_ones_is_no_saturated_tanh() -> None:
    torch.manual_seed(0)
    record = trained(Chain(Signed(), Signed()), 3, layers="**")
    ones = record.table(layer="blocks.0.signs", signal="activation", statistic="absmax")["value"]
    assert np.all(ones == 1)
    assert not diagnose(record).of("saturation")


def test_nothing_bounded_is_said() -> None:
    torch.manual_seed(0)
    model = Chain(orthogonal(), orthogonal())
    diagnosis = diagnose(gradscope.measure(model, [next(data())], classified))
    assert 'layers="**"' in reasons(diagnosis, "saturation")


def test_massive_activations_is_a_note() -> None:
    assert only(massive(500.0), "massive_activations").severity == "note"
    # All of them large is another matter.
    assert not massive(0.0, gain=1000.0).of("massive_activations")
