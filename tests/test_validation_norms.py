"""Where the norm stands: post-norm, pre-norm and DeepNorm, through the public interface.

As in `test_validation_linear`: each test states its formula; seeds are fixed.
"""

from __future__ import annotations

import doctest
import importlib
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from chains import Chain, Gaussian, ReluBranch, fresh_probe, inputs, standard_error
from torch import Tensor, nn
from torch.nn.functional import layer_norm

import gradscope
from gradscope import reference

# -- post-norm ---------------------------------------------------------------------------------------

WIDTH, DEPTH = 256, 16


class PostNorm(nn.Module):
    """LN(x + V relu(W x)), W, V ~ N(0, 1/n)."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = ReluBranch(WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.sum(x))


class PostNormDetached(nn.Module):
    """LN(x + W x), W ~ N(0, v/n), where the backward pass does not see the branch."""

    def __init__(self, variance: float) -> None:
        super().__init__()
        self.branch = Gaussian(WIDTH, variance)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.branch(x).detach())


def _normalised(batch: int) -> Tensor:
    """As every block but the first gets them."""
    return layer_norm(inputs(batch, WIDTH), (WIDTH,))


def test_post_norm_of_feed_forward_branches_is_flat() -> None:
    """The norm divides by what the branch multiplied: energy · 3/2 · 1/(3/2) per block.

    Post-norm does not vanish by itself. The sum in front of the norm has variance 1 + ½ (Xiong et al.
    2020, arXiv:2002.04745), or 1 + ½(n − 1)/n with the biased variance over n features.
    """
    record = gradscope.measure(
        lambda: Chain(PostNorm, DEPTH),
        _normalised(8),
        fresh_probe,
        16,
        dtype=torch.float64,
        layers=["blocks.*", "blocks.*.sum"],
        statistics=["token_variance"],
    )
    profile = gradscope.profile(record)
    assert profile.depth.tolist() == list(range(DEPTH + 1))
    increment = profile.mean_increment()
    assert -0.02 < increment.low < increment.estimate < increment.high < 0.02

    sums = record.table(signal="activation", statistic="token_variance", type="ReluBranch")
    assert len(sums["value"]) == 16 * DEPTH
    before = np.array([sums["value"][sums["replicate"] == r].mean() for r in range(16)])
    assert standard_error(before) < 0.02 * 1.5
    assert abs(before.mean() - (1 + 0.5 * (WIDTH - 1) / WIDTH)) <= 3 * standard_error(before)
    assert before.mean() == pytest.approx(1.5, rel=0.02)
    # And the norm returns it to 1, up to its own 1e-5: the stream is what it says it is.
    stream = gradscope.profile(record, "act_var").value
    assert stream == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("variance", [0.1, 0.5, 2.0])
def test_post_norm_decays_by_the_variance_that_does_not_come_back(variance: float) -> None:
    """r = −½ ln(1 + v); at v = ½ it is the (2/3)^((L−l)/2) of Xiong et al. 2020 (arXiv:2002.04745)."""
    record = gradscope.measure(
        lambda: Chain(lambda: PostNormDetached(variance), DEPTH),
        _normalised(16),
        fresh_probe,
        32,
        dtype=torch.float64,
        layers="blocks.*",
        statistics=[],
    )
    profile = gradscope.profile(record)
    expected = -0.5 * math.log(1 + variance)
    samples = profile.mean_increment_per_replicate
    assert standard_error(samples) < 0.005 / 3
    assert samples.mean() == pytest.approx(expected, abs=0.005)
    if variance == 0.5:
        assert expected == pytest.approx(-0.2027, abs=5e-5)
        level = np.log(profile.value / profile.value[:, -1:]).mean(0)  # ln of g_l/g_L
        back = DEPTH - np.arange(DEPTH + 1)
        assert level == pytest.approx(back / 2 * math.log(2 / 3), abs=0.005 * DEPTH)
    # The detached weights have no gradient, and not a gradient of 0.
    rows = record.table(signal="param_grad", statistic="l2", layer="blocks.3.branch.weight")
    assert set(rows["status"]) == {"no gradient path"}


# -- the last layer's gradient over depth ------------------------------------------------------------

DEPTHS = (4, 8, 16, 32)


def _uniform_attention(variant: str, depth: int) -> reference.Transformer:
    """The paper's setting: W_Q = W_K = 0, Xavier, ReLU, hidden width d, an input of unit variance."""
    model = reference.Transformer(
        variant,
        depth=depth,
        width=64,
        heads=1,
        feed_forward_ratio=1,
        activation="relu",
        initialization="xavier",
    )
    with torch.no_grad():
        for table in (model.embed.tokens, model.embed.positions):
            table.weight.mul_(math.sqrt(0.5))
        for block in model.blocks:
            attention = block.attention.branch.function
            attention.query.weight.zero_()
            attention.key.weight.zero_()
    return model


