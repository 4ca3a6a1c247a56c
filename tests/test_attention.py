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


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        initializer_range=0.5,
        **options,
    )
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config).eval()


def test_queries_of_padding_are_left_out_by_the_mask() -> None:
    model, ids = llama(), torch.randint(30, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0  # on the left: these queries see no key

    def loss(model: Any, batch: Any) -> Tensor:
        return model(**batch).logits.sum()

    batch = {"input_ids": ids, "attention_mask": mask}
    found = attention_entropy(model, batch, loss, mask="attention_mask")
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions
    for layer, a in enumerate(weights):
        for head in range(4):
            rows = [a[0, head, q, : q + 1].double() for q in range(1, 7)]
            rows += [a[1, head, q, 3 : q + 1].double() for q in range(4, 7)]
            values = [float(-(row * row.log()).sum()) / math.log(len(row)) for row in rows]
            assert found.entropy[layer][head] == pytest.approx(np.mean(values), rel=1e-5)
            assert found.least[layer][head] == pytest.approx(min(values), rel=1e-5, abs=1e-6)
    with pytest.raises(MeasureError, match=r"not finite.*mask="):
        attention_entropy(model.double(), batch, loss)  # the softmax of nothing but −inf
    with pytest.raises(MeasureError, match="There is no mask"):
        attention_entropy(model, {"input_ids": ids}, loss, mask="attention_mask")
    with pytest.raises(MeasureError, match=r"\(2, 3\).*queries \(2, 7\)"):
        attention_entropy(model.float(), {"input_ids": ids}, loss, mask=mask[:, :3])


def test_the_mask_of_one_of_two_trunks_is_refused() -> None:
    from hub_models import build

    model, batch = build("t5")
    model.set_attn_implementation("eager")  # type: ignore[operator]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(MeasureError, match="of which of them"):
        attention_entropy(model.eval(), batch, mask="attention_mask")


def test_a_weight_that_is_rounded_to_zero_in_one_head_is_of_a_visible_key() -> None:
    """The first head looks at one key so sharply that the others' weights are 0."""
    net = nn.MultiheadAttention(4, 2, batch_first=True, bias=False)
    with torch.no_grad():
        net.in_proj_weight.copy_(torch.cat([torch.eye(4)] * 3))
        net.in_proj_weight[:2] *= 1e5

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = net

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, average_attn_weights=False)[0]

    x = torch.eye(4)[None, :2].repeat(1, 2, 1) + torch.arange(4)[None, :, None] * 0.1
    found = attention_entropy(Model(), x, lambda m, b: m(b).sum())
    assert found.entropy[0][0] < 1e-6
    assert found.entropy[0][1] > 0.9


def test_heads_of_a_sample_without_a_batch() -> None:
    x = torch.randn(5, 4)
    alone = attention_entropy(Looking(1.0), x, lambda m, b: m(b).sum())
    batched = attention_entropy(Looking(1.0), x[None], lambda m, b: m(b).sum())
    assert alone.entropy[0] == pytest.approx(batched.entropy[0])

    class Two(Looking):
        def __init__(self) -> None:
            super().__init__(1.0)
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    alone = attention_entropy(Two(), x, lambda m, b: m(b).sum())
    batched = attention_entropy(Two(), x[None], lambda m, b: m(b).sum())
    assert len(alone.entropy[0]) == 2
    assert alone.entropy[0] == pytest.approx(batched.entropy[0], rel=1e-6)


def test_what_is_not_weights_by_head_is_refused_with_the_reason() -> None:
    from transformers import LongformerConfig, LongformerForMaskedLM

    ids = torch.randint(30, (1, 8))
    config = LongformerConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        attention_window=4,
    )
    batch = {"input_ids": ids, "labels": ids, "output_attentions": True}  # [batch, queries, heads, keys]
    with pytest.raises(MeasureError, match="another layout"):
        attention_entropy(LongformerForMaskedLM(config).eval(), batch)
    with pytest.raises(MeasureError, match=r"attention_dropout=0.1.*model.eval\(\)"):
        attention_entropy(llama(attention_dropout=0.1).train(), {"input_ids": ids, "labels": ids})


def test_the_batch_is_left_as_it_is() -> None:
    def writes(model: Any, batch: Tensor) -> Tensor:
        return model(batch.mul_(2)).sum()

    x = torch.randn(1, 4, 4)
    before = x.clone()
    attention_entropy(Looking(1.0), x, writes)
    assert torch.equal(x, before)
