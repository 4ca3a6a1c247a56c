"""What each branch adds to D: against the gradient with that branch's backward deleted by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradscope
from gradscope import reference
from gradscope.errors import MeasureError
from gradscope.experiment import contributions

WIDTH = 6


def rms(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def attend(x: Tensor, w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x @ w, x, x)


class Branch(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, self.weight) if self.kind == "attention" else torch.tanh(x @ self.weight)


class Block(nn.Module):
    """One block in one of several placements; ``cut`` detaches the branch of that number."""

    def __init__(self, placement: str) -> None:
        super().__init__()
        self.placement = placement
        self.attention, self.mlp = Branch("attention"), Branch("mlp")
        self.cut: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        def cut(number: int, value: Tensor) -> Tensor:
            return value.detach() if self.cut == number else value

        if self.placement == "parallel":
            h = rms(x)
            return x + cut(0, self.attention(h)) + cut(1, self.mlp(h))
        for number, branch in enumerate((self.attention, self.mlp)):
            if self.placement == "pre":
                x = x + cut(number, branch(rms(x)))
            elif self.placement == "post":
                x = rms(x + cut(number, branch(x)))
            elif self.placement == "peri":
                x = x + cut(number, rms(branch(rms(x))))
            else:
                x = cut(number, branch(x))
        return x


class Net(nn.Module):
    def __init__(self, placement: str, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block(placement) for _ in range(blocks))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
C = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loss(model: Any, batch: Tensor) -> Tensor:
    return (model(batch) * C[: len(batch)]).sum()


def by_deletion(net: Net) -> list[float]:
    """e_i = 1 − ⟨g, g_without_i⟩/‖g‖², each g by autograd with one branch detached."""

    def gradient() -> Tensor:
        h = net.embed(X).detach().requires_grad_()
        x = h
        for block in net.blocks:
            x = block(x)
        if not x.requires_grad:
            return torch.zeros_like(h)
        (g,) = torch.autograd.grad((x * C).sum(), h, allow_unused=True)
        return torch.zeros_like(h) if g is None else g

    g = gradient()
    found: list[float] = []
    for block in net.blocks:
        for number in range(2):
            block.cut = number
            found.append(float(1 - (g * gradient()).sum() / g.square().sum()))
            block.cut = None
    return found


@pytest.mark.parametrize("placement", ["pre", "post", "peri", "parallel", "chain"])
def test_each_is_that_of_deleting_the_branch(placement: str) -> None:
    net = Net(placement)
    depth = gradscope.effective_depth(net, X, loss, branches=True)
    shares = depth.contributions
    assert shares is not None and shares.algorithm == "forward mode"
    assert shares.value == pytest.approx(by_deletion(net), rel=1e-10, abs=1e-12)
    assert shares.total == pytest.approx(depth.value, rel=1e-10)
    assert shares.stream_difference < 1e-12
    assert [(b.depth, b.sublayer) for b in shares.branches][:3] == (
        [(1, 0), (1, 0), (2, 0)] if placement == "parallel" else [(1, 0), (1, 1), (2, 0)]
    )
    if placement != "chain":
        assert [b.module for b in shares.branches[:2]] == ["blocks.0.attention", "blocks.0.mlp"]
    else:
        assert shares.value == pytest.approx(np.ones(6), abs=1e-12)


def test_what_follows_from_them() -> None:
    shares = gradscope.effective_depth(Net("pre"), X, loss, branches=True).contributions
    assert shares is not None
    e = shares.value
    assert shares.share == pytest.approx(e / e.sum())
    positive = np.maximum(e, 0)
    p = positive[positive > 0] / positive.sum()
    assert shares.participation == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    where = np.array([1, 1, 2, 2, 3, 3])
    assert shares.depth_score == pytest.approx((where * e).sum() / e.sum())
    assert shares.by_block == pytest.approx({f"blocks.{i}": e[2 * i : 2 * i + 2].sum() for i in range(3)})
    assert "blocks.2.mlp" in str(shares)


class OneWay(torch.autograd.Function):
    """The tangent hyperbolic, without a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grads[0] * (1 - y * y)


def test_where_forward_mode_is_impossible_each_branch_has_a_pass_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without(self: Branch, x: Tensor) -> Tensor:
        return OneWay.apply(x @ self.weight)  # type: ignore[no-untyped-call,no-any-return]

    monkeypatch.setattr(Branch, "forward", without)
    net = Net("pre")
    with pytest.warns(gradscope.GradscopeWarning, match="a backward pass for each of 6 branches"):
        depth = gradscope.effective_depth(net, X, loss, branches=True)
    shares = depth.contributions
    assert shares is not None and shares.algorithm == "one backward pass per branch"
    assert shares.value == pytest.approx(by_deletion(net), rel=1e-10, abs=1e-12)


def test_named_branches_have_a_pass_each() -> None:
    net = Net("pre")
    with pytest.warns(gradscope.GradscopeWarning, match="named branches"):
        depth = gradscope.effective_depth(
            net, X, loss, branches=True, modules=["blocks.*.attention", "blocks.*.mlp"]
        )
    assert depth.contributions is not None
    assert depth.contributions.value == pytest.approx(by_deletion(net), rel=1e-10, abs=1e-12)
    assert [b.module for b in depth.contributions.branches[:2]] == ["blocks.0.attention", "blocks.0.mlp"]


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm", "rezero", "layerscale", "no_skip"])
def test_reference_models_need_no_second_way(variant: str) -> None:
    torch.manual_seed(0)
    model = reference.Transformer(variant, depth=3).double()
    tokens = torch.randint(256, (4, 17))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = gradscope.effective_depth(
            model, (tokens[:, :-1], tokens[:, 1:]), reference.next_token_loss, branches=True
        )
    assert depth.contributions is not None
    assert depth.contributions.total == pytest.approx(depth.value, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_gpt2_with_twelve_layers(dtype: torch.dtype, tolerance: float) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=12, n_embd=24, n_head=2, vocab_size=50, n_positions=16)
    model = GPT2LMHeadModel(config).to(dtype).eval()
    ids = torch.randint(50, (2, 12))

    def own_loss(model: Any, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    depth = gradscope.effective_depth(model, ids, own_loss, branches=True)
    shares = depth.contributions
    assert shares is not None and shares.algorithm == "forward mode" and len(shares.branches) == 24
    assert shares.total == pytest.approx(depth.value, rel=tolerance)


def test_a_sum_that_is_not_the_depth_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., Any] = contributions.forward_mode

    def wrong(*args: Any, **kwargs: Any) -> Any:
        products = plain(*args, **kwargs)
        for operand in products.operands:
            products.operands[operand] = 1.01 * products.operands[operand]
        return products

    monkeypatch.setattr(contributions, "forward_mode", wrong)
    with pytest.raises(MeasureError, match="one by one"):
        gradscope.effective_depth(Net("pre"), X, loss, branches=True)


def test_a_forward_pass_that_does_not_meet_the_backward_pass_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain: Callable[..., Any] = contributions.forward_mode

    def wrong(*args: Any, **kwargs: Any) -> Any:
        products = plain(*args, **kwargs)
        products.stream[2] = products.stream[2] * 1.01
        return products

    monkeypatch.setattr(contributions, "forward_mode", wrong)
    with pytest.warns(gradscope.GradscopeWarning, match="differ by"):
        depth = gradscope.effective_depth(Net("pre"), X, loss, branches=True)
    assert depth.contributions is not None
    assert depth.contributions.value == pytest.approx(by_deletion(Net("pre")), rel=1e-10, abs=1e-12)
