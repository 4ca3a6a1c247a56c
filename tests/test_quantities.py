"""The derived quantities against the vectors themselves, not against the stored statistics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from synthetic import Builder, flat_record, moments, stream_step

from gradscope.analysis import QUANTITIES, history
from gradscope.errors import QuantityError
from gradscope.record import Record

L, TOKENS, FEATURES = 5, 6, 16
HEADER = {"replicates": "initialisation", "loss_denominator": 1}


def vectors(seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    gradients = [rng.normal(size=(TOKENS, FEATURES))]
    for _ in range(L):
        gradients.append(0.8 * gradients[-1] + 0.3 * rng.normal(size=(TOKENS, FEATURES)))
    activations = [
        0.5 + rng.standard_t(5, size=(TOKENS, FEATURES)) * (1 + depth) for depth in range(L + 1)
    ]
    return gradients[::-1], activations


def test_stream_quantities_equal_those_of_the_vectors() -> None:
    gradients, activations = vectors()
    record = Record({**HEADER, "loss_denominator": 12}, (stream_step(gradients, activations),))
    expected = {
        # Loops over tokens: the definition, not the shortcut through the Frobenius norm.
        "grad_l2": [12 * np.sqrt(np.mean([v @ v for v in g])) for g in gradients],
        "grad_rms": [12 * np.sqrt(np.mean([v @ v for v in g]) / FEATURES) for g in gradients],
        "act_var": [np.mean([np.var(v) for v in h]) for h in activations],
        "act_mean_square": [np.mean(h * h) for h in activations],
        "act_variance": [np.var(h, ddof=1) for h in activations],
        "kurtosis": [np.mean(h**4) / np.mean(h**2) ** 2 for h in activations],
        "max_to_rms": [np.abs(h).max() / np.sqrt(np.mean(h * h)) for h in activations],
        "zero_share": [0.0] * (L + 1),
        "grad_zero_share": [0.0] * (L + 1),
    }
    for quantity, values in expected.items():
        found = history(record, quantity)
        np.testing.assert_allclose(found.value[0], values, rtol=1e-12, err_msg=quantity)
        assert found.depth.tolist() == list(range(L + 1))
        assert found.layers == ("h", "h.0", "h.1", "h.2", "h.3", "h.4")
        assert found.ok.all()


def test_pair_quantities_equal_those_of_the_vectors() -> None:
    gradients, activations = vectors(1)
    record = Record(HEADER, (stream_step(gradients, activations),))
    cosine, share, local = [], [], []
    for g, following in itertools.pairwise(gradients):
        a, b = g.ravel(), following.ravel()
        branch = a - b  # F'ᵀδ_{l+1}: what the branch sent back
        cosine.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        share.append(b @ b / (b @ b + branch @ branch))
        local.append(branch @ a / (a @ a))  # the branch's part of the gradient, along the gradient
    for quantity, values in (("gradient_cosine", cosine), ("skip_share", share), ("local_depth", local)):
        found = history(record, quantity)
        np.testing.assert_allclose(found.value[0], values, rtol=1e-12, err_msg=quantity)
        assert found.depth.tolist() == list(range(L))


def test_an_orthogonal_branch_gives_the_closed_forms() -> None:
    skip = np.zeros((1, 4))
    skip[0, 0] = 3.0
    branch = np.zeros((1, 4))
    branch[0, 1] = 4.0
    record = Record(HEADER, (stream_step([skip + branch, skip]),))
    assert history(record, "skip_share").value[0, 0] == pytest.approx(9 / 25, abs=1e-15)
    assert history(record, "gradient_cosine").value[0, 0] == pytest.approx(3 / 5, abs=1e-15)
    assert history(record, "local_depth").value[0, 0] == pytest.approx(16 / 25, abs=1e-15)


def test_a_zero_branch_is_all_skip() -> None:
    g = np.random.default_rng(0).normal(size=(3, 5))
    record = Record(HEADER, (stream_step([g, g, g]),))
    assert history(record, "skip_share").value[0].tolist() == [1.0, 1.0]
    assert np.abs(history(record, "local_depth").value[0]).max() < 1e-15


@pytest.mark.parametrize("unit_skip", ["no unit skip", 0.0, np.nan, "compiled"])
def test_skip_quantities_are_absent_without_a_proven_unit_skip(unit_skip: float | str) -> None:
    gradients, activations = vectors()
    record = Record(HEADER, (stream_step(gradients, activations, unit_skip=unit_skip),))
    for quantity in ("skip_share", "local_depth"):
        found = history(record, quantity)
        assert np.isnan(found.value).all()
        assert set(found.status[0]) == {unit_skip if isinstance(unit_skip, str) else "no unit skip"}
    assert history(record, "gradient_cosine").ok.all()


def test_a_zero_gradient_has_no_direction_and_no_share_but_a_norm() -> None:
    g = np.random.default_rng(0).normal(size=(3, 5))
    record = Record(HEADER, (stream_step([0 * g, 0 * g, g]),))
    assert history(record, "grad_l2").value[0, :2].tolist() == [0.0, 0.0]
    assert history(record, "grad_l2").ok.all()
    assert history(record, "grad_zero_share").value[0].tolist() == [1.0, 1.0, 0.0]
    assert history(record, "gradient_cosine").status[0].tolist() == ["zero gradient", "zero gradient"]
    # δ_1 = 0 from δ_2 ≠ 0: the branch cancelled the skip exactly, which is a share of one half.
    assert history(record, "skip_share").status[0].tolist() == ["zero gradient", "ok"]
    assert history(record, "skip_share").value[0, 1] == 0.5
    assert history(record, "local_depth").status[0].tolist() == ["zero gradient", "zero gradient"]


def test_tiny_gradients_keep_their_ratios_and_lost_inner_products_are_absent() -> None:
    gradients, activations = vectors()
    small = Record(HEADER, (stream_step([g * 1e-120 for g in gradients], activations),))
    usual = Record(HEADER, (stream_step(gradients, activations),))
    for quantity in ("gradient_cosine", "local_depth", "skip_share"):
        a, b = history(small, quantity), history(usual, quantity)
        np.testing.assert_allclose(a.value, b.value, rtol=1e-9)
    lost = history(
        Record(HEADER, (stream_step([g * 1e-155 for g in gradients], activations),)), "gradient_cosine"
    )
    assert set(lost.status[0]) == {"underflow"}
    # The share comes from norms alone, which is where squares of them would have been 0.
    b = Builder()
    for depth, l2 in ((0.0, 5e-200), (1.0, 3e-200)):
        b.module(depth, f"h.{depth}", "output_grad", {"l2": l2, "diff_next_l2": 4e-200})
        b.module(depth, f"h.{depth}", "activation", {"unit_skip": 1.0})
    assert history(Record(HEADER, (b.step(),)), "skip_share").value[0, 0] == pytest.approx(9 / 25)


def test_measured_nan_is_a_value_and_not_an_absence() -> None:
    gradients, activations = vectors()
    gradients[1][0, 0] = np.nan
    found = history(Record(HEADER, (stream_step(gradients, activations),)), "grad_l2")
    assert found.status[0].tolist() == ["ok"] * (L + 1)
    assert np.isnan(found.value[0]).tolist() == [False, True, False, False, False, False]
    cosine = history(Record(HEADER, (stream_step(gradients, activations),)), "gradient_cosine")
    assert (
        cosine.ok.all() and np.isnan(cosine.value[0, :2]).all() and np.isfinite(cosine.value[0, 2:]).all()
    )


def test_the_reason_of_an_absent_statistic_is_passed_on() -> None:
    gradients, activations = vectors()
    step = stream_step(gradients, activations, first="no gradient path")
    record = Record(HEADER, (step,))
    assert history(record, "grad_l2").status[0].tolist() == ["no gradient path"] + ["ok"] * L
    assert history(record, "gradient_cosine").status[0, 0] == "no gradient path"
    assert history(record, "act_var").ok.all()


def test_a_missing_position_leaves_no_pair_across_it() -> None:
    gradients, _ = vectors()
    b = Builder()
    for depth in (1, 2, 4, 5):
        values = moments(gradients[depth]) | {"dot_next": 1.0}
        b.module(float(depth), f"h.{depth - 1}", "output_grad", values)
    found = history(Record(HEADER, (b.step(),)), "gradient_cosine")
    assert found.depth.tolist() == [1, 2, 4]
    assert found.status[0].tolist() == ["ok", "next position not recorded", "ok"]


def branched(input_l2: float | str = 2.0) -> Record:
    b = Builder()
    b.module(0.0, "h", "activation", {"l2": input_l2, "count": 8.0, "token_cosine": 0.1}, kind="Stream")
    b.module(0.5, "h.0.attn", "activation", {"l2": 1.0, "count": 8.0})
    b.module(1.0, "h.0.mlp", "activation", {"l2": 3.0, "count": 8.0})
    b.module(1.0, "h.0", "activation", {"l2": 4.0, "count": 8.0, "token_cosine": 0.2})
    b.module(1.5, "h.1.attn", "activation", {"l2": 6.0, "count": 8.0})
    b.module(2.0, "h.1.mlp", "activation", {"l2": 5.0, "count": 32.0})
    b.module(2.0, "h.1", "activation", {"l2": 9.0, "count": 8.0, "token_cosine": 0.3})
    return Record(HEADER, (b.step(),))


def test_branch_ratio_divides_by_the_stream_at_the_block_input() -> None:
    found = history(branched(), "branch_ratio")
    assert found.layers == ("h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp")
    assert found.depth.tolist() == [0.5, 1.0, 1.5, 2.0]
    assert found.value[0, :3].tolist() == [0.5, 1.5, 1.5]
    assert found.status[0, 3] == "not supported: other shape than the stream"
    assert history(branched(), "token_cosine").layers == ("h", "h.0", "h.1")
    absent = history(branched("not called"), "branch_ratio")
    assert absent.status[0, :3].tolist() == ["not called", "not called", "ok"]


def test_blocks_are_told_from_branches_without_stream_statistics() -> None:
    b = Builder()
    for k in range(2):
        b.module(k + 0.5, f"h.{k}.attn", "activation", {"l2": 1.0, "count": 8.0})
        b.module(k + 1.0, f"h.{k}.mlp", "activation", {"l2": 2.0, "count": 8.0})
        b.module(k + 1.0, f"h.{k}", "activation", {"l2": 4.0, "count": 8.0})
    record = Record(HEADER, (b.step(),))
    assert history(record, "act_mean_square").layers == ("h.0", "h.1")
    only_branches = Builder()
    for k in range(2):
        only_branches.module(k + 0.5, f"h.{k}.attn", "activation", {"l2": 1.0, "count": 8.0})
        only_branches.module(k + 1.0, f"h.{k}.mlp", "activation", {"l2": 2.0, "count": 8.0})
    with pytest.raises(QuantityError, match="no stream position"):
        history(Record(HEADER, (only_branches.step(),)), "act_mean_square")


GRAD, WEIGHT, UPDATE = ("param_grad", "l2"), ("weight", "l2"), ("update", "l2")


def test_parameter_gradients_sum_over_the_block_and_leave_frozen_ones_out() -> None:
    b = Builder()
    b.parameter(0.5, "h.0.attn.weight", {GRAD: 3.0})
    b.parameter(1.0, "h.0.mlp.weight", {GRAD: 4.0})
    b.parameter(1.0, "h.0.mlp.bias", {GRAD: "frozen"})
    b.parameter(1.5, "h.1.attn.weight", {GRAD: "frozen"})
    b.parameter(2.0, "h.1.mlp.weight", {GRAD: "frozen"})
    b.parameter(2.5, "h.2.attn.weight", {GRAD: 1.0})
    b.parameter(3.0, "h.2.mlp.weight", {GRAD: "local"})
    b.parameter(4.0, "h.3.mlp.weight", {GRAD: 0.0})
    b.parameter(np.nan, "head.weight", {GRAD: 100.0}, trunk="")
    b.module(5.0, "h.4", "activation", {"l2": 1.0, "token_cosine": 0.0})
    found = history(Record(HEADER, (b.step(),)), "param_grad")
    assert found.depth.tolist() == [1, 2, 3, 4, 5]
    assert found.status[0].tolist() == ["ok", "frozen", "local", "ok", "no parameters"]
    assert found.value[0, 0] == 5.0 and found.value[0, 3] == 0.0
    assert np.isnan(found.value[0, [1, 2, 4]]).all()


def test_parameter_norms_do_not_underflow_in_the_squares() -> None:
    b = Builder()
    b.parameter(1.0, "h.0.a", {GRAD: 3e-200})
    b.parameter(1.0, "h.0.b", {GRAD: 4e-200})
    found = history(Record(HEADER, (b.step(),)), "param_grad")
    assert found.value[0, 0] == pytest.approx(5e-200, rel=1e-12)


@pytest.mark.parametrize(
    "names",
    [
        ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
        ("attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight"),
        ("SelfAttention.q.weight", "SelfAttention.k.weight", "SelfAttention.v.weight"),
        ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight"),
        ("attention.q_lin.weight", "attention.k_lin.weight", "attention.v_lin.weight"),
        ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
        ("attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"),
    ],
)
def test_qk_ratio_from_separate_weights(names: tuple[str, str, str]) -> None:
    b = Builder()
    for name, l2 in zip(names, (3.0, 4.0, 10.0), strict=True):
        b.parameter(0.5, f"h.0.{name}", {GRAD: l2})
        b.parameter(0.5, f"h.0.{name.removesuffix('weight')}bias", {GRAD: 1000.0})
    b.parameter(2.0, "h.1.mlp.weight", {GRAD: 1.0})
    found = history(Record(HEADER, (b.step(),)), "qk_ratio")
    assert found.value[0, 0] == 0.5
    assert found.status[0].tolist() == ["ok", "no attention"]


def test_qk_ratio_from_packed_projections() -> None:
    b = Builder()
    thirds = {"query_l2": 3.0, "key_l2": 4.0, "value_l2": 20.0}
    for k in range(2):
        rows: dict[tuple[str, str], float | str] = {GRAD: 21.0}
        rows |= {("param_grad", n): v if k == 0 else "frozen" for n, v in thirds.items()}
        b.parameter(k + 0.5, f"h.{k}.attn.c_attn.weight", rows)
        b.parameter(k + 1.0, f"h.{k}.mlp.weight", {GRAD: 1.0})
    found = history(Record(HEADER, (b.step(),)), "qk_ratio")
    assert found.value[0, 0] == 0.25
    assert found.status[0].tolist() == ["ok", "frozen"]


def test_qk_ratio_is_absent_where_one_of_the_three_is_frozen_and_exact_where_zero() -> None:
    b = Builder()
    for k, values in enumerate(((3.0, "frozen", 5.0), (0.0, 0.0, 5.0), (0.0, 0.0, 0.0))):
        for role, value in zip("qkv", values, strict=True):
            b.parameter(k + 1.0, f"h.{k}.{role}_proj.weight", {GRAD: value})
    found = history(Record(HEADER, (b.step(),)), "qk_ratio")
    assert found.status[0].tolist() == ["frozen", "ok", "zero gradient"]
    assert found.value[0, 1] == 0.0


def test_qk_ratio_without_known_names_says_which_names_are_known() -> None:
    b = Builder()
    b.parameter(1.0, "h.0.fused.weight", {GRAD: 1.0})
    with pytest.raises(QuantityError, match="q_proj, k_proj, v_proj"):
        history(Record(HEADER, (b.step(),)), "qk_ratio")


def test_update_ratio_is_over_the_same_parameters() -> None:
    b = Builder()
    b.parameter(0.5, "h.0.a.weight", {UPDATE: 0.03, WEIGHT: 30.0})
    b.parameter(1.0, "h.0.b.weight", {UPDATE: 0.04, WEIGHT: 40.0})
    b.parameter(1.0, "h.0.c.weight", {UPDATE: "frozen", WEIGHT: 1e6})
    b.parameter(2.0, "h.1.b.weight", {UPDATE: "not sampled", WEIGHT: 1.0})
    found = history(Record(HEADER, (b.step(),)), "update_ratio")
    assert found.value[0, 0] == pytest.approx(1e-3, rel=1e-12)
    assert found.status[0].tolist() == ["ok", "not sampled"]


def test_unknown_loss_denominator_makes_levels_relative_and_only_levels() -> None:
    norms = np.array([[4.0, 2.0, 1.0]])
    found = history(flat_record(norms, header={"loss_denominator": None}), "grad_l2")
    assert found.unit == "relative"
    assert any("up to one factor per step" in note for note in found.notes)
    np.testing.assert_allclose(found.value, norms, rtol=1e-15)
    gradients, activations = vectors()
    record = Record({}, (stream_step(gradients, activations),))
    assert history(record, "act_var").unit == "activation²"
    assert history(record, "gradient_cosine").unit == "1"


def test_layouts_that_differ_between_steps_are_joined_by_depth() -> None:
    gradients, activations = vectors()
    short = stream_step(gradients[:4], activations[:4], step=0)
    long = stream_step(gradients, activations, step=1)
    found = history(Record(HEADER, (short, long)), "grad_l2")
    assert found.value.shape == (2, L + 1)
    assert found.status[0].tolist() == ["ok"] * 4 + ["not recorded"] * 2
    assert found.ok[1].all()


def test_every_quantity_says_what_it_is() -> None:
    for quantity in QUANTITIES.values():
        assert quantity.meaning and quantity.source and quantity.label and quantity.unit
        assert quantity.name == quantity.function.__name__


def test_unknown_names_and_empty_records_say_what_there_is() -> None:
    gradients, activations = vectors()
    record = Record(HEADER, (stream_step(gradients, activations),))
    with pytest.raises(QuantityError, match=r"no quantity 'grad_norm'.*act_var.*grad_l2.*token_cosine"):
        history(record, "grad_norm")
    with pytest.raises(QuantityError, match=r"'encoder'.*trunks are 'h'"):
        history(record, "grad_l2", trunk="encoder")
    with pytest.raises(QuantityError, match="no step"):
        history(Record(HEADER), "grad_l2")
    with pytest.raises(QuantityError, match=r"'update_ratio' is derived from.*update="):
        history(flat_record(np.ones((1, 3))), "update_ratio")
    with pytest.raises(QuantityError, match=r"'act_var' is derived from"):
        history(flat_record(np.ones((1, 3))), "act_var")
    b = Builder()
    b.module(np.nan, "fc", "activation", {"l2": 1.0}, trunk="")
    with pytest.raises(QuantityError, match="no depth axis"):
        history(Record(HEADER, (b.step(),)), "grad_l2")


def test_several_trunks_must_be_chosen_from_unless_only_one_has_values() -> None:
    gradients, _ = vectors()
    b = Builder()
    for trunk in ("encoder", "decoder"):
        for k in range(2):
            values = moments(gradients[k]) | {"dot_next": 1.0}
            b.module(float(k + 1), f"{trunk}.{k}", "output_grad", values, trunk=trunk)
    both = Record(HEADER, (b.step(),))
    with pytest.raises(QuantityError, match=r"2 trunks, 'encoder', 'decoder'.*trunk='encoder'"):
        history(both, "grad_l2")
    assert history(both, "grad_l2", trunk="decoder").layers == ("decoder.0", "decoder.1")
    b.absent = {i: "no gradient path" for i, row in enumerate(b.rows) if row[0] == "encoder"}
    one = history(Record(HEADER, (b.step(),)), "grad_l2")
    assert one.trunk == "decoder" and "only 'decoder'" in one.notes[0]


def test_a_gradient_that_dies_towards_the_input_has_no_direction_there() -> None:
    g = np.random.default_rng(0).normal(size=(3, 5))
    record = Record(HEADER, (stream_step([g, 0 * g, g]),))
    assert history(record, "gradient_cosine").status[0].tolist() == ["zero gradient", "zero gradient"]
    # δ_0 ≠ 0 from δ_1 = 0: all of it came by the branch.
    assert history(record, "skip_share").value[0].tolist() == [0.0, 0.5]
    assert history(record, "local_depth").value[0, 0] == 1.0


def test_two_attentions_in_one_block_are_stacked_and_absent_together() -> None:
    b = Builder()
    for k, second in enumerate(((4.0, 0.0, 12.0), ("frozen", "frozen", "frozen"))):
        for role, value, other in zip("qkv", (3.0, 0.0, 5.0), second, strict=True):
            b.parameter(k + 1 / 3, f"h.{k}.self_attn.{role}_proj.weight", {GRAD: value})
            b.parameter(k + 2 / 3, f"h.{k}.cross_attn.{role}_proj.weight", {GRAD: other})
    found = history(Record(HEADER, (b.step(),)), "qk_ratio")
    assert found.value[0, 0] == pytest.approx(5 / 13, rel=1e-12)
    assert found.status[0].tolist() == ["ok", "frozen"]
