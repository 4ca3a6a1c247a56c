"""The study's data: real text, byte by byte, split once into training and validation.

Without a file the text is the language reference that ships with every Python
(``pydoc_data.topics``), so that nothing has to be downloaded. Bytes are the tokens: the
vocabulary is 256, and no tokenizer stands between the text and the numbers.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from gradscope.errors import StudyError

__all__ = ["MINIMUM_BYTES", "Text", "load_text"]

#: The validation split takes every tenth stretch of this many bytes.
STRETCH_BYTES: Final = 4096
VALIDATION_EVERY: Final = 10
#: Two validation stretches: below this, validation is a handful of windows and training is memorising.
MINIMUM_BYTES: Final = 2 * VALIDATION_EVERY * STRETCH_BYTES


@dataclass(frozen=True)
class Text:
    """A text, split into training and validation bytes.

    Attributes:
        name: where it came from, for the report.
        train: nine stretches of 4,096 bytes out of ten, in order.
        validation: every tenth stretch of 4,096 bytes, never trained on.
    """

    name: str
    train: bytes
    validation: bytes

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of both splits: what makes a result belong to this text."""
        return hashlib.sha256(self.train + b"\0split\0" + self.validation).hexdigest()

    def unigram_nats(self, *, windows: int, context: int) -> float:
        """Cross-entropy of the validation windows' targets under the training bytes' frequencies.

        −mean of ln p_train(byte), with one count added to each of the 256 bytes. A model that does
        not come below it has learned nothing from the context. Unit: nats per byte.
        """
        counts = np.bincount(np.frombuffer(self.train, np.uint8), minlength=256) + 1
        _, targets = self.validation_windows(windows=windows, context=context)
        return float(-np.log(counts / counts.sum())[targets].mean())

    def batches(
        self, *, seed: int, batch: int, context: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Endless training batches (inputs, targets), each [batch, context]; target = next byte.

        The order depends on the seed alone, so that every variant sees the same batches.
        """
        data = np.frombuffer(self.train, np.uint8).astype(np.int64)
        random = np.random.default_rng(seed)
        while True:
            starts = random.integers(0, len(data) - context, size=batch)
            yield _windows(data, starts, context)

    def validation_windows(
        self, *, windows: int, context: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The validation windows (inputs, targets), each [windows, context], evenly spaced and fixed."""
        data = np.frombuffer(self.validation, np.uint8).astype(np.int64)
        starts = np.linspace(0, len(data) - context - 1, windows).astype(np.int64)
        return _windows(data, starts, context)


def _windows(
    data: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], context: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    at = starts[:, None] + np.arange(context + 1)
    return data[at[:, :-1]], data[at[:, 1:]]


def load_text(path: Path | None = None) -> Text:
    """The text of a file, or Python's own language reference.

    Args:
        path: any file of at least `MINIMUM_BYTES`; None for the language reference.

    Raises:
        StudyError: the file cannot be read, is too short, or this Python lacks its reference.
    """
    if path is None:
        return _split(f"language reference of Python {sys.version.split()[0]}", _language_reference())
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StudyError(f"--text {path}: no such file.") from None
    except IsADirectoryError:
        raise StudyError(f"--text {path}: this is a folder. Give one file.") from None
    except OSError as error:
        raise StudyError(f"--text {path}: cannot be read ({error.strerror}).") from None
    if len(data) < MINIMUM_BYTES:
        raise StudyError(
            f"--text {path}: {len(data)} bytes are too few to train and validate on; at least "
            f"{MINIMUM_BYTES} are needed. Give a longer file, or leave --text out to use the "
            "language reference that ships with Python."
        )
    return _split(path.name, data)


def _language_reference() -> bytes:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise StudyError(
            "this Python comes without its language reference (pydoc_data.topics). "
            "Give a text of your own: gradscope study --text FILE"
        ) from None
    # Some topics repeat whole sections of others; a paragraph that stands in both splits would make
    # the validation loss a training loss.
    paragraphs = dict.fromkeys(
        p for name in sorted(topics) for p in topics[name].split("\n\n") if p.strip()
    )
    return "\n\n".join(paragraphs).encode()


def _split(name: str, data: bytes) -> Text:
    count = math.ceil(len(data) / STRETCH_BYTES)
    stretches = [data[i * STRETCH_BYTES : (i + 1) * STRETCH_BYTES] for i in range(count)]
    last = VALIDATION_EVERY - 1
    return Text(
        name=name,
        train=b"".join(s for i, s in enumerate(stretches) if i % VALIDATION_EVERY != last),
        validation=b"".join(s for i, s in enumerate(stretches) if i % VALIDATION_EVERY == last),
    )
