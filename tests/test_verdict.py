"""The verdict's rule, its bounds from exact zeros, and Holm's correction."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from synthetic import Builder, flat_record, moments, stream_step
from torch import Tensor, nn

import gradscope
from gradscope import reference
from gradscope.record import Record


def ends(deltas: list[float], layers: int = 8) -> np.ndarray:
    """Gradient norms, input end first, that change by Δ from the loss to the input."""
    return np.exp(np.outer(deltas, 1 - np.arange(layers + 1) / layers))


# -- the rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deltas", "word", "detail"),
    [
        ([-5.0, -5.1, -4.9], "vanishing", ""),
        ([5.0, 5.1, 4.9], "exploding", ""),
        ([0.1, 0.0, -0.1], "preserved", "flat"),
        ([1.4, 1.5, 1.6], "preserved", "drifting"),
        ([-2.0, -4.0, -3.5], "inconclusive", ""),
        ([9.0, -9.0, 0.5], "inconclusive", ""),
    ],
)
def test_the_word_is_where_students_interval_lies(deltas: list[float], word: str, detail: str) -> None:
    found = gradscope.verdict(ends(deltas))
    assert (found.word, found.detail) == (word, detail)
    low, high = stats.t.interval(0.95, len(deltas) - 1, np.mean(deltas), stats.sem(deltas))
    assert (found.delta.low, found.delta.high) == pytest.approx((low, high))
    assert found.delta.estimate == pytest.approx(np.mean(deltas))
    if detail != "flat":
        assert found.depth_scale.estimate == pytest.approx(8 / (2 * abs(np.mean(deltas))))
    assert found.depth_ratio == pytest.approx(abs(np.mean(deltas)) / 3, abs=1e-9)
    assert found.claim == "this architecture"
    text = str(found)
    for part in (word, "depth scale", "L/(6ξ)", "family", "threshold 3 nats"):
        assert part in text


def test_the_p_value_is_students() -> None:
    deltas = [-4.1, -3.9, -4.6, -3.4]
    found = gradscope.verdict(ends(deltas))
    expected = stats.ttest_1samp(deltas, -3, alternative="less").pvalue
    assert found.p_value == pytest.approx(expected)
    assert found.word == "vanishing"
    preserved = gradscope.verdict(ends([0.5, 0.1, -0.3, 0.2]))
    both = [
        stats.ttest_1samp([0.5, 0.1, -0.3, 0.2], -3, alternative="greater").pvalue,
        stats.ttest_1samp([0.5, 0.1, -0.3, 0.2], 3, alternative="less").pvalue,
    ]
    assert preserved.p_value == pytest.approx(max(both))


def test_a_curved_profile_is_judged_by_its_ends() -> None:
    """Pre-norm at L = 36: ½ ln 37 = 1.81, where slope times L says 1.32."""
    values = np.sqrt(1 / (1 + np.arange(37.0)))[None].repeat(3, 0)
    assert gradscope.verdict(values).delta.estimate == pytest.approx(0.5 * math.log(37))
    slope = -np.polyfit(np.arange(37), np.log(values[0]), 1)[0] * 36
    assert slope == pytest.approx(1.32, abs=0.02)


def test_forward_growth_is_exploding_and_backward_growth_too() -> None:
    """Activations end at the loss side, gradients at the input side; mean square counts half."""
    growing = np.exp(2 * 0.5 * np.arange(13.0))[None].repeat(3, 0)
    forward = gradscope.verdict(growing, "act_mean_square")
    assert forward.word == "exploding"
    assert forward.delta.estimate == pytest.approx(6.0)
    assert "activation grows" in forward.reason
    backward = gradscope.verdict(np.exp(0.5 * np.arange(13.0))[None].repeat(3, 0))
    assert backward.word == "vanishing"
    assert backward.delta.estimate == pytest.approx(-6.0)


def test_one_replicate_speaks_of_this_model_only() -> None:
    rng = np.random.default_rng(0)
    values = np.exp(np.cumsum(rng.normal(0.5, 0.05, 25)))
    found = gradscope.verdict(values)
    assert found.word == "vanishing"
    assert found.replicates == 1
    assert found.claim == "this model only (one initialisation)"
    assert any("one replicate" in note for note in found.fit.notes)
    z = np.diff(np.log(values))
    error = math.sqrt(24 * z.var(ddof=1))
    half = stats.t.ppf(0.975, 23) * error
    assert found.delta.high - found.delta.estimate >= half * (
        1 - 1e-9
    )  # never narrower than independence


@pytest.mark.parametrize("kind", ["batch", "run"])
def test_batches_and_runs_speak_of_this_model_only(kind: str) -> None:
    rng = np.random.default_rng(0)
    steps = tuple(stream_step([rng.normal(size=(4, 8)) for _ in range(7)], replicate=r) for r in range(3))
    found = gradscope.verdict(Record({"replicates": kind}, steps))
    assert found.claim.startswith("this model only")


def test_thresholds_are_the_callers() -> None:
    values = ends([-2.0, -2.1, -1.9])
    assert gradscope.verdict(values).word == "preserved"
    assert gradscope.verdict(values, threshold=1.5).word == "vanishing"
    with pytest.raises(ValueError, match="positive number of nats"):
        gradscope.verdict(values, threshold=-3)
    with pytest.raises(ValueError, match="confidence"):
        gradscope.verdict(values, confidence=95)


def test_few_layers_are_inconclusive_with_the_reason() -> None:
    found = gradscope.verdict(np.array([[1e-9, 1.0, 1.0]] * 3))
    assert found.word == "inconclusive"
    assert found.reason.startswith("Not enough layers: 2 have a value")


# -- five replicates and more ------------------------------------------------------------------------


def moderated(z: np.ndarray) -> tuple[float, float]:
    """The interval of Δ written out: replicates' variance, moderated by 2 degrees of the increments'."""
    replicates, layers = z.shape
    change = z.sum(1)
    centred = z - z.mean(0)
    line = centred - centred.sum(1, keepdims=True) / layers
    total = sum(
        float(line[:, i] @ line[:, j]) for i in range(layers) for j in range(layers) if abs(i - j) <= 1
    ) / (replicates - 1)
    expected = total * layers**2 / ((layers - 1) * (layers - 2))
    own = change.var(ddof=1)
    variance = (2 * expected + (replicates - 1) * own) / (replicates + 1)
    half = stats.t.ppf(0.975, replicates + 2) * math.sqrt(variance / replicates)
    return change.mean() - half, change.mean() + half


@pytest.mark.parametrize("replicates", [5, 8])
def test_increments_moderate_the_spread_of_five_replicates_and_more(replicates: int) -> None:
    z = np.random.default_rng(0).normal(0.0, 0.2, (replicates, 24))
    y = np.concatenate([np.zeros((replicates, 1)), np.cumsum(z, axis=1)], axis=1)
    found = gradscope.verdict(np.exp(y[:, ::-1]))
    assert (found.delta.low, found.delta.high) == pytest.approx(moderated(z))
    less = gradscope.verdict(np.exp(y[:4, ::-1]))
    student = stats.t.interval(0.95, 3, z[:4].sum(1).mean(), stats.sem(z[:4].sum(1)))
    assert (less.delta.low, less.delta.high) == pytest.approx(student)


def test_replicates_that_differ_as_a_whole_are_judged_by_their_own_spread() -> None:
    """Increments that all rise or fall together: their own variance would say far too little."""
    rng = np.random.default_rng(0)
    z = rng.normal(0.0, 0.02, (5, 24)) + np.asarray([-0.2, -0.1, 0.0, 0.1, 0.2])[:, None]
    y = np.concatenate([np.zeros((5, 1)), np.cumsum(z, axis=1)], axis=1)
    found = gradscope.verdict(np.exp(y[:, ::-1]))
    student = stats.t.interval(0.95, 4, z.sum(1).mean(), stats.sem(z.sum(1)))
    assert (found.delta.low, found.delta.high) == pytest.approx(student)


def test_one_layer_with_all_the_variance_leaves_students_interval() -> None:
    """What a single increment varies by is known no better from the increments than from the ends."""
    rng = np.random.default_rng(1)
    z = rng.normal(0.0, 0.01, (5, 24))
    z[:, 0] = rng.normal(0.0, 1.0, 5)
    y = np.concatenate([np.zeros((5, 1)), np.cumsum(z, axis=1)], axis=1)
    found = gradscope.verdict(np.exp(y[:, ::-1]))
    student = stats.t.interval(0.95, 4, z.sum(1).mean(), stats.sem(z.sum(1)))
    assert (found.delta.low, found.delta.high) == pytest.approx(student)


def test_an_activation_whose_square_leaves_float64_is_judged_by_its_amplitude() -> None:
    rng = np.random.default_rng(0)
    steps = tuple(
        stream_step(
            [rng.normal(size=(4, 8)) for _ in range(9)],
            [rng.normal(size=(4, 8)) * 10.0 ** (-25 * d) for d in range(9)],
            replicate=r,
        )
        for r in range(3)
    )
    found = gradscope.verdict(Record({"replicates": "initialisation"}, steps), "act_mean_square")
    assert found.word == "vanishing"
    assert found.delta.estimate == pytest.approx(-200 * math.log(10), abs=2)
    assert not found.curve.dropped()


def test_replicates_with_unequal_steps_are_averaged_and_it_is_said() -> None:
    rng = np.random.default_rng(0)
    entries = [(0, 0), (0, 1), (1, 0)]
    steps = tuple(
        stream_step([rng.normal(size=(4, 8)) for _ in range(9)], step=s, replicate=r) for s, r in entries
    )
    record = Record({"replicates": "initialisation"}, steps)
    fit = gradscope.fit_decay(record, step=[0, 1])
    assert any("replicates have 1 to 2 of these steps" in note for note in fit.notes)
    assert not any("of these steps" in note for note in gradscope.fit_decay(record, step=0).notes)
    for wrong in ("0", 0.0, True, [0, None]):
        with pytest.raises(TypeError, match="step= is a step's number, or several"):
            gradscope.verdict(record, step=wrong)


# -- zeros and infinities ----------------------------------------------------------------------------


def with_zeros(scale: float, zeros: int, dtype: str, **header: object) -> Record:
    """Three replicates whose gradient shrinks by `scale` nats per block and is 0 below `zeros`."""
    rng = np.random.default_rng(0)
    steps = []
    for r in range(3):
        tensors = []
        for depth in range(13):
            x = rng.normal(size=(4, 16)) * math.exp(-scale * (12 - depth))
            tensors.append(np.zeros((4, 16)) if depth < zeros else x)
        steps.append(stream_step(tensors, replicate=r))
    return Record({"replicates": "initialisation", "dtype": dtype, **header}, tuple(steps))


def test_an_underflow_is_vanishing_by_its_bound() -> None:
    """Elements below 2^-149 are 0 in float32: the flow is below √16·2^-149."""
    found = gradscope.verdict(with_zeros(11.0, 4, "float32"))
    assert (found.word, found.detail) == ("vanishing", "underflow")
    assert found.delta.estimate == -math.inf
    flows = [math.sqrt(16.0)] * 3
    assert found.delta.high == pytest.approx(
        -149 * math.log(2) + 0.5 * math.log(16) - np.log(flows[0]), abs=0.5
    )
    assert found.p_value == 0
    assert "floor of the dtype" in found.reason


def test_a_flushed_denormal_hides_more() -> None:
    kept = gradscope.verdict(with_zeros(11.0, 4, "float32")).delta.high
    flushed = gradscope.verdict(with_zeros(11.0, 4, "float32", flush_denormal=True)).delta.high
    assert flushed - kept == pytest.approx(23 * math.log(2))


def test_autocast_hides_what_float16_hides_although_outputs_are_float32() -> None:
    """A block that casts back to float32 may have lost its gradient at float16's floor, 2^-24."""
    plain = gradscope.verdict(with_zeros(0.0, 4, "float32")).delta.high
    hidden = gradscope.verdict(with_zeros(0.0, 4, "float32", autocast_dtype="float16")).delta.high
    assert hidden - plain == pytest.approx((149 - 24) * math.log(2))
    inside = with_zeros(0.0, 4, "float16", activation_dtype="float32")
    assert gradscope.verdict(inside).delta.high == pytest.approx(hidden)


