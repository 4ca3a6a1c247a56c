"""Rules on the profile over depth, against chains with a closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import synthetic
import torch
from planted import TEXT, Chain, gained, measured, one_gain, only, orthogonal, read, reasons, transformer
from synthetic import Builder, flat_record
from torch import Tensor, nn

import gradscope
from gradscope.analysis.diagnosis import Diagnosis, diagnose
from gradscope.record import Record, Step
from gradscope.reference import next_token_loss


@pytest.mark.parametrize(
    ("gain", "names"),
    [
        (0.5, {"vanishing", "forward_vanishing"}),
        (2.0, {"exploding", "forward_exploding"}),
        (1.0, set()),
    ],
)
def test_vanishing_and_exploding_in_closed_form(gain: float, names: set[str]) -> None:
    diagnosis = gained(gain)
    found = {f.rule: f for f in diagnosis.findings if f.rule.endswith(("vanishing", "exploding"))}
    assert set(found) == names
    for name, finding in found.items():
        assert finding.value == pytest.approx(8 * math.log(gain), rel=1e-4)
        assert finding.layers == (("blocks.7",) if name.startswith("forward") else ("input of blocks.0",))
        assert abs(finding.threshold) == 3.0


def test_vanishing_without_skips() -> None:
    diagnosis = read(transformer("no_skip"))
    assert only(diagnosis, "vanishing").severity == "critical"
    healthy = read(transformer("skip"))
    assert not healthy.of("vanishing")


def test_inconclusive_is_no_finding_but_said() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 1.5, (3, 9)).cumsum(1))
    record = flat_record(norms)
    found = gradscope.verdict(record)
    assert found.word == "inconclusive" and found.delta.low < -3 and found.delta.high > 3
    diagnosis = diagnose(record)
    assert not diagnosis.of("vanishing") and not diagnosis.of("exploding")
    for name in ("vanishing", "exploding"):
        assert "inconclusive, Δ = " in reasons(diagnosis, name)
    # Between vanishing and preserved: that it does not explode is known.
    falls = np.exp(np.outer([2.5, 3.0, 3.5], np.linspace(0, 1, 9)))
    diagnosis = diagnose(flat_record(falls))
    assert "inconclusive" in reasons(diagnosis, "vanishing")
    assert not reasons(diagnosis, "exploding") and not diagnosis.of("exploding")


@pytest.mark.parametrize("gain", [20.0, 1 / 20])
def test_one_layer_off_names_it(gain: float) -> None:
    found = only(one_gain(gain), "one_layer_off")
    assert found.layers == ("blocks.5",)
    assert found.value == pytest.approx(math.log(gain / 0.9), rel=1e-4)
    # Gradient and activation are off in the same block: one finding.
    assert "the gradient" in found.message and "the activation" in found.message


def test_one_layer_off_explains_the_explosion() -> None:
    diagnosis = diagnose(
        measured(lambda: Chain(*(orthogonal(90.0 if k == 5 else 1.0) for k in range(10))))
    )
    exploding = diagnosis.of("exploding") + diagnosis.of("forward_exploding")
    for finding in exploding:
        assert finding.because_of is not None
        assert diagnosis.findings[finding.because_of].rule == "one_layer_off"


# -- the first block -------------------------------------------------------------------------------


def small_embedding(scale: float) -> Callable[[], nn.Module]:
    """A pre-norm transformer whose embedding is drawn that much smaller than its blocks' outputs."""

    def make() -> nn.Module:
        model = transformer("pre_norm", 8)()
        with torch.no_grad():
            for parameter in model.embed.parameters():
                parameter.mul_(scale)
        return model

    return make


