"""Backward passes that are changed on the way, against forward passes with something detached."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import models
import pytest
import torch
from reference import depth_by_deletion
from test_architecture import TOKENS, WIDTH, Net, rows
from torch import Tensor, nn

from gradscope.errors import MeasureError
from gradscope.experiment.effective_depth import effective_depth
from gradscope.experiment.paths import path_spectrum
from gradscope.experiment.trunk_pass import TrunkPass

X = rows(3, 4, WIDTH).double()


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


class Routed(nn.Module):
    """LN(x + w(x)) and then x + v(x), each of skip and branch let through or not."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.routes = [[True, True], [True, True]]

    def forward(self, x: Tensor) -> Tensor:
        (skip, branch), (skip2, branch2) = self.routes
        f = torch.tanh(self.w(x))
        x = self.norm((x if skip else x.detach()) + (f if branch else f.detach()))
        f = torch.tanh(self.v(x))
        return (x if skip2 else x.detach()) + (f if branch2 else f.detach())


def routed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Routed() for _ in range(3)]).double()


def gradient(model: nn.Module) -> Tensor:
    h = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(square(model, h), [h], allow_unused=True, materialize_grads=True)
    return found


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("what", ["at_branch", "at_skip"])
def test_nothing_through_one_branch_or_one_skip(number: int, what: str) -> None:
    run = TrunkPass(routed(), square, X)
    run.prove()
    cut: dict[str, Any] = {what: lambda i, g: None if i == number else g}
    found = run.gradient(**cut)
    model = routed()
    model[number // 2].routes[number % 2][what == "at_branch"] = False
    torch.testing.assert_close(found, gradient(model), rtol=1e-12, atol=0)
    # The same graph serves again, and nothing of the change is left.
    torch.testing.assert_close(run.gradient(), gradient(routed()), rtol=1e-12, atol=0)


def test_all_skips_cut_leaves_the_chain_and_all_branches_cut_the_skips() -> None:
    run = TrunkPass(routed(), square, X)
    for what, place in (("at_skip", 0), ("at_branch", 1)):
        model = routed()
        for block in model:
            for route in block.routes:
                route[place] = False
        cut: dict[str, Any] = {what: lambda i, g: None}
        torch.testing.assert_close(run.gradient(**cut), gradient(model), rtol=1e-12, atol=0)


def test_the_trunk_alone_from_its_end() -> None:
    run = TrunkPass(routed(), square, X)
    seen: dict[int, Tensor] = {}

    def keep(number: int, g: Tensor) -> Tensor:
        seen[number] = g
        return g

    whole = run.gradient(at_position=keep)
    assert sorted(seen) == [0, 1, 2, 3]
    assert list(seen) == [3, 2, 1, 0]
    assert torch.equal(run.gradient(seen[3]), whole)
    assert torch.equal(seen[0], whole)
    half = run.gradient(at_position=lambda number, g: g / 2)
    torch.testing.assert_close(half, whole / 16, rtol=1e-14, atol=0)  # at four positions


def test_scaled_gradients_of_branches_are_powers_of_t() -> None:
    """g(t) = Σ tᵏ c_k, so that D is its logarithmic derivative."""
    run = TrunkPass(routed(), square, X)

    def norm(t: float) -> float:
        found = run.gradient(at_branch=lambda i, g: t * g)
        assert found is not None
        return float(found.norm().log())

    step = 1e-5
    slope = (norm(1 + step) - norm(1 - step)) / (2 * step)
    assert effective_depth(routed(), X, square).value == pytest.approx(slope, rel=1e-8)


def test_nothing_is_left_after_an_error_in_a_backward_pass() -> None:
    run = TrunkPass(routed(), square, X)

    def fail(number: int, g: Tensor) -> Tensor:
        raise KeyError("on the way")

    with pytest.raises(KeyError):
        run.gradient(at_branch=fail)
    torch.testing.assert_close(run.gradient(), gradient(routed()), rtol=1e-12, atol=0)


class ValueResidual(Net):
    """The first block's values, from the stream in front of it, are used in all branches."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: x, 3)
        self.blocks = nn.ModuleList(TimesValue() for _ in range(3))

    def forward(self, x: Tensor, without: int = -1) -> Tensor:
        return self.trunk(self.embed(x), without)

    def trunk(self, x: Tensor, without: int) -> Tensor:
        value = self.blocks[0].v(x)
        for number, block in enumerate(self.blocks):
            x = block(x, value, number == without)
        return x


class TimesValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, value: Tensor, without: bool) -> Tensor:
        f = self.w(torch.tanh(x) * value)
        return x + (f.detach() if without else f)


def test_paths_inside_of_branches_to_the_beginning_of_the_stream() -> None:
    model = ValueResidual().double()
    h = model.embed(X).detach().requires_grad_()

    def gradient(without: int) -> Tensor:
        return torch.autograd.grad(model.trunk(h, without).square().mean(), h)[0]

    g = gradient(-1)
    expected = sum(1 - float((g * gradient(i)).sum() / g.square().sum()) for i in range(3))
    found = effective_depth(model, X, square, spectrum=True)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.branches == 3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hugging_face_checkpointing_in_training_mode(name: str) -> None:
    example = models.EXAMPLES[name]
    model = example.build().double()
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    expected = effective_depth(model, batch).value
    model.train()
    for reentrant in (False, True):
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        with pytest.raises(MeasureError, match="use_reentrant=False") if reentrant else nullcontext():
            found = effective_depth(model, batch)
            assert found.value == pytest.approx(expected, rel=1e-6)


def test_a_mask_among_named_arguments_is_not_the_stream() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, *, mask: Tensor, x: Tensor) -> Tensor:
            return x + self.f(x) * mask

    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(mask=torch.ones_like(x), x=x)
            return x

    model = Model(lambda m, x: x, 2)
    model.blocks = nn.ModuleList(Masked() for _ in range(2))
    model.double()
    plain = Net(lambda m, x: x + m.w(x), 2).double()
    plain.embed.load_state_dict(model.embed.state_dict())
    for a, b in zip(plain.blocks, model.blocks, strict=True):
        a.w.load_state_dict(b.f.state_dict())
    found = effective_depth(model, X, square)
    assert found.value == pytest.approx(effective_depth(plain, X, square).value, rel=1e-12)


def test_branches_under_autocast_are_refused() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return square(model, batch)

    model = Net(lambda m, x: x + m.norm(m.w(x).float())).float()
    model.embed = nn.Identity()
    for modules in (None, "blocks.*.norm"):
        with pytest.raises(MeasureError, match=r"output of blocks\.1 something computes in bfloat16"):
            effective_depth(model, X.float(), loss, modules=modules)


class Counting:
    """A loss that notes how many samples it is asked about."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.samples.append(len(batch))
        return square(model, batch)


@pytest.mark.parametrize("longest", [None, 0, 1, 3])
def test_how_many_passes_it_takes(longest: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """D: one and a half forward passes, two and a half backward; c_0 to c_K: K + 2 and a half."""
    passes: list[bool] = []
    gradient = TrunkPass.gradient

    def counted(self: TrunkPass, seed: Tensor | None = None, **changes: Any) -> Tensor | None:
        passes.append(seed is None)
        return gradient(self, seed, **changes)

    monkeypatch.setattr(TrunkPass, "gradient", counted)
    loss, batch = Counting(), torch.cat([X, X.flip(0)])
    effective_depth(routed(), batch, loss)
    assert loss.samples == [6, 3]
    assert passes == [True, False]
    passes.clear()
    loss = Counting()
    path_spectrum(routed(), batch, loss, max_length=longest)
    assert loss.samples == [6, 3]
    # Without a limit it ends behind the longest path, of six branches.
    assert passes == [True] + [False] * (7 if longest is None else longest + 1)


def test_parallel_branches_take_no_pass_for_lengths_that_are_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeded: list[bool] = []
    gradient = TrunkPass.gradient

    def counted(self: TrunkPass, seed: Tensor | None = None, **changes: Any) -> Tensor | None:
        seeded.append(seed is not None)
        return gradient(self, seed, **changes)

    monkeypatch.setattr(TrunkPass, "gradient", counted)
    model = Net(lambda m, x: x + m.w(m.norm(x)) + m.v(m.norm(x)), 2).double()
    found = path_spectrum(model, X, square)
    assert found.branches == 4
    assert sum(seeded) == 3  # no path crosses more than two of them
    assert found.norm[3:].tolist() == [0, 0]


def test_an_encoder_and_a_decoder_of_torchs_own() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 2, 2, 3, 16, 0.0, batch_first=True).double()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(*batch).pow(3).mean()

    batch = X, X.flip(0)
    for trunk, first, count, parts in (
        (None, "decoder.layers.0", 3, ("dropout1", "dropout2", "dropout3")),
        ("encoder.layers", "encoder.layers.0", 2, ("dropout1", "dropout2")),
    ):
        container = first.rpartition(".")[0]
        branches = [f"{container}.{i}.{part}" for i in range(count) for part in parts]
        expected, n = depth_by_deletion(model, lambda m: loss(m, batch), first, branches)
        found = effective_depth(model, batch, loss, trunk=trunk)
        assert found.value == pytest.approx(expected, rel=1e-11)
        assert found.branches == n == len(branches)
        assert found.trunk == container


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (lambda m, x: torch.tanh(x), "No residual branch was found in the blocks of blocks"),
        (lambda m, x: x + m.w(x.detach()), "No residual branch was found"),
        (lambda m, x: (x + m.w(x)).detach(), "No gradient path"),
    ],
)
def test_without_a_branch_there_is_nothing_to_count(
    line: Callable[[Any, Tensor], Tensor], said: str
) -> None:
    with pytest.raises(MeasureError, match=said):
        effective_depth(Net(line).double(), X, square)
