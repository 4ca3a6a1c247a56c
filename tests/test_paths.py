"""The path spectrum against every path written out, closed forms, and what must be refused."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy, layer_norm

from gradscope.analysis.path_lengths import path_lengths
from gradscope.errors import MeasureError
from gradscope.experiment.effective_depth import effective_depth
from gradscope.experiment.paths import path_spectrum
from gradscope.experiment.spectrum import PathSpectrum
from gradscope.reference import Transformer, next_token_loss


def transformer(variant: str, depth: int = 3, **settings: Any) -> Transformer:
    torch.manual_seed(0)
    # Xavier's branches are large enough against the stream that every path weighs something.
    settings = {"initialization": "xavier", "width": 16, "heads": 2, "vocabulary": 11} | settings
    return Transformer(variant, depth=depth, **settings).double()


def text(count: int = 3, length: int = 6) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(11, (count, length + 1), generator=torch.Generator().manual_seed(1))
    return drawn[:, :-1], drawn[:, 1:]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


class Residual(nn.Module):
    """x + f(x) around any module."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def residual_stack(
    blocks: int = 3, make: Callable[[], nn.Module] = lambda: nn.Linear(4, 4)
) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Residual(make()) for _ in range(blocks)]).double()


# -- every path on its own -----------------------------------------------------------------


