"""Rules on how training moves: updates that are too large or too small, and spikes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from planted import one_bad_batch, one_fast_branch, only, reasons, residual_chain, trained
from synthetic import Builder
from torch import Tensor, nn

from gradscope.analysis.diagnosis import Diagnosis, diagnose
from gradscope.record import Record, Rows, Step


def test_update_ratio_names_the_module_with_too_high_a_rate() -> None:
    found = only(one_fast_branch(0.3), "update_ratio")
    assert found.layers[0].startswith("blocks.1.mlp")
    assert "blocks.1" in found.layers
    assert found.value > found.threshold == 0.1
    assert "CS231n" in found.threshold_source
    stricter = one_fast_branch(1e-3, thresholds={"update_ratio": {"high": 1e-4}}).of("update_ratio")
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
    found = only(one_bad_batch(41), "spike")
    assert found.steps[0] == 41
    assert found.severity == "warning"
    assert found.value > 10
    # Without the loss nobody knows whether it was disturbed.
    blind = only(one_bad_batch(41, log=False), "spike")
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


def jumping(losses: Callable[[int], float | None]) -> Diagnosis:
    """A Record of a run whose gradient jumps a hundredfold at step 30, with these losses."""
    b = Builder()
    b.module(1.0, "h.0", "output_grad", {"l2": 1.0})
    rows = Rows.of(b.rows)
    sizes = [100.0 if i == 30 else 1.0 + 0.1 * (i % 3) for i in range(40)]
    steps = [Step.of(rows, [x], {}, step=i, replicate=0, loss=losses(i)) for i, x in enumerate(sizes)]
    return diagnose(Record({"replicates": "run"}, tuple(steps)))


def test_a_loss_that_is_not_positive_is_said_and_does_not_pass_for_an_absent_one() -> None:
    below = jumping(lambda i: -1.0 - 0.01 * i)
    assert "the loss is 0 or below in 40 of 40 steps" in reasons(below, "spike")
    found = only(below, "spike")
    assert found.severity == "warning" and "scope.log" not in found.message
    assert "not known" in found.message
    absent = jumping(lambda i: None)
    assert "scope.log(loss=loss)" in reasons(absent, "spike")
    assert "scope.log" in only(absent, "spike").message
    positive = jumping(lambda i: 2.0 + 0.01 * (i % 4))
    assert not reasons(positive, "spike") and only(positive, "spike").severity == "note"
