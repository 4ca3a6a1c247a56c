"""Depths by activations and by the logit lens, against loops written out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradscope
from gradscope.errors import MeasureError
from gradscope.experiment.depth_methods import DepthRequest, depth_by


class Turn(nn.Module):
    """Turns the first two features by an angle, and leaves the rest."""

    def __init__(self, angle: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4, dtype=torch.float64))
        self.angle = angle

    def forward(self, x: Tensor) -> Tensor:
        c, s = math.cos(self.angle), math.sin(self.angle)
        turn = torch.eye(4, dtype=torch.float64)
        turn[:2, :2] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        return x @ turn.T @ self.weight


class Turning(nn.Module):
    def __init__(self, angles: list[float], head: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Turn(a) for a in angles)
        self.head = head or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]], dtype=torch.float64)


def summed(model: Any, batch: Tensor) -> Tensor:
    return model(batch).sum()


def read(model: nn.Module, name: str, batch: Any = X, loss: Any = summed) -> Any:
    return depth_by(name, DepthRequest(model=model, batch=batch, loss=loss))


def test_block_influence_and_angles_of_known_turns() -> None:
    angles = [0.3, 0.1, 0.0, 1.2]
    found = read(Turning(angles), "block_influence")
    expected = [1 - math.cos(a) for a in angles]
    assert found.evidence["block_influence"] == pytest.approx(expected, abs=1e-15)
    p = np.array(expected)[[0, 1, 3]] / sum(expected)
    assert found.value == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    found = read(Turning(angles), "angular")
    assert found.evidence["angular_distance"] == pytest.approx(np.array(angles) / math.pi, abs=1e-15)
    assert (found.most, found.unit) == (4, "blocks")
    assert read(Turning([0.4] * 5), "angular").value == pytest.approx(5)
    still = read(Turning([0.0] * 3), "block_influence")
    assert math.isnan(still.value) and still.status == "no block turns the stream"


def test_the_lens_of_known_logits() -> None:
    """The head is a constant times the stream, so that the lens on h_l is softmax(9·h_l)."""
    head = nn.Linear(4, 4, bias=False)
    head.weight.data = 9 * torch.eye(4, dtype=torch.float64)
    quarter = math.pi / 2
    # From feature 0 to 1 to (−0) and back to 1 at the end: the lens crosses twice.
    model = Turning([quarter, quarter, -quarter, 0.0], head)
    batch = X[:, :1]
    found = read(model, "lens_kl", batch)
    stream = [X[:, :1]]
    with torch.no_grad():
        for block in model.blocks:
            stream.append(block(stream[-1]))
    final = (9 * stream[-1]).log_softmax(-1)
    kl = [
        float(((9 * h).softmax(-1) * ((9 * h).log_softmax(-1) - final)).sum(-1).mean())
        for h in stream[:-1]
    ]
    assert found.evidence["kl"] == pytest.approx(kl, abs=1e-12)
    assert kl[1] == pytest.approx(0, abs=1e-12) and kl[2] > kl[0] / 2
    assert found.value == 2  # the first crossing
    assert found.evidence["last_crossing"].tolist() == [4.0]
    assert found.most == 4


def test_on_gpt2_it_is_the_final_norm_and_the_head() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=16, n_head=2, vocab_size=30, n_positions=16, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(30, (2, 7))
    batch = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
        final = output.logits.log_softmax(-1)
        kl, overlap = [], []
        for h in output.hidden_states[:-1]:
            logits = model.lm_head(model.transformer.ln_f(h))
            found = logits.log_softmax(-1)
            kl.append(float((found.exp() * (found - final)).sum(-1).mean()))
            same = [
                len(set(a.tolist()) & set(b.tolist())) / 5
                for a, b in zip(
                    logits.topk(5, -1).indices.flatten(0, 1),
                    output.logits.topk(5, -1).indices.flatten(0, 1),
                    strict=True,
                )
            ]
            overlap.append(sum(same) / len(same))
    lens = gradscope.effective_depth(model, batch, method="lens_kl")
    assert lens.evidence["kl"] == pytest.approx(kl, rel=1e-10)
    assert lens.value == 1 + next(i for i, k in enumerate(kl) if k < max(kl) / 2)
    lens = gradscope.effective_depth(model, batch, method="lens_overlap")
    assert lens.evidence["overlap"] == pytest.approx(overlap)


def test_the_residual_cosine_of_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        n_layer=6, n_embd=16, n_head=2, vocab_size=30, n_positions=16, initializer_range=0.4
    )
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(30, (2, 7))
    cosine = torch.nn.functional.cosine_similarity
    means = []
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        h = hidden[0]
        for block in model.transformer.h:
            attention = block.attn(block.ln_1(h))[0]
            mlp = block.mlp(block.ln_2(h + attention))
            parts = [(attention, h), (mlp, h + attention), (attention + mlp, h)]
            means.append(sum(float(cosine(f, x, -1).mean()) for f, x in parts) / 3)
            h = h + attention + mlp
    found = gradscope.effective_depth(model, {"input_ids": ids, "labels": ids}, method="residual_cosine")
    assert found.evidence["cosine"] == pytest.approx(means, rel=1e-9)
    turns = [i for i in range(1, 6) if means[i - 1] < 0 <= means[i]]
    if turns:
        assert found.value == turns[-1] + 1
    else:
        assert math.isnan(found.value) and "never goes" in found.status


def test_what_cannot_be_had_is_refused() -> None:
    class Other(Turning):
        def forward(self, x: Tensor) -> Any:
            return {"something": super().forward(x)}

    with pytest.raises(MeasureError, match="without logits"):
        read(Other([0.1, 0.2]), "lens_kl", loss=lambda m, b: m(b)["something"].sum())
    with pytest.raises(MeasureError, match="not what is added"):
        read(Turning([0.1, 0.2]), "residual_cosine")
    widths = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 5)).double()
    with pytest.raises(MeasureError, match="changes its width"):
        read(widths, "block_influence")
    with pytest.raises(MeasureError, match="none of the trunks"):
        depth_by("angular", DepthRequest(model=Turning([0.1] * 2), batch=X, loss=summed, trunk="h"))


@pytest.mark.parametrize(
    "method", ["lens_kl", "lens_overlap", "block_influence", "angular", "residual_cosine"]
)
def test_in_float32_it_is_the_same_to_its_digits(method: str) -> None:
    from hub_models import build

    model, batch = build("llama", seed=3)
    exact = gradscope.effective_depth(model.eval().double(), batch, method=method)
    narrow = gradscope.effective_depth(model.float(), batch, method=method)
    assert narrow.status == exact.status
    assert narrow.value == pytest.approx(exact.value, rel=1e-4, nan_ok=True)
    for name, values in exact.evidence.items():
        assert narrow.evidence[name] == pytest.approx(values, rel=1e-3, abs=1e-6)


def test_a_post_norm_block_adds_something_else_than_its_branches() -> None:
    from hub_models import build

    model, batch = build("bert")
    with pytest.raises(MeasureError, match="not what is added"):
        gradscope.effective_depth(model.eval(), batch, method="residual_cosine")


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(x))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(ConvBlock() for _ in range(3))
        self.head = nn.Linear(3, 20)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Outside(nn.Module):
    """The model itself adds what its blocks return."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(4))
        self.head = nn.Linear(4, 20)
        self.double()

    def stream(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for block in self.blocks:
            found.append(found[-1] + block(found[-1]))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stream(x)[-1])


