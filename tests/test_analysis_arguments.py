"""Wrong arguments to the analyses: the message says what came and the line to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from synthetic import flat_record

import gradscope
from gradscope.analysis import RULES, diagnose, fit_decay, history, interval, profile, verdict, verdicts
from gradscope.errors import QuantityError
from gradscope.record import Record

RECORD = flat_record(np.exp(np.random.default_rng(0).normal(0, 0.1, (3, 9)).cumsum(1)))


class WithRecord:
    """As a Scope is."""

    record = RECORD


@pytest.mark.parametrize(
    "call", [diagnose, profile, history, verdict, fit_decay], ids=lambda call: call.__name__
)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "got None. A Record is scope.record, or what gradscope.measure"),
        ("run.jsonl", "Read the file first: gradscope.Record.load('run.jsonl')"),
        (WithRecord(), "of type WithRecord. Give what it recorded: scope.record"),
        (Record, "got the class Record"),
        ([RECORD], "of type list"),
        ({"a": RECORD}, "of type dict"),
    ],
    ids=["None", "path", "scope", "class", "list", "dict"],
)
def test_what_is_no_record(call: Callable[[Any], Any], given: Any, said: str) -> None:
    with pytest.raises(TypeError) as error:
        call(given)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        # Thresholds: another shape, unknown names, what is no number.
        (lambda: diagnose(RECORD, thresholds=3), TypeError, '{"vanishing": {"nats": 2.0}}; got 3'),
        (lambda: diagnose(RECORD, thresholds={"vanishing": 2}), TypeError, "{'vanishing': {'nats': 2}}"),
        (lambda: diagnose(RECORD, thresholds={"vanish": {}}), ValueError, "Did you mean 'vanishing'"),
        (
            lambda: diagnose(RECORD, thresholds={"vanishing": {"nat": 1}}),
            ValueError,
            "Did you mean 'nats'",
        ),
        (
            lambda: diagnose(RECORD, thresholds={"vanishing": {"nats": "3"}}),
            TypeError,
            "'nats' of 'vanishing' is a number; got '3'",
        ),
        (
            lambda: diagnose(RECORD, thresholds={"vanishing": {"nats": float("nan")}}),
            ValueError,
            "is a number above 0; got nan",
        ),
        # Rules.
        (
            lambda: diagnose(RECORD, rules="vanishing"),
            TypeError,
            "[gradscope.analysis.RULES['vanishing']]",
        ),
        (lambda: diagnose(RECORD, rules=RULES["spike"]), TypeError, "takes several rules"),
        (lambda: diagnose(RECORD, rules=["spike"]), ValueError, "gradscope.analysis.RULES['spike']"),
        (lambda: diagnose(RECORD, rules=[]), ValueError, "rules= is empty"),
        (lambda: diagnose(RECORD, trunk="H"), QuantityError, "its trunks are 'h'"),
        # Quantities.
        (lambda: profile(RECORD, "grad_12"), QuantityError, "Did you mean 'grad_l2'"),
        (lambda: profile(RECORD, "token_cos"), QuantityError, "Did you mean 'token_cosine'"),
        (lambda: profile(RECORD, 3), TypeError, "by its name, such as 'grad_l2'; got 3"),
        (lambda: verdict(RECORD, ["grad_l2"]), TypeError, "got ['grad_l2']"),
        # Steps.
        (lambda: verdict(RECORD, step="last"), TypeError, "step=10, step=[0, 10]; got 'last'"),
        (lambda: verdict(RECORD, step=1.0), TypeError, "got 1.0"),
        (lambda: verdict(RECORD, step=True), TypeError, "got True"),
        (lambda: verdict(RECORD, step={0}), TypeError, "got {0}"),
        (lambda: verdict(RECORD, step=[]), QuantityError, "step= is empty"),
        (lambda: verdict(RECORD, step=7), QuantityError, "no step 7"),
        # Numbers.
        (lambda: verdict(RECORD, threshold="3"), TypeError, "positive number of nats; got '3'"),
        (lambda: verdict(RECORD, confidence="high"), TypeError, "such as .95; got 'high'"),
        (lambda: verdict(RECORD, confidence=95), ValueError, "got 95; 95 % is 0.95"),
        (lambda: interval([1.0, 2.0], 1.0), ValueError, "between 0 and 1"),
        # Arrays and families.
        (lambda: fit_decay([]), ValueError, "two positions or more; got shape (0,)"),
        (lambda: fit_decay(np.ones((3, 1))), ValueError, "got shape (3, 1)"),
        (lambda: fit_decay(Record({})), QuantityError, "holds no step"),
        (lambda: fit_decay(RECORD, families=3), TypeError, "families= is a family's name"),
        (lambda: verdict(3), TypeError, "an array of numbers [replicates, positions]"),
        # Several.
        (lambda: verdicts({}), ValueError, "nothing to judge"),
        (lambda: verdicts({"a": RECORD}, ()), ValueError, "nothing to judge"),
        (lambda: verdicts({"a": RECORD}, 3), TypeError, "a quantity's name, or several; got 3"),
        (lambda: verdicts({"a": None}), TypeError, "got None"),
        (
            lambda: gradscope.meanfield.mean_field("sigmiod", 1.0),
            QuantityError,
            "Did you mean 'sigmoid'",
        ),
    ],
)
def test_the_message_says_what_to_write(
    call: Callable[[], Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind) as error:
        call()
    assert said in str(error.value)


def test_what_is_allowed_is_taken() -> None:
    word = verdict(RECORD).word
    for step in (0, [0], (0,), range(1), np.arange(1), np.int64(0)):
        assert verdict(RECORD, step=step).word == word
    assert verdict(RECORD, confidence=np.float32(0.9), threshold=np.float32(3)).word
    assert diagnose(RECORD, rules=RULES) == diagnose(RECORD)
    assert diagnose(RECORD, thresholds={"non_finite": {"elements": 0}}).checked == tuple(RULES)