def test_a_layer_that_passes_nothing_on_is_cut_and_no_underflow() -> None:
    found = gradscope.verdict(with_zeros(0.0, 4, "float32"))
    assert (found.word, found.detail) == ("vanishing", "cut")
    assert "passes nothing on" in found.reason


def test_a_zero_that_may_hide_enough_decides_nothing() -> None:
    """float16's floor is 6e-8: below a gradient of 1e-6 a zero says little."""
    record = with_zeros(0.0, 4, "float16")
    tiny = Record(
        record.header,
        tuple(
            stream_step(
                [np.zeros((4, 16)) if d < 4 else np.full((4, 16), 5e-7) for d in range(13)], replicate=r
            )
            for r in range(3)
        ),
    )
    found = gradscope.verdict(tiny)
    assert found.word == "inconclusive"
    assert "a zero hides up to" in found.reason
    assert (
        gradscope.verdict(np.where(np.arange(13) < 4, 0.0, 1.0)[None].repeat(2, 0)).word == "inconclusive"
    )


def test_an_overflow_is_exploding() -> None:
    values = np.exp(np.linspace(600, 0, 13))[None].repeat(3, 0)
    values[:, 0] = np.inf
    found = gradscope.verdict(values)
    assert (found.word, found.detail) == ("exploding", "overflow")
    values[0, 0] = 1e300
    assert gradscope.verdict(values).word == "inconclusive"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [1, 6, 12])
