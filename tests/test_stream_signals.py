"""What the norm does not show: directions, contributions, tokens and samples along the stream."""

from __future__ import annotations

import itertools
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from small_models import Block, Stack, batch, no_faults, sgd, square_loss, stack, status, value
from synthetic import Builder
from torch import Tensor, nn

import gradscope
from gradscope import statistics
from gradscope.analysis import history
from gradscope.collect.recorder import Recorder
from gradscope.record import STATISTICS, Record
from gradscope.statistics import ACTIVATION, GRADIENT

__all__ = ["no_faults"]

pytestmark = pytest.mark.usefixtures("both_ways")

LAST = "not supported: the last position has no next"
seeds = st.integers(0, 2**31 - 1)


def slow(x: Tensor, name: str, columns: tuple[str, ...] = ACTIVATION, **options: Any) -> float | str:
    values, absent = statistics.measure(x, columns, slow=True, stream=True, **options)
    i = columns.index(name)
    return absent.get(i, float(values[i]))


def floats(found: dict[str, Any]) -> dict[str, float]:
    return {name: float(number) for name, number in found.items()}


# -- kernels against loops ---------------------------------------------------------------------------


@given(seeds, st.floats(-150, 150), st.booleans(), st.sampled_from([-1, 1]))
def test_pairs_equal_loops_over_tokens(seed: int, exponent: float, masked: bool, axis: int) -> None:
    rng = np.random.default_rng(seed)
    h, following = rng.standard_normal((2, 3, 4, 5)) + rng.choice([0.0, 3.0])
    following = following * 10.0**exponent
    valid = rng.random((3, 4)) < 0.7 if masked and axis == -1 else None
    if valid is not None and not valid.any():
        return
    options: dict[str, Any] = {"feature_axis": axis, "valid": None}
    if valid is not None:
        options["valid"] = torch.tensor(valid)
        h[~valid], following[~valid] = math.nan, 0.0  # padding is nobody's business
    at = [reference.positions(x, axis, valid) for x in (h, following)]
    tensors = [torch.tensor(x) for x in (h, following)]
    found = floats(statistics.measure_pair(*tensors, STATISTICS, **options))
    expected = reference.pair(*at)
    assert found.keys() == expected.keys()
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, rel=1e-11, abs=1e-12), name
    found = floats(statistics.measure_branch(*tensors, STATISTICS, **options))
    expected = reference.contribution(*at)
    assert found.keys() == expected.keys()
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, rel=1e-11, abs=1e-12), name


@given(seeds, st.integers(1, 4), st.integers(2, 5), st.booleans(), st.booleans())
def test_tokens_and_samples_equal_loops(
    seed: int, size: int, tokens: int, masked: bool, turned: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, tokens, 3)) + rng.choice([0.0, 3.0])
    valid = rng.random((size, tokens)) < 0.7 if masked else np.ones((size, tokens), bool)
    if not valid.any():
        return
    options: dict[str, Any] = {"valid": torch.tensor(valid) if masked else None}
    given_x = torch.tensor(np.where(valid[..., None], x, 7.0))
    if turned:
        given_x, options["token_axis"] = given_x.transpose(0, 1), 0
    sequences = [s[v] for s, v in zip(x, valid, strict=True)]
    scale = reference.l2(np.concatenate(sequences))
    found = slow(given_x, "token_centred_l2", **options)
    assert found == pytest.approx(reference.token_centred_l2(sequences), rel=1e-12, abs=1e-14 * scale)
    found = slow(given_x, "sample_dot", GRADIENT, **options)
    if size == 1:
        assert found == "not supported: one sample"
    else:
        samples = list(np.where(valid[..., None], x, 0.0))
        assert found == pytest.approx(reference.sample_dot(samples), rel=1e-11, abs=1e-12 * scale**2)


def test_what_has_no_tokens_or_samples_says_so() -> None:
    assert slow(torch.ones(2, 3), "token_centred_l2") == "not supported: no token axis"
    assert slow(torch.ones(2, 1, 3), "token_centred_l2") == "not supported: one token"
    assert slow(torch.ones(2, 3, 4), "token_centred_l2", feature_axis=1) == "not supported: no token axis"
    flat = {"valid": torch.tensor([[True, False], [True, True]])}
    said = slow(torch.ones(4, 3), "sample_dot", GRADIENT, **flat)
    assert said == "not supported: samples and tokens in one axis"
    assert slow(torch.ones(2, 3), "sample_dot", GRADIENT) == pytest.approx(6.0)
    assert slow(torch.zeros(2, 3), "sample_dot", GRADIENT) == 0.0


