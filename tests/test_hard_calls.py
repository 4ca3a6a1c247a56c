"""Ways to call a model: by itself, by keywords, twice in a step, checkpointed whole, scripted, forked.

The oracle is torch.autograd.grad on an unwatched float64 copy, taken before each step.
"""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

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
from torch.utils import checkpoint

import gradscope
from gradscope.errors import LayerError
from gradscope.record import Record

#: Of a stack, but for the model itself.
LAYERS = [name for name, _ in stack().named_modules() if name]


def stacked(kind: type[Stack], *blocks: nn.Module) -> Any:
    torch.manual_seed(0)
    return kind(*blocks).double()


def watched(model: nn.Module, loss: Any = square_loss, x: Any = None, steps: int = 1) -> Record:
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        for _ in range(steps):
            loss(model, batch() if x is None else x).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [s.step for s in scope.record.steps] == list(range(steps))
    return scope.record


# -- a model that calls itself -----------------------------------------------------------------------


class Recursive(Stack):
    """The whole stack again on what comes out of it."""

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        y = self.head(h)
        return y if depth == 0 else y + self(torch.cat([y, y[..., :1]], -1), depth - 1)


def test_a_model_that_calls_itself_is_one_forward() -> None:
    model = stacked(Recursive)
    expected = truth(model, batch())
    assert len(expected.output_grad["blocks.1"]) == len(expected.output_grad[""]) == 3
    assert assert_true(watched(model, steps=2), expected, step=0) == 3 * 2 * 18 + 16


class Teacher(Stack):
    """Adds what it says itself without grad, half-way through."""

    raises = False

    def forward(self, x: Tensor, inner: bool = False) -> Tensor:
        h = self.blocks[0](self.embed(x))
        if inner and self.raises:
            raise ValueError("not today")
        if not inner:
            try:
                with torch.no_grad():
                    said = self(x, inner=True).mean()
            except ValueError:
                said = 1.0
            h = h + said
        for block in self.blocks[1:]:
            h = block(h)
        return self.head(h)


@pytest.mark.parametrize("raises", [False, True])
def test_a_model_that_calls_itself_without_grad(raises: bool) -> None:
    model = stacked(Teacher)
    model.raises = raises
    expected = truth(model, batch())
    record = watched(model, steps=2)
    assert len(expected.activation["blocks.0"]) == 2
    # Each layer has one gradient, and those that ran twice have two activations.
    twice = 1 + 5 if raises else 18
    assert assert_true(record, expected, step=0) == 18 + (18 + twice) + 16


