"""Small networks with one fault planted in them, and the same networks without it.

`PLANTED` has one fault for every health rule: a function of "with the fault or without" that gives the
diagnosis, and the layer where the fault is. The twin differs by the fault alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradscope
from gradscope.analysis.diagnosis import Diagnosis, Finding, diagnose
from gradscope.record import Record
from gradscope.reference import Transformer, next_token_loss

WIDTH: Final = 16


# -- models and loops ----------------------------------------------------------------------------


class Chain(nn.Module):
    """embed -> blocks -> head."""

    def __init__(self, *blocks: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def orthogonal(gain: float = 1.0, width: int = WIDTH) -> nn.Linear:
    """Multiplies every signal, forward and backward, by exactly the gain."""
    linear = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        linear.weight.copy_(gain * nn.init.orthogonal_(torch.empty(width, width)))
    return linear


def relu_block(bias: float = 0.0) -> nn.Module:
    linear = nn.Linear(WIDTH, WIDTH)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.constant_(linear.bias, bias)
    return nn.Sequential(linear, nn.ReLU())


def tanh_block(gain: float = 1.0, kind: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(orthogonal(gain), kind())


class Residual(nn.Module):
    """x + F(norm x)."""

    def __init__(self, branch: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = branch or nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def residual_chain(depth: int = 4) -> Chain:
    return Chain(*(Residual() for _ in range(depth)))


def data(seed: int = 0, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(9))
    while True:
        x = torch.randn(size, 4, generator=generator)
        yield x, (x @ teacher).argmax(-1)


def classified(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def measured(make: Callable[[], nn.Module], replicates: int = 3, **options: Any) -> Record:
    return gradscope.measure(make, next(data()), classified, replicates, **options)


def trained(
    model: nn.Module,
    steps: int = 30,
    *,
    before: Callable[[int, nn.Module], None] | None = None,
    batches: Iterator[tuple[Tensor, Tensor]] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    log: bool = True,
    **options: Any,
) -> Record:
    """Watch a training run; ``before(step, model)`` plants the fault."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-2)
    with gradscope.watch(model, warn=False, slow_every=2, **options) as scope:
        for step, batch in enumerate(islice(batches or data(), steps)):
            if before is not None:
                before(step, model)
            loss = classified(model, batch)
            if log:
                scope.log(loss=loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not scope.faults
    return scope.record


TOKENS: Final = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(3))
TEXT: Final = (TOKENS[:, :-1], TOKENS[:, 1:])


def transformer(variant: str, depth: int = 12, width: int = 32) -> Callable[[], Transformer]:
    return lambda: Transformer(variant, depth=depth, width=width, heads=2, vocabulary=32, context=16)


def read(make: Callable[[], nn.Module], replicates: int = 3) -> Diagnosis:
    """Of transformers at initialisation."""
    return diagnose(gradscope.measure(make, TEXT, next_token_loss, replicates))


def only(diagnosis: Diagnosis, name: str) -> Finding:
    found = diagnosis.of(name)
    assert len(found) == 1, f"{len(found)} findings of {name}\n{diagnosis}"
    return found[0]


def reasons(diagnosis: Diagnosis, name: str) -> str:
    return "; ".join(item.reason for item in diagnosis.not_checked if item.rule == name)


# -- one fault for every rule --------------------------------------------------------------------


class Poison(nn.Module):
    """Multiplies by infinity from a given call on; 0 · ∞ is NaN."""

    def __init__(self, inner: nn.Module, at: int) -> None:
        super().__init__()
        self.inner, self.at, self.calls = inner, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.inner(x)
        return y * math.inf if self.calls > self.at else y


def poisoned(fault: bool) -> Diagnosis:
    """A branch that gives NaN from step 7 on."""
    torch.manual_seed(0)
    model = residual_chain()
    model.blocks[2].mlp = Poison(model.blocks[2].mlp, 7 if fault else 10**6)
    return diagnose(trained(model, 12))


