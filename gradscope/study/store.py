"""The study's files: one Record and one small JSON file per finished unit, written atomically.

A unit counts as done when its JSON file carries the right key: a hash of the unit's whole
configuration, the text, the version of torch and the source of every module that influences a
number. A changed configuration or a changed code measures again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final

import gradscope
from gradscope.errors import StudyError
from gradscope.record import Record
from gradscope.study.outcome import InitialisationOutcome, Outcome, TrainingOutcome
from gradscope.study.plan import InitialisationUnit, Unit

__all__ = ["Store", "code_version"]

#: The parts of the package whose source influences a stored number.
_MEASURING: Final = (
    "layers",
    "record",
    "scope.py",
    "statistics",
    "collect",
    "experiment",
    "reference",
    "study/initialisation.py",
    "study/text.py",
    "study/training.py",
)


def code_version() -> str:
    """Versions of gradscope and torch, and a digest of the source that influences a number."""
    digest = hashlib.sha256()
    package = resources.files("gradscope")
    for part in _MEASURING:
        _add_source(digest, package.joinpath(part), part)
    torch_version = metadata.version("torch")
    return f"gradscope {gradscope.__version__} {digest.hexdigest()[:16]}, torch {torch_version}"


def _add_source(digest: Any, source: Traversable, name: str) -> None:
    if source.is_dir():
        for child in sorted(source.iterdir(), key=lambda c: c.name):
            if child.is_dir() or child.name.endswith(".py"):
                _add_source(digest, child, f"{name}/{child.name}")
    elif source.is_file():
        digest.update(f"{name}\0".encode() + source.read_bytes())


@dataclass(frozen=True)
class Store:
    """Finished units in one folder.

    Attributes:
        folder: where the files are.
        text_digest: of the text that the units use.
        code: what `code_version` gave.
    """

    folder: Path
    text_digest: str
    code: str = field(default_factory=code_version)

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            StudyError: it cannot be made or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"cannot write to {self.folder}: {error.strerror}.") from None
        if not os.access(self.folder, os.W_OK):
            raise StudyError(f"cannot write to {self.folder}. Choose another folder with --out DIR.")

    def key(self, unit: Unit) -> str:
        """Hash of everything that the unit's numbers depend on."""
        content = [type(unit).__name__, asdict(unit), self.text_digest, self.code]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def record_path(self, unit: Unit) -> Path:
        """The file of the unit's Record."""
        return self.folder / f"{unit.slug}.jsonl"

    def outcome_path(self, unit: Unit) -> Path:
        """The file of the unit's other results, whose presence says that the unit is done."""
        return self.folder / f"{unit.slug}.json"

    def save(self, unit: Unit, record: Record, outcome: Outcome) -> None:
        """Keep a finished unit; an older result of the same name is replaced."""
        path = self.outcome_path(unit)
        path.unlink(missing_ok=True)  # never beside a Record that it does not belong to
        record.save(self.record_path(unit))
        digest = _digest(self.record_path(unit))
        values = {f.name: _plain(getattr(outcome, f.name)) for f in fields(outcome)}
        entry = {
            "key": self.key(unit),
            "code": self.code,
            "unit": asdict(unit),
            "record_sha256": digest,
            "outcome": values,
        }
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        temporary.write_text(json.dumps(entry, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)

    def load(self, unit: Unit) -> Outcome | None:
        """The outcome of a unit that is done, or None.

        A file that is damaged or was changed, or belongs to another configuration, text or code,
        counts as none.
        """
        try:
            entry = json.loads(self.outcome_path(unit).read_text(encoding="utf-8"))
            if entry["key"] != self.key(unit) or entry["record_sha256"] != _digest(
                self.record_path(unit)
            ):
                return None
            kind = InitialisationOutcome if isinstance(unit, InitialisationUnit) else TrainingOutcome
            return kind(**_restored(entry["outcome"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def record(self, unit: Unit) -> Record:
        """The Record of a finished unit."""
        return Record.load(self.record_path(unit))

    def clean(self) -> None:
        """Remove what killed workers left half-written."""
        for part in self.folder.glob("*.part"):
            part.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN: they are written as words."""
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _restored(outcome: Mapping[str, Any]) -> dict[str, Any]:
    def restore(value: Any) -> Any:
        return float(value) if value in ("nan", "inf", "-inf") else value

    return {
        name: tuple(restore(v) for v in value) if isinstance(value, list) else value
        for name, value in outcome.items()
    }