def _last_second_matrix(variant: str, replicates: int) -> np.ndarray:
    """ln ‖∂loss/∂W²_L‖_F, [depths, replicates]: the last feed-forward network's second matrix."""
    tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(5))
    batch = tokens[:, :-1], tokens[:, 1:]
    levels: list[np.ndarray] = []
    for depth in DEPTHS:
        record = gradscope.measure(
            lambda depth=depth: _uniform_attention(variant, depth),
            batch,
            reference.next_token_loss,
            replicates,
            statistics=[],
        )
        name = f"blocks.{depth - 1}.feed_forward.branch.function.contract.weight"
        rows = record.table(signal="param_grad", statistic="l2", layer=name)
        assert rows["replicate"].tolist() == list(range(replicates))
        assert set(rows["status"]) == {"ok"}
        assert set(rows["depth"]) == {float(depth)}
        levels.append(np.log(rows["value"]))
    return np.array(levels)


def _slopes(x: Sequence[float], y: np.ndarray) -> np.ndarray:
    """Slope of each column of y over x, by least squares."""
    centred = np.asarray(x) - np.mean(x)
    return centred @ y / (centred @ centred)


@pytest.mark.parametrize(("variant", "expected"), [("post_norm", 0.0), ("pre_norm", -0.5)])
def test_the_last_layers_gradient_over_depth(variant: str, expected: float) -> None:
    """‖∇W²_L‖ is O(d√ln d) in post-norm and O(d√(ln d/L)) in pre-norm.

    Theorem 1 of Xiong et al. 2020 (arXiv:2002.04745): slopes 0 and −½ over ln L. Pre-norm owes its to
    the final norm, which divides by the standard deviation √(1 + O(L)) of the stream.
    """
    slopes = _slopes(np.log(DEPTHS), _last_second_matrix(variant, replicates=16))
    assert standard_error(slopes) < 0.1 / 4
    assert slopes.mean() == pytest.approx(expected, abs=0.1)


# -- DeepNorm ----------------------------------------------------------------------------------------

#: Wang et al. 2022 (arXiv:2203.00555), N-layer decoder-only: N, α and β.
DEEPNORM = [(12, 2.2134, 0.3195), (100, 3.7606, 0.1880)]
SCALED = ("value.weight", "output.weight", "expand.weight", "contract.weight")


@pytest.mark.parametrize(("blocks", "alpha", "beta"), DEEPNORM)
def test_deepnorm_constants_are_those_of_the_paper(blocks: int, alpha: float, beta: float) -> None:
    assert reference.deepnorm_constants(blocks) == pytest.approx((alpha, beta), abs=1e-4)


def test_the_examples_in_the_docstrings_of_the_variants() -> None:
    found = doctest.testmod(importlib.import_module("gradscope.reference.variants"))
    assert found.failed == 0
    assert found.attempted == 1


def _decoder(variant: str, blocks: int) -> reference.Transformer:
    return reference.Transformer(variant, depth=blocks, width=16, heads=2, vocabulary=11, context=8)


@pytest.mark.parametrize(("blocks", "alpha", "beta"), DEEPNORM)
def test_a_deepnorm_decoder_carries_its_constants(blocks: int, alpha: float, beta: float) -> None:
    """β on the weights, by the Record of both twins; α on the skip, by what enters the norm."""
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = tokens[:, :-1], tokens[:, 1:]
    norms: dict[str, dict[str, float]] = {}
    for variant in ("deepnorm", "post_norm"):
        record = gradscope.measure(
            lambda variant=variant: _decoder(variant, blocks),
            batch,
            reference.next_token_loss,
            1,
            dtype=torch.float64,
            statistics=[],
        )
        rows = record.table(signal="weight", statistic="l2")
        norms[variant] = dict(zip(rows["layer"], rows["value"], strict=True))
    scaled = [name for name in norms["deepnorm"] if name.endswith(SCALED)]
    assert len(scaled) == 4 * blocks
    for name, value in norms["deepnorm"].items():
        factor = beta if name in scaled else 1
        tolerance = 1e-4 if name in scaled else 0
        twin = norms["post_norm"][name]
        assert value == pytest.approx(factor * twin, abs=tolerance * twin), name

    model = _decoder("deepnorm", blocks).double()
    into_norm: dict[nn.Module, Tensor] = {}
    seen: list[float] = []

    def enter(norm: nn.Module, args: tuple[Tensor]) -> None:
        into_norm[norm] = args[0]

    def leave(sublayer: reference.Sublayer, args: tuple[Tensor], _: Tensor) -> None:
        (x,) = args
        skipped = into_norm[sublayer.norm] - sublayer.branch(x)
        seen.append(((skipped * x).sum() / (x * x).sum()).item())
        torch.testing.assert_close(skipped, seen[-1] * x)

    for sublayer in (s for block in model.blocks for s in (block.attention, block.feed_forward)):
        sublayer.norm.register_forward_pre_hook(enter)
        sublayer.register_forward_hook(leave)
    with torch.no_grad():
        model(batch[0])
    assert seen == pytest.approx([alpha] * (2 * blocks), abs=1e-4)
