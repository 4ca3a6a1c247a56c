"""Watched models under torch.compile: values as in eager mode, no graph break, one graph more at most."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import hub_models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import EXAMPLES
from small_models import hooks_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import gradscope
from gradscope.record import Record
from gradscope.statistics import one_pass

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Torch's own, of a compiled block whose input is no leaf, watched or not.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

Key = tuple[int, str, str, int, str, str]
#: What the graph of a compiled layer has.
MOMENTS = ("l2", "count", "tokens", "mean", "variance", "absmax", "zeros", "nonfinite")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def rows(record: Record) -> dict[Key, tuple[float, str]]:
    t = record.table()
    return {
        (
            int(t["step"][i]),
            t["layer"][i],
            t["type"][i],
            int(t["call"][i]),
            t["signal"][i],
            t["statistic"][i],
        ): (float(t["value"][i]), t["status"][i])
        for i in range(len(t["value"]))
    }


def assert_as_eager(compiled: Record, eager: Record, *, least: int) -> dict[Key, str]:
    """Every value that is there is eager mode's; what else is absent, and why."""
    expected, found = rows(eager), rows(compiled)
    absent: dict[Key, str] = {}
    same = 0
    for key, (truth, status) in expected.items():
        value, why = found.get(key, (math.nan, "no row"))
        if status != "ok":
            assert why != "ok", key
        elif why != "ok":
            absent[key] = why
        else:
            # The change of a parameter is known to the last digit of the parameter.
            tolerance = 2e-5 if key[4] != "update" else 1e-3
            size = abs(truth)
            if key[5] == "mean":  # of values that may cancel
                size = expected[*key[:5], "l2"][0] / math.sqrt(expected[*key[:5], "count"][0])
            assert abs(value - truth) <= tolerance * size + 1e-8, (key, value, truth)
            same += 1
    assert same >= least
    return absent


def assert_only_others_are_absent(absent: dict[Key, str]) -> None:
    """What is absent is nothing that the graph could have had."""
    assert set(absent.values()) <= {
        "compiled",
        "not supported: the graph between the positions is not visible",
        "no row",
    }
    assert {k[5] for k, why in absent.items() if why == "compiled"}.isdisjoint(MOMENTS)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def x_of(step: int, size: int = 4) -> Tensor:
    return torch.randn(size, 6, 5, generator=torch.Generator().manual_seed(step))


def trained(
    make: Callable[[], nn.Module] = Net,
    compile_model: Callable[[nn.Module], Any] | None = None,
    *,
    steps: int = 3,
    sizes: tuple[int, ...] = (4,),
    watched: bool = True,
    micro: int = 1,
    **options: Any,
) -> tuple[Record | None, list[float]]:
    """Losses of a short training, and what was recorded of it."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scope = gradscope.watch(model, layers="**", **options) if watched else None
    run = compile_model(model) if compile_model is not None else model
    losses: list[float] = []
    for step in range(steps):
        for part in range(micro):
            loss = run(x_of(step + 10 * part, sizes[step % len(sizes)])).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    if scope is None:
        return None, losses
    assert scope.faults == {}
    scope.close()
    return scope.record, losses


def whole(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def in_place(model: nn.Module) -> Any:
    model.compile(backend="aot_eager", fullgraph=True)
    return model


def each_block(model: nn.Module) -> Any:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager", fullgraph=True)
    return model


def submodules(model: nn.Module) -> Any:
    for block in model.blocks:  # type: ignore[union-attr]
        block.mlp.compile(backend="aot_eager", fullgraph=True)
    return model


MODES = {f.__name__: f for f in (whole, in_place, each_block, submodules)}


@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_of_eager_mode(mode: str) -> None:
    eager, plain = trained()
    record, losses = trained(compile_model=MODES[mode])
    _, unwatched = trained(compile_model=MODES[mode], watched=False)
    assert losses == unwatched == plain
    assert record is not None and eager is not None
    absent = assert_as_eager(record, eager, least=500)
    assert_only_others_are_absent(absent)
    without = {k for k, why in absent.items() if why == "no row"}
    assert {k[1] for k in without} <= {f"blocks.{i}.mlp" for i in range(3)}
    assert gradscope.profile(record).depth.tolist() == [0.0, 1.0, 2.0, 3.0]


Trained = tuple[list[float], list[Tensor], int, int]


def trained_over_twenty_steps(name: str, backend: str, watched: bool) -> Trained:
    """Losses, parameters, and the numbers of graphs and graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    if name in EXAMPLES:
        model, loss_of = EXAMPLES[name].build(), EXAMPLES[name].run
    else:
        model, batch = hub_models.build(name)

        def loss_of(model: Any) -> Tensor:
            return model(**batch).loss

    torch.manual_seed(1)  # of dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scope = gradscope.watch(model, every=2) if watched else None
    if backend != "none":
        model.compile(backend=backend)
    losses: list[float] = []
    for _ in range(20):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if scope is not None:
        record = scope.record
        assert len(record.steps) == 10 and scope.faults == {}
        flow = record.table(signal="output_grad", statistic="l2")
        assert np.isfinite(flow["value"][flow["status"] == "ok"]).all()
        assert (flow["status"] == "ok").mean() > 0.7
        scope.close()
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return losses, [p.detach() for p in model.parameters()], graphs, breaks