def test_a_broken_value_on_the_way_lets_nothing_be_said(bad: float, where: int) -> None:
    values = ends([-5.0, -5.1, -4.9], layers=12)
    values[1, where] = bad
    found = gradscope.verdict(values)
    assert found.word == "inconclusive"
    assert f"NaN or infinite at depth {where}" in found.reason
    assert str(found) == f"grad_l2: inconclusive. {found.reason}"


def test_an_absent_value_is_left_out_and_said() -> None:
    rng = np.random.default_rng(0)
    steps = tuple(
        stream_step([rng.normal(size=(4, 8)) * math.exp(0.5 * d) for d in range(13)], replicate=r)
        for r in range(3)
    )
    record = Record({"replicates": "initialisation"}, steps)
    shorter = gradscope.profile(record)
    assert gradscope.verdict(shorter).word == "vanishing"
    status, value = shorter.status.copy(), shorter.value.copy()
    status[1, 0], value[1, 0] = "not called", math.nan
    found = gradscope.verdict(dataclasses.replace(shorter, status=status, value=value))
    assert found.word == "vanishing"
    assert found.length == 11
    assert "left out: absent at depth 0" in str(found)


def test_trunks_are_judged_apart() -> None:
    """Two trunks in one Record: Holm's correction is over all of them, and neither hides the other."""
    rng = np.random.default_rng(0)
    steps = []
    for r in range(4):
        builder = Builder()
        for trunk, rate in (("encoder", 0.0), ("decoder", 0.8)):
            for depth in range(9):
                layer, kind = (trunk, "Stream") if depth == 0 else (f"{trunk}.{depth - 1}", "Block")
                x = rng.normal(size=(4, 8)) * math.exp(rate * depth)
                builder.module(depth, layer, "output_grad", moments(x), trunk=trunk, kind=kind)
        steps.append(builder.step(replicate=r))
    record = Record({"replicates": "initialisation"}, tuple(steps))
    found = gradscope.verdicts({"m": record}, "grad_l2")
    assert len(found) == 2
    assert {v.trunk: v.word for v in found} == {"encoder": "preserved", "decoder": "vanishing"}
    assert found["m", "grad_l2", "decoder"].comparisons == 2
    with pytest.raises(KeyError, match="one for each trunk"):
        found["m", "grad_l2"]
    with pytest.raises(gradscope.GradscopeError, match="Choose one"):
        gradscope.verdict(record)
    with pytest.raises(TypeError, match="takes a mapping"):
        gradscope.verdicts([record])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a Record, a Profile, or an array"):
        gradscope.verdict("run.jsonl")


