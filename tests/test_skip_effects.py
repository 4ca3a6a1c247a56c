"""Effects of skipped blocks against loops written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.skip_effects import skip_effects


class Block(nn.Module):
    """x + a causal mean of tanh(xW)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x @ self.weight)
        return x + y.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(5, 7).double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(model: Any, batch: Tensor) -> Tensor:
    return model(batch).sum()


def by_hand(net: Net, s: int | None, until: int | None = None) -> tuple[list[Tensor], Tensor]:
    with torch.no_grad():
        h, added = X, []
        for number, block in enumerate(net.blocks):
            new = block(h)
            if number == s:
                new = h if until is None else torch.cat((h[:, :until], new[:, until:]), 1)
            added.append(new - h)
            h = new
        return added, net.head(h).softmax(-1)


@pytest.mark.parametrize("until", [None, 2])
def test_effects_are_those_of_the_loop(until: int | None) -> None:
    net = Net()
    found = skip_effects(net, X, loss, positions=() if until is None else (until,))
    effect = found.effect if until is None else found.future
    output = found.output if until is None else found.future_output
    assert effect is not None and output is not None
    plain, p = by_hand(net, None)
    start = until or 0
    for s in range(4):
        added, q = by_hand(net, s, until)
        assert np.isnan(effect[s, : s + 1]).all()
        for number in range(s + 1, 4):
            change = (plain[number] - added[number]).norm(dim=-1) / plain[number].norm(dim=-1)
            assert effect[s, number] == pytest.approx(float(change[:, start:].max()), rel=1e-12)
        assert output[s] == pytest.approx(float((p - q).norm(dim=-1)[:, start:].max()), rel=1e-12)
    assert found.blocks == tuple(f"blocks.{i}" for i in range(4))
    assert "blocks.3" in str(found)


def test_of_several_positions_the_largest_counts() -> None:
    net = Net()
    each = [skip_effects(net, X, loss, positions=(t,)).future for t in (1, 3)]
    both = skip_effects(net, X, loss, positions=(1, 3)).future
    assert both is not None and each[0] is not None and each[1] is not None
    np.testing.assert_allclose(both, np.fmax(each[0], each[1]))


def test_the_last_block_of_gpt2_by_its_own_head() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=30, initializer_range=0.3)
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(30, (2, 7))
    found = skip_effects(model, {"input_ids": ids, "labels": ids})
    with torch.no_grad():
        plain = model(input_ids=ids, output_hidden_states=True)
        before = plain.hidden_states[2]
        cut = model.lm_head(model.transformer.ln_f(before)).softmax(-1)
    expected = float((plain.logits.softmax(-1) - cut).norm(dim=-1).max())
    assert found.output[2] == pytest.approx(expected, rel=1e-10)


def test_what_cannot_be_had_is_said() -> None:
    class NoLogits(Net):
        def forward(self, x: Tensor) -> Any:
            return {"something": super().forward(x)}

    found = skip_effects(NoLogits(), X, lambda m, b: m(b)["something"].sum())
    assert np.isnan(found.output).all() and "without logits" in found.output_status
    assert np.isfinite(found.effect[0, 1:]).all()
    with pytest.raises(MeasureError, match="from 1 to 5"):
        skip_effects(Net(), X, loss, positions=(6,))
    widths = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 4), nn.Linear(4, 4)).double()
    with pytest.raises(MeasureError, match="changes its width"):
        skip_effects(widths, X, loss)