def all_paths(
    forward: Callable[[Tensor, Sequence[int]], Tensor], h: Tensor, routes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """c_k for every k: the gradient along each path, added to those of its length.

    A path is one route through each sublayer or block, 0 for its skip. ``forward(h, path)`` gives the
    loss with its true value, and detaches whatever lies off the path.
    """
    parts = [torch.zeros_like(h) for _ in range(len(routes) + 1)]
    for path in itertools.product(*routes):
        leaf = h.clone().requires_grad_()
        (found,) = torch.autograd.grad(
            forward(leaf, path), leaf, allow_unused=True, materialize_grads=True
        )
        parts[sum(route > 0 for route in path)] += found
    return parts


def through_sublayers(model: Transformer, targets: Tensor, x: Tensor, path: Sequence[int]) -> Tensor:
    """The loss from the stream in front of the last ``len(path)`` sublayers, along one path."""
    sublayers = [s for block in model.blocks for s in (block.attention, block.feed_forward)]
    for sublayer, route in zip(sublayers[len(sublayers) - len(path) :], path, strict=True):
        f = sublayer.branch(x)
        y = x.detach() + f if route else x + f.detach()
        x = y if sublayer.norm is None else layer_norm(y, y.shape[-1:])
    return cross_entropy(model.head(model.final_norm(x)).flatten(0, 1), targets.flatten())


def assert_spectrum(
    found: PathSpectrum, position: int, parts: list[Tensor], tolerance: float, longest: int | None = None
) -> None:
    """Norms and weights at one stream position are those of the parts, and 0 for longer paths."""
    g = torch.stack(parts).sum(0)
    size = float(g.norm())
    norms = [float(c.norm()) for c in parts]
    weights = [float((c * g).sum()) / size**2 for c in parts]
    padding = [0.0] * (found.branches + 1 - len(parts))
    keep = None if longest is None else longest + 1
    np.testing.assert_allclose(
        found.norm_at[position], (norms + padding)[:keep], rtol=tolerance, atol=tolerance * size
    )
    np.testing.assert_allclose(
        found.weight_at[position], (weights + padding)[:keep], rtol=tolerance, atol=tolerance
    )
    assert (found.norm_at[position][len(parts) :] == 0).all()


def enumerated(model: Transformer, batch: tuple[Tensor, Tensor]) -> list[list[Tensor]]:
    """c_k at h_0 and behind every block, [position][k]."""
    inputs, targets = batch
    n, found = 2 * len(model.blocks), []
    h = model.embed(inputs).detach()
    for position in range(len(model.blocks) + 1):
        found.append(
            all_paths(
                lambda x, path: through_sublayers(model, targets, x, path),
                h,
                [(0, 1)] * (n - 2 * position),
            )
        )
        if position < len(model.blocks):
            h = model.blocks[position](h).detach()
    return found


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm", "peri_norm", "skip"])
def test_it_equals_all_paths_written_out(variant: str) -> None:
    model, batch = transformer(variant), text()
    expected = enumerated(model, batch)
    found = path_spectrum(model, batch, next_token_loss)
    assert found.positions == (
        "input of blocks.0",
        "output of blocks.0",
        "output of blocks.1",
        "output of blocks.2",
    )
    for position, parts in enumerate(expected):
        assert_spectrum(found, position, parts, 1e-12)
    assert found.branches == 6
    assert found.granularity == "2 branches per block"
    assert found.lengths.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert (found.norm > 1e-6 * found.gradient_l2).all()  # so every length is compared
    assert found.gradient_l2 == pytest.approx(float(torch.stack(expected[0]).sum(0).norm()), rel=1e-12)
    assert found.whole_status == found.status == "ok"
    assert abs(found.tail) < 1e-12
    assert 0 <= found.checks.sum_difference < 1e-12
    assert 0 <= found.checks.gradient_difference < 1e-12
    assert 0 <= found.checks.values_difference < 1e-12

    single = path_spectrum(copy.deepcopy(model).float(), batch, next_token_loss)
    assert_spectrum(single, 0, expected[0], 1e-5)


def test_parallel_branches_never_lie_behind_each_other() -> None:
    class Parallel(nn.Module):
        """x + attention(LN x) + mlp(LN x), as in GPT-J."""

        def __init__(self) -> None:
            super().__init__()
            made = Transformer("skip", depth=1, width=16, heads=2, initialization="xavier").blocks[0]
            self.norm = nn.LayerNorm(16)
            self.attention = made.attention.branch
            self.mlp = made.feed_forward.branch

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + self.attention(y) + self.mlp(y)

    torch.manual_seed(0)
    model, x = nn.Sequential(*[Parallel() for _ in range(3)]).double(), rows(2, 5, 16)
    aim = rows(2, 5, 16).flip(0)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).abs().pow(3).mean()

    def forward(x: Tensor, path: Sequence[int]) -> Tensor:
        for block, route in zip(model, path, strict=True):
            y = block.norm(x)
            a, m = block.attention(y), block.mlp(y)
            parts = [x, a, m]
            x = sum(part if i == route else part.detach() for i, part in enumerate(parts))
        return (x - aim).abs().pow(3).mean()

    parts = all_paths(forward, x, [(0, 1, 2)] * 3)
    assert len(parts) == 4
    for modules in (None, ["*.attention", "*.mlp"]):
        found = path_spectrum(model, (x, aim), loss, modules=modules)
        assert found.branches == 6
        assert_spectrum(found, 0, parts, 1e-12)
        assert found.norm[4:].tolist() == [0, 0, 0]
        assert found.weight[4:].tolist() == [0, 0, 0]


# -- whole blocks as branches --------------------------------------------------------------


def through_blocks(model: nn.Sequential, aim: Tensor, x: Tensor, path: Sequence[int]) -> Tensor:
    """The loss along one path that takes each block's skip s·x, or the rest of the block."""
    for block, route in zip(model[len(model) - len(path) :], path, strict=True):
        rest = block(x) - block.skip * x
        x = block.skip * x.detach() + rest if route else block.skip * x + rest.detach()
    return (x - aim).abs().pow(3).mean()


