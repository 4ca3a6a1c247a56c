"""Gradient scalers and half precision: the factor is divided out, and an overflow is a skipped step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_models import (
    assert_equal,
    assert_true,
    batch,
    sgd,
    square_loss,
    stack,
    status,
    truth,
    value,
)
from small_models import no_faults as no_faults  # a fixture of every test here
from torch import Tensor, nn

import gradscope
from gradscope.record import Record

# -- gradient scaling and half precision ---------------------------------------------------------


def test_the_scale_is_divided_out_and_an_overflow_is_a_skipped_step() -> None:
    model = stack(dtype=torch.float32)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(4):
            x = batch(i, dtype=torch.float32)
            expected.append(truth(model, batch(i, dtype=torch.float32).double()))
            loss = square_loss(model, x)
            if i == 2:
                loss = loss * torch.tensor(1e38) * 1e3  # overflows the gradients
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    record = scope.record
    assert [s.step for s in record.steps] == [0, 1, 2, 3]
    assert [s.loss_scale for s in record.steps] == [1024.0, 1024.0, 1024.0, 512.0]
    for i in (0, 1, 3):
        assert assert_true(record, expected[i], step=i, relative=1e-4) == 52
    assert status(record, "blocks.1", "output_grad", step=2) == "skipped step"
    assert status(record, "head.weight", "param_grad", step=2) == "skipped step"
    assert record.steps[2].finding is None
    forward = expected[2].activation["blocks.1"][0]
    assert_equal(value(record, "blocks.1", "activation", step=2), forward, 1e-5)


def test_second_moments_of_scaled_gradients_are_divided_twice() -> None:
    def run(scale: float) -> Record:
        model = stack()
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        with gradscope.watch(model) as scope:
            scaler.scale(square_loss(model, batch())).backward()
            scaler.step(optimizer)
            scaler.update()
        return scope.record

    a, b = run(1.0).table(signal="output_grad"), run(4096.0).table(signal="output_grad")
    for name, x, y in zip(a["statistic"], a["value"], b["value"], strict=True):
        assert x == y or math.isclose(x, y, rel_tol=1e-12) or (math.isnan(x) and math.isnan(y)), name


def test_scaler_with_unscale_and_clip() -> None:
    model = stack()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    expected = truth(model, batch())
    with gradscope.watch(model, layers="**") as scope:
        scaler.scale(square_loss(model, batch())).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item()
        scaler.step(optimizer)
        scaler.update()
    assert assert_true(scope.record, expected) == 52
    g = expected.param_grad["head.weight"]
    assert g is not None
    assert_equal(
        value(scope.record, "head.weight", "param_grad", "l2_at_step"), g * 1e-3 / (norm + 1e-6), 1e-6
    )


@pytest.mark.parametrize("overflow", [False, True])
def test_fused_optimizers_that_unscale_by_themselves(overflow: bool) -> None:
    model = stack(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = truth(model, batch(dtype=torch.float32).double())
    before = copy.deepcopy(model.state_dict())
    with gradscope.watch(model, layers="**") as scope:
        loss = square_loss(model, batch(dtype=torch.float32))
        scaler.scale(loss * 1e38 * 1e3 if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    record = scope.record
    assert len(record.steps) == 1
    if overflow:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert status(record, "blocks.1", "output_grad") == "skipped step"
        assert status(record, "head.weight", "param_grad", "l2_at_step") == "skipped step"
        assert status(record, "head.weight", "update") == "skipped step"
        return
    assert assert_true(record, expected, relative=1e-4) == 52
    g = expected.param_grad["head.weight"]
    assert g is not None
    assert_equal(value(record, "head.weight", "param_grad", "l2_at_step"), g, 1e-4)


def test_an_overflow_is_a_skipped_step_when_the_user_ends_steps() -> None:
    model = stack(dtype=torch.float32)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradscope.watch(model) as scope:
        for i in range(3):
            loss = square_loss(model, batch(i, dtype=torch.float32))
            scaler.scale(loss * 1e38 * 1e3 if i == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scope.step()
    assert [status(scope.record, "blocks.1", "output_grad", step=i) for i in range(3)] == [
        "ok",
        "skipped step",
        "ok",
    ]


def test_a_scaler_of_another_model_changes_nothing() -> None:
    model, other = stack(), stack(seed=1)
    optimizer, of_other = sgd(model), sgd(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            expected.append(truth(model, batch(i)))
            loss = square_loss(model, batch(i))
            scaler.scale(square_loss(other, batch(i))).backward()
            scaler.step(of_other)
            scaler.update()
            of_other.zero_grad()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(scope.record.steps) == 3
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52
        assert scope.record.steps[i].loss_scale is None


def test_an_overflow_of_another_model_ends_no_step() -> None:
    model, other = stack(), stack(seed=1, dtype=torch.float32)
    optimizer, of_other = sgd(model), sgd(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    expected = truth(model, batch(0), batch(1))
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch(0)).backward()
        scaler.scale(square_loss(other, batch(2, dtype=torch.float32)) * 1e38 * 1e3).backward()
        scaler.step(of_other)
        scaler.update()
        square_loss(model, batch(1)).backward()
        optimizer.step()
    assert len(scope.record.steps) == 1
    assert assert_true(scope.record, expected) == 52


def test_autocast_to_bfloat16() -> None:
    model = stack(dtype=torch.float32)
    x = batch(dtype=torch.float32)
    optimizer = sgd(model)

    def cast(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float().square().mean()

    # The oracle: the same casts, differentiated by hooks of its own on an unwatched copy.
    twin = copy.deepcopy(model)
    outputs: dict[str, Tensor] = {}
    for name, module in twin.named_modules():
        module.register_forward_hook(lambda m, a, out, name=name: outputs.__setitem__(name, out))
    loss = cast(twin, x)
    names = list(outputs)
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    with gradscope.watch(model, layers="**") as scope:
        cast(model, x).backward()
        optimizer.step()
    for name, g in zip(names, gradients, strict=True):
        assert_equal(value(scope.record, name, "output_grad"), g.double().norm().item(), 1e-5)
        assert_equal(
            value(scope.record, name, "activation"), outputs[name].detach().double().norm().item(), 1e-5
        )
    assert scope.record.header["autocast_dtype"] == "bfloat16"
    with gradscope.watch(model) as again:
        model(x).square().mean().backward()
        optimizer.step()
    assert again.record.header["autocast_dtype"] is None
