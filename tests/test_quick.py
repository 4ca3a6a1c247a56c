"""The quick way of the hooks against the other way, which the tests of odd models hold against autograd.

Each case trains two steps, the second of them without slow statistics; everything recorded must be the
same in both ways.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import no_faults as no_faults  # a fixture of every test here
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradscope
from gradscope.collect import quick
from gradscope.record import Record

pytestmark = pytest.mark.skipif(not quick.available(), reason="the extension module was not built")
WIDTH, DEPTH = 8, 3


class Block(nn.Module):
    """x + tanh(Wx), and then whatever the case does to it."""

    def __init__(self, after: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.after = after

    def forward(self, x: Any) -> Any:
        x = x[0] if isinstance(x, tuple) else x
        x = x + self.mlp(x)
        return x if self.after is None else self.after(x)


class Net(nn.Module):
    def __init__(self, blocks: Any, between: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.between = between
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.between is not None:
                x = self.between(x)
        return self.head(x[0] if isinstance(x, tuple) else x)


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Mine(Tensor):
    pass


def net(after: Callable[[Tensor], Any] | None = None, between: Callable[[Any], Any] | None = None) -> Net:
    return Net([Block(after) for _ in range(DEPTH)], between)


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def twice(model: nn.Module, x: Tensor) -> None:
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def through_what_is_hidden(model: Any, x: Tensor) -> None:
    model(x)
    model.hidden.square().mean().backward()


def accumulated(model: nn.Module, x: Tensor) -> None:
    backward(model, x)
    backward(model, 2 * x)


def together(model: nn.Module, x: Tensor) -> None:
    (model(x).square().mean() + model(2 * x).square().mean()).backward()


def cut_off(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(RuntimeError):
        model(x[..., :-1])
    backward(model, x)


def evaluated(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)
    backward(model, x)


def in_a_thread(model: nn.Module, x: Tensor) -> None:
    thread = threading.Thread(target=backward, args=(model, x))
    thread.start()
    thread.join()


def beside_a_thread(model: Net, x: Tensor) -> None:
    """While the forward runs, another thread calls a block."""

    def meanwhile(value: Any) -> Any:
        thread = threading.Thread(target=model.blocks[1], args=(x,))
        thread.start()
        thread.join()
        return value

    model.between = meanwhile
    backward(model, x)


def under_autocast(model: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).square().mean()
    loss.backward()


def under_a_mode(model: nn.Module, x: Tensor) -> None:
    with Counting():
        backward(model, x)


def transformed(model: nn.Module, x: Tensor) -> None:
    torch.func.grad(lambda y: model(y).square().mean())(x)
    torch.func.vmap(model)(x)
    backward(model, x)


def penalized(model: nn.Module, x: Tensor) -> None:
    x = x.requires_grad_(True)
    (slope,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    slope.square().sum().backward()


class Checkpointed(Block):
    reentrant = False

    def forward(self, x: Any) -> Any:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


def from_an_input(model: nn.Module, x: Tensor) -> None:
    backward(model, x.requires_grad_(True))


def scaled(x: Tensor) -> Tensor:
    return x.mul_(1.5)


def spoiled(x: Tensor) -> Tensor:
    return torch.where(torch.arange(WIDTH) == 3, torch.inf, x)


def mixed() -> Net:
    """Blocks that share one module, which is called at every depth."""
    block = Block()
    return Net([block, block, Block()])


class Unused(Net):
    """The last block reads what the one before the last has read, whose output goes nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:-2]:
            x = block(x)
        self.blocks[-2](x)
        return self.head(self.blocks[-1](x))


class Forces(Net):
    """Hands out the slope of what it computes: a backward pass inside of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_(True)
        (slope,) = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)
        return slope


class Transforming(Net):
    """Runs a block inside of a transform of something else, beside its forward."""

    def forward(self, x: Tensor) -> Tensor:
        mapped = torch.func.vmap(lambda y: self.blocks[0](x).sum() + y.sum())(x)
        return super().forward(x) + mapped.mean()


class Hidden(Net):
    """Keeps what its last block gave."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        self.hidden = self.blocks[-1](x)
        return found


def with_identity() -> Net:
    return Net([nn.Sequential(Block(), nn.Identity()) for _ in range(DEPTH)])


def half() -> Net:
    return net().to(torch.bfloat16)


def frozen() -> Net:
    model = net()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].mlp[0].bias.requires_grad_(False)
    return model


