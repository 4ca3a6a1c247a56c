"""Worker processes of the study: started fresh, one torch thread each, deaf to Ctrl-C.

The parent alone hears Ctrl-C and ends its workers; a worker whose parent is gone ends by itself at
its next message. ``concurrent.futures`` can neither end a running task nor report its progress.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import TYPE_CHECKING, Any, Final

from gradscope.errors import GradscopeError, StudyError
from gradscope.study.plan import InitialisationUnit, Unit
from gradscope.study.store import Store
from gradscope.study.text import Text

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

__all__ = ["Done", "Progressed", "Workers", "available_cores"]

#: Seconds between two progress messages of a worker, and what a worker is given to end in.
MESSAGE_INTERVAL_S: Final = 0.2
END_TIMEOUT_S: Final = 5.0


def available_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Progressed:
    """A unit went on: `share` of it is done, 0 to 1."""

    unit: Unit
    share: float


@dataclass(frozen=True)
class Done:
    """A unit is finished and stored."""

    unit: Unit


@dataclass(frozen=True)
class _Failed:
    """A unit raised; `message` is for the user, whole where it was not gradscope's own error."""

    unit: Unit
    message: str


Event = Progressed | Done


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    unit: Unit | None = None


class Workers:
    """Up to `count` worker processes that run units; started when first needed.

    Args:
        count: the largest number of processes.
        text: what the units measure on.
        store: where finished units are kept.
    """

    def __init__(self, count: int, text: Text, store: Store) -> None:
        self._count = count
        self._text = text
        self._store = store
        self._workers: list[_Worker] = []

    @property
    def running(self) -> Sequence[Unit]:
        """The units that are being worked on."""
        return [w.unit for w in self._workers if w.unit is not None]

    @property
    def free(self) -> bool:
        """Whether `submit` may be called."""
        return len(self.running) < self._count

    def submit(self, unit: Unit) -> None:
        """Start a unit on an idle worker, or on a new one."""
        worker = next((w for w in self._workers if w.unit is None), None)
        if worker is None:
            worker = self._start()
        worker.unit = unit
        worker.connection.send(unit)

    def wait(self, timeout_s: float) -> list[Event]:
        """What happened since the last call; waits until something does, or until the timeout.

        Raises:
            StudyError: a unit failed or a worker died; the message names the unit.
        """
        by_connection: Mapping[Any, _Worker] = {w.connection: w for w in self._workers}
        events: list[Event] = []
        for ready in connection.wait(list(by_connection), timeout_s):
            worker = by_connection[ready]
            try:
                event: Event | _Failed = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join(END_TIMEOUT_S)
                raise StudyError(
                    f"the process that worked on {worker.unit.title if worker.unit else 'nothing'} "
                    f"ended with exit code {worker.process.exitcode}, perhaps for lack of memory. "
                    "What is finished is kept: run the same command again, with a smaller --jobs "
                    "if memory was short."
                ) from None
            if isinstance(event, _Failed):
                raise StudyError(f"{event.unit.title}: {event.message}")
            if isinstance(event, Done):
                worker.unit = None
            events.append(event)
        return events

    def stop(self) -> None:
        """End all workers, at once where they are busy, and remove what they left half-written."""
        killed = False
        for worker in self._workers:
            if worker.unit is None:
                worker.connection.close()  # an idle worker ends when its connection does
            else:
                worker.process.terminate()
                killed = True
        for worker in self._workers:
            worker.process.join(END_TIMEOUT_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
            worker.process.close()
        self._workers.clear()
        if killed:
            self._store.clean()

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(theirs, self._text, self._store), name="gradscope study", daemon=True
        )
        with _interrupt_blocked():
            process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker


@contextlib.contextmanager
def _interrupt_blocked() -> Generator[None]:
    """Blocks SIGINT, which a process started meanwhile inherits; ours arrives afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # The tracker unblocks SIGINT when it starts; started before, it leaves the mask alone.
    resource_tracker.ensure_running()
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _work(to_parent: Connection, text: Text, store: Store) -> None:
    """The life of a worker: take units until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        while True:
            unit: Unit = to_parent.recv()
            try:
                _run_unit(unit, text, store, to_parent)
                answer: Done | _Failed = Done(unit)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except GradscopeError as error:
                answer = _Failed(unit, str(error))
            except Exception:
                answer = _Failed(unit, f"an unexpected error\n{traceback.format_exc()}")
            to_parent.send(answer)


def _run_unit(unit: Unit, text: Text, store: Store, to_parent: Connection) -> None:
    import torch

    from gradscope.study.initialisation import measure_unit
    from gradscope.study.training import train_unit

    torch.set_num_threads(1)
    last = time.monotonic()

    def progress(share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= MESSAGE_INTERVAL_S:
            last = time.monotonic()
            to_parent.send(Progressed(unit, share))

    run = measure_unit if isinstance(unit, InitialisationUnit) else train_unit
    record, outcome = run(unit, text, progress)  # pyright: ignore[reportArgumentType]
    store.save(unit, record, outcome)
