"""Tensors that hooks meet and that are not plain: views, aliases, inference, sparse, nested, batched.

The oracle is torch.autograd.grad on an unwatched float64 copy, which does out of place what the model
does in place.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import (
    Block,
    Stack,
    Truth,
    assert_equal,
    assert_true,
    batch,
    cell,
    sgd,
    square_loss,
    stack,
    status,
    truth,
    value,
)
from small_models import no_faults as no_faults  # a fixture of every test here
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import gradscope
from gradscope.record import Record

IN_PLACE = "not supported: a view that was modified in place"
NOT_PLAIN = "not supported: a sparse or nested tensor"


def stacked(kind: type[Stack], *blocks: nn.Module) -> Any:
    torch.manual_seed(0)
    return kind(*blocks).double()


def watched(model: nn.Module, loss: Any = square_loss, x: Any = None) -> Record:
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        loss(model, batch() if x is None else x).backward()
        optimizer.step()
    assert len(scope.record.steps) == 1
    return scope.record


# -- views that are modified in place ----------------------------------------------------------------


def right_or_in_place(record: Record, expected: Truth) -> list[str]:
    """The layers whose gradient is absent because of a write; everything else is the truth's."""
    absent: list[str] = []
    for layer, calls in expected.output_grad.items():
        found, word = cell(record, layer, "output_grad")
        if word == "ok":
            assert_equal(found, calls[0] or 0.0)
        else:
            assert word == IN_PLACE, (layer, word)
            absent.append(layer)
    assert_true(record, Truth(expected.activation, {}, expected.param_grad))
    return absent


def test_a_stream_that_is_a_view_and_that_blocks_add_to_in_place() -> None:
    """Torch hands to the hook of such a view what came through the block's branch, and nothing else."""

    class Adds(Block):
        in_place = True

        def forward(self, x: Tensor) -> Tensor:
            if not self.in_place:
                return x + self.mlp(x.clone())
            x += self.mlp(x.clone())
            return x

    model = stack(Adds(), Adds(), Adds())
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.in_place = False  # type: ignore[assignment]
    record = watched(model)
    assert right_or_in_place(record, truth(plain, batch())) == ["blocks.0", "blocks.1"]
    # The product with a gradient of which only a part was seen is absent as well.
    for layer in ("blocks.0", "blocks.1"):
        assert status(record, layer, "output_grad", "dot_next") != "ok"


@pytest.mark.parametrize("how", ["slice", "flatten", "chunk"])
def test_a_view_that_is_modified_after_its_module(how: str) -> None:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 12 if how == "slice" else 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            return h[..., :6] if how == "slice" else h.flatten(1) if how == "flatten" else h[:3]

    class Net(Stack):
        in_place = True

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                y = block(h)
                y = torch.relu_(y) if self.in_place else torch.relu(y)
                h = h[: len(y)] + y.reshape(len(y), 4, 6)
            return self.head(h)

    model = stacked(Net, View(), View())
    plain = copy.deepcopy(model)
    plain.in_place = False
    absent = right_or_in_place(watched(model), truth(plain, batch()))
    assert set(absent) <= {"blocks.0", "blocks.1"}
    assert absent or how == "chunk"


def test_a_view_that_nobody_modifies_has_its_gradient() -> None:
    class Slice(Block):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.mlp(x) + self.wide(x)[..., 1:7])[:, :]

    model = stack(Slice(), Slice())
    expected = truth(model, batch())
    assert assert_true(watched(model), expected) == 2 * (2 * 6 + 6) + 4 + 6


# -- one tensor in several places ------------------------------------------------------------------


def test_one_tensor_twice_in_an_output() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            y = super().forward(x)
            return y, y

    class Net(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                a, b = block(h)
                h = 0.5 * a + 0.25 * b
            return self.head(h)

    model = stacked(Net, Twice(), Twice())
    expected = truth(model, batch(), tensor_of=lambda out: out[0] if isinstance(out, tuple) else out)
    assert assert_true(watched(model), expected) == 2 * 13 + 12


def test_a_parameter_as_an_output_keeps_no_hook() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self) -> Tensor:
            return self.weight

    class Net(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Positions()

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x) + self.positions()
            for block in self.blocks:
                h = block(h)
            return self.head(h + self.positions())

    model = stacked(Net)
    expected = truth(model, batch())
    assert assert_true(watched(model), expected) == 52 + 2 * 2 + 1
    assert not model.positions.weight._backward_hooks


