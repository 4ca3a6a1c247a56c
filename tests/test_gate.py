"""A gradient baseline: what it holds, what its file refuses, what it catches and where it says it is."""

from __future__ import annotations

import copy
import difflib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.gate_models import ForgetsTheFirst
from torch import Tensor, nn

from gradscope import gate
from gradscope.analysis.gate.features import Feature
from gradscope.analysis.gate.tolerance import DEFAULTS, parse_tolerance
from gradscope.errors import GateError
from gradscope.experiment.replicate import Replicates
from gradscope.gate.compare import same_seeds
from gradscope.reference import Transformer, next_token_loss

BLOCK = 3


def make() -> Transformer:
    return Transformer(depth=6, width=32, vocabulary=64, context=16)


def other_seeds(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same model, drawn later in the random order."""

    def later() -> nn.Module:
        torch.rand(3)
        return make()

    return later


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(64, (8, 17), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture(scope="module")
def baseline(batch: tuple[Tensor, Tensor]) -> gate.Baseline:
    return gate.take(make, batch, next_token_loss)


# -- the same ------------------------------------------------------------------------------------


def test_unchanged_code_passes_with_its_resolution(baseline, batch):
    outcome = gate.check(baseline, make, batch, next_token_loss)
    assert (outcome.status, outcome.tier, outcome.failed) == ("passed", "same seeds", False)
    assert "resolution" in str(outcome)


def test_other_seeds_pass_and_say_where_the_random_order_changed(baseline, batch):
    outcome = gate.check(baseline, other_seeds(make), batch, next_token_loss)
    assert (outcome.status, outcome.tier) == ("passed", "other seeds")
    assert "random order changed from embed.tokens.weight on" in str(outcome)
    assert all(outcome.resolution[kind] >= DEFAULTS[kind] for kind in ("flow", "rms", "gup"))


def test_no_replicate_is_spent_on_finding_out_whether_the_weights_are_the_same(baseline, batch):
    assert gate.check(baseline, make, batch, next_token_loss).replicates == 5
    assert gate.check(baseline, other_seeds(make), batch, next_token_loss).replicates == 5
    clear = gate.check(baseline, other_seeds(scaled(1.3)), batch, next_token_loss)
    assert (clear.status, clear.replicates) == ("failed", 8)


def test_seeds_of_which_only_the_first_starts_alike_are_other_seeds(baseline, batch):
    def partly() -> nn.Module:
        if torch.initial_seed() > 0:
            torch.rand(3)
        return make()

    outcome = gate.check(baseline, partly, batch, next_token_loss)
    assert (outcome.status, outcome.tier) == ("passed", "other seeds")
    assert outcome.replicates == 10 and "from embed.tokens.weight on" in str(outcome)


def test_a_busy_machine_is_given_one_thread_and_the_threads_come_back(batch):
    used: list[int] = []

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        used.append(torch.get_num_threads())
        time.sleep(0.06)  # waiting, as threads do for each other
        return next_token_loss(model, pair)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runner = Replicates(make, batch, loss)
        for seed in range(3):
            runner.run(seed)
        assert used == [2, 1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_checking_leaves_the_random_state_alone(baseline, batch):
    before = torch.get_rng_state()
    gate.check(baseline, make, batch, next_token_loss)
    assert torch.equal(before, torch.get_rng_state())


# -- the same within rounding --------------------------------------------------------------------


def test_another_number_of_threads_is_within_rounding(baseline, batch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        outcome = gate.check(baseline, make, batch, next_token_loss)
    finally:
        torch.set_num_threads(threads)
    assert (outcome.status, outcome.tier) == ("passed", "same seeds")
    assert "rounding" not in str(outcome)


def test_bfloat16_is_within_the_rounding_of_bfloat16(baseline, batch):
    outcome = gate.check(baseline, lambda: make().bfloat16(), batch, next_token_loss)
    assert (outcome.status, outcome.tier) == ("passed", "same seeds"), outcome
    assert "dtype: float32 → bfloat16" in str(outcome) and "rounding" not in str(outcome)


def test_what_bfloat16_may_change_is_said_in_float32(baseline, batch):
    """Weights × 1.006: .006 nat, more than rounding in float32, less than what is worth failing for."""
    outcome = gate.check(baseline, scaled(1.006), batch, next_token_loss)
    assert (outcome.status, outcome.tier) == ("passed", "same seeds"), outcome
    assert "more than the 0.0001 that rounding explains" in " ".join(str(outcome).split())


@pytest.mark.parametrize("planted", [False, True])
def test_a_baseline_of_another_torch_is_compared_all_the_same(baseline, batch, tmp_path, planted):
    path = baseline.save(tmp_path / "model.json")
    here = baseline.fingerprint["torch"]
    text = path.read_text("utf-8")
    assert text.count(f'"{here}"') == 1
    path.write_text(text.replace(f'"{here}"', '"1.13.0"'), "utf-8")
    older = gate.Baseline.load(path)
    outcome = gate.check(older, scaled(1.1) if planted else make, batch, next_token_loss)
    assert (outcome.failed, outcome.tier) == (planted, "same seeds")
    assert f"torch: 1.13.0 → {here}" in str(outcome)


# -- another thing -------------------------------------------------------------------------------


def test_another_batch_or_depth_is_not_applicable(baseline, batch):
    tokens, targets = batch
    outcome = gate.check(baseline, make, (tokens.flip(0), targets), next_token_loss)
    assert (outcome.status, outcome.layers) == ("not applicable", ("batch",))
    outcome = gate.check(
        baseline,
        lambda: Transformer(depth=5, width=32, vocabulary=64, context=16),
        batch,
        next_token_loss,
    )
    assert (outcome.status, outcome.layers) == ("not applicable", ("blocks", "blocks.5"))
    assert outcome.failed


# -- planted -------------------------------------------------------------------------------------


def skipless() -> nn.Module:
    model = make()
    model.blocks[BLOCK].attention.skip = model.blocks[BLOCK].feed_forward.skip = "none"  # type: ignore[union-attr]
    return model


def scaled(factor: float) -> Callable[[], nn.Module]:
    def maker() -> nn.Module:
        model = make()
        with torch.no_grad():
            for parameter in model.blocks[BLOCK].parameters():
                if parameter.dim() > 1:
                    parameter.mul_(factor)
        return model

    return maker


def frozen() -> nn.Module:
    model = make()
    model.blocks[BLOCK].attention.requires_grad_(False)
    return model


def tanh() -> nn.Module:
    model = make()
    model.blocks[BLOCK].feed_forward.branch.function.activation = nn.Tanh()  # type: ignore[union-attr]
    return model


def detached() -> nn.Module:
    model = make()
    handle = model.blocks[BLOCK].feed_forward.branch
    handle.register_forward_hook(lambda module, args, output: output.detach())
    return model


@pytest.mark.parametrize("order", ["same seeds", "other seeds"])
@pytest.mark.parametrize(
    "planted",
    [skipless, scaled(1.3), scaled(1.1), frozen, tanh, detached],
    ids=["no skip", "init 1.3", "init 1.1", "frozen", "tanh", "detached"],
)
def test_a_planted_regression_fails_and_its_block_is_named(baseline, batch, planted, order):
    maker = planted if order == "same seeds" else other_seeds(planted)
    outcome = gate.check(baseline, maker, batch, next_token_loss)
    assert outcome.status == "failed", outcome
    assert outcome.where == f"blocks.{BLOCK}", outcome
    assert f"blocks.{BLOCK}" in str(outcome) and f"blocks.{BLOCK}" in outcome.markdown()


def headless() -> nn.Module:
    model = make()
    value = model.blocks[BLOCK].attention.branch.function.value  # type: ignore[union-attr]
    value.register_forward_hook(lambda module, args, output: ForgetsTheFirst.apply(output, 8))
    return model


def cut() -> nn.Module:
    model = make()
    model.blocks[BLOCK].register_forward_hook(lambda module, args, output: output.detach())
    return model


@pytest.mark.parametrize(
    ("planted", "fact"),
    [
        (skipless, "skip and norm"),
        (frozen, "requires_grad"),
        (headless, "gradient rows that are 0"),
        (cut, "gradient"),
    ],
)
def test_an_exact_fact_that_is_no_longer_true_is_said_where_it_begins(baseline, batch, planted, fact):
    """Nothing in front of a cut has a gradient, in more than half of the blocks: the cut is named."""
    outcome = gate.check(baseline, planted, batch, next_token_loss)
    assert (outcome.tier, outcome.where) == ("exact facts", f"blocks.{BLOCK}"), outcome
    assert fact in {change.feature for change in outcome.changes}


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@pytest.mark.parametrize("change", [lambda y: y * float("nan"), WrongBackward.apply], ids=["out", "back"])
@pytest.mark.parametrize("order", ["same seeds", "other seeds"])
def test_the_block_that_nan_begins_in_is_named(baseline, batch, order, change):
    def broken() -> nn.Module:
        model = make()
        branch = model.blocks[BLOCK].feed_forward.branch  # type: ignore[union-attr]
        branch.register_forward_hook(lambda module, args, output: change(output))
        return model

    maker = broken if order == "same seeds" else other_seeds(broken)
    outcome = gate.check(baseline, maker, batch, next_token_loss)
    assert outcome.failed and outcome.where == f"blocks.{BLOCK}", outcome
    assert f"blocks.{BLOCK}" in {c.layer for c in outcome.changes if c.feature == "NaN or infinite"}


def test_nan_that_begins_in_the_loss_or_in_front_is_no_blocks(baseline, batch):
    nan = float("nan")
    outcome = gate.check(baseline, make, batch, lambda m, b: nan * next_token_loss(m, b))
    assert outcome.where == "blocks: gradient at the end", outcome

    def broken() -> nn.Module:
        model = make()
        model.embed.register_forward_hook(lambda module, args, output: nan * output)  # type: ignore[union-attr]
        return model

    outcome = gate.check(baseline, broken, batch, next_token_loss)
    assert outcome.where == "blocks: activation at the start", outcome


@pytest.mark.parametrize(("block", "factor"), [(1, 1.03), (2, 1.05)])
def test_a_small_change_of_the_forward_pass_is_named_where_it_begins(
    baseline, batch, tmp_path, block, factor
):
    """Its block's gradients depart, and no checksum of three decimals does before the next block."""

    def louder() -> nn.Module:
        model = make()
        query = model.blocks[block].attention.branch.function.query  # type: ignore[union-attr]
        query.register_forward_hook(lambda module, args, output: factor * output)
        return model

    for kept in (baseline, gate.Baseline.load(baseline.save(tmp_path / "kept.json"))):
        outcome = gate.check(kept, louder, batch, next_token_loss)
        assert (outcome.tier, outcome.where) == ("same seeds", f"blocks.{block}"), outcome


@pytest.mark.parametrize("order", ["same seeds", "other seeds"])
def test_weights_in_front_of_the_blocks_are_named_and_not_what_follows(baseline, batch, order):
    def larger() -> nn.Module:
        model = make()
        with torch.no_grad():
            model.embed.tokens.weight.mul_(2.0)  # type: ignore[union-attr]
        return model

    maker = larger if order == "same seeds" else other_seeds(larger)
    outcome = gate.check(baseline, maker, batch, next_token_loss)
    assert (outcome.tier, outcome.where) == (order, "embed.tokens.weight"), outcome


def test_what_enters_the_blocks_is_named_where_no_weight_changed(baseline, batch):
    def scaled_embedding() -> nn.Module:
        model = make()
        model.embed.register_forward_hook(lambda module, args, output: 2.0 * output.roll(1, -1))  # type: ignore[union-attr]
        return model

    outcome = gate.check(baseline, scaled_embedding, batch, next_token_loss)
    assert (outcome.tier, outcome.where) == ("same seeds", "input of blocks.0"), outcome


def test_a_change_of_all_blocks_is_not_blamed_on_one(baseline, batch):
    outcome = gate.check(
        baseline,
        lambda: Transformer(depth=6, width=32, vocabulary=64, context=16, activation="tanh"),
        batch,
        next_token_loss,
    )
    assert outcome.where == "6 of 6 blocks"


def shifted(baseline: gate.Baseline, by: Callable[[Feature], float]) -> gate.Baseline:
    """The same, with features changed under the same seeds."""
    features = [
        replace(item, paired=tuple(x + by(item.feature) for x in item.paired))
        for item in baseline.features
    ]
    return replace(baseline, features=tuple(features))


def test_a_changed_weight_stands_before_what_it_causes(baseline):
    size = {"rms": 0.03, "gup": 0.5, "flow": 0.2}
    run = shifted(baseline, lambda f: size.get(f.kind, 0.0) if f.block == BLOCK else 0.0)
    changes, place, _ = same_seeds(baseline, run, parse_tolerance(None))
    kinds = [change.feature for change in changes]
    assert place.layer == f"blocks.{BLOCK}"
    assert kinds == sorted(kinds, key=("rms", "gup", "flow").index)


def test_where_no_block_is_blamed_the_largest_change_stands_first(baseline):
    size = {"gup": 0.2, "flow": 0.03}
    run = shifted(
        baseline,
        lambda f: 0.4 if f.kind == "gup" and f.block == 4 else size.get(f.kind, 0.0) * (f.block >= 0),
    )
    changes, place, _ = same_seeds(baseline, run, parse_tolerance(None))
    assert place.wide and changes[0].layer == "blocks.4"
    found = [round(change.change, 6) for change in changes]
    assert found == sorted(found, reverse=True)


def test_a_tolerance_is_the_smallest_change_worth_failing_for(baseline, batch):
    wide = ",".join(f"{kind}:2nat" for kind in DEFAULTS if " " not in kind)
    assert not gate.check(baseline, scaled(1.1), batch, next_token_loss, tolerance=wide).failed
    narrow = gate.check(baseline, make, batch, next_token_loss, tolerance="effective_depth:10%")
    assert narrow.status == "passed"
    found = gate.check(baseline, scaled(2.0), batch, next_token_loss, tolerance="effective_depth:10%")
    assert any(change.feature == "effective_depth" for change in found.changes)


def test_a_sum_for_a_mean_is_another_loss(baseline, batch):
    def summed(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return next_token_loss(model, pair) * pair[1].numel()

    outcome = gate.check(baseline, make, batch, summed)
    assert (outcome.status, outcome.layers) == ("not applicable", ("loss reduction",))
    assert "a sum" in str(outcome)


def test_why_there_is_no_effective_depth_is_said(batch):
    def dropping() -> nn.Module:
        model = make()
        model.blocks[0].add_module("drop", nn.Dropout(0.1))
        return model

    baseline = gate.take(dropping, batch, next_token_loss, replicates=3)
    assert "blocks.0.drop (Dropout)" in baseline.summary["D"] and "eval()" in baseline.summary["D"]
    with pytest.raises(GateError, match="leave it out"):
        gate.check(baseline, dropping, batch, next_token_loss, tolerance="effective_depth:10%")


# -- a given model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    tokens = torch.randint(64, (35, 8, 17), generator=torch.Generator().manual_seed(2))
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


@pytest.fixture(scope="module")
def given() -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.fixture(scope="module")
def of_batches(given, batches) -> gate.Baseline:
    return gate.take(given, batches[:20], next_token_loss)


def test_a_given_model_passes_on_its_batches_and_on_others(of_batches, given, batches):
    before = {name: p.clone() for name, p in given.named_parameters()}
    same = gate.check(of_batches, given, batches[:20], next_token_loss)
    assert (same.status, same.tier) == ("passed", "same seeds"), same
    other = gate.check(of_batches, given, batches[20:], next_token_loss)
    assert (other.status, other.tier) == ("passed", "other seeds"), other
    assert "The same batches" in same.reason and "Other batches" in other.reason
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in given.named_parameters())


@pytest.mark.parametrize("part", [slice(0, 20), slice(20, 35)], ids=["same", "others"])
def test_a_given_model_that_changed_fails(of_batches, given, batches, part):
    changed = copy.deepcopy(given)
    with torch.no_grad():
        changed.blocks[BLOCK].attention.branch.function.value.weight.mul_(1.3)
    outcome = gate.check(of_batches, changed, batches[part], next_token_loss)
    assert outcome.failed and outcome.where == f"blocks.{BLOCK}", outcome


def test_a_given_model_with_other_weights_is_judged_without_other_batches(of_batches, given, batches):
    """A checkpoint that is read without one block: there is nothing to confirm it with, and no doubt."""
    lost = copy.deepcopy(given)
    torch.manual_seed(1)
    value = lost.blocks[BLOCK].attention.branch.function.value  # type: ignore[union-attr]
    nn.init.normal_(value.weight, std=1.5 * float(value.weight.detach().std()))
    outcome = gate.check(of_batches, lost, batches[:20], next_token_loss)
    assert outcome.failed and outcome.where == f"blocks.{BLOCK}", outcome
    assert "The baseline's batches and other weights" in outcome.reason


def test_the_same_batch_twice_is_no_replicate(given, batches):
    with pytest.raises(GateError, match="some are the same"):
        gate.take(given, [batches[0], *batches[:19]], next_token_loss)


def test_a_maker_is_no_model(of_batches, baseline, given, batches, batch):
    with pytest.raises(GateError, match="replicates are batches, and now a function"):
        gate.check(of_batches, make, batch, next_token_loss)
    with pytest.raises(GateError, match="now a model"):
        gate.check(baseline, given, batches, next_token_loss)
    with pytest.raises(GateError, match="20 batches"):
        gate.take(given, torch.zeros(3), next_token_loss)


def test_a_block_that_is_called_by_a_number_is_named():
    def numbered(factor: float) -> nn.Module:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))
        with torch.no_grad():
            model[3][0].weight.mul_(factor)  # type: ignore[index, union-attr]
        return model

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    baseline = gate.take(lambda: numbered(1.0), x, mean_square, replicates=5)
    outcome = gate.check(baseline, lambda: numbered(1.3), x, mean_square)
    assert outcome.where == "3" and "first at 3" in outcome.reason, outcome


