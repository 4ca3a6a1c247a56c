"""`gradscope.compare`: planted changes are named with their size; Records of one model are the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from synthetic import flat_record, stream_step
from torch import Tensor, nn

import gradscope
from gradscope import reference
from gradscope.cli import main
from gradscope.errors import QuantityError
from gradscope.record import Record

TOKENS = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
BATCH = (TOKENS[:, :-1], TOKENS[:, 1:])


def header(first: int = 0, **more: object) -> dict[str, object]:
    return {"replicates": "initialisation", "loss_denominator": 1, "seeds": {"first": first}} | more


def flows(replicates: int, seed: int, *, planted: float = 0.0, spread: float = 0.01) -> np.ndarray:
    """[R, 9] random walks over depth; block 5's increment r_5 = ln(g_5/g_6) is larger by ``planted``."""
    rng = np.random.default_rng(seed)
    increments = rng.normal(0.0, spread, (replicates, 8))
    increments[:, 5] += planted
    y = np.concatenate([np.cumsum(increments[:, ::-1], axis=1)[:, ::-1], np.zeros((replicates, 1))], 1)
    return np.exp(y)


def test_one_increment_of_other_seeds_is_named_with_a_moderated_probability() -> None:
    """Smyth's t written out: the variance of the eight increments is drawn towards their mean."""
    run, base = flows(5, 1, planted=0.3), flows(4, 2)
    found = gradscope.compare(flat_record(run, header=header(0)), flat_record(base, header=header(100)))
    assert (found.method, found.same, found.features) == ("replicates", False, 9)  # 8 and the level
    assert found.first is not None
    assert (found.first.layer, found.first.depth, found.first.quantity) == ("h.5", 6.0, "flow")
    r = [np.log(x[:, :-1] / x[:, 1:]) for x in (run, base)]
    squares = sum(((x - x.mean(axis=0)) ** 2).sum(axis=0) for x in r)
    s2 = squares / 7  # 5 + 4 − 2 degrees of freedom
    excess = np.var(np.log(s2), ddof=1) - special.polygamma(1, 7 / 2)
    prior = 10.0
    if excess > 0:
        prior = min(10.0, 2 * optimize.brentq(lambda x: special.polygamma(1, x) - excess, 1e-3, 1e6))
    spread = math.sqrt((prior * s2.mean() + 7 * s2[5]) / (prior + 7))
    change = r[0][:, 5].mean() - r[1][:, 5].mean()
    t = change / (spread * math.sqrt(1 / 5 + 1 / 4))
    assert found.first.change == pytest.approx(change, rel=1e-9)
    assert found.first.probability == pytest.approx(9 * 2 * stats.t.sf(t, 7 + prior), rel=1e-6)
    assert len(found.departures) == 1


def test_few_increments_lend_each_other_no_variance() -> None:
    run, base = flows(5, 1, planted=0.3)[:, 4:8], flows(4, 2)[:, 4:8]
    found = gradscope.compare(flat_record(run, header=header(0)), flat_record(base, header=header(100)))
    assert found.first is not None
    assert (found.first.layer, found.first.depth, found.first.quantity) == ("h.1", 2.0, "flow")
    r = [np.log(x[:, 1] / x[:, 2]) for x in (run, base)]
    test = stats.ttest_ind(*r)
    assert found.first.change == pytest.approx(r[0].mean() - r[1].mean(), rel=1e-9)
    assert found.first.probability == pytest.approx(4 * test.pvalue, rel=1e-6)
    assert len(found.departures) == 1


def test_the_same_seeds_are_paired() -> None:
    rng = np.random.default_rng(3)
    base = flows(4, 2, spread=1.0)  # far apart, but the same in both
    run = base.copy()
    run[:, :6] *= np.exp(0.1 + rng.normal(0, 0.01, (4, 1)))
    found = gradscope.compare(flat_record(run, header=header()), flat_record(base, header=header()))
    assert found.method == "paired replicates"
    assert found.first is not None and found.first.layer == "h.5"
    test = stats.ttest_rel(np.log(run[:, 5] / run[:, 6]), np.log(base[:, 5] / base[:, 6]))
    assert found.first.probability == pytest.approx(9 * test.pvalue, rel=1e-6)
    other = gradscope.compare(flat_record(run, header=header(50)), flat_record(base, header=header()))
    assert other.same  # beside a spread of 1, .1 is nothing


