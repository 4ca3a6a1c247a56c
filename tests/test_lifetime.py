"""What a watch leaves behind: nothing on the model, nothing in memory, everything on disk."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import tracemalloc
import warnings
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    Block,
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
from torch import nn

import gradscope
from gradscope import statistics
from gradscope.record import Record


def train(model: nn.Module, steps: range, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or sgd(model)
    for i in steps:
        square_loss(model, batch(i)).backward()
        optimizer.step()
        optimizer.zero_grad()


# -- the model -----------------------------------------------------------------------------------


def test_close_restores_everything() -> None:
    from torch.optim import optimizer as optim

    model = stack()
    train(model, range(1))
    scaler = torch.amp.GradScaler
    state = {id(m): dict(m.__dict__) for m in model.modules()}
    before = (
        hooks_of(model),
        len(optim._global_optimizer_pre_hooks),
        len(optim._global_optimizer_post_hooks),
        scaler.scale,
        scaler.step,
        scaler.update,
    )
    with gradscope.watch(model, layers="**") as scope:
        assert hooks_of(model) != before[0]
        assert scaler.scale is not before[3]
        train(model, range(2))
    scope.close()  # once more does nothing
    assert before == (
        hooks_of(model),
        len(optim._global_optimizer_pre_hooks),
        len(optim._global_optimizer_post_hooks),
        scaler.scale,
        scaler.step,
        scaler.update,
    )
    for module in model.modules():
        assert module.__dict__.keys() == state[id(module)].keys()
    assert all(not (p._backward_hooks or p._post_accumulate_grad_hooks) for p in model.parameters())


def test_an_exception_in_the_block_closes_too() -> None:
    model = stack()
    before = hooks_of(model)
    with pytest.raises(ZeroDivisionError), gradscope.watch(model) as scope:
        train(model, range(2))
        raise ZeroDivisionError
    assert scope.closed and hooks_of(model) == before
    assert len(scope.record.steps) == 2


def test_the_users_hooks_keep_their_order() -> None:
    model = stack()
    heard: list[str] = []

    def hook(name: str) -> Any:
        return lambda *a: heard.append(name)

    block = model.blocks[1]
    block.register_forward_pre_hook(hook("pre"))
    block.register_forward_hook(hook("before"))
    scope = gradscope.watch(model)
    block.register_forward_hook(hook("during"))
    block.register_full_backward_hook(hook("backward"))
    train(model, range(1))
    scope.close()
    block.register_forward_hook(hook("after"))
    train(model, range(1))
    assert heard == [
        "pre",
        "before",
        "during",
        "backward",
        "pre",
        "before",
        "during",
        "after",
        "backward",
    ]
    assert len(scope.record.steps) == 1


def test_a_watched_model_is_copied_saved_and_pickled_unwatched() -> None:
    model = stack()
    with gradscope.watch(model, layers="**") as scope:
        train(model, range(1))
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        again = pickle.loads(pickle.dumps(model))
        for other in (twin, loaded, again):
            train(other, range(3))
            assert torch.equal(other(batch()), other(batch()))
        with gradscope.watch(twin) as scope_of_twin:
            train(twin, range(2))
        train(model, range(1, 2))
    assert len(scope.record.steps) == 2
    assert len(scope_of_twin.record.steps) == 2


# -- watching again ------------------------------------------------------------------------------


def test_what_is_done_with_a_copy_is_of_no_step() -> None:
    model = stack()
    with gradscope.watch(model, layers="**", warn=False) as scope:
        twin = copy.deepcopy(model)
        train(twin, range(2))
        assert not scope.record.steps
        expected = truth(model, batch())
        train(model, range(1))
    assert len(scope.record.steps) == 1
    assert assert_true(scope.record, expected) == 52


def test_watching_twice_gives_the_same_scope_and_counts_once() -> None:
    model = stack()
    first = gradscope.watch(model, layers="**")
    assert gradscope.watch(model, layers="**") is first
    expected = truth(model, batch())
    train(model, range(1))
    first.close()
    assert assert_true(first.record, expected) == 52
    assert gradscope.watch(model) is not first
    gradscope.watch(model).close()


def test_watching_again_with_other_options_says_that_the_first_stay() -> None:
    model = stack()
    with gradscope.watch(model) as first:
        with pytest.warns(gradscope.GradscopeWarning, match=r"already.*layers, schedule.*scope\.close"):
            assert gradscope.watch(model, layers="**", every=2) is first
        train(model, range(1))


def test_of_nested_blocks_the_outermost_ends_the_watch() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model) as outer:
        with gradscope.watch(model) as inner:
            train(model, range(2), optimizer)
        assert inner is outer and not outer.closed
        train(model, range(2, 4), optimizer)
    assert outer.closed
    assert [s.step for s in outer.record.steps] == [0, 1, 2, 3]


def test_a_model_and_its_part_are_watched_side_by_side() -> None:
    model = stack()
    expected = truth(model, batch())
    block = model.blocks[1]
    with gradscope.watch(model, layers="**") as whole, gradscope.watch(block, layers="**") as part:
        train(model, range(1))
    assert assert_true(whole.record, expected) == 52
    g = expected.output_grad
    assert_equal(value(part.record, "mlp.0", "output_grad"), g["blocks.1.mlp.0"][0] or 0)
    assert_equal(value(part.record, "", "output_grad"), g["blocks.1"][0] or 0)
    assert_equal(
        value(part.record, "mlp.0.weight", "param_grad"),
        expected.param_grad["blocks.1.mlp.0.weight"] or 0,
    )


# -- memory --------------------------------------------------------------------------------------


def test_a_deleted_model_is_freed_though_never_closed() -> None:
    from torch.optim import optimizer as optim

    hooks = len(optim._global_optimizer_pre_hooks)
    scale = torch.amp.GradScaler.scale
    model = stack()
    scope = gradscope.watch(model, layers="**")
    optimizer = sgd(model)
    train(model, range(2), optimizer)
    freed = [weakref.ref(model), weakref.ref(model.blocks[1]), weakref.ref(model.head.weight)]
    del model, optimizer
    gc.collect()
    assert [r() for r in freed] == [None] * 3
    assert len(scope.record.steps) == 2
    assert len(optim._global_optimizer_pre_hooks) == hooks
    assert torch.amp.GradScaler.scale is scale


def test_a_deleted_model_without_a_cycle_is_freed_at_once() -> None:
    model = stack()
    gradscope.watch(model, warn=False)
    square_loss(model, batch()).backward()
    freed = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert freed() is None
    finally:
        gc.enable()


def test_hundreds_of_watches_leave_nothing() -> None:
    from torch.optim import optimizer as optim

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    optimizer = sgd(model)

    def cycles(n: int) -> None:
        for _ in range(n):
            with gradscope.watch(model, statistics=["l2"]):
                train(model, range(1), optimizer)
        gc.collect()

    cycles(20)
    before = hooks_of(model)
    tracemalloc.start(1)
    taken = []
    for _ in range(5):
        cycles(60)
        taken.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert hooks_of(model) == before
    assert len(optim._global_optimizer_post_hooks) == 0
    # A leak grows in every round; a table of Python's that is resized once does not.
    assert min(late - early for early, late in pairwise(taken)) < 2_000, taken


def test_a_long_run_stays_within_its_bytes_and_keeps_what_matters() -> None:
    model = stack()
    optimizer = sgd(model, 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with gradscope.watch(model, max_bytes=40_000, slow_every=1000, update=False) as scope:
            for i in range(300):
                x = batch(i % 7)
                loss = square_loss(model, x)
                if i == 101:
                    loss = loss * float("nan")
                loss.backward()
                if i != 101:
                    optimizer.step()
                else:
                    for p in model.parameters():
                        p.grad = None
                    scope._recorder._step.stepped = True
                optimizer.zero_grad()
    steps = scope.record.steps
    assert sum(s.nbytes for s in steps) <= 40_000
    numbers = [s.step for s in steps]
    assert numbers[0] == 0 and numbers[-1] == 299 and 101 in numbers
    assert numbers == sorted(set(numbers))
    assert 10 < len(numbers) < 299


# -- the file ------------------------------------------------------------------------------------


def test_the_file_equals_the_record(tmp_path: Path) -> None:
    model = stack()
    path = tmp_path / "run.jsonl"
    with gradscope.watch(model, path=path) as scope:
        train(model, range(4))
    assert Record.load(path) == scope.record
    assert len(scope.record.steps) == 4


def test_every_finished_step_is_in_the_file_at_once(tmp_path: Path) -> None:
    model = stack()
    optimizer = sgd(model)
    path = tmp_path / "run.jsonl"
    with gradscope.watch(model, path=path):
        for i in range(3):
            assert [s.step for s in Record.load(path).steps] == list(range(max(i - 1, 0)))
            train(model, range(i, i + 1), optimizer)


def test_a_resumed_run_continues_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, path=path):
        train(model, range(3), optimizer)
    with gradscope.watch(model, path=path) as scope:
        train(model, range(3, 5), optimizer)
    record = Record.load(path)
    assert [s.step for s in record.steps] == [0, 1, 2, 3, 4]
    assert [s.step for s in scope.record.steps] == [3, 4]
    assert len(record.header["sessions"]) == 1


def test_ctrl_c_keeps_finished_steps_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    model = stack()
    optimizer = sgd(model)
    with pytest.raises(KeyboardInterrupt), gradscope.watch(model, path=path) as scope:
        train(model, range(3), optimizer)
        out = model(batch(3))
        handle = out.register_hook(lambda g: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert handle is not None
        out.sum().backward()
    record = Record.load(path)
    assert [s.step for s in record.steps] == [0, 1, 2]
    assert record == scope.record


def test_thinning_in_memory_keeps_all_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    model = stack()
    with gradscope.watch(model, path=path, max_bytes=20_000) as scope:
        train(model, range(30))
    assert len(scope.record.steps) < 30
    assert [s.step for s in Record.load(path).steps] == list(range(30))


def test_a_full_disk_loses_nothing_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, path=tmp_path / "run.jsonl") as scope:
        train(model, range(2), optimizer)

        def full(step: Any) -> None:
            raise OSError(28, "No space left on device")

        assert scope._recorder._storage.writer is not None
        monkeypatch.setattr(scope._recorder._storage.writer, "write", full)
        with pytest.warns(gradscope.GradscopeWarning, match="No space left") as caught:
            warnings.simplefilter("always")
            train(model, range(2, 6), optimizer)
        assert len(caught) == 1
    assert [s.step for s in scope.record.steps] == list(range(6))
    assert sum(scope.faults.values()) == 5 and "No space left" in next(iter(scope.faults))
    assert status(scope.record, "blocks.1", "output_grad", step=4) == "ok"


@pytest.mark.parametrize("ending", ["", "del model"])
def test_a_program_that_closes_nothing_still_writes_the_last_step(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "run.jsonl"
    program = f"""
