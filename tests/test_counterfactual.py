"""Cuts of skips and branches against the same nets with the cut written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradscope
from gradscope import reference
from gradscope.errors import MeasureError

WIDTH = 6


def rms(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


class Block(nn.Module):
    """One block; ``cut`` names what is detached, or replaced by zeros, by hand."""

    def __init__(self, placement: str) -> None:
        super().__init__()
        self.placement = placement
        self.first, self.second = Mlp(), Mlp()
        self.cut: tuple[str, int] | None = None
        self.forwards = False

    def keep(self, what: str, number: int, value: Tensor) -> Tensor:
        if self.cut != (what, number):
            return value
        return torch.zeros_like(value) if self.forwards else value.detach()

    def forward(self, x: Tensor) -> Tensor:
        if self.placement == "parallel":
            h = rms(x)
            a, b = self.keep("branch", 0, self.first(h)), self.keep("branch", 1, self.second(h))
            return self.keep("skip", 0, x) + a + b
        for number, mlp in enumerate((self.first, self.second)):
            inner = x if self.placement in ("post", "plain") else rms(x)
            branch = self.keep("branch", number, mlp(inner))
            x = self.keep("skip", number, x) + branch
            if self.placement == "post":
                x = rms(x)
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


def by_hand(net: Net) -> tuple[float, Tensor]:
    """The loss, and the gradient at the input of the first block."""
    h = net.embed(X).detach().requires_grad_()
    x = h
    for block in net.blocks:
        x = block(x)
    value = (x * C).sum()
    (g,) = torch.autograd.grad(value, h)
    return value.item(), g


@pytest.mark.parametrize("placement", ["pre", "post", "plain", "parallel"])
def test_every_cut_is_that_of_the_net_written_out(placement: str) -> None:
    net = Net(placement)
    found = gradscope.counterfactual(net, X, loss)
    value, g = by_hand(net)
    assert found.loss == pytest.approx(value, rel=1e-12)
    assert len(found.cuts) == 3 * (3 if placement == "parallel" else 4)
    for cut in found.cuts:
        block = net.blocks[cut.depth - 1]
        number = cut.sublayer
        if placement == "parallel" and cut.what == "branch":
            number = ["first", "second"].index(cut.module.rpartition(".")[2])
        block.cut = (cut.what, number)
        _, cut_g = by_hand(net)
        block.forwards = True
        cut_value, forward_g = by_hand(net)
        block.cut, block.forwards = None, False
        assert cut.gradient_ratio == pytest.approx(float(cut_g.norm() / g.norm()), rel=1e-10)
        expected = float(F.cosine_similarity(cut_g.flatten(), g.flatten(), 0))
        assert cut.gradient_cosine == pytest.approx(expected, rel=1e-10)
        assert cut.status == "ok", cut
        assert cut.loss_change == pytest.approx(cut_value - value, rel=1e-9, abs=1e-12)
        assert cut.forward_ratio == pytest.approx(float(forward_g.norm() / g.norm()), rel=1e-9)


@pytest.mark.parametrize("placement", ["pre", "post", "plain"])
def test_without_all_skips_the_gradient_is_that_of_the_branches_alone(placement: str) -> None:
    net = Net(placement)
    found = gradscope.counterfactual(net, X, loss, forward=False)
    assert {cut.status for cut in found.cuts} == {"not asked for"}

    def profile(cut: bool) -> list[float]:
        h = net.embed(X).detach().requires_grad_()
        stream = [h]
        for block in net.blocks:
            x = stream[-1]
            for mlp in (block.first, block.second):
                skip = x.detach() if cut else x
                inner = x if placement in ("post", "plain") else rms(x)
                x = skip + mlp(inner)
                x = rms(x) if placement == "post" else x
            stream.append(x)
        return [g.norm().item() for g in torch.autograd.grad((stream[-1] * C).sum(), stream)]

    assert found.gradient_l2 == pytest.approx(profile(False), rel=1e-10)
    assert found.without_skips_l2 == pytest.approx(profile(True), rel=1e-10)
    assert found.without_skips_l2[-1] == found.gradient_l2[-1]
    assert len(found.positions) == 4


def test_the_headline_on_a_reference_model() -> None:
    torch.manual_seed(0)
    model = reference.Transformer("skip", depth=8).double()
    tokens = torch.randint(256, (2, 17))
    found = gradscope.counterfactual(
        model, (tokens[:, :-1], tokens[:, 1:]), reference.next_token_loss, forward=False
    )
    # The same weights: with skips the gradient arrives, without them it is gone.
    assert found.gradient_l2[0] > 0.5 * found.gradient_l2[-1]
    assert found.without_skips_l2[0] < 1e-6 * found.without_skips_l2[-1]
    assert (np.diff(np.log(found.without_skips_l2)) > 1).all()
    assert "without skips" in str(found)


def test_a_branch_of_gpt2_by_a_hook() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=40, n_positions=16)
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(40, (2, 9))

    def own(model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids).logits.square().mean()

    found = gradscope.counterfactual(model, ids, own)
    cut = next(c for c in found.cuts if c.module == "transformer.h.1.mlp")
    handle = model.transformer.h[1].mlp.register_forward_hook(lambda m, a, o: torch.zeros_like(o))
    with torch.no_grad():
        expected = own(model, ids).item() - found.loss
    handle.remove()
    assert cut.status == "ok"
    assert cut.loss_change == pytest.approx(expected, rel=1e-9)


def test_a_layer_without_a_skip_has_no_skip_to_cut() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double()
    found = gradscope.counterfactual(net, X, lambda m, b: m(b).square().sum())
    assert {cut.what for cut in found.cuts} == {"branch"}
    assert [cut.gradient_ratio for cut in found.cuts] == [0.0] * 3
    assert {cut.status for cut in found.cuts} == {"no single addition joins it to the stream"}


def test_an_addition_in_place_is_absent_with_the_reason() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            y += x
            return y

    net = nn.Sequential(*(InPlace() for _ in range(3))).double()
    found = gradscope.counterfactual(net, X, lambda m, b: m(b).square().sum())
    assert {cut.status for cut in found.cuts} == {
        "the addition is in place, or inside of a function of torch"
    }
    assert all(np.isnan(cut.loss_change) for cut in found.cuts)


def test_dropout_and_a_vanished_gradient_are_refused() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)))
    with pytest.raises(MeasureError, match=r"model.eval\(\)"):
        gradscope.counterfactual(net, X.float(), lambda m, b: m(b).sum())
    with pytest.raises(MeasureError, match="nothing to compare"):
        gradscope.counterfactual(Net("pre"), X, lambda m, b: 0 * m(b).sum())


def test_a_skip_that_cannot_be_proved_is_refused_with_what_can_be_done_here() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.inner(x)) + self.inner(x)

    net = nn.ModuleDict({"blocks": nn.Sequential(*(Gated() for _ in range(3)))}).double()
    with pytest.raises(MeasureError, match="It is not known what is a residual branch") as refused:
        gradscope.counterfactual(net, X, lambda m, b: m["blocks"](b).square().sum())
    assert "modules=" not in str(refused.value)  # which it does not take


def test_a_pass_that_runs_differently_is_not_believed() -> None:
    class Changing(Net):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).runs += 1
            x = super().forward(x)
            return x + 0 if type(self).runs > 1 else x  # one addition more in every later pass

    found = gradscope.counterfactual(Changing("pre"), X, loss)
    assert {c.status for c in found.cuts} == {"the addition was not met again in the pass with the cut"}


def test_another_addition_in_its_place_is_not_cut() -> None:
    class Shifted(Net):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            # As many additions in every pass, but in the later ones the first is another.
            Shifted.runs += 1
            x = self.embed(x)
            x = x + torch.zeros(()) if Shifted.runs > 1 else x
            for block in self.blocks:
                x = block(x)
            return x + torch.zeros(()) if Shifted.runs == 1 else x

    found = gradscope.counterfactual(Shifted("pre"), X, loss)
    assert {c.status for c in found.cuts} == {"the addition was not met again in the pass with the cut"}
    assert all(np.isnan(c.loss_change) and np.isnan(c.forward_ratio) for c in found.cuts)


def test_a_cut_that_leaves_nothing_finite_is_absent() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            nn.init.zeros_(self.inner.bias)
            nn.init.zeros_(self.inner.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    net = nn.Sequential(*(Zero() for _ in range(3))).double()
    found = gradscope.counterfactual(net, X, lambda m, b: (rms(m(b)) * C[..., :4]).sum())
    skips = [c for c in found.cuts if c.what == "skip"]
    assert {c.status for c in skips} == {"the loss or the gradient with the cut is not finite"}
    assert all(np.isnan(c.loss_change) for c in skips)


def test_a_subtracted_branch() -> None:
    class Minus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x - torch.tanh(self.inner(x))

    torch.manual_seed(0)
    net = nn.Sequential(*(Minus() for _ in range(2))).double()

    def value(model: Any, batch: Tensor) -> Tensor:
        return model(batch).pow(3).sum()

    found = gradscope.counterfactual(net, X, value)
    skip = next(c for c in found.cuts if c.what == "skip")
    x = -torch.tanh(net[0].inner(X))
    expected = (x - torch.tanh(net[1].inner(x))).pow(3).sum().item() - found.loss
    assert skip.status == "ok"
    assert skip.loss_change == pytest.approx(expected, rel=1e-10)


def test_an_addition_with_a_factor() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.add(x, torch.tanh(self.inner(x)), alpha=0.3)

    torch.manual_seed(0)
    net = nn.Sequential(*(Half() for _ in range(2))).double()

    def value(model: Any, batch: Tensor) -> Tensor:
        return model(batch).pow(3).sum()

    found = gradscope.counterfactual(net, X, value)
    skip = next(c for c in found.cuts if c.what == "skip")
    expected = net[1](0.3 * torch.tanh(net[0].inner(X))).pow(3).sum().item() - found.loss
    assert skip.status == "ok"
    assert skip.loss_change == pytest.approx(expected, rel=1e-10)


def test_the_plots_show_the_arrays() -> None:
    net = Net("pre")
    found = gradscope.counterfactual(net, X, loss, forward=False)
    ax = gradscope.plot.counterfactual(found)
    lines = [line.get_ydata() for line in ax.lines[:2]]
    np.testing.assert_allclose(lines[0], found.gradient_l2)
    np.testing.assert_allclose(lines[1], found.without_skips_l2)
    assert ax.get_yscale() == "log"
    depth = gradscope.effective_depth(net, X, loss, branches=True, spectrum=True)
    assert depth.contributions is not None and depth.spectrum is not None
    ax = gradscope.plot.contributions(depth.contributions)
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in ax.patches}
    assert [heights[i] for i in range(6)] == pytest.approx(depth.contributions.value)
    ax = gradscope.plot.path_lengths(depth.spectrum)
    energy = np.square(depth.spectrum.norm)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), energy / energy.sum())
    np.testing.assert_allclose(ax.lines[1].get_ydata(), np.array([1, 6, 15, 20, 15, 6, 1]) / 64)


def test_every_pass_has_a_batch_of_its_own() -> None:
    def takes(model: Any, batch: Any) -> Tensor:
        return loss(model, batch.pop("x").mul_(0.5))

    batch = {"x": X.clone()}
    found = gradscope.counterfactual(Net("pre"), batch, takes)
    plain = gradscope.counterfactual(Net("pre"), X / 2, loss)
    assert found.cuts == plain.cuts
    assert torch.equal(batch["x"], X)