def test_what_is_clear_and_small_does_not_depart() -> None:
    run, base = flows(8, 1, planted=0.04, spread=1e-3), flows(8, 2, spread=1e-3)
    pair = flat_record(run, header=header(0)), flat_record(base, header=header(100))
    assert gradscope.compare(*pair).same
    assert not gradscope.compare(*pair, tolerance=0.02).same
    assert not gradscope.compare(*pair, tolerance={"flow": 0.02}).same


def test_false_departures_are_rarer_than_said() -> None:
    wrong = 0
    for seed in range(300):
        run, base = flows(3, 2 * seed), flows(20, 2 * seed + 1)
        pair = flat_record(run, header=header(0)), flat_record(base, header=header(100))
        wrong += not gradscope.compare(*pair, tolerance=0.0).same
    assert wrong <= stats.binom.ppf(0.999, 300, 0.05)
    assert wrong >= stats.binom.ppf(0.001, 300, 0.02)  # Bonferroni over nine numbers is no more careful


def test_levels_are_compared_only_where_the_denominator_is_known() -> None:
    base = flows(5, 2)
    doubled = flat_record(2 * base, header=header())
    found = gradscope.compare(doubled, flat_record(base, header=header()))
    assert [d.kind for d in found.departures] == ["level"]
    assert found.departures[0].change == pytest.approx(math.log(2))
    unknown = flat_record(base, header=header(loss_denominator=None))
    found = gradscope.compare(doubled, unknown)
    assert found.same
    assert any("denominator" in note for note in found.notes)


def test_a_number_on_one_side_only_departs() -> None:
    base = flows(3, 2)
    status = np.full(base.shape, "", dtype=object)
    status[:, :4] = "no gradient path"
    cut = flat_record(base, header=header(), status=status)
    found = gradscope.compare(cut, flat_record(base, header=header()))
    assert found.first is not None
    # The gradient runs from the loss: depth 3 is the first without one.
    assert (found.first.depth, found.first.kind) == (3.0, "state")
    assert (found.first.expected, found.first.obtained) == ("a number", "no gradient path")
    zero = base.copy()
    zero[:, :4] = 0.0
    found = gradscope.compare(flat_record(zero, header=header()), flat_record(base, header=header()))
    assert found.first is not None and found.first.obtained == "exactly 0"
    assert any("numbers are not compared" in note for note in found.notes)


def test_two_runs_depart_first_at_a_step_and_a_layer() -> None:
    def run(change: float) -> Record:
        steps = []
        for step in range(6):
            rng = np.random.default_rng(step)
            arrays = [rng.normal(size=(4, 8)) for _ in range(7)]
            grown = [x.copy() for x in arrays]
            if step >= 3:
                for x in grown[4:]:
                    x *= 1 + change
            steps.append(stream_step(arrays, grown, step=step))
        return Record({"replicates": "run", "seeds": {"torch": 1}, "model": "Net"}, tuple(steps))

    found = gradscope.compare(run(0.1), run(0.0))
    assert found.method == "one run each"
    assert found.first is not None
    assert (found.first.step, found.first.layer, found.first.quantity) == (3, "h.3", "activation")
    assert found.first.change == pytest.approx(math.log(1.1))
    assert math.isnan(found.first.probability)
    assert gradscope.compare(run(0.0), run(0.0)).same
    assert gradscope.compare(run(0.019), run(0.0)).same


FAULTS = ["scale", "no skip", "half the gradient", "detached", "frozen"]


