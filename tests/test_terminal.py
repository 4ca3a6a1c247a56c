"""The terminal table: numbers, reasons, and that it fits."""

from __future__ import annotations

import re

import numpy as np
import pytest
from synthetic import Builder, moments

from gradscope.errors import QuantityError
from gradscope.record import Record, Step
from gradscope.show.terminal import layer_table, render

TRUNK = "transformer.h"
GRAD = ("param_grad", "l2")


def one_step(step: int = 3, replicate: int = 0, *, slow: bool = True, scale: float = 1.0) -> Step:
    b = Builder()
    rng = np.random.default_rng(replicate)
    first: dict[str, float | str] = dict(moments(rng.normal(size=(4, 8))))
    if not slow:
        first["token_variance"] = "not sampled"
    b.module(0.0, TRUNK, "activation", {**first, "token_cosine": 0.1}, trunk=TRUNK, kind="Stream")
    b.module(
        0.0, TRUNK, "output_grad", dict.fromkeys(first, "no gradient path"), trunk=TRUNK, kind="Stream"
    )
    for k in range(3):
        for depth, layer, kind in (
            (k + 0.5, f"{TRUNK}.{k}.attn", "GPT2Attention"),
            (k + 1.0, f"{TRUNK}.{k}.mlp", "GPT2MLP"),
            (k + 1.0, f"{TRUNK}.{k}", "GPT2Block"),
        ):
            values: dict[str, float | str] = dict(moments(rng.normal(size=(4, 8))))
            values["absmax"] = 10.0 + k
            values["token_variance"] = float(k + 1) if slow else "not sampled"
            if kind == "GPT2Block":
                values["dot_next"] = 1.0
            b.module(depth, layer, "activation", values, trunk=TRUNK, kind=kind)
            flow = (0.0, 0.25, 1.0)[k] * scale
            gradient: dict[str, float | str] = {"l2": 2 * flow, "tokens": 4.0, "nonfinite": 0.0}
            if kind == "GPT2Block":
                gradient["dot_next"] = 1.0
            b.module(depth, layer, "output_grad", gradient, trunk=TRUNK, kind=kind)
        b.parameter(k + 0.5, f"{TRUNK}.{k}.attn.weight", {GRAD: 3.0 if k != 2 else "frozen"}, trunk=TRUNK)
        b.parameter(k + 1.0, f"{TRUNK}.{k}.mlp.weight", {GRAD: 4.0 if k != 2 else "frozen"}, trunk=TRUNK)
    return b.step(step, replicate, loss=5.5)


HEADER = {"model": "GPT2", "loss_denominator": 10}


def row(text: str, *start: str) -> list[str]:
    for line in text.splitlines():
        if line.split()[: len(start)] == list(start):
            return line.split()
    raise AssertionError(f"no line {start} in\n{text}")


def test_one_line_per_position_and_branch_with_the_right_numbers() -> None:
    text = render(Record(HEADER, (one_step(),)), 130)
    assert text.startswith("GPT2, step 3, trunk transformer.h\n")
    # depth, layer, type, flow = N·l2/√tokens, over the last, act var, max |x|, non-finite, parameters
    assert row(text, "2", "1")[:9] == ["2", "1", "GPT2Block", "2.5", "0.25", "2", "11", "0", "5"]
    assert row(text, "1.5", "1.attn")[2:9] == ["GPT2Attention", "2.5", "0.25", "2", "11", "0", "3"]
    assert row(text, "3", "2")[2:9] == ["GPT2Block", "10", "1", "3", "12", "0", "-"]
    assert "Loss 5.5." in text and "up to one factor" not in text
    depths = [float(x) for x in re.findall(r"^ *([\d.]+) ", text, re.MULTILINE)]
    assert depths == [0, 0.5, 1, 1, 1.5, 2, 2, 2.5, 3, 3]


def test_reasons_stand_at_the_end() -> None:
    text = render(Record(HEADER, (one_step(),)), 130)
    assert "no gradient path" in " ".join(row(text, "0", "input"))
    assert row(text, "1", "0")[-2:] == ["zero", "grad"]
    assert row(text, "3", "2")[-1] == "frozen"