def test_a_model_that_adds_its_blocks_outputs_itself() -> None:
    """The same net, once with the skip in its blocks and once around them."""

    class Branch(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - x

    class Outside(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    net, outside = Net(), Outside()
    outside.blocks = nn.ModuleList(Branch() for _ in range(4))
    outside.load_state_dict(net.state_dict())
    inside = skip_effects(net, X, loss, positions=(2,))
    found = skip_effects(outside, X, loss, positions=(2,))
    for name in ("effect", "output", "future", "future_output"):
        np.testing.assert_allclose(getattr(found, name), getattr(inside, name), rtol=1e-9)


def test_the_tokens_of_images_are_their_pixels() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.conv(x))

    torch.manual_seed(0)
    first, second = Conv().double(), Conv().double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = skip_effects(nn.Sequential(first, second).eval(), x, loss)
    with torch.no_grad():
        plain, changed = (second(h) - h for h in (first(x), x))
    expected = ((plain - changed).norm(dim=1) / plain.norm(dim=1)).max()
    assert found.effect[0, 1] == pytest.approx(float(expected), rel=1e-9)
    with pytest.raises(MeasureError, match="takes a stream"):
        skip_effects(nn.Sequential(first, second).eval(), x, loss, positions=(1,))


def test_every_pass_has_a_batch_of_its_own() -> None:
    def takes(model: Any, batch: Any) -> Tensor:
        return model(batch.pop("x").mul_(0.5)).sum()

    batch = {"x": X.clone()}
    found = skip_effects(Net(), batch, takes)
    np.testing.assert_allclose(found.effect, skip_effects(Net(), X / 2, loss).effect)
    assert torch.equal(batch["x"], X)


def test_an_output_that_is_not_seen_or_not_by_tokens_is_absent() -> None:
    class Pooled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    found = skip_effects(Pooled(), X, loss, positions=(2,))
    assert np.isfinite(found.output).all() and found.output_status == "ok"
    assert found.future_output is not None and np.isnan(found.future_output).all()
    assert "not of single tokens" in found.future_output_status
    assert found.future is not None and np.isfinite(found.future[0, 1:]).all()
    part = nn.ModuleDict({"net": Net()})
    found = skip_effects(part, X, lambda m, b: m["net"](b).sum())
    assert np.isnan(found.output).all() and "does not call the model itself" in found.output_status
    np.testing.assert_allclose(found.effect, skip_effects(Net(), X, loss).effect)


def test_tokens_first_and_a_stream_that_is_not_finite_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with pytest.raises(MeasureError, match="tokens first"):
        skip_effects(model, torch.randn(5, 2, 8), loss, batch_dim=1, positions=(1,))
    with pytest.raises(MeasureError, match="not finite"):
        skip_effects(Net(), X * float("inf"), loss)


def test_what_is_no_longer_finite_without_a_block_is_infinite() -> None:
    class Root(Block):
        """Adds the root of the stream, which is positive behind the first block."""

        def __init__(self, up: float) -> None:
            super().__init__()
            self.up = up

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.up or x.sqrt())

    net = Net()
    net.blocks = nn.ModuleList(Root(up) for up in (9.0, 0.0, 0.0))
    found = skip_effects(net, -torch.rand(2, 6, 5, dtype=torch.float64) - 1, loss)
    assert np.isinf(found.effect[0, 1]) and np.isinf(found.output[0]) and np.isfinite(found.effect[1, 2])


@pytest.mark.parametrize("rest", [[0] * 6, [1, 1, 1, 0, 0, 0]])
def test_tokens_of_padding_are_left_out_by_the_mask(rest: list[int]) -> None:
    """The net is causal: what a sample has in front of its padding is as if it were alone."""
    x = X.flip(0)
    found = skip_effects(Net(), x, loss, positions=(2,), mask=torch.tensor([rest, [1, 1, 1, 1, 0, 0]]))
    unmasked = skip_effects(Net(), x, loss, positions=(2,))
    kept = [part for part in (x[:1, : sum(rest)], x[1:, :4]) if part.numel()]
    each = [skip_effects(Net(), part, loss, positions=(2,)) for part in kept]
    for name in ("effect", "output", "future", "future_output"):
        expected = np.max([getattr(one, name) for one in each], 0)
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-12)
        if not any(rest):
            assert not np.allclose(getattr(unmasked, name), expected, equal_nan=True), name