# -- closed forms ------------------------------------------------------------------------------------


def rotated(x: Tensor, angle: float) -> Tensor:
    """Pairs of features turned by an angle."""
    a, b = x[..., ::2], x[..., 1::2]
    turned = torch.empty_like(x)
    turned[..., ::2] = math.cos(angle) * a - math.sin(angle) * b
    turned[..., 1::2] = math.sin(angle) * a + math.cos(angle) * b
    return turned


@pytest.mark.parametrize("angle", [1e-7, 1e-3, 0.5, math.pi / 2, 3.0])
def test_a_rotation_has_its_angle(angle: float) -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 3, 8, dtype=torch.float64)
    found = floats(statistics.measure_pair(h, 5 * rotated(h, angle), STATISTICS))
    assert found["angle_next"] == pytest.approx(angle, rel=1e-8)
    assert found["cosine_next"] == pytest.approx(math.cos(angle), abs=1e-15)
    # F = R h - h has length 2 sin(angle/2), and stands at angle/2 + pi/2 to h.
    found = floats(statistics.measure_pair(h, rotated(h, angle), STATISTICS))
    assert found["relative_contribution"] == pytest.approx(2 * math.sin(angle / 2), rel=1e-8)
    assert found["residual_cosine"] == pytest.approx(-math.sin(angle / 2), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 3.0, -2.0])
def test_the_angle_of_parallel_tokens_is_a_number(factor: float, dtype: torch.dtype) -> None:
    """Where rounding takes a cosine past 1, arccos is NaN."""
    torch.manual_seed(0)
    h = torch.randn(50, 20, 7).to(dtype)
    found = floats(statistics.measure_pair(h, factor * h, STATISTICS))
    assert found["angle_next"] == pytest.approx(0.0 if factor > 0 else math.pi, abs=2e-2)
    assert found["cosine_next"] == pytest.approx(math.copysign(1.0, factor), abs=1e-4)
    assert abs(found["cosine_next"]) <= 1 + 1e-12
    assert found["relative_contribution"] == pytest.approx(abs(factor - 1), rel=1e-2, abs=1e-12)


def test_the_gradients_of_samples_that_pull_alike_or_apart() -> None:
    one = torch.randn(1, 4, 3, dtype=torch.float64)
    alike, opposed = torch.cat([one, one, one]), torch.cat([one, -one])
    square = float(one.square().sum())
    assert slow(alike, "sample_dot", GRADIENT) == pytest.approx(3 * square)
    assert slow(opposed, "sample_dot", GRADIENT) == pytest.approx(-2 * square)
    apart = torch.eye(4, dtype=torch.float64)
    assert slow(apart, "sample_dot", GRADIENT) == pytest.approx(0.0, abs=1e-15)


def test_quantities_are_those_of_the_definitions() -> None:
    b = Builder()
    for depth, layer in ((0.0, "h"), (1.0, "h.0")):
        activation = {
            "l2": 4.0,
            "count": 8.0,
            "cosine_next": 0.75 if depth == 0 else LAST,
            "angle_next": math.pi / 3 if depth == 0 else LAST,
            "relative_contribution": 0.5 if depth == 0 else LAST,
            "residual_cosine": -0.25 if depth == 0 else LAST,
            "token_centred_l2": 1.0,
            "unit_skip": 1.0,
        }
        b.module(depth, layer, "activation", activation, kind="Stream" if depth == 0 else "Block")
        b.module(depth, layer, "output_grad", {"l2": 2.0, "count": 8.0, "sample_dot": 1.0})
    b.module(0.5, "h.0.attn", "activation", {"relative_contribution": 0.3, "residual_cosine": 0.1})
    record = Record({}, (b.step(),))
    expected = {
        "block_influence": 0.25,
        "angular_distance": 1 / 3,
        "relative_contribution": 0.5,
        "residual_cosine": -0.25,
        "rank_residual": 0.25,
        "gradient_correlation": 0.25,
        "branch_contribution": 0.3,
        "branch_cosine": 0.1,
    }
    for name, number in expected.items():
        assert history(record, name).value[0, 0] == pytest.approx(number, rel=1e-15), name