@pytest.mark.parametrize("width", [80, 100, 120])
def test_it_fits_is_ascii_and_has_no_colour(width: int) -> None:
    text = render(Record(HEADER, (one_step(),)), width)
    assert max(map(len, text.splitlines())) <= width
    assert text.isascii() and "\x1b" not in text
    words = " ".join(text.split())
    for expected in ("frozen", "zero grad", "0.attn", "param", "status"):
        assert expected in words


def test_the_variance_comes_from_the_last_step_that_has_it_and_says_so() -> None:
    record = Record(HEADER, (one_step(3), one_step(4, slow=False)))
    text = render(record, 120)
    assert text.startswith("GPT2, step 4")
    assert row(text, "2", "1")[5] == "2"
    assert "act var is from step 3" in text
    assert "act var is from" not in render(record, 120, step=3)


def test_replicates_are_combined_by_the_geometric_mean() -> None:
    record = Record(HEADER, (one_step(0, 0, scale=1.0), one_step(0, 1, scale=4.0)))
    text = render(record, 130)
    assert row(text, "2", "1")[3] == "5"
    assert "2 replicates: geometric means" in text


def test_nothing_is_hidden_when_values_are_not_finite() -> None:
    b = Builder()
    for k, l2 in enumerate((np.inf, 1.0)):
        activation = {"l2": 1.0, "absmax": 1.0, "nonfinite": 0.0, "dot_next": 1.0}
        b.module(k + 1.0, f"h.{k}", "activation", activation)
        gradient = {"l2": l2, "tokens": 1.0, "nonfinite": 3.0 * (k == 0), "dot_next": 1.0}
        b.module(k + 1.0, f"h.{k}", "output_grad", gradient)
    text = render(Record({}, (b.step(),)), 80)
    assert "inf" in row(text, "1", "0") and row(text, "1", "0")[-2:] == ["not", "finite"]
    assert "up to one factor per step" in " ".join(text.split())


def test_partial_parameter_gradients_are_absent_not_smaller() -> None:
    b = Builder()
    b.module(1.0, "h.0", "activation", {"l2": 1.0, "dot_next": 1.0})
    b.parameter(1.0, "h.0.a", {GRAD: 3.0})
    b.parameter(1.0, "h.0.b", {GRAD: "local"})
    assert row(render(Record({}, (b.step(),)), 80), "1", "0")[-2:] == ["-", "local"]


def test_records_without_a_trunk_list_every_layer() -> None:
    b = Builder()
    for name in ("fc1", "act[0]", "fc2"):
        b.module(np.nan, name, "activation", moments(np.ones((2, 2))), trunk="", kind="Linear")
        b.module(np.nan, name, "output_grad", {"l2": 2.0, "tokens": 4.0}, trunk="", kind="Linear")
    b.parameter(np.nan, "fc1.weight", {GRAD: 3.0}, trunk="")
    text = render(Record({}, (b.step(),)), 80)
    assert row(text, "fc1")[1:3] == ["Linear", "1"] and row(text, "fc1")[-1] == "3"
    assert row(text, "act[0]") and row(text, "fc2")


def test_two_trunks_have_their_own_sections() -> None:
    b = Builder()
    for trunk, l2 in (("encoder", 1.0), ("decoder", 8.0)):
        for k in range(2):
            values = {"l2": l2 * (k + 1), "tokens": 1.0, "dot_next": 1.0}
            b.module(k + 1.0, f"{trunk}.{k}", "output_grad", values, trunk=trunk)
    text = render(Record({"loss_denominator": 1}, (b.step(),)), 80)
    assert row(text, "encoder") and row(text, "decoder")
    assert text.index("encoder") < text.index("decoder")
    assert re.findall(r"Block +([\d.]+) +([\d.]+)", text) == [
        ("1", "0.5"),
        ("2", "1"),
        ("8", "0.5"),
        ("16", "1"),
    ]


def test_markup_in_names_is_text() -> None:
    b = Builder()
    b.module(1.0, "h.[red]0[/red]", "activation", {"l2": 1.0, "dot_next": 1.0}, kind="[bold]X[/bold]")
    assert "[red]0[/red]" in render(Record({"model": "[red]"}, (b.step(),)), 140)


def test_unknown_steps_and_empty_records_are_errors() -> None:
    with pytest.raises(QuantityError, match=r"no step 9 .* from 3 to 3"):
        layer_table(Record(HEADER, (one_step(),)), 9)
    with pytest.raises(QuantityError, match="holds no step"):
        render(Record(HEADER))
