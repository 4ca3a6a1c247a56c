"""The entropy of attention, where the model forms its weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.attention import attention_entropy


def gpt2(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30, initializer_range=0.5)
    config._attn_implementation = kind
    ids = torch.randint(30, (2, 7))
    return GPT2LMHeadModel(config).double().eval(), {"input_ids": ids, "labels": ids}


def test_gpt2_against_its_own_attentions() -> None:
    model, batch = gpt2("eager")
    found = attention_entropy(model, batch)
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions
    assert found.layers == ("transformer.h.0.attn", "transformer.h.1.attn")
    for layer, a in enumerate(weights):
        for head in range(2):
            values = []
            for b in range(2):
                for q in range(1, 7):  # the first token sees itself alone
                    row = a[b, head, q, : q + 1]
                    values.append(float(-(row * row.log()).sum()) / math.log(q + 1))
            assert found.entropy[layer][head] == pytest.approx(np.mean(values), rel=1e-10)
            assert found.least[layer][head] == pytest.approx(min(values), rel=1e-10)
    assert "transformer.h.1.attn" in str(found)


def test_a_fused_kernel_is_refused_with_the_line_to_write() -> None:
    model, batch = gpt2("sdpa")
    with pytest.raises(MeasureError, match=r'set_attn_implementation\("eager"\)'):
        attention_entropy(model, batch)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(MeasureError, match="need_weights=True"):
        attention_entropy(layer.eval(), torch.randn(2, 3, 8), lambda m, b: m(b).sum())


class Looking(nn.Module):
    def __init__(self, sharp: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True, bias=False)
        self.sharp = sharp
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(torch.cat([torch.eye(4)] * 3))

    def forward(self, x: Tensor) -> Any:
        return self.attention(x * self.sharp, x, x, average_attn_weights=False)[0]


def test_even_attention_is_one_and_a_single_key_zero() -> None:
    x = torch.eye(4)[None]
    even = attention_entropy(Looking(0.0), x, lambda m, b: m(b).sum())
    assert even.entropy[0] == pytest.approx([1.0])
    sharp = attention_entropy(Looking(1e4), x, lambda m, b: m(b).sum())
    # Weights that are exactly 0 belong to keys that are not seen; a query with one key has no entropy.
    assert np.isnan(sharp.entropy[0]).all()
    between = attention_entropy(Looking(60.0), x, lambda m, b: m(b).sum())
    assert 0 <= between.entropy[0][0] < 1e-6


def test_t5_has_the_weights_of_all_its_attentions_and_mamba_has_none() -> None:
    from hub_models import build

    model, batch = build("t5")
    model.set_attn_implementation("eager")  # type: ignore[operator]
    found = attention_entropy(model.eval(), batch)
    with torch.no_grad():
        output = model(**batch, output_attentions=True)
    # Encoder, then for each decoder block its own and the encoder's.
    decoder = [
        a for pair in zip(output.decoder_attentions, output.cross_attentions, strict=True) for a in pair
    ]
    weights = [*output.encoder_attentions, *decoder]
    assert len(found.layers) == len(weights) == 6
    for values, a in zip(found.entropy, weights, strict=True):
        visible = (a > 0).sum(-1)
        entropy = -torch.special.xlogy(a, a).sum(-1) / visible.clamp(min=2).log()
        heads = torch.where(visible >= 2, entropy, math.nan).transpose(0, 1).flatten(1).nanmean(-1)
        assert values == pytest.approx(heads.numpy(), rel=1e-4)
    model, batch = build("mamba")
    with pytest.raises(MeasureError, match="none that forms them"):
        attention_entropy(model.eval(), batch)
