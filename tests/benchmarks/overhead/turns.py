"""Watched and unwatched models take turns, in random order, and the ratios of their times."""

from __future__ import annotations

import gc
import random
import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from benchmarks.overhead.meter import Meter
from benchmarks.overhead.workloads import Training

#: Every so many steps of a gradscope watch one has the slow statistics.
CADENCE = 10


@dataclass
class Subject:
    """A model that takes its turns.

    Attributes:
        name: of what watches it.
        meter: its watcher's; None for an unwatched one.
        cadence: after so many steps the cost repeats itself; 1 where all steps cost the same.
    """

    name: str
    training: Training
    meter: Meter | None = None
    cadence: int = 1
    seconds: list[float] = field(default_factory=list)
    self_s: list[float] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    first: int = 0

    def step(self) -> None:
        """One step without measuring it."""
        if self.meter is None:
            self.training.step()
        else:
            with self.meter.turn():
                self.training.step()

    def take_turn(self, clock: Clock) -> None:
        """One step, measured."""
        if not self.seconds:
            self.first = self.training.steps
        if self.meter is not None:
            self.meter.reset()
        clock.start()
        self.step()
        self.seconds.append(clock.stop())
        if self.meter is not None:
            self.self_s.append(self.meter.spent_s)
            self.calls.update(self.meter.calls)

    def forget(self) -> None:
        """Begin a new series."""
        self.seconds, self.self_s, self.calls = [], [], Counter()


class Clock:
    """Seconds of CPU time of this process and its children; on a GPU, between two events on it."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self._start = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self._events = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
            self._events[0].record()
        else:
            self._start = _cpu_s()

    def stop(self) -> float:
        if self._events is None:
            return _cpu_s() - self._start
        self._events[1].record()
        torch.cuda.synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


def _cpu_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def take_turns(
    subjects: Sequence[Subject],
    *,
    rounds: int,
    least: int = 0,
    seconds: float = float("inf"),
    clock: Clock,
    seed: int = 0,
) -> int:
    """In each round every subject takes one step, in random order.

    Args:
        subjects: the models.
        rounds: at most so many.
        least: at least so many, also when the time is over.
        seconds: the time for all of them.
        clock: what measures.
        seed: of the order.

    Returns:
        The number of rounds.
    """
    dice = random.Random(seed)
    order = list(subjects)
    gc.collect()
    gc.freeze()  # what was made before is no step's garbage
    end = time.monotonic() + seconds
    done = 0
    while done < rounds and (done < least or time.monotonic() < end):
        dice.shuffle(order)
        for subject in order:
            subject.take_turn(clock)
        done += 1
    gc.unfreeze()
    return done


# -- what the series say -------------------------------------------------------------------------------


def ratio(watched: Subject, plain: Subject, resamples: int = 4000) -> tuple[float, float, float]:
    """Watched over unwatched time per step: the mean over the cadence, and its 95 % interval.

    The steps of a cadence are of three kinds: the slow one, the one after it, in which the slow one's
    record is finished, and the others. Of each kind the median over its pairs, weighted by how often it
    comes; the interval is the bootstrap's, which draws pairs of each kind.
    """
    pairs = np.array(watched.seconds) / np.array(plain.seconds)
    phase = (np.arange(len(pairs)) + watched.first) % watched.cadence
    of = ((phase == 0, 1), (phase == 1, 1), (phase > 1, watched.cadence - 2))
    kinds = [pairs[which] for which, _ in of if which.any()]
    weights = [weight for which, weight in of if which.any()]
    rng = np.random.default_rng(0)
    value = np.average([np.median(kind) for kind in kinds], weights=weights)
    draws = [
        np.median(kind[rng.integers(len(kind), size=(resamples, len(kind)))], axis=1) for kind in kinds
    ]
    low, high = np.quantile(np.average(draws, axis=0, weights=weights), (0.025, 0.975))
    return float(value), float(low), float(high)


@dataclass(frozen=True)
class Share:
    """Time beside that of the rest of the step.

    Attributes:
        self: inside the hooks, the mean over ten consecutive steps: the median of all such means.
        low, high: the smallest and largest of them.
        dispatch: what torch takes to call the hooks.
        rest_s: the rest of the step, median.
        hooks: calls of hooks per step.
    """

    self: float
    low: float
    high: float
    dispatch: float
    rest_s: float
    hooks: float


def share(watched: Subject, idle: dict[str, float]) -> Share:
    """Self time and dispatch of a metered subject as shares of the rest of its step."""
    steps = len(watched.seconds)
    timer = idle["timer"] * watched.calls.total() / steps
    own = np.array(watched.self_s) - timer
    rest = median(s - i for s, i in zip(watched.seconds, watched.self_s, strict=True))
    window = min(CADENCE, steps)
    means = [float(own[i : i + window].mean()) / rest for i in range(steps - window + 1)]
    dispatch = sum(
        idle["forward" if kind == "forward" else "tensor"] * count
        for kind, count in watched.calls.items()
    )
    return Share(
        self=median(means),
        low=min(means),
        high=max(means),
        dispatch=dispatch / steps / rest,
        rest_s=rest,
        hooks=watched.calls.total() / steps,
    )
