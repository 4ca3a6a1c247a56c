"""The study's table: every number of the report, seed by seed, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Final

from gradscope.analysis import Profile
from gradscope.study.summary import AtInitialisation, InTraining, Study

__all__ = ["COLUMNS", "table"]

COLUMNS: Final = (
    "part",
    "variant",
    "initialization",
    "depth",
    "learning_rate",
    "seed",
    "quantity",
    "unit",
    "value",
    "status",
)


def table(study: Study) -> str:
    """The text of `table.csv`: one row per number, seed by seed, with why it is absent if it is."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in study.initialisation.values():
        writer.writerows(_initialisation_rows(one))
    for trained in study.training.values():
        writer.writerows(_training_rows(trained))
    return out.getvalue()


def _initialisation_rows(one: AtInitialisation) -> Iterator[tuple[object, ...]]:
    unit = one.unit
    head = ("initialisation", unit.variant, unit.initialization, unit.depth, "")
    for name, samples in one.samples.items():
        for seed, (value, status) in enumerate(zip(samples.values, samples.status, strict=True)):
            yield (*head, seed, name, samples.unit, _cell(value, status), status)


def _training_rows(one: InTraining) -> Iterator[tuple[object, ...]]:
    for rate, runs in one.by_rate.items():
        for run in runs:
            outcome = run.outcome
            head = ("training", one.variant, "torch", one.depth, f"{rate:g}", run.unit.seed)
            ended = "ok" if outcome.diverged_at is None else f"diverged at step {outcome.diverged_at}"
            for name, unit, value, status in (
                ("final_validation_loss", "nats/byte", outcome.final_loss, ended),
                ("final_train_loss", "nats/byte", outcome.train_loss[-1], ended),
                ("delta_first_step", "nats", *_delta(run.first)),
                ("delta_last_step", "nats", *_delta(run.last)),
                ("zero_gradients_first_step", "positions", float(run.first.zero.sum()), "ok"),
                ("zero_gradients_last_step", "positions", float(run.last.zero.sum()), "ok"),
            ):
                yield (*head, name, unit, _cell(value, status), status)


def _delta(found: Profile) -> tuple[float, str]:
    value = found.delta().estimate
    return value, "ok" if value == value else "no two finite ends"


def _cell(value: float, status: str) -> str:
    """Empty where absent; a measured NaN is written as it is."""
    return repr(float(value)) if status == "ok" else ""
