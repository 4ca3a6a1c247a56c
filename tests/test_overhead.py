"""The overhead benchmark's parts on a tiny model; the measurement itself is tests/benchmarks/overhead."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.overhead import memory, meter, report
from benchmarks.overhead.meter import Meter
from benchmarks.overhead.turns import Subject, ratio, share
from benchmarks.overhead.worker import GRANULARITIES, Job, Measured, Outcome, run
from benchmarks.overhead.workloads import VOCABULARY, WORKLOADS, Training
from torch.autograd.variable import Variable
from torch.optim import optimizer as optim

import gradscope
from gradscope.collect.recorder import Recorder
from gradscope.layers import select

TINY = WORKLOADS["tiny"]


def training() -> Training:
    return Training(TINY)


# -- time ------------------------------------------------------------------------------------------------


class FakeTime:
    """A clock that only hooks move."""

    def __init__(self) -> None:
        self.now = 0.0

    def thread_time(self) -> float:
        return self.now

    def hook(self, seconds: float) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            self.now += seconds

        return run


def test_the_meter_has_the_time_and_number_of_every_kind_of_hook(monkeypatch) -> None:
    clock = FakeTime()
    monkeypatch.setattr(meter, "time", clock)
    t, m = training(), Meter()

    def forward(module: Any, args: Any, output: torch.Tensor) -> None:
        clock.now += 1
        output.register_hook(clock.hook(10))
        if module is t.model.blocks[0]:
            output.register_hook(lambda grad: at_the_end())

    def at_the_end() -> None:
        Variable._execution_engine.queue_callback(clock.hook(10_000))

    with m.attaching(t.model):
        for block in t.model.blocks:
            block.register_forward_hook(forward)
            block.register_forward_pre_hook(clock.hook(100))
        handle = optim.register_optimizer_step_post_hook(clock.hook(1000))
    with m.turn():
        t.step()
    handle.remove()
    # Two blocks; the engine's callback once.
    assert m.spent_s == 2 * (1 + 10 + 100) + 1000 + 10_000
    assert m.calls == {"forward": 4, "tensor": 3, "optimizer": 1, "engine": 1}


def test_hooks_run_and_cost_in_their_own_turn_only() -> None:
    t, other, m = training(), training(), Meter()
    before = torch.Tensor.register_hook, Variable._execution_engine
    with m.attaching(t.model):
        scope = gradscope.watch(t.model)
    assert not optim._global_optimizer_pre_hooks and not optim._global_optimizer_post_hooks
    for _ in range(2):
        with m.turn():
            t.step()
    calls = m.calls.total()
    other.step()
    assert m.calls.total() == calls > 0
    assert (torch.Tensor.register_hook, Variable._execution_engine) == before
    assert not optim._global_optimizer_pre_hooks
    scope.close()
    assert scope.faults == {}
    assert len(scope.record.steps) == 2


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nothing_of_gradscope_runs_outside_of_what_is_timed(granularity, monkeypatch) -> None:
    t, m = training(), Meter()
    outside: list[str] = []
    guarded = Recorder.guarded

    def seen(self: Recorder, site: int, function: Callable[..., Any], *args: Any) -> Any:
        if not m.inside:
            outside.append(function.__name__)
        return guarded(self, site, function, *args)

    monkeypatch.setattr(Recorder, "guarded", seen)
    layers = {"blocks": "blocks.*", "default": None, "leaf": "**"}[granularity]
    with m.attaching(t.model):
        scope = gradscope.watch(t.model, layers)
    for _ in range(3):
        with m.turn():
            t.step()
    assert outside == []
    scope.close()
    assert scope.faults == {}


def series(watched: list[float], *, first: int = 0, own: float = 0.0) -> tuple[Subject, Subject]:
    t = training()
    subject = Subject("x", t, cadence=10, seconds=watched, self_s=[own] * len(watched), first=first)
    return subject, Subject("plain", t, seconds=[1.0] * len(watched))


def test_the_ratio_is_the_mean_over_the_cadence() -> None:
    # Steps 2 to 21: those at 10 and 20 are slow, and the next ones finish their record.
    cost = {0: 3.0, 1: 2.0}
    watched, plain = series([cost.get(n % 10, 1.1) for n in range(2, 22)], first=2)
    value, low, high = ratio(watched, plain)
    assert value == low == high == pytest.approx((3 + 2 + 8 * 1.1) / 10)
    watched.cadence = 1
    assert ratio(watched, plain)[0] == pytest.approx(1.1)


def test_the_interval_holds_the_median_and_has_the_width_of_its_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(400, generator=rng)).tolist()
    watched, plain = series([1.2 + x for x in noise])
    watched.cadence = 1
    value, low, high = ratio(watched, plain)
    assert low < value < high
    # The standard error of a normal sample's median is 1.2533 sd/√n.
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 * 0.1 / math.sqrt(400), rel=0.3)


def test_self_time_is_that_of_ten_steps_over_the_rest_of_the_step() -> None:
    watched, _ = series([1.3] * 9 + [2.1] + [1.3] * 10)
    watched.self_s = [0.3] * 9 + [1.1] + [0.3] * 10
    watched.calls = Counter({"forward": 40, "tensor": 60})
    found = share(watched, {"forward": 0.001, "tensor": 0.002, "timer": 0.01})
    # The rest of a step is 1; a step has five calls, each timed with .01 too much; 11 windows of ten
    # steps, of which the first ten have the slow step.
    assert found.rest_s == pytest.approx(1.0)
    assert found.self == pytest.approx(0.38 - 0.05)
    assert (found.low, found.high) == (pytest.approx(0.3 - 0.05), pytest.approx(0.38 - 0.05))
    assert found.dispatch == pytest.approx((40 * 0.001 + 60 * 0.002) / 20)
    assert found.hooks == 5


def test_idle_hooks_cost_something() -> None:
    assert set(meter.idle_costs(repeats=3)) == {"forward", "tensor", "timer"}


# -- bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "features"),
    [
        ("blocks.*", 2 * TINY.width),
        # Per block: norms, qkv, attention (its own output projection's tensor), up, mlp, the block.
        ("**", 2 * (1 + 1 + 3 + 1 + 4 + 1 + 1) * TINY.width + 2 * TINY.width + VOCABULARY),
    ],
)
def test_the_bytes_that_are_watched(layers, features) -> None:
    t = training()
    modules = [module for _, module in select(t.model, layers)]
    parameters = 4 * sum(p.numel() for p in t.model.parameters())
    positions = TINY.sequences * TINY.tokens
    assert memory.watched_bytes(t, modules) == 2 * 4 * features * positions + parameters
    assert all(p.grad is None for p in t.model.parameters())


def test_the_peak_holds_parameters_optimizer_and_what_is_allocated_in_the_step() -> None:
    t = training()
    t.step()
    parameters = 4 * sum(p.numel() for p in t.model.parameters())
    usual = memory.peak_bytes(Subject("plain", t))
    assert usual > 4 * parameters  # the gradients, and AdamW's two moments
    size = 50_000_000
    t.after_backward = lambda step: torch.empty(size, dtype=torch.uint8)
    assert size + 4 * parameters < memory.peak_bytes(Subject("more", t)) < size + usual


# -- the whole -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Job, Outcome]]:
    jobs = (
        Job("tiny", ("control", *GRANULARITIES), rounds=12, unrecorded=2),
        Job("tiny", ("torchexplorer",), rounds=2),
    )
    return [(job, run(job, tmp_path_factory.mktemp("peers"))) for job in jobs]


def test_a_worker_measures_everything(found) -> None:
    _, out = found[0]
    assert [m.error for m in out.recorded.values()] == [""] * 4
    assert out.plain_s > 0 and out.bandwidth > 0
    for name in GRANULARITIES:
        m = out.recorded[name]
        assert m.ratio is not None and m.ratio[1] <= m.ratio[0] <= m.ratio[2]
        assert m.share is not None and 0 < m.share["low"] <= m.share["self"] <= m.share["high"]
        assert m.limit is not None and m.limit > 0
        assert m.peak is not None and m.slow_peak is not None
        # Unrecorded, no tensor has a hook.
        quiet = out.unrecorded[name].share
        assert quiet is not None and quiet["hooks"] < m.share["hooks"]


def test_a_peer_that_is_not_there_is_said_to_be_missing(found) -> None:
    assert "No module named 'torchexplorer'" in found[1][1].recorded["torchexplorer"].error
    page = report.page([(replace(found[0][0], workload="w1"), found[0][1]), found[1]], quick=True)
    (row,) = [line for line in page if line.startswith("| torchexplorer") and "tiny" in line]
    assert "failed: ModuleNotFoundError" in row


def test_the_page_says_which_target_is_not_reached() -> None:
    share = {"self": 0.03, "low": 0.03, "high": 0.03, "dispatch": 0.001, "rest_s": 1.0, "hooks": 1.0}
    good, bad = Measured(ratio=(1.03, 1.0, 1.06), share=share), Measured(error="it | failed")
    out = Outcome(1.0, 1e9, {"forward": 1e-6, "tensor": 1e-6}, {"blocks": good, "default": good})
    out.recorded["leaf"] = bad
    page = report.page([(Job("w1", GRANULARITIES), out)], quick=True)
    missed = [line for line in page if line.startswith("- w1, fp32, ")]
    assert missed == ["- w1, fp32, blocks: 1.031, to reach 1.02."]
    (row,) = [line for line in page if line.startswith("| w1, every module")]
    assert "failed: it \\| failed" in row
