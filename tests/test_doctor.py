"""The doctor finds nothing on sound models, and every fault that is planted in the recorder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import EXAMPLES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradscope
from gradscope import statistics
from gradscope.cli import main
from gradscope.collect import parameters, probes, sampling
from gradscope.collect.recorder import Recorder
from gradscope.experiment.doctor import DoctorReport
from gradscope.experiment.doctor.oracle import expected_values


def examined(name: str = "loop", **options: Any) -> DoctorReport:
    example = EXAMPLES[name]
    return gradscope.doctor(
        example.build(dropout=0.1).train(),
        torch.zeros(1),
        lambda model, batch: example.run(model),
        seconds=0,
        **options,
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_is_found_on_sound_models(name: str) -> None:
    report = examined(name)
    assert report.ok, str(report)
    kinds = {(s.signal, s.statistic) for s in report.signals if s.right}
    for signal in ("activation", "output_grad"):
        for statistic in ("l2", "mean", "variance", "absmax", "zeros", "nonfinite", "count"):
            assert (signal, statistic) in kinds
    assert {("param_grad", "l2"), ("weight", "l2"), ("update", "l2")} <= kinds
    # Of the raw statistics nothing is left out.
    assert not any(s.unchecked for s in report.signals if s.statistic in ("l2", "mean", "absmax"))


# -- the oracle ------------------------------------------------------------------------------------


def test_the_oracle_is_autograd_at_the_value_that_the_module_returned() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.inner(x)
            y.relu_()  # in place, behind the hook of the module
            return y, y.sum()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[0])[1]

    torch.manual_seed(0)
    net, x = Net().double(), torch.randn(3, 4, dtype=torch.float64)
    found = expected_values(net, x, lambda m, b: m(b), dict(net.named_modules()), {})
    w1, w2 = net.a.inner.weight, net.b.inner.weight
    first = x @ w1.T + net.a.inner.bias
    second = first.relu() @ w2.T + net.b.inner.bias
    to_second = (second > 0).double()
    to_first = (to_second @ w2) * (first > 0)
    assert torch.allclose(found.gradient["b.inner", 0], to_second)
    assert torch.allclose(found.gradient["a.inner", 0], to_first)
    assert torch.allclose(found.activation["a.inner", 0], first)
    # The output is used inside the module too (by its sum): the whole gradient counts.
    assert torch.allclose(found.gradient["b", 0], torch.ones_like(second))
    assert torch.allclose(found.parameter_gradient["a.inner.weight"], to_first.T @ x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_judged_as_well(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(5, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=reentrant)
            return x.square().mean()

    report = gradscope.doctor(Net(), torch.randn(4, 5), lambda m, b: m(b), seconds=0)
    assert report.ok, str(report)
    grads = next(s for s in report.signals if (s.signal, s.statistic) == ("output_grad", "l2"))
    assert grads.right >= 9


# -- planted faults ---------------------------------------------------------------------------------


def test_a_hook_that_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = probes.GradientProbe.__call__
    monkeypatch.setattr(probes.GradientProbe, "__call__", lambda self, g: plain(self, 2 * g))
    report = examined()
    assert not report.ok
    assert {(w.signal, w.statistic) for w in report.wrong} >= {("output_grad", "l2")}
    assert all(w.signal == "output_grad" for w in report.wrong)
    w = next(w for w in report.wrong if w.statistic == "l2")
    assert w.recorded is not None and w.expected is not None
    assert w.recorded == pytest.approx(2 * w.expected, rel=1e-4)
    assert "NOT FINE" in str(report) and w.layer in str(report)


def test_a_hook_that_doubles_in_ordinary_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = probes.GradientProbe.__call__

    def doubling(self: probes.GradientProbe, grad: Tensor) -> None:
        recorder = self._recorder()
        plain(self, grad if recorder is None or recorder._sampler.slow else 2 * grad)

    monkeypatch.setattr(probes.GradientProbe, "__call__", doubling)
    report = examined()
    assert not report.ok
    assert {w.signal for w in report.wrong} == {"output_grad"}
    found = {check.name: check.ok for check in report.checks}
    assert [name for name, ok in found.items() if ok is False] == ["values of an ordinary step"]


def test_a_norm_of_one_rank_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = statistics.norms

    def half(tensors: Any) -> Any:
        return plain([t.reshape(-1)[: t.numel() // 2 + 1] for t in tensors])

    monkeypatch.setattr(parameters.statistics, "norms", half)
    report = examined()
    assert {(w.signal, w.statistic) for w in report.wrong} >= {("param_grad", "l2"), ("weight", "l2")}


def test_a_missing_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradscope.collect import recorder

    plain = recorder.select
    monkeypatch.setattr(
        recorder, "select", lambda m, s: tuple(x for x in plain(m, s) if x[0].name != "blocks.1.mlp")
    )
    report = examined()
    assert {w.layer for w in report.wrong} == {"blocks.1.mlp"}
    assert all("no row at all" in w.why for w in report.wrong)


def test_a_gradient_that_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sampling.Sampler.gradient

    def deaf(self: Any, slot: Any, *rest: Any) -> None:
        if self._layers[slot.site].name != "blocks.1.ln_1":
            plain(self, slot, *rest)

    monkeypatch.setattr(sampling.Sampler, "gradient", deaf)
    report = examined()
    assert {w.layer for w in report.wrong} == {"blocks.1.ln_1"}
    assert all(w.why.startswith("absent as 'no gradient path'") for w in report.wrong)


def test_a_small_bias_in_a_vanished_layer() -> None:
    """One per mille of a gradient that is 1e-9 of the largest is seen."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(24)))
    x = torch.randn(8, 16)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    assert gradscope.doctor(net, x, loss, seconds=0).ok
    plain = sampling.Sampler.gradient

    def biased(self: Any, slot: Any, grad: Tensor, *rest: Any) -> None:
        plain(self, slot, grad * 1.001 if slot.site == 1 else grad, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling.Sampler, "gradient", biased)
        report = gradscope.doctor(net, x, loss, seconds=0)
    assert {w.layer for w in report.wrong if w.statistic == "l2"} == {"0"}


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "bit-identical training": lambda patch: patch.setattr(
        probes.ForwardProbe, "__call__", lambda self, module, args, kwargs, output: output * 1.0001
    ),
    "restored by close()": lambda patch: patch.setattr(
        Recorder,
        "close",
        lambda self, quiet=False, plain=Recorder.close: (
            setattr(self._model(), "left_behind", 1),
            plain(self, quiet=quiet),
        ),
    ),
    "nothing retained": lambda patch: patch.setattr(
        sampling.Sampler,
        "output",
        lambda self, p, site, args, kwargs, output, plain=sampling.Sampler.output, **options: (
            setattr(self, "kept", [*getattr(self, "kept", []), output]),
            plain(self, p, site, args, kwargs, output, **options),
        )[1],
    ),
    "errors inside gradscope": lambda patch: patch.setattr(
        sampling.Sampler, "gradient", lambda self, *rest: 1 / 0
    ),
}


