"""Rules on tokens that become alike, and on queries and keys that learn nothing."""

from __future__ import annotations

import torch
from planted import TEXT, only, reasons, tiny_queries_and_keys, transformer
from synthetic import Builder, name
from torch import nn

import gradscope
from gradscope.analysis.diagnosis import Diagnosis, diagnose
from gradscope.record import Record
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


def test_where_queries_and_keys_cannot_be_told_apart_the_cosine_alone_is_a_note() -> None:
    def made(keys: bool) -> Diagnosis:
        b = Builder()
        for depth in range(5):
            layer, kind = name(depth)
            cosine = 0.2 if depth == 0 else 1 - 0.5 * 10.0**-depth
            b.module(float(depth), layer, "activation", {"token_cosine": cosine, "l2": 1.0}, kind=kind)
            for part in ("q_proj", "k_proj", "v_proj") if keys and depth else ():
                value = 1.0 if part == "v_proj" else 1e-6
                b.parameter(depth, f"{layer}.{part}.weight", {("param_grad", "l2"): value})
        return diagnose(Record({"replicates": "batch"}, (b.step(),)))

    proven, open_ = only(made(True), "rank_collapse"), only(made(False), "rank_collapse")
    assert proven.severity == "critical" and "down to 1.4e-06" in proven.message
    assert open_.severity == "note" and open_.title == "tokens are nearly alike"
    assert made(False).healthy
    assert "not proof" in reasons(made(False), "rank_collapse")
    # .95 at depth 1, .995 at depth 2.
    assert proven.layers == ("h.1", "h.2", "h.3")