def turns(stream: list[Tensor], features: int) -> list[float]:
    """1 − mean cos(h_l, h_l+1)."""
    cosine = torch.nn.functional.cosine_similarity
    return [1 - float(cosine(a, b, features).mean()) for a, b in itertools.pairwise(stream)]


def test_the_features_of_images_are_their_channels() -> None:
    model, x = Images(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        stream = [x]
        for block in model.blocks:
            stream.append(block(stream[-1]))
    found = read(model, "block_influence", x)
    assert found.evidence["block_influence"] == pytest.approx(turns(stream, 1), rel=1e-9)
    alone = read(Images(), "angular", x[:1, :, :1, :1])
    with torch.no_grad():
        stream = [x[:1, :, :1, :1]]
        for block in model.blocks:
            stream.append(block(stream[-1]))
    angles = [math.acos(1 - t) / math.pi for t in turns(stream, 1)]
    assert alone.evidence["angular_distance"] == pytest.approx(angles, rel=1e-6)


def test_the_stream_of_a_model_that_adds_its_blocks_outputs_itself() -> None:
    model, x = Outside(), torch.randn(2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        stream = model.stream(x)
        final = model.head(stream[-1]).log_softmax(-1)
        lens = [model.head(h).log_softmax(-1) for h in stream[:-1]]
    kl = [float((p.exp() * (p - final)).sum(-1).mean()) for p in lens]
    found = read(model, "block_influence", x)
    assert found.evidence["block_influence"] == pytest.approx(turns(stream, -1), rel=1e-9)
    assert read(model, "lens_kl", x).evidence["kl"] == pytest.approx(kl, rel=1e-9)


def test_a_stream_that_is_not_known_is_refused() -> None:
    class Between(Turning):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.tanh(block(x))
            return self.head(x)

    with pytest.raises(MeasureError, match=r"What enters blocks.1 is neither"):
        read(Between([0.1, 0.2]), "angular")
    with pytest.raises(MeasureError, match="more than once"):
        read(Turning([0.1, 0.2]), "angular", loss=lambda m, b: m(b).sum() + m(b * 2).sum())


def test_every_pass_has_a_batch_of_its_own() -> None:
    def takes(model: Any, batch: Any) -> Tensor:
        return model(batch.pop("x").mul_(0.5)).sum()

    model, x = Outside(), torch.randn(2, 3, 4, dtype=torch.float64)
    batch = {"x": x.clone()}
    found = read(model, "lens_kl", batch, takes)
    assert found.evidence["kl"] == pytest.approx(read(model, "lens_kl", x / 2).evidence["kl"])
    assert torch.equal(batch["x"], x)


def test_the_trunk_that_runs_last_is_read() -> None:
    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(4, 1, 8, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = encoder(), encoder()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Two().double().eval()
    assert read(model, "angular").reading_point == "blocks of second.layers"
    first = read(model, "angular", loss=lambda m, b: m.first(b).sum())
    assert first.reading_point == "blocks of first.layers"


def test_a_mask_among_named_arguments_is_not_the_stream() -> None:
    class Masked(Turn):
        def forward(self, *, mask: Tensor, x: Tensor) -> Tensor:
            return super().forward(x) * mask

    class Model(Turning):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(mask=torch.ones(x.shape[1], 1, dtype=x.dtype), x=x)
            return x

    model = Model([0.0, 0.0])
    model.blocks = nn.ModuleList(Masked(a) for a in (0.3, 0.1))
    assert read(model, "angular").evidence["angular_distance"] == pytest.approx(
        [0.3 / math.pi, 0.1 / math.pi]
    )


def test_what_says_nothing_is_absent() -> None:
    few = read(Turning([0.3, 0.1], nn.Linear(4, 16).double()), "lens_overlap")
    assert math.isnan(few.value) and "of 16 classes" in few.status
    still = read(Turning([0.0, 0.0], nn.Linear(4, 30).double()), "lens_kl")
    assert math.isnan(still.value) and still.status == "no block changes the output"
    random = nn.Sequential(Turning([0.1, 0.2]), nn.Dropout(0.5))
    with pytest.raises(MeasureError, match=r"model.eval\(\)"):
        read(random, "angular")
    part = Turning([0.1, 0.2])
    model = nn.ModuleDict({"part": part})
    with pytest.raises(MeasureError, match="does not call the model itself"):
        read(model, "lens_kl", loss=lambda m, b: m["part"](b).sum())


def test_bfloat16_rounds_the_sum_of_the_branches() -> None:
    from hub_models import build

    model, batch = build("llama")
    exact = gradscope.effective_depth(model.eval().double(), batch, method="residual_cosine")
    rounded = gradscope.effective_depth(model.bfloat16(), batch, method="residual_cosine")
    assert rounded.evidence["cosine"] == pytest.approx(exact.evidence["cosine"], abs=0.02)


@pytest.mark.parametrize(
    "method", ["lens_kl", "lens_overlap", "block_influence", "angular", "residual_cosine"]
)
def test_padding_is_left_out_by_the_mask(method: str) -> None:
    """A causal model does not see padding on the right: it is that of the shorter sample alone."""
    from hub_models import build

    model, batch = build("llama")
    model = model.eval().double()
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0

    def logits(model: Any, batch: Any) -> Tensor:
        return model(**batch).logits.sum()

    padded = gradscope.effective_depth(
        model, {"input_ids": ids, "attention_mask": mask}, logits, method=method, mask="attention_mask"
    )
    whole = gradscope.effective_depth(model, {"input_ids": ids[:1]}, logits, method=method)
    short = gradscope.effective_depth(model, {"input_ids": ids[1:, :5]}, logits, method=method)
    name = next(iter(padded.evidence))
    tokens = ids.shape[1]
    expected = (tokens * whole.evidence[name] + 5 * short.evidence[name]) / (tokens + 5)
    assert padded.evidence[name] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model = Turning([0.1, 0.2])
    for mask, said in ((torch.ones(1, 3), "which positions"), (torch.zeros(1, 2), "leaves no position")):
        request = DepthRequest(model=model, batch=X, loss=summed, mask=mask)
        with pytest.raises(MeasureError, match=said):
            depth_by("angular", request)
    with pytest.raises(MeasureError, match="There is no mask"):
        depth_by(
            "angular", DepthRequest(model=model, batch=X, loss=summed, mask=lambda args, kwargs: None)
        )


@pytest.mark.parametrize("method", ["block_influence", "angular", "residual_cosine"])
def test_a_position_of_zeros_has_no_direction(method: str) -> None:
    from hub_models import build

    model, batch = build("deit")  # its class token is 0 before training
    found = gradscope.effective_depth(model.eval(), batch, method=method)
    assert math.isnan(found.value) and "exactly 0" in found.status