def trained(fault: str, variant: Literal["pre_norm", "post_norm"]) -> Record:
    """Twelve steps of AdamW; before the seventh, something happens to the fourth block."""
    torch.manual_seed(0)
    model = reference.Transformer(variant, depth=6, width=32, heads=2, vocabulary=64, context=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    block = model.blocks[3]
    assert isinstance(block, reference.Block)
    broken = ""

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        if broken == "half the gradient":
            return (output + output.detach()) / 2
        return output.detach() if broken == "detached" else output

    block.feed_forward.branch.register_forward_hook(hook)
    data = torch.randint(64, (12, 4, 17), generator=torch.Generator().manual_seed(0))
    with gradscope.watch(model) as scope:
        for step, tokens in enumerate(data):
            if step == 6:
                broken = fault
                if fault == "scale":
                    with torch.no_grad():
                        block.feed_forward.branch.function.expand.weight.mul_(1.5)  # type: ignore[union-attr]
                if fault == "no skip":
                    block.attention.skip = "none"
                if fault == "frozen":
                    block.requires_grad_(False)
            reference.next_token_loss(model, (tokens[:, :-1], tokens[:, 1:])).backward()
            optimizer.step()
            optimizer.zero_grad()
    return scope.record


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm"])
def test_two_trainings_depart_where_and_when_one_was_broken(
    variant: Literal["pre_norm", "post_norm"],
) -> None:
    base = trained("", variant)
    assert gradscope.compare(trained("", variant), base).same
    for fault in FAULTS:
        found = gradscope.compare(trained(fault, variant), base)
        assert found.first is not None
        assert (found.first.step, found.first.layer) == (6, "blocks.3"), (fault, found)
        assert "departs first in blocks.3" in found.summary and "at step 6" in found.summary


def test_renamed_added_and_removed_layers_are_matched_and_reported() -> None:
    base = flat_record(flows(3, 2), header=header())
    renamed = flat_record(flows(3, 2), header=header(), trunk="layers")
    found = gradscope.compare(renamed, base)
    assert found.same
    assert ("h.0", "layers.0") in found.renamed
    assert "renamed, matched by depth: h → layers" in str(found)
    shorter = flat_record(flows(3, 2)[:, :-1], header=header())
    found = gradscope.compare(shorter, base)
    assert (found.added, found.removed) == ((), ("h.7",))
    assert not found.same
    assert gradscope.compare(base, shorter).added == ("h.7",)


def test_half_of_the_blocks_are_no_first_block() -> None:
    run = flows(5, 1)
    run *= np.exp(0.2 * np.arange(9)[::-1])
    found = gradscope.compare(
        flat_record(run, header=header(0)), flat_record(flows(5, 2), header=header(100))
    )
    assert "8 of 8 blocks depart" in found.summary


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"replicates": "batch"}, "of kind 'initialisation'"),
        ({"steps": [4, 4, 4]}, "no step in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, object], says: str) -> None:
    base = flat_record(flows(3, 2), header=header())
    steps = change.pop("steps", None)
    other = flat_record(flows(3, 2), header=header(**change), steps=steps)  # type: ignore[arg-type]
    with pytest.raises(QuantityError, match=says):
        gradscope.compare(base, other)


@pytest.mark.parametrize("seed", [0, 100], ids=["paired", "other seeds"])
def test_replicates_that_are_one_are_no_evidence(seed: int) -> None:
    """A maker that sets its own seed: a change of .05 nat would be clear in every increment."""
    base = flat_record(flows(5, 2), header=header(0))
    once = np.repeat(flows(1, 3), 5, axis=0)
    one = flat_record(once, header=header(seed))
    with pytest.raises(QuantityError, match="replicates of the record are one and the same"):
        gradscope.compare(one, base)
    with pytest.raises(QuantityError, match="replicates of the baseline are one and the same"):
        gradscope.compare(base, one)
    assert gradscope.compare(one, flat_record(once, header=header(seed))).same


def test_wrong_tolerances_are_refused() -> None:
    base = flat_record(flows(3, 2), header=header())
    with pytest.raises(ValueError, match="no quantity 'flo'"):
        gradscope.compare(base, base, tolerance={"flo": 0.1})
    with pytest.raises(ValueError, match="0 or more"):
        gradscope.compare(base, base, tolerance=-1.0)
    with pytest.raises(TypeError, match="number of nats"):
        gradscope.compare(base, base, tolerance="20%")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a Record"):
        gradscope.compare(base, "run.jsonl")  # type: ignore[arg-type]


def measured(change: str, seed: int, variant: Literal["pre_norm", "post_norm"] = "pre_norm") -> Record:
    def make() -> nn.Module:
        activation = "tanh" if change == "tanh in all" else "gelu"
        model = reference.Transformer(variant, depth=8, width=32, heads=2, activation=activation)
        block = model.blocks[5]
        assert isinstance(block, reference.Block)
        if change == "init":
            with torch.no_grad():
                for p in block.parameters():
                    p.mul_(1.3)
        if change == "no skip":
            block.attention.skip = block.feed_forward.skip = "none"
        if change == "half the gradient":
            branch = block.feed_forward.branch
            branch.register_forward_hook(lambda module, args, output: (output + output.detach()) / 2)
        return model

    return gradscope.measure(make, BATCH, reference.next_token_loss, 5, seed=seed)


@pytest.mark.parametrize("seed", [0, 100])
@pytest.mark.parametrize("change", ["init", "no skip", "half the gradient"])
@pytest.mark.parametrize("variant", ["pre_norm", "post_norm"])
def test_a_planted_change_of_a_model_names_its_block(
    variant: Literal["pre_norm", "post_norm"], change: str, seed: int
) -> None:
    found = gradscope.compare(measured(change, seed, variant), measured("", 0, variant))
    assert found.first is not None
    assert found.first.layer == "blocks.5"
    assert "departs first in blocks.5" in found.summary, found


def test_a_change_of_all_blocks_is_blamed_on_none() -> None:
    found = gradscope.compare(measured("tanh in all", 0), measured("", 0))
    assert found.wide and "8 of 8 blocks depart" in found.summary, found


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_trunk_that_runs_first_departs_first() -> None:
    """The third block of the encoder, not the first of the decoder, which is less deep in its trunk."""

    def make(scale: float = 1.0) -> nn.Module:
        model = nn.Transformer(16, 2, 4, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
        with torch.no_grad():
            for layer in (model.encoder.layers[2], model.decoder.layers[0]):
                layer.linear1.weight.mul_(scale)  # type: ignore[union-attr]
        return model

    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(2, 8, 16, generator=generator), torch.randn(2, 6, 16, generator=generator))

    def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return model(*pair).square().mean()

    base = gradscope.measure(make, batch, loss, 8)
    found = gradscope.compare(gradscope.measure(lambda: make(3.0), batch, loss, 8), base)
    assert found.first is not None and found.first.layer == "encoder.layers.2", found
    assert any(d.trunk.startswith("decoder") for d in found.departures)


@pytest.mark.parametrize("variant", ["pre_norm", "post_norm"])
def test_an_unchanged_model_is_the_same(variant: Literal["pre_norm", "post_norm"]) -> None:
    base = measured("", 0, variant)
    assert gradscope.compare(measured("", 0, variant), base).same
    assert gradscope.compare(measured("", 100, variant), base).same


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = flat_record(flows(5, 2), header=header(model="Net")).save(tmp_path / "base.jsonl")
    run = flat_record(flows(5, 1, planted=0.3), header=header(9, model="Net|x"))
    path = run.save(tmp_path / "run.jsonl")
    assert main(["compare", str(base), str(base)]) == 0
    assert "the same" in capsys.readouterr().out
    words = ["compare", str(path), str(base), "--markdown", str(tmp_path / "c.md")]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "departs first in h.5 (flow), at step 0" in out
    assert max(map(len, out.splitlines())) <= 120
    text = (tmp_path / "c.md").read_text(encoding="utf-8")
    assert "| 0 | h.5 | flow increment |" in text
    assert main([*words, "--tolerance", ".5"]) == 0
    for wrong in (["--tolerance", "20%"], ["--tolerance", "-1"]):
        assert main([*words, *wrong]) == 2
    assert main(["compare", str(path), "nowhere.jsonl"]) == 2
