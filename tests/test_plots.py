"""What the plots put on the axes: read back from the artists, against the data."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from synthetic import Builder, flat_record, moments, stream_step

from gradscope.errors import QuantityError
from gradscope.record import Record
from gradscope.show import plots

KNOWN = {"replicates": "initialisation", "loss_denominator": 8}
UNKNOWN = {"replicates": "run", "loss_denominator": None}


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def lines(ax: Axes) -> dict[str, np.ndarray]:
    return {
        str(line.get_label()): np.asarray(line.get_xydata())
        for line in ax.lines
        if line.get_gid() == "gradscope series"
    }


def legend_text(ax: Axes) -> str:
    legend = ax.get_legend()
    return "" if legend is None else "\n".join(text.get_text() for text in legend.get_texts())


def marks(ax: Axes, marker: str) -> np.ndarray:
    """x of the points drawn in axes height: what has no place on the axis."""
    found = [
        np.asarray(line.get_xdata())
        for line in ax.lines
        if line.get_gid() is None and line.get_marker() == marker and line.get_linestyle() == "None"
    ]
    return np.concatenate(found) if found else np.empty(0)


def test_depth_draws_the_geometric_mean_and_the_range() -> None:
    norms = np.array([[1.0, 2.0, 4.0], [4.0, 8.0, 1.0]])
    ax = plots.depth(flat_record(norms, header=KNOWN))
    (line,) = lines(ax).values()
    np.testing.assert_allclose(line[:, 0], [0, 1, 2])
    np.testing.assert_allclose(line[:, 1], 8 * np.sqrt(norms[0] * norms[1]))
    band = ax.collections[0].get_paths()[0].vertices
    for x in range(3):
        here = band[band[:, 0] == x, 1]
        np.testing.assert_allclose([here.min(), here.max()], np.sort(8 * norms[:, x]))
    assert ax.get_yscale() == "log"
    assert ax.get_ylabel() == "Gradient flow [loss/activation]"
    assert "depth" in ax.get_xlabel() and "[blocks]" in ax.get_xlabel()
    assert "range over 2 initialisations" in legend_text(ax)


def test_several_records_each_have_their_own_look_and_name() -> None:
    records = {f"variant {i}": flat_record(np.ones((1, 3)) * (i + 1), header=KNOWN) for i in range(12)}
    ax = plots.depth(records)
    found = [line for line in ax.lines if line.get_gid() == "gradscope series"]
    looks = {(line.get_marker(), str(line.get_linestyle()), line.get_color()) for line in found}
    assert len(looks) == 12
    assert legend_text(ax).split("\n") == list(records)
    listed = plots.depth(list(records.values())[:2], labels=["a", "b"], ax=plt.figure().add_subplot())
    assert list(lines(listed)) == ["a", "b"]
    with pytest.raises(ValueError, match="different labels"):
        plots.depth(list(records.values())[:2], labels=["a", "a"])


def test_levels_that_are_not_comparable_are_drawn_relative_to_the_last_layer() -> None:
    a, b = np.array([[1.0, 2.0, 4.0]]), np.array([[30.0, 30.0, 10.0]])
    records = {"a": flat_record(a, header=UNKNOWN), "b": flat_record(b, header=KNOWN)}
    ax = plots.depth(records)
    np.testing.assert_allclose(lines(ax)["a"][:, 1], [0.25, 0.5, 1.0])
    np.testing.assert_allclose(lines(ax)["b"][:, 1], [3.0, 3.0, 1.0])
    assert "relative to the last layer" in ax.get_ylabel().replace("\n", " ")
    with pytest.raises(QuantityError, match=r"cannot be compared.*'a'"):
        plots.depth(records, normalize=False)
    alone = plots.depth(records["a"])
    np.testing.assert_allclose(lines(alone)["model"][:, 1], a[0])
    assert "[relative]" in alone.get_ylabel()
    batches = flat_record(np.vstack([a, b]), header={"replicates": "batch", "loss_denominator": None})
    assert "relative to the last layer" in plots.depth(batches).get_ylabel().replace("\n", " ")
    known = {k: flat_record(v, header=KNOWN) for k, v in {"a": a, "b": b}.items()}
    np.testing.assert_allclose(lines(plots.depth(known))["b"][:, 1], 8 * b[0])
    np.testing.assert_allclose(lines(plots.depth(known, normalize=True))["b"][:, 1], b[0] / 10)


def test_relative_to_a_last_layer_that_is_zero_is_refused() -> None:
    records = {k: flat_record(np.array([[1.0, 2.0, 0.0]]), header=UNKNOWN) for k in "ab"}
    with pytest.raises(QuantityError, match="at the last layer"):
        plots.depth(records)


def test_zero_absent_and_nan_look_different_and_nothing_is_interpolated() -> None:
    norms = np.array([[0.0, 1.0, 5.0, np.nan, 2.0, 3.0, 4.0]])
    status = np.array([["", "", "frozen", "", "", "", ""]], dtype=object)
    ax = plots.depth(flat_record(norms, status=status))
    (line,) = lines(ax).values()
    assert np.isnan(line[:, 1]).tolist() == [True, False, True, True, False, False, False]
    assert marks(ax, "x").tolist() == [3]
    floor = [x for x in ax.lines if x.get_markerfacecolor() == "white" and x.get_linestyle() == "None"]
    assert floor[0].get_xdata().tolist() == [0]
    # Between two gaps there is no segment; the value must be visible as a point.
    alone = [x for x in ax.lines if x.get_gid() is None and list(x.get_xdata()) == [1]]
    assert len(alone) == 1
    assert "exactly 0" in legend_text(ax) and "not finite" in legend_text(ax)


def test_a_mean_is_only_drawn_where_every_replicate_has_a_value() -> None:
    norms = np.array([[0.0, 1.0, 1.0], [2.0, 1.0, 1.0], [4.0, 1.0, 1.0]])
    ax = plots.depth(flat_record(norms))
    (line,) = lines(ax).values()
    assert np.isnan(line[0, 1]) and np.isfinite(line[1:, 1]).all()
    dots = [x for x in ax.lines if x.get_marker() == "."]
    assert sorted(dots[0].get_ydata().tolist()) == [2.0, 4.0]
    assert "single replicates" in legend_text(ax)


def test_flat_looks_flat() -> None:
    low, high = plots.depth(flat_record(np.array([[1.0, 1.01, 0.99]]))).get_ylim()
    assert high / low == pytest.approx(10)


def test_the_caller_keeps_axes_and_settings() -> None:
    before = dict(mpl.rcParams)
    figure, (left, right) = plt.subplots(1, 2)
    record = flat_record(np.ones((2, 3)), steps=[0, 1], replicates=[0, 0])
    assert plots.depth(record, ax=left) is left
    assert plots.heatmap(record, ax=right) is right
    assert plots.loss_curves({"a": ([0, 1], [[1.0, 2.0]])}, ax=left) is left
    figure.canvas.draw()
    assert dict(mpl.rcParams) == before
    # A second call on the same axes goes on with the next look.
    assert len({line.get_color() for line in left.lines if line.get_gid()}) == 2


def test_quantities_without_a_log_scale_and_branches() -> None:
    rng = np.random.default_rng(0)
    record = Record(KNOWN, (stream_step([rng.normal(size=(3, 4)) for _ in range(4)]),))
    ax = plots.depth(record, "gradient_cosine")
    assert ax.get_yscale() == "linear" and ax.get_ylabel() == "Gradient cosine of neighbours [1]"
    with pytest.raises(QuantityError, match="branches=True goes with"):
        plots.depth(record, "gradient_cosine", branches=True)
    with pytest.raises(QuantityError, match="positive"):
        plots.depth(record, "gradient_cosine", normalize=True)
    b = Builder()
    for k in range(3):
        x = rng.normal(size=(3, 4))
        b.module(k + 0.5, f"h.{k}.attn", "output_grad", {"l2": 2.0, "tokens": 4.0})
        b.module(k + 1.0, f"h.{k}", "output_grad", {**moments(x), "dot_next": 1.0})
    ax = plots.depth(Record(KNOWN, (b.step(),)), branches=True)
    dots = next(line for line in ax.lines if line.get_marker() == ".")
    np.testing.assert_allclose(dots.get_xydata(), [[0.5, 8.0], [1.5, 8.0], [2.5, 8.0]])


def test_a_record_without_values_is_named_with_the_reason() -> None:
    status = np.full((1, 3), "no gradient path", dtype=object)
    records = {
        "dead": flat_record(np.ones((1, 3)), header=KNOWN, status=status),
        "live": flat_record(np.ones((1, 3)), header=KNOWN),
    }
    assert "dead (absent: no gradient path)" in legend_text(plots.depth(records))


def cells(ax: Axes) -> np.ma.MaskedArray:
    return next(c for c in ax.collections if isinstance(c, QuadMesh)).get_array()


def test_heatmap_shows_depth_by_step_and_keeps_three_kinds_of_nothing_apart() -> None:
    norms = np.array([[1.0, 2.0, 3.0], [0.0, 5.0, 6.0], [7.0, np.nan, 9.0], [1.0, 2.0, 3.0]])
    status = np.full(norms.shape, "", dtype=object)
    status[3, :2] = "skipped step"
    record = flat_record(
        norms, steps=[0, 10, 20, 30], replicates=[0] * 4, header={"loss_denominator": 1}, status=status
    )
    ax = plots.heatmap(record)
    found = cells(ax)
    assert found.shape == (3, 4)
    expected = np.array([[1, 0, 7, 0], [2, 5, 0, 0], [3, 6, 9, 3]], dtype=float)
    np.testing.assert_allclose(found.filled(0), expected)
    assert legend_text(ax).split("\n") == [
        "absent",
        "exactly 0 (underflow, or by construction)",
        "not finite",
    ]
    assert ax.get_xlim() == (-5, 35) and ax.get_ylim() == (-0.5, 2.5)
    assert ax.get_xlabel() == "step [optimizer steps]"


def test_heatmap_without_a_denominator_is_relative_to_the_last_layer_of_each_step() -> None:
    norms = np.array([[1.0, 2.0, 4.0], [100.0, 200.0, 100.0]])
    record = flat_record(norms, steps=[0, 1], replicates=[0, 0], header=UNKNOWN)
    np.testing.assert_allclose(cells(plots.heatmap(record)), [[0.25, 1], [0.5, 2], [1, 1]])
    with pytest.raises(QuantityError, match="between steps"):
        plots.heatmap(record, normalize=False)


def test_heatmap_leaves_out_steps_at_which_a_slow_quantity_is_not_due() -> None:
    status = np.full((5, 3), "", dtype=object)
    status[[1, 2, 4]] = "not sampled"
    record = flat_record(np.ones((5, 3)), steps=range(5), replicates=[0] * 5, status=status)
    assert cells(plots.heatmap(record)).shape == (3, 2)


def test_heatmap_says_when_steps_are_not_to_scale() -> None:
    steps = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    record = flat_record(np.ones((12, 3)), steps=steps, replicates=[0] * 12)
    ax = plots.heatmap(record)
    assert "not to scale" in ax.get_xlabel()
    shown = {int(text.get_text()) for text in ax.get_xticklabels()}
    assert {0, 1024} <= shown <= set(steps)


def test_heatmap_over_replicates_is_the_geometric_mean() -> None:
    norms = np.array([[1.0, 2.0], [4.0, 0.0]])
    record = flat_record(norms, steps=[0, 0], replicates=[0, 1])
    found = cells(plots.heatmap(record))
    assert found[0, 0] == pytest.approx(2.0) and found.mask[1, 0]
    np.testing.assert_allclose(cells(plots.heatmap(record, replicate=0))[:, 0], [1.0, 2.0])
    with pytest.raises(QuantityError, match="no replicate 7"):
        plots.heatmap(record, replicate=7)


def test_ratio_against_depth_marks_zeros_and_the_preserved_band() -> None:
    points = {"a": ([6, 12, 24], np.array([[1e-3, 1e-6, 0.0], [1e-5, 1e-8, 0.0]]))}
    ax = plots.ratio_against_depth(points)
    np.testing.assert_allclose(lines(ax)["a"][:2, 1], [1e-4, 1e-7])
    assert np.isnan(lines(ax)["a"][2, 1])
    assert "within 3 nats of 1" in legend_text(ax) and "exactly 0" in legend_text(ax)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["6", "12", "24"]
    assert ax.get_xscale() == "log" and ax.get_yscale() == "log"
    with pytest.raises(ValueError, match=r"'a'.*\(2, 3\) at 2 points"):
        plots.ratio_against_depth({"a": ([6, 12], np.ones((2, 3)))})


def test_loss_curves_break_off_where_a_run_diverges() -> None:
    steps = np.arange(100)
    losses = np.vstack([np.linspace(5, 3, 100), np.linspace(5, 2, 100)])
    losses[1, 60:] = np.nan
    ax = plots.loss_curves({"a": (steps, losses)})
    line = lines(ax)["a"]
    np.testing.assert_allclose(line[:60, 1], losses[:, :60].mean(0))
    assert np.isnan(line[60:, 1]).all()
    assert marks(ax, "x").tolist() == [60]
    thin = [x for x in ax.lines if x.get_gid() is None and x.get_linewidth() < 1]
    assert any(np.array_equal(x.get_ydata()[60:], losses[0, 60:]) for x in thin)
    assert ax.get_ylabel() == "Loss [nats per token]"


def test_the_running_mean_is_trailing_and_stated() -> None:
    ax = plots.loss_curves({"a": (np.arange(4), [[4.0, 2.0, 6.0, 0.0]])}, window=2)
    np.testing.assert_allclose(lines(ax)["a"][:, 1], [4, 3, 4, 3])
    assert "mean of 2 recorded steps" in ax.get_ylabel().replace("\n", " ")


def test_the_band_can_be_the_interval_of_the_mean() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    y = rng.normal(size=(5, 3))
    ax = plots.against_depth({"a": ([2, 3, 4], y)}, label="Depth [1]", band="interval")
    expected = stats.ttest_1samp(y, 0).confidence_interval(0.95)
    band = ax.collections[0].get_paths()[0].vertices
    here = band[band[:, 0] == 3, 1]
    np.testing.assert_allclose([here.min(), here.max()], [expected.low[1], expected.high[1]])
    assert "95 % interval of the mean" in legend_text(ax)


def test_a_decay_fit_is_drawn_over_its_points() -> None:
    import gradscope

    depth = np.arange(13.0)
    rng = np.random.default_rng(0)
    values = 7.0 * np.exp(0.3 * depth + 0.01 * rng.normal(size=(3, 13)).cumsum(1))
    fit = gradscope.fit_decay(values)
    ax = plots.decay(fit)
    *dots, line = ax.lines
    assert len(dots) == 3
    for row, mark in zip(values, dots, strict=True):
        assert np.asarray(mark.get_ydata()) == pytest.approx((row / row[-1])[::-1])
        assert np.asarray(mark.get_xdata()).tolist() == depth[::-1].tolist()
    assert np.asarray(line.get_ydata()) == pytest.approx(np.exp(-0.3 * (12 - depth[::-1])), rel=0.1)
    assert ax.get_yscale() == "log"
    assert f"exponential (κ = {fit.parameters['kappa'].estimate:.3g})" in legend_text(ax)
    forward = gradscope.fit_decay(values, "act_mean_square")
    assert (
        plots.decay({"a": forward, "b": forward})
        .get_ylabel()
        .lower()
        .startswith("activation mean square")
    )
    with pytest.raises(gradscope.GradscopeError, match="draw them apart"):
        plots.decay({"a": fit, "b": forward})
    with pytest.raises(gradscope.GradscopeError, match="not enough layers"):
        plots.decay(gradscope.fit_decay(values[:, :3]))


def test_a_model_keeps_its_look_in_another_picture() -> None:
    ax = plots.loss_curves({"c": ([0, 1], [[1.0, 2.0]])}, looks=[2])
    other = plots.loss_curves({k: ([0, 1], [[1.0, 2.0]]) for k in "abc"})
    assert ax.lines[0].get_color() == other.lines[2].get_color()
