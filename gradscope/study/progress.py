"""What the study says while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from gradscope.study.plan import Unit

__all__ = ["Reporter"]


class Reporter:
    """Shows how far the study is. A context manager.

    Args:
        console: where to; a bar when it is a terminal, else one line per finished unit.
        total_units: units of the whole study.
        total_work: their expected cost.
    """

    def __init__(self, console: Console, total_units: int, total_work: float) -> None:
        self._console = console
        self._total_units = total_units
        self._total_work = total_work
        self._done_units = 0
        self._done_work = 0.0
        self._shares: dict[Unit, float] = {}
        self._started: dict[Unit, float] = {}
        self._bar: Progress | None = None
        if console.is_terminal:
            bar = Progress(
                TextColumn("{task.fields[units]}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=16),
                TextColumn("{task.percentage:>3.0f} %", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True, table_column=Column(min_width=5, no_wrap=True)),
                TextColumn("left", table_column=Column(no_wrap=True)),
                TextColumn(
                    "[dim]{task.description}",
                    table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                ),
                console=console,
                expand=True,
                speed_estimate_period=120,
                redirect_stderr=False,
            )
            self._task = bar.add_task("starting", total=total_work, units="")
            self._bar = bar

    def __enter__(self) -> Self:
        """Start the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    @property
    def done_units(self) -> int:
        """Number of finished units."""
        return self._done_units

    def say(self, line: str) -> None:
        """Print one line, above the bar."""
        self._console.print(escape(line), highlight=False, soft_wrap=True)

    def found(self, unit: Unit) -> None:
        """A unit was finished by an earlier run."""
        self._done_units += 1
        # Not work of this run: it must not enter the estimate of the time left.
        self._total_work -= unit.work
        if self._bar is not None:
            self._bar.update(self._task, total=max(self._total_work, 1e-9))
        self._show()

    def started(self, unit: Unit) -> None:
        """A unit was handed to a worker."""
        self._shares[unit] = 0.0
        self._started[unit] = time.monotonic()
        self._show()

    def progressed(self, unit: Unit, share: float) -> None:
        """A unit went on."""
        self._shares[unit] = share
        self._show()

    def finished(self, unit: Unit, result: str) -> None:
        """A unit is done; `result` says in a few words what came out."""
        self._shares.pop(unit, None)
        took_s = time.monotonic() - self._started.pop(unit, time.monotonic())
        self._done_units += 1
        self._done_work += unit.work
        if self._bar is None:
            self.say(
                f"[{self._done_units:>3}/{self._total_units}] {unit.title}: {result} ({took_s:.1f} s)"
            )
        self._show()

    def _show(self) -> None:
        if self._bar is None:
            return
        work = self._done_work + sum(unit.work * share for unit, share in self._shares.items())
        if self._done_units == self._total_units:
            work = self._total_work  # sums of floats end short of it
        latest = next(reversed(self._shares), None)
        self._bar.update(
            self._task,
            completed=work,
            description=escape(latest.title) if latest else "",
            units=f"{self._done_units}/{self._total_units}",
        )
