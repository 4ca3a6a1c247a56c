"""Each health rule finds a fault planted in a real model, names the layer, and spares the twin.

The twin is the same model without the fault. Where the fault has a closed form, so has the value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from synthetic import Builder, flat_record
from torch import Tensor, nn

import gradscope
from gradscope.analysis.diagnosis import (
    RULES,
    SEVERITIES,
    Diagnosis,
    Finding,
    Limits,
    NotChecked,
    Threshold,
    diagnose,
    register,
    rule,
)
from gradscope.analysis.view import View
from gradscope.errors import QuantityError
from gradscope.record import Record
from gradscope.reference import Transformer, next_token_loss
from gradscope.show.findings import render

WIDTH = 16


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


class Residual(nn.Module):
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


def only(diagnosis: Diagnosis, name: str) -> Finding:
    found = diagnosis.of(name)
    assert len(found) == 1, f"{len(found)} findings of {name}\n{diagnosis}"
    return found[0]


def reasons(diagnosis: Diagnosis, name: str) -> str:
    return "; ".join(item.reason for item in diagnosis.not_checked if item.rule == name)


TOKENS = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(3))
TEXT = (TOKENS[:, :-1], TOKENS[:, 1:])


def transformer(variant: str, depth: int = 12, width: int = 32) -> Callable[[], nn.Module]:
    return lambda: Transformer(variant, depth=depth, width=width, heads=2, vocabulary=32, context=16)


# -- numbers out of range ------------------------------------------------------------------------


class Poison(nn.Module):
    """Multiplies by infinity from a given call on; 0 · ∞ is NaN."""

    def __init__(self, inner: nn.Module, at: int) -> None:
        super().__init__()
        self.inner, self.at, self.calls = inner, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.inner(x)
        return y * math.inf if self.calls > self.at else y


def test_non_finite_names_the_layer_and_step_where_it_began() -> None:
    def run(at: int) -> Diagnosis:
        torch.manual_seed(0)
        model = residual_chain()
        model.blocks[2].mlp = Poison(model.blocks[2].mlp, at)
        return diagnose(trained(model, 12))

    found = only(run(7), "non_finite")
    # The block around it is broken as well, and all that comes after; the branch was first.
    assert found.layers == ("blocks.2.mlp",)
    assert found.steps == (7, 11)
    assert found.depths == (3.0,)
    assert found.severity == "critical"
    assert found.value == 32 * WIDTH
    assert found.because_of is None
    assert not run(10**6).of("non_finite")


class RootAtZero(nn.Module):
    """x + √(0·x): nothing happens forward, and ∞·0 = NaN backward."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x * 0).abs().sqrt()


def test_non_finite_gradient_names_the_output_it_arrives_at() -> None:
    torch.manual_seed(0)
    broken = Chain(orthogonal(), orthogonal(), RootAtZero(), orthogonal())
    found = only(diagnose(trained(broken, 1)), "non_finite")
    # Seen at the input of the broken block, which is the output of the one before.
    assert found.layers == ("blocks.1",)
    assert "the gradient at the output of blocks.1" in found.message
    whole = Chain(orthogonal(), orthogonal(), nn.Identity(), orthogonal())
    assert not diagnose(trained(whole, 1)).of("non_finite")


class Masked(nn.Module):
    """Adds nothing, but holds a module that gives an additive mask with −∞."""

    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(1, WIDTH).masked_fill(torch.arange(WIDTH) > 3, -math.inf)

    def __init__(self) -> None:
        super().__init__()
        self.mask = self.Mask()

    def forward(self, x: Tensor) -> Tensor:
        return x + (x + self.mask(x)).softmax(-1)


def test_an_infinite_mask_that_breaks_nothing_is_a_note() -> None:
    diagnosis = diagnose(trained(Chain(Masked(), Masked()), 2, layers="**"))
    assert only(diagnosis, "non_finite").severity == "note"
    assert diagnosis.healthy


