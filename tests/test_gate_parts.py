"""The parts of a gradient baseline: the test on means, checksums, digests and tolerances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from gradscope.analysis.gate.moderated import Moments, moderated_t
from gradscope.analysis.gate.tolerance import DEFAULTS, parse_tolerance
from gradscope.errors import GateError
from gradscope.experiment.checksum import checksum, digest


def test_the_moderated_t_of_one_layer_is_students():
    """Roles of fewer than four layers borrow nothing: scipy's two-sample t with equal variances."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 3)), rng.normal(0.5, 1.0, size=(5, 3))
    found = moderated_t(Moments.of(a), Moments.of(b), np.arange(3))
    expected = stats.ttest_ind(b, a, equal_var=True)
    np.testing.assert_allclose(found.t, expected.statistic, rtol=1e-10)
    np.testing.assert_allclose(found.p_value, expected.pvalue, rtol=1e-9)


def test_the_moderated_t_holds_its_level():
    """Layers whose variances differ by a factor of some e: p below .01 in 1 % of features."""
    rng = np.random.default_rng(1)
    scale = np.exp(rng.normal(0, 0.3, 12))
    small = 0
    for _ in range(400):
        a, b = rng.normal(size=(20, 12)) * scale, rng.normal(size=(5, 12)) * scale
        small += int((moderated_t(Moments.of(a), Moments.of(b), np.zeros(12, int)).p_value < 0.01).sum())
    assert stats.binom.ppf(1e-4, 4800, 0.01) <= small <= stats.binom.ppf(1 - 1e-3, 4800, 0.015)


def test_equal_variances_are_pooled_as_far_as_the_prior_goes():
    """Equal s² in all layers: no excess spread, d_0 = 10 and s̃² = s²."""
    mean, variance = np.zeros(6), np.full(6, 4.0)
    found = moderated_t(Moments(mean, variance, 20), Moments(mean + 1, variance, 5), np.zeros(6, int))
    np.testing.assert_allclose(found.degrees, 33)
    np.testing.assert_allclose(found.error, 2 * math.sqrt(1 / 20 + 1 / 5))


@pytest.mark.parametrize("size", [1, 7, 1 << 14, 40_000])
def test_the_checksum_is_its_formula(size):
    v = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    i = torch.arange(size, dtype=torch.float64)
    expected = float((v * torch.cos(2.399963 * i)).sum() / v.norm())
    assert checksum(v) == pytest.approx(expected, abs=2e-5)
    assert checksum(3 * v) == pytest.approx(expected, abs=2e-5)


def test_a_digest_depends_on_content_alone():
    a = {"x": torch.arange(6).reshape(2, 3), "n": 3}
    assert digest(a) == digest({"x": torch.arange(6).reshape(2, 3), "n": 3})
    assert digest(a)[0] != digest({"x": torch.arange(6).reshape(3, 2), "n": 3})[0]
    assert digest(a)[0] != digest({"x": torch.arange(6).reshape(2, 3), "n": 4})[0]
    assert digest(a)[0] == digest({"n": 3, "x": torch.arange(6).reshape(2, 3)})[0]


class Graph:
    """As a graph library's batch: its ``repr`` tells shapes alone, and it holds itself."""

    def __init__(self, x: Any) -> None:
        self.store = {"x": x, "whole": self}

    def __repr__(self) -> str:
        return "Graph(x=[2000])"


@pytest.mark.parametrize(
    "holding",
    [lambda x: x, lambda x: {"x": x}, lambda x: [{"y": x}], Graph, lambda x: (Graph([x]), 3)],
    ids=["bare", "mapping", "nested", "object", "nested object"],
)
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_one_element_in_the_middle_is_another_batch(holding, kind):
    """`repr` leaves out the middle of an array of more than 1,000 elements."""
    a, b = np.zeros(2000), np.zeros(2000)
    b[1000] = 1
    assert digest(holding(kind(a))) == digest(holding(kind(a.copy())))
    assert digest(holding(kind(a)))[0] != digest(holding(kind(b)))[0]
    assert digest(holding(kind(a)))[1] == "float64 2000"


def test_the_order_of_a_set_is_no_content():
    """A set of words has another order in each process: here in the order of insertion."""
    a = set(range(0, 80, 8))
    assert digest({"ids": a})[0] == digest({"ids": set(reversed(sorted(a)))})[0]
    assert list(a) != list(set(reversed(sorted(a))))


def test_tolerances():
    found = parse_tolerance("flow:20%, delta:.5nat,effective_depth:10%")
    assert found.of("flow") == pytest.approx(math.log(1.2))
    assert found.of("delta") == 0.5 and found.of("rms") == DEFAULTS["rms"]
    assert parse_tolerance(None).of("mean", "mean rms blocks.*.weight") == DEFAULTS["mean rms"]
    for wrong in ("flow", "flow:20", "speed:3%", "flow:-1nat"):
        with pytest.raises(GateError, match="write kind"):
            parse_tolerance(wrong)
    with pytest.raises(GateError, match="flow has one already"):
        parse_tolerance("flow:20%,delta:.5nat,flow:30%")
    with pytest.raises(GateError, match="no change is that large"):
        parse_tolerance("flow:1e400nat")
