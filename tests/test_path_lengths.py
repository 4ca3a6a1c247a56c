"""Path lengths of an unrolled residual network: enumerated, and as published."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from gradscope.analysis.path_lengths import PathLengths, path_lengths


@pytest.mark.parametrize("branches", [0, 1, 2, 7, 12])
def test_every_path_is_counted_once(branches: int) -> None:
    """Each path says of each branch: crossed or skipped."""
    lengths = [sum(path) for path in itertools.product((0, 1), repeat=branches)]
    found = path_lengths(branches)
    assert found.branches == branches
    assert found.count == tuple(lengths.count(k) for k in range(branches + 1))
    assert found.mean == np.mean(lengths)
    for low, high in itertools.combinations_with_replacement(range(branches + 1), 2):
        assert found.share(low, high) == sum(low <= k <= high for k in lengths) / len(lengths)


def test_fifty_four_blocks_as_published() -> None:
    """Veit et al. 2016 (arXiv:1605.06431): over 95 % of the paths cross 19 to 35 blocks, and the 5 to
    17 of the paths that carry gradient are .45 % of all."""
    found = path_lengths(54)

    def exact(low: int, high: int) -> Fraction:
        return Fraction(sum(math.comb(54, k) for k in range(low, high + 1)), 2**54)

    assert found.share(19, 35) == float(exact(19, 35))
    assert found.share(5, 17) == float(exact(5, 17))
    assert found.share(19, 35) == pytest.approx(0.980, abs=5e-4)
    assert found.share(19, 35) > 0.95
    assert found.share(5, 17) == pytest.approx(0.00454, abs=5e-6)
    assert found.mean == 27
    assert int(np.argmax(found.probability)) == 27


@pytest.mark.parametrize("branches", [1, 54, 400])
def test_probability_is_binomial(branches: int) -> None:
    probability = path_lengths(branches).probability
    assert probability.shape == (branches + 1,)
    assert probability.dtype == np.float64
    expected = stats.binom(branches, 0.5).pmf(np.arange(branches + 1))
    np.testing.assert_allclose(probability, expected, rtol=1e-10)
    assert probability.sum() == pytest.approx(1, abs=1e-14)


def test_shares_stay_exact_where_floats_overflow() -> None:
    """2^3000 is no float64; shares of it are."""
    found = path_lengths(3000)
    expected = stats.binom(3000, 0.5)
    assert found.share(1400, 1600) == pytest.approx(expected.cdf(1600) - expected.cdf(1399), rel=1e-10)
    assert found.share(0, 3000) == 1
    assert found.share(0, 0) == 0  # 2^-3000 is below every float64


def test_lengths_that_no_path_has() -> None:
    found = path_lengths(4)
    assert found.share(5, 9) == 0
    assert found.share(-3, -1) == 0
    assert found.share(-3, 0) == 1 / 16
    assert found.share(3, 99) == 5 / 16


def test_it_is_a_value() -> None:
    assert (
        path_lengths(5)
        == path_lengths(np.int64(5))
        == PathLengths(branches=5, count=(1, 5, 10, 10, 5, 1))
    )
    assert len({path_lengths(5), path_lengths(5), path_lengths(6)}) == 2


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"branches=-1\): the number of residual branches is 0 or more"):
        path_lengths(-1)
    with pytest.raises(TypeError):
        path_lengths(2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        path_lengths(5).share(0.5, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"write share\(2, 4\)"):
        path_lengths(5).share(4, 2)


def test_the_examples_in_its_docstrings() -> None:
    # By name: `gradscope.analysis` may offer the function under the module's name.
    module = importlib.import_module("gradscope.analysis.path_lengths")
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=2)
