"""The study's table: every number of the report, seed by seed, as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Final

from gradscope.study.summary import AtInitialisation, InTraining, Study, per_seed

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
    columns: list[tuple[str, str, Sequence[float], Sequence[str] | None]] = [
        ("delta", "nats", one.grad.delta_per_replicate.tolist(), None),
        ("mean_increment", "nats/block", one.grad.mean_increment_per_replicate.tolist(), None),
        ("grad_l2_first", one.grad.unit, one.grad.value[:, 0].tolist(), None),
        ("grad_l2_last", one.grad.unit, one.grad.value[:, -1].tolist(), None),
        *(
            (f"{quantity}_{where}", "1", per_seed(one.record, quantity, position).tolist(), None)
            for quantity, where, position in (
                ("qk_ratio", "first", 0),
                ("qk_ratio", "last", -1),
                ("token_cosine", "last", -1),
            )
        ),
        *(
            (f"act_var_{where}", "signal^2", per_seed(one.record, "act_var", position).tolist(), None)
            for where, position in (("first", 0), ("last", -1))
        ),
        (
            "effective_depth",
            "branches",
            [math.nan if d is None else d for d in one.outcome.effective_depth],
            one.outcome.effective_depth_status,
        ),
    ]
    for quantity, measure, values, statuses in columns:
        for seed, value in enumerate(values):
            status = statuses[seed] if statuses else "ok" if value == value else "absent"
            yield (
                *("initialisation", unit.variant, unit.initialization, unit.depth, "", seed),
                *(quantity, measure, _csv(value) if status == "ok" else "", status),
            )


def _training_rows(one: InTraining) -> Iterator[tuple[object, ...]]:
    for rate, runs in one.by_rate.items():
        for run in runs:
            outcome = run.outcome
            status = "ok" if outcome.diverged_at is None else f"diverged at step {outcome.diverged_at}"
            first, last = (run.profile("grad_l2", last=last) for last in (False, True))
            values = (
                ("final_validation_loss", "nats/byte", outcome.final_loss, status),
                ("final_train_loss", "nats/byte", outcome.train_loss[-1], status),
                ("delta_first_step", "nats", first.delta().estimate, "ok"),
                ("delta_last_step", "nats", last.delta().estimate, "ok"),
                ("zero_gradients_first_step", "positions", float(first.zero.sum()), "ok"),
                ("zero_gradients_last_step", "positions", float(last.zero.sum()), "ok"),
            )
            for quantity, measure, value, why in values:
                if why == "ok" and value != value:
                    why = "absent"
                yield (
                    *("training", one.variant, "torch", one.depth, f"{rate:g}", run.unit.seed),
                    *(quantity, measure, _csv(value) if why == "ok" else "", why),
                )


def _csv(x: float) -> str:
    return repr(float(x))