#: case -> (model, training, whether the quick way takes any forward, and any gradient).
CASES: dict[str, tuple[Callable[[], Net], Callable[[Any, Tensor], None], bool, bool]] = {
    "plain": (net, backward, True, True),
    "tuples": (lambda: net(lambda x: (x, None)), backward, True, True),
    "two tensors": (lambda: net(lambda x: (x, x.sum())), backward, True, True),
    "a dict": (lambda: net(lambda x: {"hidden": x}, lambda found: found["hidden"]), backward, True, True),
    "in place behind each block": (lambda: net(None, scaled), backward, True, True),
    "in place inside": (lambda: net(scaled), backward, True, True),
    "not contiguous": (
        lambda: net(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
        backward,
        True,
        True,
    ),
    "a subclass": (lambda: net(lambda x: x.as_subclass(Mine)), backward, True, True),
    "not finite": (lambda: net(spoiled), backward, False, False),
    "a large mean": (lambda: net(lambda x: x.detach() * 0 + 1e4 + 1e-4 * x), backward, True, True),
    "constant": (lambda: net(torch.ones_like), backward, True, False),
    "no gradient": (lambda: net(torch.detach), backward, True, True),
    "a block whose output goes nowhere": (
        lambda: Unused(Block() for _ in range(4)),
        backward,
        True,
        True,
    ),
    "a view": (lambda: net(lambda x: x.view(10, WIDTH).view(2, 5, WIDTH)), backward, True, True),
    "a view that is written to": (
        lambda: net(lambda x: x.view(10, WIDTH).view(2, 5, WIDTH), scaled),
        backward,
        True,
        True,
    ),
    "shared": (mixed, backward, True, True),
    "identity": (with_identity, backward, True, True),
    "bfloat16": (half, backward, True, True),
    "frozen": (frozen, backward, True, True),
    "autocast": (net, under_autocast, True, True),
    "two backward passes": (net, twice, True, True),
    "accumulation": (net, accumulated, True, True),
    "two forwards, one backward": (net, together, True, True),
    "a forward that raises": (net, cut_off, True, True),
    "an evaluation": (net, evaluated, True, True),
    "a thread": (net, in_a_thread, True, True),
    "beside a thread": (net, beside_a_thread, True, True),
    "a dispatch mode": (net, under_a_mode, False, False),
    "functorch": (net, transformed, True, True),
    "functorch inside": (lambda: Transforming(Block() for _ in range(DEPTH)), backward, True, True),
    "a hidden loss": (lambda: Hidden(Block() for _ in range(DEPTH)), through_what_is_hidden, True, True),
    "forces": (lambda: Forces(Checkpointed() for _ in range(DEPTH)), backward, True, True),
    "gradient penalty": (net, penalized, True, True),
    "checkpoints": (lambda: Net([Checkpointed() for _ in range(DEPTH)]), backward, True, True),
    "re-entrant checkpoints": (
        lambda: Net([Reentrant() for _ in range(DEPTH)]),
        from_an_input,
        True,
        True,
    ),
}


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """What the quick way takes, by kind."""
    taken: Counter[str] = Counter()
    made = quick._native.Quick

    class Counted:
        def __init__(self, **options: Any) -> None:
            self._way = made(**options)

        def __getattr__(self, name: str) -> Any:
            def call(*args: Any) -> Any:
                found = getattr(self._way, name)(*args)
                taken[name] += found is True
                return found

            return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick, "_native", SimpleNamespace(Quick=Counted))
        yield taken


def trained(
    make: Callable[[], Net], step: Callable[[Any, Tensor], None], layers: str | None = "**"
) -> Record:
    torch.manual_seed(0)
    model = make()
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 5, WIDTH).to(dtype)
    scope = gradscope.watch(model, layers=layers, warn=False)
    for _ in range(2):
        step(model, x)
        optimizer.step()
        optimizer.zero_grad()
    scope.close()
    return scope.record


def table(record: Record, step: int) -> list[tuple[Any, ...]]:
    found = record.steps[step]
    rows, words = found.rows, [found.statuses[i] for i in found.status]
    depth = map(str, rows.depth)  # NaN is not equal to itself
    return list(zip(rows.layer, depth, rows.call, rows.signal, rows.statistic, words, strict=True))


def compared(
    make: Callable[[], Net], step: Callable[[Any, Tensor], None], layers: str | None
) -> Counter[str]:
    with counted() as taken:
        found = trained(make, step, layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick, "_native", None)
        expected = trained(make, step, layers)
    assert len(found.steps) == len(expected.steps) == 2
    for n in range(2):
        assert table(found, n) == table(expected, n)
        np.testing.assert_allclose(found.steps[n].value, expected.steps[n].value, rtol=1e-12, atol=0)
    assert found.header == expected.header
    return taken


@pytest.mark.parametrize("case", CASES)
def test_both_ways_record_the_same(case: str) -> None:
    make, step, forwards, gradients = CASES[case]
    taken = compared(make, step, "**")
    assert (taken["forward"] > 0, taken["gradient"] > 0) == (forwards, gradients), taken


@pytest.mark.parametrize("make", [net, mixed])
def test_branches_have_the_same_places(make: Callable[[], Net]) -> None:
    assert compared(make, backward, None)["forward"] > 0
