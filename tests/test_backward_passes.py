"""What backward passes do: recompute (checkpointing), come several to a forward, differentiate gradients.

The oracle is torch.autograd.grad on an unwatched float64 copy, taken before the step.
"""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import (
    Block,
    Stack,
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

# -- checkpointing -------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Checkpoints a module, or what it is made of."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant)


class CheckpointedStack(Stack):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=self.reentrant)
        return self.head(h)


class TwicePerBlock(nn.Module):
    """A block that calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.tanh(self.linear(x)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_checkpointed_blocks_are_counted_once(reentrant: bool, micro_batches: int) -> None:
    torch.manual_seed(0)
    model = CheckpointedStack().double()
    model.reentrant = reentrant
    plain = Stack().double()
    plain.load_state_dict(model.state_dict())
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        for i in range(2):
            micro = [batch(10 * i + j) for j in range(micro_batches)]
            plain.load_state_dict(model.state_dict())
            expected = truth(plain, *micro)
            for x in micro:
                square_loss(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert assert_true(scope.record, expected, step=i) == 52
    assert len(scope.record.steps) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_blocks(reentrant: bool) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Checkpointed(Block().mlp, reentrant)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    model = stack(Part(), Part())
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.mlp = block.mlp.inner  # type: ignore[union-attr]
    expected = truth(plain, batch())
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    for signal in ("activation", "output_grad"):
        for layer, (norm,) in getattr(expected, signal).items():
            inner = layer.replace("mlp", "mlp.inner")
            assert_equal(value(scope.record, inner, signal), norm)
    for name, g in expected.param_grad.items():
        assert g is not None
        assert_equal(value(scope.record, name.replace("mlp", "mlp.inner"), "param_grad"), g)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_called_twice_in_a_checkpointed_block(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = CheckpointedStack(TwicePerBlock(), TwicePerBlock()).double()
    model.reentrant = reentrant
    plain = Stack(TwicePerBlock(), TwicePerBlock()).double()
    plain.load_state_dict(model.state_dict())
    optimizer = sgd(model)
    expected = truth(plain, batch())
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    assert len(expected.output_grad["blocks.0.linear"]) == 2
    # Right, or absent with a reason: never the values of the other call.
    for layer, calls in expected.output_grad.items():
        for call, norm in enumerate(calls):
            if status(scope.record, layer, "output_grad", call=call) == "ok":
                assert norm is not None
                assert_equal(value(scope.record, layer, "output_grad", call=call), norm)
            else:
                assert reentrant and "linear" in layer
    for name, g in expected.param_grad.items():
        assert g is not None
        assert_equal(value(scope.record, name, "param_grad"), g)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_shared_checkpointed_block(reentrant: bool) -> None:
    block = Block()
    torch.manual_seed(0)
    model = CheckpointedStack(block, block, block).double()
    model.reentrant = reentrant
    plain = Stack(*[block] * 3).double()
    plain.load_state_dict(model.state_dict())
    optimizer = sgd(model)
    expected = truth(plain, batch())
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    assert len(expected.output_grad["blocks.0"]) == 3
    assert assert_true(scope.record, expected) == 2 * (3 + 3 * 5) + 8


# -- several backward passes ---------------------------------------------------------------------


def test_two_backward_passes_through_one_forward() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        out = model(batch())
        out.square().mean().backward(retain_graph=True)
        out.sum().backward()
        gradient = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    for layer in ("embed", "blocks.0", "blocks.2.mlp", "head"):
        said = status(scope.record, layer, "output_grad")
        assert said.startswith("not supported") and "several backward passes" in said
        assert value(scope.record, layer, "activation") > 0
    for name, g in gradient.items():
        assert_equal(value(scope.record, name, "param_grad"), g)


def test_two_losses_added_are_one_backward() -> None:
    model = stack()
    optimizer = sgd(model)

    def both(m: nn.Module, x: Tensor) -> Tensor:
        out = m(x)
        return out.square().mean() + 0.1 * out.abs().sum()

    expected = truth(model, batch(), loss=both)
    with gradscope.watch(model, layers="**") as scope:
        both(model, batch()).backward()
        optimizer.step()
    assert assert_true(scope.record, expected) == 52


def test_two_losses_on_different_parts() -> None:
    class TwoHeads(Stack):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            h = self.embed(x)
            h = self.blocks[0](h)
            early = h.detach()
            for block in self.blocks[1:]:
                early = block(early)
            return h, self.head(early)

    torch.manual_seed(0)
    model = TwoHeads().double()
    optimizer = sgd(model)

    def both(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m(x)
        return a.square().mean() + b.abs().mean()

    expected = truth(model, batch(), loss=both)
    with gradscope.watch(model, layers="**") as scope:
        a, b = model(batch())
        a.square().mean().backward()
        b.abs().mean().backward()
        optimizer.step()
    assert_true(scope.record, expected, skip=[""])


def test_gradient_penalty_is_right_or_absent() -> None:
    model = stack()
    optimizer = sgd(model)

    def penalised(m: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        out = m(x)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.square().mean() + g.square().sum()

    expected = truth(model, batch(), loss=penalised)
    with gradscope.watch(model, layers="**") as scope:
        penalised(model, batch()).backward()
        optimizer.step()
    compared = 0
    for name, g in expected.param_grad.items():
        if g is None:
            assert status(scope.record, name, "param_grad") == "no gradient path"
        else:
            assert_equal(value(scope.record, name, "param_grad"), g)
            compared += 1
    assert compared == 16
    for layer in ("embed", "blocks.0", "blocks.1.mlp.1"):
        assert "several backward passes" in status(scope.record, layer, "output_grad")


def test_forces_inside_the_forward() -> None:
    class Energy(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_(True)
            energy = super().forward(x).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return force

    torch.manual_seed(0)
    model = Energy().double()
    optimizer = sgd(model)
    twin = copy.deepcopy(model)
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward()
        optimizer.step()
    square_loss(twin, batch()).backward()
    for name, p in twin.named_parameters():
        if p.grad is None:
            assert status(scope.record, name, "param_grad") == "no gradient path"
        else:
            assert_equal(value(scope.record, name, "param_grad"), p.grad.norm().item())
    assert "several backward passes" in status(scope.record, "blocks.1.mlp.0", "output_grad")
