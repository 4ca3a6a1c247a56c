"""Models that add the outputs of their blocks to the stream themselves, or keep a block in a list."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_architecture import WIDTH, rows
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.architecture import architecture
from gradscope.experiment.effective_depth import effective_depth
from gradscope.experiment.paths import path_spectrum

X = rows(3, 4, WIDTH).double()
BLOCKS = 3


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(torch.softmax(q @ k.mT, -1) @ v)


class Model(nn.Module):
    """Its forward takes the numbers of branches that are detached."""

    def __init__(self, embedded: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH) if embedded else nn.Identity()
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))
        self.make()

    def make(self) -> None:
        raise NotImplementedError

    def branches(self) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, x: Tensor, without: int = -1, inside: bool = False) -> Tensor:
        x = x if inside else self.embed(x)
        for number, branch in enumerate(self.branches()):
            f = branch(x)
            x = x + (f.detach() if number == without else f)
        return self.head(x)


class InLists(Model):
    """``for attention, feed_forward in self.layers``, as many research codes have it."""

    def make(self) -> None:
        self.layers = nn.ModuleList(nn.ModuleList([Attention(), FeedForward()]) for _ in range(BLOCKS))

    def branches(self) -> list[nn.Module]:
        return [part for layer in self.layers for part in layer]


class Outside(Model):
    """``x = x + block(x)``."""

    def make(self) -> None:
        self.blocks = nn.ModuleList(FeedForward() for _ in range(BLOCKS))

    def branches(self) -> list[nn.Module]:
        return list(self.blocks)


class TwoLists(Model):
    def make(self) -> None:
        self.attentions = nn.ModuleList(Attention() for _ in range(BLOCKS))
        self.feed_forwards = nn.ModuleList(FeedForward() for _ in range(BLOCKS))

    def branches(self) -> list[nn.Module]:
        pairs = zip(self.attentions, self.feed_forwards, strict=True)
        return [part for pair in pairs for part in pair]


class Linears(Model):
    """A residual stack of linear layers, with the activation in the forward."""

    def make(self) -> None:
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))

    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        return [lambda x, layer=layer: torch.tanh(layer(x)) for layer in self.layers]


def cubes(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(3).mean()


@pytest.mark.parametrize("kind", [InLists, Outside, TwoLists, Linears])
def test_the_stream_is_what_enters_the_blocks(kind: type[Model]) -> None:
    model = kind().double()
    h = model.embed(X).detach().requires_grad_()

    def gradient(without: int) -> Tensor:
        return torch.autograd.grad(model(h, without, inside=True).pow(3).mean(), h)[0]

    g, n = gradient(-1), len(model.branches())
    expected = sum(1 - float((g * gradient(i)).sum() / g.square().sum()) for i in range(n))
    found = effective_depth(model, X, cubes, spectrum=True)
    assert found.value == pytest.approx(expected, rel=1e-11)
    assert found.branches == n
    assert abs(found.value) > 0.05
    cut = effective_depth(model, X, cubes, max_bytes=40_000)
    assert cut.value == pytest.approx(expected, rel=1e-11)


def test_names_and_kinds() -> None:
    found = architecture(InLists(), X.float())
    assert found.status == "ok"
    assert found.branches == tuple(f"layers.{i}.{j}" for i in range(3) for j in range(2))
    assert {s.kind for s in found.sublayers} == {"pre-norm"}
    found = architecture(Outside(), X.float())
    assert found.branches == ("blocks.0", "blocks.1", "blocks.2")
    assert {(s.kind, s.skip_coefficient) for s in found.sublayers} == {("pre-norm", 1.0)}
    found = architecture(TwoLists(), X.float())
    assert found.branches[:2] == ("attentions.0", "feed_forwards.0")
    assert {s.status for s in found.sublayers} == {"ok"}
    spectrum = path_spectrum(Outside().double(), X, cubes)
    assert spectrum.positions == (
        "input of blocks.0",
        "stream behind blocks.0",
        "stream behind blocks.1",
        "stream behind blocks.2",
    )


@pytest.mark.parametrize("kind", [InLists, Outside, TwoLists, Linears])
def test_an_input_without_a_gradient_outside_of_the_first_block(kind: type[Model]) -> None:
    model = kind(embedded=False).double()
    with pytest.raises(MeasureError, match=r"requires no gradient.*batch\.requires_grad_\(\)"):
        effective_depth(model, X, cubes)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return cubes(model, batch.requires_grad_())

    found = effective_depth(model, X, loss)
    assert found.branches == len(model.branches())


def test_a_norm_on_the_stream_between_blocks() -> None:
    class PostNorm(Outside):
        def forward(self, x: Tensor, without: int = -1, inside: bool = False) -> Tensor:
            x = x if inside else self.embed(x)
            for number, block in enumerate(self.blocks):
                f = block(x)
                x = nn.functional.layer_norm(x + (f.detach() if number == without else f), (WIDTH,))
            return self.head(x)

    model = PostNorm().double()
    h = model.embed(X).detach().requires_grad_()

    def gradient(without: int) -> Tensor:
        return torch.autograd.grad(model(h, without, inside=True).pow(3).mean(), h)[0]

    g = gradient(-1)
    expected = sum(1 - float((g * gradient(i)).sum() / g.square().sum()) for i in range(3))
    assert effective_depth(model, X, cubes).value == pytest.approx(expected, rel=1e-11)


def test_norms_outside_of_the_blocks_too_are_refused() -> None:
    """What enters a block is then no stream position: x = x + block(norm(x))."""

    class Norms(Outside):
        def make(self) -> None:
            super().make()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(BLOCKS))

        def forward(self, x: Tensor, without: int = -1, inside: bool = False) -> Tensor:
            x = self.embed(x)
            for norm, block in zip(self.norms, self.blocks, strict=True):
                x = x + block(norm(x))
            return self.head(x)

    found = architecture(Norms(), X.float())
    assert {s.status for s in found.sublayers} == {"unproved"}
    assert not any(s.skip for s in found.sublayers)
    with pytest.raises(MeasureError):
        effective_depth(Norms().double(), X, cubes)


def test_a_chain_of_linear_layers_with_activations_between() -> None:
    class Chain(Linears):
        def forward(self, x: Tensor, without: int = -1, inside: bool = False) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.head(x)

    found = effective_depth(Chain(embedded=False).double(), X, cubes)
    assert found.value == pytest.approx(3, rel=1e-12)
    assert found.branches == 3