def test_an_output_that_can_be_read_once_is_not_read() -> None:
    class Lazily(Block):
        def forward(self, x: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
            return iter([super().forward(x)])

    class Net(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = next(block(h))
            return self.head(h)

    model = stacked(Net, Lazily(), Lazily())
    expected = truth(model, batch())
    record = watched(model)
    assert assert_true(record, expected) == 2 * (3 + 8) + 12
    assert status(record, "blocks.0", "activation") == "not supported: no floating-point output"


# -- kinds of tensors ------------------------------------------------------------------------------


def test_a_backbone_under_inference_mode_has_activations() -> None:
    class Net(Stack):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                fixed = self.blocks[1](self.blocks[0](x.repeat(1, 1, 2)))
            return self.head(self.blocks[2](self.embed(x) + fixed.clone()))

    model = stacked(Net)
    expected = truth(model, batch())
    record = watched(model)
    assert assert_true(record, expected) == 18 + 8 + 8
    assert status(record, "blocks.0", "output_grad") == "no gradient path"
    # Who wrote to such tensors nobody counts.
    assert status(record, "blocks.0", "activation", "dot_next") == "not supported: modified in place"


@pytest.mark.parametrize("kind", ["sparse", "jagged", "nested"])
def test_sparse_and_nested_outputs_are_absent_with_the_reason(kind: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).relu().to_sparse() if kind == "sparse" else self.linear(x)

    class Net(Stack):
        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            if kind != "sparse":
                layout = torch.jagged if kind == "jagged" else torch.strided
                h = torch.nested.as_nested_tensor([h[0], h[1][:2]], layout=layout)
            for block in self.blocks:
                h = block(h).to_dense() if kind == "sparse" else block(h)
            if kind != "sparse":
                h = h.values() if kind == "jagged" else h.to_padded_tensor(0.0)
            return self.head(h)

    model = stacked(Net, Odd(), Odd())
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        square_loss(twin, batch()).backward()
        record = watched(model)
    for signal in ("activation", "output_grad"):
        assert status(record, "blocks.0", signal) == NOT_PLAIN
        assert value(record, "head", signal) > 0
    for name, p in twin.named_parameters():
        assert p.grad is not None
        assert_equal(value(record, name, "param_grad"), p.grad.norm().item())


def test_gradients_that_come_in_batches_are_of_no_step() -> None:
    """A Jacobian of all outputs at once, under vmap: no gradient there is that of a step."""
    model = stack()
    optimizer = sgd(model)
    expected = truth(model, batch())
    with gradscope.watch(model, layers="**") as scope:
        x = batch().requires_grad_()
        y = model(x).sum((0, 1))
        torch.autograd.grad(y, x, torch.eye(2, dtype=x.dtype), is_grads_batched=True)
        for differentiate in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
            differentiate(lambda x: square_loss(model, x), batch(size=1, tokens=1), vectorize=True)
        square_loss(model, batch()).backward()
        optimizer.step()
    assert len(scope.record.steps) == 1
    assert assert_true(scope.record, expected) == 52


def test_training_on_a_batch_of_gradients_says_why_they_are_absent() -> None:
    model = stack()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gradscope.GradscopeWarning)
        with gradscope.watch(model, layers="**") as scope:
            y = model(batch()).sum((0, 1))
            parameters = list(model.parameters())
            every = torch.autograd.grad(y, parameters, torch.eye(2, dtype=y.dtype), is_grads_batched=True)
            for p, g in zip(parameters, every, strict=True):
                p.grad = g.mean(0)
            optimizer.step()
    assert status(scope.record, "blocks.1", "output_grad") == (
        "not supported: a backward pass under vmap"
    )
    assert not math.isnan(value(scope.record, "blocks.1", "activation"))


def test_the_users_function_mode_sees_what_it_sees_unwatched() -> None:
    class Counts(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    model = stack()
    expected = truth(model, batch())
    with Counts() as unwatched:
        square_loss(copy.deepcopy(model), batch()).backward()
    with gradscope.watch(model, layers="**") as scope:
        with Counts() as seen:
            square_loss(model, batch()).backward()
    plain = [f for f in unwatched.seen if "copy" not in f]
    assert [f for f in seen.seen if f in set(plain)] == [f for f in plain if f in set(seen.seen)]
    assert len(seen.seen) <= len(unwatched.seen)
    assert assert_true(scope.record, expected) == 52


def test_a_default_device_that_is_another() -> None:
    model = stack()
    expected = truth(model, batch())
    x = batch()
    with gradscope.watch(model, layers="**") as scope, torch.device("meta"):
        square_loss(model, x).backward()
    assert assert_true(scope.record, expected) == 52
