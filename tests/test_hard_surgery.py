"""Models that are changed while they are watched: layers replaced, added and removed, weights swapped.

The oracle is torch.autograd.grad on an unwatched float64 copy, taken before each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    hooks_of,
    sgd,
    square_loss,
    stack,
    status,
    truth,
    value,
)
from small_models import no_faults as no_faults  # a fixture of every test here
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import gradscope
from gradscope.record import Record


def run(
    model: nn.Module,
    change: Callable[[], object],
    *,
    steps: int = 4,
    at: int = 2,
    layers: str | None = "**",
) -> tuple[Record, list[Truth]]:
    """The record of a run in which ``change`` comes before step ``at``, and the truth of each step."""
    expected = []
    with gradscope.watch(model, layers=layers) as scope:
        for i in range(steps):
            if i == at:
                change()
            expected.append(truth(model, batch(i)))
            optimizer = sgd(model)
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [s.step for s in scope.record.steps] == list(range(steps))
    return scope.record, expected


def trained(model: nn.Module, change: Callable[[], object], **options: Any) -> tuple[Record, list[int]]:
    """The same, each step compared with its truth: how many values are right."""
    record, expected = run(model, change, **options)
    return record, [assert_true(record, t, step=i) for i, t in enumerate(expected)]


def test_a_replaced_block_is_found_again_by_its_name() -> None:
    model = stack()
    old = model.blocks[1]
    fresh = Block().double()

    def change() -> None:
        model.blocks[1] = fresh

    before = hooks_of(old), hooks_of(fresh)
    _, compared = trained(model, change)
    assert compared == [52] * 4
    assert (hooks_of(old), hooks_of(fresh)) == before


def test_a_replaced_head_of_another_shape() -> None:
    model = stack()

    def change() -> None:
        model.head = nn.Linear(6, 7).double()

    record, compared = trained(model, change, layers=None)
    assert len(set(compared)) == 1
    assert value(record, "head.weight", "param_grad", "count", step=1) == 12
    assert value(record, "head.weight", "param_grad", "count", step=2) == 42


def test_a_replaced_weight_is_read_where_it_is_now() -> None:
    model = stack()

    def change() -> None:
        model.head.weight = nn.Parameter(model.head.weight.detach() * 3)

    _, compared = trained(model, change)
    assert compared == [52] * 4


def test_weights_that_are_loaded_by_assignment() -> None:
    model = stack()
    other = stack(seed=5).state_dict()
    _, compared = trained(model, lambda: model.load_state_dict(other, assign=True))
    assert compared == [52] * 4


def test_a_block_that_is_wrapped_during_the_watch() -> None:
    """An adapter put around a layer: the layer itself is still there, under a longer name."""

    class Adapter(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.extra = nn.Linear(6, 6).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.extra(x)

    model = stack()

    def change() -> None:
        model.blocks[1] = Adapter(model.blocks[1])

    record, expected = run(model, change, layers=None)
    for i, t in enumerate(expected):
        for layer in ("blocks.0", "blocks.1", "blocks.2"):
            for signal in ("activation", "output_grad"):
                (norm,) = getattr(t, signal)[layer]
                assert_equal(value(record, layer, signal, step=i), norm)


def test_a_removed_block_is_not_called() -> None:
    model = stack()

    def change() -> None:
        model.blocks[1] = nn.Identity()

    record, compared = trained(model, change)
    assert compared == [52, 52, 40, 40]
    assert {"blocks.1.mlp", "blocks.1.mlp.0.weight"}.isdisjoint(record.table(step=2)["layer"].tolist())


def test_a_block_that_is_added_says_nothing_wrong_about_the_others() -> None:
    model = stack()

    def change() -> None:
        model.blocks.append(Block().double())

    record, _ = trained(model, change, layers=None)
    assert "blocks.3" in set(record.table(step=3)["layer"].tolist())
    rows = record.table(step=3, layer="blocks.3", signal="output_grad", statistic="l2")
    assert rows["depth"].tolist() == [4.0]


def test_a_block_that_is_taken_out_of_the_list() -> None:
    model = stack()
    gone = model.blocks[2]

    def change() -> None:
        del model.blocks[2]

    before = hooks_of(gone)
    record, compared = trained(model, change)
    assert compared == [52, 52, 38, 38]
    assert "blocks.2" not in set(record.table(step=3)["layer"].tolist())
    assert hooks_of(gone) == before


def test_a_dtype_that_changes_during_the_watch() -> None:
    model = stack(dtype=torch.float32)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            if i == 2:
                model.double()
            dtype = model.head.weight.dtype
            expected.append(truth(model, batch(i, dtype=dtype).double()))
            optimizer = sgd(model)
            square_loss(model, batch(i, dtype=dtype)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert assert_true(scope.record, expected[1], step=1, relative=1e-5) == 52
    assert assert_true(scope.record, expected[2], step=2) == 52


def test_a_change_in_the_middle_of_a_step_is_absent_and_the_next_step_exact() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch(0)).backward()
        model.blocks[1] = nn.Sequential(model.blocks[1], nn.Tanh())
        square_loss(model, batch(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = truth(model, batch(2))
        square_loss(model, batch(2)).backward()
        optimizer.step()
    said = status(scope.record, "blocks.1", "activation", step=0)
    assert said == "not supported: the model was changed in the middle of a step"
    assert assert_true(scope.record, expected, step=1) == 52 + 4


def test_a_model_that_loses_its_depth_axis_keeps_its_parameters() -> None:
    model = stack()

    def change() -> None:
        model.blocks = nn.ModuleList()

    with pytest.warns(gradscope.GradscopeWarning, match="No trunk found"):
        record, _ = trained(model, change, layers=None)
    assert set(record.table(step=3)["type"].tolist()) == {"Parameter"}
    assert value(record, "head.weight", "param_grad", step=3) > 0


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "orthogonal", "own"])
def test_parametrized_weights(how: str) -> None:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu() + w.triu(1).T

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x))

    model = stack(Square(), Square())
    for block in model.blocks:
        linear = block.linear
        assert isinstance(linear, nn.Module)
        if how == "own":
            parametrize.register_parametrization(linear, "weight", Symmetric())
        else:
            getattr(parametrizations, how)(linear)
    model.eval()  # spectral_norm moves its vectors in every forward of training
    _, compared = trained(model, lambda: None)
    assert len(set(compared)) == 1 and compared[0] >= 20


class Tied(Stack):
    def __init__(self) -> None:
        super().__init__(Block(3), Block(3), width=3)
        self.embed, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.head.weight = self.embed.weight


def test_tied_weights_are_one_parameter_with_the_summed_gradient() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    expected = truth(model, batch())
    assert "head.weight" not in expected.param_grad
    record, compared = trained(model, lambda: None)
    assert compared == [compared[0]] * 4 and compared[0] == 2 * 13 + 11
    assert "head.weight" not in record.table()["layer"].tolist()


@pytest.mark.parametrize("tied_first", [True, False])
def test_weights_that_are_tied_or_untied_during_the_watch(tied_first: bool) -> None:
    torch.manual_seed(0)
    model = Tied().double()
    own = nn.Parameter(model.embed.weight.detach().clone())
    if not tied_first:
        model.head.weight = own

    def change() -> None:
        model.head.weight = own if tied_first else model.embed.weight

    record, compared = trained(model, change)
    names = [set(record.table(step=i, signal="param_grad")["layer"].tolist()) for i in range(4)]
    assert ["head.weight" in found for found in names] == [not tied_first] * 2 + [tied_first] * 2
    tied, apart = 2 * 13 + 11, 2 * 13 + 12
    assert compared == ([tied, tied, apart, apart] if tied_first else [apart, apart, tied, tied])


def test_users_hooks_that_change_outputs_and_gradients() -> None:
    model = stack()
    model.blocks[0].register_forward_hook(lambda m, a, out: out * 2)
    model.blocks[1].register_forward_pre_hook(lambda m, a: (a[0] - 1,))
    model.blocks[1].mlp.register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    model.head.weight.register_hook(lambda g: g * 5)
    twin = copy.deepcopy(model)
    expected = truth(twin, batch())
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch()).backward()
        optimizer = sgd(model)
        grads = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    for name, g in grads.items():
        assert_equal(value(scope.record, name, "param_grad"), g)
    for layer in ("embed", "blocks.0", "blocks.1", "blocks.2.mlp", "head"):
        g = expected.output_grad[layer][0]
        assert g is not None
        assert_equal(value(scope.record, layer, "output_grad"), g)
        assert_equal(value(scope.record, layer, "activation"), expected.activation[layer][0])