def test_tiny_and_zero_gradients_have_no_made_up_correlation() -> None:
    def record(l2: float, dot: float) -> Record:
        b = Builder()
        for depth, layer in ((0.0, "h"), (1.0, "h.0")):
            b.module(depth, layer, "output_grad", {"l2": l2, "count": 8.0, "sample_dot": dot})
            b.module(depth, layer, "activation", {"unit_skip": 1.0})
        return Record({}, (b.step(),))

    assert history(record(0.0, 0.0), "gradient_correlation").status[0, 0] == "zero gradient"
    assert history(record(1e-160, 0.0), "gradient_correlation").status[0, 0] == "underflow"


# -- through watch and measure -----------------------------------------------------------------------


def stream_of(model: nn.Module, x: Any, blocks: list[nn.Module]) -> list[np.ndarray]:
    """h_0 .. h_L by hooks of the test's own."""
    found: list[np.ndarray] = []
    handles = [
        blocks[0].register_forward_pre_hook(lambda m, args: found.append(args[0].detach().numpy())),
        *(b.register_forward_hook(lambda m, a, out: found.append(out.detach().numpy())) for b in blocks),
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def test_quantities_of_a_measured_model_equal_loops_over_its_stream() -> None:
    torch.manual_seed(0)
    model = gradscope.reference.Transformer(
        "pre_norm", depth=3, width=8, heads=2, vocabulary=11, context=5
    ).double()
    tokens = torch.randint(11, (4, 5))
    stream = stream_of(model, tokens, list(model.blocks))
    flat = [reference.positions(h) for h in stream]
    record = gradscope.measure(model, (tokens, tokens), gradscope.reference.next_token_loss)
    expected = {
        "block_influence": [
            1 - np.mean([reference.cosine(a, b) for a, b in zip(h, n, strict=True)])
            for h, n in itertools.pairwise(flat)
        ],
        "angular_distance": [
            np.mean([math.acos(reference.cosine(a, b)) / math.pi for a, b in zip(h, n, strict=True)])
            for h, n in itertools.pairwise(flat)
        ],
        "relative_contribution": [
            np.mean([np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(h, n, strict=True)])
            for h, n in itertools.pairwise(flat)
        ],
        "residual_cosine": [
            np.mean([reference.cosine(b - a, a) for a, b in zip(h, n, strict=True)])
            for h, n in itertools.pairwise(flat)
        ],
        "rank_residual": [
            np.linalg.norm(h - h.mean(1, keepdims=True)) / np.linalg.norm(h) for h in stream
        ],
    }
    for name, numbers in expected.items():
        found = history(record, name)
        np.testing.assert_allclose(found.value[0], numbers, rtol=1e-9, err_msg=name)
    assert history(record, "branch_contribution").depth.tolist() == [0.5, 1, 1.5, 2, 2.5, 3]


def test_gradient_correlation_is_that_of_the_samples_own_losses() -> None:
    model = stack()
    x = batch(size=5)
    gradients: list[list[np.ndarray]] = []
    for sample in x:
        kept: list[Tensor] = []
        handle = model.blocks[1].register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        loss = square_loss(model, sample[None])
        handle.remove()
        gradients.append([g.numpy() for g in torch.autograd.grad(loss, kept)])
    samples = [g[0].ravel() for g in gradients]
    pairs = [a @ b for i, a in enumerate(samples) for j, b in enumerate(samples) if i != j]
    expected = np.mean(pairs) / np.mean([a @ a for a in samples])
    record = gradscope.measure(model, x, square_loss)
    assert history(record, "gradient_correlation").value[0, 2] == pytest.approx(expected, rel=1e-10)


def test_contributions_are_absent_without_a_proven_unit_skip() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 5))
    for variant in ("post_norm", "no_skip"):
        model = gradscope.reference.Transformer(
            variant, depth=2, width=8, heads=2, vocabulary=11, context=5
        )
        record = gradscope.measure(model, (tokens, tokens), gradscope.reference.next_token_loss)
        for name in ("relative_contribution", "residual_cosine"):
            assert set(history(record, name).status[0]) == {"no unit skip"}, variant
        assert history(record, "block_influence").ok.all()