def test_ctrl_c_in_a_forward_is_no_call_of_itself() -> None:
    model = stack()
    handle = model.blocks[1].register_forward_hook(
        lambda m, a, out: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        with pytest.raises(KeyboardInterrupt):
            model(batch(1))
        handle.remove()
        expected = truth(model, batch())
        square_loss(model, batch()).backward()
        optimizer.step()
    assert len(scope.record.steps) == 1
    assert assert_true(scope.record, expected) == 52


@pytest.mark.parametrize("how", ["no grad", "with grad"])
def test_a_forward_past_the_models_own_hooks(how: str) -> None:
    """The model's ``forward``, or a method of its own, called directly: its layers say what a step is."""
    model = stack()
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            with torch.set_grad_enabled(how == "with grad"):
                model.forward(batch(8))
                model.forward(batch(9))
            expected.append(truth(model, batch(i), batch(i + 3), layers=LAYERS))
            for x in (batch(i), batch(i + 3)):
                model.forward(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [s.step for s in scope.record.steps] == [0, 1, 2]
    assert [assert_true(scope.record, t, step=i) for i, t in enumerate(expected)] == [50] * 3


def test_steps_between_the_recorded_ones_end_past_the_models_own_hooks_too() -> None:
    model = stack()
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**", every=2) as scope:
        for i in range(5):
            expected.append(truth(model, batch(i), layers=LAYERS))
            model.forward(batch(i)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [s.step for s in scope.record.steps] == [0, 2, 4]
    assert [assert_true(scope.record, expected[i], step=i) for i in (0, 2, 4)] == [50] * 3


# -- arguments and losses ----------------------------------------------------------------------------


def test_modules_that_are_called_with_keywords_only() -> None:
    class Keyword(Block):
        def forward(self, *, hidden: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(hidden)

    class Net(Stack):
        def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
            h = self.embed(x)
            for block in self.blocks:
                h = block(hidden=h)
            return self.head(h)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x=x).square().mean()

    model = stacked(Net, Keyword(), Keyword())
    expected = truth(model, batch(), loss=loss)
    record = watched(model, loss)
    assert assert_true(record, expected) == 38
    # The stream's input is seen among the keywords.
    (h0,) = expected.activation["embed"]
    rows = record.table(layer="blocks.0", signal="activation", statistic="l2", type="Stream")
    assert_equal(float(rows["value"][0]), h0)


def test_two_forwards_in_one_loss_are_pooled() -> None:
    model, pair = stack(), (batch(0), batch(1))

    def loss(m: nn.Module, x: Any) -> Tensor:
        return (m(x[0]) - m(x[1])).square().mean()

    # The truth has one list entry per call; pooled, their squares add up.
    expected = truth(model, pair, loss=loss)
    record = watched(model, loss, pair)
    for signal in ("activation", "output_grad"):
        for layer, calls in getattr(expected, signal).items():
            assert len(calls) == 2
            assert_equal(value(record, layer, signal), (calls[0] ** 2 + calls[1] ** 2) ** 0.5)
    for name, g in expected.param_grad.items():
        assert_equal(value(record, name, "param_grad"), g or 0.0)


@pytest.mark.parametrize("how", ["create_graph", "gradient", "roots"])
def test_ways_to_begin_a_backward_pass(how: str) -> None:
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        y = m(x)
        return (
            3 * y[..., 0].sum() + 2 * y[..., 1].square().sum()
            if how == "roots"
            else 2.5 * y.square().sum()
        )

    model = stack()
    expected = truth(model, batch(), loss=loss)
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a graph of gradients holds them in a cycle
        if how == "roots":
            y = model(batch())
            a, b = y[..., 0], y[..., 1].square()
            torch.autograd.backward([a, b], [torch.full_like(a, 3.0), torch.full_like(b, 2.0)])
        elif how == "gradient":
            model(batch()).square().sum().backward(torch.tensor(2.5, dtype=torch.float64))
        else:
            loss(model, batch()).backward(create_graph=True)
        optimizer.step()
    for p in model.parameters():
        p.grad = None
    assert assert_true(scope.record, expected) == 52


def test_sharpness_aware_steps_are_those_at_the_moved_weights() -> None:
    """SAM: a first gradient moves the weights, the gradient there is what the optimizer steps by."""
    model = stack()
    optimizer = sgd(model)
    expected = []
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            square_loss(model, batch(i)).backward()
            with torch.no_grad():
                moves = [0.05 * p.grad for p in model.parameters() if p.grad is not None]
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.add_(move)
            model.zero_grad()
            expected.append(truth(model, batch(i)))
            square_loss(model, batch(i)).backward()
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.sub_(move)
            optimizer.step()
            optimizer.zero_grad()
    assert [s.step for s in scope.record.steps] == [0, 1, 2]
    assert [assert_true(scope.record, t, step=i) for i, t in enumerate(expected)] == [52] * 3


def test_users_backward_hooks_on_every_module() -> None:
    model = stack()
    for module in model.modules():
        module.register_full_backward_pre_hook(lambda m, go: None)
        module.register_full_backward_hook(lambda m, gi, go: None)
    model.blocks[1].register_full_backward_pre_hook(lambda m, go: (2 * go[0],))
    x = batch().requires_grad_()
    expected = truth(model, x)
    assert assert_true(watched(model, x=x), expected) == 52


# -- checkpointing -----------------------------------------------------------------------------------


class Checkpointed(Stack):
    how = ""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        reentrant = "reentrant" in self.how
        match self.how.split(", ")[0]:
            case "sequential":
                h = checkpoint.checkpoint_sequential(list(self.blocks), 2, h, use_reentrant=reentrant)
            case "nested":
                h = checkpoint.checkpoint(self._nested, h, use_reentrant=reentrant)
            case "to the end":
                with checkpoint.set_checkpoint_early_stop(False):
                    h = checkpoint.checkpoint(self._all, h, use_reentrant=False)
            case _:
                h = self._all(h)
        return self.head(h)

    def _all(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h

    def _nested(self, h: Tensor) -> Tensor:
        reentrant = "reentrant" in self.how
        h = self.blocks[0](h)
        h = checkpoint.checkpoint(self.blocks[1], h, use_reentrant=reentrant)
        return self.blocks[2](h)


@pytest.mark.parametrize(
    "how", ["sequential", "sequential, reentrant", "nested", "nested, reentrant", "to the end"]
)
def test_checkpoints_of_several_blocks(how: str) -> None:
    model = stacked(Checkpointed)
    expected = truth(model, batch())
    model.how = how
    with warnings.catch_warnings():
        # The inner one, in the first forward of the outer one, has no grad.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        record = watched(model, steps=2)
    assert assert_true(record, expected, step=0) == 52


def test_a_checkpoint_around_the_whole_model() -> None:
    model = stack()
    expected = truth(model, batch())

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return checkpoint.checkpoint(m, x, use_reentrant=False).square().mean()

    assert assert_true(watched(model, loss, steps=2), expected, step=0) == 52


def test_a_reentrant_checkpoint_around_the_whole_model_is_said_to_be_unseen() -> None:
    model = stack()
    with pytest.warns(gradscope.GradscopeWarning, match="0 forward calls in grad mode"):
        with gradscope.watch(model, layers="**") as scope:
            x = batch().requires_grad_()
            checkpoint.checkpoint(model, x, use_reentrant=True).square().mean().backward()
    assert not scope.record.steps


# -- other lives of a module -------------------------------------------------------------------------


def test_scripted_parts_are_absent_with_the_reason() -> None:
    class Net(Stack):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for block in self.blocks:
                h = block(h)
            return self.head(self.scripted(h))

    model = stacked(Net)
    twin = stacked(Net)
    square_loss(twin, batch()).backward()
    record = watched(model)
    for layer in ("scripted", "scripted.0"):
        assert status(record, layer, "activation") == "not supported: a module of TorchScript"
        assert status(record, layer, "output_grad") == "not supported: a module of TorchScript"
    for name, p in twin.named_parameters():
        assert p.grad is not None
        assert_equal(value(record, name, "param_grad"), p.grad.norm().item())
    with pytest.raises(LayerError, match="TorchScript"):
        gradscope.watch(model.scripted, layers="**")


def test_lazy_modules_have_their_shape_from_the_first_forward_on() -> None:
    class Net(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.LazyLinear(6)

    model = stacked(Net)
    with gradscope.watch(model, layers="**") as scope:
        for i in range(2):
            if i:
                expected = truth(model, batch(i))
            square_loss(model, batch(i)).backward()
            optimizer = sgd(model)
            optimizer.step()
            optimizer.zero_grad()
    assert value(scope.record, "embed.weight", "param_grad", step=0) > 0
    assert assert_true(scope.record, expected, step=1) == 52


def test_a_forked_process_writes_nothing_into_the_file(tmp_path: Path) -> None:
    model, path = stack(), tmp_path / "run.jsonl"
    optimizer = sgd(model)
    with gradscope.watch(model, path=path) as scope:
        for i in range(3):
            square_loss(model, batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if i == 1:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
                    child = os.fork()
                if child == 0:
                    try:
                        scope.close()
                    finally:
                        os._exit(0)
                os.waitpid(child, 0)
    assert [s.step for s in Record.load(path).steps] == [0, 1, 2]
    assert Record.load(path) == scope.record


def test_a_forward_with_dual_numbers_is_no_step_of_its_own() -> None:
    from torch.autograd import forward_ad

    model, unwatched = stack(), stack()
    optimizer = sgd(model)
    expected = truth(model, batch())
    with gradscope.watch(model, layers="**") as scope:
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when it loads this
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(batch(), batch(1)))).tangent
        square_loss(model, batch()).backward()
        optimizer.step()
    _, product = torch.func.jvp(unwatched, (batch(),), (batch(1),))
    assert tangent is not None and torch.allclose(tangent, product)
    assert assert_true(scope.record, expected) == 52


def test_a_watch_that_begins_and_ends_between_forward_and_backward() -> None:
    model = stack()
    optimizer = sgd(model)
    loss = square_loss(model, batch(5))
    scope = gradscope.watch(model, layers="**")
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    expected = truth(model, batch())
    square_loss(model, batch()).backward()
    optimizer.step()
    optimizer.zero_grad()
    late = square_loss(model, batch(6))
    scope.close()
    late.backward()
    assert [s.step for s in scope.record.steps] == [0]
    assert assert_true(scope.record, expected) == 52


def test_copies_of_a_model_half_way_through_a_step() -> None:
    model = stack()
    optimizer = sgd(model)
    expected = truth(model, batch())
    with gradscope.watch(model, layers="**") as scope:
        loss = square_loss(model, batch())
        twin = copy.deepcopy(model)
        square_loss(twin, 100 * batch()).backward()
        loss.backward()
        optimizer.step()
    assert assert_true(scope.record, expected) == 52
