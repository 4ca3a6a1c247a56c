"""Effective depth against every path written out, closed forms, and what must be refused."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm
from torch.utils.checkpoint import checkpoint

from gradscope.errors import LayerError, MeasureError
from gradscope.experiment.effective_depth import effective_depth
from gradscope.reference import Transformer, next_token_loss


def transformer(variant: str, depth: int = 3, seed: int = 0, **settings: Any) -> Transformer:
    torch.manual_seed(seed)
    # Xavier's branches are large enough against the stream that every path weighs something.
    settings = {"initialization": "xavier", "width": 16, "heads": 2, "vocabulary": 11} | settings
    return Transformer(variant, depth=depth, **settings).double()


def text(count: int = 3, length: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(11, (count, length + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:]


def gradient_along(
    model: Transformer, batch: tuple[Tensor, Tensor], skips: list[bool], branches: list[bool]
) -> Tensor:
    """The gradient at h_0 where sublayer i lets it pass its skip, its branch, or both.

    The forward values are always the same: what must not pass is detached.
    """
    h = model.embed(batch[0]).detach().requires_grad_()
    x = h
    sublayers = [s for block in model.blocks for s in (block.attention, block.feed_forward)]
    for sublayer, skip, branch in zip(sublayers, skips, branches, strict=True):
        f = sublayer.branch(x)
        through = x if skip else x.detach()
        y = through + (f if branch else f.detach())
        x = y if sublayer.norm is None else layer_norm(y, y.shape[-1:])
    logits = model.head(model.final_norm(x))
    loss = cross_entropy(logits.flatten(0, 1), batch[1].flatten())
    (found,) = torch.autograd.grad(loss, (h,), allow_unused=True, materialize_grads=True)
    return found


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm", "peri_norm", "skip", "layernorm_scaling"])
@pytest.mark.parametrize("causal", [True, False])
def test_it_equals_the_sum_over_all_paths(variant: str, causal: bool) -> None:
    model, batch = transformer(variant, causal=causal), text()
    total = torch.zeros(3, 6, 16, dtype=torch.float64)
    weighted = torch.zeros_like(total)
    for path in itertools.product([False, True], repeat=6):  # True: through the branch
        part = gradient_along(model, batch, [not p for p in path], list(path))
        total += part
        weighted += sum(path) * part
    found = effective_depth(model, batch, next_token_loss)
    assert found.value == pytest.approx(float((weighted * total).sum() / total.square().sum()), rel=1e-12)
    assert 0.1 < abs(found.value) < 6
    assert found.gradient_l2 == pytest.approx(float(total.norm()), rel=1e-12)
    each = (weighted * total).sum((1, 2)) / total.square().sum((1, 2))
    np.testing.assert_allclose(found.per_sample, each.numpy(), rtol=1e-11)
    assert found.branches == 6


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm", "peri_norm", "skip"])
def test_it_equals_the_sum_of_what_each_branch_alone_changes(variant: str) -> None:
    model, batch = transformer(variant, depth=4), text()
    g = gradient_along(model, batch, [True] * 8, [True] * 8)
    expected = 0.0
    for i in range(8):
        without = gradient_along(model, batch, [True] * 8, [j != i for j in range(8)])
        expected += 1 - float((g * without).sum() / g.square().sum())
    assert effective_depth(model, batch, next_token_loss).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variant", ["no_skip", "no_skip_pre_norm", "no_skip_post_norm"])
@pytest.mark.parametrize("depth", [1, 5])
def test_without_skips_it_is_the_number_of_branches(variant: str, depth: int) -> None:
    found = effective_depth(transformer(variant, depth=depth), text(), next_token_loss)
    assert found.value == pytest.approx(2 * depth, rel=1e-12)
    np.testing.assert_allclose(found.per_sample, 2 * depth, rtol=1e-11)
    assert found.branches == 2 * depth
    assert found.reading_point == "input of blocks.0"


def test_a_zero_branch_gives_exactly_zero() -> None:
    found = effective_depth(transformer("rezero", depth=6), text(), next_token_loss)
    assert found.value == 0
    assert (found.per_sample == 0).all()
    assert found.status == "ok"
    assert str(found) == "effective depth 0 of 12 branches at the input of blocks.0"


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_a_chain_of_linear_layers_is_as_deep_as_it_is_long(layers: int) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)]).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    found = effective_depth(chain, x, lambda m, b: m(b).square().mean(), modules="*")
    assert found.value == pytest.approx(layers, rel=1e-12)
    assert found.reading_point == "input of 0"
    assert not x.requires_grad


def test_a_stream_of_one_number_per_sample() -> None:
    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**3

    x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    model = nn.Sequential(Residual(Cube()))
    found = effective_depth(model, x, lambda m, b: m(b).sum(), modules="0.f")
    np.testing.assert_allclose(found.per_sample, 3 * x**2 / (1 + 3 * x**2), rtol=1e-12)


class LinearBlock(nn.Module):
    """x + W rmsnorm(x), with W of variance 1/width: the mean-field model of pre-norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.RMSNorm(width, elementwise_affine=False), nn.Linear(width, width, False)
        )
        nn.init.normal_(self.branch[1].weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_linear_pre_norm_has_the_depth_of_mean_field_theory() -> None:
    """At depth l the branch holds 1/(l + 1) of the energy, so that D = Σ 1/(l + 1) = H_(L+1) - 1."""
    layers, width, values = 32, 192, []
    for seed in range(40):
        torch.manual_seed(seed)
        model = nn.Sequential(*[LinearBlock(width) for _ in range(layers)]).double()
        x = torch.randn(4, width, dtype=torch.float64)
        v = torch.randn(width, dtype=torch.float64)
        found = effective_depth(model, x, lambda m, b, v=v: (m(b) * v).sum(), modules="*.branch")
        values.append(found.value)
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
    expected = sum(1 / k for k in range(2, layers + 2))
    assert expected == pytest.approx(3.089, abs=1e-3)
    assert error < 0.02 * expected
    assert abs(mean - expected) < 3 * error


# -- foreign models ------------------------------------------------------------------------


class Structured(nn.Module):
    """x + tanh(Wx), where the branch hands its tensor on inside of a structure."""

    def __init__(self, wrap: Callable[[Tensor], Any], take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.f = Wrapped(wrap)
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        return x + self.take(self.f(x))


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(torch.tanh(self.linear(x)))


class Residual(nn.Module):
    """x + f(x) around any module."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@dataclass
class Output:
    count: int
    hidden: Tensor


def residual_stack(
    blocks: int = 3, make: Callable[[], nn.Module] = lambda: nn.Linear(4, 4)
) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Residual(make()) for _ in range(blocks)]).double()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def weighted(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) * rows(4)).sum()


def linear_depth(model: nn.Sequential, x: Tensor) -> float:
    """D of x ↦ Π(1 + W_l) x under the mean square loss, from the matrices: g(t) = Π(1 + tW)ᵀ δ."""
    eye = torch.eye(4, dtype=torch.float64)
    weights = [block.f.weight.detach() for block in model]
    delta = model(x).detach()
    g, dot = delta, torch.zeros_like(delta)
    for weight in reversed(weights):
        g, dot = g @ (eye + weight), dot @ (eye + weight) + g @ weight
    return float((g * dot).sum() / (g * g).sum())


def test_a_linear_residual_stack_against_its_matrices() -> None:
    model, x = residual_stack(), rows(5, 4)
    found = effective_depth(model, x, mean_square, modules=["*.f"])
    assert found.value == pytest.approx(linear_depth(model, x), rel=1e-12)
    single = effective_depth(model.float(), x.float(), mean_square, modules=["*.f"])
    assert single.value == pytest.approx(found.value, rel=1e-5)


@pytest.mark.parametrize(
    ("wrap", "take"),
    [
        (lambda y: y, lambda out: out),
        (lambda y: (torch.tensor([1]), y, None), lambda out: out[1]),
        (lambda y: [y, y.detach()], lambda out: out[0]),
        (lambda y: {"n": 3, "y": y}, lambda out: out["y"]),
        (lambda y: Output(1, y), lambda out: out.hidden),
        (lambda y: torch.return_types.max((y, y.detach())), lambda out: out.values),
    ],
)
def test_structured_outputs_keep_their_structure(
    wrap: Callable[[Tensor], Any], take: Callable[[Any], Tensor]
) -> None:
    def depth(wrap: Callable[[Tensor], Any], take: Callable[[Any], Tensor]) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(*[Structured(wrap, take) for _ in range(3)]).double()
        return effective_depth(model, rows(5, 4), mean_square, modules="*.f").value

    expected = depth(lambda y: y, lambda out: out)
    assert expected > 0
    assert depth(wrap, take) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_torchs_own_encoder(norm_first: bool, batch_first: bool, layers: int) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double().eval()
    x = rows(3, 5, 8)
    target = rows(3, 5, 8)
    if not batch_first:
        x, target = x.transpose(0, 1).contiguous(), target.transpose(0, 1).contiguous()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    found = effective_depth(
        model,
        (x, target),
        loss,
        modules=["layers.*.dropout1", "layers.*.dropout2"],
        batch_dim=0 if batch_first else 1,
    )

    def gradient(without: nn.Module | None) -> Tensor:
        handle = without and without.register_forward_hook(lambda m, args, output: output.detach())
        h = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(model, (h, target)), (h,))
        if handle:
            handle.remove()
        return g

    g = gradient(None)
    branches = [b for one in model.layers for b in (one.dropout1, one.dropout2)]
    expected = sum(1 - float((g * gradient(b)).sum() / g.square().sum()) for b in branches)
    assert found.value == pytest.approx(expected, rel=1e-11)
    assert found.per_sample.shape == (3,)
    assert found.reading_point == "input of layers.0"


def test_a_block_that_is_called_many_times_counts_every_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Residual(nn.Linear(4, 4))])

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = self.blocks[0](x)
            return x

    torch.manual_seed(0)
    shared, x = Shared().double(), rows(5, 4)
    unrolled = nn.Sequential(*[shared.blocks[0]] * 4)
    found = effective_depth(shared, x, mean_square, modules="blocks.0.f")
    assert found.branches == 4
    assert found.value == pytest.approx(linear_depth(unrolled, x), rel=1e-12)


def test_in_place_operations_are_read_at_the_right_point() -> None:
    class InPlace(nn.Module):
        def __init__(self, f: nn.Module) -> None:
            super().__init__()
            self.f = f

        def forward(self, x: Tensor) -> Tensor:
            x += self.f(x.clone())  # the layer keeps its input, which must not change
            return x

    model, x = residual_stack(), rows(5, 4)
    expected = linear_depth(model, x)
    changing = nn.Sequential(*[InPlace(block.f) for block in model])
    assert effective_depth(changing, x, mean_square, modules="*.f").value == pytest.approx(expected)
    behind = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)).double()
    found = effective_depth(behind, x, mean_square, modules=["0", "2"])
    assert found.value == pytest.approx(2, rel=1e-12)
    embedded = nn.ModuleDict({"embed": nn.Linear(4, 4), "blocks": changing}).double()

    def loss(m: nn.ModuleDict, batch: Tensor) -> Tensor:
        return m["blocks"](m["embed"](batch)).square().mean()

    inner = effective_depth(embedded, x, loss, modules="blocks.*.f")
    assert inner.value == pytest.approx(linear_depth(model, embedded["embed"](x)), rel=1e-12)


def test_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, blocks: nn.Module, use_reentrant: bool) -> None:
            super().__init__()
            self.blocks = blocks
            self.use_reentrant = use_reentrant

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_() if not x.requires_grad else x
            for block in self.blocks.children():
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
            return x

    # The norm behind the branch keeps its input, so that the branch itself is run again.
    x = rows(5, 4)
    model = nn.Sequential(*[nn.Sequential(one, nn.LayerNorm(4)) for one in residual_stack()]).double()
    expected = effective_depth(model, x, weighted, modules="*.0.f")
    assert 0.1 < expected.value < 3
    found = effective_depth(Checkpointed(model, False), x, weighted, modules="blocks.*.0.f")
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert found.branches == 3
    with pytest.raises(MeasureError, match="use_reentrant=False"):
        effective_depth(Checkpointed(model, True), x, weighted, modules="blocks.*.0.f")


def test_a_mapping_with_the_models_own_loss() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = residual_stack()

        def forward(self, x: Tensor, scale: float, weight: Tensor) -> Any:
            return SimpleNamespace(loss=weight * scale * self.blocks(x).square().mean())

    model, x = WithLoss(), rows(5, 4)
    batch = {"x": x, "scale": 2.0, "weight": torch.tensor(3.0)}
    found = effective_depth(model, batch, modules="blocks.*.f")
    assert found.value == pytest.approx(linear_depth(model.blocks, x), rel=1e-12)
    with pytest.raises(MeasureError, match="loss=lambda model, batch"):
        effective_depth(model, x, modules="blocks.*.f")
    with pytest.raises(MeasureError, match=r"without a loss"):
        effective_depth(model.blocks, {"input": x}, modules="*.f")


def test_a_frozen_model_and_a_sum_as_loss() -> None:
    model, x = residual_stack(), rows(5, 4)
    expected = linear_depth(model, x)
    model.requires_grad_(False)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    with torch.no_grad():
        found = effective_depth(model, x, loss, modules="*.f")
    assert found.value == pytest.approx(expected, rel=1e-12)
    with torch.inference_mode():
        inside = rows(5, 4)
        assert effective_depth(model, inside, loss, modules="*.f").value == found.value


# -- nothing is left behind ----------------------------------------------------------------


def hooks(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        for name, value in sorted(vars(module).items()):
            if "hooks" in name and hasattr(value, "__len__"):
                yield len(value)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_or_the_random_state_changes(fails: bool) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    model = nn.Sequential(*residual_stack(), Counting()).double().eval()
    model[1].train()
    x = rows(5, 4)
    mean_square(model, x).backward()
    state = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooked = list(hooks(model))
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        torch.rand(3), random.random(), np.random.rand()
        value = mean_square(model, batch)
        if fails and len(batch) == 2:
            raise KeyError("in the second pass")
        return value

    if fails:
        with pytest.raises(KeyError):
            effective_depth(model, x, loss, modules="*.f")
    else:
        effective_depth(model, x, loss, modules="*.f")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert versions == [p._version for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert hooked == list(hooks(model))
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert np.random.get_state()[1].tolist() == drawn[2]
    assert not x.requires_grad


# -- absent and refused --------------------------------------------------------------------


def test_a_gradient_of_exactly_zero_has_no_depth() -> None:
    model = residual_stack()
    found = effective_depth(model, rows(5, 4), lambda m, b: 0 * m(b).sum(), modules="*.f")
    assert math.isnan(found.value)
    assert found.gradient_l2 == 0
    assert "exactly 0" in found.status
    assert str(found).startswith("no effective depth at the input of 0: the gradient there is exactly 0")
    broken = effective_depth(model, rows(5, 4), lambda m, b: m(b).sum() * math.inf, modules="*.f")
    assert math.isnan(broken.value)
    assert "not finite" in broken.status


def test_one_sample_without_gradient_is_absent_alone() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]).square() * batch["weight"][:, None]).mean()

    weight = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    found = effective_depth(residual_stack(), {"x": rows(3, 4), "weight": weight}, loss, modules="*.f")
    assert np.isnan(found.per_sample).tolist() == [False, True, False]
    assert math.isfinite(found.value)


def test_a_vanished_gradient_keeps_its_depth_in_float64() -> None:
    model = transformer("no_skip", depth=40, initialization="normal")
    found = effective_depth(model, text(), next_token_loss)
    assert 0 < found.gradient_l2 < 1e-100
    assert found.value == pytest.approx(80, rel=1e-9)


def refusals() -> Iterator[Any]:
    def case(name: str, error: type[Exception], said: str, call: Callable[[], Any]) -> Any:
        return pytest.param(call, error, said, id=name)

    def run(
        model: nn.Module, modules: Any = "*.f", loss: Any = mean_square, batch: Any = None, **k: Any
    ) -> Any:
        return effective_depth(model, rows(6, 4) if batch is None else batch, loss, modules=modules, **k)

    def normed(**settings: Any) -> nn.Sequential:
        return residual_stack(make=lambda: nn.BatchNorm1d(4, **settings))

    yield case(
        "unknown branches",
        MeasureError,
        r"not known what is a residual branch in 0, sublayer 0: MulBackward0.*modules=\[",
        lambda: run(nn.Sequential(*[Gate() for _ in range(2)]).double(), None),
    )
    yield case("no branches", MeasureError, "modules= is empty", lambda: run(residual_stack(), []))
    yield case("a pattern", LayerError, "modules='x.*'", lambda: run(residual_stack(), "x.*"))
    yield case(
        "nested",
        MeasureError,
        "0.f lies inside the branch 0",
        lambda: run(residual_stack(), ["0", "*.f"]),
    )
    yield case("the root", LayerError, "the model itself", lambda: run(nn.Linear(4, 4), "*"))
    yield case(
        "blocks that are not called",
        MeasureError,
        "None of the blocks of ModuleDict was called",
        lambda: run(
            nn.ModuleDict({"0": nn.ModuleDict({"f": nn.Linear(4, 4)})}).double(),
            loss=lambda m, b: m["0"]["f"](b).sum(),
        ),
    )
    yield case(
        "no numbers",
        MeasureError,
        "numbered blocks",
        lambda: run(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), ["a", "b"]),
    )
    yield case(
        "dropout",
        MeasureError,
        r"0\.f \(Dropout\) has p=0.1 .* model\.eval\(\)",
        lambda: run(residual_stack(make=lambda: nn.Dropout(0.1))),
    )
    yield case(
        "attention dropout",
        MeasureError,
        r"MultiheadAttention\) has dropout=0.1",
        lambda: run(residual_stack(make=lambda: nn.MultiheadAttention(4, 1, dropout=0.1))),
    )
    yield case("batch norm", MeasureError, r"BatchNorm1d.*model\.eval\(\)", lambda: run(normed()))
    yield case(
        "batch norm without statistics",
        MeasureError,
        "keeps no running statistics",
        lambda: run(normed(track_running_stats=False).eval()),
    )
    yield case(
        "pairs",
        MeasureError,
        "another gradient",
        lambda: run(residual_stack(), loss=contrastive),
    )
    yield case(
        "place in the batch",
        MeasureError,
        "another gradient",
        lambda: run(
            residual_stack(), loss=lambda m, b: (m(b).sum(1) * torch.arange(len(b)).flip(0)).mean()
        ),
    )
    yield case(
        "noise",
        MeasureError,
        "different values",
        lambda: run(residual_stack(make=Noise)),
    )
    yield case(
        "half precision",
        MeasureError,
        r"bfloat16.*model\.double\(\)",
        lambda: run(residual_stack().bfloat16(), batch=rows(6, 4).bfloat16()),
    )
    yield case(
        "no path",
        MeasureError,
        "No gradient path",
        lambda: run(residual_stack(), loss=lambda m, b: m(b).detach().sum()),
    )
    yield case(
        "another model",
        MeasureError,
        "None of the blocks of Sequential was called",
        lambda: run(residual_stack(), loss=lambda m, b: residual_stack()(b).sum()),
    )
    yield case("a vector", MeasureError, "scalar", lambda: run(residual_stack(), loss=lambda m, b: m(b)))
    yield case(
        "a skip around the trunk",
        MeasureError,
        "past the end of the trunk",
        lambda: run(
            nn.ModuleDict({"e": nn.Linear(4, 4), "t": residual_stack()}).double(),
            "t.*.f",
            around,
        ),
    )
    yield case(
        "an auxiliary loss",
        MeasureError,
        "past the end of the trunk",
        lambda: run(residual_stack(), loss=lambda m, b: m(b).mean() + m[0](b).square().mean()),
    )
    yield case(
        "an empty batch", MeasureError, "is empty", lambda: run(residual_stack(), batch=rows(0, 4))
    )
    yield case(
        "no tensors", MeasureError, "no tensor", lambda: run(residual_stack(), batch={"x": [1, 2]})
    )
    yield case(
        "shared tensors",
        MeasureError,
        r"batch\['y'\]: 1",
        lambda: run(residual_stack(), batch={"x": rows(6, 4), "y": rows(1, 4)}),
    )
    yield case(
        "no such dimension",
        MeasureError,
        r"batch\[1\] has shape \(6,\), and so no batch_dim=1",
        lambda: run(residual_stack(), batch=(rows(6, 4), rows(6)), batch_dim=1),
    )
    yield case(
        "the wrong dimension",
        MeasureError,
        "influence each other",
        lambda: run(
            nn.Sequential(Mixed(), Mixed()).double(),
            "*.f",
            lambda m, b: m(b).mean(),
            rows(4, 4),
            batch_dim=1,
        ),
    )


class Gate(nn.Module):
    """x·σ(Wx), which has no skip, although x itself is a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.f(x))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


class Mixed(nn.Module):
    """Takes any number of columns, and leaves none of them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x.mean(1, keepdim=True))


def contrastive(model: nn.Module, batch: Tensor) -> Tensor:
    """Every sample is pushed away from all others of its batch, its own copy among them."""
    z = model(batch)
    return (z @ z.mT).fill_diagonal_(-math.inf).logsumexp(1).mean()


def around(m: nn.ModuleDict, batch: Tensor) -> Tensor:
    h = m["e"](batch)
    return (m["t"](h) + h).square().mean()


@pytest.mark.parametrize(("call", "error", "said"), list(refusals()))
def test_what_cannot_be_measured_says_why(
    call: Callable[[], Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        call()


def test_the_checks_are_reported() -> None:
    found = effective_depth(transformer("pre_norm"), text(), next_token_loss)
    assert 0 <= found.checks.values_difference < 1e-12
    assert 0 <= found.checks.gradient_difference < 1e-12
    assert math.isnan(found.checks.sum_difference)
    assert found.method == "gradient"
    assert not found.per_sample.flags.writeable
    single = effective_depth(transformer("pre_norm"), text(1), next_token_loss)
    assert math.isnan(single.checks.values_difference)
    assert single.per_sample.tolist() == [pytest.approx(single.value, rel=1e-14)]


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm"])
def test_with_the_spectrum_behind_it(variant: str) -> None:
    model, batch = transformer(variant), text()
    found = effective_depth(model, batch, next_token_loss, spectrum=True)
    parts = torch.zeros(7, 3, 6, 16, dtype=torch.float64)
    for path in itertools.product([False, True], repeat=6):
        parts[sum(path)] += gradient_along(model, batch, [not p for p in path], list(path))
    g = parts.sum(0)
    square = float(g.square().sum())
    weights = [float((c * g).sum()) / square for c in parts]
    assert found.cancellation == pytest.approx(float(parts.square().sum()) / square, rel=1e-12)
    assert found.absolute == pytest.approx(sum(map(abs, weights)), rel=1e-12)
    assert found.value == pytest.approx(sum(k * w for k, w in enumerate(weights)), rel=1e-12)
    assert found.spectrum is not None
    np.testing.assert_allclose(found.spectrum.weight, weights, rtol=1e-11)
    assert "κ = " in str(found) and "Σ|w_k| = " in str(found)
    without = effective_depth(model, batch, next_token_loss)
    assert without.value == found.value
    assert math.isnan(without.cancellation) and math.isnan(without.absolute)
    assert without.spectrum is None


@pytest.mark.parametrize("variant", ["pre_norm", "no_skip"])
def test_in_parts_it_is_the_same(variant: str) -> None:
    model, batch = transformer(variant), text(5)
    whole = effective_depth(model, batch, next_token_loss)
    with pytest.raises(MeasureError, match=r"Write max_bytes=\d+") as caught:
        effective_depth(model, batch, next_token_loss, max_bytes=9)
    one = int(str(caught.value).split("Write max_bytes=")[1].split(",")[0])
    for size in (1, 2, 3):
        found = effective_depth(
            model,
            batch,
            next_token_loss,
            max_bytes=size * one,
            spectrum=variant == "no_skip" and size == 2,
        )
        assert found.value == pytest.approx(whole.value, rel=1e-12)
        np.testing.assert_allclose(found.per_sample, whole.per_sample, rtol=1e-11)
    with pytest.raises(ValueError, match="max_bytes=0"):
        effective_depth(model, batch, next_token_loss, max_bytes=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layers", [3, 7, 24])
def test_a_chain_has_exactly_its_number_of_layers(layers: int, dtype: torch.dtype) -> None:
    torch.manual_seed(layers)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).to(dtype)
    x = torch.randn(4, 8, dtype=dtype)
    depth = effective_depth(net, x, lambda m, b: m(b).square().sum(), branches=True)
    assert depth.value == layers
    assert depth.per_sample.tolist() == [layers] * 4
    assert depth.contributions is not None and depth.contributions.total == layers
