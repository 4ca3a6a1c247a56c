"""The rule on layers to which no gradient comes: cut ones, and those that only look like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from planted import (
    TEXT,
    Chain,
    Residual,
    cut_chain,
    data,
    only,
    reasons,
    residual_chain,
    trained,
    transformer,
)
from torch import Tensor, nn

import gradscope
from gradscope.analysis.diagnosis import diagnose
from gradscope.reference import next_token_loss


@pytest.mark.parametrize(
    ("cut", "layers"),
    [
        ("branch", ("blocks.2.mlp",)),
        # What stands before a cut gets nothing either; the cut is named first.
        ("output", ("blocks.2", "blocks.2.mlp", "blocks.1", "blocks.1.mlp", "blocks.0", "blocks.0.mlp")),
        ("input", ("blocks.1", "blocks.1.mlp", "blocks.0", "blocks.0.mlp")),
    ],
)
def test_the_cut_is_named_first(cut: str, layers: tuple[str, ...]) -> None:
    model = cut_chain(cut)
    # The oracle: autograd itself on the same model.
    x, _ = next(data())
    model(x).sum().backward()
    without = [n for n, p in model.named_parameters() if n.startswith("blocks.") and p.grad is None]
    model.zero_grad()
    found = only(diagnose(trained(model, 4)), "no_gradient_path")
    assert found.layers == layers
    assert {layer.split(".mlp")[0] for layer in layers} == {".".join(n.split(".")[:2]) for n in without}
    assert found.steps == (0, 3) and found.severity == "warning" and found.because_of is None
    assert not diagnose(trained(cut_chain(""), 4)).of("no_gradient_path")


def freeze(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))


def freeze_the_cut_branch(model: nn.Module) -> None:
    model.blocks[2].mlp.requires_grad_(False)
    model.blocks[2].norm.requires_grad_(False)


@pytest.mark.parametrize("freezing", [freeze, freeze_the_cut_branch])
def test_what_is_frozen_needs_no_gradient(freezing: Callable[[nn.Module], None]) -> None:
    model = cut_chain("branch" if freezing is freeze_the_cut_branch else "")
    freezing(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    record = trained(model, 3, optimizer=optimizer)
    assert "frozen" in set(record.table(signal="param_grad", statistic="l2")["status"])
    assert not diagnose(record).of("no_gradient_path")


def test_a_cut_branch_is_found_although_part_of_it_is_frozen() -> None:
    model = cut_chain("branch")
    model.blocks[2].mlp[0].requires_grad_(False)
    assert only(diagnose(trained(model, 3)), "no_gradient_path").layers == ("blocks.2.mlp",)


class Skipping(Chain):
    """Its third block is not called, or every second time only."""

    calls = 0

    def __init__(self, never: bool) -> None:
        super().__init__(*(Residual() for _ in range(4)))
        self.never = never

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(x)
        for k, block in enumerate(self.blocks):
            if k != 2 or (not self.never and self.calls % 2):
                x = block(x)
        return self.head(x)


@pytest.mark.parametrize("never", [True, False])
def test_what_is_not_called_is_not_cut(never: bool) -> None:
    torch.manual_seed(0)
    record = trained(Skipping(never), 6)
    assert "not called" in set(record.table(layer="blocks.2", statistic="l2")["status"])
    assert not diagnose(record).of("no_gradient_path")


class WithPooler(Chain):
    """Computes something that nothing uses, as encoders with a pooler do."""

    def __init__(self) -> None:
        super().__init__(*(Residual() for _ in range(3)))
        self.pooler = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.pooler(x)
        return x


@pytest.mark.parametrize("layers", [None, "**"])
def test_an_unused_head_off_the_axis_is_no_fault(layers: str | None) -> None:
    torch.manual_seed(0)
    record = trained(WithPooler(), 3, layers=layers)
    status = record.table(layer="pooler.weight", signal="param_grad", statistic="l2")["status"]
    assert set(status) == {"no gradient path"}
    assert not diagnose(record).of("no_gradient_path")


class TwoViews(Chain):
    """Two calls of the same blocks, one without gradient: a target network with shared weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(0.5 * x).detach()


def test_blocks_that_learn_from_another_call_are_trained() -> None:
    torch.manual_seed(0)
    record = trained(TwoViews(*(Residual() for _ in range(3))), 3)
    assert "no gradient path" in set(record.table(signal="output_grad", statistic="l2")["status"])
    assert not diagnose(record).of("no_gradient_path")


def test_without_a_backward_pass_nothing_is_cut_but_not_looked_at() -> None:
    torch.manual_seed(0)
    model = residual_chain()
    with gradscope.watch(model, warn=False) as scope:
        model(next(data())[0])
        scope.step()
    diagnosis = diagnose(scope.record)
    assert not diagnosis.of("no_gradient_path")
    assert "output grad" in reasons(diagnosis, "no_gradient_path")


def test_at_initialisation_too() -> None:
    def make() -> nn.Module:
        model = transformer("pre_norm", 4)()
        model.blocks[1].feed_forward.branch.register_forward_hook(lambda m, a, y: y.detach())
        return model

    found = only(diagnose(gradscope.measure(make, TEXT, next_token_loss, 2)), "no_gradient_path")
    assert found.layers[0].startswith("blocks.1.feed_forward")
