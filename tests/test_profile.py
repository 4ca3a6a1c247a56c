"""Profiles, increments and intervals against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from synthetic import Builder, flat_record, stream_step

from gradscope.analysis import Interval, history, interval, profile
from gradscope.errors import QuantityError
from gradscope.record import Record


def geometric(rate: float, depths: int = 13, scale: float = 1.0) -> np.ndarray:
    return scale * np.exp(rate * np.arange(depths)[None, :])


def test_a_geometric_profile_has_constant_increments() -> None:
    p = profile(flat_record(geometric(np.log(0.95) * -1)))
    assert p.depth.tolist() == list(range(13))
    np.testing.assert_allclose(p.increments, np.log(0.95), rtol=1e-12)
    assert p.mean_increment().estimate == pytest.approx(np.log(0.95), rel=1e-12)
    assert p.delta().estimate == pytest.approx(12 * np.log(0.95), rel=1e-12)
    assert p.first_to_last_ratio().estimate == pytest.approx(0.95**12, rel=1e-12)
    assert np.isnan([p.delta().low, p.delta().high]).all() and p.delta().count == 1


def test_intervals_are_student_t_over_replicates() -> None:
    rng = np.random.default_rng(0)
    norms = np.exp(np.cumsum(rng.normal(-0.2, 0.1, size=(5, 9)), axis=1))
    p = profile(flat_record(norms))
    delta = np.log(norms[:, 0] / norms[:, -1])
    r = np.array([np.mean([np.log(row[i] / row[i + 1]) for i in range(8)]) for row in norms])
    for found, samples in ((p.delta(0.9), delta), (p.mean_increment(0.9), r)):
        expected = stats.ttest_1samp(samples, 0).confidence_interval(0.9)
        assert found.estimate == pytest.approx(samples.mean(), rel=1e-12)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-10)
        assert (found.confidence, found.count) == (0.9, 5)
    ratio = p.first_to_last_ratio(0.9)
    assert (ratio.low, ratio.high) == pytest.approx(
        np.exp([p.delta(0.9).low, p.delta(0.9).high]).tolist()
    )


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.floats(0.5, 0.999))
def test_interval_equals_scipy(samples: list[float], confidence: float) -> None:
    found = interval(samples, confidence)
    mean, s = np.mean(samples), np.std(samples, ddof=1) / np.sqrt(len(samples))
    low, high = (
        stats.t.interval(confidence, len(samples) - 1, loc=mean, scale=s) if s > 0 else (mean, mean)
    )
    assert found.low == pytest.approx(low, rel=1e-8, abs=1e-8)
    assert found.high == pytest.approx(high, rel=1e-8, abs=1e-8)


def test_interval_edges() -> None:
    assert interval([]).count == 0 and np.isnan(interval([]).estimate)
    one = interval([3.0])
    assert one.estimate == 3.0 and np.isnan(one.low) and "no interval" in str(one)
    assert interval([1.0, np.nan, 3.0]).count == 2
    below = interval([-np.inf, -1.0])
    assert (below.estimate, below.low) == (-np.inf, -np.inf) and np.isnan(below.high)
    assert np.isnan(interval([-np.inf, np.inf]).estimate)
    assert str(Interval(estimate=-2.27, low=-2.3, high=-2.2, confidence=0.95, count=5)) == (
        "-2.27 [-2.3, -2.2] (95 %, n = 5)"
    )
    with pytest.raises(ValueError, match="95"):
        interval([1.0, 2.0], confidence=95)


def test_the_scale_of_the_gradient_changes_no_ratio() -> None:
    rng = np.random.default_rng(1)
    norms = np.exp(rng.normal(size=(3, 6)))
    a, b = profile(flat_record(norms)), profile(flat_record(1e-30 * norms))
    np.testing.assert_allclose(a.increments, b.increments, atol=1e-12)


def test_exact_zeros_are_kept_and_said() -> None:
    norms = np.array([[0.0, 0.0, 1.0, 2.0, 4.0], [0.5, 0.5, 1.0, 2.0, 4.0]])
    p = profile(flat_record(norms))
    assert p.zero.tolist() == [[True, True, False, False, False], [False] * 5]
    assert np.isnan(p.increments[0, :2]).all()
    np.testing.assert_allclose(p.increments[:, 2:], -np.log(2))
    assert p.delta_per_replicate.tolist() == [-np.inf, pytest.approx(np.log(0.125))]
    assert p.delta().estimate == -np.inf and p.delta().low == -np.inf and np.isnan(p.delta().high)
    assert p.first_to_last_ratio().estimate == 0.0
    notes = "\n".join(p.notes)
    assert "exactly 0 (underflow, or zero by construction) at depth 0–1 in 1 of 2 entries" in notes
    assert "2 of 8 increments are left out, at depth 0–1" in notes


def test_absent_zero_and_nan_are_three_things() -> None:
    norms = np.array([[1.0, 0.0, np.nan, 1.0, 2.0]])
    status = np.array([["", "", "", "frozen", ""]])
    p = profile(flat_record(norms, status=status))
    assert p.status[0].tolist() == ["ok", "ok", "ok", "frozen", "ok"]
    assert p.zero[0].tolist() == [False, True, False, False, False]
    notes = "\n".join(p.notes)
    assert "absent (frozen) at depth 3" in notes
    assert "not finite at depth 2 in 1 of 1" in notes
    assert np.isnan(p.increments).all() and np.isnan(p.mean_increment().estimate)
    assert p.mean_increment().count == 0
    assert p.delta().estimate == pytest.approx(np.log(0.5))


def test_delta_has_one_pair_of_ends_for_all_replicates() -> None:
    norms = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    status = np.array([["", "", ""], ["local", "", ""]])
    p = profile(flat_record(norms, status=status))
    assert p.ends == (1, 2)
    np.testing.assert_allclose(p.delta_per_replicate, -np.log(2))
    assert any("Δ is between depth 1 and 2" in note for note in p.notes)


def test_without_a_gradient_at_the_input_the_profile_starts_at_one() -> None:
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(3, 4)) for _ in range(4)]
    record = Record({"loss_denominator": 1}, (stream_step(gradients, first="no gradient path"),))
    p = profile(record)
    assert p.depth.tolist() == [1, 2, 3] and p.layers[0] == "h.0"
    assert p.notes == ("h_0 is absent (no gradient path): the profile starts at l = 1",)
    assert profile(record, "act_var").depth.tolist() == [0, 1, 2, 3]
    b = Builder()
    for depth in (1, 2):
        b.module(float(depth), f"h.{depth}", "output_grad", {"l2": 1.0, "tokens": 1.0, "dot_next": 1.0})
    p = profile(Record({"loss_denominator": 1}, (b.step(),)))
    assert "h_0 is not in the Record" in p.notes[0]


def test_without_a_step_the_last_that_has_the_quantity_is_taken() -> None:
    norms = np.stack([geometric(0.1, 4)[0] * (s + 1) for s in range(5)])
    status = np.full((5, 4), "")
    status[4] = "not sampled"[:1]
    record = flat_record(
        norms,
        steps=[0, 10, 20, 30, 40],
        replicates=[0] * 5,
        status=np.where(status == "", "", "not sampled").astype(object),
    )
    p = profile(record)
    assert p.steps.tolist() == [30] and "step 30, the last step that has grad_l2" in p.notes
    np.testing.assert_allclose(p.value, norms[3:4])
    assert profile(record, step=10).value[0, 0] == pytest.approx(2.0)
    both = profile(record, step=[0, 20])
    assert both.steps.tolist() == [0, 20] and both.value.shape == (2, 4)
    assert both.mean_increment().count == 1, "steps of one run are not replicates"
    absent = profile(record, step=40)
    assert not absent.ok.any() and set(absent.status.ravel()) == {"not sampled"}
    with pytest.raises(QuantityError, match=r"no step 7 .* 5 steps: 0, 10, 20, 30, 40"):
        profile(record, step=7)


def test_the_last_step_is_the_one_that_most_replicates_have() -> None:
    record = flat_record(np.ones((3, 3)), steps=[0, 0, 1], replicates=[0, 1, 0])
    p = profile(record)
    assert p.steps.tolist() == [0, 0] and p.replicates.tolist() == [0, 1]
    late = profile(record, step=1)
    assert any("replicates without that step: 1" in note for note in late.notes)


def test_gaps_in_depth_count_as_what_they_are() -> None:
    b = Builder()
    for depth in (1, 2, 6):
        flow = np.exp(0.5 * depth)
        b.module(
            float(depth), f"h.{depth - 1}", "output_grad", {"l2": flow, "tokens": 1.0, "dot_next": 1.0}
        )
    p = profile(Record({"loss_denominator": 1}, (b.step(),)))
    np.testing.assert_allclose(p.increments[0], [-0.5, -2.0])
    assert p.mean_increment().estimate == pytest.approx(-0.5)


def test_cosines_have_no_increments() -> None:
    rng = np.random.default_rng(0)
    record = Record({}, (stream_step([rng.normal(size=(3, 4)) for _ in range(3)]),))
    p = profile(record, "gradient_cosine")
    with pytest.raises(QuantityError, match="gradient_cosine has no increments"):
        _ = p.increments
    with pytest.raises(QuantityError, match="gradient_cosine has no delta"):
        p.delta()


def test_profiles_are_immutable_and_leave_the_record_alone() -> None:
    record = flat_record(geometric(0.1))
    before = record.steps[0].value.copy()
    p = profile(record)
    with pytest.raises(ValueError, match="read-only"):
        p.value[0, 0] = 1.0
    with pytest.raises(AttributeError):
        p.unit = "x"  # type: ignore[misc]
    np.testing.assert_array_equal(record.steps[0].value, before)
    assert history(record).value.flags.writeable is False
    assert repr(p).startswith("<Profile of grad_l2 [loss/activation] over h: depths 0 to 12, 1 initial")
