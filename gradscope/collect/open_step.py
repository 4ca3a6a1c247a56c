"""The step that is under way: its forward passes, and what stands beside them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from gradscope.collect.passes import Call, Pass
from gradscope.record import Step

__all__ = ["OpenStep"]


@dataclass(slots=True, eq=False)
class OpenStep:
    """One step, from its first forward on; thrown away when the step is over.

    Attributes:
        passes: its recorded forward passes.
        newest: the newest forward pass, recorded or not; None where none is open or just was.
        recording: whether the schedule wants the step.
        began_s: when it began, by `time.perf_counter`; None before its first forward.
        stepped: whether its optimizers have stepped: the next forward begins another step.
        loss: the loss by the user's word.
        settled: whether the ranks have met at its end.
        pooled: the step with the values of all ranks, once they have.
    """

    passes: list[Pass] = field(default_factory=list)
    newest: Pass | None = None
    recording: bool = False
    began_s: float | None = None
    stepped: bool = False
    loss: float | None = None
    settled: bool = False
    pooled: Step | None = None

    @property
    def wall_time_s(self) -> float | None:
        """Seconds since it began; None before."""
        return None if self.began_s is None else time.perf_counter() - self.began_s

    def begin(self, *, recording: bool) -> None:
        """Its first forward begins."""
        self.began_s = time.perf_counter()
        self.recording = recording

    def begin_pass(self) -> None:
        """A forward begins."""
        self.newest = Pass()
        if self.recording:
            self.passes.append(self.newest)

    def forget(self, passes: Iterable[Pass]) -> None:
        """These passes are of no step."""
        for p in passes:
            if p in self.passes:
                self.passes.remove(p)
            p.forget()
            if self.newest is p:
                self.newest = None

    def forget_the_cut_off(self) -> None:
        """Forget the passes from which nothing more will come."""
        # An exception cut off the backward pass.
        self.forget([p for p in self.passes if p.begun and not p.complete])
        # The graph is gone: no backward will come (an evaluation with grad).
        self.forget([p for p in self.passes if not p.begun and p.graph and not any(r() for r in p.graph)])

    def with_gradient(self) -> list[Pass]:
        """The passes that a gradient has come back to."""
        return [p for p in self.passes if p.begun]

    def end_backward(self, backward: int) -> list[Pass]:
        """A backward pass came to its end; the passes of this step that it completes."""
        reached = [p for p in self.passes if backward in p.begun]
        for p in reached:
            p.end_backward(backward)
        return [p for p in reached if p.complete]

    def close(self) -> None:
        """It is over: let go of all tensors."""
        for p in self.passes:
            p.close()

    def in_order_of_arrival(self, signal: str) -> list[Call]:
        """The calls whose activations or output gradients came, in the order in which they did."""
        calls = [c for p in self.passes for c in p.calls]
        if signal == "output_grad":
            owner = {id(s): (s.arrival, c) for c in reversed(calls) for s in c.slots}
            came = [(arrival, call) for arrival, call in owner.values() if arrival is not None]
            return [call for _, call in sorted(came, key=lambda pair: pair[0])]
        return calls if signal == "activation" else []

    def passes_that_count(self) -> list[Pass]:
        """The passes whose samples are the step's.

        A forward that no gradient came back through (a sample drawn, a metric), or whose gradient did
        not go to the parameters (a saliency map), is not of the step where another one is.
        """
        # Without any call, what came back says at least that gradients are there (a compiled model).
        passes = [p for p in self.passes if not p.root_open and (p.calls or p.begun)]
        with_gradient = [p for p in passes if p.begun]
        complete = [p for p in with_gradient if p.complete]
        accumulated = [p for p in complete if p.accumulated]
        return accumulated or complete or ([] if with_gradient else passes)
