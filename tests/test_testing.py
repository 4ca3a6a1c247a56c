"""`assert_healthy`: planted faults are named, allowed ones pass, and what it measures leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradscope import reference
from gradscope.analysis import RULES
from gradscope.testing import assert_healthy

TOKENS = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
BATCH = (TOKENS[:, :-1], TOKENS[:, 1:])


def make(variant: str = "pre_norm", depth: int = 6) -> nn.Module:
    return reference.Transformer(variant, depth=depth, width=32, heads=2)


class CutBlock(nn.Module):
    """A residual block, optionally without any gradient, or with an output that is not finite."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.linear(x).tanh()
        if self.fault == "detached":
            return y.detach()
        return y / 0.0 if self.fault == "not finite" else y


def blocks(fault: str, at: int = 2) -> nn.Module:
    return nn.Sequential(*(CutBlock(fault if i == at else "") for i in range(5)), nn.Linear(8, 1))


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_a_healthy_model_passes_and_the_diagnosis_comes_back() -> None:
    before = torch.get_rng_state()
    diagnosis = assert_healthy(make, BATCH, reference.next_token_loss)
    assert diagnosis.healthy
    assert set(diagnosis.checked) == set(RULES)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_given_model_keeps_its_gradients() -> None:
    model = make()
    reference.next_token_loss(model, BATCH).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert_healthy(model, [BATCH, BATCH], reference.next_token_loss)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_vanishing_gradient_fails_with_what_where_how_sure_and_what_to_do() -> None:
    with pytest.raises(AssertionError) as failure:
        assert_healthy(lambda: make("no_skip"), BATCH, reference.next_token_loss, dtype=torch.float64)
    said = str(failure.value)
    for word in ("vanishing", "blocks", "cause:", "do:", "threshold:", "arXiv:1611.01232"):
        assert word in said
    assert said.splitlines()[-1].startswith("If this is meant to be so: assert_healthy(..., allow=[")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("detached", "and in none did a gradient come to its"),
        ("not finite", "the activation of 2 holds 32 NaN or infinite elements"),
    ],
)
def test_a_planted_fault_is_found_at_its_layer(fault: str, says: str) -> None:
    with pytest.raises(AssertionError) as failure:
        assert_healthy(lambda: blocks(fault), torch.randn(4, 8), mean_square)
    assert says in str(failure.value)
    assert "  2 was called" in str(failure.value) or fault != "detached"


def allowing(*allow: str, fault: str = "not finite") -> None:
    assert_healthy(lambda: blocks(fault), torch.randn(4, 8), mean_square, allow=allow)


def test_what_is_allowed_passes_and_what_is_not_fails() -> None:
    allowing(*RULES)
    allowing("**")
    with pytest.raises(AssertionError):
        allowing("4")  # another layer
    with pytest.raises(AssertionError):
        allowing("massive_activations")  # another rule
    with pytest.raises(AssertionError):
        allowing("massive_activations:**")


def test_the_line_that_the_message_ends_with_is_right() -> None:
    with pytest.raises(AssertionError) as failure:
        allowing()
    names = str(failure.value).splitlines()[-1].partition("allow=")[2].rstrip(")")
    allowing(*(name.strip("[' ]") for name in names.split(",")))


def test_a_severity_can_be_let_pass() -> None:
    def check(fail_on: str) -> None:
        assert_healthy(
            lambda: make("no_skip_pre_norm"),
            BATCH,
            reference.next_token_loss,
            fail_on=fail_on,  # type: ignore[arg-type]
        )

    with pytest.raises(AssertionError):
        check("warning")
    with pytest.raises(ValueError, match="fail_on='warnings' is none of 'critical'"):
        check("warnings")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("massive_activation", "Did you mean 'massive_activations'"),
        ("bloks.0", "matches no measured layer"),
        ("masive:**", "'masive' names no rule"),
        ("saturation:blks.*", "'blks.*' names no rule and matches no measured layer"),
    ],
)
def test_a_misspelt_allowance_is_no_silent_pass(word: str, says: str) -> None:
    with pytest.raises(ValueError, match="names no rule") as error:
        assert_healthy(make, BATCH, reference.next_token_loss, replicates=1, allow=word)
    assert says in str(error.value)


def test_thresholds_are_the_callers() -> None:
    strict = {"vanishing": {"nats": 1e-6}, "exploding": {"nats": 1e-6}}
    with pytest.raises(AssertionError, match="given by the caller"):
        assert_healthy(make, BATCH, reference.next_token_loss, thresholds=strict)