def overflowing(steps: Callable[[int], bool]) -> Diagnosis:
    """A gradient scaler that meets infinite gradients at some of 40 steps."""
    torch.manual_seed(0)
    model = residual_chain(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with gradscope.watch(model, warn=False) as scope:
        for step, batch in enumerate(islice(data(), 40)):
            loss = classified(model, batch)
            scaler.scale(loss * (math.inf if steps(step) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return diagnose(scope.record)


def half_precision(scale: float) -> Diagnosis:
    """A float16 network whose loss is scaled: its gradients are of that size."""
    torch.manual_seed(0)
    model = Chain(*(orthogonal() for _ in range(4))).half()
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).half()
    direction = torch.randn(64, 3, generator=torch.Generator().manual_seed(2)).half()
    record = gradscope.measure(
        model, [x], lambda m, b: (m(b).float() * direction.float() * scale).sum(), layers="blocks.*"
    )
    return diagnose(record)


def one_fast_branch(rate: float, **options: Any) -> Diagnosis:
    """A branch with a learning rate of its own."""
    torch.manual_seed(0)
    model = residual_chain()
    fast = list(model.blocks[1].mlp.parameters())
    slow = [p for p in model.parameters() if all(p is not q for q in fast)]
    optimizer = torch.optim.AdamW([{"params": slow}, {"params": fast, "lr": rate}], lr=1e-3)
    return diagnose(trained(model, 20, optimizer=optimizer), **options)


def one_bad_batch(at: int | None, **options: Any) -> Diagnosis:
    """A batch a hundred times too large, with wrong labels."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(data()):
            yield (100 * x, (y + 1) % 3) if i == at else (x, y)

    torch.manual_seed(0)
    model = Chain(*(relu_block() for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    return diagnose(trained(model, 60, batches=batches(), optimizer=optimizer, **options))


def kill_block_2(step: int, model: nn.Module) -> None:
    if step == 9:
        with torch.no_grad():
            model.blocks[2][0].bias.fill_(-1e6)


def killed(fault: bool) -> Diagnosis:
    """A ReLU block that dies at step 9."""
    torch.manual_seed(0)
    model = Chain(*(relu_block() for _ in range(5)))
    return diagnose(trained(model, 20, before=kill_block_2 if fault else None))


class Scaled(nn.Module):
    """x + α·F(x), α = 0 at first."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.alpha = nn.Parameter(torch.zeros(()), requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.mlp(x)


def rezero(learned: bool, steps: int) -> Diagnosis:
    torch.manual_seed(0)
    return diagnose(trained(Chain(*(Scaled(learned) for _ in range(3))), steps))


class Detached(Residual):
    """x + F(norm x), where no gradient gets into F, or back to x, or into either."""

    def __init__(self, cut: str = "") -> None:
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach() if self.cut == "input" else x
        y = self.mlp(self.norm(x))
        y = x + (y.detach() if self.cut == "branch" else y)
        return y.detach() if self.cut == "output" else y


def cut_chain(cut: str) -> Chain:
    torch.manual_seed(0)
    return Chain(*(Detached(cut if k == 2 else "") for k in range(4)))


def detached(fault: bool) -> Diagnosis:
    """One branch that is detached."""
    return diagnose(trained(cut_chain("branch" if fault else ""), 4))


def mostly_dead(bias: float) -> Record:
    """A ReLU block whose bias is far below zero."""
    return measured(lambda: Chain(relu_block(), relu_block(), relu_block(bias), relu_block()), 1)


def saturated(gain: float, kind: type[nn.Module] = nn.Tanh, **options: Any) -> Diagnosis:
    """A block whose weights are too large for its activation."""
    torch.manual_seed(0)
    model = Chain(*(tanh_block(gain if k == 1 else 1.0, kind) for k in range(4)))
    return diagnose(gradscope.measure(model, [next(data())], classified, **options))


class Massive(nn.Module):
    """A linear block that puts one large number into its output."""

    def __init__(self, size: float, gain: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.size = size
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        y = self.gain * (x + self.linear(x))
        if self.size:
            at = torch.zeros(y.shape)
            at[0, 3] = self.size
            y = y + at
        return y


def massive(size: float, gain: float = 1.0) -> Diagnosis:
    torch.manual_seed(0)
    model = Chain(Massive(0), Massive(0, gain), Massive(size), Massive(0), width=64)
    return diagnose(gradscope.measure(model, [next(data(size=256))], classified))


def tiny_queries_and_keys(scale: float) -> Diagnosis:
    """A block whose attention logits are next to nothing."""

    def make() -> nn.Module:
        model = transformer("pre_norm", 4)()
        with torch.no_grad():
            for name in ("query", "key"):
                linear = getattr(model.blocks[2].attention.branch.function, name)
                linear.weight.mul_(scale)
                linear.bias.mul_(scale)
        return model

    return read(make)


def gained(gain: float, depth: int = 8) -> Diagnosis:
    """Every layer multiplies both signals by the gain: Δ = depth · ln(gain), exactly."""
    return diagnose(measured(lambda: Chain(*(orthogonal(gain) for _ in range(depth)))))


def one_gain(gain: float) -> Diagnosis:
    """Block 5 of ten has a gain of its own; the others have .9."""
    return diagnose(measured(lambda: Chain(*(orthogonal(gain if k == 5 else 0.9) for k in range(10)))))


@dataclass(frozen=True)
class Fault:
    """What a rule must find.

    Attributes:
        run: the diagnosis with the fault (True) or without.
        layer: a name that the finding must have; "" for a rule that names none.
        first: whether it must be the first.
    """

    run: Callable[[bool], Diagnosis]
    layer: str
    first: bool = True


#: One fault for every rule of the house. A rule without one makes a test fail.
PLANTED: Final[Mapping[str, Fault]] = {
    "non_finite": Fault(poisoned, "blocks.2.mlp"),
    "skipped_steps": Fault(lambda bad: overflowing(lambda step: bad and step % 4 == 0), ""),
    "underflow": Fault(lambda bad: half_precision(2.0**-24 if bad else 1.0), "blocks.0", first=False),
    "no_gradient_path": Fault(detached, "blocks.2.mlp"),
    "update_ratio": Fault(lambda bad: one_fast_branch(0.3 if bad else 1e-3), "blocks.1", first=False),
    "spike": Fault(lambda bad: one_bad_batch(41 if bad else None), ""),
    "dead_layer": Fault(killed, "blocks.2"),
    "zero_by_construction": Fault(lambda bad: rezero(not bad, 3), "blocks.0.mlp", first=False),
    "dead_units": Fault(lambda bad: diagnose(mostly_dead(-2.5 if bad else 0.0)), "blocks.2"),
    "saturation": Fault(lambda bad: saturated(60.0 if bad else 1.0, layers="**"), "blocks.1.1"),
    "massive_activations": Fault(lambda bad: massive(500.0 if bad else 0.0), "blocks.2"),
    "rank_collapse": Fault(
        lambda bad: read(transformer("no_skip_pre_norm" if bad else "pre_norm", 12, 64)),
        "blocks.11",
        first=False,
    ),
    "starved_attention": Fault(lambda bad: tiny_queries_and_keys(1e-5 if bad else 1.0), "blocks.2"),
    "one_layer_off": Fault(lambda bad: one_gain(20.0 if bad else 0.9), "blocks.5"),
    "vanishing": Fault(lambda bad: gained(0.5 if bad else 1.0), "input of blocks.0"),
    "exploding": Fault(lambda bad: gained(2.0 if bad else 1.0), "input of blocks.0"),
    "forward_vanishing": Fault(lambda bad: gained(0.5 if bad else 1.0), "blocks.7"),
    "forward_exploding": Fault(lambda bad: gained(2.0 if bad else 1.0), "blocks.7"),
}