@pytest.mark.filterwarnings("ignore::gradscope.GradscopeWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_other_faults(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    report = examined("loop", layers="blocks.*")
    assert [c.name for c in report.checks if c.ok is False and c.name == name] == [name], str(report)


# -- what is said ----------------------------------------------------------------------------------


def test_a_model_without_an_axis_is_refused_with_the_line_to_write() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(x).sum()

    report = gradscope.doctor(Bare(), torch.ones(1, 2), lambda m, b: m(b), seconds=0)
    assert not report.ok and "refused" in str(report) and 'layers="**"' in report.refused
    report = gradscope.doctor(Bare(), torch.ones(1, 2), lambda m, b: m(b), layers="**", seconds=0)
    assert report.ok, str(report)


def test_the_model_itself_is_left_alone() -> None:
    model = EXAMPLES["loop"].build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    gradscope.doctor(model, None, lambda m, b: EXAMPLES["loop"].run(m), seconds=0.01)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_half_precision_under_autocast() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(model(batch).float(), batch)

    net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4)))
    report = gradscope.doctor(net, torch.randn(4, 8), loss, seconds=0)
    assert report.ok, str(report)


def test_values_that_are_not_finite_or_zero_are_compared_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            nn.init.zeros_(self.blocks[1].weight)
            nn.init.zeros_(self.blocks[1].bias)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return (x * torch.tensor([1.0, torch.inf, 0.0, 0.0])).sum()

    report = gradscope.doctor(Net(), torch.randn(2, 4), lambda m, b: m(b), seconds=0)
    assert not report.wrong, str(report)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "doctor_target.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n"
        "    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))\n"
        "    return model, torch.randn(2, 4), lambda m, b: m(b).square().mean()\n"
        "def bare():\n"
        "    return nn.Linear(2, 1), torch.ones(1, 2), lambda m, b: m(b).sum()\n"
    )
    assert main(["doctor", f"{file}:net", "--seconds", "0"]) == 0
    said = capsys.readouterr().out
    assert "Sequential: fine" in said and "bit-identical training" in said
    assert main(["doctor", f"{file}:bare", "--seconds", "0"]) == 1
    assert "refused" in capsys.readouterr().out
    assert main(["doctor", "nowhere"]) == 2
    assert "package.module:function" in capsys.readouterr().err


def test_a_report_is_plain_data() -> None:
    report = examined()
    assert dataclasses.asdict(report)["model"] == "Loop"
    assert report.right == sum(s.right for s in report.signals)
