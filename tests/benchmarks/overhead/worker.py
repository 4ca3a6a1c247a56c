"""One measurement in a process of its own: reads a job, writes what was measured."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmarks.overhead import memory, peers
from benchmarks.overhead.meter import Meter, idle_costs
from benchmarks.overhead.turns import CADENCE, Clock, Subject, ratio, share, take_turns
from benchmarks.overhead.workloads import WORKLOADS, Training

import gradscope
from gradscope.collect.schedule import Schedule
from gradscope.layers import select
from gradscope.statistics import one_pass

GRANULARITIES = ("blocks", "default", "leaf")
#: Steps that nobody measures: the first one is slow, and allocates.
WARMUP = 2


@dataclass(frozen=True)
class Job:
    """What a worker measures.

    Attributes:
        workload: a name in `WORKLOADS`.
        watchers: granularities, or peers; ``control`` is a second unwatched model.
        backend: of torch.compile; None: eager.
        rounds: of turns, at most.
        unrecorded: rounds of steps that are watched and not recorded.
        least: rounds at least, where the time is over.
        seconds: for all rounds.
        one_pass: False: without gradscope's extension modules, also where they were built.
    """

    workload: str
    watchers: tuple[str, ...]
    bf16: bool = False
    backend: str | None = None
    rounds: int = 2 * CADENCE
    unrecorded: int = 0
    least: int = 0
    seconds: float = 1e9
    device: str = "cpu"
    memory: bool = True
    one_pass: bool = True


@dataclass
class Measured:
    """What was measured of one watcher.

    Attributes:
        ratio: watched over unwatched time, and its 95 % interval.
        share: self time and dispatch, see `turns.Share`; None where hooks are compiled.
        peak: peak memory, as a ratio to the unwatched one, of an ordinary step.
        slow_peak: the same of a step with the slow statistics.
        limit: reading what is watched once, as a share of the unwatched step.
        error: why nothing was measured.
    """

    ratio: tuple[float, float, float] | None = None
    share: dict[str, float] | None = None
    rounds: int = 0
    peak: float | None = None
    slow_peak: float | None = None
    limit: float | None = None
    breaks: int | None = None
    version: str = ""
    error: str = ""


@dataclass
class Outcome:
    """What a worker found: by watcher, and by watcher for the steps that are not recorded."""

    plain_s: float = 0.0
    bandwidth: float = 0.0
    idle: dict[str, float] = field(default_factory=dict)
    recorded: dict[str, Measured] = field(default_factory=dict)
    unrecorded: dict[str, Measured] = field(default_factory=dict)


def selection(granularity: str, workload: str) -> str | None:
    """What `gradscope.watch` is told to watch."""
    return {"blocks": WORKLOADS[workload].blocks, "default": None, "leaf": "**"}[granularity]


def build(name: str, job: Job, folder: Path) -> tuple[Subject, gradscope.scope.Scope | None]:
    """A model with this watcher on it, warmed up."""
    training = Training(WORKLOADS[job.workload], bf16=job.bf16, device=job.device)
    watched = name not in ("plain", "control")
    meter = Meter(timing=job.backend is None) if watched else None
    subject = Subject(name, training, meter)
    scope = None
    if name in GRANULARITIES:
        subject.cadence = CADENCE
        scope = _watch(subject, job, slow_every=CADENCE)
    elif name in peers.PEERS:
        assert meter is not None
        with meter.attaching(training.model):
            after = peers.PEERS[name].attach(training.model, folder)
        if after is not None:
            training.after_backward = meter.timed("", after)
    if job.backend is not None:
        training.compile(job.backend)
    for _ in range(WARMUP):
        subject.step()
    return subject, scope


def _watch(subject: Subject, job: Job, *, slow_every: int) -> gradscope.scope.Scope:
    model = subject.training.model
    layers = selection(subject.name, job.workload)
    assert subject.meter is not None
    with subject.meter.attaching(model):
        return gradscope.watch(model, layers, slow_every=slow_every)


def run(job: Job, folder: Path) -> Outcome:
    """Measure."""
    torch.set_num_threads(1)
    if not job.one_pass:
        one_pass._native = None
    found = Outcome(bandwidth=memory.bandwidth(job.device), idle=idle_costs())
    plain, _ = build("plain", job, folder)
    subjects: dict[str, Subject] = {}
    scopes: dict[str, gradscope.scope.Scope] = {}
    breaks: dict[str, int] = {}
    for name in job.watchers:
        measured = found.recorded[name] = Measured()
        if name in peers.PEERS:
            measured.version = peers.version(peers.PEERS[name].distribution)
        try:
            before = _graph_breaks()
            subjects[name], scope = build(name, job, folder)
            breaks[name] = _graph_breaks() - before
        except Exception as error:
            traceback.print_exc()
            measured.error = f"{type(error).__name__}: {error}"
            continue
        if scope is not None:
            scopes[name] = scope
    clock = Clock(job.device)
    everyone = [plain, *subjects.values()]

    rounds = take_turns(everyone, rounds=job.rounds, least=job.least, seconds=job.seconds, clock=clock)
    found.plain_s = sorted(plain.seconds)[len(plain.seconds) // 2]
    for name, subject in subjects.items():
        _note(found.recorded[name], subject, plain, found.idle)
        found.recorded[name].rounds = rounds
        if job.backend is not None:
            found.recorded[name].breaks = breaks[name]
    if job.memory:
        usual = memory.peak_bytes(plain)
        for name, subject in subjects.items():
            if (subject.training.steps % CADENCE) == 0 and name in scopes:
                subject.step()
            found.recorded[name].peak = memory.peak_bytes(subject) / usual
    if job.unrecorded:
        _unrecorded(found, job, everyone, scopes, clock)
    for name, scope in scopes.items():
        model = subjects[name].training.model
        faults = scope.faults
        scope.close()
        if faults:
            found.recorded[name].error = f"gradscope's own errors: {faults}"
        modules = [module for _, module in select(model, selection(name, job.workload))]
        if job.backend is None:
            size = memory.watched_bytes(subjects[name].training, modules)
            found.recorded[name].limit = size / found.bandwidth / found.plain_s
            if job.memory:
                _watch(subjects[name], job, slow_every=1)
                found.recorded[name].slow_peak = memory.peak_bytes(subjects[name]) / usual
    return found


def _note(measured: Measured, subject: Subject, plain: Subject, idle: dict[str, float]) -> None:
    measured.ratio = ratio(subject, plain)
    if subject.meter is not None and subject.meter.timing:
        measured.share = asdict(share(subject, idle))


def _unrecorded(
    found: Outcome,
    job: Job,
    everyone: Sequence[Subject],
    scopes: dict[str, gradscope.scope.Scope],
    clock: Clock,
) -> None:
    """The same models, watched on: none of the steps is recorded any more."""
    for scope in scopes.values():
        scope._recorder.schedule = Schedule(every=10**9)
    for subject in everyone:
        for _ in range(WARMUP):
            subject.step()
        subject.forget()
    rounds = take_turns(everyone, rounds=job.unrecorded, clock=clock, seed=1)
    for subject in everyone:
        if subject.name in scopes:
            subject.cadence = 1
            measured = found.unrecorded[subject.name] = Measured(rounds=rounds)
            _note(measured, subject, everyone[0], found.idle)


def _graph_breaks() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def parse(text: str) -> Job:
    """A job as it was written."""
    values: dict[str, Any] = json.loads(text)
    return Job(**{**values, "watchers": tuple(values["watchers"])})


def outcome(text: str) -> Outcome:
    """An outcome as it was written."""
    values = json.loads(text)
    for part in ("recorded", "unrecorded"):
        values[part] = {name: Measured(**measured) for name, measured in values[part].items()}
    return Outcome(**values)


def main() -> None:
    job, out = parse(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        out.write_text(json.dumps(asdict(run(job, Path(folder)))))


if __name__ == "__main__":
    main()