class TwoSteps(nn.Module):
    """Two sublayers s·x + f(x); none of them has a skip where s is 0."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)
        self.factor = factor
        self.skip = factor * factor

    def forward(self, x: Tensor) -> Tensor:
        if not self.factor:
            return self.g(torch.tanh(self.f(x)))
        x = self.factor * x + torch.tanh(self.f(x))
        return self.factor * x + self.g(x) ** 2


@pytest.mark.parametrize("factors", [[1, 1, 1], [1.3, 1.3], [1, 0, 0.5], [0, 0]])
@pytest.mark.parametrize("in_parts", [False, True])
def test_whole_blocks_as_branches(factors: list[float], in_parts: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[TwoSteps(factor) for factor in factors]).double()
    x, aim = rows(4, 4), rows(4, 4).flip(0)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).abs().pow(3).mean()

    settings = {"max_bytes": needed(model, (x, aim), loss, granularity="block")} if in_parts else {}
    found = path_spectrum(model, (x, aim), loss, granularity="block", **settings)
    assert found.chunks == (4 if in_parts else 1)
    assert found.branches == len(factors)
    assert found.granularity == "1 branch per block"
    h = x
    for position in range(len(factors)):
        expected = all_paths(
            lambda x, path: through_blocks(model, aim, x, path), h, [(0, 1)] * (len(factors) - position)
        )
        assert_spectrum(found, position, expected, 1e-12)
        h = model[position](h).detach()


def test_whole_blocks_need_a_skip_that_is_a_factor() -> None:
    with pytest.raises(MeasureError, match=r'blocks\.0 is not \(post-norm\).*granularity="sublayer"'):
        path_spectrum(transformer("post_norm"), text(), next_token_loss, granularity="block")
    with pytest.raises(MeasureError, match="Leave out modules="):
        path_spectrum(residual_stack(), rows(5, 4), mean_square, modules="*.f", granularity="block")
    with pytest.raises(ValueError, match="'layer' is none of sublayer, block"):
        path_spectrum(residual_stack(), rows(5, 4), mean_square, granularity="layer")


def test_one_sublayer_per_block_is_the_block() -> None:
    model, x = residual_stack(), rows(5, 4)
    expected = path_spectrum(model, x, mean_square)
    found = path_spectrum(model, x, mean_square, granularity="block")
    np.testing.assert_allclose(found.weight_at, expected.weight_at, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.norm_at, expected.norm_at, rtol=1e-12)
    cut = path_spectrum(model, x, mean_square, granularity="block", max_length=1)
    np.testing.assert_allclose(cut.weight, expected.weight[:2], rtol=1e-12)


# -- closed forms --------------------------------------------------------------------------


@pytest.mark.parametrize("a", [1.0, 0.25, -0.5, -3.0])
def test_scalar_branches_are_binomial(a: float) -> None:
    """x ↦ (1 + a)ⁿ x: c_k = C(n, k) aᵏ (1 + a)⁰ δ, from which every number follows."""
    n, s = 5, 1 + a
    model = nn.Sequential(*[Residual(Times(a)) for _ in range(n)])
    found = path_spectrum(model, rows(4, 3), lambda m, b: m(b).sum(), modules="*.f")
    c = np.array([math.comb(n, k) * a**k for k in range(n + 1)])
    np.testing.assert_allclose(found.weight, c / s**n, rtol=1e-13)
    np.testing.assert_allclose(found.norm, np.abs(c) * math.sqrt(12), rtol=1e-13)
    for position in range(n + 1):
        left = n - position
        c_left = [math.comb(left, k) * a**k / s**left for k in range(n + 1)]
        np.testing.assert_allclose(found.weight_at[position], c_left, rtol=1e-13)
    assert found.effective_depth == pytest.approx(n * a / s, rel=1e-12)
    assert found.cancellation == pytest.approx((c**2).sum() / s ** (2 * n), rel=1e-12)
    assert found.absolute == pytest.approx((1 + abs(a)) ** n / abs(s) ** n, rel=1e-12)
    energy = sum(k * c[k] ** 2 for k in range(n + 1)) / (c**2).sum()
    assert found.gradient_energy == pytest.approx(energy, rel=1e-12)
    assert found.granularity == "1 branch per block"
    if a == 1:
        np.testing.assert_allclose(found.weight, path_lengths(n).probability, rtol=1e-13)


@pytest.mark.parametrize("max_bytes", [2**31, 100_000])
def test_branches_of_zero_leave_the_skip_alone(max_bytes: int) -> None:
    found = path_spectrum(transformer("rezero"), text(), next_token_loss, max_bytes=max_bytes)
    assert found.chunks == (1 if max_bytes == 2**31 else 3)
    assert found.weight.tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert found.norm[1:].tolist() == [0] * 6
    assert found.norm[0] == pytest.approx(found.gradient_l2, rel=1e-14)
    assert found.effective_depth == 0
    assert found.tail == 0
    assert (found.carrying_range().low, found.carrying_range().high) == (0, 0)
    assert str(found) == (
        "path spectrum of 6 branches at the input of blocks.0: effective depth 0; 1 of the energy on "
        "lengths 0 to 0"
    )


@pytest.mark.parametrize("variant", ["no_skip", "no_skip_pre_norm", "no_skip_post_norm"])
def test_without_skips_there_is_one_path(variant: str) -> None:
    found = path_spectrum(transformer(variant), text(), next_token_loss)
    assert found.weight.tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert found.effective_depth == 6
    assert found.gradient_energy == 6
    assert found.cancellation == pytest.approx(1, rel=1e-12)
    cut = path_spectrum(transformer(variant), text(), next_token_loss, max_length=4)
    assert cut.norm.tolist() == [0] * 5
    assert cut.tail == 1
    assert math.isnan(cut.gradient_energy)


def test_a_vanished_gradient_keeps_its_spectrum_in_float64() -> None:
    model = transformer("no_skip", depth=40, initialization="normal")
    found = path_spectrum(model, text(1), next_token_loss)
    assert 0 < found.gradient_l2 < 1e-170  # its square is 0
    assert found.weight.tolist() == [0] * 80 + [1]
    assert found.gradient_energy == 80
    assert found.cancellation == pytest.approx(1, rel=1e-12)


# -- one run against another ---------------------------------------------------------------


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm", "peri_norm", "layernorm_scaling"])
def test_its_mean_is_the_effective_depth(variant: str) -> None:
    model, batch = transformer(variant, depth=4), text()
    depth = effective_depth(model, batch, next_token_loss)
    found = path_spectrum(model, batch, next_token_loss)
    assert found.effective_depth == pytest.approx(depth.value, rel=1e-10)
    assert found.gradient_l2 == pytest.approx(depth.gradient_l2, rel=1e-13)
    assert found.reading_point == depth.reading_point
    assert found.branches == depth.branches


@pytest.mark.parametrize("longest", range(8))
def test_what_is_cut_off_changes_nothing_of_the_rest(longest: int) -> None:
    model, batch = transformer("pre_norm"), text()
    whole = path_spectrum(model, batch, next_token_loss)
    cut = path_spectrum(model, batch, next_token_loss, max_length=longest)
    kept = min(longest, 6) + 1
    assert cut.norm.shape == (kept,)
    np.testing.assert_allclose(cut.norm_at, whole.norm_at[:, :kept], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(cut.weight_at, whole.weight_at[:, :kept], rtol=1e-12, atol=1e-15)
    assert cut.tail == pytest.approx(float(whole.weight[kept:].sum()), abs=1e-12)
    assert cut.status == "ok"
    if longest >= 6:
        assert cut.effective_depth == pytest.approx(whole.effective_depth, rel=1e-12)
        return
    for absent in (cut.effective_depth, cut.cancellation, cut.absolute, cut.gradient_energy):
        assert math.isnan(absent)
    assert math.isnan(cut.checks.sum_difference)
    assert f"cut off at length {longest} of 6" in cut.whole_status
    assert str(cut).startswith("path spectrum of 6 branches at the input of blocks.0: lengths 0 to ")
    with pytest.raises(MeasureError, match="max_length=None"):
        cut.carrying_range()


class SavedIn:
    """A loss that notes how much autograd keeps of each of its calls but the second.

    The second is that of half of the samples, whose own count the hooks in here would hide.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        self.loss = loss
        self.samples: list[int] = []
        self.kept: list[int] = []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with (
            nullcontext() if len(self.samples) == 1 else saved_tensors_hooks(pack, lambda tensor: tensor)
        ):
            value = self.loss(model, batch)
        self.samples.append(len(batch[0]))
        self.kept.append(sum(seen.values()))
        return value


