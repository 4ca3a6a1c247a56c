"""What goes wrong in training: frozen and dead layers, non-finite values, exceptions, leaks."""

from __future__ import annotations

import gc
import math
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import (
    Block,
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

# -- frozen, unfrozen, zero by construction ------------------------------------------------------


def test_frozen_layers_are_absent_until_they_are_unfrozen() -> None:
    model = stack()
    for p in [*model.embed.parameters(), *model.blocks[0].parameters()]:
        p.requires_grad_(False)
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(4):
            if i == 2:
                model.requires_grad_(True)
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    record = scope.record
    assert [assert_true(record, t, step=i) for i, t in enumerate(expected)] == [40, 40, 52, 52]
    assert status(record, "blocks.0", "output_grad", step=0) == "no gradient path"
    assert status(record, "embed.weight", "param_grad", step=0) == "frozen"
    assert status(record, "embed.weight", "update", step=0) == "frozen"


def test_only_the_head_trains_on_frozen_blocks() -> None:
    model = stack()
    for p in [*model.embed.parameters(), *model.blocks.parameters()]:
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    expected = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradscope.watch(model) as scope:
            for i in range(3):
                expected.append(truth(model, batch(i)))
                square_loss(model, batch(i)).backward()
                optimizer.step()
                optimizer.zero_grad()
    record = scope.record
    assert [s.step for s in record.steps] == [0, 1, 2]
    for i, t in enumerate(expected):
        assert status(record, "blocks.1", "output_grad", step=i) == "no gradient path"
        g = t.param_grad["head.weight"]
        assert g is not None
        assert_equal(value(record, "head.weight", "param_grad", step=i), g)
    assert len(caught) == 1 and "watched layer" in str(caught[0].message)


def test_zero_by_construction_is_a_value_and_no_alarm() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(6, 6)
            self.base.requires_grad_(False)
            self.down = nn.Linear(6, 2, bias=False)
            self.up = nn.Linear(2, 6, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.base(x) + self.up(self.down(x))

    model = stack(Adapted(), Adapted())
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:  # a warning would be an error
        for i in range(3):
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    record = scope.record
    assert value(record, "blocks.1.down.weight", "param_grad", step=0) == 0.0
    assert value(record, "blocks.1.down", "output_grad", step=0) == 0.0
    assert value(record, "blocks.1.up.weight", "param_grad", step=0) > 0
    assert value(record, "blocks.1.down.weight", "param_grad", step=1) > 0
    assert status(record, "blocks.1.base.weight", "param_grad", step=0) == "frozen"
    assert all(s.finding is None for s in record.steps)


# -- what is worth a warning ---------------------------------------------------------------------


def test_the_first_culprit_of_a_nonfinite_step_is_named() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            model.blocks[1].mlp[2].weight[0, 0] = math.nan  # type: ignore[index, union-attr]
        square_loss(model, batch(3)).backward()
        optimizer.step()
        with pytest.warns(gradscope.GradscopeWarning, match=r"step 3.*blocks\.1\.mlp\.2\b"):
            model(batch(4))
    assert scope.record.steps[3].finding is not None
    assert [s.finding for s in scope.record.steps[:3]] == [None] * 3


def test_the_first_culprit_of_a_nonfinite_backward_is_named() -> None:
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * math.nan

    class Bad(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + Poison.apply(self.mlp(x))

    model = stack(Block(), Bad(), Block())
    optimizer = sgd(model)
    with pytest.warns(gradscope.GradscopeWarning, match=r"gradient at.*blocks\.1\.mlp\b"):
        with gradscope.watch(model, layers="**"):
            square_loss(model, batch()).backward()
            optimizer.step()


def test_a_layer_that_dies_is_named_once() -> None:
    class Gate(Block):
        open = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x + self.open * self.mlp(x)

    gate = Gate()
    model = stack(Block(), gate, Block())
    optimizer = sgd(model)
    with pytest.warns(gradscope.GradscopeWarning, match=r"dead layer.*blocks\.1\.mlp") as caught:
        with gradscope.watch(model, layers="blocks.*.mlp") as scope:
            for i in range(30):
                gate.open = 1.0 if i < 4 else 0.0
                square_loss(model, batch(i)).backward()
                optimizer.step()
                optimizer.zero_grad()
                assert scope.record.steps  # reading changes nothing
    assert len(caught) == 1
    assert [i for i, s in enumerate(scope.record.steps) if s.finding] == [23]


def test_a_branch_that_is_left_out_by_chance_is_not_dead() -> None:
    """Stochastic depth multiplies a branch by zero, for a whole batch where that is small."""

    class StochasticDepth(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + (torch.rand(()) < 0.5) * self.mlp(x)

    model = stack(StochasticDepth(), StochasticDepth())
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gradscope.watch(model, layers="blocks.*.mlp") as scope:
            for i in range(30):
                square_loss(model, batch(i)).backward()
                optimizer.step()
                optimizer.zero_grad()
    zeros = scope.record.table(signal="output_grad", statistic="l2", layer="blocks.1.mlp")["value"] == 0
    assert 5 < zeros.sum() < 25
    assert not any(s.finding for s in scope.record.steps)


def test_warnings_as_errors_do_not_stop_the_training() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model) as scope:
        for i in range(4):
            x = batch(i)
            if i == 2:
                x = x * math.inf
            square_loss(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(scope.record.steps) == 4


def test_warn_false_is_silent_but_the_finding_stays() -> None:
    model = stack()
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradscope.watch(model, warn=False) as scope:
            square_loss(model, batch() * math.inf).backward()
            optimizer.step()
    assert not caught
    finding = scope.record.steps[0].finding
    assert finding is not None and "non-finite" in finding


# -- exceptions ----------------------------------------------------------------------------------


class Fragile(Block):
    """Raises what it is told to, in the forward or in the backward."""

    forward_error: BaseException | None = None
    backward_error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.forward_error is not None:
            raise self.forward_error
        out = super().forward(x)
        if self.backward_error is not None:
            error = self.backward_error

            def fail(grad: Tensor) -> None:
                raise error

            out.register_hook(fail)
        return out


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward_error", "backward_error"])
def test_half_a_step_is_dropped_and_the_next_one_is_exact(where: str, kind: type[BaseException]) -> None:
    fragile = Fragile()
    model = stack(Block(), fragile, Block())
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(4):
            if i == 2:
                setattr(fragile, where, kind("now"))
                with pytest.raises(kind, match="now"):
                    square_loss(model, 100 * batch(9)).backward()
                setattr(fragile, where, None)
                optimizer.zero_grad()
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(scope.record.steps) == 4
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52


def test_ctrl_c_inside_a_hook_of_gradscope(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradscope import statistics

    model = stack()
    optimizer = sgd(model)
    real = statistics.measure
    with gradscope.watch(model, layers="**") as scope:
        square_loss(model, batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for after in (2, 25):  # in the forward, in the backward
            calls = 0

            def interrupted(*args: Any, after: int = after, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == after:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            monkeypatch.setattr(statistics, "measure", interrupted)
            with pytest.raises(KeyboardInterrupt):
                square_loss(model, 100 * batch(1)).backward()
            monkeypatch.setattr(statistics, "measure", real)
            optimizer.zero_grad()
        expected = truth(model, batch(2))
        square_loss(model, batch(2)).backward()
        optimizer.step()
    assert len(scope.record.steps) == 2
    assert assert_true(scope.record, expected) == 52


# -- memory --------------------------------------------------------------------------------------


def _tensors() -> int:
    gc.collect()
    return sum(1 for o in gc.get_objects() if type(o) is Tensor)


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Everything that is there already is out of the collector's sight, and so of a count's."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_heap")
def test_no_tensor_outlives_its_step() -> None:
    model = stack()
    optimizer = sgd(model)
    for slow_every in (1, 1000):
        square_loss(model, batch()).backward()
        # Python's wrapper of a gradient is made at the first look and stays: look before counting.
        assert all(p.grad is not None for p in model.parameters())
        outside = _tensors()
        with gradscope.watch(model, layers="**", slow_every=slow_every) as scope:
            square_loss(model, batch()).backward()
            # Where anything was compiled in this process, the first forward makes room for its graphs.
            before = _tensors()
            assert before == outside or "torch._dynamo" in sys.modules
            for i in range(3):
                loss = square_loss(model, batch(i))
                loss.backward()
                del loss
                assert _tensors() == before  # already after the backward pass
                optimizer.step()
                assert _tensors() == before
                optimizer.zero_grad(set_to_none=False)
            assert scope.record.steps
            model(batch())
            assert _tensors() <= before + 1  # one stream position of a forward without backward
        assert _tensors() == outside


def test_the_graph_of_an_abandoned_forward_is_freed() -> None:
    class Canary:
        def __call__(self, grad: Tensor) -> None: ...

    model = stack()
    with gradscope.watch(model, layers="**"):
        canary = Canary()
        freed = weakref.ref(canary)
        x = batch().requires_grad_(True) * 1
        x.register_hook(canary)
        del canary
        out = model(x)
        assert freed() is not None
        del out, x
        gc.collect()
        assert freed() is None
        square_loss(model, batch()).backward()


def test_a_forward_that_raised_leaves_no_hook_on_its_leaf_input() -> None:
    """The first block's output may be its input: a leaf of the caller's, which outlives the graph."""

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Identity(), nn.Linear(4, 4), nn.Linear(4, 4)])
            self.fails = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i, block in enumerate(self.blocks):
                x = block(x)
                if self.fails and i == 1:
                    raise RuntimeError("in the middle")
            return x

    model = Trunk()
    x = torch.randn(2, 4, requires_grad=True)
    with gradscope.watch(model, layers="blocks.*"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="in the middle"):
                model(x)
        model.fails = False
        model(x).sum().backward()
    assert not x._backward_hooks