def half_chain(scale: float) -> Diagnosis:
    """A float16 network whose loss is scaled: its gradients are of that size."""
    torch.manual_seed(0)
    model = Chain(*(orthogonal() for _ in range(4))).half()
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).half()
    direction = torch.randn(64, 3, generator=torch.Generator().manual_seed(2)).half()
    record = gradscope.measure(
        model, [x], lambda m, b: (m(b).float() * direction.float() * scale).sum(), layers="blocks.*"
    )
    return diagnose(record)


def test_underflow_of_half_precision_gradients() -> None:
    # An element of δ is of size .6 · scale or so, and lost where it is below 2^-25.
    found = only(half_chain(2.0**-24), "underflow")
    assert set(found.layers) == {"input of blocks.0", *(f"blocks.{k}" for k in range(4))}
    assert found.value > 0.5
    assert "float16" in found.cause
    assert not half_chain(1.0).of("underflow")
    # Small, and yet all there.
    assert not half_chain(2.0**-18).of("underflow")


def test_underflow_under_autocast_is_seen_although_the_parameters_are_float32() -> None:
    def run(scale: float) -> Diagnosis:
        torch.manual_seed(0)
        model = Chain(*(orthogonal() for _ in range(4)))
        direction = torch.randn(64, 3, generator=torch.Generator().manual_seed(2))

        def loss(m: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.float16):
                return (m(x).float() * direction * scale).sum()

        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        return diagnose(gradscope.measure(model, [x], loss, layers="blocks.*"))

    assert "without loss scaling" in only(run(2.0**-24), "underflow").cause
    assert not run(1.0).of("underflow")


def test_zeros_alone_are_no_underflow() -> None:
    # ReLU and a loss on one token of many make zeros of ordinary gradients.
    record = measured(lambda: Chain(*(relu_block() for _ in range(5))), layers="**")
    zeros = View(record).grid("output_grad", "zeros").value
    assert (zeros > 0).any()
    assert not diagnose(record).of("underflow")