def needed(model: nn.Module, batch: Any, loss: Any, **settings: Any) -> int:
    """What one sample with its copies needs, by the message that refuses less."""
    with pytest.raises(MeasureError, match="max_bytes=9") as caught:
        path_spectrum(model, batch, loss, max_bytes=9, **settings)
    return int(str(caught.value).split("Write max_bytes=")[1].split(",")[0])


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("longest", [None, 2])
def test_in_parts_it_stays_within_memory_and_the_same(variant: str, longest: int | None) -> None:
    model, batch = transformer(variant), text(5)
    whole = path_spectrum(model, batch, next_token_loss, max_length=longest)
    assert whole.chunks == 1
    one = needed(model, batch, next_token_loss, max_length=longest)
    for size in (3, 2, 1):
        max_bytes = size * one
        loss = SavedIn(next_token_loss)
        found = path_spectrum(model, batch, loss, max_length=longest, max_bytes=max_bytes)
        assert loss.samples[:2] == [5, 2]
        assert len(loss.samples) - 2 == found.chunks == math.ceil(5 / size)
        # What is kept besides, the gradients at branches and positions, is counted in.
        assert 0.5 * max_bytes < max(loss.kept[2:]) <= max_bytes
        np.testing.assert_allclose(found.norm_at, whole.norm_at, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(found.weight_at, whole.weight_at, rtol=1e-12, atol=1e-15)
        assert found.gradient_l2 == whole.gradient_l2


def test_parts_with_other_numbers_of_valid_tokens() -> None:
    """The mean is over valid tokens: each part has its own denominator, and one part has none."""
    model, (inputs, targets) = transformer("pre_norm"), text(4)
    targets = targets.clone()
    targets[0, 2:] = targets[1, :1] = -100
    targets[2] = -100
    batch = inputs, targets
    expected = enumerated(model, batch)
    found = path_spectrum(model, batch, next_token_loss, max_bytes=100_000)
    assert found.chunks == 4
    for position, parts in enumerate(expected):
        assert_spectrum(found, position, parts, 1e-12)


def test_how_far_it_is_is_said_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, batch = transformer("pre_norm"), text()
    path_spectrum(model, batch, next_token_loss)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    path_spectrum(model, batch, next_token_loss, progress=False)
    path_spectrum(model, batch, next_token_loss, max_length=0)
    assert capsys.readouterr().err == ""
    path_spectrum(model, batch, next_token_loss)
    assert capsys.readouterr().err.endswith("\rpath spectrum: 6 of 7\rpath spectrum: 7 of 7\n")
    path_spectrum(model, batch, next_token_loss, max_bytes=100_000)
    assert capsys.readouterr().err.endswith("\rpath spectrum, part 3 of 3: 7 of 7\n")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.95, 1.0])
