"""Rules on tokens that become alike, and on queries and keys that learn nothing."""

from __future__ import annotations

import torch
from planted import TEXT, only, tiny_queries_and_keys, transformer
from torch import nn

import gradscope
from gradscope.analysis.diagnosis import (
    diagnose,
)
from gradscope.reference import next_token_loss


def test_preserved_but_dead() -> None:
    diagnosis = diagnose(
        gradscope.measure(transformer("no_skip_pre_norm", 12, 64), TEXT, next_token_loss, 3)
    )
    found = only(diagnosis, "rank_collapse")
    assert found.title == "preserved but dead: rank collapse"
    assert found.severity == "critical"
    assert found.layers[-1] == "blocks.11"
    assert 0.99 <= found.value <= 1 + 1e-6
    # That queries and keys learn nothing is its consequence.
    starved = only(diagnosis, "starved_attention")
    assert starved.because_of is not None
    assert diagnosis.findings[starved.because_of].rule == "rank_collapse"
    assert not diagnosis.of("vanishing")
    healthy = diagnose(gradscope.measure(transformer("pre_norm", 12, 64), TEXT, next_token_loss, 3))
    assert not healthy.of("rank_collapse") and not healthy.of("starved_attention")


def test_equal_tokens_at_the_input_do_not_collapse() -> None:
    same = (torch.full_like(TEXT[0], 7), TEXT[1])

    def make() -> nn.Module:
        model = transformer("pre_norm")()
        nn.init.zeros_(model.embed.positions.weight)
        return model

    record = gradscope.measure(make, same, next_token_loss, 3)
    assert gradscope.profile(record, "token_cosine").value.min() > 0.999
    assert not diagnose(record).of("rank_collapse")


def test_a_common_component_is_no_collapse_while_attention_learns() -> None:
    def make() -> nn.Module:
        model = transformer("pre_norm", 6)()
        with torch.no_grad():
            model.blocks[5].feed_forward.branch.function.contract.bias.add_(25 * torch.randn(32))
        return model

    record = gradscope.measure(make, TEXT, next_token_loss, 3)
    cosine = gradscope.profile(record, "token_cosine").value
    assert cosine[:, 0].max() < 0.2 and cosine[:, -1].min() > 0.99
    assert not diagnose(record).of("rank_collapse")


def test_starved_attention_without_collapse_is_a_root_cause() -> None:
    found = only(tiny_queries_and_keys(1e-5), "starved_attention")
    assert found.layers == ("blocks.2",)
    assert found.because_of is None