def largest_difference(one: Trained, other: Trained) -> float:
    """Of all losses and parameters; 0 only where every bit is the same but the sign of a zero."""
    losses = [abs(a - b) for a, b in zip(one[0], other[0], strict=True)]
    return max(losses + [(a - b).abs().max().item() for a, b in zip(one[1], other[1], strict=True)])


REAL = ("gpt2", "bert", "llama", "t5", "vit")


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("none", name) for name in REAL),
        ("aot_eager", "gpt2"),
        *(
            pytest.param("aot_eager", name, marks=pytest.mark.slow)
            for name in ("loop", "encoder", *REAL[1:])
        ),
    ],
)
def test_real_models_train_bit_identically_over_twenty_steps(backend: str, name: str) -> None:
    losses, parameters, graphs, breaks = trained_over_twenty_steps(name, backend, False)
    watched = trained_over_twenty_steps(name, backend, True)
    assert losses == watched[0]
    assert all(torch.equal(a, b) for a, b in zip(parameters, watched[1], strict=True))
    assert watched[2] <= (max(graphs, 1) + 1 if backend != "none" else 0)
    assert watched[3] == breaks


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_inductor_changes_no_more_than_an_unwatched_recompile(name: str) -> None:
    """Of losses and parameters; watched, it was 0.0 for all five models (torch 2.13, x86-64)."""
    from torch._functorch import config as autograd
    from torch._inductor import config as inductor

    # A compilation that comes from a cache is no second one.
    with inductor.patch(fx_graph_cache=False), autograd.patch(enable_autograd_cache=False):
        first = trained_over_twenty_steps(name, "inductor", False)
        again = trained_over_twenty_steps(name, "inductor", False)
        watched = trained_over_twenty_steps(name, "inductor", True)
    recompiled, seen = largest_difference(first, again), largest_difference(first, watched)
    assert seen <= recompiled, f"watched {seen:.3g}, recompiled {recompiled:.3g}"
    assert watched[2] <= first[2] + 1
    assert watched[3] == first[3]


def test_the_cadence_costs_one_graph_and_no_recompilation() -> None:
    trained(compile_model=whole, watched=False, steps=6)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    counters.clear()
    record, _ = trained(compile_model=whole, every=2, steps=8)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert record is not None and [s.step for s in record.steps] == [0, 2, 4, 6]


