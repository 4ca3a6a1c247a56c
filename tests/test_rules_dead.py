"""Rules on layers and units through which nothing passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from planted import (
    WIDTH,
    Chain,
    kill_block_2,
    killed,
    mostly_dead,
    only,
    orthogonal,
    relu_block,
    rezero,
    trained,
)
from torch import Tensor, nn

from gradscope.analysis.diagnosis import diagnose
from gradscope.analysis.view import View


def test_dead_layer_names_where_it_died_and_when() -> None:
    found = only(killed(True), "dead_layer")
    assert found.layers[0] == "blocks.2"
    assert found.steps == (9, 19)
    assert found.value == 11
    # Upstream nothing arrives any more; downstream it goes on with the biases.
    assert {"blocks.0", "blocks.1"} <= set(found.layers)
    assert "blocks.4" not in found.layers
    # One step without a gradient is chance.
    assert not diagnose(
        trained(Chain(*(relu_block() for _ in range(5))), 20, before=lambda s, m: kill_block_2(s - 10, m))
    ).of("dead_layer")


class Valve(nn.Module):
    """x forward; backward the gradient times a factor."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + (1 - self.factor) * x.detach()


def test_a_dead_gradient_starts_nearest_to_the_loss() -> None:
    torch.manual_seed(0)
    model = Chain(orthogonal(), orthogonal(), Valve(), orthogonal(), orthogonal())

    def shut(step: int, model: nn.Module) -> None:
        model.blocks[2].factor = 0.0 if step >= 9 else 1.0

    found = only(diagnose(trained(model, 20, before=shut)), "dead_layer")
    assert found.layers[:3] == ("blocks.1", "blocks.0", "input of blocks.0")
    assert found.steps == (9, 19)


class IdleBias(nn.Linear):
    """A bias without effect, like that of a layer before a norm: its gradient is exactly 0."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, 0 * self.bias)


def test_a_bias_alone_without_gradient_is_no_dead_layer() -> None:
    torch.manual_seed(0)
    record = trained(Chain(IdleBias(WIDTH, WIDTH), IdleBias(WIDTH, WIDTH)), 25)
    assert not record.table(layer="blocks.0.bias", signal="param_grad", statistic="l2")["value"].any()
    assert diagnose(record).healthy and not diagnose(record).of("zero_by_construction")


def test_zero_by_construction_is_a_note_until_it_lasts() -> None:
    first = rezero(True, 1)
    note = only(first, "zero_by_construction")
    assert note.severity == "note"
    assert first.healthy and not first.of("dead_layer")
    # α moves after one step: nothing to say any more.
    assert not rezero(True, 3).of("zero_by_construction")
    # An α that never moves: a note for 20 recorded steps, then dead.
    assert rezero(False, 20).of("zero_by_construction") and not rezero(False, 20).of("dead_layer")
    dead = rezero(False, 21)
    assert dead.of("dead_layer") and not dead.of("zero_by_construction")
    assert any(name.startswith("blocks.0.mlp") for name in only(dead, "dead_layer").layers)


def test_dead_units_names_the_layer() -> None:
    record = mostly_dead(-2.5)
    found = only(diagnose(record), "dead_units")
    # What comes after may have nothing to work on; it started in block 2.
    assert found.layers[0] == "blocks.2" and "blocks.1" not in found.layers
    zeros, count = (
        record.table(layer="blocks.2", signal="activation", statistic=s)["value"]
        for s in ("zeros", "count")
    )
    assert found.value == zeros[0] / count[0] >= 0.9


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.95)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.linear(x))


def test_dropout_is_sparse_by_construction() -> None:
    record = trained(Chain(Sparse(), Sparse()), 3, layers="**")
    zeros, count = (View(record).grid("activation", s) for s in ("zeros", "count"))
    assert (zeros.value / count.value > 0.9).any()
    assert not diagnose(record).of("dead_units")