class Embedding(nn.Module):
    """Tokens whose padding is embedded as exact zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6, padding_idx=0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        return h


def test_a_zero_token_has_no_direction_and_a_mask_leaves_it_out() -> None:
    torch.manual_seed(0)
    model = Embedding().double()
    tokens = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    directed = {n for n, s in STATISTICS.items() if s.directions}

    def words(**options: Any) -> tuple[dict[str, str], dict[str, str]]:
        with gradscope.watch(model, **options) as scope:
            model(tokens, attention_mask=tokens != 0).square().mean().backward()
            model.zero_grad()
            scope.step()
        t = scope.record.table(signal="activation")
        at = {
            kind: {
                s: w
                for k, s, w in zip(t["type"], t["statistic"], t["status"], strict=True)
                if k == kind and s in directed
            }
            for kind in ("Stream", "Sequential")
        }
        return at["Stream"], at["Sequential"]

    stream, branch = words()
    assert set(stream) == directed
    assert set(stream.values()) == {"zero token"}
    assert set(branch) == {"relative_contribution", "residual_cosine"}
    stream, branch = words(mask="attention_mask")
    assert set(stream.values()) == set(branch.values()) == {"ok"}


def test_a_zero_branch_contributes_exactly_nothing_in_no_direction() -> None:
    model = stack()
    assert isinstance(model.blocks[1], Block)
    for p in model.blocks[1].mlp[2].parameters():
        nn.init.zeros_(p)
    with gradscope.watch(model) as scope:
        square_loss(model, batch()).backward()
        scope.step()
    # On the axis at h_1, and at the branch of block 1.
    for layer in ("blocks.0", "blocks.1.mlp"):
        assert value(scope.record, layer, "activation", "relative_contribution") == 0.0
        assert status(scope.record, layer, "activation", "residual_cosine") == "zero token"
    assert value(scope.record, "blocks.0", "activation", "angle_next") == pytest.approx(0, abs=1e-15)


class Normed(nn.Module):
    """Something stands between the blocks: no block reads the position before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h).sin()
        return h


class WideBranch(nn.Module):
    """A branch whose module holds another number of features than the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)[..., :6]


def test_a_branch_without_its_stream_says_why() -> None:
    torch.manual_seed(0)
    record = gradscope.measure(Normed().double(), batch(), square_loss)
    assert value(record, "blocks.0.mlp", "activation", "relative_contribution") > 0
    said = status(record, "blocks.1.mlp", "activation", "relative_contribution")
    assert said == "not supported: the input of its block is no watched stream position"
    # Not proven to be a branch, and so not on the axis: there is no such row.
    for model, layers in ((stack(), "**.mlp"), (Stack(WideBranch(), WideBranch()).double(), None)):
        record = gradscope.measure(model, batch(), square_loss, layers=layers)
        assert not len(record.table(layer="blocks.0.mlp", statistic="residual_cosine")["value"])


@pytest.mark.parametrize("batch_first", [True, False])
def test_sequence_first_models_have_the_same_signals(batch_first: bool) -> None:
    def measured(first: bool) -> Record:
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=first, norm_first=True)
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double()
        x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return gradscope.measure(
            model, x if first else x.transpose(0, 1), lambda m, b: (m(b) ** 3).sum(), replicates=1
        )

    names = ("token_cosine", "rank_residual", "gradient_correlation", "block_influence", "branch_cosine")
    for name in names:
        found, expected = (history(measured(first), name) for first in (batch_first, True))
        assert found.ok.all(), name
        np.testing.assert_allclose(found.value, expected.value, rtol=1e-10, err_msg=name)


def test_slow_kernels_do_not_run_unless_due_and_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for register in (statistics.KERNELS, statistics.PAIR_KERNELS):
        for name, function in list(register.items()):

            def counted(*args: Any, name: str = name, function: Any = function) -> Any:
                ran.append(name)
                return function(*args)

            monkeypatch.setitem(register, name, counted)
    statistics.measurement._PLANS.clear()
    everything = set(statistics.KERNELS) | set(statistics.PAIR_KERNELS)

    def train(steps: int, **options: Any) -> set[str]:
        ran.clear()
        model = stack()
        optimizer = sgd(model)
        with gradscope.watch(model, **options) as scope:
            for i in range(steps):
                square_loss(model, batch(i)).backward()
                optimizer.step()
                optimizer.zero_grad()
                if i:
                    assert not set(ran) & everything
                    t = scope.record.table(step=i, statistic="cosine_next")
                    assert set(t["status"]) <= {"not sampled"}
                ran.clear() if i else seen.update(ran)
                ran.clear()
        return seen

    seen: set[str] = set()
    assert train(3) == everything
    seen = set()
    assert train(1, statistics=["l2", "angle_next", "kurtosis"]) == {"angle_next", "kurtosis"}


@pytest.mark.parametrize("masked", [False, True])
def test_no_kernel_looks_at_a_value_on_a_device(masked: bool) -> None:
    """On the meta device there are none to look at: every .item(), bool() and index by a mask raises."""
    x, y = (torch.zeros(3, 4, 5, device="meta") for _ in range(2))
    valid = torch.zeros(3, 4, dtype=torch.bool, device="meta") if masked else None
    for columns in (ACTIVATION, GRADIENT):
        _, absent = statistics.measure(x, columns, valid=valid, input=y, slow=True, stream=True)
        assert not absent
    found = statistics.measure_pair(x, y, STATISTICS, valid=valid)
    found |= statistics.measure_branch(x, y, STATISTICS, valid=valid)
    assert len(found) == 4
    assert all(isinstance(v, Tensor) and v.device.type == "meta" for v in found.values())


def test_nothing_is_kept_beyond_the_stream_tensors_that_are_documented() -> None:
    model = stack()
    live: list[int] = []

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        held = [
            t
            for p in recorder.passes
            for s in p.trunks.values()
            for t in (s.input, s.held_activation and s.held_activation[0])
            if t is not None
        ]
        live.append(len(held))

    recorder = Recorder(model)
    handles = [m.register_forward_hook(count) for m in model.modules()]
    square_loss(model, batch()).backward()
    for handle in handles:
        handle.remove()
    assert max(live) == 2  # h_0 for the input presence, and the position before
    assert all(
        s.input is None and s.held_activation is None and s.held_gradient is None
        for p in recorder.passes
        for s in p.trunks.values()
    )
    recorder.close()


# -- case 20: attention alone loses rank doubly exponentially -----------------------------------------


class Attention(nn.Module):
    """Self-attention without skip, norm or feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size, tokens, width = x.shape
        q, k, v = self.qkv(x).view(size, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5).softmax(-1) @ v
        return self.project(mixed.transpose(1, 2).reshape(size, tokens, width))


