"""Odd Records: every analysis gives a number, a reason or a QuantityError, and no silent NaN.

Warnings of numpy are errors here, as in all tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from synthetic import Builder, name

from gradscope.analysis import diagnose, fit_decay, profile, verdict, verdicts
from gradscope.errors import QuantityError
from gradscope.record import Record, Rows, Step

QUANTITIES = ("grad_l2", "act_rms", "param_grad")


def walk(entries: int, positions: int, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(-0.05, 0.3, (entries, positions)).cumsum(1))


def record(
    norms: np.ndarray,
    *,
    steps: Sequence[int] | None = None,
    replicates: Sequence[int] | None = None,
    without: Sequence[int] = (),
    trunks: Sequence[str] = ("h",),
    kind: str = "initialisation",
) -> Record:
    """Gradients and activations with these norms [entries, depths]; a word in place of a norm: absent."""
    made: list[Step] = []
    for entry, row in enumerate(norms):
        b = Builder()
        for trunk in trunks:
            for depth, value in enumerate(row.tolist()):
                if depth in without:
                    continue
                layer, module = name(depth, trunk)
                values = {"l2": value, "count": 32.0, "tokens": 4.0, "absmax": value, "token_cosine": 0.3}
                if isinstance(value, str):
                    values = dict.fromkeys(values, value)
                b.module(float(depth), layer, "activation", values, trunk=trunk, kind=module)
                del values["token_cosine"]
                b.module(float(depth), layer, "output_grad", values, trunk=trunk, kind=module)
                if depth:
                    b.parameter(depth, f"{layer}.weight", {("param_grad", "l2"): value}, trunk)
        step = (steps or [0] * len(norms))[entry]
        made.append(b.step(step, (replicates or range(len(norms)))[entry], loss=1.0))
    header = {"replicates": kind, "loss_denominator": 1, "dtype": "float32"}
    return Record(header, tuple(made))


def put(norms: np.ndarray, where: tuple[int | slice, int | slice], value: float | str) -> np.ndarray:
    norms = norms.astype(object)
    norms[where] = value
    return norms


ALL = slice(None)
ODD: dict[str, Callable[[], Record]] = {
    "one replicate": lambda: record(walk(1, 9)),
    "two layers": lambda: record(walk(3, 3)),
    "one layer": lambda: record(walk(3, 2)),
    "the input alone": lambda: record(walk(3, 1)),
    "a gap": lambda: record(walk(3, 12), without=(4, 5)),
    "no input": lambda: record(walk(3, 12), without=(0,)),
    "starts late": lambda: record(walk(3, 12), without=(0, 1, 2)),
    "zero at the input of one": lambda: record(put(walk(3, 9), (1, 0), 0.0)),
    "zero inside one": lambda: record(put(walk(3, 9), (1, 4), 0.0)),
    "one all zero": lambda: record(put(walk(3, 9), (1, ALL), 0.0)),
    "all zero": lambda: record(np.zeros((3, 9))),
    "zero at the end": lambda: record(put(walk(3, 9), (ALL, 8), 0.0)),
    "inf inside one": lambda: record(put(walk(3, 9), (1, 4), math.inf)),
    "inf at the input": lambda: record(put(walk(3, 9), (ALL, 0), math.inf)),
    "all inf": lambda: record(np.full((3, 9), math.inf)),
    "NaN inside one": lambda: record(put(walk(3, 9), (1, 4), math.nan)),
    "one all NaN": lambda: record(put(walk(3, 9), (1, ALL), math.nan)),
    "all NaN": lambda: record(np.full((3, 9), math.nan)),
    "huge": lambda: record(walk(3, 9) * 1e300),
    "tiny": lambda: record(walk(3, 9) * 1e-310),
    "constant": lambda: record(np.ones((3, 9))),
    "one constant": lambda: record(np.ones((1, 9))),
    "ten alike": lambda: record(np.repeat(walk(1, 9), 10, axis=0)),
    "absent inside": lambda: record(put(walk(3, 9), (ALL, 3), "not called")),
    "absent in one": lambda: record(put(walk(3, 9), (1, ALL), "not called")),
    "all absent": lambda: record(put(walk(3, 9), (ALL, ALL), "compiled")),
    "two trunks": lambda: record(walk(3, 9), trunks=("encoder", "decoder")),
    "a run": lambda: record(walk(30, 9), steps=range(30), replicates=[0] * 30, kind="run"),
    "a run that breaks": lambda: record(
        put(walk(30, 9), (slice(20, None), ALL), math.nan),
        steps=range(30),
        replicates=[0] * 30,
        kind="run",
    ),
    "a run that dies": lambda: record(
        put(walk(30, 9), (slice(20, None), ALL), 0.0), steps=range(30), replicates=[0] * 30, kind="run"
    ),
    "uneven batches": lambda: record(
        walk(6, 9), steps=[0, 0, 0, 1, 1, 2], replicates=[0, 1, 2, 0, 1, 0], kind="batch"
    ),
    "two depths": lambda: Record(
        record(walk(2, 9)).header, record(walk(2, 9)).steps + record(walk(1, 7), replicates=[2]).steps
    ),
    "no rows": lambda: Record({}, (Step.of(Rows.of([]), [], {}, step=0, replicate=0),)),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_profiles_fits_and_verdicts(odd: str, quantity: str) -> None:
    made = ODD[odd]()
    for trunk in made.trunks or (None,):
        try:
            found = verdict(made, quantity, trunk=trunk)
            shape = profile(made, quantity, trunk=trunk)
            fit = fit_decay(made, quantity, trunk=trunk)
        except QuantityError as error:
            assert str(error)
            continue
        assert np.isnan(shape.value[~shape.ok]).all()
        delta = found.delta
        if found.word == "inconclusive":
            assert found.reason
        elif math.isfinite(delta.estimate):
            assert delta.low <= delta.estimate <= delta.high
        else:
            assert found.detail in ("underflow", "cut", "overflow") and not math.isnan(delta.estimate)
        assert fit.ok == (fit.family != "")
        assert not fit.ok or (math.isfinite(fit.delta.estimate) and np.isfinite(fit.fitted).all())
        # What is not finite everywhere is left out, and that is said.
        whole = np.isfinite(shape.value).all() and (shape.value > 0).all()
        assert whole or fit.dropped
        assert str(found) and str(fit) and str(shape) and str(shape.delta())
        assert str(verdicts({"a": made, "b": made}, [quantity]))


@pytest.mark.parametrize("odd", ODD)
def test_findings(odd: str) -> None:
    diagnosis = diagnose(ODD[odd]())
    for finding in diagnosis.findings:
        assert not math.isnan(finding.value) and not math.isnan(finding.threshold)
        assert finding.layers and finding.message
    assert str(diagnosis)
    broken = {"inf", "NaN", "breaks"} & set(odd.split())
    assert not broken or diagnosis.of("non_finite")
    assert (diagnosis.word in ("nothing recorded", "nothing checked")) == (
        odd in ("no rows", "all absent")
    )