import warnings; warnings.simplefilter("error")
import torch, gradscope
torch.manual_seed(0)
nn = torch.nn
model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
optimizer = torch.optim.SGD(model.parameters(), lr=.1)
gradscope.watch(model, path={str(path)!r})
for _ in range(3):
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
del optimizer
{ending}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert [s.step for s in Record.load(path).steps] == [0, 1, 2]


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_a_kernel_never_ends_the_training(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stack()
    unwatched = copy.deepcopy(model)
    losses = [square_loss(unwatched, batch(i)) for i in range(1)]
    optimizer = sgd(model)
    expected = truth(model, batch(0))
    real = statistics.measure
    columns = statistics.ACTIVATION if where == "forward" else statistics.GRADIENT
    target: dict[str, int] = {"calls": 0}

    def failing(x: Any, chosen: Any, **kwargs: Any) -> Any:
        if chosen is columns and tuple(x.shape) == (5, 4, 12):
            target["calls"] += 1
            if target["calls"] % 6 in (1, 2):  # the first block's two wide layers, of three blocks' six
                raise ArithmeticError("injected")
        return real(x, chosen, **kwargs)

    monkeypatch.setattr(statistics, "measure", failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradscope.watch(model, layers="**") as scope:
            for i in range(3):
                loss = square_loss(model, batch(i))
                loss.backward()
                losses.append(loss)
                optimizer.step()
                optimizer.zero_grad()
    assert losses[0].item() == losses[1].item()
    assert len(caught) == 1 and "ArithmeticError: injected" in str(caught[0].message)
    assert sum(scope.faults.values()) == 6 and all("injected" in k for k in scope.faults)
    failed = "blocks.0" if where == "forward" else "blocks.2"
    for layer in (f"{failed}.mlp.0", f"{failed}.mlp.1"):
        assert status(scope.record, layer, "output_grad", step=0) == "error: ArithmeticError: injected"
    for signal in ("activation", "output_grad"):
        for layer in ("blocks.1.mlp.0", "blocks.1", f"{failed}.mlp.2", "head"):
            norm = getattr(expected, signal)[layer][0]
            assert_equal(value(scope.record, layer, signal, step=0), norm)
    for name, g in expected.param_grad.items():
        assert_equal(value(scope.record, name, "param_grad", step=0), g or 0)


def test_an_error_at_the_end_of_a_step_costs_that_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradscope.collect.assembly import Assembler

    model = stack()
    optimizer = sgd(model)
    real = Assembler.step

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == 1:
            raise ArithmeticError("injected")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Assembler, "step", failing)
    expected = []
    with pytest.warns(gradscope.GradscopeWarning, match="injected"):
        warnings.simplefilter("always")
        with gradscope.watch(model, layers="**") as scope:
            for i in range(3):
                expected.append(truth(model, batch(i)))
                train(model, range(i, i + 1), optimizer)
    assert [s.step for s in scope.record.steps] == [0, 2]
    for i in (0, 2):
        assert assert_true(scope.record, expected[i], step=i) == 52


def test_repr_says_what_is_watched() -> None:
    model = stack(Block(), Block())
    with gradscope.watch(model) as scope:
        train(model, range(2))
        assert repr(scope) == "<Scope watching Stack: blocks (2 blocks), 2 branches; 1 step recorded>"
    assert repr(scope) == "<Scope closed Stack: blocks (2 blocks), 2 branches; 2 steps recorded>"


def test_the_loss_denominator_can_be_said_while_watching(tmp_path: Path) -> None:
    model, path = stack(), tmp_path / "run.jsonl"
    with gradscope.watch(model, path=path) as scope:
        assert scope.record.header["loss_denominator"] is None
        for i in range(2):
            square_loss(model, batch(i)).backward()
            scope.step(loss_denominator=12)
        with pytest.raises(ValueError, match="positive"):
            scope.step(loss_denominator=0)
    assert scope.record.header["loss_denominator"] == 12
    assert gradscope.Record.load(path).header["loss_denominator"] == 12
    unknown = gradscope.Record({**scope.record.header, "loss_denominator": None}, scope.record.steps)
    flow, relative = gradscope.profile(scope.record, step=1), gradscope.profile(unknown, step=1)
    assert flow.value == pytest.approx(12 * relative.value)
    assert (flow.unit, relative.unit) != (relative.unit, flow.unit)


def test_a_loss_denominator_that_changes_is_unknown(tmp_path: Path) -> None:
    model, path = stack(), tmp_path / "run.jsonl"
    with gradscope.watch(model, path=path) as scope:
        square_loss(model, batch()).backward()
        scope.step(loss_denominator=12)
        square_loss(model, batch()).backward()
        with pytest.warns(gradscope.GradscopeWarning, match="differs from the 12"):
            scope.step(loss_denominator=11)
        square_loss(model, batch()).backward()
        scope.step(loss_denominator=11)
    assert scope.record.header["loss_denominator"] is None
    assert gradscope.Record.load(path).header["loss_denominator"] is None


@pytest.mark.parametrize("axes", [2, 3])
def test_an_output_is_saved_without_a_word(axes: int) -> None:
    model = stack()
    with gradscope.watch(model, layers="**"), warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model(batch(0) if axes == 3 else batch(0)[0])  # a Linear's view, or its own output
        buffer = io.BytesIO()
        torch.save(output, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), output)


def test_the_users_own_hooks_on_an_output_stay_theirs() -> None:
    model = stack()
    came: list[str] = []
    with gradscope.watch(model, layers="**") as scope:
        output = model(batch(0))
        first = output.register_hook(lambda grad: came.append("first"))
        output.register_hook(lambda grad: came.append("second"))
        first.remove()
        output.square().sum().backward()
        expected = (2 * output).norm().item()
        found = value(scope.record, "head", "output_grad")
    assert came == ["second"]
    assert found == pytest.approx(expected, rel=1e-6)