class AttentionOnly(nn.Module):
    def __init__(self, depth: int, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        for p in self.parameters():
            nn.init.normal_(p, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_attention_without_skips_loses_rank_super_exponentially() -> None:
    """Dong et al. 2021: log10 of the rank residual falls by more in each layer, up to rounding."""
    x = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    record = gradscope.measure(
        lambda: AttentionOnly(4), x, lambda m, b: m(b).square().sum(), replicates=5, dtype=torch.float64
    )
    residual = np.log10(gradscope.profile(record, "rank_residual").value)  # [replicate, l]
    drops = -np.diff(residual, axis=1)
    assert residual[:, 0] == pytest.approx(0, abs=0.1)  # independent tokens
    ratio = drops[:, 2].mean() / drops[:, 1].mean()
    assert 2 <= ratio <= 4
    assert (residual[:, -1] < -14).all()  # all tokens are one, up to the rounding of float64
    assert (gradscope.profile(record, "token_cosine").value[:, -1] > 1 - 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_every_slow_statistic_of_the_same_numbers_in_float64(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    h, x = torch.randn(3, 4, 16).to(dtype), torch.randn(3, 4, 16).to(dtype)
    for columns in (statistics.ACTIVATION, statistics.GRADIENT):
        half, wide = (
            statistics.measure(a, columns, input=b, slow=True, stream=True)
            for a, b in ((x, h), (x.double(), h.double()))
        )
        assert half[1] == wide[1]
        assert half[0] == pytest.approx(wide[0], rel=1e-5, nan_ok=True)
    narrow, exact = (
        floats(statistics.measure_pair(a, b, STATISTICS)) for a, b in ((h, x), (h.double(), x.double()))
    )
    assert narrow == pytest.approx(exact, rel=1e-5)


def test_a_model_in_half_precision_is_watched_without_faults() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4))).to(torch.bfloat16)
    with gradscope.watch(model) as scope:
        model(torch.randn(5, 8, dtype=torch.bfloat16)).float().square().mean().backward()
    assert scope.faults == {}
    assert (scope.record.table(statistic="input_cosine", status="ok")["value"] <= 1.001).all()
    assert len(scope.record.table(statistic="input_cosine", status="ok")["value"])
