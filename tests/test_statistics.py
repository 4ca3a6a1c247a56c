"""Each kernel against its slow twin, over shapes, scales and dtypes that break naive ones."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given, settings
from torch import Tensor

from gradscope import statistics
from gradscope.record import STATISTICS
from gradscope.statistics import ACTIVATION, GRADIENT

pytestmark = pytest.mark.usefixtures("both_ways")

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Largest relative error of a statistic: float32 arithmetic over a few thousand elements, or float64.
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
QUADRATIC = ("variance", "token_variance", "kurtosis")
SMALLEST = 5e-324  # the step between denormal float64


def measured(x: Tensor, columns: tuple[str, ...] = ACTIVATION, **options: Any) -> dict[str, float | str]:
    options = {"slow": True, "stream": True, **options}
    values, absent = statistics.measure(x, columns, **options)
    return {n: absent.get(i, float(values[i])) for i, n in enumerate(columns)}


def twin(x: Tensor, feature_axis: int = -1, valid: np.ndarray | None = None) -> dict[str, float]:
    array = x.detach().double().numpy()
    found = reference.statistics(array, feature_axis, valid)
    found["token_variance"] = reference.token_variance(reference.positions(array, feature_axis, valid))
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, float], dtype: torch.dtype) -> None:
    rms = expected["l2"] / math.sqrt(expected["count"])
    for name, truth in expected.items():
        if name not in found:
            continue
        value = found[name]
        if isinstance(value, str):
            assert value in ("one element",), (name, value)
            continue
        # Means cancel, and variances around them: what is left is as good as the elements.
        unit = rms if name == "mean" else rms**2 if "variance" in name else abs(truth)
        relative = RELATIVE[dtype] * (4 if name in QUADRATIC else 1)
        if "variance" in name:
            # A variance far below the mean square must keep its digits too: two passes do.
            unit = max(abs(truth), unit * 1e-9 if dtype != torch.float64 else unit * 1e-15)
        # A mean that is rounded moves each difference to it.
        rounded = 4e-16 * rms * math.sqrt(abs(truth)) if "variance" in name else 0.0
        ok = value == truth or abs(value - truth) <= relative * unit + rounded + 2 * SMALLEST
        assert ok or (math.isnan(value) and math.isnan(truth)), (name, value, truth)


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)
scales = st.floats(-30, 30).map(lambda e: 10.0**e)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(FLOATS))
    x = np.random.default_rng(draw(seeds)).standard_normal(draw(shapes))
    x = x + draw(st.sampled_from([0.0, 1.0, 1000.0, -30.0]))
    scale = draw(scales)
    limits = torch.finfo(dtype)
    # Inside the dtype's range, denormals included.
    scale = min(max(scale, 4 * limits.smallest_normal * limits.eps), limits.max / 1e4)
    x = torch.tensor(x * scale).to(dtype)
    zeros = draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask = torch.tensor(np.random.default_rng(draw(seeds)).random(tuple(x.shape)) < zeros)
    return x.masked_fill(mask, 0.0)


# -- all moments -------------------------------------------------------------------------------------


@given(tensors())
def test_statistics_equal_the_twin_at_any_scale(x: Tensor) -> None:
    assert_equal(measured(x), twin(x), x.dtype)


@given(tensors(), st.sampled_from(["transposed", "strided", "expanded", "flipped"]))
def test_statistics_do_not_depend_on_the_layout(x: Tensor, layout: str) -> None:
    if layout == "transposed":
        x = x.movedim(0, -1)
    elif layout == "strided":
        x = torch.stack([x, torch.full_like(x, 7.0)], -1)[..., 0]
    elif layout == "expanded":
        x = x[..., :1].expand(*x.shape[:-1], 5)
    else:
        x = x.flip(0)
    assert_equal(measured(x), twin(x), x.dtype)


@given(tensors())
def test_the_path_without_synchronisation_equals_the_other(x: Tensor) -> None:
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    robust = {k: float(v) for k, v in statistics.moments.robust_moments(wide, None).items()}
    expected = twin(x)
    del expected["tokens"], expected["kurtosis"], expected["token_variance"]
    if x.numel() == 1:
        assert math.isnan(robust.pop("variance"))
    assert_equal(robust, expected, x.dtype)
    assert set(robust) >= set(expected)


@given(tensors(), seeds)
def test_a_mask_leaves_padding_out_of_everything(x: Tensor, seed: int) -> None:
    x = x.reshape(1, *x.shape) if x.dim() < 3 else x
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    valid = torch.tensor(np.random.default_rng(seed).random((x.shape[0], x.shape[1])) < 0.6)
    x = torch.where(valid[..., None], x, math.nan)
    found = measured(x, valid=valid)
    if not valid.any():
        assert set(found.values()) == {"not supported: everything is masked"}
        return
    expected = twin(x, valid=valid.numpy())
    assert_equal(found, expected, x.dtype)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    robust = {k: float(v) for k, v in statistics.moments.robust_moments(wide, valid).items()}
    keys = set(robust) - ({"variance"} if expected["count"] == 1 else set())
    assert_equal({k: robust[k] for k in keys}, {k: expected[k] for k in keys if k in expected}, x.dtype)


def test_a_mask_is_turned_for_sequence_first_tensors() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, 3, dtype=torch.float64)  # [batch, tokens, d], square on purpose
    valid = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    batch_first = measured(x, valid=valid)
    sequence_first = measured(x.transpose(0, 1), valid=valid, token_axis=0)
    assert batch_first["tokens"] == 10
    for name, value in batch_first.items():
        if not isinstance(value, str) and not math.isnan(value):
            assert sequence_first[name] == pytest.approx(value, rel=1e-12), name


def test_a_mask_leaves_pooled_rows_alone_and_covers_flattened_tokens() -> None:
    mask = torch.tensor([[1, 0], [1, 1]]).bool()
    assert measured(torch.ones(2, 3), valid=mask)["count"] == 6  # one row per sequence
    flattened = torch.tensor([[1.0], [100.0], [2.0], [3.0]])
    found = measured(flattened, valid=mask)
    assert (found["count"], found["absmax"]) == (3, 3.0)
    found = measured(flattened[[0, 2, 1, 3]], valid=mask, token_axis=0)  # tokens first, then sequences
    assert (found["count"], found["absmax"]) == (3, 3.0)


def test_where_a_mask_does_not_fit_there_is_no_value() -> None:
    for shape in ((5, 3), (2, 4, 2, 2), (3, 2, 2)):
        found = measured(torch.ones(shape), valid=torch.tensor([[1, 0], [1, 1]]).bool())
        assert str(found["l2"]).startswith("not supported: the mask")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_a_variance_beside_a_large_mean_keeps_its_digits(dtype: torch.dtype, ratio: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(64, 32, dtype=torch.float64) + ratio).to(dtype)
    expected = reference.statistics(x.double().numpy())
    token_variance = reference.token_variance(x.double().numpy())
    found = measured(x)
    assert found["variance"] == pytest.approx(expected["variance"], rel=1e-7)
    assert found["token_variance"] == pytest.approx(token_variance, rel=1e-5)
    assert found["mean"] == pytest.approx(expected["mean"], rel=1e-7)
    robust = float(statistics.moments.robust_moments(x, None)["variance"])
    assert robust == pytest.approx(expected["variance"], rel=1e-4)


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-80, 1e80, 1e153, 1e300])
def test_float64_far_from_one(scale: float, robust: bool) -> None:
    torch.manual_seed(0)
    unit = torch.randn(5, 7, 6, dtype=torch.float64)
    x = unit * scale
    at_one = measured(unit)
    found = (
        {k: float(v) for k, v in statistics.moments.robust_moments(x, None).items()}
        if robust
        else measured(x)
    )
    assert found["l2"] == pytest.approx(at_one["l2"] * scale, rel=1e-12, abs=0)
    assert found["mean"] == pytest.approx(at_one["mean"] * scale, rel=1e-10, abs=0)
    with np.errstate(over="ignore"):
        # Underflow to 0 and overflow to inf are then the nearest float64.
        assert found["variance"] == pytest.approx(scale * (scale * at_one["variance"]), rel=1e-10, abs=0)
    if not robust:
        assert found["kurtosis"] == pytest.approx(at_one["kurtosis"], rel=1e-10)
        assert found["token_cosine"] == pytest.approx(at_one["token_cosine"], abs=1e-10)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-22, 1e-15, 1e15, 1e25, 1e36])
def test_slow_statistics_of_float32_far_from_one(scale: float) -> None:
    torch.manual_seed(0)
    unit = torch.randn(3, 5, 6)
    other = torch.randn(3, 5, 6)
    x = unit * scale
    found = measured(x, input=other * scale)
    truth = measured(unit.double(), input=other.double())
    assert found["kurtosis"] == pytest.approx(truth["kurtosis"], rel=1e-5)
    assert found["token_cosine"] == pytest.approx(truth["token_cosine"], abs=1e-5)
    assert found["input_cosine"] == pytest.approx(truth["input_cosine"], abs=1e-5)
    assert found["token_variance"] == pytest.approx(truth["token_variance"] * scale**2, rel=1e-5, abs=0)


def test_half_precision_is_accumulated_wider() -> None:
    x = torch.full((4096,), 1e-5, dtype=torch.float16)
    assert x.square().sum().sqrt() == 0  # the naive norm
    assert measured(x)["l2"] == pytest.approx(64 * float(x[0]), rel=1e-6, abs=0)
    assert statistics.norms([x])[0] == pytest.approx(64 * float(x[0]), rel=1e-6, abs=0)


@pytest.mark.parametrize("count", [3_000_000, 30_000_000])
def test_large_float32_tensors_keep_their_digits(count: int) -> None:
    x = torch.linspace(0.5, 1.5, count).reshape(-1, 1000)
    truth = torch.linalg.vector_norm(x, dtype=torch.float64).item()
    assert statistics.norms([x])[0] == pytest.approx(truth, rel=1e-6, abs=0)
    assert measured(x, GRADIENT, slow=False)["l2"] == pytest.approx(truth, rel=1e-6, abs=0)
    assert statistics.inner_product(x, x) == pytest.approx(truth**2, rel=1e-6, abs=0)
    assert statistics.difference_norm(x, torch.zeros_like(x)) == pytest.approx(truth, rel=1e-6, abs=0)


# -- zero, absent, not finite ------------------------------------------------------------------------


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_exact_zeros_are_zeros(dtype: torch.dtype, robust: bool) -> None:
    x = torch.zeros(4, 3, dtype=dtype)
    found: dict[str, Any] = measured(x)
    if robust:
        found = {k: float(v) for k, v in statistics.moments.robust_moments(x.double(), None).items()}
    assert (found["l2"], found["mean"], found["variance"], found["absmax"]) == (0, 0, 0, 0)
    assert (found["zeros"], found["nonfinite"], found["count"]) == (12, 0, 12)
    assert math.isnan(measured(x)["kurtosis"])


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("bad", "l2"),
    [
        ([math.nan], math.nan),
        ([math.inf], math.inf),
        ([-math.inf], math.inf),
        ([math.inf, math.nan], math.nan),
        ([math.nan, math.inf], math.nan),
        ([math.inf, -math.inf], math.inf),
    ],
)
def test_what_is_not_finite_is_counted_and_seen(
    bad: list[float], l2: float, dtype: torch.dtype, robust: bool
) -> None:
    x = torch.tensor([1.0, *bad, 0.0, -2.0], dtype=dtype)
    found = (
        {k: float(v) for k, v in statistics.moments.robust_moments(x.float(), None).items()}
        if robust
        else measured(x)
    )
    assert found["nonfinite"] == len(bad)
    assert found["zeros"] == 1
    assert found["l2"] == pytest.approx(l2, nan_ok=True)
    assert found["absmax"] == pytest.approx(l2, nan_ok=True)
    assert math.isnan(found["variance"])
    assert found["mean"] == pytest.approx(sum([1.0, *bad, 0.0, -2.0]) / (3 + len(bad)), nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_finite_numbers_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest, largest / 2], dtype=dtype)
    found = measured(x)
    assert found["nonfinite"] == 0
    assert found["l2"] == pytest.approx(largest * 1.5) if dtype == torch.float32 else True
    assert found["absmax"] == largest
    assert found["mean"] == pytest.approx(largest / 6, rel=1e-6)


@pytest.mark.parametrize("value", [3.0, 0.0, -1e-30])
def test_one_element_has_no_variance(value: float) -> None:
    for x in (torch.tensor(value), torch.tensor([value]), torch.tensor([[value]])):
        found = measured(x)
        assert found["variance"] == "one element"
        assert found["token_variance"] == "one element"
        assert found["l2"] == pytest.approx(abs(value), rel=1e-6, abs=0)
        assert found["mean"] == pytest.approx(value, rel=1e-6, abs=0)
        assert (found["count"], found["tokens"]) == (1, 1)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_an_empty_tensor_is_absent(shape: tuple[int, ...]) -> None:
    assert set(measured(torch.empty(shape)).values()) == {"not supported: empty tensor"}
    assert statistics.norms([torch.empty(shape)]) == [0.0]


def test_complex_activations_are_absent() -> None:
    found = measured(torch.zeros(2, 2, dtype=torch.complex64))
    assert set(found.values()) == {"not supported: complex values"}


def test_the_tensor_is_not_touched() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = x * 1
    version, before = y._version, y.detach().clone()
    measured(y)
    statistics.norms([y])
    statistics.inner_product(y, y)
    assert y._version == version
    assert torch.equal(y, before)
    assert y.grad_fn is not None


# -- layouts, slow statistics ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (2, 3, 2, 2, 3)])
def test_the_feature_axis_of_convolutions_is_the_channel(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    found = measured(x, feature_axis=1)
    assert found["tokens"] == x.numel() / shape[1]
    assert_equal(found, twin(x, 1), torch.float64)
    assert found["token_variance"] == pytest.approx(x.var(1, correction=0).mean().item(), rel=1e-12)
    assert found["token_cosine"] == "not supported: no token axis"


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(2, 5), st.booleans())
def test_token_cosine_equals_all_pairs(
    seed: int, batch: int, tokens: int, width: int, masked: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, tokens, width)) + rng.choice([0.0, 3.0])
    valid = rng.random((batch, tokens)) < 0.7 if masked else np.ones((batch, tokens), bool)
    expected = reference.token_cosine([s[v] for s, v in zip(x, valid, strict=True)])
    if not valid.any():
        return
    mask = torch.tensor(valid) if masked else None
    for token_axis in (1, 0):
        at = torch.tensor(x) if token_axis == 1 else torch.tensor(x).transpose(0, 1)
        found = measured(at, token_axis=token_axis, valid=mask)["token_cosine"]
        if tokens == 1:
            assert found == "not supported: one token"
        else:
            assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(seeds, st.booleans())
def test_input_cosine_equals_the_twin(seed: int, masked: bool) -> None:
    rng = np.random.default_rng(seed)
    x, origin = rng.standard_normal((2, 3, 4, 5))
    valid = rng.random((3, 4)) < 0.7 if masked else None
    if valid is not None and not valid.any():
        return
    expected = reference.input_cosine(
        reference.positions(x, valid=valid), reference.positions(origin, valid=valid)
    )
    mask = None if valid is None else torch.tensor(valid)
    found = measured(torch.tensor(x), input=torch.tensor(origin), valid=mask)["input_cosine"]
    assert found == pytest.approx(expected, abs=1e-12)


def test_input_cosine_says_why_it_is_absent() -> None:
    x = torch.ones(2, 3, 4)
    assert measured(x)["input_cosine"] == "not supported: the trunk's input was not kept"
    other = torch.ones(2, 3, 5)
    assert measured(x, input=other)["input_cosine"] == "not supported: the width differs from the input's"


def test_slow_statistics_wait_for_their_turn() -> None:
    found = measured(torch.ones(2, 3, 4), slow=False)
    slow = {n for n in ACTIVATION if STATISTICS[n].slow} - set(statistics.SLOW_PAIR)
    assert {n for n, v in found.items() if v == "not sampled"} == slow


def test_every_statistic_of_the_table_has_a_kernel_or_is_a_moment() -> None:
    moments = set(statistics.moments.robust_moments(torch.ones(2), None)) | {"tokens"}
    on_pairs = {"dot_next", "diff_next_l2", "unit_skip"}
    kernels = set(statistics.KERNELS) | set(statistics.PAIR_KERNELS)
    assert not set(statistics.KERNELS) & set(statistics.PAIR_KERNELS)
    assert kernels | moments | on_pairs == set(ACTIVATION) | set(GRADIENT)
    assert set(statistics.moments._moments_on_cpu(torch.ones(2))) == moments - {"tokens"}


def test_an_unknown_kernel_is_refused() -> None:
    for register in (statistics.kernel, statistics.pair_kernel):
        with pytest.raises(KeyError, match="elegance"):
            register("elegance")


# -- pairs -------------------------------------------------------------------------------------------


@given(tensors(), seeds, st.floats(-1, 1))
def test_pairs_equal_the_twin(a: Tensor, seed: int, share: float) -> None:
    noise = torch.tensor(np.random.default_rng(seed).standard_normal(tuple(a.shape)))
    b = (a.double() * share + noise * (a.double().abs().mean() * (1 - abs(share)))).to(a.dtype)
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    if not np.isfinite(y).all():
        return
    norms = reference.l2(x), reference.l2(y)
    dot = math.fsum(x * y)
    relative = RELATIVE[a.dtype]
    assert abs(float(statistics.inner_product(a, b)) - dot) <= relative * norms[0] * norms[1] + 1e-300
    difference = float(statistics.difference_norm(a, b))
    assert difference == pytest.approx(
        reference.l2(x - y), rel=relative, abs=relative * 1e-1 * sum(norms)
    )


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-15, 1e15, 1e19, 1e37])
def test_pairs_of_float32_far_from_one(scale: float) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 50) * scale
    x, y = a.double().numpy(), b.double().numpy()
    assert statistics.inner_product(a, b) == pytest.approx(float(x @ y), rel=1e-5, abs=0)
    assert statistics.difference_norm(a, b) == pytest.approx(reference.l2(x - y), rel=1e-5, abs=0)


def test_the_difference_of_opposite_extremes_is_finite() -> None:
    largest = torch.finfo(torch.float32).max
    a, b = torch.full((2,), largest), torch.full((2,), -largest)
    assert statistics.difference_norm(a, b) == pytest.approx(2 * math.sqrt(2) * largest)
    assert math.isnan(statistics.difference_norm(a, torch.tensor([math.nan, 0.0])))


def test_pairs_of_different_dtypes() -> None:
    a, b = torch.randn(20), torch.randn(20, dtype=torch.float64)
    assert statistics.inner_product(a, b) == pytest.approx(float(a.double() @ b), rel=1e-12)
    assert statistics.inner_product(a.bfloat16(), b.bfloat16()) == pytest.approx(
        float(a.bfloat16().double() @ b.bfloat16().double()), rel=1e-6
    )


def test_equal_tensors_differ_by_exactly_zero() -> None:
    x = torch.randn(10)
    assert statistics.difference_norm(x, x.clone()) == 0.0


# -- norms of parameters -----------------------------------------------------------------------------


@given(st.lists(tensors(), max_size=5))
def test_norms_equal_the_twin(found: list[Tensor]) -> None:
    for x, norm in zip(found, statistics.norms(found), strict=True):
        assert norm == pytest.approx(
            reference.l2(x.double().numpy()), rel=RELATIVE[x.dtype], abs=2 * SMALLEST
        )


def test_sparse_gradients_are_coalesced_before_they_are_squared() -> None:
    x = torch.sparse_coo_tensor(
        [[0, 0, 2]], [[3.0, 1.0], [1.0, 1.0], [1.0, 0.0]], (4, 2), check_invariants=True
    )
    assert not x.is_coalesced()
    assert statistics.norms([x])[0] == pytest.approx(math.sqrt(16 + 4 + 1))
    assert statistics.nonfinite(x, 1.0) == 0
    empty = torch.sparse_coo_tensor(
        torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 2), (4, 2), check_invariants=True
    )
    assert statistics.norms([empty]) == [0.0]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_other_layouts() -> None:
    dense = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert statistics.norms([dense.to_sparse_csr(), dense.to_mkldnn()]) == pytest.approx([5.0, 5.0])


def test_complex_parameters_have_the_norm_of_their_parts() -> None:
    x = torch.tensor([3 + 4j, 1j])
    assert statistics.norms([x, x.conj(), x.resolve_conj()]) == pytest.approx([math.sqrt(26)] * 3)
    assert statistics.nonfinite(torch.tensor([complex(math.inf, 0.0), 1j]), math.inf) == 1


def test_tiny_and_huge_parameters() -> None:
    x = [torch.full((100,), 1e-30), torch.full((100,), 1e-42), torch.full((100,), 1e30), torch.zeros(3)]
    expected = [reference.l2(t.double().numpy()) for t in x]
    assert statistics.norms(x) == pytest.approx(expected, rel=1e-6)


def test_nonfinite_elements_of_parameters() -> None:
    x = torch.tensor([1.0, math.nan, math.inf])
    norm = statistics.norms([x])[0]
    assert math.isnan(norm)
    assert statistics.nonfinite(x, norm) == 2
    # An infinite norm may come from finite elements: that is no non-finite element.
    assert statistics.nonfinite(torch.ones(3), math.inf) == 0


# -- pooling -----------------------------------------------------------------------------------------


def _row(x: Tensor, origin: Tensor) -> list[float]:
    values, absent = statistics.measure(x, ACTIVATION, slow=True, stream=True, input=origin)
    assert set(absent.values()) <= {"one element"}
    values = [float(v) for v in values]
    values[ACTIVATION.index("dot_next")] = float(statistics.inner_product(x, origin))
    values[ACTIVATION.index("diff_next_l2")] = float(statistics.difference_norm(x, origin))
    values[ACTIVATION.index("unit_skip")] = 1.0
    for name, value in statistics.measure_pair(x, origin, STATISTICS).items():
        assert not isinstance(value, statistics.Absent)
        values[ACTIVATION.index(name)] = float(value)
    return values


@settings(max_examples=50)
@given(
    seeds,
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from([1e-200, 1e-3, 1.0, 1e150]),
)
@example(0, [1, 1], 1.0)
def test_pooled_micro_batches_are_one_batch(seed: int, sizes: list[int], scale: float) -> None:
    rng = np.random.default_rng(seed)
    parts = [torch.tensor(rng.standard_normal((n, 3, 4)) + rng.choice([0, 5])) * scale for n in sizes]
    if rng.random() < 0.5:
        parts[0] = parts[0] * rng.choice([1.0, 1e-8])
    origins = [torch.tensor(rng.standard_normal((n, 3, 4))) * scale for n in sizes]
    values = np.array([[_row(x, o)] for x, o in zip(parts, origins, strict=True)])
    pooled = statistics.pool(ACTIVATION, values)[0]
    whole = _row(torch.cat(parts), torch.cat(origins))
    rms = whole[ACTIVATION.index("l2")] / math.sqrt(whole[ACTIVATION.index("count")])
    for name, found, expected in zip(ACTIVATION, pooled, whole, strict=True):
        close = found == expected or abs(found - expected) <= 1e-11 * max(
            abs(expected), rms if name == "mean" else 0.0, 1.0 if STATISTICS[name].directions else 0.0
        )
        cancelled = name == "dot_next" and abs(found - expected) <= 1e-13 * rms * rms * 1e3
        assert close or cancelled, (name, found, expected)


def test_a_sample_without_the_layer_takes_no_part() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    row = _row(x, x + 1)
    nothing = [math.nan] * len(ACTIVATION)
    pooled = statistics.pool(ACTIVATION, np.array([[nothing], [row], [nothing]]))[0]
    assert pooled == pytest.approx(row)


def test_a_sample_of_zeros_adds_its_count_only() -> None:
    x, zeros = torch.randn(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, 4, dtype=torch.float64)
    columns = GRADIENT
    rows = []
    for t in (x, zeros):
        values, _ = statistics.measure(t, columns, slow=True)
        rows.append([[float(v) for v in values]])
    pooled = dict(zip(columns, statistics.pool(columns, np.array(rows))[0], strict=True))
    expected = reference.statistics(torch.cat([x, zeros]).numpy())
    for name, value in expected.items():
        assert pooled[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name


def test_pooling_keeps_what_is_not_finite() -> None:
    columns = GRADIENT
    rows = []
    for t in (torch.ones(2, 3), torch.tensor([[math.nan, 1.0]]), torch.tensor([[math.inf, 1.0]])):
        values, _ = statistics.measure(t, columns)
        rows.append([[float(v) for v in values]])
    pooled = dict(zip(columns, statistics.pool(columns, np.array(rows))[0], strict=True))
    assert math.isnan(pooled["l2"])
    assert math.isnan(pooled["absmax"])
    assert pooled["nonfinite"] == 2
    infinite = statistics.pool(columns, np.array([rows[0], rows[2]]))[0]
    assert infinite[columns.index("l2")] == math.inf