def test_what_was_compiled_before_is_compiled_again_and_said() -> None:
    eager, _ = trained()
    model = Net()
    run = whole(model)
    run(x_of(0)).sum().backward()
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(gradscope.GradscopeWarning, match="compiled before they were watched"),
        gradscope.watch(run, layers="**") as scope,
    ):
        for step in range(3):
            run(x_of(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert eager is not None
    assert_as_eager(scope.record, eager, least=500)
    assert not any("_orig_mod" in layer for layer in scope.record.table()["layer"])


def test_a_block_that_is_called_again() -> None:
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for _ in range(2):
                x = self.blocks[1](self.blocks[0](x))
            return self.head(x)

    eager, _ = trained(Shared)
    record, _ = trained(Shared, whole)
    assert record is not None and eager is not None
    first = rows(record)[0, "blocks.0", "Block", 0, "activation", "l2"]
    assert first[1] == "not supported: called more often in a compiled graph than before"
    later = Record(record.header, record.steps[1:])
    assert_as_eager(later, Record(eager.header, eager.steps[1:]), least=500)
    t = later.table(type="Block", signal="activation", statistic="l2", step=1)
    order = sorted(zip(t["depth"], t["layer"], t["call"], strict=True))
    assert [(d, n, c) for d, n, c in order if n != "blocks.2"] == [
        (1.0, "blocks.0", 0),
        (2.0, "blocks.1", 0),
        (3.0, "blocks.0", 1),
        (4.0, "blocks.1", 1),
    ]


def test_blocks_that_run_in_another_order_than_they_are_defined() -> None:
    class Backwards(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in reversed(self.blocks):
                x = block(x)
            return self.head(x)

    eager, _ = trained(Backwards)
    record, _ = trained(Backwards, whole)
    assert record is not None and eager is not None
    absent = assert_as_eager(record, eager, least=450)
    # The input of the block that is defined first is not the trunk's.
    assert {why for k, why in absent.items() if k[2] == "Stream"} == {"compiled"}


def test_shapes_that_change() -> None:
    eager, _ = trained(sizes=(4, 2, 7), steps=6)
    trained(compile_model=whole, sizes=(4, 2, 7), steps=6, watched=False)
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    record, _ = trained(compile_model=whole, sizes=(4, 2, 7), steps=6)
    assert record is not None and eager is not None
    assert_as_eager(record, eager, least=1000)
    assert counters["stats"]["unique_graphs"] <= graphs + 1


def test_accumulation() -> None:
    eager, _ = trained(micro=3)
    record, _ = trained(compile_model=whole, micro=3)
    assert record is not None and eager is not None
    assert_as_eager(record, eager, least=500)


def test_one_backward_pass_through_two_forwards_is_absent() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, layers="**") as scope:
        run = whole(model)
        (run(x_of(0)).square().mean() + run(x_of(1)).square().mean()).backward()
        optimizer.step()
    t = scope.record.table(signal="output_grad", layer="blocks.1", statistic="l2")
    assert t["status"].tolist() == ["not supported: one backward pass through several compiled forwards"]
    assert scope.record.table(signal="param_grad", statistic="l2", status="ok")["value"].size > 10


def test_a_function_around_the_model() -> None:
    model, plain = Net(), Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of(x: Tensor) -> Tensor:
        return model(x).square().mean()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradscope.watch(model) as scope:
            compiled: Any = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
            for step in range(3):
                compiled(x_of(step)).backward()
                optimizer.step()
                optimizer.zero_grad()
    said = [str(w.message) for w in caught if issubclass(w.category, gradscope.GradscopeWarning)]
    assert len(said) == 1 and "inside of a larger function that is compiled" in said[0]
    assert len(scope.record.steps) == 3
    plain(x_of(0)).square().mean().backward()
    for name, parameter in plain.named_parameters():
        value = rows(scope.record)[0, name, "Parameter", 0, "param_grad", "l2_at_step"]
        assert parameter.grad is not None
        assert value == (pytest.approx(parameter.grad.norm().item(), rel=1e-5), "ok")
        assert rows(scope.record)[0, name, "Parameter", 0, "param_grad", "l2"][1] == "compiled"
    assert set(scope.record.table(signal="activation")["status"]) == {"compiled"}


def test_a_mask_is_not_ignored_in_silence() -> None:
    model = Net()
    with gradscope.watch(model, layers="**", mask=torch.ones(4, 6, dtype=torch.bool)) as scope:
        whole(model)(x_of(0)).sum().backward()
    t = scope.record.table(layer="blocks.1", statistic="l2")
    assert set(t["status"]) == {"not supported: a mask in a compiled graph"}


def test_closing_ends_it() -> None:
    sizes: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    def rows_in_memory() -> int:
        torch._dynamo.reset()
        gc.collect()
        return sum(type(x) is Tensor and x.dtype == torch.float64 for x in gc.get_objects())

    model, plain = Net(), Net()
    hooks, rows = hooks_of(model), rows_in_memory()
    scope = gradscope.watch(model)
    run: Any = torch.compile(model, backend=counting)
    run(x_of(0)).sum().backward()
    scope.close()
    steps = len(scope.record.steps)
    assert hooks_of(model) == hooks
    after = run(x_of(1)).detach()
    torch._dynamo.reset()
    expected = torch.compile(plain, backend=counting)(x_of(1)).detach()
    assert torch.equal(after, expected)
    # The graph of the watched model measured; what is compiled since is an unwatched model's.
    assert sizes[0] > sizes[1] == sizes[2]
    assert len(scope.record.steps) == steps
    del run
    assert rows_in_memory() == rows


def test_evaluations_are_not_recorded() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, layers="**") as scope:
        run = whole(model)
        for step in range(2):
            run(x_of(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                run(x_of(50) * 100)
    eager, _ = trained(steps=2)
    assert eager is not None
    assert_as_eager(scope.record, eager, least=400)


def test_checkpointing_inside_of_the_graph() -> None:
    class Saving(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    eager, _ = trained(Saving)
    record, _ = trained(Saving, whole)
    assert record is not None and eager is not None
    assert_as_eager(record, eager, least=450)


def test_transforms_inside_of_the_graph_do_not_raise() -> None:
    model = Net()
    parameters = dict(model.named_parameters())

    def gradient(x: Tensor) -> Tensor:
        call = torch.func.functional_call
        return torch.func.grad(lambda p: call(model, p, (x,)).sum())(parameters)["head.weight"]

    plain = gradient(x_of(0))
    compiled: Any = torch.compile(gradient, backend="aot_eager")
    with gradscope.watch(model, layers="**"):
        assert torch.allclose(compiled(x_of(0)), plain, atol=1e-5)


@pytest.mark.parametrize("built", [True, False])
def test_a_tiny_gradient_keeps_its_digits(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its square leaves float32's range; also where the extension modules were not built."""
    if not built:
        monkeypatch.setattr(one_pass, "_native", None)

    def tiny(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).mul(1e-30).sum()

    found: list[Record] = []
    for compile_model in (None, whole):
        model = Net()
        with gradscope.watch(model, layers="**") as scope:
            run = model if compile_model is None else compile_model(model)
            tiny(run, x_of(0)).backward()
        found.append(scope.record)
    key = (0, "blocks.0", "Block", 0, "output_grad", "l2")
    eager, compiled = (rows(record)[key] for record in found)
    assert eager[1] == compiled[1] == "ok"
    assert 0 < eager[0] < 1e-25 and compiled[0] == pytest.approx(eager[0], rel=1e-5, abs=0)


def test_autocast() -> None:
    def run(compiled: bool) -> Record:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradscope.watch(model, layers="**") as scope:
            call = whole(model) if compiled else model
            for step in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = call(x_of(step)).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return scope.record

    eager, compiled = rows(run(False)), rows(run(True))
    for layer in ("blocks.0", "blocks.2", "head"):
        kind = "Linear" if layer == "head" else "Block"
        for signal in ("activation", "output_grad"):
            key = (0, layer, kind, 0, signal, "l2")
            assert compiled[key] == (pytest.approx(eager[key][0], rel=2e-2), "ok")


@pytest.mark.slow
def test_inductor() -> None:
    def fast(model: nn.Module) -> Any:
        return torch.compile(model, fullgraph=True)

    eager, _ = trained()
    record, losses = trained(compile_model=fast, every=1)
    assert counters["stats"]["unique_graphs"] == 1
    _, unwatched = trained(compile_model=fast, watched=False)
    assert losses == pytest.approx(unwatched, rel=1e-6)
    assert record is not None and eager is not None
    assert_as_eager(record, eager, least=500)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradscope.collect import traced

    plain = traced._write
    monkeypatch.setattr(traced, "_write", lambda rows, x, *rest: plain(rows, x * 1.001, *rest))
    eager, _ = trained()
    record, _ = trained(compile_model=whole)
    assert record is not None and eager is not None
    with pytest.raises(AssertionError):
        assert_as_eager(record, eager, least=1)


def test_loss_scaling() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradscope.watch(model, layers="**") as scope:
        run = whole(model)
        loss = F.mse_loss(run(x_of(0)), torch.zeros(4, 6, 3))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    plain = Net()
    h = plain.blocks[1](plain.blocks[0](plain.embed(x_of(0))))
    loss = F.mse_loss(plain.head(plain.blocks[2](h)), torch.zeros(4, 6, 3))
    (truth,) = torch.autograd.grad(loss, h)
    value = rows(scope.record)[0, "blocks.1", "Block", 0, "output_grad", "l2"]
    assert value == (pytest.approx(truth.norm().item(), rel=1e-5), "ok")


@pytest.mark.parametrize("order", ["other first", "watched first"])
def test_another_model_of_its_class_shares_no_code_with_it(order: str) -> None:
    # Compiled code belongs to the class, and by torch's default has no guard on hooks.
    option = torch._dynamo.config.skip_nnmodule_hook_guards
    eager, _ = trained(steps=4)
    other, model = Net(), Net()
    run_other, run = whole(other), whole(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step_other(step: int) -> None:
        run_other(100 * x_of(step)).square().mean().backward()
        other.zero_grad()

    if order == "other first":
        step_other(0)
    with gradscope.watch(model, layers="**") as scope:
        for step in range(4):
            if order == "other first":
                step_other(step)
            run(x_of(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step_other(step)
        record = scope.record
    assert eager is not None
    assert_only_others_are_absent(assert_as_eager(record, eager, least=500))
    assert torch._dynamo.config.skip_nnmodule_hook_guards is option


def test_a_compiler_that_is_loaded_after_the_watch_began() -> None:
    script = """
import sys, torch, gradscope
from torch import nn
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
model, other = Net(), Net()
scope = gradscope.watch(model, layers="**")
assert "torch._dynamo" not in sys.modules
run, run_other = (torch.compile(m, backend="eager") for m in (model, other))
x = torch.randn(2, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    run(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    run_other(x).sum().backward()
table = scope.record.table()
scope.close()
linear = table["type"] == "Linear"
chosen = (table["statistic"] == "l2") & (table["signal"] == "output_grad") & linear
print(sorted(set(table["status"][chosen])), chosen.sum())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("]")[0] == "['ok'", done.stdout + done.stderr