# -- random numbers in the forward pass -----------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts = [nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Tanh()) for _ in range(6)]
        self.layers = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_other_dropout_masks_of_the_same_weights_are_no_regression(tmp_path):
    """A constructor that draws one number more at its end leaves every parameter as it was."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))

    def one_more() -> nn.Module:
        model = Dropping()
        torch.rand(1)
        return model

    path = gate.take(Dropping, x, mean_square).save(tmp_path / "dropping.json")
    baseline = gate.Baseline.load(path)
    same = gate.check(baseline, Dropping, x, mean_square)
    assert (same.status, same.tier) == ("passed", "same seeds"), same
    other = gate.check(baseline, one_more, x, mean_square)
    assert (other.status, other.tier) == ("passed", "other seeds"), other
    assert "from the forward pass (dropout) on" in " ".join(str(other).split())


def test_batches_in_another_order_draw_the_same_dropout_masks():
    torch.manual_seed(0)
    model = Dropping()
    batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    baseline = gate.take(model, batches, mean_square)
    outcome = gate.check(baseline, model, batches[::-1], mean_square)
    assert (outcome.status, outcome.tier) == ("passed", "same seeds"), outcome
    assert "0.0e+00" in outcome.reason


def test_a_forward_pass_that_draws_random_numbers_is_said(tmp_path):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))

    def dropping(rate: float) -> Callable[[], nn.Module]:
        def maker() -> nn.Module:
            model = Dropping()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = rate
            return model

        return maker

    without = gate.take(dropping(0.0), x, mean_square, replicates=5)
    outcome = gate.check(without, dropping(0.3), x, mean_square)
    assert outcome.failed and outcome.tier == "same seeds", outcome
    assert "the forward pass (dropout): draws none → draws random numbers" in outcome.notes
    outcome = gate.check(gate.take(Dropping, x, mean_square, replicates=5), dropping(0.5), x, mean_square)
    assert outcome.failed and any("in another order" in note for note in outcome.notes), outcome

    def larger() -> nn.Module:
        model = Dropping()
        with torch.no_grad():
            model.layers[2][0].weight.mul_(1.5)  # type: ignore[index]
        return model

    outcome = gate.check(gate.take(Dropping, x, mean_square, replicates=5), larger, x, mean_square)
    assert outcome.where == "layers.2" and not outcome.notes, outcome


# -- replicates that say nothing ------------------------------------------------------------------


def seeded(seed: int) -> Callable[[], nn.Module]:
    def maker() -> nn.Module:
        torch.manual_seed(seed)
        return make()

    return maker


def test_a_maker_that_sets_its_own_seed_makes_one_replicate(baseline, batch):
    """Its spread is 0, and five times the same is no evidence: any other seed would have p = 1e-90."""
    with pytest.raises(GateError, match="same weights under every seed"):
        gate.take(seeded(5), batch, next_token_loss, replicates=3)
    with pytest.raises(GateError, match=r"same weights under every seed.*baseline's replicates differ"):
        gate.check(baseline, seeded(5), batch, next_token_loss)


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_gradients_that_are_no_numbers_make_no_baseline(batch, factor):
    with pytest.raises(GateError, match="would guard nothing"):
        gate.take(make, batch, lambda m, b: factor * next_token_loss(m, b), replicates=3)


# -- names ---------------------------------------------------------------------------------------


def test_renamed_layers_are_matched_and_said(baseline, batch):
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = make()
            self.embed, self.layers = inner.embed, inner.blocks
            self.final_norm, self.head = inner.final_norm, inner.head

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.final_norm(x))

    outcome = gate.check(baseline, Renamed, batch, next_token_loss)
    assert outcome.status == "passed", outcome
    assert "blocks → layers" in str(outcome)


# -- the file ------------------------------------------------------------------------------------


def test_the_file_is_read_back(baseline, of_batches, tmp_path):
    for one in (baseline, of_batches):
        path = one.save(tmp_path / f"{one.kind}.json")
        again = gate.Baseline.load(path)
        by_name = {item.feature.name: item for item in again.features}
        assert by_name == {item.feature.name: item for item in one.features}
        for name in ("kind", "fingerprint", "summary", "seeds", "batches", "blocks", "architecture"):
            assert getattr(again, name) == getattr(one, name)
        for name, row in one.parameters.items():
            kept = again.parameters[name]
            assert replace(kept, checksum=()) == replace(row, checksum=())
            np.testing.assert_allclose(kept.checksum, row.checksum, atol=5.1e-4)
        for kept, now in ((again.activation, one.activation), (again.output_grad, one.output_grad)):
            assert list(kept) == list(now)  # in the order of the forward pass
            np.testing.assert_allclose([*kept.values()], [*now.values()], atol=5.1e-4)
        again.save(tmp_path / "again.json")
        assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
        assert str(again) == str(one) and "D:" in str(again) and "ξ" in str(again)


def test_the_file_is_small_and_has_one_line_per_feature(baseline, tmp_path):
    path = baseline.save(tmp_path / "model.json")
    text = path.read_text(encoding="utf-8")
    rows = len(baseline.features) + len(baseline.parameters)
    assert len(text) / rows < 105  # bytes per feature or parameter
    assert max(map(len, text.splitlines())) <= 180
    block = text[text.index('"blocks.2": {') :]
    assert [line.split(":")[0].strip() for line in block.splitlines()[1:5]] == [
        f'"{kind}"' for kind in ("flow", "act", "upd", "gup")
    ]


def test_one_layer_that_changed_is_a_small_diff(baseline, batch, tmp_path):
    """Frozen, the parameters of one sublayer change; their values and all others stay."""
    old, new = (
        one.save(tmp_path / f"{i}.json").read_text(encoding="utf-8").splitlines()
        for i, one in enumerate((baseline, gate.take(frozen, batch, next_token_loss)))
    )
    touched = sum(p.requires_grad for p in make().blocks[BLOCK].attention.parameters())  # type: ignore[union-attr]
    changed = [line for line in difflib.unified_diff(old, new, n=0) if line[:1] in "+-"]
    assert 0 < len(changed) <= 12 * touched + 40
    assert len(changed) < len(old) / 5


def test_a_file_of_an_older_schema_is_not_read_and_may_be_replaced(baseline, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"gradscope": "baseline", "schema": 1}), encoding="utf-8")
    assert gate.outdated(path)
    with pytest.raises(GateError, match=r"no longer reads.*--gradscope-update"):
        gate.Baseline.load(path)
    baseline.save(path)
    assert not gate.outdated(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: text.replace('"schema": 2', '"schema": 99'), "newer"),
        (lambda text: json.dumps({"a": 1}), "no gradient baseline"),
        (lambda text: text.replace('"schema": 2', '"schema": true'), "damaged"),
        (lambda text: text.replace('"schema": 2', '"schema": 0'), "damaged"),
        (lambda text: text.replace('"shape"', '"form"'), "damaged"),
        (lambda text: text.replace('"flow": [', '"flow": [1.5, '), "damaged"),
        (lambda text: text.replace('"flow": [', '"flow": ["x", '), "damaged"),
        (lambda text: "\x00\x01", "damaged"),
        (lambda text: " \n", "empty"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_and_kept(baseline, tmp_path, damage, said):
    path = tmp_path / "model.json"
    path.write_text(damage(baseline.save(tmp_path / "whole.json").read_text("utf-8")), "utf-8")
    before = path.read_bytes()
    with pytest.raises(GateError, match=said):
        gate.Baseline.load(path)
    with pytest.raises(GateError, match="not overwritten"):
        baseline.save(path)
    assert path.read_bytes() == before


def test_a_folder_is_no_baseline(baseline, tmp_path: Path):
    for act in (lambda: gate.Baseline.load(tmp_path), lambda: baseline.save(tmp_path)):
        with pytest.raises(GateError, match="is a folder"):
            act()


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(GateError, match="There is no baseline"):
        gate.Baseline.load(tmp_path / "none.json")
