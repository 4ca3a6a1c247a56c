"""Where finished steps go: into memory, within so many bytes, and all of them into the file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

from gradscope.collect.parallelism import among_ranks
from gradscope.collect.voice import Voice
from gradscope.errors import RecordInUseError
from gradscope.record import Record, RecordWriter, Step, thin

__all__ = ["Storage"]


class Storage:
    """The header and the steps of a Record that grows.

    Args:
        header: entries for the Record's header.
        path: a file that every step is appended to; None for memory alone.
        max_bytes: the memory that steps may take before older ones are thinned.
        voice: what it has to say to the user.

    Attributes:
        header: the Record's header.
        steps: the steps in memory.
        writer: the open file, or None.
    """

    def __init__(
        self, header: dict[str, Any], *, path: str | os.PathLike[str] | None, max_bytes: int, voice: Voice
    ) -> None:
        self.header = header
        self.steps: list[Step] = []
        self.writer: RecordWriter | None = None
        self._continues = -1
        if path is not None:
            try:
                self.writer = RecordWriter(path, header)
                self._continues = self.writer.last_step
            except RecordInUseError as error:
                # Of the ranks of one machine that were all given the same path, one writes.
                if not among_ranks():
                    raise
                self._continues = error.last_step
        self._bytes = 0
        self._max_bytes = max_bytes
        self._voice = voice
        self._denominator_varies = False
        # A process that is forked off has the watch and the open file, too.
        self._process = os.getpid()

    @property
    def first_step(self) -> int:
        """The number of the first step to come: a resumed run continues its file's numbers."""
        return self._continues + 1

    def add(self, step: Step) -> None:
        """Keep a finished step."""
        self.steps.append(step)
        self._bytes += step.nbytes
        while self._bytes > self._max_bytes and len(self.steps) > 3:
            kept = thin(self.steps)
            if len(kept) == len(self.steps):
                break
            self.steps = kept
            self._bytes = sum(s.nbytes for s in kept)
        if self.writer is not None and os.getpid() == self._process:
            self.writer.write(step)

    def note_denominator(self, denominator: float) -> None:
        """Put the loss's denominator into the header; where it changes, take it out for good."""
        known = self.header["loss_denominator"]
        if self._denominator_varies or denominator == known:
            return
        if known is not None:
            self._denominator_varies = True
            self._voice.say(
                "denominator",
                f"loss_denominator={denominator:g} differs from the {known:g} of an earlier step; the "
                "Record holds one for all steps, so it is left unknown, and absolute gradient levels "
                "cannot be compared across batches or runs. Ratios over depth do not depend on it.",
            )
        self.header["loss_denominator"] = None if known is not None else denominator
        if self.writer is not None:
            self.writer.amend({"loss_denominator": self.header["loss_denominator"]})

    def note_parallelism(self, parallelism: str) -> None:
        """Put into the header how the model is spread over ranks."""
        if parallelism != self.header["parallelism"]:
            self.header["parallelism"] = parallelism
            if self.writer is not None:
                self.writer.amend({"parallelism": parallelism})

    def note_dtypes(self, dtypes: Iterable[torch.dtype], autocast: Iterable[torch.dtype]) -> None:
        """Put the dtypes that activations came in, and those of autocast, into the header."""
        for key, seen in (("activation_dtype", dtypes), ("autocast_dtype", autocast)):
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in seen)) or None
            if names != self.header[key]:
                self.header[key] = names
                if self.writer is not None:
                    self.writer.amend({key: names})

    def record(self, open_step: Step | None) -> Record:
        """The Record so far, with the step that is under way where there is one."""
        return Record(self.header, (*self.steps, *([] if open_step is None else [open_step])))

    def close(self) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()