def scaled_run(overflow: Callable[[int], bool]) -> Diagnosis:
    torch.manual_seed(0)
    model = residual_chain(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with gradscope.watch(model, warn=False) as scope:
        for step, batch in enumerate(islice(data(), 40)):
            loss = classified(model, batch)
            scaler.scale(loss * (math.inf if overflow(step) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return diagnose(scope.record)


def test_a_scaler_that_keeps_skipping() -> None:
    found = only(scaled_run(lambda step: step % 4 == 0), "skipped_steps")
    assert found.value == pytest.approx(5 / 20)
    assert found.steps == (20, 36)
    assert not scaled_run(lambda step: False).of("skipped_steps")
    # Finding its scale in the first steps is what a scaler does.
    assert not scaled_run(lambda step: step < 12).of("skipped_steps")


# -- training ------------------------------------------------------------------------------------


def test_update_ratio_names_the_module_with_too_high_a_rate() -> None:
    def run(rate: float, **options: Any) -> Diagnosis:
        torch.manual_seed(0)
        model = residual_chain()
        fast = list(model.blocks[1].mlp.parameters())
        slow = [p for p in model.parameters() if all(p is not q for q in fast)]
        optimizer = torch.optim.AdamW([{"params": slow}, {"params": fast, "lr": rate}], lr=1e-3)
        return diagnose(trained(model, 20, optimizer=optimizer), **options)

    found = only(run(0.3), "update_ratio")
    assert found.layers[0].startswith("blocks.1.mlp")
    assert "blocks.1" in found.layers
    assert found.value > found.threshold == 0.1
    assert "CS231n" in found.threshold_source
    healthy = run(1e-3)
    assert not healthy.of("update_ratio")
    stricter = run(1e-3, thresholds={"update_ratio": {"high": 1e-4}}).of("update_ratio")
    assert stricter and stricter[0].threshold == 1e-4
    assert stricter[0].threshold_source == "given by the caller"


def test_update_ratio_of_what_is_hardly_moved() -> None:
    torch.manual_seed(0)
    model = residual_chain()
    groups = [
        {"params": [p for n, p in model.named_parameters() if not n.startswith("blocks.2")]},
        {"params": list(model.blocks[2].parameters()), "lr": 1e-9},
    ]
    found = only(
        diagnose(trained(model, 20, optimizer=torch.optim.AdamW(groups, lr=1e-3))), "update_ratio"
    )
    assert found.layers == ("blocks.2",)
    assert 0 < found.value < found.threshold == 1e-5


def test_update_ratio_says_nothing_of_a_warm_up_or_a_zero_initialised_head() -> None:
    def run(rate: Callable[[int], float]) -> Diagnosis:
        torch.manual_seed(0)
        model = residual_chain()
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

        def schedule(step: int, model: nn.Module) -> None:
            optimizer.param_groups[0]["lr"] = rate(step)

        return diagnose(trained(model, 30, before=schedule, optimizer=optimizer))

    # The first hundredth of a warm-up that is still going on.
    rising = run(lambda step: 1e-9 * (step + 1))
    assert not rising.of("update_ratio")
    assert "still rises" in reasons(rising, "update_ratio")
    assert "head" in reasons(rising, "update_ratio")
    # A rate that stays there is too low; one that decays from a good one is not.
    assert run(lambda step: 1e-9).of("update_ratio")
    assert not run(lambda step: 1e-3 * 0.3**step).of("update_ratio")


def test_spike_names_the_step() -> None:
    def batches(bad: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        for i, (x, y) in enumerate(data()):
            yield (100 * x, (y + 1) % 3) if i == bad else (x, y)

    def run(bad: int | None, **options: Any) -> Diagnosis:
        torch.manual_seed(0)
        model = Chain(*(relu_block() for _ in range(3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        return diagnose(trained(model, 60, batches=batches(bad), optimizer=optimizer, **options))

    found = only(run(41), "spike")
    assert found.steps[0] == 41
    assert found.severity == "warning"
    assert found.value > 10
    assert not run(None).of("spike")
    # Without the loss nobody knows whether it was disturbed.
    blind = only(run(41, log=False), "spike")
    assert blind.severity == "warning" and "scope.log" in blind.message


def test_a_gradient_spike_that_leaves_the_loss_alone_is_a_note() -> None:
    def hook(step: list[int]) -> Callable[[Tensor], Tensor]:
        return lambda g: g * 1000 if step[0] == 30 else g

    torch.manual_seed(0)
    model, now = residual_chain(), [0]
    model.blocks[3].register_forward_hook(lambda m, a, y: y.register_hook(hook(now)) and None)

    def tick(step: int, model: nn.Module) -> None:
        now[0] = step

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    found = only(diagnose(trained(model, 50, before=tick, optimizer=optimizer)), "spike")
    assert found.severity == "note"
    assert found.steps == (30, 30)
    assert found.value == pytest.approx(1000, rel=0.5)


# -- dead ----------------------------------------------------------------------------------------


def test_dead_layer_names_where_it_died_and_when() -> None:
    def kill(step: int, model: nn.Module) -> None:
        if step == 9:
            with torch.no_grad():
                model.blocks[2][0].bias.fill_(-1e6)

    def run(before: Callable[[int, nn.Module], None] | None) -> Diagnosis:
        torch.manual_seed(0)
        return diagnose(trained(Chain(*(relu_block() for _ in range(5))), 20, before=before))

    diagnosis = run(kill)
    found = only(diagnosis, "dead_layer")
    assert found.layers[0] == "blocks.2"
    assert found.steps == (9, 19)
    assert found.value == 11
    # Upstream nothing arrives any more; downstream it goes on with the biases.
    assert {"blocks.0", "blocks.1"} <= set(found.layers)
    assert "blocks.4" not in found.layers
    assert not run(None).of("dead_layer")
    # One step without a gradient is chance.
    assert not diagnose(
        trained(Chain(*(relu_block() for _ in range(5))), 20, before=lambda s, m: kill(s - 10, m))
    ).of("dead_layer")


class Valve(nn.Module):
    """x forward; backward the gradient times a factor."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + (1 - self.factor) * x.detach()


def test_a_dead_gradient_starts_nearest_to_the_loss() -> None:
    torch.manual_seed(0)
    model = Chain(orthogonal(), orthogonal(), Valve(), orthogonal(), orthogonal())

    def shut(step: int, model: nn.Module) -> None:
        model.blocks[2].factor = 0.0 if step >= 9 else 1.0

    found = only(diagnose(trained(model, 20, before=shut)), "dead_layer")
    assert found.layers[:3] == ("blocks.1", "blocks.0", "input of blocks.0")
    assert found.steps == (9, 19)


class IdleBias(nn.Linear):
    """A bias without effect, like that of a layer before a norm: its gradient is exactly 0."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, 0 * self.bias)


def test_a_bias_alone_without_gradient_is_no_dead_layer() -> None:
    torch.manual_seed(0)
    record = trained(Chain(IdleBias(WIDTH, WIDTH), IdleBias(WIDTH, WIDTH)), 25)
    assert not record.table(layer="blocks.0.bias", signal="param_grad", statistic="l2")["value"].any()
    assert diagnose(record).healthy and not diagnose(record).of("zero_by_construction")


class Scaled(nn.Module):
    """x + α·F(x)."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.alpha = nn.Parameter(torch.zeros(()), requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.mlp(x)


def test_zero_by_construction_is_a_note_until_it_lasts() -> None:
    def run(learned: bool, steps: int) -> Diagnosis:
        torch.manual_seed(0)
        return diagnose(trained(Chain(*(Scaled(learned) for _ in range(3))), steps))

    first = run(True, 1)
    note = only(first, "zero_by_construction")
    assert note.severity == "note"
    assert first.healthy and not first.of("dead_layer")
    # α moves after one step: nothing to say any more.
    assert not run(True, 3).of("zero_by_construction")
    # An α that never moves: a note for 20 recorded steps, then dead.
    assert run(False, 20).of("zero_by_construction") and not run(False, 20).of("dead_layer")
    dead = run(False, 21)
    assert dead.of("dead_layer") and not dead.of("zero_by_construction")
    assert any(name.startswith("blocks.0.mlp") for name in only(dead, "dead_layer").layers)


def test_dead_units_names_the_layer() -> None:
    def make(bias: float) -> Callable[[], nn.Module]:
        return lambda: Chain(relu_block(), relu_block(), relu_block(bias), relu_block())

    record = measured(make(-2.5), 1)
    found = only(diagnose(record), "dead_units")
    # What comes after may have nothing to work on; it started in block 2.
    assert found.layers[0] == "blocks.2" and "blocks.1" not in found.layers
    zeros, count = (
        record.table(layer="blocks.2", signal="activation", statistic=s)["value"]
        for s in ("zeros", "count")
    )
    assert found.value == zeros[0] / count[0] >= 0.9
    healthy = diagnose(measured(make(0.0), 1))
    assert not healthy.of("dead_units")
    assert not reasons(healthy, "dead_units")


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.95)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.linear(x))


def test_dropout_is_sparse_by_construction() -> None:
    record = trained(Chain(Sparse(), Sparse()), 3, layers="**")
    zeros, count = (View(record).grid("activation", s) for s in ("zeros", "count"))
    assert (zeros.value / count.value > 0.9).any()
    assert not diagnose(record).of("dead_units")


# -- activations ---------------------------------------------------------------------------------


def tanh_block(gain: float = 1.0, kind: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(orthogonal(gain), kind())


def test_saturation_is_the_mean_slope_of_tanh() -> None:
    def make(gain: float) -> nn.Module:
        torch.manual_seed(0)
        return Chain(tanh_block(), tanh_block(gain), tanh_block(), tanh_block())

    model = make(60.0)
    seen: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda m, a, y: seen.append((1 - y.double() ** 2).mean()))
    model(next(data())[0])
    found = only(diagnose(gradscope.measure(model, [next(data())], classified)), "saturation")
    assert found.layers == ("blocks.1",)
    assert found.value == pytest.approx(seen[0].item(), rel=1e-4)
    assert found.value < found.threshold == 0.1
    assert not diagnose(gradscope.measure(make(1.0), [next(data())], classified)).of("saturation")


def test_saturation_of_a_sigmoid() -> None:
    def run(gain: float) -> Diagnosis:
        torch.manual_seed(0)
        blocks = [tanh_block(1.0, nn.Sigmoid), tanh_block(gain, nn.Sigmoid), tanh_block(1.0, nn.Sigmoid)]
        batch = next(data())
        return diagnose(gradscope.measure(Chain(*blocks), [batch], classified, layers="**"))

    assert only(run(200.0), "saturation").layers == ("blocks.1.1",)
    assert not run(1.0).of("saturation")


class Massive(nn.Module):
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


def test_massive_activations_is_a_note() -> None:
    def run(size: float, gain: float = 1.0) -> Diagnosis:
        torch.manual_seed(0)
        model = Chain(Massive(0), Massive(0, gain), Massive(size), Massive(0), width=64)
        return diagnose(gradscope.measure(model, [next(data(size=256))], classified))

    found = only(run(500.0), "massive_activations")
    assert found.layers[0] == "blocks.2"
    assert found.severity == "note"
    assert not run(0.0).of("massive_activations")
    # All of them large is another matter.
    assert not run(0.0, gain=1000.0).of("massive_activations")


# -- collapse ------------------------------------------------------------------------------------


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


def test_starved_attention_without_collapse() -> None:
    def make(scale: float) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            model = transformer("pre_norm", 4)()
            with torch.no_grad():
                for name in ("query", "key"):
                    getattr(model.blocks[2].attention.branch.function, name).weight.mul_(scale)
                    getattr(model.blocks[2].attention.branch.function, name).bias.mul_(scale)
            return model

        return made

    found = only(diagnose(gradscope.measure(make(1e-5), TEXT, next_token_loss, 3)), "starved_attention")
    assert found.layers == ("blocks.2",)
    assert found.because_of is None
    assert not diagnose(gradscope.measure(make(1.0), TEXT, next_token_loss, 3)).of("starved_attention")


# -- depth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "names"),
    [
        (0.5, {"vanishing", "forward_vanishing"}),
        (2.0, {"exploding", "forward_exploding"}),
        (1.0, set()),
    ],
)
def test_vanishing_and_exploding_in_closed_form(gain: float, names: set[str]) -> None:
    # Every orthogonal layer multiplies both signals by the gain: Δ = depth · ln(gain), exactly.
    diagnosis = diagnose(measured(lambda: Chain(*(orthogonal(gain) for _ in range(8)))))
    found = {f.rule: f for f in diagnosis.findings if f.rule.endswith(("vanishing", "exploding"))}
    assert set(found) == names
    for name, finding in found.items():
        assert finding.value == pytest.approx(8 * math.log(gain), rel=1e-4)
        assert finding.layers == (("blocks.7",) if name.startswith("forward") else ("input of blocks.0",))
        assert abs(finding.threshold) == 3.0


def test_vanishing_without_skips() -> None:
    diagnosis = diagnose(gradscope.measure(transformer("no_skip"), TEXT, next_token_loss, 3))
    assert only(diagnosis, "vanishing").severity == "critical"
    healthy = diagnose(gradscope.measure(transformer("skip"), TEXT, next_token_loss, 3))
    assert not healthy.of("vanishing")


def test_inconclusive_is_no_finding_but_said() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 1.5, (3, 9)).cumsum(1))
    record = flat_record(norms)
    found = gradscope.verdict(record)
    assert found.word == "inconclusive" and found.delta.low < -3 and found.delta.high > 3
    diagnosis = diagnose(record)
    assert not diagnosis.of("vanishing") and not diagnosis.of("exploding")
    for name in ("vanishing", "exploding"):
        assert "inconclusive, Δ = " in reasons(diagnosis, name)
    # Between vanishing and preserved: that it does not explode is known.
    falls = np.exp(np.outer([2.5, 3.0, 3.5], np.linspace(0, 1, 9)))
    diagnosis = diagnose(flat_record(falls))
    assert "inconclusive" in reasons(diagnosis, "vanishing")
    assert not reasons(diagnosis, "exploding") and not diagnosis.of("exploding")


@pytest.mark.parametrize("gain", [20.0, 1 / 20])
def test_one_layer_off_names_it(gain: float) -> None:
    def make(gain: float) -> Callable[[], nn.Module]:
        return lambda: Chain(*(orthogonal(gain if k == 5 else 0.9) for k in range(10)))

    found = only(diagnose(measured(make(gain))), "one_layer_off")
    assert found.layers == ("blocks.5",)
    assert found.value == pytest.approx(math.log(gain / 0.9), rel=1e-4)
    # Gradient and activation are off in the same block: one finding.
    assert "the gradient" in found.message and "the activation" in found.message
    assert not diagnose(measured(make(0.9))).of("one_layer_off")


def test_one_layer_off_explains_the_explosion() -> None:
    diagnosis = diagnose(
        measured(lambda: Chain(*(orthogonal(90.0 if k == 5 else 1.0) for k in range(10))))
    )
    exploding = diagnosis.of("exploding") + diagnosis.of("forward_exploding")
    for finding in exploding:
        assert finding.because_of is not None
        assert diagnosis.findings[finding.because_of].rule == "one_layer_off"


# -- cause before symptom ------------------------------------------------------------------------


def test_causes_stand_above_their_symptoms() -> None:
    torch.manual_seed(0)
    model = Chain(*(relu_block() for _ in range(5)))

    def kill(step: int, model: nn.Module) -> None:
        if step == 9:
            with torch.no_grad():
                model.blocks[2][0].bias.fill_(-1e6)

    diagnosis = diagnose(trained(model, 20, before=kill))
    roots = [f.rule for f in diagnosis.roots]
    assert roots[0] == "dead_layer"
    vanishing = only(diagnosis, "vanishing")
    assert vanishing.because_of is not None
    assert diagnosis.findings[vanishing.because_of].rule == "dead_layer"
    text = str(diagnosis)
    assert text.index("dead_layer") < text.index("because of this: CRITICAL vanishing")
    for i, finding in enumerate(diagnosis.findings):
        assert finding.because_of is None or finding.because_of < i
    assert [SEVERITIES.index(f.severity) for f in diagnosis.roots] == sorted(
        SEVERITIES.index(f.severity) for f in diagnosis.roots
    ) or diagnosis.findings[0].rule == "dead_layer"


def made_rule(
    name: str, step: int, trunk: str = "h", because: tuple[str, ...] = (), **options: Any
) -> Any:
    @rule(
        name=name,
        title=name,
        citation="none",
        thresholds={"t": Threshold(value=1.0, unit="1", source="test")},
        explained_by=because,
        **options,
    )
    def judge(view: View, limits: Limits) -> Iterator[Finding]:
        """A finding at a given step."""
        yield limits.finding(
            "t", value=2.0, message=name, cause="c", remedy="r", steps=(step, step), trunk=trunk
        )

    return judge


def linked(*rules: Any) -> dict[str, str | None]:
    diagnosis = diagnose(flat_record(np.ones((1, 5))), rules=rules)
    return {
        f.rule: None if f.because_of is None else diagnosis.findings[f.because_of].rule
        for f in diagnosis.findings
    }


def test_what_explains_what() -> None:
    # Earlier, on the same trunk, and named: explained.
    assert linked(made_rule("a", 3), made_rule("b", 5, because=("a",))) == {"a": None, "b": "a"}
    # Later: not.
    assert linked(made_rule("a", 7), made_rule("b", 5, because=("a",))) == {"a": None, "b": None}
    # Of another trunk: only what is critical spreads.
    other = made_rule("b", 5, trunk="k", because=("a",))
    assert linked(made_rule("a", 3), other) == {"a": None, "b": None}
    assert linked(made_rule("a", 3, severity="critical"), other) == {"a": None, "b": "a"}
    # A note explains nothing.
    assert linked(made_rule("a", 3, severity="note"), made_rule("b", 5, because=("a",)))["b"] is None
    # Each names the other: no circle.
    assert linked(made_rule("a", 3, because=("b",)), made_rule("b", 3, because=("a",))) == {
        "a": None,
        "b": "a",
    }
    # A chain of three, and the first of two candidates.
    chain = [made_rule("a", 1), made_rule("b", 2, because=("a",)), made_rule("c", 3, because=("b", "a"))]
    assert linked(*chain) == {"a": None, "b": "a", "c": "b"}


class Backwards(nn.Module):
    """x + f(x), then + g(x), with g defined first."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.attention = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Shared(Chain):
    """One block, called four times."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(4):
            for block in self.blocks:
                x = block(x)
        return self.head(x)


@pytest.mark.parametrize("layers", [None, "**"])
@pytest.mark.parametrize("kind", ["backwards", "shared", "transformer"])
def test_modules_come_in_the_order_of_the_forward_pass(kind: str, layers: str | None) -> None:
    torch.manual_seed(0)
    if kind == "transformer":
        model, batch, loss = transformer("pre_norm", 3)(), TEXT, next_token_loss
    else:
        model = (
            Chain(Backwards(), Backwards()) if kind == "backwards" else Shared(orthogonal(), orthogonal())
        )
        batch, loss = next(data()), classified
    record = gradscope.measure(model, [batch], loss, layers=layers)
    came: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, y, name=name: came.append(name))
    loss(model, batch)
    sites = [site for site in View(record).modules if site.type != "Stream"]
    watched = {site.layer for site in sites}
    assert [site.layer for site in sites] == [name for name in came if name in watched]
    streams = [i for i, site in enumerate(View(record).modules) if site.type == "Stream"]
    assert [View(record).modules[i + 1].layer.split(".")[:2] for i in streams] == [["blocks", "0"]]


# -- the interface -------------------------------------------------------------------------------


@rule(
    name="loud",
    title="loud layer",
    citation="my notes",
    thresholds={"high": Threshold(value=50.0, unit="activation", source="my notes")},
    needs=[("activation", "absmax")],
)
def loud(view: View, limits: Limits) -> Iterator[Finding | NotChecked]:
    """A layer with a large activation."""
    grid = view.grid("activation", "absmax")
    for site, column in zip(grid.sites, grid.value.T, strict=True):
        if column.max() > limits["high"]:
            yield limits.finding(
                "high",
                value=float(column.max()),
                sites=[site],
                steps=view.span(range(len(view.steps))),
                message="loud",
                cause="loud",
                remedy="hush",
            )


def test_a_rule_of_ones_own() -> None:
    record = measured(lambda: Chain(*(orthogonal(100.0 if k == 1 else 1.0) for k in range(3))), 1)
    diagnosis = diagnose(record, rules=[*RULES.values(), loud])
    assert diagnosis.of("loud")[0].layers == ("blocks.1",)
    assert diagnosis.of("loud")[0].citation == "my notes"
    assert diagnose(record, rules=[loud]).checked == ("loud",)
    assert not diagnose(record, rules=[loud], thresholds={"loud": {"high": 1e9}}).findings
    assert "loud" not in RULES and not diagnose(record).of("loud")


def test_every_rule_says_what_it_is() -> None:
    assert len(RULES) == 17
    for name, item in RULES.items():
        assert item.name == name
        assert len(item.meaning) > 60 and item.citation and item.title
        assert item.severity in SEVERITIES
        assert item.thresholds
        assert all(t.source and t.unit for t in item.thresholds.values())
        assert set(item.explained_by) <= set(RULES) - {name}
    with pytest.raises(ValueError, match="already registered"):
        register(RULES["vanishing"])


def test_a_rule_that_could_not_look_says_so() -> None:
    record = measured(residual_chain, 1, statistics=["l2"])
    diagnosis = diagnose(record)
    blind = {item.rule for item in diagnosis.not_checked}
    for name in ("dead_units", "saturation", "massive_activations", "rank_collapse", "underflow"):
        assert name in blind and not diagnosis.of(name)
    assert {"update_ratio", "spike"} <= blind  # one step of a measurement has neither
    assert "statistics=" in reasons(diagnosis, "dead_units")
    assert "not checked:" in str(diagnosis)
    # And nothing at all: no rule passes silently but those on the loss scale, which needs no value.
    b = Builder()
    b.module(1.0, "h.0", "activation", {"mean": 1.0})
    nothing = diagnose(Record({"model": "M"}, (b.step(),)))
    assert set(RULES) - {item.rule for item in nothing.not_checked} <= {
        "skipped_steps",
        "zero_by_construction",
    }


def test_no_depth_axis_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    diagnosis = diagnose(trained(model, 3, layers=nn.Linear))
    assert diagnosis.healthy
    if not trained(model, 1, layers=nn.Linear).trunks:
        assert "no depth axis" in reasons(diagnosis, "vanishing")


def test_wrong_arguments() -> None:
    record = measured(residual_chain, 1)
    with pytest.raises(ValueError, match="names no rule 'vanish'; the rules are non_finite, "):
        diagnose(record, thresholds={"vanish": {"nats": 1}})
    with pytest.raises(ValueError, match="has no threshold 'nat'; it has nats"):
        diagnose(record, thresholds={"vanishing": {"nat": 1}})
    with pytest.raises(ValueError, match="two rules named 'loud'"):
        diagnose(record, rules=[loud, dataclasses.replace(loud)])
    with pytest.raises(ValueError, match="made by the decorator"):
        diagnose(record, rules=[lambda view, limits: []])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="severity='bad' is none of"):
        rule(name="x", title="x", citation="x", thresholds={}, severity="bad")  # type: ignore[arg-type]
    with pytest.raises(QuantityError, match="no trunk 'decoder'"):
        diagnose(record, trunk="decoder")
    with pytest.raises(QuantityError, match="holds no step"):
        diagnose(Record({}))


def test_only_one_trunk() -> None:
    record = measured(lambda: Chain(*(orthogonal(0.5) for _ in range(8))))
    assert diagnose(record, trunk="blocks").of("vanishing")
    assert diagnose(record, rules=[made_rule("a", 0, trunk="other")], trunk="blocks").findings == ()


def test_a_saved_record_is_judged_the_same(tmp_path: Any) -> None:
    record = measured(lambda: Chain(*(orthogonal(0.5) for _ in range(8))))
    loaded = Record.load(record.save(tmp_path / "run.jsonl"))
    assert diagnose(loaded) == diagnose(record)


def test_scope_diagnose_and_the_text() -> None:
    torch.manual_seed(0)
    model = Chain(*(orthogonal(0.5) for _ in range(8)))
    with gradscope.watch(model, warn=False) as scope:
        classified(model, next(data())).backward()
    diagnosis = scope.diagnose(rules=[RULES["vanishing"]])
    assert not diagnosis.healthy
    text, tree = str(diagnosis), render(diagnosis, 80)
    for shown in (text, tree):
        for word in (
            "Chain, step 0: unhealthy: 1 critical",
            "CRITICAL",
            "cause: ",
            "do: ",
            "arXiv:1611.01232",
        ):
            assert word in shown
    assert max(map(len, text.splitlines())) <= 100
    assert max(map(len, tree.splitlines())) <= 80
    assert repr(diagnosis).startswith("<Diagnosis of Chain")


@pytest.mark.parametrize("gradients", [False, True])
def test_an_infinity_is_harmless_only_where_finite_gradients_prove_it(gradients: bool) -> None:
    builder = Builder()
    for depth in range(1, 6):
        bad = float(depth == 2)
        values = {
            "l2": math.inf if bad else 1.0,
            "absmax": math.inf if bad else 1.0,
            "nonfinite": bad,
            "count": 8.0,
        }
        builder.module(depth, f"h.{depth - 1}", "activation", values)
        if gradients:
            builder.module(
                depth, f"h.{depth - 1}", "output_grad", {"l2": 1.0, "nonfinite": 0.0, "count": 8.0}
            )
    record = Record({"replicates": "run"}, (builder.step(),))
    (found,) = diagnose(record).of("non_finite")
    assert found.severity == ("note" if gradients else "critical")
