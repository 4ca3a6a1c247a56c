"""The headline, measured: what the skips do to the gradient of one and the same transformer.

Every nn.Linear at torch's default initialisation, separate query, key and value projections, d = 64,
float64, five seeds. Without skips and norms the gradient loses at least one nat per block; with them
(pre-norm) it changes by at most a tenth.
"""

from __future__ import annotations

import functools

import pytest
import torch

import gradscope
from gradscope import reference

DEPTHS = (6, 12, 24, 48)
SEEDS = 5


@functools.cache
def mean_increment(variant: str, depth: int) -> tuple[float, float]:
    """The 95 % t-interval over seeds of the mean increment, in nats per block."""
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    record = gradscope.measure(
        lambda: reference.Transformer(variant, depth=depth, width=64, initialization="torch"),
        (tokens[:, :-1], tokens[:, 1:]),
        reference.next_token_loss,
        replicates=SEEDS,
        dtype=torch.float64,
        statistics=[],
    )
    profile = gradscope.profile(record)
    assert profile.kind == "initialisation"
    assert profile.depth.tolist() == list(range(depth + 1))
    assert profile.ok.all()
    interval = profile.mean_increment()
    assert interval.count == SEEDS
    return interval.low, interval.high


def contrast(without: str, with_: str, depth: int) -> None:
    """The gradient vanishes in the first variant and flows in the second, intervals included."""
    low, high = mean_increment(without, depth)
    assert high <= -1, f"{without}, {depth} blocks: {low:.3f} to {high:.3f} nats per block"
    low, high = mean_increment(with_, depth)
    assert -0.1 <= low <= high <= 0.1, f"{with_}, {depth} blocks: {low:.3f} to {high:.3f} nats per block"


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_gradient_vanishes_without_skips_and_flows_with_them(depth: int) -> None:
    contrast("no_skip", "pre_norm", depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_two_variants_swapped_turn_it_red(depth: int) -> None:
    with pytest.raises(AssertionError, match=r"pre_norm, .* nats per block"):
        contrast("pre_norm", "no_skip", depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_each_half_of_the_contrast_can_fail(depth: int) -> None:
    with pytest.raises(AssertionError, match="pre_norm"):
        contrast("pre_norm", "pre_norm", depth)
    with pytest.raises(AssertionError, match="no_skip"):
        contrast("no_skip", "no_skip", depth)


def test_the_two_differ_in_nothing_but_skips_and_norms() -> None:
    models = []
    for variant in ("no_skip", "pre_norm"):
        torch.manual_seed(0)
        models.append(reference.Transformer(variant, depth=2, width=64))
    weights = [{n: p for n, p in m.named_parameters() if "norm" not in n} for m in models]

    def function_names(names: object) -> list[str]:
        return list(names)  # type: ignore[call-overload]

    assert function_names(weights[0]) == function_names(weights[1])
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    linears = [m for m in models[0].modules() if isinstance(m, torch.nn.Linear)]
    bound = 1 / 8  # 1/sqrt(64): torch's default, for every projection that reads the stream
    assert all(m.weight.abs().max() <= 1 / m.in_features**0.5 for m in linears)
    assert max(m.weight.abs().max() for m in linears if m.in_features == 64) > 0.99 * bound
