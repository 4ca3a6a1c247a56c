"""When what is recorded."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The cadence of a watch.

    Attributes:
        every: record each n-th step, from step 0 on.
        slow_every: of the recorded steps, each n-th also gets the slow statistics.
    """

    every: int = 1
    slow_every: int = 10

    def __post_init__(self) -> None:
        for name in ("every", "slow_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}= takes a whole number of steps, at least 1; got {value!r}")

    def records(self, step: int) -> bool:
        """Whether this step is recorded."""
        return step % self.every == 0

    def slow(self, step: int) -> bool:
        """Whether this step also gets the slow statistics."""
        return step % (self.every * self.slow_every) == 0