def test_a_small_embedding_before_a_norm_is_the_first_blocks_affair() -> None:
    record = gradscope.measure(small_embedding(3e-3), TEXT, next_token_loss, 3)
    # The verdict over all of the trunk is what its definition says, and says where it is from.
    gradient = gradscope.profile(record).value
    first = np.log(gradient[:, 0] / gradient[:, 1])
    rest = np.log(gradient[:, 1] / gradient[:, -1])
    assert first.min() > 3 and abs(rest).max() < 2
    found = gradscope.verdict(record)
    assert found.word == "exploding"
    others = found.without_first_block
    assert others is not None and others.word == "preserved"
    assert others.delta.estimate == pytest.approx(rest.mean(), rel=1e-9)
    assert "it is the first block that does this" in str(found)
    # The diagnosis names the block, as a note: such models are in use and train.
    diagnosis = diagnose(record)
    assert diagnosis.healthy
    assert not diagnosis.of("exploding") and not diagnosis.of("forward_exploding")
    note = only(diagnosis, "one_layer_off")
    assert note.layers == ("blocks.0",) and note.severity == "note"
    assert f"by {np.exp(first.mean()):.3g}" in note.message
    assert "smaller than what the block puts out" in note.cause and "2312.16903" in note.remedy
    assert not read(small_embedding(1.0)).of("one_layer_off")


class Amplified(nn.Module):
    """Multiplies activations by the gain and gradients by the gain times the factor."""

    def __init__(self, gain: float, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = orthogonal(gain), factor

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.factor * y - (self.factor - 1) * y.detach()


@pytest.mark.parametrize("gain", [1.0, 3.0, 1 / 90])
def test_a_first_block_whose_gradient_alone_jumps_is_a_warning(gain: float) -> None:
    def make() -> nn.Module:
        return Chain(*(Amplified(gain, 90 / gain) if k == 0 else orthogonal() for k in range(8)))

    diagnosis = diagnose(measured(make))
    found = only(diagnosis, "one_layer_off")
    assert found.severity == "warning" and found.layers == ("blocks.0",)
    assert found.value == pytest.approx(math.log(90), rel=1e-4)
    assert "weights or code" in found.cause
    assert not diagnosis.of("exploding")


@pytest.mark.parametrize("gain", [2.0, 0.5])
def test_a_trend_that_all_blocks_share_is_not_the_first_blocks(gain: float) -> None:
    found = gradscope.verdict(measured(lambda: Chain(*(orthogonal(gain) for _ in range(8)))))
    assert found.word in ("exploding", "vanishing") and found.without_first_block is None
    # Nor where the first block only tips the scale: 7 · .42 = 2.94 of 3.36 nats are the others'.
    edge = measured(lambda: Chain(*(orthogonal(math.exp(0.42)) for _ in range(8))))
    assert gradscope.verdict(edge).word == "exploding"
    assert gradscope.verdict(edge).without_first_block is None
    assert diagnose(edge).of("exploding")


def run_with_first_jump(nats: Callable[[int], float]) -> Diagnosis:
    """Three runs over eight even blocks whose first one multiplies both signals by e^nats."""
    steps: list[Step] = []
    for i, run in itertools.product(range(24), range(3)):
        b = Builder()
        for depth in range(9):
            layer, kind = synthetic.name(depth)
            for signal, low in (("output_grad", depth > 0), ("activation", depth == 0)):
                l2 = math.exp(-nats(i) if low else 0.0)
                b.module(depth, layer, signal, {"l2": l2, "count": 32.0, "tokens": 4.0}, kind=kind)
        steps.append(b.step(i, run))
    return diagnose(Record({"replicates": "run", "dtype": "float32"}, tuple(steps)))


def test_a_first_block_that_goes_astray_in_training_is_a_warning() -> None:
    always = only(run_with_first_jump(lambda i: 4.0), "one_layer_off")
    assert always.severity == "note" and always.value == pytest.approx(4.0)
    later = only(run_with_first_jump(lambda i: 4.0 if i > 5 else 0.0), "one_layer_off")
    assert later.severity == "warning" and "not so at the first recorded step" in later.cause
    # A jump that drifts over the threshold is not astray.
    assert only(run_with_first_jump(lambda i: 2.9 + 0.02 * i), "one_layer_off").severity == "note"
    assert not run_with_first_jump(lambda i: 2.0).of("one_layer_off")
