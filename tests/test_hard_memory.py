"""A watch costs no memory that it does not give back, and a long run no more than it may.

The oracle is outside of gradscope: tracemalloc, the number of objects that the garbage collector sees,
and the resident memory of the process.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from small_models import batch, hooks_of, sgd, square_loss, stack
from small_models import no_faults as no_faults  # a fixture of every test here

import gradscope


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cycles_leave_nothing(rounds: int, cycles: int) -> None:
    model = stack()
    optimizer = sgd(model)
    x = batch(size=1, tokens=1)

    def cycle() -> None:
        with gradscope.watch(model):
            square_loss(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(10):
        cycle()
    hooks = hooks_of(model)
    objects, traced, resident = [], [], []
    tracemalloc.start(1)
    for _ in range(rounds):
        for _ in range(cycles):
            cycle()
        gc.collect()
        objects.append(len(gc.get_objects()))
        traced.append(tracemalloc.get_traced_memory()[0])
        resident.append(resident_bytes())
    tracemalloc.stop()
    assert hooks_of(model) == hooks
    # A leak grows in every round; a table of Python's that is resized once does not.
    assert min(late - early for early, late in pairwise(objects)) < 5, objects
    assert min(late - early for early, late in pairwise(traced)) < 2_000, traced
    assert resident[-1] - resident[0] < 30_000_000, resident


def steps_stay_within(steps: int, max_bytes: int) -> None:
    model = stack()
    optimizer = sgd(model, 1e-6)
    x = batch(size=1, tokens=2)
    peaks = []
    with gradscope.watch(model, max_bytes=max_bytes, warn=False) as scope:
        for _ in range(4):
            gc.collect()
            tracemalloc.start(1)
            for _ in range(steps // 4):
                square_loss(model, x).backward()
                optimizer.step()
                optimizer.zero_grad()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert sum(s.nbytes for s in scope.record.steps) <= max_bytes
    record = scope.record
    numbers = [s.step for s in record.steps]
    assert numbers[0] == 0 and numbers[-1] == 4 * (steps // 4) - 1
    assert numbers == sorted(set(numbers)) and len(numbers) > 5
    assert sum(s.nbytes for s in record.steps) <= max_bytes
    # What is allocated in a quarter of the run, at its peak: bookkeeping included, at most twice.
    assert peaks[-1] < 2 * max_bytes + 1_000_000, peaks


def test_watch_and_close_leave_memory_flat() -> None:
    cycles_leave_nothing(rounds=4, cycles=6)


def test_a_run_stays_within_max_bytes() -> None:
    steps_stay_within(200, 40_000)


@pytest.mark.slow
def test_a_thousand_cycles_of_watch_and_close_leave_memory_flat() -> None:
    cycles_leave_nothing(rounds=5, cycles=200)


@pytest.mark.slow
def test_ten_thousand_recorded_steps_stay_within_max_bytes() -> None:
    steps_stay_within(10_000, 1_000_000)


def test_the_oracle_sees_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    close = gradscope.Scope.close

    def leaky(self: gradscope.Scope) -> None:
        close(self)
        kept.append([[object()] for _ in range(1000)])

    monkeypatch.setattr(gradscope.Scope, "close", leaky)
    with pytest.raises(AssertionError):
        cycles_leave_nothing(rounds=3, cycles=5)
    assert kept


def test_backward_passes_that_raise_again_and_again_hold_no_memory() -> None:
    model = stack()

    def fail(grad: object) -> None:
        raise RuntimeError("now")

    model.blocks[1].register_forward_hook(lambda m, a, out: (out.register_hook(fail), out)[1])
    with gradscope.watch(model, warn=False) as scope:
        for i in range(20):
            with pytest.raises(RuntimeError, match="now"):
                square_loss(model, batch(i)).backward()
            assert len(scope._recorder.passes) <= 2
    assert not scope.record.steps
