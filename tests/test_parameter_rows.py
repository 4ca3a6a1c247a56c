"""The rows of parameters by hand: which there are, their values and statuses, and where they stand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn

from gradscope.collect.parameter_rows import ParameterRows, place_of
from gradscope.collect.parameters import Parameters, Readings
from gradscope.record import STATISTICS

ALL = frozenset(STATISTICS)
Row = tuple[str, str, str]


def model() -> nn.Module:
    """A weight, a bias that is frozen, and one fused projection of query, key and value."""
    net = nn.Sequential(nn.Linear(3, 2), nn.MultiheadAttention(4, 1, bias=False))
    net[0].bias.requires_grad_(False)
    return net


def read(readings: Readings, **options: Any) -> dict[Row, tuple[float, str]]:
    net = model()
    parameters = Parameters(net)
    rows = ParameterRows(parameters, options.pop("wanted", ALL), update=options.pop("update", True))
    values, why = rows.values(readings)
    names = [parameters.entries[i].name for i, _, _ in rows.rows]
    keys = [(name, signal, n) for name, (_, signal, n) in zip(names, rows.rows, strict=True)]
    return dict(zip(keys, zip(values.tolist(), why.tolist(), strict=True), strict=True))


def gradients(scale: float | None = None) -> Readings:
    """Of four parameters, in order of definition; the bias has none."""
    nan = math.nan
    return Readings(
        gradient={
            "count": [6.0, 2.0, 48.0, 16.0],
            "l2": [3.0, nan, 5.0, 0.0],
            "nonfinite": [1.0, nan, 0.0, 0.0],
            "query_l2": [nan, nan, 3.0, nan],
            "key_l2": [nan, nan, 4.0, nan],
            "value_l2": [nan, nan, 0.0, nan],
        },
        absent={1: "frozen"},
        scale=scale,
    )


def test_each_parameter_has_the_rows_of_its_kind() -> None:
    found = read(gradients())
    packed = {name for name, _, n in found if n in ("query_l2", "key_l2", "value_l2")}
    assert packed == {"1.in_proj_weight"}
    assert ("0.weight", "update", "l2") in found
    assert not any(signal == "update" for _, signal, _ in read(gradients(), update=False))
    chosen = read(gradients(), wanted={"l2"})
    assert {(signal, n) for _, signal, n in chosen} == {
        ("param_grad", "l2"),
        ("weight", "l2"),
        ("update", "l2"),
    }


def test_a_feed_forward_layer_of_three_times_the_width_is_no_query_key_and_value() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8, n_inner=24)
    packed = {e.name for e in Parameters(GPT2LMHeadModel(config)).entries if e.packing is not None}
    assert packed == {"transformer.h.0.attn.c_attn.weight"}


def test_norms_are_divided_by_the_scale_and_counts_are_not() -> None:
    found = read(gradients(scale=2.0))
    assert found["0.weight", "param_grad", "l2"] == (1.5, "")
    assert found["1.in_proj_weight", "param_grad", "key_l2"] == (2.0, "")
    assert found["0.weight", "param_grad", "nonfinite"] == (1.0, "")
    assert found["0.weight", "param_grad", "count"] == (6.0, "")


def test_what_is_absent_says_why() -> None:
    found = read(gradients())
    value, why = found["0.bias", "param_grad", "l2"]
    assert math.isnan(value) and why == "frozen"
    assert found["0.bias", "param_grad", "count"] == (2.0, "")
    assert found["0.weight", "update", "l2"][1] == found["0.weight", "weight", "l2"][1] == "not sampled"
    # A frozen parameter has weights, which are sampled, and no update ever.
    assert found["0.bias", "update", "l2"][1] == "frozen"
    assert found["0.bias", "weight", "l2"][1] == "not sampled"


def test_without_a_reading_no_backward_pass_wrote_a_gradient() -> None:
    found = read(Readings())
    assert found["0.weight", "param_grad", "l2"][1] == "not supported: no backward pass wrote to .grad"
    assert found["0.bias", "param_grad", "l2"][1] == "frozen"
    assert found["0.weight", "param_grad", "count"] == (6.0, "")


def test_what_was_sampled_is_there() -> None:
    readings = gradients()
    readings.weight, readings.update, readings.at_step = {0: 7.0, 1: 8.0}, {0: 0.5}, {0: 1.0}
    found = read(readings)
    assert found["0.weight", "weight", "l2"] == (7.0, "")
    assert found["0.bias", "weight", "l2"] == (8.0, "")
    assert found["0.weight", "update", "l2"] == (0.5, "")
    assert found["0.weight", "param_grad", "l2_at_step"] == (1.0, "")
    assert found["1.in_proj_weight", "update", "l2"][1] == "not sampled"


@pytest.mark.parametrize(
    ("owner", "depth"),
    [
        ("blocks.1.mlp.up", 2.0),  # of the innermost layer on the axis
        ("blocks.1.norm", 2.5),
        ("blocks.0", None),  # called twice: used at several depths
        ("head", None),
    ],
)
def test_a_parameter_stands_where_its_layer_does(owner: str, depth: float | None) -> None:
    sites = {"blocks.0": 0, "blocks.1": 1, "blocks.1.mlp": 2, "head": 3}
    trunk = "blocks"
    places = {(0, 0): (trunk, 1.0), (0, 1): (trunk, 2.0), (1, 0): (trunk, 2.5), (2, 0): (trunk, 2.0)}
    found = place_of(owner, sites, places)
    assert found == (trunk, depth) if depth is not None else found[0] == "" and math.isnan(found[1])