class Tanh(nn.Module):
    """A plain tanh net deep enough for float32 to lose its gradient."""

    def __init__(self, depth: int, gain: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        for block in self.blocks:
            nn.init.normal_(block.weight, std=gain / 4)
            nn.init.zeros_(block.bias)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def test_a_real_net_underflows_in_float32_and_is_measured_in_float64() -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum()

    single = gradscope.measure(lambda: Tanh(60, 0.05), x, loss, 3)
    found = gradscope.verdict(single)
    assert (found.word, found.detail) == ("vanishing", "underflow")
    double = gradscope.verdict(gradscope.measure(lambda: Tanh(60, 0.05), x, loss, 3, dtype=torch.float64))
    assert (double.word, double.detail) == ("vanishing", "")
    assert double.delta.estimate < found.delta.high  # the bound held
    assert double.fit.family == "exponential"


# -- several at once ---------------------------------------------------------------------------------


def test_holm_corrects_over_models_and_quantities() -> None:
    """Against Holm's definition, spelled out: the k-th smallest p-value times (m − k + 1), monotone."""
    rng = np.random.default_rng(4)
    sources = {f"m{i}": ends(list(-3.6 - 0.25 * i + 0.35 * rng.normal(size=4))) for i in range(5)}
    found = gradscope.verdicts(sources, ["grad_l2"])
    p = np.array([gradscope.verdict(values).p_value for values in sources.values()])
    order = np.argsort(p)
    adjusted = np.empty(5)
    for rank, i in enumerate(order):
        adjusted[i] = max((5 - k) * p[order[k]] for k in range(rank + 1))
    assert [v.adjusted_p_value for v in found] == pytest.approx(np.minimum(adjusted, 1).tolist())
    words = [v.word for v in found]
    alone = [gradscope.verdict(values).word for values in sources.values()]
    assert words == [w if a <= 0.025 else "inconclusive" for w, a in zip(alone, adjusted, strict=True)]
    assert words != alone  # the correction has something to do here
    assert (
        "not among 5 comparisons"
        in next(v for v, w in zip(found, alone, strict=True) if v.word != w).reason
    )
    assert len(str(found).splitlines()) == 6


def test_forward_and_backward_are_separate() -> None:
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1], tokens[:, 1:]
    records = {
        variant: gradscope.measure(
            lambda variant=variant: reference.Transformer(variant, depth=12, width=32),
            batch,
            reference.next_token_loss,
            3,
            dtype=torch.float64,
        )
        for variant in ("no_skip", "pre_norm")
    }
    found = gradscope.verdicts(records)
    assert found["no_skip", "grad_l2"].word == "vanishing"
    assert found["pre_norm", "grad_l2"].word == "preserved"
    assert found["pre_norm", "act_mean_square"].word == "preserved"
    assert {v.comparisons for v in found} == {4}
    assert not found["pre_norm", "grad_l2"].forward
    assert found["pre_norm", "act_mean_square"].forward
    with pytest.raises(KeyError):
        found["post_norm", "grad_l2"]


