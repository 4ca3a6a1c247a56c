"""The values of several ranks as those of one batch, by hand: what is added up, what is left local."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gradscope.collect.merging import COLUMNS, Samples, merged
from gradscope.collect.ranks import LOCAL
from gradscope.collect.shards import UNKNOWN

#: Parameter rows: a norm, a count of non-finite elements, a number of elements.
NORMS, SUMS = np.array([True, False, False]), np.array([False, True, False])


def rank(values: list[float], copies: list[int], why: tuple[str, ...] = ("", "", "")) -> Samples:
    return Samples(
        keys=[],
        places={},
        value=np.empty((0, len(COLUMNS))),
        why=np.empty((0, len(COLUMNS)), dtype=object),
        parameter_value=np.array(values),
        parameter_why=np.array(why, dtype=object),
        copies=np.array(copies),
    )


def pooled(*ranks: Samples) -> list[Any]:
    found = merged(ranks, NORMS, SUMS)
    return [*zip(found.parameter_value.tolist(), found.parameter_why.tolist(), strict=True)]


def test_shards_are_added_up() -> None:
    norm, bad, elements = pooled(rank([3.0, 1.0, 10.0], [1, 1, 1]), rank([4.0, 2.0, 10.0], [1, 1, 1]))
    assert norm == (pytest.approx(5.0), "")
    assert bad == (3.0, "")
    assert elements == (10.0, "")  # the parameter's, which every rank knows


def test_copies_of_a_shard_count_once() -> None:
    """Hybrid sharding: two shards on two ranks each."""
    halves = [rank([3.0, 1.0, 10.0], [2, 2, 2])] * 2 + [rank([4.0, 2.0, 10.0], [2, 2, 2])] * 2
    norm, bad, _ = pooled(*halves)
    assert norm == (pytest.approx(5.0), "") and bad == (3.0, "")


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_no_square_leaves_the_range(size: float) -> None:
    norm, _, _ = pooled(rank([3 * size, 0.0, 1.0], [1, 1, 1]), rank([4 * size, 0.0, 1.0], [1, 1, 1]))
    assert norm == (pytest.approx(5 * size, abs=0), "")


def test_what_is_whole_on_every_rank_must_be_the_same() -> None:
    same = pooled(rank([3.0, 0.0, 10.0], [0, 0, 0]), rank([3.0 * (1 + 1e-7), 0.0, 10.0], [0, 0, 0]))
    assert [why for _, why in same] == ["", "", ""] and same[0][0] == 3.0
    apart = pooled(rank([3.0, 0.0, 10.0], [0, 0, 0]), rank([3.1, 0.0, 10.0], [0, 0, 0]))
    assert [why for _, why in apart] == [LOCAL, "", ""]


def test_shards_of_unknown_layout_are_local() -> None:
    found = pooled(*[rank([3.0, 1.0, 10.0], [UNKNOWN] * 3)] * 2)
    assert [why for _, why in found] == [LOCAL, LOCAL, ""]


def test_a_reason_on_one_rank_only_is_local() -> None:
    frozen = rank([math.nan, 0.0, 10.0], [0, 0, 0], ("frozen", "", ""))
    assert [why for _, why in pooled(frozen, frozen)] == ["frozen", "", ""]
    assert [why for _, why in pooled(frozen, rank([3.0, 0.0, 10.0], [0, 0, 0]))] == [LOCAL, "", ""]
