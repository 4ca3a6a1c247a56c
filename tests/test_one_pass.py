"""The optional kernels against loops in float64, at every length of its vector loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradscope.statistics import one_pass

pytestmark = pytest.mark.skipif(not one_pass.available(), reason="the extension module was not built")
DTYPES = (torch.float32, torch.bfloat16)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*range(1, 40), 1000, (1 << 20) + 17])
def test_moments_at_every_length(n: int, dtype: torch.dtype) -> None:
    x = drawn(n, dtype=dtype)
    x[:: max(n // 3, 2)] = 0.0
    x[1:2] = -0.0
    found = one_pass.moments(x)
    assert found is not None
    wide = x.double().numpy()
    expected = [
        np.sqrt(np.square(wide).sum()),
        n,
        wide.mean(),
        wide.var(ddof=1) if n > 1 else math.nan,
        np.abs(wide).max(),
        (wide == 0).sum(),
        0,
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-14)
    squares = one_pass.squares(x)
    assert squares == pytest.approx(np.square(wide).sum(), rel=1e-12)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_counted_wherever_it_is(n: int, value: float) -> None:
    for at in {0, n // 2, n - 1}:
        x = drawn(n)
        x[at] = value
        found = one_pass.moments(x)
        assert found is not None and found[6] == 1.0
        assert found[4] == abs(value) or (math.isnan(value) and math.isnan(found[4]))
        assert found[0] == found[4] or math.isnan(found[0])


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_no_square_leaves_the_range(scale: float) -> None:
    x = drawn(5, 37, scale=scale)
    found = one_pass.moments(x)
    rows = one_pass.rows(x, None, 5, 1, tokens_first=False)
    assert found is not None and rows is not None
    wide = x.double().numpy()
    assert found[0] == pytest.approx(np.linalg.norm(wide), rel=1e-12, abs=0)
    assert found[3] == pytest.approx(wide.var(ddof=1), rel=1e-9, abs=0)
    assert rows.fourth == pytest.approx((wide**4).sum(), rel=1e-12, abs=0)


@pytest.mark.parametrize("value", [1e-3, 0.1, 7.0])
def test_what_is_constant_has_no_variance(value: float) -> None:
    found = one_pass.moments(torch.full((1000,), value))
    assert found is not None and found[3] <= 1e-30 * value**2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*range(1, 35), 4096])
def test_pairs_at_every_length(n: int, dtype: torch.dtype) -> None:
    x, y = drawn(n, dtype=dtype), drawn(n, dtype=dtype, seed=1)
    a, b = x.double().numpy(), y.double().numpy()
    found = one_pass.pair(x, y)
    assert found == pytest.approx((a @ b, np.square(a - b).sum()), rel=1e-12)
    assert one_pass.pair(x, x.clone()) == pytest.approx((a @ a, 0.0), rel=1e-12)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("features", [1, 2, 7, 8, 9, 17, 64])
def test_rows_of_tokens(features: int, tokens_first: bool, dtype: torch.dtype) -> None:
    batch, tokens = 3, 5
    x = drawn(batch, tokens, features, dtype=dtype)
    start = drawn(batch, tokens, features, dtype=dtype, seed=1)
    a, b = x.double().numpy(), start.double().numpy()
    if tokens_first:
        x, start = x.transpose(0, 1), start.transpose(0, 1)
    found = one_pass.rows(x, start, batch, tokens, tokens_first=tokens_first)
    assert found is not None
    expected = {
        "fourth": (a**4).sum(),
        "within": a.var(-1).sum() * features,
        "direction": np.square(unit(a).sum(1)).sum(),
        "centred": np.square(a - a.mean(1, keepdims=True)).sum(),
        "input": (unit(a) * unit(b)).sum(),
        "zero": 0,
        "zero_input": 0,
    }
    assert found._asdict() == pytest.approx(expected, rel=1e-11, abs=1e-14)
    axis = 1 if tokens_first else 0
    assert one_pass.together(x, axis) == pytest.approx(np.square(a.sum(0)).sum(), rel=1e-12)


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("features", [2, 7, 8, 9, 64])
@pytest.mark.parametrize("near", [1.0, 1e-3, 30.0])
def test_rows_of_two_positions(features: int, branch: bool, near: float) -> None:
    h = drawn(6, features)
    other = drawn(6, features, seed=1) * near if branch else h + near * drawn(6, features, seed=1)
    a, b = h.double().numpy(), other.double().numpy()
    change = b if branch else b - a
    ratio = np.linalg.norm(change, axis=-1) / np.linalg.norm(a, axis=-1)
    found = one_pass.pair_rows(h, other, branch=branch)
    assert found is not None
    assert found.ratio == pytest.approx(ratio.sum(), rel=1e-12)
    assert found.change_cosine == pytest.approx((unit(change) * unit(a)).sum(), rel=1e-10, abs=1e-13)
    assert (found.zero, found.zero_other, found.zero_change) == (0, 0, 0)
    if not branch:
        # Of the unit vectors, as Kahan has it: no arc cosine, which loses half of the digits.
        u, v = unit(a), unit(b)
        angle = 2 * np.arctan2(np.linalg.norm(u - v, axis=-1), np.linalg.norm(u + v, axis=-1))
        assert found.angle == pytest.approx(angle.sum(), rel=1e-9)
        assert found.cosine == pytest.approx((u * v).sum(), rel=1e-12)


def test_zero_positions_are_counted() -> None:
    h, other = drawn(4, 5), drawn(4, 5, seed=1)
    h[1] = 0
    other[2] = 0
    other[3] = h[3]
    found = one_pass.pair_rows(h, other, branch=False)
    assert found is not None
    assert (found.zero, found.zero_other, found.zero_change) == (1, 1, 1)
    rows = one_pass.rows(h, other, 1, 4, tokens_first=False)
    assert rows is not None and (rows.zero, rows.zero_input) == (1, 1)


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(0, 3),
        torch.ones(3, dtype=torch.float64),
        torch.ones(3, dtype=torch.float16),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, device="meta"),
        torch.ones(3, 3).to_sparse(),
        torch.ones(3, dtype=torch.complex64).conj().imag,
    ],
    ids=["empty", "double", "half", "integer", "meta", "sparse", "negated"],
)
def test_what_it_cannot_read_is_left_to_torch(x: Any) -> None:
    assert one_pass.moments(x) is None
    assert one_pass.squares(x) is None
    assert one_pass.pair(x, x) is None


@pytest.mark.parametrize("offset", [0, 3])
def test_memory_that_was_given_back_is_not_read(offset: int) -> None:
    x = drawn(100)[offset:]
    x.untyped_storage().resize_(0)
    assert one_pass.moments(x) is None
    assert one_pass.pair(x, drawn(100)[offset:]) is None


def test_a_subclass_is_left_to_torch() -> None:
    class Mine(Tensor):
        pass

    assert one_pass.moments(drawn(4).as_subclass(Mine)) is None


def test_two_that_differ_in_shape_or_dtype_are_left_to_torch() -> None:
    assert one_pass.pair(drawn(4), drawn(2, 2)) is None
    assert one_pass.pair(drawn(4), drawn(4, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
def test_any_layout(layout: str) -> None:
    x = drawn(6, 8)
    x = {"transposed": x.T, "strided": x[:, ::3], "expanded": x[:, :1].expand(6, 4), "offset": x[2:]}[
        layout
    ]
    found = one_pass.moments(x)
    assert found is not None
    wide = x.double().numpy()
    assert found[0] == pytest.approx(np.linalg.norm(wide), rel=1e-12)
    assert found[1] == wide.size


def test_wrong_calls_of_the_module_are_errors() -> None:
    from gradscope.statistics import _one_pass  # type: ignore[attr-defined]

    with pytest.raises(TypeError, match="3 arguments"):
        _one_pass.moments(1)
    with pytest.raises((TypeError, OverflowError)):
        _one_pass.squares("x", 0, 1)
    with pytest.raises(OverflowError):
        _one_pass.squares(-1, 0, 1)
