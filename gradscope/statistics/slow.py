"""Kernels of the slow statistics of one tensor: its shape over features, tokens and samples."""

from __future__ import annotations

import math

import torch

from gradscope.statistics import one_pass
from gradscope.statistics.moments import frobenius_norm
from gradscope.statistics.sample import (
    NO_DIRECTION,
    Absent,
    Sample,
    Value,
    directions,
    kernel,
    scalar,
)

__all__: list[str] = []


@kernel("kurtosis")
def kurtosis(sample: Sample) -> Value | Absent:
    """E x^4 / (E x^2)^2 over all elements, uncentred. [..., d] -> []. Unit: 1.

    3 for a Gaussian, 1 for +-c, large where few elements carry the energy (outlier features; He et
    al. 2024, arXiv:2405.19279). Computed on x / sqrt(E x^2), so that nothing leaves the range.
    NaN where x is zero or not finite.
    """
    if sample.rows is not None and 0 < (squares := sample.x.numel() * sample.rms**2):
        return sample.rows.fourth / squares * (sample.x.numel() / squares)
    unit = sample.wide(sample.positions()) / sample.rms
    return scalar(sample.mean(unit.square().square().mean(-1, dtype=torch.float64)))


@kernel("token_variance")
def token_variance(sample: Sample) -> Value | Absent:
    """Mean over positions of the variance over features (biased). [..., d] -> []. Unit: x^2.

    The ``act_var`` of signal propagation (Xiong et al. 2020, arXiv:2002.04745, Lemma 2). Two-pass,
    so a large mean costs no digits.
    """
    features = sample.x.shape[sample.feature_axis]
    if features < 2:
        return Absent("one element")
    if sample.rows is not None:
        return max(sample.rows.within, 0.0) / sample.x.numel()
    x = sample.wide(sample.positions())
    return scalar(sample.mean(x.var(-1, correction=0)))


@kernel("token_cosine")
def token_cosine(sample: Sample) -> Value | Absent:
    """Mean cosine between different tokens of one sequence. [B, T, d] -> []. Unit: 1.

    (|sum_t u_t|^2 - T) / (T (T - 1)) with u_t = x_t / |x_t|, averaged over the valid tokens of the
    sequences that have at least two (longer sequences weigh more). 1 means rank collapse (Dong et al.
    2021, arXiv:2103.03404; Noci et al. 2022, arXiv:2206.03126). Absent where a token is exactly zero.
    """
    sequences = sample.sequences()
    if isinstance(sequences, Absent):
        return sequences
    original, valid = sequences
    rows = sample.rows
    if rows is not None:
        batch, tokens = original.shape[:2]
        return NO_DIRECTION if rows.zero else (rows.direction / batch - tokens) / (tokens * (tokens - 1))
    zero = (original == 0).all(-1).any()
    x = sample.wide(original) / sample.rms
    # The norm in float64: the square of a small token leaves float32's range.
    unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64).to(x.dtype)
    if valid is None:
        tokens = torch.full((x.shape[0],), float(x.shape[1]), dtype=torch.float64, device=x.device)
    else:
        unit = torch.where(valid[..., None], unit, 0.0)
        zero = ((original == 0).all(-1) & valid).any()
        tokens = valid.sum(1, dtype=torch.float64)
    total = unit.sum(1).double().square().sum(-1)
    long = tokens >= 2
    cosine = torch.where(long, (total - tokens) / (tokens - 1), 0.0)  # times the number of tokens
    mean = cosine.sum() / torch.where(long, tokens, 0.0).sum()
    return scalar(torch.where(zero, NO_DIRECTION, mean))


@kernel("token_centred_l2")
def token_centred_l2(sample: Sample) -> Value | Absent:
    """sqrt(sum_b |X_b - 1 m_b^T|_F^2), m_b the mean token of sequence b. [B, T, d] -> []. Unit: x.

    Divided by |X|_F it is the rank residual: towards 0 as all tokens of a sequence become one (Dong et
    al. 2021, arXiv:2103.03404). Masked tokens take no part; a sequence of one token adds 0.
    """
    sequences = sample.sequences()
    if isinstance(sequences, Absent):
        return sequences
    x, valid = sequences
    if sample.rows is not None:
        return max(sample.rows.centred, 0.0) ** 0.5
    x = x.double()
    if valid is None:
        return frobenius_norm(x - x.mean(1, keepdim=True))
    x = torch.where(valid[..., None], x, 0.0)
    mean = x.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
    return frobenius_norm(torch.where(valid[..., None], x - mean, 0.0))


@kernel("sample_dot")
def sample_dot(sample: Sample) -> Value | Absent:
    """Sum over samples of <x_b, mean of the others>, (|sum_b x_b|^2 - |X|^2)/(B - 1). Unit: x^2.

    Of gradients, and divided by |X|_F^2, it is E<d(x), d(x')>/E|d|^2 over pairs of different samples:
    the gradient correlation, towards 0 where gradients are shattered (Balduzzi et al. 2017,
    arXiv:1702.08591). Samples are the first axis, or the second where tokens come first; token t of
    one meets token t of the other, and masked tokens count as 0.
    """
    x, axis = sample.x, 1 if sample.x.dim() == 3 and sample.token_axis == 0 else 0
    if sample.valid is not None:
        if sample.valid.dim() < 2:
            return Absent("not supported: samples and tokens in one axis")
        x = torch.where(sample.valid[..., None], x, 0.0)
    samples = x.shape[axis]
    if samples < 2:
        return Absent("not supported: one sample")
    if sample.plain and isinstance(sample.rms, float) and math.isfinite(sample.rms):
        together = one_pass.together(x, axis)
        if together is not None:
            return (together - x.numel() * sample.rms**2) / (samples - 1)
    # In units of the root mean square: the squares of small gradients would leave the range.
    rms = torch.as_tensor(sample.rms, dtype=torch.float64, device=x.device)
    unit = x.double() / torch.where(rms == 0, 1.0, rms)
    total, own = unit.sum(axis).square().sum(), unit.square().sum()
    return scalar((total - own) / (samples - 1) * rms * rms)


@kernel("input_cosine")
def input_cosine(sample: Sample) -> Value | Absent:
    """Input presence: mean over tokens of cos(h_l, h_0). [..., d] -> []. Unit: 1.

    Absent where a token of either is exactly zero.
    """
    if sample.input is None:
        return Absent("not supported: the trunk's input was not kept")
    if sample.input.shape != sample.x.shape:
        return Absent("not supported: the width differs from the input's")
    rows = sample.rows
    if rows is not None and math.isfinite(rows.input):
        return rows.input * sample.x.shape[-1] / sample.x.numel()
    # The trunk's input is kept as it was; the sample has been widened.
    start_input = sample.input.to(sample.x.dtype)
    start_sample = Sample(start_input, sample.feature_axis, sample.token_axis, sample.valid)
    x, zero = directions(sample.positions())
    start, zero_start = directions(start_sample.positions())
    return sample.unless_zero(sample.mean(torch.linalg.vecdot(x, start)), zero, zero_start)