def test_what_is_no_signal_has_no_verdict() -> None:
    with pytest.raises(gradscope.GradscopeError, match="'kurtosis' is no signal"):
        gradscope.verdict(ends([1.0, 1.1]), "kurtosis")
    with pytest.raises(gradscope.GradscopeError, match="alternate"):
        gradscope.verdict(ends([1.0, 1.1]), "branch_grad_l2")


def test_a_zero_where_the_pass_starts_lets_nothing_be_said() -> None:
    values = ends([-5.0, -5.1, -4.9])
    values[:, -1] = 0
    found = gradscope.verdict(values)
    assert found.word == "inconclusive"
    assert "where the pass starts" in str(found)


def test_an_array_is_judged_once() -> None:
    assert [v.quantity for v in gradscope.verdicts({"a": ends([-5.0, -5.1, -4.9])})] == ["grad_l2"]
    with pytest.raises(ValueError, match="positive number of nats"):
        gradscope.verdicts({"a": ends([1.0, 1.1])}, threshold=-3)


def test_verdicts_from_bounds_can_be_printed() -> None:
    found = gradscope.verdict(with_zeros(11.0, 4, "float32"))
    assert found.depth_ratio == math.inf
    assert "vanishing (underflow)" in str(found)
    values = np.exp(np.linspace(600, 0, 13))[None].repeat(3, 0)
    values[:, 0] = np.inf
    assert "exploding (overflow)" in str(gradscope.verdict(values))


def test_what_would_settle_it_is_said_by_the_kind_of_replicate() -> None:
    rng = np.random.default_rng(1)
    wide = np.exp(rng.normal(0, 1.5, (3, 9)).cumsum(1))
    several = gradscope.verdict(flat_record(wide))
    assert several.word == "inconclusive" and "Measure 5 or more replicates" in several.reason
    # A watched run cannot be repeated by asking for more replicates of it.
    run = flat_record(wide[:1], header={"replicates": "run"})
    assert "A run is one replicate; gradscope.measure(..., replicates=5)" in gradscope.verdict(run).reason
