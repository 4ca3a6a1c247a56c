"""Several threads: two models that train at once, and forwards of the watched model beside its training.

The oracle is torch.autograd.grad on an unwatched float64 copy, taken before each step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from small_models import Truth, assert_true, batch, sgd, square_loss, stack, truth
from small_models import no_faults as no_faults  # a fixture of every test here
from torch import nn

import gradscope
from gradscope.record import Record


def together(*functions: Callable[[], None]) -> None:
    """Run them at once; an error in one is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], None]) -> None:
        try:
            start.wait(10)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


def training(
    model: nn.Module, expected: list[Truth], ended: threading.Event, steps: int
) -> Callable[[], None]:
    """A loop that notes the truth of each step before it, and says when it is over."""
    optimizer = sgd(model)

    def run() -> None:
        try:
            for i in range(steps):
                expected.append(truth(model, batch(i)))
                square_loss(model, batch(i)).backward()
                optimizer.step()
                optimizer.zero_grad()
        finally:
            ended.set()

    return run


def test_two_watched_models_train_in_two_threads() -> None:
    found: list[tuple[Record, list[Truth]]] = []

    def train(seed: int) -> Callable[[], None]:
        def run() -> None:
            model = stack(seed=seed)
            optimizer = sgd(model)
            expected = []
            with gradscope.watch(model, layers="**") as scope:
                for i in range(15):
                    expected.append(truth(model, batch(seed + i)))
                    square_loss(model, batch(seed + i)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            found.append((scope.record, expected))

        return run

    together(train(0), train(100))
    assert len(found) == 2
    for record, expected in found:
        assert [s.step for s in record.steps] == list(range(15))
        assert [assert_true(record, t, step=i) for i, t in enumerate(expected)] == [52] * 15


def test_a_watched_model_beside_an_unwatched_one_with_a_scaler_of_its_own() -> None:
    model, other = stack(), stack(seed=1)
    stranger = sgd(other)
    expected: list[Truth] = []
    ended = threading.Event()

    def unwatched() -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        while not ended.is_set():
            scaler.scale(square_loss(other, batch(3))).backward()
            scaler.step(stranger)
            scaler.update()
            stranger.zero_grad()

    with gradscope.watch(model, layers="**") as scope:
        together(training(model, expected, ended, 15), unwatched)
    assert len(scope.record.steps) == 15
    for i, t in enumerate(expected):
        assert assert_true(scope.record, t, step=i) == 52
        assert scope.record.steps[i].loss_scale is None


def test_a_thread_that_evaluates_the_model_while_it_trains() -> None:
    """An asynchronous metric or a data generator: forwards in no_grad in the middle of a step."""
    model = stack()
    expected: list[Truth] = []
    ended = threading.Event()

    def evaluating() -> None:
        while not ended.is_set():
            with torch.no_grad():
                model(100 * batch(7))

    with gradscope.watch(model, layers="**") as scope:
        together(training(model, expected, ended, 25), evaluating)
    assert [s.step for s in scope.record.steps] == list(range(25))
    assert [assert_true(scope.record, t, step=i) for i, t in enumerate(expected)] == [52] * 25


def test_a_thread_that_reads_the_record_while_the_model_trains() -> None:
    model = stack()
    expected: list[Truth] = []
    ended = threading.Event()
    seen: list[int] = []

    def reading() -> None:
        while not ended.is_set():
            record = scope.record
            seen.append(len(record.steps))
            if record.steps:
                record.table(step=record.steps[-1].step)

    with gradscope.watch(model, layers="**") as scope:
        together(training(model, expected, ended, 25), reading)
    assert seen == sorted(seen)
    assert [assert_true(scope.record, t, step=i) for i, t in enumerate(expected)] == [52] * 25


def test_a_backward_pass_in_another_thread_than_the_forward() -> None:
    model = stack()
    optimizer = sgd(model)
    with gradscope.watch(model, layers="**") as scope:
        for i in range(3):
            expected = truth(model, batch(i))
            loss = square_loss(model, batch(i))
            together(loss.backward)
            optimizer.step()
            optimizer.zero_grad()
            assert assert_true(scope.record, expected, step=i) == 52