def test_the_carrying_range_is_the_smallest(share: float) -> None:
    found = path_spectrum(transformer("post_norm"), text(), next_token_loss)
    energy = found.norm**2 / (found.norm**2).sum()
    good = [
        (high - low, low, high)
        for low, high in itertools.combinations_with_replacement(range(7), 2)
        if energy[low : high + 1].sum() >= share - 1e-12
    ]
    carrying = found.carrying_range(share)
    assert carrying.high - carrying.low == min(good)[0]
    assert (carrying.high - carrying.low, carrying.low, carrying.high) in good
    assert carrying.energy_share == pytest.approx(energy[carrying.low : carrying.high + 1].sum())
    assert carrying.path_share == path_lengths(6).share(carrying.low, carrying.high)


# -- foreign models ------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_encoder(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x, aim = rows(3, 5, 8), rows(3, 5, 8).flip(0)
    if not batch_first:
        x, aim = x.transpose(0, 1).contiguous(), aim.transpose(0, 1).contiguous()

    def forward(x: Tensor, path: Sequence[int]) -> Tensor:
        for block, (first, second) in zip(model.layers, (path[:2], path[2:]), strict=True):
            y = block.norm1(x)
            f = block.self_attn(y, y, y, need_weights=False)[0]
            x = x.detach() + f if first else x + f.detach()
            f = block.linear2(block.activation(block.linear1(block.norm2(x))))
            x = x.detach() + f if second else x + f.detach()
        return (x - aim).square().mean()

    names = ["layers.*.dropout1", "layers.*.dropout2"]
    for max_bytes in (2**31, 30_000):
        found = path_spectrum(
            model,
            (x, aim),
            lambda m, b: (m(b[0]) - b[1]).square().mean(),
            modules=names,
            batch_dim=0 if batch_first else 1,
            max_bytes=max_bytes,
        )
        assert (found.chunks == 1) == (max_bytes == 2**31)
        assert_spectrum(found, 0, all_paths(forward, x, [(0, 1)] * 4), 1e-12)


def test_a_block_that_is_called_many_times_counts_every_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Residual(Times(0.5))])

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.blocks[0](x)
            return x

    found = path_spectrum(Shared(), rows(5, 4), lambda m, b: m(b).sum(), modules="blocks.0.f")
    np.testing.assert_allclose(found.weight, np.array([8, 12, 6, 1]) / 27, rtol=1e-13)
    assert found.positions[1:] == tuple(f"output of blocks.0, call {i}" for i in (1, 2, 3))
    assert found.granularity == "1 branch per block"


def test_in_place_operations_are_read_at_the_right_points() -> None:
    class InPlace(nn.Module):
        def __init__(self, f: nn.Module) -> None:
            super().__init__()
            self.f = f

        def forward(self, x: Tensor) -> Tensor:
            x += self.f(x.clone())  # the layer keeps its input, which must not change
            return x

    model, x = residual_stack(), rows(5, 4)
    expected = path_spectrum(model, x, mean_square, modules="*.f")
    changing = nn.Sequential(*[InPlace(block.f) for block in model])
    found = path_spectrum(changing, x, mean_square, modules="*.f")
    np.testing.assert_allclose(found.weight_at, expected.weight_at, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.norm_at, expected.norm_at, rtol=1e-12)


def test_nothing_of_the_model_or_the_random_state_changes() -> None:
    model, batch = transformer("pre_norm"), text()
    before, dice = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    path_spectrum(model, batch, next_token_loss, max_bytes=100_000)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), dice)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    with torch.no_grad():
        inside = path_spectrum(model, batch, next_token_loss)
    assert not inside.norm_at.flags.writeable
    assert not inside.weight_at.flags.writeable


# -- absent and refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "said", "size"),
    [
        (lambda m, b: 0 * m(b).sum(), "exactly 0", 0),
        (lambda m, b: m(b).sum() * math.inf, "not finite", math.nan),
    ],
)
def test_without_a_gradient_there_is_no_spectrum(
    loss: Callable[[Any, Any], Tensor], said: str, size: float
) -> None:
    found = path_spectrum(residual_stack(), rows(5, 4), loss, modules="*.f")
    assert said in found.status
    assert found.norm.shape == found.weight.shape == (4,)
    assert np.isnan(found.norm_at).all()
    assert np.isnan(found.weight_at).all()
    for absent in (
        found.effective_depth,
        found.tail,
        found.cancellation,
        found.absolute,
        found.gradient_energy,
    ):
        assert math.isnan(absent)
    if not math.isnan(size):
        assert found.gradient_l2 == size
    assert str(found).startswith("no path spectrum at the input of 0: the gradient there is")
    with pytest.raises(MeasureError, match=said):
        found.carrying_range()


class Gate(nn.Module):
    """x·σ(Wx), which has no skip, although x itself is a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.f(x))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


class Centred(nn.Module):
    """Without the batch's mean: another one has other values."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) ** 3


def contrastive(model: nn.Module, batch: Tensor) -> Tensor:
    """Every sample is pushed away from all others of its batch, its own copy among them."""
    z = model(batch)
    return (z @ z.mT).fill_diagonal_(-math.inf).logsumexp(1).mean()


def refusals() -> Iterator[Any]:
    def case(name: str, said: str, model: nn.Module, loss: Any = mean_square, **settings: Any) -> Any:
        return pytest.param(model, loss, settings, said, id=name)

    yield case(
        "unknown branches",
        r"not known what is a residual branch in 0, sublayer 0: MulBackward0",
        nn.Sequential(*[Gate() for _ in range(2)]).double(),
        modules=None,
    )
    yield case(
        "dropout", r"Dropout\) has p=0.1 .* model\.eval", residual_stack(make=lambda: nn.Dropout(0.1))
    )
    yield case("batch norm", r"BatchNorm1d.*model\.eval", residual_stack(make=lambda: nn.BatchNorm1d(4)))
    yield case("noise", "different values", residual_stack(make=Noise))
    yield case("centred", "influence each other", residual_stack(make=Centred))
    yield case("centred and cut", "influence each other", residual_stack(make=Centred), max_length=1)
    yield case("centred once", "influence each other", residual_stack(1, Centred))
    yield case("pairs", "another gradient", residual_stack(), contrastive)
    yield case("pairs, cut", "another gradient", residual_stack(), contrastive, max_length=0)
    yield case("half", r"bfloat16.*model\.double", residual_stack().bfloat16(), lowered)
    yield case("no path", "No gradient path", residual_stack(), lambda m, b: m(b).detach().sum())
    yield case(
        "an auxiliary loss",
        "past the end of the trunk",
        residual_stack(),
        lambda m, b: m(b).mean() + m[0](b).square().mean(),
    )
    yield case(
        "too little memory", r"max_bytes=\d+, or a smaller max_length", residual_stack(), max_bytes=9
    )
    yield case("no default loss", "loss=lambda model, batch", residual_stack(), None)


def lowered(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch.bfloat16()).square().mean()


@pytest.mark.parametrize(("model", "loss", "settings", "said"), list(refusals()))
def test_what_cannot_be_measured_says_why(
    model: nn.Module, loss: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(MeasureError, match=said):
        path_spectrum(model, rows(6, 4), loss, **({"modules": "*.f"} | settings))


def test_parts_that_cancel_beyond_the_dtype_are_refused() -> None:
    """c_k = C(4, k) (-.99)ᵏ δ sum to 1e-8 δ, which float32 cannot tell from rounding."""
    model = nn.Sequential(*[Residual(Times(-0.99)) for _ in range(4)])
    whole = path_spectrum(model, rows(6, 4), lambda m, b: m(b).sum(), modules="*.f")
    assert whole.effective_depth == pytest.approx(4 * -0.99 / 0.01, rel=1e-6)
    with pytest.raises(MeasureError, match=r"do not sum to the gradient.*float32.*model\.double"):
        path_spectrum(model, rows(6, 4).float(), lambda m, b: m(b).sum(), modules="*.f")


def test_the_memory_that_is_asked_for_is_enough() -> None:
    model, x = residual_stack(), rows(6, 4)
    wanted = needed(model, x, mean_square, modules="*.f")
    assert path_spectrum(model, x, mean_square, modules="*.f", max_bytes=wanted).chunks == 6
    with pytest.raises(MeasureError, match=f"max_bytes={wanted},"):
        path_spectrum(model, x, mean_square, modules="*.f", max_bytes=wanted - 1)


def test_wrong_arguments() -> None:
    model, x = residual_stack(), rows(6, 4)
    with pytest.raises(ValueError, match="max_length=-1"):
        path_spectrum(model, x, mean_square, modules="*.f", max_length=-1)
    with pytest.raises(ValueError, match="max_bytes=0"):
        path_spectrum(model, x, mean_square, modules="*.f", max_bytes=0)
    with pytest.raises(TypeError):
        path_spectrum(model, x, mean_square, modules="*.f", max_length=1.5)
    found = path_spectrum(model, x, mean_square, modules="*.f")
    for share in (0.0, -1, 1.5, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            found.carrying_range(share)
